"""Whole sessions are held out, as near to the share as possible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spkid.sessions import (
    Sessions,
    fold_numbers,
    hold_out,
    hold_out_known,
    known_sessions,
)
from spkid.sessions.hold_out import hold_out_random


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


def test_known_utterances_come_of_small_speakers_too():
    found = known_sessions([0] * 80, np.repeat(range(10), 8))
    known = hold_out_known(found, np.zeros(80, bool), 0.05, seed=0)
    assert known.sum() == 4


def test_random_hold_out_leaves_each_speaker_some():
    speaker = np.repeat(np.arange(4), [1, 2, 8, 100])
    held = hold_out_random(speaker, 0.25, seed=0)
    assert np.bincount(speaker[held], minlength=4).tolist() == [0, 1, 2, 25]
    np.testing.assert_array_equal(held, hold_out_random(speaker, 0.25, 0))
    assert (held != hold_out_random(speaker, 0.25, seed=1)).any()
