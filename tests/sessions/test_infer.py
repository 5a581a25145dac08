import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score

from spkid.data.pack import PackedFeatures
from spkid.sessions import infer as module
from spkid.sessions.fingerprints import fingerprint, pack_fingerprints
from spkid.sessions.hold_out import (
    fold_numbers,
    hold_out,
    hold_out_known,
)
from spkid.sessions.infer import Sessions, infer_sessions, known_sessions


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


def test_a_single_utterance_each_is_a_session_each():
    found = infer_sessions(np.ones((3, 8)), ["a", "b", "c"])
    assert found.label.tolist() == [0, 0, 0]
    assert not hold_out(found, 0.5, seed=0).any()


@pytest.mark.parametrize("sizes", [[2], [2, 1], [3], [1, 1], [2, 2], [3] * 3])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_tiny_sets_are_no_error(sizes, noise):
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


def test_neither_copies_nor_weak_sorting_are_an_order_of_recording(
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


@st.composite
def labelled(draw):
    """Any sessions of any speakers, in order or not."""
    sizes = draw(
        st.lists(
            st.lists(st.integers(1, 9), min_size=1, max_size=6),
            min_size=1,
            max_size=5,
        )
    )
    speaker = [s for s, own in enumerate(sizes) for _ in range(sum(own))]
    label = [i for own in sizes for i, n in enumerate(own) for _ in range(n)]
    found = Sessions(np.array(label), np.array(speaker))
    if draw(st.booleans()):
        found.ordered = True
    return found


def check_size(sizes, own, ordered, wanted):
    """As near to the share as may be."""
    if not ordered:
        nearer = abs(own.sum() - wanted) < wanted
        assert nearer or 2 * own.sum() <= len(own)
        return
    ends = sizes.cumsum()[:-1]
    last = 3 * sizes[-1] <= 2 * len(own)
    assert own[-1] == last
    reachable = len(own) - ends if last else ends
    assert abs(own.sum() - wanted) == min(abs(reachable - wanted))


@settings(max_examples=200, deadline=None)
@given(labelled(), st.floats(0.01, 0.9), st.integers(0, 99))
def test_whole_sessions_are_held_out(found, share, seed):
    held = hold_out(found, share, seed)
    np.testing.assert_array_equal(held, hold_out(found, share, seed))
    for rows in found.rows():
        sizes = np.bincount(found.label[rows])
        own = held[rows]
        assert own.any() == (len(sizes) > 1)
        assert not own.all()
        for session in range(len(sizes)):
            assert len(set(own[found.label[rows] == session])) == 1
        if own.any():
            check_size(sizes, own, found.ordered, share * len(rows))
    known = hold_out_known(found, held, 0.3, seed)
    assert not (known & held).any()
    pairs = list(zip(found.speaker, found.label, strict=True))
    trained = {
        p for p, k, h in zip(pairs, known, held, strict=True) if not k | h
    }
    assert {p for p, k in zip(pairs, known, strict=True) if k} <= trained


@settings(max_examples=100, deadline=None)
@given(labelled(), st.integers(2, 5), st.integers(0, 99))
def test_folds_divide_sessions(found, folds, seed):
    fold = fold_numbers(found, folds, seed)
    for rows in found.rows():
        sizes = np.bincount(found.label[rows])
        assert (fold[rows] == -1).all() == (len(sizes) == 1)
        for session in range(len(sizes)):
            assert len(set(fold[rows][found.label[rows] == session])) == 1
        if len(sizes) >= folds:
            assert set(fold[rows]) == set(range(folds))


def test_folds_are_of_equal_size():
    """Also of speakers who have fewer sessions than there are folds."""
    speaker = np.repeat(np.arange(60), 4)
    found = Sessions(np.tile([0, 0, 1, 1], 60), speaker)
    sizes = np.bincount(fold_numbers(found, 5, seed=0))
    assert sizes.tolist() == [48] * 5


def in_order(*sizes):
    label = np.repeat(range(len(sizes)), sizes)
    return Sessions(label, np.zeros_like(label), ordered=True)


def test_the_last_sessions_are_held_out():
    found = in_order(2, 5, 1, 1, 1)
    for share, first in ((0.05, 9), (0.1, 9), (0.2, 8), (0.35, 7), (0.6, 2)):
        held = hold_out(found, share, 0)
        assert np.flatnonzero(held).tolist() == list(range(first, 10))


@pytest.mark.parametrize(
    ("sizes", "held"), [((2, 98), 2), ((1, 9, 3, 87), 10), ((5, 40, 55), 55)]
)
def test_a_speaker_is_not_held_out_nearly_whole(sizes, held):
    assert hold_out(in_order(*sizes), 0.1, seed=0).sum() == held


@pytest.mark.parametrize("sizes", [[12] * 8, [20] * 5, [8, 12, 30, 20, 30]])
def test_which_session_is_held_out_is_drawn(sizes):
    found = known_sessions(
        np.repeat(range(len(sizes)), sizes), [0] * sum(sizes)
    )
    drawn = set()
    for seed in range(60):
        held = found.label[hold_out(found, 0.1, seed)]
        assert len(set(held)) == 1
        drawn.add(held[0])
    fit = [n for n in sizes if abs(n - sum(sizes) / 10) < sum(sizes) / 10]
    assert len(drawn) == len(fit or sizes)


def test_a_fingerprint_by_hand():
    frames = np.zeros((20, 2))
    frames[7:9] = -3.0
    frames[:, 1] += np.arange(20)
    found = fingerprint(frames, frames.mean(axis=0), frames.std(axis=0))
    # The quietest two of twenty frames are 0 and 1, whose sum is least.
    np.testing.assert_allclose(found[4:6], [0.0, 0.5])
    np.testing.assert_allclose(found[6], 6 / 19)
    np.testing.assert_allclose(fingerprint(frames[:1], *frames[:2])[6:], 0)


def test_fingerprints_are_kept_beside_the_pack(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for name in ("a.pt", "b.pt"):
        mel = torch.from_numpy(generator.normal(size=(30, 4)))
        torch.save(mel.float(), tmp_path / name)
    pack = PackedFeatures.build(
        tmp_path / "pack", tmp_path, ["a.pt", "b.pt"], [30, 30], 4, "float32"
    )
    found = pack_fingerprints(pack, ["b.pt"], progress=False)
    frames = torch.load(tmp_path / "b.pt").numpy()
    expected = fingerprint(frames, frames.mean(axis=0), frames.std(axis=0))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    cache = tmp_path / "pack" / "fingerprints.npy"
    cache.write_bytes(cache.read_bytes()[:99])  # damaged: made again
    pack_fingerprints(pack, ["a.pt"], progress=False)
    monkeypatch.setattr(module, "fingerprint", None)
    again = pack_fingerprints(pack, ["a.pt", "b.pt"], progress=False)
    np.testing.assert_array_equal(again[1:], found)


def test_known_utterances_come_of_small_speakers_too():
    found = known_sessions([0] * 80, np.repeat(range(10), 8))
    known = hold_out_known(found, np.zeros(80, bool), 0.05, seed=0)
    assert known.sum() == 4


def test_written_sessions_are_numbered_within_speakers():
    found = known_sessions(["m", "k", "m"], ["y", "y", "x"])
    assert found.label.tolist() == [1, 0, 0]
    assert found.speaker.tolist() == [1, 1, 0]
    assert json.dumps(found.label.tolist())
