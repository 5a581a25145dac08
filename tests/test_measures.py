"""Tests of the measures: closed forms, counts by hand, properties."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkid.measures import (
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
    assert bins.count.sum() == bins.count[13] == 10  # 13/15 < 0.9 <= 14/15
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
    assert bins.count.tolist() == [1, 3]


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
    assert bins.count[0] == 1 and bins.count[-1] == 2


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


def expect(confidence, right, new_confidence, speaker=None, n_draws=1):
    confidence = np.asarray(confidence)
    own = np.arange(len(confidence)) if speaker is None else speaker
    new = np.asarray(new_confidence)
    return expected_accuracy(
        confidence, right, own, new, np.arange(len(new)), n_draws
    )


confidences = st.lists(st.floats(0, 1), min_size=1, max_size=30, unique=True)


@given(confidences, confidences, st.randoms())
def test_as_many_are_expected_right_as_are_surer(old, new, random):
    """By its definition: between which two confidences is the threshold?"""
    right = [random.random() < 0.6 for _ in old]
    surest = [*sorted(old, reverse=True), -math.inf]
    above = [math.inf, *surest]
    least_right, most_wrong = above[sum(right)], surest[sum(right)]
    found = expect(old, right, new).accuracy * len(new)
    lowest = sum(value >= least_right for value in new)
    highest = sum(value > most_wrong for value in new)
    assert lowest - 1e-9 <= found <= highest + 1e-9
    assert expect(old, right, old).accuracy == pytest.approx(np.mean(right))


@given(confidences, st.randoms(), st.integers(2, 5))
def test_each_validated_speaker_weighs_the_same(old, random, times):
    right = [random.random() < 0.6 for _ in old]
    rows = [0] * (times - 1) + list(range(len(old)))  # the first one's, often
    new = np.linspace(0, 1, 50)
    often = expect(np.array(old)[rows], np.array(right)[rows], new, rows)
    # Of equal confidences, all are on one side of the threshold.
    assert often.accuracy == pytest.approx(expect(old, right, new).accuracy)


def test_unsure_guesses_of_new_recordings_lower_the_expectation():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(size=500)
    right = confidence > 0.3  # so confidence tells all
    new = confidence**2
    expected = expect(confidence, right, new)
    assert expected.accuracy == pytest.approx(np.mean(new > 0.3), abs=0.01)
    assert expected.accuracy < right.mean() - 0.1
    surer = np.mean(new >= confidence.min())  # of what else is nothing known
    assert expect(confidence, right | True, new).accuracy == surer < 1
    assert expect(confidence, right & False, new).accuracy == 0
    assert expect([0.5, 0.6], [1, 1], [0.5, np.nan]).accuracy == 0.5


def simulated(generator, n_speakers, n=20):
    """Speakers of different difficulty; right guesses are surer ones."""
    speaker = np.repeat(np.arange(n_speakers), n)
    easy = generator.beta(1.5, 0.5, n_speakers)[speaker]
    right = generator.uniform(size=len(speaker)) < easy
    guess = np.where(right, speaker, (speaker + 1) % n_speakers)
    return right + generator.normal(0, 0.7, len(speaker)), right, speaker, guess


def test_the_interval_holds_the_truth_nearly_as_often_as_it_says():
    """As one over utterances, which are alike within a speaker, doesn't."""
    generator = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        confidence, right, speaker, _ = simulated(generator, 40)
        new_confidence, truth, _, guess = simulated(generator, 40)
        by_utterance = np.arange(len(speaker))
        for old, new in ((speaker, guess), (by_utterance, by_utterance)):
            told = expected_accuracy(
                confidence, right, old, new_confidence, new, 400
            )
            inside.append(told.low <= truth.mean() <= told.high)
    by_speaker, by_utterance = np.reshape(inside, (-1, 2)).mean(axis=0)
    assert 0.89 <= by_speaker <= 0.99  # 0.935 of 400 cases with 1,000 draws
    assert by_utterance < by_speaker - 0.1


def test_the_interval_narrows_with_more_speakers():
    generator = np.random.default_rng(0)

    def width(n_speakers):
        confidence, right, speaker, guess = simulated(generator, n_speakers)
        told = expected_accuracy(confidence, right, speaker, confidence, guess)
        assert told.low <= told.accuracy <= told.high
        return told.high - told.low

    assert width(400) < width(100) / 1.5 < width(25) / 1.5**2
    one = expect([0.1, 0.9], [0, 1], [0.5], speaker=[0, 0], n_draws=5)
    assert one.low == one.accuracy == one.high
