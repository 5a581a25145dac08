"""Tests of the metrics: closed forms, counts by hand, properties."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkid.evaluation.metrics import (
    confused_pairs,
    expected_accuracy,
    quantile_edges,
    reliability,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("right", "total"), [(0, 1), (1, 1), (3, 4), (50, 100), (7999, 8000)]
)
def test_wilson_interval_is_the_closed_form(right, total):
    z = 1.959963984540054
    p = right / total
    scale = 1 + z * z / total
    middle = (p + z * z / (2 * total)) / scale
    half = math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2) * z / scale
    expected = max(0, middle - half), min(1, middle + half)
    assert wilson_interval(right, total) == pytest.approx(expected, abs=1e-12)


@given(
    st.lists(st.integers(91, 7193), min_size=1, max_size=60),
    st.integers(1, 8),
)
def test_every_length_is_in_one_bin_and_no_bin_is_empty(lengths, n_bins):
    lengths = np.array(lengths)
    edges = quantile_edges(lengths, n_bins)
    assert edges[0] == lengths.min() and edges[-1] == lengths.max() + 1
    counts = [
        np.sum((low <= lengths) & (lengths < high))
        for low, high in pairwise(edges)
    ]
    assert min(counts) >= 1
    assert sum(counts) == len(lengths)
    assert len(counts) <= n_bins


def test_bins_of_lengths_are_equally_full():
    lengths = np.random.default_rng(0).permutation(np.arange(100, 700))
    counts = np.histogram(lengths, quantile_edges(lengths, 6))[0]
    assert counts.tolist() == [100] * 6


def test_calibration_error_is_the_closed_form():
    """With all in one bin, it is |mean confidence - accuracy|."""
    bins = reliability(np.full(10, 0.9), np.arange(10) < 6)
    assert bins.error == pytest.approx(0.3)
    assert (
        bins.utterances.sum() == bins.utterances[13] == 10
    )  # 13/15 < 0.9 <= 14/15
    assert bins.accuracy[13] == pytest.approx(0.6)
    assert bins.confidence[13] == pytest.approx(0.9)
    assert np.isnan(bins.accuracy[0])


def test_calibration_error_weighs_the_bins():
    """Over-confident in one bin and under-confident in another add up."""
    confidence = np.array([0.95] * 3 + [0.25])
    right = np.array([1, 1, 0, 1])
    bins = reliability(confidence, right, n_bins=2)
    expected = 3 / 4 * abs(0.95 - 2 / 3) + 1 / 4 * abs(0.25 - 1)
    assert bins.error == pytest.approx(expected)
    assert bins.utterances.tolist() == [1, 3]


def test_calibrated_guesses_have_a_small_error():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(size=200_000)
    right = generator.uniform(size=200_000) < confidence
    assert reliability(confidence, right).error < 0.01
    assert reliability(confidence, right[::-1]).error == pytest.approx(
        0.25, abs=0.01
    )  # the mean of |confidence - 1/2|


def test_confidences_at_the_ends_have_a_bin():
    bins = reliability(np.array([0.0, 1.0, 1 + 1e-7]), np.array([0, 1, 1]))
    assert bins.utterances[0] == 1 and bins.utterances[-1] == 2


def test_confused_pairs_are_counted():
    target = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    guess = np.array([0, 1, 1, 2, 0, 1, 2, 0, 0])
    assert confused_pairs(target, guess) == [
        (2, 0, 2, 2 / 3),
        (0, 1, 2, 1 / 2),
        (1, 0, 1, 1 / 2),
        (0, 2, 1, 1 / 4),
    ]
    assert len(confused_pairs(target, guess, limit=3)) == 3
    assert confused_pairs(target, target) == []


def test_estimated_accuracy_by_hand():
    """Speaker 0: right half of the time, 0.7 sure; speaker 1: right, 0.9 sure.
    So 0.75 are right, 0.8 are claimed, and 0.65 are claimed of the new."""
    estimate = expected_accuracy(
        np.array([0.8, 0.6, 0.9]),
        np.array([1, 0, 1]),
        np.array([4, 4, 7]),
        np.array([0.5, 0.8, 0.6, 0.7]),
        np.array([4, 7, 4, 7]),
    )
    assert estimate.accuracy == pytest.approx(0.75 - (0.8 - 0.65))
    assert (estimate.low, estimate.high) == (0, 1)  # of two speakers


def test_the_interval_is_student_s():
    """One new speaker more, of the same mean: the prediction interval."""
    surplus = np.array([-0.2, -0.1, 0.0, 0.1, -0.3, -0.1])
    right, speaker = np.ones(600), np.arange(600) % 6
    claimed = right - surplus[speaker]
    new = np.tile([0.5, 0.7], 300)
    estimate = expected_accuracy(claimed, right, speaker, new, np.full(600, 3))
    half = 2.570581835636314 * surplus.std(ddof=1) * math.sqrt(1 / 6 + 1)
    assert estimate.accuracy == pytest.approx(0.5)
    assert estimate.low == pytest.approx(0.5 - half)
    assert estimate.high == pytest.approx(0.5 + half)
    # 4, 1 and 1 utterances say as much as 36 / 18 speakers of equally many.
    guess = np.repeat([0, 1, 2], [400, 100, 100])
    estimate = expected_accuracy(claimed, right, speaker, new, guess)
    half *= math.sqrt(1 / 6 + 1 / 2) / math.sqrt(1 / 6 + 1)
    assert estimate.high == pytest.approx(0.5 + half)


def test_interval_has_a_width_without_errors():
    """All are right, and all claims alike: what is left is a binomial, of two
    more right ones and two more wrong ones."""
    right, speaker = np.ones(40), np.arange(40) % 10
    sure = np.full(40, 0.9)
    for change, share in (-0.05, 40 / 44), (0.0, 42 / 44), (0.05, 42 / 44):
        estimate = expected_accuracy(
            sure, right, speaker, sure[:20] + change, speaker[:20]
        )
        variance = share * (1 - share) * (1 / 40 + 1 / 20)
        half = 2.2621571628540993 * math.sqrt(variance)
        assert estimate.accuracy == pytest.approx(min(1, 1 + change))
        assert estimate.low == pytest.approx(1 + change - half)
        assert estimate.high == 1


def test_a_calibrated_models_accuracy_lies_in_the_interval():
    """In 19 of 20 cases, also where mistakes are rare."""
    generator = np.random.default_rng(0)
    for accuracy, speakers, each, tested in (
        (0.97, 10, 4, 200),
        (0.9, 30, 10, 400),
    ):
        speaker = np.repeat(np.arange(speakers), each)
        said = np.full(len(speaker), accuracy)
        held = 0
        for _ in range(400):
            right = generator.random(len(speaker)) < accuracy
            truth = (generator.random(tested) < accuracy).mean()
            estimate = expected_accuracy(
                said,
                right,
                speaker,
                np.full(tested, accuracy),
                generator.integers(speakers, size=tested),
            )
            held += estimate.low <= truth <= estimate.high
        assert held >= 0.95 * 400


guesses = st.lists(
    st.tuples(st.floats(0, 1), st.booleans(), st.integers(0, 5)),
    min_size=1,
    max_size=30,
)


@given(guesses, st.randoms())
def test_estimate_for_the_validated_utterances_is_their_accuracy(
    guesses, random
):
    """By speaker, in any order, however often an utterance is there."""
    confidence, right, speaker = (
        np.array(c) for c in zip(*guesses, strict=True)
    )
    count = np.bincount(speaker)[speaker]
    rows = np.repeat(
        np.arange(len(speaker)), math.lcm(*count.tolist()) // count
    )
    accuracies = [right[speaker == s].mean() for s in np.unique(speaker)]
    drawn = random.sample(range(len(speaker)), len(speaker))
    estimate = expected_accuracy(
        confidence[drawn],
        right[drawn],
        speaker[drawn],
        confidence[rows],  # so that each speaker has as many
        speaker[rows],
    )
    assert estimate.accuracy == pytest.approx(np.mean(accuracies), abs=1e-9)
    assert 0 <= estimate.low <= estimate.accuracy <= estimate.high <= 1


def test_one_speaker_gives_no_interval_and_nan_counts_as_unsure():
    one = expected_accuracy([0.4, 0.6], [0, 1], [3, 3], [0.5], [3])
    assert one == (0.5, 0, 1)
    sure, lost = [0.8, 0.9], [math.nan, math.nan]
    estimate = expected_accuracy(sure, [1, 1], [0, 1], lost, [0, 1])
    assert estimate.accuracy == pytest.approx(0.15)


def test_estimate_is_right_for_calibrated_guesses():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(size=100_000)
    speaker = np.arange(100_000) % 500
    right = generator.uniform(size=100_000) < confidence
    for new in (confidence**2, confidence**0.5):
        estimate = expected_accuracy(confidence, right, speaker, new, speaker)
        assert estimate.accuracy == pytest.approx(new.mean(), abs=0.01)


@pytest.mark.parametrize("others", [True, False])
def test_the_interval_holds_the_truth_as_often_as_it_says(others):
    """For other speakers; for the same ones, it is too wide."""
    generator = np.random.default_rng(0)
    inside, speaker = [], np.repeat(np.arange(30), 20)
    for _ in range(500):
        skill = generator.normal(generator.uniform(0.5, 0.8), 0.07, (2, 30))
        claim = generator.normal(0.7, 0.07, (2, 30))
        then = int(others)
        right = generator.uniform(size=600) < skill[0][speaker]
        # Less sure by 0.2, and less often right by as much.
        truth = generator.uniform(size=600) < skill[then][speaker] - 0.2
        estimate = expected_accuracy(
            claim[0][speaker],
            right,
            speaker,
            claim[then][speaker] - 0.2,
            speaker,
        )
        inside.append(estimate.low <= truth.mean() <= estimate.high)
    if others:
        assert 0.93 <= np.mean(inside) <= 0.97
    else:
        assert np.mean(inside) > 0.98
