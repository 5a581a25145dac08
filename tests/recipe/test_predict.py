"""predict.py and SpeakerIdentifier say what training's own test said."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from corpus import make_corpus
from harness import assert_one_sentence, results, run_predict

from ml2022hw4_prepare import prepare
from spkid.data import manifest
from spkid.evaluation import Evaluation
from spkid.inference import SpeakerIdentifier


def test_predict_writes_the_same_submission(finished, tmp_path):
    output, target = finished[0], tmp_path / "again.csv"
    done = run_predict(output, f"--submission={target}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    assert target.read_text() == (output / "submission.csv").read_text()
    estimate = re.search(r"Estimated test accuracy .*", done.stdout)[0]
    assert estimate in finished[1].stdout
    accuracy = results(output)["test"]["accuracy"]
    assert f"Test accuracy: {accuracy:.4f}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.csv"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    done = run_predict(tmp_path)
    assert_one_sentence(done, str(tmp_path), "holds no finished run")
    assert not list(tmp_path.iterdir())


def test_the_identifier_says_what_the_run_said(data, finished):
    output = finished[0]
    identifier = SpeakerIdentifier.from_run(output)
    corpus, features = prepare(data, pack_folder=output / "packs")
    tested = identifier.score(features, manifest(corpus.test))
    saved = Evaluation.load(output / "evaluation.npz").of_part("test")
    for column in ("id", "part", "target", "guess", "frames"):
        ours, theirs = getattr(tested, column), getattr(saved, column)
        assert np.array_equal(ours, theirs), column
    for column in ("loss", "confidence"):
        ours, theirs = getattr(tested, column), getattr(saved, column)
        assert np.allclose(ours, theirs, atol=1e-5), column
    assert np.allclose(tested.embedding, saved.embedding, atol=2e-3)  # float16
    assert tested.accuracy() == results(output)["test"]["accuracy"]
    rows = (output / "submission.csv").read_text().splitlines()[1:]
    said = dict(row.split(",") for row in rows)
    for name, guess in zip(tested.id, tested.guess, strict=True):
        assert identifier.speakers[guess] == said[name]
    # One by one, without a store.
    for utterance in corpus.test[:3]:
        mel = torch.load(data / utterance.path, weights_only=True)[None]
        row = tested.id.tolist().index(utterance.path)
        guess = identifier.classify(mel).argmax(-1).item()
        assert guess == tested.guess[row]


def test_new_recordings_need_no_training_data(finished, tmp_path):
    new = make_corpus(tmp_path / "new", n_test=9, seed=0)
    for path in [*new.glob("uttr-[0-9]*"), new / "metadata.json"]:
        path.unlink()
    output, before = finished[0], (finished[0] / "submission.csv").read_bytes()
    done = run_predict(output, f"--data_folder={new}")
    assert done.returncode == 0, done.stderr
    said = re.search(r"Test accuracy: ([\d.]+)", done.stdout)
    assert float(said[1]) >= 0.7
    assert "Estimated test accuracy" in done.stdout
    rows = (output / "submission-new.csv").read_text().splitlines()
    assert len(rows) == 10
    assert (output / "submission.csv").read_bytes() == before
    testdata = json.loads((new / "testdata.json").read_text())
    (new / "testdata.json").write_text(
        json.dumps({**testdata, "utterances": []})
    )
    done = run_predict(output, f"--data_folder={new}")
    assert_one_sentence(done, "testdata.json: has no utterance")


def test_speakers_of_another_mapping_are_refused(finished, tmp_path):
    other = make_corpus(tmp_path / "other", n_speakers=3)
    done = run_predict(finished[0], f"--data_folder={other}")
    assert_one_sentence(
        done, "mapping.json: its speakers are not those of", "speakers.txt"
    )


def test_an_unknown_device_is_refused(finished):
    done = run_predict(finished[0], "--device=nonsense")
    assert_one_sentence(done, "--device nonsense: can't be used here")


@pytest.mark.parametrize("name", ["embedding_model.ckpt", "classifier.ckpt"])
def test_damaged_weights_are_named(finished, tmp_path, name):
    output = shutil.copytree(finished[0], tmp_path / "out")
    path = output / "model" / name
    path.write_bytes(path.read_bytes()[:-60])
    assert_one_sentence(run_predict(output), f"{path}: can't be loaded")


def test_confidences_of_windows_are_not_those_of_utterances(finished, tmp_path):
    """As if --test_only --evaluation=windows had been killed before its end,
    whose hyperparams.yaml is written first."""
    output = shutil.copytree(finished[0], tmp_path / "out")
    assert "Estimated test accuracy" in run_predict(output).stdout
    settings = output / "hyperparams.yaml"
    text = settings.read_text()
    assert "evaluation: whole" in text
    settings.write_text(
        text.replace("evaluation: whole", "evaluation: windows")
    )
    done = run_predict(output)
    assert done.returncode == 0, done.stderr
    assert "Test accuracy" in done.stdout
    assert "Estimated test accuracy" not in done.stdout
