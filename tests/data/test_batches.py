"""Crops and batches are pure functions that leave nothing out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkid.data.batches import (
    LengthBatches,
    ShuffledBatches,
    balanced_order,
    crop_starts,
    hash_uniform,
    utterance_key,
)
from spkid.errors import UserError

KEYS = np.array([utterance_key(f"uttr-{i}.pt") for i in range(4000)])


def test_uniform_numbers_are_uniform_and_independent():
    first = hash_uniform(1, 1, KEYS)
    assert 0 <= first.min() < 0.01
    assert 0.99 < first.max() < 1
    assert np.abs(np.histogram(first, 10, (0, 1))[0] - 400).max() < 80
    for seed, epoch in ((1, 2), (2, 1), (2, 2)):
        other = hash_uniform(seed, epoch, KEYS)
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.06


def test_numbers_are_the_same_on_every_machine():
    assert utterance_key("uttr-0.pt") == 3398259630442466292
    value = hash_uniform(1986, 1, np.array([7]))[0]
    assert value == pytest.approx(0.24495115, abs=1e-5)


@given(
    length=st.integers(1, 500),
    segment=st.integers(1, 200),
    epoch=st.integers(0, 50),
)
def test_a_crop_lies_within_its_utterance(length, segment, epoch):
    start = crop_starts(0, epoch, KEYS[:9], np.full(9, length), segment)
    assert (start >= 0).all()
    assert (start + min(segment, length) <= length).all()


def test_each_place_of_a_crop_is_equally_likely():
    starts = crop_starts(0, 1, KEYS, np.full(4000, 137), 128)
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 400).max() < 80


def test_a_crop_does_not_depend_on_the_other_utterances():
    lengths = np.arange(200, 4200)
    together = crop_starts(3, 5, KEYS, lengths, 128)
    alone = [
        crop_starts(3, 5, KEYS[i : i + 1], lengths[i : i + 1], 128)[0]
        for i in range(0, 4000, 37)
    ]
    assert together[::37].tolist() == alone


@given(
    items=st.integers(1, 60),
    size=st.integers(2, 9),
    ranks=st.integers(1, 2),
    epoch=st.integers(0, 9),
)
def test_shuffled_batches_give_each_item_once(items, size, ranks, epoch):
    shards = []
    for rank in range(ranks):
        batches = ShuffledBatches(items, size, 0, rank, ranks)
        batches.set_epoch(epoch)
        shards.append(list(batches))
        assert len(shards[-1]) == len(batches)
    seen = [i for shard in shards for batch in shard for i in batch]
    assert set(seen) == set(range(items))
    assert len(seen) == max(items, 2)  # only a lone item is repeated
    for parts in zip(*shards, strict=True):
        assert sum(len(part) for part in parts) >= 2
        assert all(parts)


def test_the_order_follows_seed_and_epoch():
    def order(seed, epoch):
        batches = ShuffledBatches(100, 10, seed)
        batches.set_epoch(epoch)
        return [i for batch in batches for i in batch]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_ranks_share_the_global_batch():
    whole = ShuffledBatches(50, 10, 3)
    shards = [list(ShuffledBatches(50, 10, 3, r, 2)) for r in range(2)]
    for batch, *parts in zip(whole, *shards, strict=True):
        assert sorted(parts[0] + parts[1]) == sorted(batch)


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    epoch=st.integers(0, 9),
)
def test_a_balanced_order_repeats_nothing_needlessly(labels, epoch):
    labels = np.unique(labels, return_inverse=True)[1]
    order = balanced_order(0, epoch, labels)
    assert len(order) == len(labels)
    per_class = np.bincount(labels[order], minlength=labels.max() + 1)
    assert per_class.max() - per_class.min() <= 1
    for label, share in enumerate(per_class):
        own = np.flatnonzero(labels == label)
        times = np.array([(order == i).sum() for i in own])
        assert times.max() - times.min() <= 1
        assert times.max() == -(-share // len(own))


def test_balanced_batches_change_each_epoch_and_are_dealt_out():
    labels = np.repeat([0, 1, 2], [50, 9, 41])

    def epoch(number, rank=0, ranks=1):
        batches = ShuffledBatches(100, 10, 0, rank, ranks, labels=labels)
        batches.set_epoch(number)
        return list(batches)

    assert epoch(1) == epoch(1) != epoch(2)
    for batch, *parts in zip(
        epoch(1), epoch(1, 0, 2), epoch(1, 1, 2), strict=True
    ):
        assert sorted(parts[0] + parts[1]) == sorted(batch)
    # Who sits out, and which class gets one more, is drawn anew.
    sets = [{i for batch in epoch(n) for i in batch} for n in range(20)]
    assert set().union(*sets) == set(range(100))
    mean = np.mean([labels[np.concatenate(epoch(n))] == 1 for n in range(20)])
    assert mean == pytest.approx(1 / 3, abs=0.005)


@given(
    items=st.integers(2, 70),
    ranks=st.integers(1, 2),
    bucket=st.integers(2, 5),
    epoch=st.integers(0, 9),
)
def test_buckets_leave_nothing_out(items, ranks, bucket, epoch):
    lengths = np.random.default_rng(items).integers(1, 50, items)
    seen = []
    for rank in range(ranks):
        batches = ShuffledBatches(
            items, 4, 0, rank, ranks, None, lengths, bucket
        )
        batches.set_epoch(epoch)
        assert len(list(batches)) == len(batches)
        seen += [i for batch in batches for i in batch]
    assert sorted(seen) == list(range(items))


def test_buckets_pad_little_and_change_each_epoch():
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(6.3, 0.4, 20_000)).astype(int) + 91
    crops = np.minimum(lengths, 1000)

    def batches(epoch, bucket):
        made = ShuffledBatches(20_000, 32, 0, 0, 1, None, crops, bucket)
        made.set_epoch(epoch)
        return list(made)

    def waste(made):
        return sum(crops[b].max() * len(b) for b in made) / crops.sum()

    assert waste(batches(1, 1)) > 1.5
    assert waste(batches(1, 50)) < 1.05
    assert batches(1, 50) == batches(1, 50)
    first, second = ({tuple(sorted(b)) for b in batches(n, 50)} for n in (1, 2))
    assert len(first & second) < 3
    # Long and short batches come mixed, not by turns.
    means = [crops[b].mean() for b in batches(1, 50)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15


def test_a_batch_too_small_for_the_processes_is_refused():
    with pytest.raises(UserError, match="batch_size=2 must be at least 3"):
        ShuffledBatches(10, 2, n_ranks=3)
    with pytest.raises(UserError, match="batch_size=1 must be at least 2"):
        ShuffledBatches(10, 1)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    bound=st.integers(50, 1000),
    equal=st.booleans(),
    ranks=st.integers(1, 3),
)
def test_length_batches_bound_frames_and_give_each_once(
    lengths, bound, equal, ranks
):
    batches = [
        batch
        for rank in range(ranks)
        for batch in LengthBatches(lengths, bound, equal, rank, ranks)
    ]
    seen = sorted(i for batch in batches for i in batch)
    assert seen == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[i] for i in batch]
        assert len(batch) == 1 or max(own) * len(own) <= bound
        assert not equal or len(set(own)) == 1


def test_little_padding_at_the_true_spread_of_lengths():
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(6.3, 0.4, 8000)).astype(int) + 91
    padded = sum(
        lengths[b].max() * len(b) for b in LengthBatches(lengths, 16000)
    )
    assert padded < 1.02 * lengths.sum()
