"""hparams/speechbrain/*.yaml in SpeechBrain's own scripts, unmodified."""

import csv
import json
import re
import runpy
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
import torch.nn.functional as F
from harness import ROOT
from speechbrain.nnet.losses import (
    AdditiveAngularMargin,
    AngularMargin,
    LogSoftmaxWrapper,
)

SCRIPTS = ROOT / "tests" / "speechbrain_scripts"
YAML = ROOT / "hparams" / "speechbrain"
TINY = [
    "--d_model=24",
    "--n_layers=1",
    "--n_heads=2",
    "--d_ff=32",
    "--embedding_size=16",
    "--dropout=0.0",
    "--lr=0.01",
    "--num_workers=0",
    "--noprogressbar",
]
SPEAKERS = 28  # which templates/speaker_id insists on


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """(file, seconds, speaker) of 3 recordings of each of 28 speakers, who
    alternate between two sounds; their mean is normalised away."""
    folder = tmp_path_factory.mktemp("voices")
    generator = np.random.default_rng(0)
    rows = []
    for speaker in range(SPEAKERS):
        levels = generator.normal(0, 1.5, (2, 24))
        for utterance in range(3):
            n = 160 * int(generator.integers(40, 80))
            places = np.linspace(0, 23, n // 2 + 1)
            filters = [np.exp(np.interp(places, range(24), x)) for x in levels]
            noise = np.fft.rfft(generator.normal(0, 0.1, (2, n)))
            sounds = np.fft.irfft(noise * filters, n)
            wave = np.where(np.arange(n) // 1600 % 2, *sounds)
            path = folder / f"{speaker}-{utterance}.wav"
            soundfile.write(path, wave / abs(wave).max(), 16000)
            rows.append((str(path), n / 16000, f"id{speaker:02d}"))
    return rows


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script in this process as __main__; gives what it has defined,
    and its first training batch."""
    fit_batch = sb.Brain.fit_batch

    def run(script, yaml, *arguments):
        first = {}

        def see(head, inputs, output):
            first.setdefault("embeddings", inputs[0].detach())

        def spy(brain, batch):
            if not first:
                head = brain.modules.classifier
                first["weight"] = head.weight.detach().clone()
                head.register_forward_hook(see)
            loss = fit_batch(brain, batch)
            first.setdefault("loss", loss.item())
            first.setdefault("targets", batch.spk_id_encoded.data)
            return loss

        monkeypatch.setattr(sb.Brain, "fit_batch", spy)
        words = [script, str(yaml), f"--output_folder={tmp_path}/{yaml.stem}"]
        monkeypatch.setattr(sys, "argv", [*words, *TINY, *arguments])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*without targets")
            path = str(SCRIPTS / script)
            return runpy.run_path(path, run_name="__main__"), first

    monkeypatch.chdir(tmp_path)
    # What a script changes for good in its process.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(sb.utils.logger, "setup_logging", lambda *_: None)
    monkeypatch.setattr(sb.utils.logger, "get_environment_description", str)
    # They are skipped, but imported.
    for name in ("voxceleb", "mini_librispeech"):
        prepare = {f"prepare_{name}": lambda **_: None}
        module = SimpleNamespace(**prepare)
        monkeypatch.setitem(sys.modules, f"{name}_prepare", module)
    return run


def assert_margin_at_work(first, margin):
    """The first loss is that of SpeechBrain's margin on the cosines."""
    embeddings, targets = first["embeddings"], first["targets"]
    copies = len(embeddings) // len(targets)  # augmented ones
    cosines = F.cosine_similarity(embeddings, first["weight"], dim=-1)
    loss, plain = (
        LogSoftmaxWrapper(function)(cosines, targets.repeat(copies, 1)).item()
        for function in (margin, AngularMargin(margin=0.0, scale=30.0))
    )
    assert first["loss"] == pytest.approx(loss, abs=1e-4)
    assert loss > plain + 3


def with_cosines(path, folder):
    """The file with the other head and loss, which it has as comments."""
    text, n = re.subn(
        r"^classifier: .*?^# Or, the same.*?\n(.*?)\n\n",
        lambda found: found[1].replace("# ", "") + "\n\n",
        path.read_text(encoding="utf-8"),
        flags=re.M | re.S,
    )
    assert n == 1
    assert "each_as_target" not in text
    (folder / "cosines.yaml").write_text(text, encoding="utf-8")
    return folder / "cosines.yaml"


@pytest.mark.slow
def test_voxceleb_recipe(voices, run, tmp_path):
    parts = {"train": voices[::3] + voices[1::3], "dev": voices[2::3]}
    for name, rows in parts.items():
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["ID", "duration", "wav", "start", "stop", "spk_id"])
            for i, (wav, seconds, speaker) in enumerate(rows):
                stop = round(16000 * seconds)
                table.writerow([i, seconds, wav, 0, stop, speaker])
    (tmp_path / "pairs.txt").touch()
    arguments = (
        "--data_folder=none",
        "--skip_prep=True",
        f"--verification_file={tmp_path / 'pairs.txt'}",
        f"--train_annotation={tmp_path / 'train.csv'}",
        f"--valid_annotation={tmp_path / 'dev.csv'}",
        f"--n_speakers={SPEAKERS}",
        "--sentence_len=0.3",
        "--batch_size=14",
        "--number_of_epochs=4",
        "--step_size=12",
    )
    losses = {}
    ours = YAML / "voxceleb.yaml"
    for yaml in (ours, with_cosines(ours, tmp_path)):
        done, first = run("train_speaker_embeddings.py", yaml, *arguments)
        assert_margin_at_work(first, AdditiveAngularMargin(0.2, 30.0))
        brain = done["speaker_brain"]
        # Of 28 speakers; chance is 0.96.
        assert brain.error_metrics.summarize("average") < 0.5
        head = type(brain.modules.classifier).__name__
        losses[head] = brain.train_stats["loss"]
    # In the last epoch, after the same steps.
    assert losses["AAMSoftmax"] == pytest.approx(losses["Cosines"], abs=1e-2)


@pytest.mark.slow
def test_speaker_id_template(voices, run, tmp_path):
    for i, name in enumerate(("train", "valid", "test")):
        entries = {
            f"{name}-{j}": {"wav": wav, "length": seconds, "spk_id": speaker}
            for j, (wav, seconds, speaker) in enumerate(voices[i::3])
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    done, first = run(
        "train.py",
        YAML / "speaker_id.yaml",
        "--skip_prep=True",
        "--batch_size=14",
        "--number_of_epochs=4",
    )
    assert_margin_at_work(first, AngularMargin(0.2, 30.0))
    brain = done["spk_id_brain"]
    # In the test; chance is 0.96.
    assert brain.error_metrics.summarize("average") < 0.5

    # Padded or alone, with the script's own features and fractions of samples.
    modules = brain.modules.eval()
    short, long = torch.randn(7680) / 10, torch.randn(25600) / 10

    def embed(*waves):
        batch = sb.dataio.batch.PaddedBatch([{"sig": wave} for wave in waves])
        parts = (modules.compute_features, modules.mean_var_norm)
        features = done["compute_features"](*batch.sig, *parts)
        return modules.embedding_model(features, batch.sig.lengths)

    with torch.no_grad():
        alone, together = embed(short)[0], embed(short, long)[0]
    assert (alone - together).abs().max() <= 1e-5


@pytest.mark.slow  # where it is the first to need the run
def test_our_own_training_has_no_such_warning(finished):
    _, done = finished
    assert "without targets" not in done.stdout + done.stderr
