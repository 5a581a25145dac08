"""predict.py and SpeakerIdentifier say what training's own test said."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from corpus import make_corpus
from harness import assert_one_sentence, results, run_predict, run_train

import predict
from ml2022hw4_prepare import prepare
from spkid.data import manifest
from spkid.errors import UserError
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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--device=", "--device has no value; give one"),
        ("--submission=", "--submission .: is a folder; name a file in it"),
        ("--submission=/", "--submission /: is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_written_is_said_first(
    finished, tmp_path, option, words
):
    output = shutil.copytree(finished[0], tmp_path / "out")
    (output / "speakers.txt").unlink()  # is never read
    assert_one_sentence(run_predict(output, option), words)


def test_no_pack_is_made_where_a_stranger_says(finished, tmp_path, monkeypatch):
    output, chosen = shutil.copytree(finished[0], tmp_path / "out"), []
    path, elsewhere = output / "hyperparams.yaml", tmp_path / "elsewhere"
    elsewhere.mkdir()
    text, n = re.subn(
        r"(?m)^pack_folder: .*", f"pack_folder: {elsewhere}", path.read_text()
    )
    assert n == 1
    path.write_text(text)

    def stop(folder, **options):
        chosen.append(options["pack_folder"])
        raise UserError("seen")

    monkeypatch.setattr(predict, "prepare", stop)
    for arguments in ([], [f"--pack_folder={elsewhere}"]):
        with pytest.raises(UserError, match="seen"):
            predict.main([str(output), *arguments])
    assert chosen == [None, elsewhere]
    shutil.copytree(finished[0] / "packs", elsewhere, dirs_exist_ok=True)
    with pytest.raises(UserError, match="seen"):
        predict.main([str(output)])
    assert chosen[-1] == str(elsewhere)


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


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "shape": lambda path: path.write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["results.json", "evaluation.npz", "run.json"])
def test_what_is_not_needed_may_be_damaged(finished, tmp_path, name, damage):
    output = shutil.copytree(finished[0], tmp_path / "out")
    before = (output / "submission.csv").read_text()
    (output / "submission.csv").unlink()
    DAMAGES[damage](output / name)
    done = run_predict(output)
    assert done.returncode == 0, done.stderr
    assert (output / "submission.csv").read_text() == before
    estimated = "Estimated test accuracy" in done.stdout
    assert estimated == (name == "run.json")
    warned = "No accuracy is estimated: train.py --test_only" in done.stderr
    assert warned == (name != "run.json" and damage != "missing")


@pytest.mark.parametrize("name", ["speakers.txt", "model/classifier.ckpt"])
def test_the_cure_of_a_damaged_run_works(finished, tmp_path, data, name):
    output = shutil.copytree(finished[0], tmp_path / "out")
    whole = (output / name).read_bytes()
    (output / name).write_bytes(whole[: len(whole) // 2])
    assert_one_sentence(run_predict(output), "with train.py --test_only")
    done = run_train(data, output, "--test_only")
    assert done.returncode == 0, done.stderr
    done = run_predict(output)
    assert done.returncode == 0, done.stderr
    assert "Estimated test accuracy" in done.stdout


def test_a_strangers_class_needs_trust(finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "out")
    path, old = output / "hyperparams.yaml", "spkid.models.AttentiveStatistics"
    (tmp_path / "mine.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from spkid.models import AttentiveStatisticsPooling\n"
    )
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, "mine.AttentiveStatistics"))
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    here = {"environment": {"PYTHONPATH": paths}, "folder": tmp_path}
    done = run_predict(output, **here, real=True)
    assert_one_sentence(done, "!new:mine.AttentiveStatisticsPooling", "--trust")
    assert not (tmp_path / "ran").exists()
    done = run_predict(output, "--trust", **here, real=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems")
@pytest.mark.parametrize("name", ["n" * 250, os.fsdecode(b"caf\xe9")])
def test_other_data_may_have_any_name(finished, tmp_path, name):
    new, output = make_corpus(tmp_path / name, n_test=3), finished[0]
    done = run_predict(output, f"--data_folder={new}")
    assert done.returncode == 0, done.stderr
    (made,) = output.glob(f"submission-{name[:3]}*.csv")
    assert len(made.read_text().splitlines()) == 4
    made.unlink()
