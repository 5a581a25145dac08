"""Samples of a sound file of any format and length, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from spkid.errors import cure_of
from spkid.files import open_regular

SAMPLE_RATE = 16000  # Hz, of every feature
RATES = 4000, 768000  # Hz, of a file
LARGEST = 1e30  # sample, at full scale 1; sums of larger ones may overflow
BLOCK = 2**19  # values that are decoded at once, of all channels
# What FFmpeg may open: sound, but no list that leads to other files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,aac,matroska,webm,asf,amr,ac3,caf,aiff,wav"


class _SoundFile(soundfile.SoundFile):
    """Reads on until there is no more, however long the header says it is."""

    def seekable(self) -> bool:
        # read() would seek after each block: slow in an MP3, and an error
        # where a header claims the wrong length.
        return False


def decode(path: str | Path) -> Iterator[tuple[int, np.ndarray]]:
    """Samples of a file as they are in it.

    libsndfile reads WAV, FLAC, Ogg, MP3 and more, by content and not by the
    file's ending. What it refuses, as M4A, PyAV reads where it is installed;
    and what it finds empty, as a WAV file whose recorder was killed before it
    wrote the length. A WAV file with a length that is too large is read to its
    end; one with a length that is too small, to that length. Memory doesn't
    depend on the length, nor on what a header says of it.

    Arguments
    ---------
    path : str or pathlib.Path
        A regular file.

    Yields
    ------
    tuple of (int, np.ndarray [samples, channels])
        Sample rate in Hz; float32 with full scale at 1, at least one sample.

    Raises
    ------
    ValueError
        If the file is missing or isn't sound, or is damaged.

    Example
    -------
    >>> path = getfixture("tmp_path") / "stereo.wav"
    >>> soundfile.write(path, np.zeros((800, 2)), 8000)
    >>> [(rate, block.shape) for rate, block in decode(path)]
    [(8000, (800, 2))]
    """
    try:
        opened = open_regular(path)
    except OSError as error:
        raise ValueError(
            f"The file can't be read ({error.strerror}); {cure_of(error)}."
        ) from None
    done, refusal = 0, "its header says that it is empty"
    try:
        # Not by its name, which may end with .raw, or be no text.
        with opened, _SoundFile(opened.fileno(), closefd=False) as file:
            count = max(1, BLOCK // file.channels)
            while len(
                block := file.read(count, dtype="float32", always_2d=True)
            ):
                yield file.samplerate, block
                done += len(block)
    except soundfile.LibsndfileError as error:
        if done:
            raise ValueError(
                f"The file is damaged after {done:,} samples "
                f"({_words(error)}); make or download it again."
            ) from None
        refusal = _words(error)
    if not done:
        yield from _decode_with_av(path, refusal)


def _words(error: soundfile.LibsndfileError) -> str:
    return error.error_string.removeprefix("Error : ").strip(" .")


def _decode_with_av(
    path: str | Path, refusal: str
) -> Iterator[tuple[int, np.ndarray]]:
    try:
        import av
    except ImportError:
        raise ValueError(
            f"libsndfile can't read the file ({refusal}); if it is sound, as "
            "M4A is, `pip install av` or make it a WAV or FLAC file."
        ) from None
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        with av.open(str(path), options=options) as container:
            planar = av.AudioResampler(format="fltp")
            for frame in container.decode(audio=0):
                for part in planar.resample(frame):
                    yield part.sample_rate, part.to_ndarray().T
    except (av.FFmpegError, ValueError, IndexError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"The file can't be read as sound ({refusal}; {why}); make or "
            "download it again."
        ) from None


def at_16_khz(
    decoded: Iterable[tuple[int, np.ndarray]], size: int = 2**15
) -> Iterator[np.ndarray]:
    """Resamples what :func:`decode` yields; channels are kept apart.

    Arguments
    ---------
    decoded : iterable of (int, np.ndarray [samples, channels])
        Sample rates and blocks of one recording.
    size : int
        Samples of each block, but the last.

    Yields
    ------
    np.ndarray [size, channels]
        Float32. The samples don't depend on where the blocks end.

    Raises
    ------
    ValueError
        If a sample isn't finite or is beyond 1e30, the sample rate can't be
        resampled, or rate or channels change within the recording.

    Example
    -------
    >>> decoded = [(48000, np.zeros((60000, 1), np.float32))] * 2
    >>> [len(block) for block in at_16_khz(decoded)]
    [32768, 7232]
    """
    held = np.zeros((0, 0), np.float32)
    for block in _resampled(decoded):
        held = np.concatenate((held, block)) if len(held) else block
        whole = len(held) - len(held) % size
        for start in range(0, whole, size):
            yield held[start : start + size]
        held = held[whole:]
    if len(held):
        yield held


def _resampled(decoded):
    stream = None
    for rate, block in checked(decoded):
        if rate == SAMPLE_RATE:
            yield block
            continue
        if stream is None:
            stream = soxr.ResampleStream(rate, SAMPLE_RATE, block.shape[1])
        yield stream.resample_chunk(np.ascontiguousarray(block))
    if stream:
        yield stream.resample_chunk(block[:0], last=True)


def checked(
    decoded: Iterable[tuple[int, np.ndarray]],
) -> Iterator[tuple[int, np.ndarray]]:
    """Passes on what :func:`decode` yields, if it can be worked with.

    Arguments
    ---------
    decoded : iterable of (int, np.ndarray [samples, channels])
        Sample rates and blocks of one recording.

    Raises
    ------
    ValueError
        See :func:`at_16_khz`.

    Example
    -------
    >>> list(checked([(8, np.zeros((1, 1)))]))
    Traceback (most recent call last):
    ...
    ValueError: The sample rate of 8 Hz is not within 4,000 to 768,000.
    """
    form = None
    for rate, block in decoded:
        form = form or (rate, block.shape[1])
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(
                f"The sample rate of {rate:,} Hz is not within {RATES[0]:,} "
                f"to {RATES[1]:,}."
            )
        if form != (rate, block.shape[1]):
            raise ValueError(
                "The sample rate or the number of channels changes within "
                "the recording; convert it to a WAV file."
            )
        if not (np.abs(block) < LARGEST).all():
            raise ValueError(
                "The recording has samples that are not finite or far too "
                "large; make or download it again."
            )
        yield rate, block
