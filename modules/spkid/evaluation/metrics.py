"""Metrics of guesses: intervals, confusions, calibration, and the accuracy to
expect where nobody can check."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student_t


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson, 1927).

    It stays within 0 and 1, and has a width also where all guesses are right.

    Arguments
    ---------
    right : int
        Right guesses.
    total : int
        All guesses; at least 1.

    Example
    -------
    >>> low, high = wilson_interval(3, 3)
    >>> round(low, 3), round(high, 3)
    (0.439, 1.0)
    """
    interval = binomtest(int(right), int(total)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def quantile_edges(values: np.ndarray, n_bins: int) -> np.ndarray:
    """Edges of bins that hold about the same number of values each.

    Arguments
    ---------
    values : np.ndarray [n]
        Whole numbers, such as lengths in frames; at least one.
    n_bins : int
        Number of bins; fewer are returned where many values are equal.

    Returns
    -------
    np.ndarray [bins + 1]
        Increasing; bin i holds edges[i] <= value < edges[i + 1]. The last edge
        is the largest value plus one.

    Example
    -------
    >>> quantile_edges(np.array([1, 2, 3, 4]), 2).tolist()
    [1, 3, 5]
    """
    shares = np.arange(n_bins) / n_bins
    lower = np.quantile(values, shares, method="higher")  # never between two
    return np.unique([*lower, np.max(values) + 1])


class Reliability(NamedTuple):
    """Confidence and accuracy, in bins of equal width over 0 … 1."""

    utterances: np.ndarray  # [bins]: their number
    confidence: np.ndarray  # [bins]: mean; NaN in an empty bin
    accuracy: np.ndarray  # [bins]; NaN in an empty bin
    error: float  # expected calibration error


def reliability(
    confidence: np.ndarray, right: np.ndarray, n_bins: int = 15
) -> Reliability:
    """The bins of a reliability diagram, and the expected calibration error.

    The error is the mean difference between a bin's confidence and accuracy,
    weighted by its utterances (Guo et al., "On Calibration of Modern Neural
    Networks", 2017).

    Arguments
    ---------
    confidence : np.ndarray [n]
        Posterior of each guess, 0 … 1; at least one.
    right : np.ndarray [n]
        Whether the guess was right.
    n_bins : int
        Number of bins; a confidence on an edge belongs to the bin below.

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
    utterances: int  # their number
    share: float  # of all utterances of the target


def confused_pairs(
    target: np.ndarray, guess: np.ndarray, limit: int = 20
) -> list[Confusion]:
    """The most frequent confusions, in order.

    Arguments
    ---------
    target : np.ndarray [n]
        Class indices, all known.
    guess : np.ndarray [n]
        Class indices.
    limit : int
        Returns at most this many.

    Returns
    -------
    list of Confusion
        By utterances, then by share; the largest first.

    Example
    -------
    >>> confused_pairs(np.array([0, 0, 1]), np.array([1, 0, 1]))
    [Confusion(target=0, guess=1, utterances=1, share=0.5)]
    """
    pairs = list(zip(target.tolist(), guess.tolist(), strict=True))
    totals = Counter(target.tolist())
    wrong = Counter((t, g) for t, g in pairs if t != g)
    rows = [Confusion(t, g, n, n / totals[t]) for (t, g), n in wrong.items()]
    rows.sort(key=lambda c: (-c.utterances, -c.share, c.target, c.guess))
    return rows[:limit]


class Expectation(NamedTuple):
    """The estimated accuracy of guesses that can't be checked."""

    accuracy: float
    low: float  # 95 % prediction interval
    high: float


def expected_accuracy(
    confidence: np.ndarray,
    right: np.ndarray,
    speaker: np.ndarray,
    new_confidence: np.ndarray,
    new_guess: np.ndarray,
) -> Expectation:
    """Estimates the accuracy on new utterances from the model's confidence.

    If mean confidence drops by x points from validation to the new utterances,
    accuracy is expected to drop by x (the difference of confidences of Guillory
    et al., "Predicting with Confidence on Unseen Distributions", 2021). This is
    exact if confidence is as much too high or too low as in validation; it is
    too optimistic for a model that is sure of recordings that are strange to
    it. In validation, every speaker has the same weight.

    The interval is Student's prediction interval of a mean over as many
    speakers as are guessed: it covers differences between speakers, not strange
    recordings. It is never narrower than the binomial interval with two right
    and two wrong guesses added (Agresti and Coull, "Approximate Is Better than
    'Exact'", 1998), which stays positive without errors. If the new utterances
    are of the validated speakers, it is rather too wide.

    Arguments
    ---------
    confidence : np.ndarray [n]
        Posteriors of validated guesses, 0 … 1; at least one.
    right : np.ndarray [n]
        Whether the guess was right.
    speaker : np.ndarray [n]
        Class indices of those who spoke.
    new_confidence : np.ndarray [m]
        Posteriors of the new guesses, 0 … 1; at least one.
    new_guess : np.ndarray [m]
        The new guesses, class indices.

    Example
    -------
    >>> sure, right = np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 0, 1])
    >>> new, guess = np.array([0.7, 0.5]), np.array([0, 1])
    >>> estimate = expected_accuracy(sure, right, [0, 0, 1, 1], new, guess)
    >>> round(estimate.accuracy, 4)  # 0.75 - (0.75 - 0.6)
    0.6
    """
    confidence, new_confidence = (  # NaN, of a diverged model, becomes 0
        np.nan_to_num(np.asarray(values, dtype=float))
        for values in (confidence, new_confidence)
    )
    speaker, count = np.unique(
        speaker, return_inverse=True, return_counts=True
    )[1:]
    surplus = np.bincount(speaker, right - confidence) / count
    accuracy = surplus.mean() + new_confidence.mean()
    half = np.inf
    if len(count) > 1:
        new_count = np.unique(new_guess, return_counts=True)[1]
        # The number of equally frequent speakers that would say as much.
        n_new = new_count.sum() ** 2 / (new_count**2).sum()
        variance = surplus.var(ddof=1) * (1 / len(count) + 1 / n_new)
        n = len(confidence)
        share = (np.clip(accuracy, 0, 1) * n + 2) / (n + 4)
        chance = 1 / n + 1 / len(new_confidence)
        variance = max(variance, share * (1 - share) * chance)
        half = student_t.ppf(0.975, len(count) - 1) * np.sqrt(variance)
    ends = accuracy, accuracy - half, accuracy + half
    return Expectation(*np.clip(ends, 0, 1).tolist())
