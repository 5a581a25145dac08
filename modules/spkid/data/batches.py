"""Which utterances form which batch: pure functions of (seed, epoch).

No sampler here keeps a random state, so any worker, process or resumed run
draws the same crops and batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from spkid.errors import UserError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def utterance_key(utterance_id: str) -> int:
    """A 63-bit number for a name, the same on every machine.

    Example
    -------
    >>> utterance_key("uttr-0.pt") == utterance_key("uttr-0.pt")
    True
    """
    digest = hashlib.blake2b(utterance_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def hash_uniform(seed: int, epoch: int, keys: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each key, by SplitMix64 (Steele et al., 2014).

    Arguments
    ---------
    seed, epoch : int
        Other seeds and epochs give other numbers.
    keys : numpy.ndarray [n]
        Integers, as from :func:`utterance_key`.

    Returns
    -------
    numpy.ndarray [n]
        float64.

    Example
    -------
    >>> hash_uniform(1, 2, np.array([3, 4])).shape
    (2,)
    """
    with np.errstate(over="ignore"):
        z = np.asarray(keys).astype(np.uint64)
        for salt in (seed, epoch):
            z = z + (np.uint64(salt % 2**63) + np.uint64(1)) * GOLDEN
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


def crop_starts(
    seed: int,
    epoch: int,
    keys: np.ndarray,
    lengths: np.ndarray,
    segment_frames: int,
) -> np.ndarray:
    """First frame of each utterance's random crop.

    Arguments
    ---------
    seed, epoch : int
        The crop is a pure function of these and the utterance.
    keys : numpy.ndarray [n]
        From :func:`utterance_key`.
    lengths : numpy.ndarray [n]
        Frames of each utterance.
    segment_frames : int
        Frames of a crop; a shorter utterance is taken whole.

    Returns
    -------
    numpy.ndarray [n]

    Example
    -------
    >>> crop_starts(0, 1, np.array([7]), np.array([100]), segment_frames=128)
    array([0])
    """
    places = np.maximum(np.asarray(lengths) - segment_frames, 0) + 1
    return (hash_uniform(seed, epoch, keys) * places).astype(np.int64)


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """As many items as there are, each class equally often.

    Larger classes are subsampled each epoch, smaller ones repeated evenly.
    Shares differ by at most one item; which classes get one more is drawn
    anew each epoch.

    Arguments
    ---------
    seed, epoch : int
        The order is a pure function of these.
    labels : numpy.ndarray [n]
        Class of each item; classes are numbered from 0 without gaps.

    Returns
    -------
    numpy.ndarray [n]
        Indices of items, shuffled.

    Example
    -------
    >>> labels = np.array([0, 0, 0, 0, 0, 1])
    >>> np.bincount(labels[balanced_order(0, 1, labels)])
    array([3, 3])
    """
    n_items, owned = len(labels), np.bincount(labels)
    draw = hash_uniform(seed, epoch, np.arange(2 * n_items + len(owned)))
    by_class = np.lexsort((draw[:n_items], labels))
    share, more = divmod(n_items, len(owned))
    shares = np.full(len(owned), share)
    shares[np.argsort(draw[2 * n_items :], kind="stable")[:more]] += 1
    turn = np.arange(n_items) - np.repeat(np.cumsum(shares) - shares, shares)
    first = np.repeat(np.cumsum(owned) - owned, shares)
    chosen = by_class[first + turn % np.repeat(owned, shares)]
    return chosen[np.argsort(draw[n_items : 2 * n_items], kind="stable")]


