"""What is counted in a sound file."""

import itertools

import numpy as np
import pytest
import soundfile
import soxr

from spkid.audio import audio_facts

RATE = 16000


def facts(path, samples, rate=RATE, **form):
    soundfile.write(path, samples, rate, **form)
    return audio_facts(path)


def test_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("spkid.audio.reading.BLOCK", 1000)
    samples = np.zeros((44100 * 2 + 1, 2))
    samples[:, 1] = np.linspace(-0.25, 0.125, len(samples))
    found = facts(tmp_path / "ramp.flac", samples, 44100)
    assert (found.sample_rate, found.channels) == (44100, 2)
    assert found.seconds == len(samples) / 44100
    assert found.peak == 0.25 and found.clipped == 0


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "ULAW", "FLOAT"])
def test_clipping(tmp_path, monkeypatch, subtype):
    monkeypatch.setattr("spkid.audio.reading.BLOCK", 101)
    wave = np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE)
    clean = facts(tmp_path / "a.wav", wave * 0.9, subtype=subtype)
    assert clean.clipped == 0
    path = tmp_path / "b.wav"
    found = facts(path, (wave * 2).clip(-1, 1), subtype=subtype)
    runs = [
        len(list(run))
        for value, run in itertools.groupby(soundfile.read(path)[0])
        if abs(value) >= 0.98
    ]
    assert found.clipped == sum(max(0, run - 2) for run in runs) / RATE
    assert 0.6 < found.clipped < 0.7  # |sin| > 1/2 for two thirds of the time


@pytest.mark.parametrize("level", [1, 0.03])
@pytest.mark.parametrize("ending", ["wav", "mp3"])
def test_bandwidth_tells_what_was_8_khz(tmp_path, spoken, ending, level):
    speech = spoken[0] * level
    narrow = soxr.resample(speech, RATE, 8000)
    for rate in (16000, 44100):
        path = tmp_path / f"{rate}.{ending}"
        upsampled = soxr.resample(narrow, 8000, rate)
        assert 3400 < facts(path, upsampled, rate).bandwidth < 4300
        wide = soxr.resample(speech, RATE, rate)
        assert facts(path, wide, rate).bandwidth > 7000
    assert facts(tmp_path / "narrow.wav", narrow, 8000).bandwidth > 3400


@pytest.mark.parametrize("slope", [0, 1, 2])
def test_bandwidth_of_noise_is_all(tmp_path, slope):
    """White, pink and brown noise."""
    noise = np.random.default_rng(0).normal(size=5 * RATE)
    spectrum = np.fft.rfft(noise)
    spectrum /= np.arange(1, len(spectrum) + 1) ** (slope / 2)
    noise = np.fft.irfft(spectrum)
    noise *= 0.5 / np.abs(noise).max()
    assert facts(tmp_path / "noise.wav", noise).bandwidth == RATE / 2


@pytest.mark.parametrize("samples", [1, 300, 5000])
def test_short_files(tmp_path, samples):
    found = facts(tmp_path / "short.wav", np.full(samples, 0.5))
    assert found.seconds == samples / RATE and found.peak == 0.5


def test_errors(tmp_path):
    path = tmp_path / "bad.wav"
    with pytest.raises(ValueError, match=r"bad\.wav: .*empty"):
        facts(path, np.zeros(0))
    with pytest.raises(ValueError, match=r"bad\.wav: .*finite"):
        facts(path, np.array([0, np.nan]), subtype="FLOAT")
