"""Tests of the measures: closed forms, counts by hand, properties."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkid.measures import (
    confused_pairs,
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
