"""The speech of a recording, levelled, at 16 kHz, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spkid.audio.reading import SAMPLE_RATE, at_16_khz, decode
from spkid.audio.silence import FRAME, cut, loud_blocks, probabilities, segments
from spkid.errors import AudioError, one_of

# A recording's blocks with their rates, from the start at each call.
Decoded = Callable[[], Iterable[tuple[int, np.ndarray]]]

PEAK = 10 ** (-3 / 20)  # -3 dB of full scale
SILENCES = ("vad", "hw4")
HEARD = -27  # dB of full scale: in the middle of what the detector hears well
SILENT = "The recording is silent: no sound lasts 0.1 s or longer."
NO_SPEECH = "No speech that lasts 0.25 s was found in the recording."
SOFTEST, LOUDEST = -600, 800  # dB of full scale, of float32 samples


def speech_blocks(
    path: str | Path, silence: str = "vad"
) -> Iterator[np.ndarray]:
    """Speech of a sound file of any length, block by block.

    The channels' mean is taken, or the loudest channel where the mean would
    cancel, as in stereo with one channel's sign turned. It is resampled to
    16 kHz and scaled so that the file's peak is at -3 dB, whatever the peak
    is: a click only lowers the rest, and the mean normalisation of log-mels
    takes that back, since 40 dB less leave speech far above their floor.

    "vad" cuts out the speech with silero-vad. The detector hears its own
    level, of the loudest frames but for the top 1 % and four more, so that a
    click doesn't make speech too quiet for it. It was made for conversation:
    singing counts as speech, music and babble partly do, and whispers or
    speech below the noise may be missed.

    "hw4" removes silence by the course's rule, :func:`remove_silence`, at the
    level of the peak; so there a click can make the rest silence.

    Arguments
    ---------
    path : str or pathlib.Path
        See :func:`spkid.audio.reading.decode`; it is read two or three times.
    silence : str
        "vad" or "hw4".

    Yields
    ------
    np.ndarray [samples]
        Float32 at 16 kHz; at least 1 sample, at most some seconds.

    Raises
    ------
    AudioError
        In one sentence with the path: if the file isn't readable sound, is
        empty, has samples that aren't finite, or holds no speech.
    UserError
        If what finds the speech isn't installed.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.cos(np.arange(48000) * 0.1), 16000)
    >>> [len(block) for block in speech_blocks(path, silence="hw4")]
    [32768, 15232]
    """
    with _named(path):
        yield from _blocks(lambda: decode(path), silence)


def read_speech(path: str | Path, silence: str = "vad") -> np.ndarray:
    """All of the speech of a sound file.

    Arguments, errors and limits are those of :func:`speech_blocks`.

    Returns
    -------
    np.ndarray [samples]
        Float32 at 16 kHz.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.cos(np.arange(48000) * 0.1), 16000)
    >>> read_speech(path, silence="hw4").shape
    (48000,)
    """
    return np.concatenate(list(speech_blocks(path, silence)))


def speech(
    waveform: np.ndarray, sample_rate: int, silence: str = "vad"
) -> np.ndarray:
    """The speech of samples at hand, as :func:`read_speech` of a file.

    Arguments
    ---------
    waveform : np.ndarray [samples] or [channels, samples]
        At any scale, since the peak is normalised.
    sample_rate : int
        Samples per second of the waveform.
    silence : str
        "vad" or "hw4".

    Returns
    -------
    np.ndarray [samples]
        Float32 at 16 kHz.

    Raises
    ------
    ValueError
        If the shape is wrong, or as :func:`speech_blocks`.

    Example
    -------
    >>> speech(np.ones((2, 44100)), 44100, silence="hw4").shape
    (16000,)
    """
    if waveform.ndim not in (1, 2):
        raise ValueError(
            "A recording must have the shape [samples] or [channels, samples], "
            f"not {list(waveform.shape)}."
        )
    samples = np.atleast_2d(waveform).T.astype(np.float32)
    parts = _blocks(lambda: [(sample_rate, samples)], silence)
    return np.concatenate(list(parts))


def speech_windows(
    path: str | Path, seconds: float = 3.0
) -> Iterator[tuple[float, float, np.ndarray]]:
    """Speech of a sound file in windows, with their times in the file.

    Arguments and errors are those of :func:`speech_blocks` with "vad".

    Arguments
    ---------
    path : str or pathlib.Path
        See :func:`spkid.audio.reading.decode`.
    seconds : float
        Of a window at most. A stretch of speech is divided evenly.

    Yields
    ------
    tuple of (float, float, np.ndarray [samples])
        First second, the one after the last, and the samples at 16 kHz.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "noise.wav"
    >>> noise = np.random.default_rng(0).normal(0, 0.01, 16000)
    >>> soundfile.write(path, noise, 16000)
    >>> list(speech_windows(path))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    spkid.errors.AudioError: ...noise.wav: No speech that lasts 0.25 s was ...
    """
    with _named(path):
        found = _survey(at_16_khz(decode(path)))
        windows: list[tuple[int, int]] = []
        for start, end in _places(lambda: decode(path), found):
            count = -(-(end - start) // round(seconds * SAMPLE_RATE))
            edges = np.linspace(start, end, count + 1).round().astype(int)
            windows += pairwise(edges.tolist())
        if not windows:
            raise ValueError(NO_SPEECH)
        parts = cut(_levelled(lambda: decode(path), found), windows)
        held = np.zeros(0, np.float32)
        for start, end in windows:
            while len(held) < end - start:
                held = np.concatenate((held, next(parts)))
            window, held = np.split(held, [end - start])
            yield start / SAMPLE_RATE, end / SAMPLE_RATE, window


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Errors name the file."""
    try:
        yield
    except ValueError as error:
        raise AudioError(f"{path}: {error}") from error


