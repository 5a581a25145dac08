"""The speech of recordings, good and bad ones, block by block."""

import subprocess
import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import soxr

from spkid.audio import (
    PEAK,
    SILENCES,
    read_speech,
    remove_silence,
    speech,
    speech_blocks,
    speech_windows,
)
from spkid.errors import UserError

RATE = 16000
PIPES = {"capture_output": True, "text": True}


def click(waveform, place):
    """2.5 ms at full scale, half a second from the speech."""
    pause, pulse = np.zeros(RATE // 2), np.ones(40)
    parts = [pulse, pause, waveform, pause, pulse]
    return np.concatenate(parts[:3] if place == "before" else parts[2:])


CASES = {
    "click before": lambda x: click(x * 0.3, "before"),
    "click after": lambda x: click(x * 0.3, "after"),
    "click and very quiet": lambda x: click(x * 0.01, "before"),
    "antiphase": lambda x: np.stack([x, -x]),
    "antiphase, one side softer": lambda x: np.stack([0.2 * x, -x]),
    "one channel": lambda x: np.stack([x, 0 * x, 0 * x]),
    "quiet": lambda x: x * 1e-4,
    "offset": lambda x: x * 0.1 + 0.5,
    "an hour-like pause": lambda x: np.pad(x, (60 * RATE, 60 * RATE)),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_recordings_keep_their_speech(spoken, case):
    waveform, truth = spoken
    kept = speech(CASES[case](waveform), RATE)
    assert len(kept) == pytest.approx(len(speech(waveform, RATE)), rel=0.03)
    assert len(kept) > 0.97 * truth.sum()


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_other_rates_keep_their_speech(spoken, rate):
    waveform = soxr.resample(spoken[0], RATE, rate)
    expected = len(speech(spoken[0], RATE))
    assert len(speech(waveform, rate)) == pytest.approx(expected, rel=0.03)


def test_silence_by_the_course_s_rule(spoken):
    waveform = spoken[0]
    levelled = waveform * np.float32(PEAK / np.abs(waveform).max())
    kept = speech(waveform, RATE, silence="hw4")
    np.testing.assert_allclose(kept, remove_silence(levelled), rtol=1e-6)


@pytest.mark.parametrize("silence", SILENCES)
def test_the_peak_is_at_minus_3_db(spoken, silence):
    for gain in (1e-3, 1, 1000):
        kept = speech(spoken[0] * gain, RATE, silence)
        assert np.abs(kept).max() == pytest.approx(10 ** (-3 / 20), rel=1e-6)
        assert kept.dtype == np.float32


def test_channels_are_averaged_unless_they_cancel():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, RATE))

    def heard(*channels):
        return speech(np.stack(channels), RATE, silence="hw4")

    def same(heard, expected):
        expected = expected * (PEAK / np.abs(expected).max())
        assert len(heard) > 0.99 * len(expected)  # its soft start is cut
        np.testing.assert_allclose(heard, expected[-len(heard) :], atol=1e-5)

    same(heard(a, 0.5 * a), a)
    same(heard(a, b), (a + b) / 2)  # unrelated
    same(heard(a, 0 * a, 0 * a), a)
    same(heard(0.5 * a, -a), a * -1)
    same(heard(0.9 * a + 3, -a + 3), 3 - a)  # an offset isn't sound
    same(heard(a, -0.9 * a + 0.1 * b), a)


@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_file_in_blocks_equals_samples_at_once(
    tmp_path, monkeypatch, spoken, rate, silence
):
    monkeypatch.setattr("spkid.audio.reading.BLOCK", 7777)
    wave = soxr.resample(spoken[0], RATE, rate)
    stereo = np.stack([wave, 0.8 * wave])
    path = tmp_path / "stereo.wav"
    soundfile.write(path, stereo.T, rate, subtype="FLOAT")
    expected = speech(stereo, rate, silence)
    blocks = list(speech_blocks(path, silence))
    assert len(blocks) > 1 and all(map(len, blocks))
    assert max(map(len, blocks)) <= 30 * RATE
    np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-5)
    np.testing.assert_array_equal(
        read_speech(path, silence), np.concatenate(blocks)
    )


def test_windows_hold_the_speech_at_their_times(tmp_path, spoken):
    pause = np.zeros(3 * RATE, np.float32)
    path = tmp_path / "two.wav"
    soundfile.write(path, np.concatenate((spoken[0], pause, spoken[0])), RATE)
    found = list(speech_windows(path, 1.0))
    windows = [window for _, _, window in found]
    np.testing.assert_array_equal(
        np.concatenate(windows), read_speech(path, "vad")
    )
    for start, end, window in found:
        assert 0 < end - start <= 1.0 + 1e-4
        assert len(window) == round((end - start) * RATE)
    seconds = len(spoken[0]) / RATE
    gap = [b[0] - a[1] for a, b in pairwise(found)]
    assert max(gap) > 2.5 and found[-1][1] > seconds + 3


@pytest.mark.parametrize(
    ("samples", "silence", "message"),
    [
        (np.zeros(0), "vad", "empty"),
        (np.zeros(RATE), "vad", "No speech"),
        (np.zeros(RATE), "hw4", "silent"),
        (np.random.default_rng(0).normal(0, 0.1, RATE), "vad", "No speech"),
        (np.array([0.5, np.nan]), "vad", "not finite"),
        (np.array([0.5, np.inf]), "hw4", "not finite"),
    ],
)
def test_errors_name_the_file_and_the_cause(
    tmp_path, samples, silence, message
):
    path = tmp_path / "bad.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"bad\.wav: .*{message}"):
        read_speech(path, silence)
    with pytest.raises(ValueError, match=message):
        speech(samples, RATE, silence)


def test_arguments():
    with pytest.raises(ValueError, match="shape"):
        speech(np.zeros((1, 1, 9)), RATE)
    with pytest.raises(UserError, match="silence='no' must be vad or hw4"):
        speech(np.zeros(9), RATE, "no")


@pytest.mark.slow
@pytest.mark.parametrize("silence", SILENCES)
def test_memory_does_not_grow_with_the_length(tmp_path, spoken, silence):
    path = tmp_path / "long.wav"
    minute = soxr.resample(np.resize(spoken[0], 60 * RATE), RATE, 48000)
    with soundfile.SoundFile(path, "w", 48000, 2) as file:
        for _ in range(4):
            file.write(np.stack([minute, minute], axis=1))
    tracemalloc.start()  # numpy's arrays, too
    seconds = sum(len(x) for x in speech_blocks(path, silence)) / RATE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds > 90
    assert peak < 20 * 2**20  # of 88 MiB


def test_the_room_needs_no_torch(tmp_path, spoken):
    path = tmp_path / "speech.wav"
    soundfile.write(path, spoken[0], RATE)
    script = (
        "import sys\n"
        "for name in ('torch', 'torchaudio', 'speechbrain'):\n"
        "    sys.modules[name] = None\n"  # importing it fails
        "import spkid.audio as audio\n"
        "path = sys.argv[1]\n"
        "audio.audio_facts(path)\n"
        "print(len(audio.read_speech(path)))\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, check=False, **PIPES)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(read_speech(path))
