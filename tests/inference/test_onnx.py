"""One ONNX file: PyTorch's answers without PyTorch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from exports import log_posteriors_of, make_recordings, make_trained

from spkid.backend import unit
from spkid.errors import UserError
from spkid.features import LogMel
from spkid.inference import export as exporting
from spkid.inference import load, onnx_export
from spkid.inference.onnx_identifier import OnnxIdentifier
from spkid.inference.opening import save_gallery

MODULES = Path(__file__).resolve().parents[2] / "modules"
WITHOUT_TORCH = """
import json, sys
for name in ("torch", "torchaudio", "speechbrain", "onnx", "onnxscript"):
    sys.modules[name] = None  # so that importing it fails
from spkid import cli
sys.argv = ["spkid", *sys.argv[1:]]
cli.run()
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def trained(place):
    return make_trained(place)


@pytest.fixture(scope="module")
def recordings(place):
    return make_recordings(place)


@pytest.fixture(scope="module")
def exported(place, trained):
    exporting.export(trained[1], place / "exported", quantized=True)
    return place / "exported"


def test_the_comparison_with_pytorch_is_kept(exported):
    report = json.loads((exported / "model.onnx.json").read_text())
    assert [one["input"] for one in report["parity"]] == [
        "features",
        "waveforms",
    ]
    for one in report["parity"]:
        assert all(0 < d <= 1e-4 for d in one["largest_difference"].values())
    assert report["bytes"] == (exported / "model.onnx").stat().st_size
    small = report["quantized"]
    assert small["compared_on"] == "random features"
    assert small["bytes"] < report["bytes"]
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert f"| | {100 * small['same_speaker']:.1f} % |" in card


def test_padding_and_company_change_nothing(trained, exported):
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    random = np.random.default_rng(0)
    counts = [201, 16000, 359, 48001, 1601]
    waves = [random.normal(0, 0.1, n).astype(np.float32) for n in counts]
    batch = np.full((5, 48001), np.float32(0.7))  # whatever the padding holds
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = wave
    feed = {"waveforms": batch, "samples": np.array(counts)}
    embeddings, posteriors = session.run(None, feed)
    own = trained[0].embed_waveforms(waves)
    assert np.abs(unit(embeddings) - unit(own)).max() <= 1e-4
    told = trained[0].backend.log_posteriors(own)
    assert np.abs(posteriors - told).max() <= 1e-4


def test_it_answers_as_pytorch_does(trained, exported, recordings):
    model = OnnxIdentifier(exported / "model.onnx")
    assert model.silence == trained[0].silence
    for path in recordings:
        ours, own = (m.identify(path) for m in (model, trained[0]))
        assert (ours.answer, ours.speaker) == (own.answer, own.speaker)
        assert ours.score == pytest.approx(own.score, abs=1e-3)
        assert ours.threshold == own.threshold
        found = log_posteriors_of(model, path)
        found = np.abs(found - log_posteriors_of(trained[0], path)).max()
        # Where 8 kHz end, powers are at LogMel's floor, and PyTorch's own FFT
        # is off by 2 % of them.
        assert found <= (1e-2 if path.name == "c.wav" else 1e-4)
    with pytest.raises(ValueError, match="at least 201 samples, not 200"):
        model.embed_waveforms([np.zeros(200, np.float32)])


def test_the_commands_need_no_torch(exported, trained, recordings):
    files = [path for path in recordings if path.name != "c.wav"]  # see above
    arguments = ["identify", exported, *files, "--runtime", "onnx"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments, "--json"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(MODULES)},
    )
    assert done.stderr == ""
    for answer, path in zip(json.loads(done.stdout), files, strict=True):
        own = trained[0].identify(path)
        assert answer["likeliest"][0][0] == own.likeliest[0][0]
        assert answer["probability"] == pytest.approx(own.probability, abs=1e-4)


def test_whoever_is_enrolled_is_known_to_onnx(exported, recordings, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "export")
    model = load(folder)
    model.enroll("new", recordings[:2])
    save_gallery(folder, model.backend)
    for name in ("model.onnx", "model.int8.onnx"):
        found = OnnxIdentifier(folder / name)
        assert found.identify(recordings[0]).likeliest[0][0] == "new"
        wave = np.ones((1, 16000), np.float32)
        feed = {"waveforms": wave, "samples": np.array([16000])}
        embedding, posteriors = found.session.run(None, feed)
        told = found.backend.log_posteriors(embedding)
        assert posteriors.shape == (1, 5)
        assert np.abs(posteriors - told).max() <= 1e-4
    load(folder / "model.onnx").verify(*recordings[:2])


def test_the_front_end_is_log_mel():
    log_mel = LogMel()
    front = onnx_export._FrontEnd(log_mel)
    waves = 0.1 * torch.randn(3, 8077)
    samples = torch.tensor([8077, 201, 4000])
    mels, frames = front(waves, samples)
    assert frames.tolist() == [51, 2, 26]
    for wave, n, found, count in zip(waves, samples, mels, frames, strict=True):
        own = log_mel(wave[None, :n])[0]
        assert (found[:count] - own).abs().max() <= 1e-3


def test_an_answer_that_differs_is_an_error(trained, exported, monkeypatch):
    import onnx

    model = onnx.load(exported / "model.onnx")
    other = trained[0].backend.forget("ann").enroll("ann", np.ones((1, 16)))
    onnx_export.set_speakers(model, other)
    with pytest.raises(UserError, match="log_posteriors differ from PyTorch"):
        onnx_export._compare(model, trained[0], [[16000]])


@pytest.mark.parametrize("system", ["transformer", "ecapa"])
def test_the_other_systems(system, tmp_path):
    model, run = make_trained(tmp_path, system)
    exporting.export(run, tmp_path / "new", source="features")
    session = onnxruntime.InferenceSession(tmp_path / "new" / "model.onnx")
    names = [one.name for one in session.get_inputs()]
    # ECAPA isn't exact under padding, so it isn't told of any.
    assert names == ["features", "frames"][: 1 if model.equal_length else 2]
    feed = {"features": np.ones((2, 30, 40), np.float32)}
    if len(names) == 2:
        feed["frames"] = np.array([30, 12])
    assert session.run(None, feed)[1].shape == (2, 4)
    with pytest.raises(UserError, match="takes log-mels"):
        OnnxIdentifier(tmp_path / "new" / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_bad_file_is_one_sentence(content, tmp_path):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="spkid export"):
        OnnxIdentifier(path)
