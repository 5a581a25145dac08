"""Silence by loudness and by the detector, against independent oracles."""

import importlib.util

import numpy as np
import pytest
import torch

from spkid.audio import remove_silence
from spkid.audio.silence import (
    cut,
    detector,
    loud_blocks,
    probabilities,
    segments,
)
from spkid.errors import UserError

RATE = 16000


def tone(seconds, rate=RATE):
    """A sine wave of 440 Hz and amplitude 0.5."""
    time = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * 440 * time)


def silence(seconds):
    return np.zeros(round(seconds * RATE))


def oracle_remove_silence(waveform, window=320, shortest=1600):
    """The rule for a whole waveform at once, in torch."""
    energy = waveform.double().square().cumsum(0)
    energy[window:] -= energy[:-window].clone()
    loud = energy >= window * 0.01**2
    is_loud, run, length = loud.unique_consecutive(
        return_inverse=True, return_counts=True
    )
    index = torch.arange(1, len(length) + 1)
    last_long = torch.where(length >= shortest, index, 0).cummax(0).values
    kept = torch.cat([is_loud.new_zeros(1), is_loud])[last_long]
    return waveform[kept[run]]


def test_silence_inside_and_around_is_removed():
    parts = [silence(0.3), tone(0.5), silence(1.0), tone(0.4), silence(0.7)]
    kept = remove_silence(np.concatenate(parts))
    # Each tone keeps the 20 ms during which the window still hears it.
    assert len(kept) == pytest.approx(0.94 * RATE, abs=20)
    assert np.square(kept).mean() > 0.1


def test_silence_is_removed_at_other_sample_rates():
    waveform = np.concatenate([tone(0.5, 8000), np.zeros(8000)])
    kept = remove_silence(waveform, sample_rate=8000)
    assert len(kept) == pytest.approx(0.52 * 8000, abs=10)


def test_short_gap_is_kept():
    waveform = np.concatenate([tone(0.5), silence(0.05), tone(0.5)])
    kept = remove_silence(waveform)
    assert len(waveform) - len(kept) < 10  # the soft start of the sine
    np.testing.assert_array_equal(kept, waveform[-len(kept) :])


def test_short_burst_between_silences_is_dropped():
    parts = [tone(0.5), silence(0.5), tone(0.03), silence(0.5), tone(0.5)]
    with_burst = remove_silence(np.concatenate(parts))
    parts[2] = silence(0.03)
    without = remove_silence(np.concatenate(parts))
    np.testing.assert_array_equal(with_burst, without)


def test_threshold_is_one_percent_of_full_scale():
    # The root mean square of a sine is its amplitude / sqrt(2).
    loud = remove_silence(tone(0.5) / 0.5 * 0.0150)
    quiet = remove_silence(tone(0.5) / 0.5 * 0.0133)
    assert len(loud) > 0.47 * RATE and len(quiet) == 0


def test_remove_silence_of_nothing():
    assert len(remove_silence(np.zeros(0))) == 0
    with pytest.raises(ValueError, match="shape"):
        remove_silence(np.zeros((2, 1600)))


@pytest.mark.parametrize("seed", range(20))
def test_loud_parts_equal_the_oracle_in_blocks_of_any_size(seed):
    rng = np.random.default_rng(seed)
    level = rng.choice([0, 1e-3, 0.02, 0.3], 60)
    length = rng.choice([20, 400, 1599, 1600, 1601, 2500, 9000], 60)
    waveform = rng.normal(size=length.sum()) * np.repeat(level, length)
    waveform = waveform.astype(np.float32)
    expected = oracle_remove_silence(torch.from_numpy(waveform)).numpy()
    assert 0 < len(expected) < len(waveform)
    np.testing.assert_array_equal(remove_silence(waveform), expected)
    for size in (100, 1600, 5000):
        ends = np.cumsum(rng.integers(0, size, len(waveform) * 2 // size))
        blocks = np.split(waveform, ends[ends < len(waveform)])
        kept = list(loud_blocks(blocks))
        np.testing.assert_array_equal(np.concatenate(kept), expected)


@pytest.mark.parametrize("seed", range(20))
def test_segments_equal_silero_s(seed):
    silero = pytest.importorskip("silero_vad")
    rng = np.random.default_rng(seed)
    # Runs of all lengths, some in the zone between the two thresholds.
    levels = rng.choice([0.05, 0.3, 0.42, 0.6, 0.95], 80)
    probability = np.repeat(levels, rng.integers(1, 14, 80))
    samples = len(probability) * 512 - int(rng.integers(0, 512))
    expected = silero.get_speech_timestamps_from_probs(
        probability, audio_length_samples=samples
    )
    assert expected
    found = segments(probability.tolist(), samples)
    assert found == [(s["start"], s["end"]) for s in expected]


def test_the_detector_s_segments_equal_silero_s(spoken):
    silero = pytest.importorskip("silero_vad")
    waveform, truth = spoken
    waveform = waveform * 0.3
    expected = silero.get_speech_timestamps(
        torch.from_numpy(waveform), silero.load_silero_vad(onnx=True)
    )
    found = segments(probabilities([waveform]), len(waveform))
    assert found == [(s["start"], s["end"]) for s in expected]
    kept = np.concatenate(list(cut([truth], found)))
    assert kept.sum() > 0.97 * truth.sum()  # nearly all speech is found
    assert kept.mean() > 0.9  # and little else


def test_probabilities_do_not_depend_on_the_blocks(spoken):
    waveform = spoken[0][: 100 * 512 + 7]
    once = list(probabilities([waveform]))
    assert len(once) == 101
    for size in (512, 8 * 512):
        blocks = np.split(waveform, range(size, len(waveform), size))
        np.testing.assert_allclose(
            list(probabilities(blocks)), once, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("size", [1, 7, 100])
def test_cut_across_blocks(size):
    waveform = np.arange(50)
    blocks = np.split(waveform, range(size, 50, size))
    kept = np.concatenate(list(cut(blocks, [(0, 3), (5, 6), (20, 50)])))
    assert kept.tolist() == [0, 1, 2, 5, *range(20, 50)]
    assert len(np.concatenate(list(cut(blocks, [])))) == 0


def test_a_missing_detector_names_the_cure(monkeypatch):
    detector.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -U silero-vad onnx"):
        list(probabilities([np.zeros(512, np.float32)]))
