"""Which parts of a recording are speech: by a detector, or by loudness."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from spkid.audio.reading import SAMPLE_RATE
from spkid.errors import UserError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

NETWORK = "silero_vad_16k_sequence.onnx"
# silero-vad's frame and its defaults, in samples.
FRAME, CONTEXT = 512, 64
BEGIN, END = 0.5, 0.35  # probabilities that begin speech, and that end it
MIN_SPEECH, MIN_SILENCE, PAD = 4000, 1600, 480


def remove_silence(
    waveform: np.ndarray,
    sample_rate: int = SAMPLE_RATE,
    min_silence: float = 0.1,
    threshold: float = 0.01,
) -> np.ndarray:
    """Removes long silences, as ``sox silence 1 0.1 1% -1 0.1 1%`` does.

    A sample is loud if the root mean square of the 20 ms that end with it
    reaches the threshold. Loud and quiet runs alternate. Of the runs of at
    least ``min_silence``, loud ones are kept and quiet ones removed; a shorter
    run is treated like the last long one before it. So a short pause inside
    speech is kept, and a click inside a silence is removed.

    Arguments
    ---------
    waveform : np.ndarray [samples]
        Floating point, with full scale at 1.
    sample_rate : int
        Samples per second.
    min_silence : float
        Shortest silence that is removed and shortest sound that ends it, in
        seconds.
    threshold : float
        Root mean square of the quietest sound, as a fraction of full scale.

    Returns
    -------
    np.ndarray [kept samples]
        The kept parts, joined; empty if nothing is loud.

    Example
    -------
    >>> tone = np.cos(np.arange(8000) * 0.1)
    >>> recording = np.concatenate([tone, np.zeros(16000), tone])
    >>> len(remove_silence(recording))  # 20 ms of the silence remain
    16319
    """
    if waveform.ndim != 1:
        raise ValueError(
            "A waveform must have the shape [samples], not "
            f"{list(waveform.shape)}."
        )
    starts = range(0, len(waveform), 2**16)  # an hour fits into little memory
    blocks = (waveform[start : start + 2**16] for start in starts)
    parts = loud_blocks(blocks, sample_rate, min_silence, threshold)
    return np.concatenate([waveform[:0], *parts])


def loud_blocks(
    blocks: Iterable[np.ndarray],
    sample_rate: int = SAMPLE_RATE,
    min_silence: float = 0.1,
    threshold: float = 0.01,
) -> Iterator[np.ndarray]:
    """:func:`remove_silence` for a waveform that comes in blocks.

    It holds back no more than one run that is shorter than ``min_silence``.

    Arguments
    ---------
    blocks : iterable of np.ndarray [samples]
        The waveform; the other arguments are those of
        :func:`remove_silence`.

    Yields
    ------
    np.ndarray [kept samples]

    Example
    -------
    >>> blocks = [np.ones(1000)] * 3 + [np.zeros(9000)]
    >>> [len(block) for block in loud_blocks(blocks)]
    [0, 2000, 0, 1319]
    """
    window = round(0.02 * sample_rate)
    energy = np.zeros(window)  # up to each of the last samples
    # Of the run that the last block ended with: its samples, and whether each
    # is loud, while it isn't long enough to be judged.
    held, loud = np.zeros(0, np.float32), np.zeros(0, bool)
    keep = False  # the last long run was loud
    for new in filter(len, blocks):
        # One sum over all blocks, so that their ends don't matter.
        power = np.square(new, dtype=np.float64)
        total = np.cumsum(np.concatenate((energy[-1:], power)))[1:]
        energy = np.concatenate((energy, total))
        now = total - energy[: len(total)] >= window * threshold**2
        energy = energy[-window:]
        block = np.concatenate((held, new)) if len(held) else new
        loud = np.concatenate((loud, now))
        starts = np.flatnonzero(np.diff(loud, prepend=~loud[:1]))
        length = np.diff(starts, append=len(loud))
        is_long = length >= min_silence * sample_rate
        index = np.arange(1, len(length) + 1)
        last_long = np.maximum.accumulate(np.where(is_long, index, 0))
        # Index 0, where there is no long run yet, is the one of the blocks
        # before; so the rest of a long run is treated as its beginning was.
        kept = np.concatenate(([keep], loud[starts]))[last_long]
        judged = len(loud) if is_long[-1] else starts[-1]
        yield block[:judged][np.repeat(kept, length)[:judged]]
        keep, held, loud = kept[-1], block[judged:], loud[judged:]
    if keep:
        yield held


@functools.cache
def detector() -> InferenceSession:
    """silero-vad's network that takes many frames a call, on one thread.

    Its file is read without importing its package, which needs torch.

    Raises
    ------
    UserError
        If silero-vad or onnxruntime isn't installed.

    Example
    -------
    >>> [tensor.name for tensor in detector().get_inputs()]
    ['input', 'h', 'c']
    """
    try:
        import onnxruntime

        spec = importlib.util.find_spec("silero_vad")
        if spec is None or spec.origin is None:
            raise ImportError
        network = Path(spec.origin).with_name("data") / NETWORK
        content = network.read_bytes()
    except (ImportError, OSError):
        raise UserError(
            'silence="vad" finds speech with silero-vad 6.2.3 or newer; run '
            '`pip install -U silero-vad onnxruntime`, or give silence="hw4".'
        ) from None
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )


def probabilities(blocks: Iterable[np.ndarray]) -> Iterator[float]:
    """silero-vad's probability of speech in each 32 ms.

    Arguments
    ---------
    blocks : iterable of np.ndarray [samples]
        A waveform at 16 kHz, float32; the number of samples in each block but
        the last is a multiple of 512.

    Yields
    ------
    float
        For each 512 samples, the last ones with zeros at their end.

    Raises
    ------
    UserError
        If silero-vad or onnxruntime isn't installed.

    Example
    -------
    >>> noise = np.random.default_rng(0).normal(0, 0.01, 16000)
    >>> found = list(probabilities([noise.astype(np.float32)]))
    >>> len(found), max(found) < 0.5
    (32, True)
    """
    run, names = detector().run, ["speech_probs", "hn", "cn"]
    hidden = cell = np.zeros((1, 1, 128), np.float32)
    context = np.zeros(CONTEXT, np.float32)
    for block in blocks:
        rest = np.zeros(-len(block) % FRAME, np.float32)
        row = np.concatenate((context, block, rest))
        frames = sliding_window_view(row, CONTEXT + FRAME)[::FRAME]
        state = {"h": hidden, "c": cell}
        found, hidden, cell = run(names, {"input": frames.copy(), **state})
        yield from found.tolist()
        context = row[-CONTEXT:]


def segments(
    probabilities: Iterable[float], samples: int
) -> list[tuple[int, int]]:
    """Where speech is, by silero-vad's ``get_speech_timestamps``.

    Speech begins with a probability of 0.5 and ends with 100 ms in which no
    probability reaches that and which start and end below 0.35. What is
    shorter than 250 ms is dropped, and 30 ms are added at both ends.

    Arguments
    ---------
    probabilities : iterable of float
        One for each 512 samples.
    samples : int
        Length of the waveform.

    Returns
    -------
    list of tuple of (int, int)
        First sample, and the one after the last; ascending.

    Example
    -------
    >>> segments([0.1] * 10 + [0.9] * 20 + [0.1] * 10, 40 * 512)
    [(4640, 15840)]
    """
    found, start, end = [], None, None
    for i, probability in enumerate(probabilities):
        here = i * FRAME
        if probability >= BEGIN:
            start, end = here if start is None else start, None
        elif probability < END and start is not None:
            end = here if end is None else end
            if here - end >= MIN_SILENCE:
                found.append((start, end))
                start = end = None
    if start is not None:
        found.append((start, samples))
    return [
        (max(0, start - PAD), min(samples, end + PAD))
        for start, end in found
        if end - start > MIN_SPEECH
    ]


def cut(
    blocks: Iterable[np.ndarray], segments: Sequence[tuple[int, int]]
) -> Iterator[np.ndarray]:
    """The segments' samples of a waveform that comes in blocks.

    Arguments
    ---------
    blocks : iterable of np.ndarray [samples]
        The waveform.
    segments : sequence of tuple of (int, int)
        As of :func:`segments`.

    Yields
    ------
    np.ndarray [kept samples]
        One for each block.

    Example
    -------
    >>> blocks = [np.arange(4), np.arange(4, 8)]
    >>> [block.tolist() for block in cut(blocks, [(1, 2), (3, 6)])]
    [[1, 3], [4, 5]]
    """
    bounds, place = np.array(segments, int).reshape(-1, 2), 0
    for block in blocks:
        inside = (bounds - place).clip(0, len(block))
        parts = [block[start:end] for start, end in inside if start < end]
        yield np.concatenate([block[:0], *parts])
        place += len(block)
