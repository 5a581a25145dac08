"""Tests of the front end against formulas and an independent oracle."""

import math

import numpy as np
import pytest
import soundfile
import torch

from spkid.features import (
    LogMel,
    load_features,
    log_mel_of_blocks,
    waveform_to_features,
)

RATE = 16000


def tone(seconds, rate=RATE, frequency=440.0):
    """A sine wave of amplitude 0.5."""
    time = torch.arange(round(seconds * rate)) / rate
    return 0.5 * torch.sin(2 * math.pi * frequency * time)


def silence(seconds):
    return torch.zeros(round(seconds * RATE))


def oracle_log_mel(samples):
    """Log-mel in float64, frame by frame, from the definitions alone."""
    n_fft, hop, n_mels, low, high = 400, 160, 40, 50.0, 8000.0
    padded = np.pad(samples.astype(np.float64), n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    starts = range(0, len(padded) - n_fft + 1, hop)
    frames = np.stack([padded[i : i + n_fft] * window for i in starts])
    power = np.abs(np.fft.rfft(frames)) ** 2

    def to_mel(hertz):
        return 2595 * np.log10(1 + hertz / 700)

    mels = np.linspace(to_mel(low), to_mel(high), n_mels + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = np.arange(n_fft // 2 + 1) * RATE / n_fft
    bank = np.zeros((n_mels, len(bins)))
    for m in range(n_mels):
        left, centre, right = edges[m : m + 3]
        rise = (bins - left) / (centre - left)
        fall = (right - bins) / (right - centre)
        bank[m] = np.clip(np.minimum(rise, fall), 0, None)
    return np.log(np.maximum(power @ bank.T, 1e-9))


def test_log_mel_equals_oracle():
    generator = torch.Generator().manual_seed(0)
    wavs = torch.randn(2, 4321, generator=generator) * 0.1
    wavs += tone(4321 / RATE)
    features = LogMel()(wavs)
    assert features.dtype == torch.float32
    for wav, got in zip(wavs, features, strict=True):
        expected = oracle_log_mel(wav.numpy())
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("samples", [201, 1599, 1600, 1601, 16000])
def test_log_mel_number_of_frames(samples):
    shape = LogMel()(torch.randn(1, samples)).shape
    assert shape == (1, 1 + samples // 160, 40)


def test_log_mel_floor():
    features = LogMel()(torch.zeros(1, 1600))
    expected = torch.full_like(features, math.log(1e-9))
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("shape", [(1600,), (1, 200), (1, 2, 1600)])
def test_log_mel_wrong_shape(shape):
    with pytest.raises(ValueError, match="batch, samples"):
        LogMel()(torch.zeros(shape))


@pytest.mark.parametrize("samples", [1600, 1601, 4321, 20000])
@pytest.mark.parametrize("chunk", [400, 1000, 3200])
def test_log_mel_of_blocks_equals_that_of_the_whole(
    monkeypatch, samples, chunk
):
    monkeypatch.setattr("spkid.features.frontend.CHUNK", chunk)
    rng = np.random.default_rng(0)
    waveform = rng.normal(0, 0.1, samples).astype(np.float32)
    whole = LogMel()(torch.from_numpy(waveform)[None])[0]
    for size in (70, 1000, 9999):
        blocks = np.split(waveform, range(size, samples, size))
        got = log_mel_of_blocks(blocks, LogMel())
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-5)


def test_log_mel_of_blocks_with_other_sizes(monkeypatch):
    monkeypatch.setattr("spkid.features.frontend.CHUNK", 900)
    logmel = LogMel(n_fft=512, win_length=400, hop_length=320, n_mels=20)
    waveform = torch.randn(7000, generator=torch.Generator().manual_seed(0))
    got = log_mel_of_blocks(waveform.split(450), logmel)
    whole = logmel(waveform[None])[0]
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "waveform", [silence(1), tone(0.05), torch.zeros(2, 1600)]
)
def test_only_silence_is_an_error(waveform):
    with pytest.raises(ValueError, match="silent"):
        waveform_to_features(waveform, RATE)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_nothing_is_an_error(shape):
    with pytest.raises(ValueError, match="empty"):
        waveform_to_features(torch.zeros(shape), RATE)


def test_not_finite_is_an_error():
    waveform = tone(0.5)
    waveform[100] = math.nan
    with pytest.raises(ValueError, match="finite"):
        waveform_to_features(waveform, RATE)


def test_features_do_not_depend_on_the_scale():
    waveform = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    features = waveform_to_features(waveform, RATE)
    assert features.shape == (101, 40) and features.is_contiguous()
    for other in (waveform * 1e-3, (waveform * 2**12).round().short()):
        got = waveform_to_features(other, RATE)
        torch.testing.assert_close(got, features, rtol=0, atol=0.02)


def test_peak_is_normalised_to_minus_3_db():
    # A full-scale tone of 1 kHz is bin 25: power (peak * sum(window) / 2)².
    features = waveform_to_features(tone(1.0, frequency=1000.0), RATE)
    power = (10 ** (-3 / 20) * 200 / 2) ** 2
    assert features[50].max().item() == pytest.approx(math.log(power), abs=0.7)


def test_stereo_at_another_rate():
    mono = waveform_to_features(tone(1.0), RATE)
    left, right = tone(1.0, 44100) * 1.6, tone(1.0, 44100) * 0.4
    stereo = waveform_to_features(torch.stack([left, right]), 44100)
    band = mono[50].argmax()
    assert stereo[50].argmax() == band
    assert stereo[50, band] == pytest.approx(mono[50, band].item(), abs=0.02)


def test_load_features(tmp_path):
    generator = torch.Generator().manual_seed(0)
    stereo = torch.randn(2, 44100, generator=generator) * 0.1
    path = tmp_path / "speech.flac"
    soundfile.write(path, stereo.T.numpy(), 44100, subtype="PCM_24")
    expected = waveform_to_features(stereo, 44100)
    torch.testing.assert_close(load_features(path), expected, rtol=0, atol=0.01)


def test_silence_by_the_detector(tmp_path):
    """A tone is loud, but nobody speaks."""
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(1.0).numpy(), RATE)
    assert len(load_features(path)) >= 100
    with pytest.raises(ValueError, match=r"tone\.wav: No speech"):
        load_features(path, silence="vad")
    with pytest.raises(ValueError, match=r"^No speech"):
        waveform_to_features(tone(1.0), RATE, silence="vad")


def test_load_features_names_the_file(tmp_path):
    path = tmp_path / "quiet.wav"
    soundfile.write(path, np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match=r"quiet\.wav: .*silent"):
        load_features(path)
    path = tmp_path / "notes.wav"
    path.write_text("no audio")
    with pytest.raises(ValueError, match=r"notes\.wav"):
        load_features(str(path))
