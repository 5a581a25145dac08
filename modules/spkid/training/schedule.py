"""Schedules over training progress, a number from 0 to 1.

Progress is optimiser steps done over optimiser steps planned. A schedule is
a pure function of it: it has no state that a checkpoint could miss, and one
YAML serves any number of utterances. (SpeechBrain has no warm-up with cosine.)
"""

from __future__ import annotations

import math


class WarmupCosine:
    """Linear warm-up, then half a cosine (Loshchilov and Hutter, 2017).

    Arguments
    ---------
    peak : float
        Learning rate at the end of the warm-up.
    warmup : float
        Share of training spent warming up from 0, in [0, 1).
    final : float
        Learning rate at the end.

    Example
    -------
    >>> lr = WarmupCosine(peak=1.0, warmup=0.1)
    >>> lr(0.05), lr(0.1), round(lr(0.55), 6), lr(1.0)
    (0.5, 1.0, 0.5, 0.0)
    """

    def __init__(
        self, peak: float, warmup: float = 0.1, final: float = 0.0
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} must lie in [0, 1).")
        self.peak, self.warmup, self.final = peak, warmup, final

    def __call__(self, progress: float) -> float:
        """Learning rate at ``progress`` of the training."""
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        phase = (progress - self.warmup) / (1 - self.warmup)
        height = (1 + math.cos(math.pi * phase)) / 2
        return self.final + (self.peak - self.final) * height


class LinearRamp:
    """From one value to another between two points of the training.

    The margin of a margin softmax is commonly raised from 0 like this, while
    the embeddings are still unordered.

    Arguments
    ---------
    first, last : float
        Values before ``begin`` and after ``end``.
    begin, end : float
        Points of the training, 0 <= begin <= end <= 1.

    Example
    -------
    >>> margin = LinearRamp(0.0, 0.2, begin=0.1, end=0.5)
    >>> margin(0.0), round(margin(0.3), 6), margin(0.7)
    (0.0, 0.1, 0.2)
    """

    def __init__(
        self, first: float, last: float, begin: float = 0.0, end: float = 1.0
    ) -> None:
        if not 0 <= begin <= end <= 1:
            raise ValueError(
                f"begin={begin} and end={end} must rise within [0, 1]."
            )
        self.first, self.last = first, last
        self.begin, self.end = begin, end

    def __call__(self, progress: float) -> float:
        """Value at ``progress`` of the training."""
        if progress <= self.begin:
            return self.last if self.end == self.begin == 0 else self.first
        if progress >= self.end:
            return self.last
        share = (progress - self.begin) / (self.end - self.begin)
        return self.first + (self.last - self.first) * share
