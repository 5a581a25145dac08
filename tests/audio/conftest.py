"""Synthetic speech: three voices, noise, and pauses between sentences."""

import numpy as np
import pytest
import soxr

from mini_corpus import Espeak

RATE = 16000
SENTENCES = (
    "We took the early train and walked home along the coast.",
    "Please leave the blue folder on the desk by the window.",
    "Nobody expected the match to end with such a high score.",
)
VOICES = "en-us+f1", "en-gb-x-rp+Andy", "en-029+linda"


@pytest.fixture(scope="session")
def spoken():
    """A recording [samples] at 16 kHz with a peak of 0.5, and its truth: True
    where somebody speaks."""
    espeak, rng = Espeak(), np.random.default_rng(0)
    waves, truth = [], []
    for voice, sentence in zip(VOICES, SENTENCES, strict=True):
        wave = espeak.speak(sentence, voice)
        wave = soxr.resample(wave, espeak.sample_rate, RATE)
        pause = np.zeros(round(RATE * rng.uniform(0.5, 2)))
        waves += [pause, wave]
        truth += [pause > 0, np.ones(len(wave), bool)]
    wave = np.concatenate([*waves, pause])
    wave *= 0.5 / np.abs(wave).max()
    wave += rng.normal(0, 0.001, len(wave))
    return wave.astype(np.float32), np.concatenate([*truth, pause > 0])
