"""What a list of guesses says: intervals, lengths, confusions, calibration,
and what to expect of guesses that nobody can check."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student_t


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
    low: float  # 95 % prediction interval
    high: float


def expected_accuracy(
    confidence: np.ndarray,
    right: np.ndarray,
    speaker: np.ndarray,
    new_confidence: np.ndarray,
    new_guess: np.ndarray,
) -> Expectation:
    """What accuracy to expect of new utterances, from the validated ones.

    By how much the model is less sure of the new ones than it was of the
    validated ones, by so much their accuracy should be lower (the difference
    of confidences of Guillory et al., "Predicting with Confidence on Unseen
    Distributions", 2021). That is exact if the confidence is as much too high
    or too low as in validation; a model that doesn't notice how strange new
    recordings are promises too much. In validation each speaker weighs the
    same.

    The interval is Student's, of another mean over as many speakers as are
    guessed: it knows how speakers differ, and nothing of strangeness. It is at
    least as wide as chance makes it for guesses that know of no speakers, since
    where all were right, speakers don't seem to differ; and for that chance two
    more right and two more wrong ones are assumed (Agresti and Coull,
    "Approximate Is Better than 'Exact'", 1998), since where none was wrong none
    seems possible. Where the new ones are the same speakers, the interval is
    rather too wide.

    Arguments
    ---------
    confidence : np.ndarray [n]
        Posteriors of validated guesses, 0 … 1; at least one.
    right : np.ndarray [n]
        Whether the guess was right.
    speaker : np.ndarray [n]
        Who spoke, by class index.
    new_confidence : np.ndarray [m]
        Posteriors of the new guesses, 0 … 1; at least one.
    new_guess : np.ndarray [m]
        The new guesses, by class index.

    Returns
    -------
    Expectation

    Example
    -------
    >>> sure, right = np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 0, 1])
    >>> new, guess = np.array([0.7, 0.5]), np.array([0, 1])
    >>> told = expected_accuracy(sure, right, [0, 0, 1, 1], new, guess)
    >>> round(told.accuracy, 4)  # 0.75 - (0.75 - 0.6)
    0.6
    """
    confidence, new_confidence = (  # NaN, of a diverged model: not sure at all
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
        # Speakers who count unequally are as good as so many who don't.
        n_new = new_count.sum() ** 2 / (new_count**2).sum()
        variance = surplus.var(ddof=1) * (1 / len(count) + 1 / n_new)
        n = len(confidence)
        share = (np.clip(accuracy, 0, 1) * n + 2) / (n + 4)
        chance = 1 / n + 1 / len(new_confidence)
        variance = max(variance, share * (1 - share) * chance)
        half = student_t.ppf(0.975, len(count) - 1) * np.sqrt(variance)
    ends = accuracy, accuracy - half, accuracy + half
    return Expectation(*np.clip(ends, 0, 1).tolist())
