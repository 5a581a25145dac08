"""What a sound file is like, before its speech is looked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from spkid.audio.reading import checked, decode
from spkid.errors import AudioError

FULL = 0.98  # of full scale; companded telephone speech ends there
BAND = 125.0  # Hz, about, of a spectrum's bands
DROP = 20.0  # dB, where a recording's own spectrum ends


@dataclass(frozen=True)
class AudioFacts:
    """A sound file in numbers.

    Arguments
    ---------
    seconds : float
        Length, counted and not as the header says.
    sample_rate : int
        Hz.
    channels : int
        Number of channels.
    peak : float
        Largest sample, as a fraction of full scale; lossy formats may exceed
        1.
    clipped : float
        Share of samples that equal the two before them at full scale. After a
        lossy format or a change of level, clipping isn't seen.
    bandwidth : float
        Hz; above it there is nothing. See :func:`audio_facts`.

    Example
    -------
    >>> AudioFacts(2.0, 16000, 1, 0.5, 0.0, 4000.0).bandwidth  # from 8 kHz
    4000.0
    """

    seconds: float
    sample_rate: int
    channels: int
    peak: float
    clipped: float
    bandwidth: float


def audio_facts(path: str | Path) -> AudioFacts:
    """Reads a sound file once, block by block, and counts.

    The bandwidth is where the mean power spectrum drops the most, from the
    half kHz below to all that is above, if it drops by 20 dB or more;
    otherwise it is half the sample rate. So speech that was recorded at 8 kHz
    and resampled with a usual filter has some 4 kHz, also in an MP3. Noise
    that was added afterwards hides it, and so do the images that resampling
    by plain interpolation leaves.

    Arguments
    ---------
    path : str or pathlib.Path
        See :func:`spkid.audio.reading.decode`.

    Returns
    -------
    AudioFacts

    Raises
    ------
    ValueError
        If the file isn't readable sound, is empty, or has samples that
        aren't finite.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.cos(np.arange(48000) * 0.1) / 2, 16000)
    >>> facts = audio_facts(path)
    >>> facts.seconds, facts.peak, facts.clipped
    (3.0, 0.5, 0.0)
    """
    try:
        return _facts(path)
    except ValueError as error:
        raise AudioError(f"{path}: {error}") from error


def _facts(path):
    samples, clipped, peak, spectrum = 0, 0, 0.0, np.zeros(1)
    for rate, block in checked(decode(path)):
        if not samples:
            before = block[:0]
        joined = np.concatenate((before, block))
        full = (joined[1:] == joined[:-1]) & (np.abs(joined[1:]) >= FULL)
        clipped += int((full[1:] & full[:-1]).sum())
        before = joined[-2:]
        samples += len(block)
        peak = max(peak, float(np.abs(block).max()))
        spectrum = spectrum + _spectrum(block, rate)
    if not samples:
        raise ValueError("The recording is empty: it has no samples.")
    return AudioFacts(
        seconds=samples / rate,
        sample_rate=rate,
        channels=block.shape[1],
        peak=peak,
        clipped=clipped / (samples * block.shape[1]),
        bandwidth=_bandwidth(spectrum, rate),
    )


def _spectrum(block: np.ndarray, rate: int) -> np.ndarray:
    """A block's power in bands of about 125 Hz, over frames and channels."""
    size = 2 ** round(np.log2(rate / BAND * 4))  # four lines in a band
    block = block[: len(block) // size * size or None]
    rest = np.zeros((-len(block) % size, block.shape[1]), block.dtype)
    frames = np.concatenate((block, rest)).T.reshape(-1, size)
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
    return power.sum(axis=0)[1:].reshape(-1, 4).sum(axis=1)


def _bandwidth(spectrum: np.ndarray, rate: int) -> float:
    """Where a spectrum ends, in Hz; see :func:`audio_facts`."""
    level = 10 * np.log10(spectrum.clip(1e-30))
    below = sliding_window_view(level, 4)[4:-2].mean(axis=1)
    above = np.maximum.accumulate(level[::-1])[::-1][10:]
    drop = below[: len(above)] - above
    edge = int(drop.argmax())
    if drop[edge] < DROP:
        return rate / 2
    last = np.flatnonzero(level >= below[edge] - DROP)[-1]
    return float((last + 1) / len(level) * rate / 2)