class ShuffledBatches(Sampler):
    """Every utterance once an epoch, in an order drawn from (seed, epoch).

    SpeechBrain's ReproducibleRandomSampler isn't used because its distributed
    wrapper always shuffles by seed 0, and fails on a rank that is left with a
    single batch.

    Arguments
    ---------
    n_items : int
        Utterances of the data set.
    batch_size : int
        Utterances of a batch, over all ranks.
    seed : int
        Of the order.
    rank, n_ranks : int
        This process and their number; each gets its own part of each batch.
    labels : numpy.ndarray [n_items], optional
        Class indices: each class comes equally often, by
        :func:`balanced_order`. None: each utterance once.
    lengths : numpy.ndarray [n_items], optional
        Frames of each crop, for ``bucket_batches``.
    bucket_batches : int
        Sorts this many batches' utterances by length before batching, so that
        little is padded; 1: off.

    Example
    -------
    >>> batches = ShuffledBatches(5, batch_size=2, seed=0)
    >>> batches.set_epoch(1)
    >>> sorted(i for batch in batches for i in batch), len(batches)
    ([0, 1, 2, 3, 4], 2)
    """

    def __init__(
        self,
        n_items: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        n_ranks: int = 1,
        labels: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
        bucket_batches: int = 1,
    ) -> None:
        # Batch statistics of a single utterance don't exist.
        self.least = max(2, n_ranks)
        if batch_size < self.least:
            raise UserError(
                f"batch_size={batch_size} must be at least {self.least}: two "
                "utterances, and one for each process."
            )
        self.n_items, self.batch_size, self.seed = n_items, batch_size, seed
        self.rank, self.n_ranks, self.epoch = rank, n_ranks, 0
        self.labels, self.lengths = labels, lengths
        self.bucket = bucket_batches * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches."""
        full, rest = divmod(self.n_items, self.batch_size)
        return full + 1 if rest >= self.least or not full else full

    def _order(self) -> np.ndarray:
        if self.labels is not None:
            return balanced_order(self.seed, self.epoch, self.labels)
        draw = hash_uniform(self.seed, self.epoch, np.arange(self.n_items))
        return np.argsort(draw, kind="stable")

    def _bucketed(self, order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Sorts within buckets; then the whole batches are shuffled."""
        bucket = np.arange(self.n_items) // self.bucket
        order = order[np.lexsort((lengths[order], bucket))]
        full = self.n_items // self.batch_size
        whole = order[: full * self.batch_size].reshape(full, self.batch_size)
        # Other numbers than those of the order.
        keys = self.n_items + np.arange(full)
        draw = hash_uniform(self.seed, self.epoch, keys)
        mixed = whole[np.argsort(draw, kind="stable")].flatten()
        return np.concatenate((mixed, order[len(mixed) :]))

    def __iter__(self) -> Iterator[list[int]]:
        """Yields this rank's indices of each batch."""
        order = self._order()
        if self.lengths is not None and self.bucket > self.batch_size:
            order = self._bucketed(order, self.lengths)
        for number in range(1, len(self) + 1):
            begin = (number - 1) * self.batch_size
            # Too small a rest joins the last batch.
            end = None if number == len(self) else number * self.batch_size
            batch = order[begin:end]
            if len(batch) < self.least:  # the whole set is as small
                batch = np.resize(batch, self.least)
            yield batch[self.rank :: self.n_ranks].tolist()


class LengthBatches(Sampler):
    """Batches of similar length with a bound on their padded frames.

    The longest come first, so that a batch too large for the memory fails at
    once. (SpeechBrain's DynamicBatchSampler isn't used because its buckets
    don't bound a batch's frames, and it drops utterances that are longer than
    its longest bucket.)

    Arguments
    ---------
    lengths : sequence of int
        Frames of each utterance.
    max_frames : int
        Padded frames of a batch; a longer utterance is a batch of its own.
    equal : bool
        Only utterances of the same length share a batch, so that nothing is
        padded: for encoders that are not exact under padding.
    rank, n_ranks : int
        This process and their number; batches are dealt out in turn.

    Example
    -------
    >>> list(LengthBatches([3, 9, 4, 2], max_frames=8))
    [[1], [2, 0], [3]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        max_frames: int,
        equal: bool = False,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        lengths = np.asarray(lengths)
        batches: list[list[int]] = []
        batch: list[int] = []
        for index in np.argsort(-lengths, kind="stable").tolist():
            if batch:
                longest = lengths[batch[0]]
                full = longest * (len(batch) + 1) > max_frames
                if full or (equal and lengths[index] != longest):
                    batches.append(batch)
                    batch = []
            batch.append(index)
        if batch:
            batches.append(batch)
        self.batches = batches[rank::n_ranks]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the indices of each batch."""
        return iter(self.batches)
