"""Tests of trials: SpeechBrain's figures, oracles of plain loops."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.utils.metric_stats import EER, minDCF

from spkid.evaluation import (
    all_trials,
    as_norm,
    det_curve,
    detection_and_identification_rate,
    equal_error_rate,
    min_dcf,
    unit_vectors,
)


def trial_scores(levels):
    """Few levels: many ties, within a kind and between the two."""
    score = st.integers(0, levels).map(lambda level: level / levels)
    return st.lists(score, min_size=1, max_size=24).map(np.array)


SETS = st.sampled_from([1, 2, 5, 12, 10**6]).flatmap(
    lambda levels: st.tuples(trial_scores(levels), trial_scores(levels))
)


def rates(positive, negative, threshold):
    """Miss and false alarm rate, counted."""
    return (
        sum(score <= threshold for score in positive) / len(positive),
        sum(score > threshold for score in negative) / len(negative),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=150)
@given(SETS)
def test_equal_error_rate_is_speechbrains(dtype, scores):
    positive, negative = (one.astype(dtype) for one in scores)
    theirs, at = EER(torch.tensor(positive), torch.tensor(negative))
    ours, threshold = equal_error_rate(positive, negative)
    assert ours == theirs  # to the last bit
    # Theirs may lie between two scores; it accepts the same trials.
    assert rates(positive, negative, threshold) == rates(positive, negative, at)


def test_equal_error_rate_rounds_as_speechbrain_does():
    """Two scores are equally near; rounding alone takes the second."""
    positive = np.repeat([0.0, 1.0, 2.0], [4, 10, 10])
    negative = np.repeat([0.0, 1.0, 2.0], [11, 8, 5])
    ours = equal_error_rate(positive, negative)
    assert ours == EER(torch.tensor(positive), torch.tensor(negative))
    exact = [rates(positive, negative, at) for at in (0.0, 1.0)]
    assert exact[0][1] - exact[0][0] == pytest.approx(9 / 24)
    assert exact[1][0] - exact[1][1] == pytest.approx(9 / 24)
    assert ours[1] == 1.0


@settings(max_examples=150)
@given(
    SETS,
    st.sampled_from([0.01, 0.5, 0.99]),
    st.sampled_from([(1.0, 1.0), (10.0, 1.0), (1.0, 5.0)]),
)
def test_min_dcf_is_speechbrains(scores, p_target, costs):
    positive, negative = map(torch.tensor, scores)
    theirs, _ = minDCF(positive, negative, *costs, p_target)
    ours, threshold = min_dcf(*scores, p_target, *costs)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-12)  # float32
    miss, false_alarm = rates(*scores, threshold)
    cost = costs[0] * p_target * miss + costs[1] * (1 - p_target) * false_alarm
    assert ours == pytest.approx(cost, rel=1e-12)


@given(SETS)
def test_det_curve_counts_at_each_score(scores):
    positive, negative = scores
    curve = det_curve(positive, negative)
    expected = sorted({-math.inf, *positive.tolist(), *negative.tolist()})
    assert curve.threshold.tolist() == expected
    counted = [rates(positive, negative, at) for at in expected]
    assert list(zip(curve.miss, curve.false_alarm, strict=True)) == counted


def test_thinned_curve_keeps_every_step_that_a_picture_shows():
    generator = np.random.default_rng(0)
    curve = det_curve(generator.normal(2, 1, 5000), generator.normal(size=9000))
    thin = curve.thinned()
    assert len(thin.miss) <= 402
    at = np.searchsorted(curve.threshold, thin.threshold)
    for kept, all_points in zip(thin, curve, strict=True):
        assert (kept == all_points[at]).all()
    assert (thin.miss[0], thin.false_alarm[0]) == (0, 1)
    assert (thin.miss[-1], thin.false_alarm[-1]) == (1, 0)
    # What is left out lies within a step, on the scale of the grid.
    step = 32 / 99
    gaps = np.diff(at) > 1
    for values in (thin.miss, thin.false_alarm):
        low, high = np.sort([values[1:][gaps], values[:-1][gaps]], axis=0)
        inner = (low > 0) & (high < 1)
        logit = [np.log(x[inner] / (1 - x[inner])) for x in (low, high)]
        assert (logit[1] - logit[0] <= step).all()


def test_as_norm_is_the_formula_in_loops():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(4, 3))
    rows, columns = generator.normal(size=(4, 9)), generator.normal(size=(3, 9))
    for top in (2, 5, 9, 300):
        normed = as_norm(scores, rows, columns, top)
        for i in range(4):
            for j in range(3):
                value = 0
                for cohort in (rows[i], columns[j]):
                    best = sorted(cohort.tolist(), reverse=True)[:top]
                    middle = statistics.fmean(best)
                    spread = statistics.pstdev(best)
                    value += (scores[i, j] - middle) / spread / 2
                assert normed[i, j] == pytest.approx(value, abs=1e-12)


def test_as_norm_is_symmetric_and_refuses_a_cohort_of_one():
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(2, 5))
    rows, columns = generator.normal(size=(2, 9)), generator.normal(size=(5, 9))
    turned = as_norm(scores.T, columns, rows, 4).T
    assert as_norm(scores, rows, columns, 4) == pytest.approx(turned)
    for cohort in (rows[:, :1], np.ones((2, 3))):
        with pytest.raises(ValueError, match="two scores that differ"):
            as_norm(scores, cohort, columns)


def open_set_in_loops(known, targets, strangers, wanted):
    """All thresholds are tried, the lowest that keeps the promise is taken."""
    best = [max(row) for row in strangers]
    for threshold in sorted({-math.inf, *best}):
        accepted = sum(score > threshold for score in best)
        if accepted <= round(wanted * len(best), 9):
            break
    right = 0
    for row, target in zip(known, targets, strict=True):
        others = [score for i, score in enumerate(row) if i != target]
        alone = all(score < row[target] for score in others)
        right += alone and row[target] > threshold
    return threshold, accepted / len(best), right / len(known)


@settings(max_examples=200)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([3, 20, 10**6]),
)
def test_open_set_is_the_loop(seed, n, m, speakers, levels):
    generator = np.random.default_rng(seed)
    known = generator.integers(0, levels, (n, speakers)) / levels
    strangers = generator.integers(0, levels, (m, speakers)) / levels
    targets = generator.integers(0, speakers, n)
    wanted = np.array([0, 0.01, 0.05, 0.29, 0.5, 1, *np.arange(m + 1) / m])
    found = detection_and_identification_rate(known, targets, strangers, wanted)
    for i, one in enumerate(wanted.tolist()):
        expected = open_set_in_loops(
            known.tolist(), targets.tolist(), strangers.tolist(), one
        )
        assert tuple(values[i] for values in found) == expected
    assert (found.fpir <= wanted + 1e-12).all()


def test_29_percent_of_100_strangers_are_29():
    """0.29 * 100 is 28.999999999999996."""
    scores = np.arange(100.0)[:, None]
    found = detection_and_identification_rate(
        scores, np.zeros(100, int), scores, 0.29
    )
    assert (found.fpir, found.rate, found.threshold) == (0.29, 0.29, 70.0)


def test_who_is_not_enrolled_is_never_accepted():
    nobody = np.full((3, 2), -np.inf)
    known = np.array([[0.1, 0.9]])
    found = detection_and_identification_rate(known, np.array([1]), nobody, 1.0)
    assert (found.fpir, found.rate) == (0, 1)


def test_trials_that_say_nothing_are_refused():
    some, nan = np.zeros(3), np.array([0, np.nan, 1])
    for metric in (det_curve, equal_error_rate, min_dcf):
        for pair in ((some[:0], some), (some, some[:0])):
            with pytest.raises(ValueError, match="no scores"):
                metric(*pair)
        for pair in ((nan, some), (some, nan)):
            with pytest.raises(ValueError, match="a score is NaN"):
                metric(*pair)
    table, target = np.zeros((3, 2)), np.zeros(3, int)
    for rate in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="within 0 and 1"):
            detection_and_identification_rate(table, target, table, rate)
    for known, strangers, match in (
        (table, table[:0], "no scores"),
        (table[:0], table, "no scores"),
        (table * np.nan, table, "a score is NaN"),
        (table, table * np.nan, "a score is NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            detection_and_identification_rate(
                known, target[: len(known)], strangers, 0.1
            )


def pairs_in_loops(embeddings, speakers, sessions):
    found = [], []
    for i in range(len(speakers)):
        for j in range(i + 1, len(speakers)):
            a, b = embeddings[i], embeddings[j]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            if speakers[i] != speakers[j]:
                found[1].append(cosine)
            elif sessions is None or sessions[i] != sessions[j]:
                found[0].append(cosine)
    return found


@pytest.mark.parametrize("block", [2**22, 150])
@pytest.mark.parametrize("given_sessions", [False, True])
def test_all_trials_are_the_loop(monkeypatch, block, given_sessions):
    """Also where the pairs come in many blocks."""
    monkeypatch.setattr("spkid.evaluation.trials.BLOCK", block)
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(50, 8))
    speakers = generator.choice(["ann", "bob", "eve"], 50)
    sessions = generator.choice(["x", "y"], 50) if given_sessions else None
    expected = pairs_in_loops(embeddings, speakers, sessions)
    for ours, theirs in zip(
        all_trials(embeddings, speakers, sessions), expected, strict=True
    ):
        assert np.sort(ours) == pytest.approx(np.sort(theirs), abs=1e-6)


@pytest.mark.parametrize("block", [2**22, 999])
@pytest.mark.parametrize("limit", [1, 7, 100, 999])
def test_a_limit_keeps_pairs_of_all_and_the_same_in_any_block(
    monkeypatch, block, limit
):
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(90, 8))
    speakers = np.arange(90) % 5
    everything = all_trials(embeddings, speakers)
    monkeypatch.setattr("spkid.evaluation.trials.BLOCK", block)
    for some, all_pairs in zip(
        all_trials(embeddings, speakers, limit=limit), everything, strict=True
    ):
        step = -(-len(all_pairs) // limit)
        assert some == pytest.approx(all_pairs[::step], abs=1e-6)
        assert limit / 2 < len(some) <= limit


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_utterances_have_no_pairs(n):
    positive, negative = all_trials(np.ones((n, 4)), np.zeros(n))
    assert len(positive) == len(negative) == 0


def test_unit_vectors_have_length_1_or_0():
    vectors = np.array([[3, 4], [0, 0], [np.inf, 1], [np.nan, 0], [6e4, 0]])
    vectors = vectors.astype(np.float16)
    before = vectors.copy()
    lengths = np.linalg.norm(unit_vectors(vectors), axis=1)
    assert lengths == pytest.approx([1, 0, 0, 0, 1])
    assert np.array_equal(vectors, before, equal_nan=True)
    single = np.full((1, 2), np.nan, np.float32)
    assert not unit_vectors(single).any()
    assert np.isnan(single).all()
