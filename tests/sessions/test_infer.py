"""Sessions are found where there are some, and only there."""

import itertools
import json

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score

from spkid.sessions import hold_out, infer_sessions, known_sessions
from spkid.sessions import infer as module


def make_prints(speakers=40, sizes=(5, 4, 6, 3), noise=0.35, seed=0, p=20):
    """Fingerprints that are what the model assumes, and their sessions."""
    generator = np.random.default_rng(seed)
    prints, who, truth = [], [], []
    for speaker in range(speakers):
        voice = generator.normal(0, 3, p)
        for session, size in enumerate(sizes):
            channel = generator.normal(0, 1, p)
            residue = generator.normal(0, noise, (size, p))
            prints.append(voice + channel + residue)
            who += [f"s{speaker:02d}"] * size
            truth += [session] * size
    return np.concatenate(prints), np.array(who), np.array(truth)


def agreement(found, truth):
    return np.mean(
        [adjusted_rand_score(truth[r], found.label[r]) for r in found.rows()]
    )


def test_the_evidence_is_the_ratio_of_two_gaussian_likelihoods():
    generator = np.random.default_rng(1)
    points, spread = generator.normal(size=(5, 3)), np.array([4.0, 0.5, 0.1])
    expected = 0.0
    for dimension in range(3):
        column = points[:, dimension]
        together = np.eye(5) + spread[dimension]
        expected += multivariate_normal(cov=together).logpdf(column)
        expected -= multivariate_normal(cov=np.eye(5)).logpdf(column)
    found = module._evidence(np.array(5), points.sum(axis=0), spread)
    assert abs(found - expected) < 1e-9


def test_the_segmentation_is_the_best_of_all():
    generator = np.random.default_rng(2)
    for _ in range(20):
        points = generator.normal(size=(7, 2)) * 2
        spread, change = np.array([3.0, 1.0]), 0.3
        prior = np.log(change / (1 - change))

        def value(cuts, points=points, spread=spread, prior=prior):
            edges = [0, *cuts, 7]
            return prior * len(cuts) + sum(
                module._evidence(b - a, points[a:b].sum(axis=0), spread)
                for a, b in itertools.pairwise(edges)
            )

        every = [
            cuts
            for count in range(7)
            for cuts in itertools.combinations(range(1, 7), count)
        ]
        best = max(every, key=value)
        label = module._segment(points, spread, change)
        assert tuple(np.flatnonzero(np.diff(label)) + 1) == best
        assert label.tolist() == sorted(label) and label[0] == 0


@pytest.mark.parametrize("shuffled", [False, True])
def test_sessions_are_found(shuffled):
    prints, who, truth = make_prints()
    if shuffled:
        order = np.random.default_rng(0).permutation(len(who))
        prints, who, truth = prints[order], who[order], truth[order]
    found = infer_sessions(prints, who)
    assert found.ordered != shuffled
    assert agreement(found, truth) > 0.95
    assert (found.order > 0.95) == shuffled


def test_the_speakers_order_and_names_change_nothing():
    prints, who, _ = make_prints(speakers=12)
    found = infer_sessions(prints, who)
    again = np.concatenate([r for r in found.rows()][::-1])
    other = infer_sessions(prints[again], np.char.add("x", who[again]))
    np.testing.assert_array_equal(found.label[again], other.label)
    prefixed = infer_sessions(prints, np.char.add("x", who))
    np.testing.assert_array_equal(found.label, prefixed.label)


def test_few_and_many_utterances_of_a_speaker():
    prints, who, _ = make_prints(speakers=10)
    generator = np.random.default_rng(3)
    long = np.repeat(generator.normal(size=(100, 20)), 10, axis=0)
    long += generator.normal(0, 0.35, long.shape)
    prints = np.concatenate((prints, long, np.zeros((1, 20))))
    who = np.concatenate((who, ["long"] * 1000, ["single"]))
    for order in (np.arange(len(who)), generator.permutation(len(who))):
        found = infer_sessions(prints[order], who[order])
        rows = order[who[order] == "long"]
        label = found.label[who[order] == "long"]
        score = adjusted_rand_score((rows - rows.min()) // 10, label)
        assert score > (0.95 if found.ordered else 0.6)
        held = hold_out(found, 0.1, seed=0)
        assert not held[who[order] == "single"].any()
        assert 10 <= held[who[order] == "long"].sum() <= 200


def test_a_speaker_s_single_utterance_is_one_session():
    found = infer_sessions(np.ones((3, 8)), ["a", "b", "c"])
    assert found.label.tolist() == [0, 0, 0]
    assert not hold_out(found, 0.5, seed=0).any()


@pytest.mark.parametrize("sizes", [[2], [2, 1], [3], [1, 1], [2, 2], [3] * 3])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_tiny_sets_raise_no_error(sizes, noise):
    for seed in range(5):
        generator = np.random.default_rng(seed)
        who = np.repeat(range(len(sizes)), sizes)
        prints = noise * generator.normal(size=(len(who), 8)) + who[:, None]
        found = infer_sessions(prints, who)
        assert found.label.shape == who.shape
        copies = np.repeat(prints, 2, axis=0)  # no residue at all
        found = infer_sessions(copies, np.repeat(who, 2))
        assert (found.label >= 0).all()


def test_equal_fingerprints_are_one_session():
    found = infer_sessions(np.ones((20, 8)), list("ab") * 10)
    assert found.label.tolist() == [0] * 20


def test_copies_and_weak_sorting_are_not_taken_for_order_of_recording(
    monkeypatch,
):
    prints, who, truth = make_prints(speakers=60)
    generator = np.random.default_rng(0)
    mixed = generator.permutation(len(who))
    copied = np.repeat(mixed, 1 + (generator.random(len(who)) < 0.01))
    assert len(copied) > len(mixed)
    found = infer_sessions(prints[copied], who[copied])
    assert not found.ordered
    assert agreement(found, truth[copied]) > 0.95
    generator = np.random.default_rng(0)
    # A list sorted by what has a small effect: loudness, say.
    loudness = generator.normal(size=len(who))
    shift = 0.3 * np.outer(loudness, generator.normal(size=20))
    by_it = np.argsort(loudness)
    found = infer_sessions((prints + shift)[by_it], who[by_it])
    assert not found.ordered
    assert agreement(found, truth[by_it]) > 0.95
    # It is no chance; only that it is small speaks against it.
    monkeypatch.setattr(module, "MOST_ORDER", 1.0)
    assert infer_sessions((prints + shift)[by_it], who[by_it]).ordered


def test_written_sessions_are_numbered_within_speakers():
    found = known_sessions(["m", "k", "m"], ["y", "y", "x"])
    assert found.label.tolist() == [1, 0, 0]
    assert found.speaker.tolist() == [1, 1, 0]
    assert json.dumps(found.label.tolist())


def test_a_long_name_costs_its_own_length_alone():
    """An array of texts would take 4 TB."""
    names = ["x" * 10**6] + [str(n % 3) for n in range(10**6 - 1)]
    found = known_sessions(names, [0] * len(names))
    assert np.bincount(found.label)[-1] == 1 and found.label[0] == 3
