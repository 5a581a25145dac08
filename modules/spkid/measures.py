"""What a list of guesses says: intervals, lengths, confusions, calibration,
and what to expect of guesses that nobody can check."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson, 1927).

    It stays within 0 and 1 and is honest for few utterances, where the usual
    plus-or-minus says that three of three is certainty.

    Arguments
    ---------
    right : int
        Utterances guessed right.
    total : int
        Utterances guessed; at least 1.

    Returns
    -------
    tuple of float
        Its two ends.

    Example
    -------
    >>> low, high = wilson_interval(3, 3)
    >>> round(low, 3), round(high, 3)
    (0.439, 1.0)
    """
    interval = binomtest(int(right), int(total)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def quantile_edges(values: np.ndarray, n_bins: int) -> np.ndarray:
    """Edges of bins that hold about equally many values each.

    Arguments
    ---------
    values : np.ndarray [n]
        Whole numbers, such as lengths in frames; at least one.
    n_bins : int
        How many bins; fewer come back where many values are the same.

    Returns
    -------
    np.ndarray [bins + 1]
        Increasing; bin i holds edges[i] <= value < edges[i + 1], and the last
        edge is the largest value plus one.

    Example
    -------
    >>> quantile_edges(np.array([1, 2, 3, 4]), 2).tolist()
    [1, 3, 5]
    """
    shares = np.arange(n_bins) / n_bins
    lower = np.quantile(values, shares, method="higher")  # never between two
    return np.unique([*lower, np.max(values) + 1])


class Reliability(NamedTuple):
    """Confidence against accuracy, in bins of equal width over 0 … 1."""

    count: np.ndarray  # [bins]: utterances
    confidence: np.ndarray  # [bins]: their mean; NaN in an empty bin
    accuracy: np.ndarray  # [bins]: NaN in an empty bin
    error: float  # expected calibration error


def reliability(
    confidence: np.ndarray, right: np.ndarray, n_bins: int = 15
) -> Reliability:
    """A reliability diagram's bins, and the expected calibration error.

    The error is the mean distance of a bin's confidence from its accuracy,
    weighted by its utterances (Guo et al., "On Calibration of Modern Neural
    Networks", 2017).

    Arguments
    ---------
    confidence : np.ndarray [n]
        Posterior of each guess, 0 … 1; at least one.
    right : np.ndarray [n]
        Whether the guess was right.
    n_bins : int
        How many bins; a confidence on an edge belongs to the bin below.

    Returns
    -------
    Reliability

    Example
    -------
    >>> bins = reliability(np.array([0.9, 0.9, 0.2]), np.array([1, 0, 0]))
    >>> round(bins.error, 4)  # (2 * |0.9 - 0.5| + |0.2 - 0|) / 3
    0.3333
    """
    index = np.ceil(np.asarray(confidence, dtype=float) * n_bins).astype(int)
    index = np.clip(index - 1, 0, n_bins - 1)
    count, confidences, rights = (
        np.bincount(index, weights, n_bins)
        for weights in (None, confidence, right)
    )
    error = np.abs(confidences - rights).sum() / count.sum()
    filled = np.where(count, count, np.nan)
    return Reliability(
        count, confidences / filled, rights / filled, float(error)
    )


class Confusion(NamedTuple):
    """How often one speaker was taken for another."""

    target: int  # class index
    guess: int  # class index
    count: int  # utterances
    share: float  # of all the target's utterances


def confused_pairs(
    target: np.ndarray, guess: np.ndarray, limit: int = 20
) -> list[Confusion]:
    """The most frequent confusions, most utterances first.

    Arguments
    ---------
    target : np.ndarray [n]
        Class indices, all known.
    guess : np.ndarray [n]
        Class indices.
    limit : int
        How many at most.

    Returns
    -------
    list of Confusion
        Of equally many utterances, the larger share comes first.

    Example
    -------
    >>> confused_pairs(np.array([0, 0, 1]), np.array([1, 0, 1]))
    [Confusion(target=0, guess=1, count=1, share=0.5)]
    """
    pairs = list(zip(target.tolist(), guess.tolist(), strict=True))
    totals = Counter(target.tolist())
    wrong = Counter((t, g) for t, g in pairs if t != g)
    rows = [Confusion(t, g, n, n / totals[t]) for (t, g), n in wrong.items()]
    rows.sort(key=lambda row: (-row.count, -row.share, row.target, row.guess))
    return rows[:limit]


class Expectation(NamedTuple):
    """The accuracy to expect of guesses whose truth is unknown."""

    accuracy: float
    low: float  # 95 % interval
    high: float


def expected_accuracy(
    confidence: np.ndarray,
    right: np.ndarray,
    speaker: np.ndarray,
    new_confidence: np.ndarray,
    new_guess: np.ndarray,
    n_draws: int = 1000,
) -> Expectation:
    """What accuracy to expect of new utterances, from the validated ones.

    A threshold is put where as many of the validated utterances are surer as
    are right; of the new ones, as many should be right as are surer than that
    (Garg et al., "Leveraging Unlabeled Data to Predict Out-of-Distribution
    Performance", 2022). So recordings that differ more from the training than
    the validated ones do lower the expectation, as far as the model notices.
    Each speaker weighs the same in validation. The interval is a bootstrap
    over the validated speakers and over those guessed: it knows of chance, not
    of what no validated session is like.

    Arguments
    ---------
    confidence : np.ndarray [n]
        Of validated guesses, such as their posteriors; at least one.
    right : np.ndarray [n]
        Whether the guess was right.
    speaker : np.ndarray [n]
        Who spoke, by class index.
    new_confidence : np.ndarray [m]
        Of the new guesses; at least one.
    new_guess : np.ndarray [m]
        The new guesses, by class index.
    n_draws : int
        Draws of the bootstrap; always the same ones.

    Returns
    -------
    Expectation

    Example
    -------
    >>> sure, right = np.array([0.2, 0.4, 0.6, 0.8]), np.array([0, 0, 1, 1])
    >>> new = np.array([0.1, 0.3, 0.45, 0.9])
    >>> expected_accuracy(sure, right, np.arange(4), new, np.arange(4)).accuracy
    0.25
    """
    order = np.argsort(confidence, kind="stable")
    right = np.asarray(right, dtype=float)[order]
    speaker, counts = np.unique(
        np.asarray(speaker)[order], return_inverse=True, return_counts=True
    )[1:]
    guess, new_counts = np.unique(
        new_guess, return_inverse=True, return_counts=True
    )[1:]
    ends = np.asarray(confidence)[order]
    # Between two, above all, but never below all: what is less sure than any
    # that was right may be wrong.
    ends = np.concatenate((ends[:1], ends, [np.inf]))
    thresholds = (ends[:-1] + ends[1:]) / 2  # above 0, 1, ... n utterances

    def expect(times, new_times):
        """If each speaker, and each guess, is drawn so many times."""
        weight = (times / counts)[speaker]
        below = np.concatenate(([0.0], np.cumsum(weight)))
        wrong = weight @ (1 - right)
        threshold = thresholds[np.abs(below - wrong).argmin()]
        surer = np.asarray(new_confidence) >= threshold
        return np.average(surer, weights=new_times[guess])

    def draw(count):
        return generator.multinomial(count, np.full(count, 1 / count))

    generator = np.random.default_rng(0)
    accuracy = expect(np.ones(len(counts)), np.ones(len(new_counts)))
    drawn = [
        expect(draw(len(counts)), draw(len(new_counts))) for _ in range(n_draws)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Expectation(float(accuracy), float(low), float(high))
