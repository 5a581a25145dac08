"""Metrics of pairs of utterances, and of answers that may be "unknown".

A trial is a score and whether it is of one speaker ("positive", a target
trial) or of two ("negative"). Each function accepts what is above a threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 2**22  # scores of pairs at a time


class DetCurve(NamedTuple):
    """Error rates by threshold (detection error trade-off).

    Source: Martin et al., "The DET Curve in Assessment of Detection Task
    Performance", 1997. It is drawn on probit axes.
    """

    threshold: np.ndarray  # [points]: increasing; scores above it are accepted
    miss: np.ndarray  # [points]: share of positives that are rejected
    false_alarm: np.ndarray  # [points]: share of negatives that are accepted

    def thinned(self, steps: int = 100) -> DetCurve:
        """Points to draw: both ends of whatever crosses one of some steps."""
        grid = 1 / (1 + np.exp(-np.linspace(-16, 16, steps)))  # almost probit
        risen = np.searchsorted(self.miss, grid)
        fallen = np.searchsorted(-self.false_alarm, -grid)
        after = np.concatenate([[0, len(self.miss)], risen, fallen])
        kept = np.unique([after - 1, after]).clip(0, len(self.miss) - 1)
        return DetCurve(*(values[kept] for values in self))


def det_curve(positive: np.ndarray, negative: np.ndarray) -> DetCurve:
    """Both error rates at each distinct score, and below all of them.

    Arguments
    ---------
    positive, negative : np.ndarray [n], np.ndarray [m]
        Scores; higher: more likely one speaker.

    Raises
    ------
    ValueError
        If either has no score, or one is NaN.

    Example
    -------
    >>> curve = det_curve(np.array([0.4, 0.8]), np.array([0.1, 0.4]))
    >>> curve.miss.tolist(), curve.false_alarm.tolist()
    ([0.0, 0.0, 0.5, 1.0], [1.0, 0.5, 0.0, 0.0])
    """
    positive, negative = _sorted(positive), _sorted(negative)
    scores = np.unique(np.concatenate([positive, negative]))
    miss = np.searchsorted(positive, scores, "right") / len(positive)
    accepted = len(negative) - np.searchsorted(negative, scores, "right")
    return DetCurve(
        np.append(-np.inf, scores),
        np.append(0, miss),
        np.append(1, accepted / len(negative)),
    )


def equal_error_rate(
    positive: np.ndarray, negative: np.ndarray
) -> tuple[float, float]:
    """The rate where as many positives are missed as negatives accepted.

    The two seldom meet: this is their mean at the score where they are
    nearest, the first of two, without interpolation and with float32 rates, as
    SpeechBrain's ``EER`` has it (speechbrain.utils.metric_stats).

    Arguments
    ---------
    positive, negative : np.ndarray [n], np.ndarray [m]
        As for :func:`det_curve`, errors included.

    Returns
    -------
    tuple
        The rate, 0 … 1, and its threshold, one of the scores.

    Example
    -------
    >>> equal_error_rate(np.array([0.4, 0.7, 0.8]), np.array([0.1, 0.2, 0.5]))
    (0.3333333432674408, 0.4)
    """
    threshold, *exact = det_curve(positive, negative)
    # SpeechBrain has float32 rates, and no threshold below all scores.
    miss, false_alarm = (rates[1:].astype(np.float32) for rates in exact)
    distance = np.abs(false_alarm - miss).astype(float)
    at = int(distance.argmin())
    # It compares the rounded distance with the smallest before, not rounded.
    smallest = abs(float(false_alarm[at]) - float(miss[at]))
    at += int((distance[at + 1 : at + 2] < smallest).any())
    rate = (float(miss[at]) + float(false_alarm[at])) / 2
    return rate, float(threshold[at + 1])


def min_dcf(
    positive: np.ndarray,
    negative: np.ndarray,
    p_target: float = 0.01,
    c_miss: float = 1,
    c_false: float = 1,
) -> tuple[float, float]:
    """The detection cost at the best threshold.

    The cost is c_miss · p_target · miss rate + c_false · (1 - p_target) ·
    false alarm rate, as SpeechBrain's ``minDCF`` has it. It is not normalised:
    NIST and most papers divide by min(c_miss · p_target, c_false · (1 -
    p_target)), the cost without listening. The threshold that accepts all isn't
    tried; it matters only where a miss is the dearer error.

    Arguments
    ---------
    positive, negative : np.ndarray [n], np.ndarray [m]
        As for :func:`det_curve`, errors included.
    p_target : float
        Share of positives where the system is used, 0 … 1.
    c_miss, c_false : float
        What an error costs.

    Returns
    -------
    tuple
        The cost and its threshold, one of the scores.

    Example
    -------
    >>> min_dcf(np.array([0.4, 0.7, 0.8]), np.array([0.1, 0.2, 0.5]), 0.5)
    (0.16666666666666666, 0.2)
    """
    threshold, miss, false_alarm = (
        values[1:] for values in det_curve(positive, negative)
    )
    cost = c_miss * p_target * miss + c_false * (1 - p_target) * false_alarm
    at = int(cost.argmin())
    return float(cost[at]), float(threshold[at])


def as_norm(
    scores: np.ndarray,
    row_cohort: np.ndarray,
    column_cohort: np.ndarray,
    top: int = 300,
) -> np.ndarray:
    """Adaptive symmetric normalisation of scores.

    A score loses the mean of its row's highest scores with a cohort of other
    speakers, and is divided by their standard deviation; likewise by its
    column's; the two are averaged. Source: Matejka et al., "Analysis of Score
    Normalization in Multilingual Speaker Recognition", 2017 ("AS-norm1").

    Arguments
    ---------
    scores : np.ndarray [n, m]
        Of utterances or speakers (rows) with others (columns).
    row_cohort, column_cohort : np.ndarray [n, c], np.ndarray [m, c]
        Scores of the rows, and of the columns, with the cohort.
    top : int
        How many of the cohort count, the highest; all if it has fewer.

    Raises
    ------
    ValueError
        If the scores that count are fewer than two, or all equal.

    Example
    -------
    >>> cohort = np.array([[0.0, 0.2, -5]])
    >>> float(as_norm(np.array([[0.5]]), cohort, cohort, top=2).round(6)[0, 0])
    4.0
    """
    normed = []
    for one, cohort in ((scores, row_cohort), (scores.T, column_cohort)):
        kept = min(top, cohort.shape[1])
        highest = np.partition(cohort, -kept, axis=1)[:, -kept:]
        if not np.ptp(highest, axis=1).all():
            raise ValueError("a cohort needs two scores that differ")
        middle = highest.mean(axis=1, keepdims=True)
        normed.append((one - middle) / highest.std(axis=1, keepdims=True))
    return (normed[0] + normed[1].T) / 2


class OpenSet(NamedTuple):
    """How well known speakers are found while strangers are rejected."""

    threshold: np.ndarray  # a best score above it is accepted
    fpir: np.ndarray  # share of strangers that are; at most what was asked for
    rate: np.ndarray  # share of known that are accepted and given their name


def detection_and_identification_rate(
    scores_of_known: np.ndarray,
    targets: np.ndarray,
    scores_of_strangers: np.ndarray,
    fpir: float | np.ndarray,
) -> OpenSet:
    """Detection and identification rate at a false-positive rate.

    The threshold is the lowest that accepts no more than this share of the
    strangers; of equal scores it accepts none. Source: Peri et al., "VoxWatch:
    An open-set speaker recognition benchmark on VoxCeleb", 2023; NIST calls
    the two TPIR at rank 1 and FPIR.

    Arguments
    ---------
    scores_of_known : np.ndarray [n, speakers]
        Of utterances whose speaker is enrolled.
    targets : np.ndarray [n]
        The speaker's column. Its score must be higher than all others.
    scores_of_strangers : np.ndarray [m, speakers]
        Of utterances whose speaker isn't.
    fpir : float or np.ndarray
        False-positive identification rate, 0 … 1; several give the curve, and
        the result their shape.

    Raises
    ------
    ValueError
        If there are no known or no strangers, a score is NaN, or a rate isn't
        within 0 and 1.

    Example
    -------
    >>> known = np.array([[0.9, 0.1], [0.3, 0.6], [0.5, 0.4]])
    >>> strangers = np.array([[0.1, 0.2], [0.5, 0.0]])
    >>> found = detection_and_identification_rate(
    ...     known, np.array([0, 1, 1]), strangers, 0.01
    ... )
    >>> float(found.threshold), float(found.fpir), round(float(found.rate), 3)
    (0.5, 0.0, 0.667)
    """
    wanted = np.asarray(fpir, float)
    if not ((wanted >= 0) & (wanted <= 1)).all():
        raise ValueError("a false-positive rate isn't within 0 and 1")
    strangers = _sorted(scores_of_strangers.max(axis=1))
    best = _sorted(scores_of_known.max(axis=1))
    own = np.take_along_axis(scores_of_known, targets[:, None], axis=1)
    alone = (scores_of_known >= own).sum(axis=1) == 1
    found = np.sort(own[alone, 0])
    # A product such as 0.29 * 100 is a little below 29.
    allowed = np.floor(wanted * len(strangers) + 1e-9).astype(int)
    threshold = np.append(-np.inf, strangers)[len(strangers) - allowed]
    accepted, named = (
        len(ranked) - np.searchsorted(ranked, threshold, "right")
        for ranked in (strangers, found)
    )
    return OpenSet(threshold, accepted / len(strangers), named / len(best))


def unit_vectors(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings [n, size] at length 1, as float32; 0 where one isn't finite.

    Example
    -------
    >>> unit_vectors(np.array([[3, 4], [np.nan, 1]])).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    vectors = embeddings.astype(np.float32)
    vectors[~np.isfinite(vectors).all(axis=1)] = 0
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths.clip(min=1e-9)


def all_trials(
    embeddings: np.ndarray,
    speakers: np.ndarray,
    sessions: np.ndarray | None = None,
    limit: int = 10_000_000,
) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of all pairs of utterances, in bounded memory.

    Arguments
    ---------
    embeddings : np.ndarray [n, size]
        Of each utterance.
    speakers : np.ndarray [n]
        Who speaks.
    sessions : np.ndarray [n], optional
        Where given, two utterances of a speaker and a session are no trial:
        room and microphone would help.
    limit : int
        Of either kind at most this many are kept, spread evenly over all.

    Returns
    -------
    tuple of np.ndarray
        Of pairs of one speaker, and of pairs of two; either may be empty.

    Example
    -------
    >>> positive, negative = all_trials(np.eye(3), np.array(["a", "a", "b"]))
    >>> len(positive), len(negative)
    (1, 2)
    """
    vectors, n = unit_vectors(embeddings), len(embeddings)
    numbers = np.unique(speakers, return_inverse=True)[1]
    sittings = np.arange(n) if sessions is None else np.asarray(sessions)
    n_same = sum(k * (k - 1) // 2 for k in np.bincount(numbers).tolist())
    n_pairs = (n_same, n * (n - 1) // 2 - n_same)
    kept: list[list] = [[np.empty(0, np.float32)], [np.empty(0, np.float32)]]
    seen = [0, 0]
    block = 1 + BLOCK // (n + 1)
    for start in range(0, n, block):
        rows = slice(start, start + block)
        scores = vectors[rows] @ vectors[start:].T
        later = np.triu(np.ones(scores.shape, bool), 1)
        same = numbers[rows, None] == numbers[start:]
        apart = sittings[rows, None] != sittings[start:]
        for kind, which in enumerate((same & apart, ~same)):
            step = max(1, -(-n_pairs[kind] // limit))
            found = scores[which & later]
            kept[kind].append(found[-seen[kind] % step :: step])
            seen[kind] += len(found)
    return np.concatenate(kept[0]), np.concatenate(kept[1])


def _sorted(scores: np.ndarray) -> np.ndarray:
    """Scores in order; raises ValueError where none is, or one is NaN."""
    scores = np.sort(scores)  # NaN is last
    if not len(scores) or np.isnan(scores[-1]):
        raise ValueError("no scores" if not len(scores) else "a score is NaN")
    return scores
