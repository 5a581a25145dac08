"""An exported folder: SpeechBrain's interfaces answer as our own commands."""

import re
import shutil
import sys

import numpy as np
import pytest
import torch
from exports import log_posteriors_of, make_recordings, make_trained
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.inference.speaker import SpeakerRecognition

from spkid.errors import UserError
from spkid.inference import export as exporting
from spkid.inference import load
from spkid.inference.exported import is_export
from spkid.inference.opening import save_gallery


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def trained(place):
    return make_trained(place)


@pytest.fixture(scope="module")
def recordings(place):
    return make_recordings(place)


@pytest.fixture(autouse=True)
def no_onnx(monkeypatch):
    """It takes long; see test_onnx.py."""
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def exported(place, trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "find_spec", lambda name: None)
        exporting.main([str(trained[1]), str(place / "exported")])
    return place / "exported"


def test_speechbrain_answers_as_we_do_from_any_folder(
    trained, exported, recordings, tmp_path, monkeypatch
):
    moved = shutil.copytree(exported, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    savedir = tmp_path / "cache"
    theirs = EncoderClassifier.from_hparams("moved", savedir=savedir)
    assert moved.is_dir() and savedir.is_dir()
    model = trained[0]
    for path in recordings:
        found, best, index, name = theirs.classify_file(str(path))
        ours = log_posteriors_of(model, path)
        assert np.abs(found[0].numpy() - ours).max() <= 1e-4
        assert name == [model.identify(path).likeliest[0][0]]
        assert best.item() == pytest.approx(ours.max(), abs=1e-4)
        assert model.speakers[index.item()] == name[0]


def test_a_batch_of_waveforms_of_two_lengths(exported, recordings):
    theirs = EncoderClassifier.from_hparams(str(exported))
    waves = [theirs.load_audio(str(path)) for path in recordings[:3]]
    waves[1] = waves[1][:8000]
    batch = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    lengths = torch.tensor([len(wave) for wave in waves]) / batch.shape[1]
    together = theirs.classify_batch(batch, lengths)[3]
    alone = [theirs.classify_batch(wave)[3][0] for wave in waves]
    assert together == alone


def test_verification_is_the_back_ends_cosine(trained, exported, recordings):
    theirs = SpeakerRecognition.from_hparams(str(exported))
    model = trained[0]
    vectors = model.backend.project(model.embed_files(recordings))
    for i, j in ((0, 1), (2, 3), (0, 2)):
        score, _ = theirs.verify_files(str(recordings[i]), str(recordings[j]))
        assert score.item() == pytest.approx(vectors[i] @ vectors[j], abs=1e-4)


def test_our_own_commands_read_it(trained, exported, recordings):
    again = load(exported)
    for path in recordings:
        assert again.identify(path) == trained[0].identify(path)
    pair = recordings[:2]
    assert again.verify(*pair) == trained[0].verify(*pair)


def test_whoever_is_enrolled_is_known_behind_each_door(
    exported, recordings, tmp_path
):
    folder = shutil.copytree(exported, tmp_path / "export")
    model = load(folder)
    model.enroll("new", recordings[:2])
    model.forget("ann")
    save_gallery(folder, model.backend)
    theirs = EncoderClassifier.from_hparams(str(folder))
    found, _, _, name = theirs.classify_file(str(recordings[0]))
    assert name == ["new"]
    assert load(folder).speakers == model.speakers
    ours = log_posteriors_of(model, recordings[0])
    assert np.abs(found[0].numpy() - ours).max() <= 1e-4


def test_an_onnx_file_that_cannot_be_changed_changes_nothing(
    exported, tmp_path, monkeypatch
):
    folder = shutil.copytree(exported, tmp_path / "export")
    (folder / "model.onnx").write_bytes(b"of another day")
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = load(folder)
    with pytest.raises(UserError, match=r"model.onnx: .* pip install onnx"):
        save_gallery(folder, model.backend.forget("ann"))
    assert load(folder).speakers == model.speakers
    assert "n_speakers: 4" in (folder / "hyperparams.yaml").read_text()


def test_the_card_says_what_the_run_measured(trained, place, tmp_path):
    run = shutil.copytree(trained[1], tmp_path / "run")
    (run / "results.json").write_text(
        '{"valid": {"accuracy": 0.912}, "known": {"accuracy": 0.953}, '
        '"test": {"accuracy": null}, "system": "conformer", "expected": '
        '{"accuracy": 0.87, "low": 0.8, "high": 0.9}}'
    )
    exporting.export(run, tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: speechbrain\n")
    assert "| held-out, new sessions | 91.2% |" in card
    assert "| held-out, sessions that were trained on | 95.3% |" in card
    assert "87.0% (80.0% to 90.0%)" in card
    assert "license:" not in card
    assert str(tmp_path) not in card


def test_what_is_there_is_refused_unless_it_is_an_export(
    trained, exported, tmp_path
):
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        exporting.export(trained[1], tmp_path)
    with pytest.raises(UserError, match="holds something else"):
        exporting.export(trained[1], tmp_path / "own.txt")
    with pytest.raises(UserError, match="is exported already"):
        exporting.export(exported, tmp_path / "new")
    again = shutil.copytree(exported, tmp_path / "again")
    (again / "left.over").write_text("old")
    assert "left.over" not in exporting.export(trained[1], again)
    assert is_export(again) and not (again / "left.over").exists()


def test_a_failure_leaves_what_was_there(
    trained, exported, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_card", full)
    with pytest.raises(OSError, match="No space"):
        exporting.export(trained[1], tmp_path / "new")
    assert [*tmp_path.iterdir()] == []
    old = shutil.copytree(exported, tmp_path / "old")
    with pytest.raises(OSError, match="No space"):
        exporting.export(trained[1], old)
    assert [*tmp_path.iterdir()] == [old] and is_export(old)


def test_an_onnx_file_that_is_asked_for_needs_onnx(trained, tmp_path):
    with pytest.raises(UserError, match="pip install onnx"):
        exporting.export(trained[1], tmp_path / "new", quantized=True)
    assert [*tmp_path.iterdir()] == []


def test_windows_are_refused(tmp_path):
    _, run = make_trained(tmp_path, evaluation="windows")
    with pytest.raises(UserError, match="evaluation=windows can't be exported"):
        exporting.export(run, tmp_path / "new")


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("!new:spkid.features.UtteranceNorm", "!new:os.mkdir", "isn't one of"),
        ("exported.WhitenedEmbedding", "WhitenedCosine", "can't be loaded|:"),
        ("silence: hw4", "silence: loud", "must be vad or hw4"),
        ("d_model: 24", "d_model: 48", "larger model|can't be loaded"),
    ],
)
def test_a_strangers_export_runs_no_code(exported, tmp_path, old, new, words):
    folder = shutil.copytree(exported, tmp_path / "export")
    path = folder / "hyperparams.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(re.sub(re.escape(old), new, text), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        load(folder)