def _blocks(decoded: Decoded, silence: str) -> Iterator[np.ndarray]:
    """Goes over a recording for its level, its segments and its speech."""
    one_of(silence, SILENCES, "silence")
    found = _survey(at_16_khz(decoded()))
    waveform = _levelled(decoded, found)
    if silence == "hw4":
        parts = loud_blocks(waveform)
    else:
        parts = cut(waveform, _places(decoded, found))
    silent = True
    for part in filter(len, parts):
        silent = False
        yield part
    if silent:
        raise ValueError(SILENT if silence == "hw4" else NO_SPEECH)


def _mono(decoded: Decoded, found: _Survey) -> Iterator[np.ndarray]:
    """A recording at 16 kHz, in blocks [samples]."""
    return (_ways(block)[found.way] for block in at_16_khz(decoded()))


def _levelled(decoded: Decoded, found: _Survey) -> Iterator[np.ndarray]:
    """A recording with its peak at -3 dB."""
    # Digital silence must not become NaN.
    peak = max(found.peak, np.finfo(np.float32).tiny)
    # In this order, as torch divides a number by a tensor.
    gain = np.float32(PEAK) * (np.float32(1) / peak)
    return (block * gain for block in _mono(decoded, found))


def _places(decoded: Decoded, found: _Survey) -> list[tuple[int, int]]:
    """Where the detector hears speech, at a level that it hears well."""
    louder = np.float32(10 ** ((HEARD - found.level) / 20))
    centred = (block - found.offset for block in _mono(decoded, found))
    heard = ((block * louder).clip(-1, 1) for block in centred)
    return segments(probabilities(heard), found.samples)


class _Survey(NamedTuple):
    way: int  # of _ways()
    peak: np.float32
    offset: np.float32  # the samples' mean
    level: int  # dB: of speech, if there is any
    samples: int


def _ways(block: np.ndarray) -> np.ndarray:
    """Ways to hear a block: [1 for mono, or the mean, channels; samples]."""
    channels = np.ascontiguousarray(block.T)
    if len(channels) == 1:
        return channels
    return np.concatenate((channels.mean(axis=0, keepdims=True), channels))


def _survey(blocks: Iterable[np.ndarray]) -> _Survey:
    """What levelling has to know of all blocks [samples, channels]."""
    samples, levels = 0, np.zeros((1, 1), int)
    peak = total = power = np.zeros(1, np.float32)
    for ways in map(_ways, blocks):
        samples += ways.shape[1]
        peak = np.maximum(peak, np.abs(ways).max(axis=1))
        total = total + ways.sum(axis=1, dtype=np.float64)
        power = power + np.square(ways, dtype=np.float64).sum(axis=1)
        levels = levels + _levels(ways)
    if samples == 0:
        raise ValueError("The recording is empty: it has no samples.")
    mean = total / samples
    variance = power / samples - mean**2
    way, channels = 0, variance[1:]
    # Unrelated channels leave 1 / n of their power in the mean.
    if len(channels) and variance[0] < 0.5 * channels.mean() / len(channels):
        way = 1 + int(channels.argmax())
    loudest_first = levels[way, ::-1].cumsum()
    frames = loudest_first[-1]
    skipped = min(4 + frames // 100, frames - 1)
    level = LOUDEST - int((loudest_first > skipped).argmax())
    offset = np.float32(mean[way])
    return _Survey(way, peak[way], offset, level, samples)


def _levels(ways: np.ndarray) -> np.ndarray:
    """How many frames of each way [ways, samples] have each level.

    Returns [ways, levels], for each dB above SOFTEST, which is no sound. Each
    frame's own mean, as of a constant offset, doesn't count.
    """
    rest = np.zeros((len(ways), -ways.shape[1] % FRAME), ways.dtype)
    frames = np.concatenate((ways, rest), axis=1).reshape(len(ways), -1, FRAME)
    power = frames.var(axis=2, dtype=np.float64)
    level = 10 * np.log10(power.clip(10.0 ** (SOFTEST / 10)))
    place = np.rint(level).astype(int) - SOFTEST
    count = LOUDEST - SOFTEST + 1
    return np.stack([np.bincount(way, minlength=count)[1:] for way in place])
