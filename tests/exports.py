"""Small systems with a back-end, and recordings to ask them about."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from spkid.backend.fit import fit_backend
from spkid.hparams import Settings
from spkid.inference import SpeakerIdentifier
from spkid.keys import TRAINED

RATE = 16000
HPARAMS = Path(__file__).resolve().parents[1] / "hparams"
SMALL = {"d_model": 24, "n_layers": 1, "n_heads": 2, "d_ff": 32}
SMALL |= {"embedding_size": 16}
SMALLER = {  # of ECAPA
    "[512, 512, 512, 512, 1536]": "[16, 16, 48]\n    res2net_scale: 2",
    "[5, 3, 3, 3, 1]": "[5, 3, 1]",
    "[1, 2, 3, 4, 1]": "[1, 2, 1]",
}
SPEAKERS = ["zoë", "ann", "bob", "id 3"]


def make_trained(folder, system="conformer", **overrides):
    """A run of a system that has learnt nothing, but for a back-end that knows
    four voices, two of which are those of :func:`make_recordings`."""
    sizes = SMALL if system == "conformer" else {}
    run = folder / "run"
    overrides = {"n_speakers": 4, "output_folder": str(run), **overrides}
    text = (HPARAMS / f"{system}.yaml").read_text()
    for old, new in SMALLER.items():
        text = text.replace(old, new)
    (folder / f"{system}.yaml").write_text(text)
    settings = Settings(folder / f"{system}.yaml", sizes | overrides)
    torch.manual_seed(0)
    modules = settings.build_modules(TRAINED)
    values = settings.values | modules
    model = SpeakerIdentifier.from_settings(values, SPEAKERS).eval()
    pitches = np.repeat([110, 150, 210, 260], 8)
    waves = [voice(pitch, seed) for seed, pitch in enumerate(pitches)]
    fitted = fit_backend(
        model.embed_waveforms(waves),
        *(np.arange(32) // 8, np.arange(32) // 2, ["train", "new"] * 16),
        SPEAKERS,
    )
    model.set_backend(fitted.backend)
    run.mkdir()
    (run / "hyperparams.yaml").write_text(settings.text)
    model.save(run)
    return model, run


def voice(pitch, seed, seconds=1.0):
    """A buzz with formants of its own, [samples]."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    wave = sum(
        np.sin(2 * np.pi * pitch * k * time + random.uniform(0, 6))
        / (1 + abs(k - pitch / 40))
        for k in range(1, 20)
    )
    noise = 0.02 * random.normal(size=len(time))
    return (0.2 * wave + noise).astype(np.float32)


def make_recordings(folder):
    """Mono, stereo with antiphase, 8 kHz, FLAC; two of each voice."""
    made = []
    for name, pitch, seed, rate, channels in (
        ("a.wav", 110, 20, RATE, [1]),
        ("b.flac", 110, 21, RATE, [1]),
        ("c.wav", 210, 22, 8000, [1]),
        ("d.wav", 210, 23, 44100, [1, -1]),
    ):
        wave = voice(pitch, seed, 1.6 * rate / RATE)
        sound = np.stack([sign * wave for sign in channels], axis=1)
        soundfile.write(folder / name, 0.3 * sound, rate)
        made.append(folder / name)
    return made


def log_posteriors_of(model, path):
    """What a system of ours says of a recording."""
    return model.backend.log_posteriors(model.embed_files([path]))[0]
