"""Which utterances of a speaker share a recording session.

Utterances of one recording share its room, microphone and day. If some of
them are trained on and others validated on, the validation is too optimistic:
it never hears a new recording, while the test hears nothing else. Therefore
whole sessions are held out. Where they aren't known, they are inferred here
from the features alone.

An utterance's *fingerprint* is what a channel leaves in it: the long-term mean
and deviation of each mel band, the spectrum of its quietest frames (the noise
floor) and its mean change from frame to frame (reverberation smears it). A
two-covariance model explains a speaker's fingerprints, as Brümmer and de
Villiers ("The speaker partitioning problem", Odyssey 2010) explain speakers'
utterances, with sessions in the place of speakers::

    fingerprint = speaker's mean + session's offset + residue

Offset and residue are Gaussian. Their covariances are the same for all
speakers and are learned by alternating with the labels, so that nobody has to
choose a number of sessions. First it is tested whether the lists are in the
order of recording. If they are, sessions are runs of a list, and the likeliest
segmentation is found exactly. Otherwise fingerprints are clustered, which is
weaker: it also divides a speaker who has a single session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg import eigh
from scipy.spatial.distance import cdist, squareform
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

COMPONENTS = 40  # of the fingerprints; the others hold mostly content
ROUNDS = 6  # of labels and covariances; they settle after three or four
# Speech content, which the model takes for noise, changes slowly, and residues
# aren't quite Gaussian. So the evidence is divided by a factor, which was
# chosen on three corpora with known sessions.
TEMPER_ORDERED = 3.5
TEMPER_UNORDERED = 2.0
# Distance of neighbours over that of random pairs: 0.33 to 0.85 in three
# corpora in order, 1.00 after shuffling them.
MOST_ORDER = 0.9
PRIOR_UTTERANCES = 20  # weight of all speakers' residues against one's own


@dataclass
class Sessions:
    """The sessions of all utterances.

    Arguments
    ---------
    label : np.ndarray [utterances]
        Session of each utterance, numbered from 0 within its speaker.
    speaker : np.ndarray [utterances]
        Index of each utterance's speaker, from 0.
    ordered : bool
        Whether each speaker's list is in the order of recording, so that
        sessions are runs of it.
    order : float
        Distance of neighbours in the lists over that of a speaker's random
        pairs; 1 where the order carries no information. NaN: not measured.
    """

    label: np.ndarray
    speaker: np.ndarray
    ordered: bool = False
    order: float = float("nan")

    def rows(self) -> list[np.ndarray]:
        """The utterances of each speaker, in the list's order."""
        return _rows(self.speaker)


def _rows(speaker: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(speaker, kind="stable")
    ends = np.cumsum(np.bincount(speaker))
    return np.split(order, ends[:-1])


def known_sessions(names: Sequence, speakers: Sequence) -> Sessions:
    """Sessions whose names are known.

    Arguments
    ---------
    names : sequence
        The session of each utterance, by any name.
    speakers : sequence
        The speaker of each utterance, by any name.

    Example
    -------
    >>> known_sessions(["b", "a", "a"], ["x", "x", "y"]).label
    array([1, 0, 0])
    """
    speaker, session = numbered(speakers), numbered(names)
    label = np.zeros(len(speaker), dtype=int)
    for rows in _rows(speaker):
        label[rows] = np.unique(session[rows], return_inverse=True)[1]
    return Sessions(label, speaker)


def numbered(names: Sequence) -> np.ndarray:
    """The place of each name among all, sorted, without an array of texts,
    where each would take as much memory as the longest.

    Example
    -------
    >>> numbered(["b", "a", "b"])
    array([1, 0, 1])
    """
    number = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], dtype=int)


def infer_sessions(prints: np.ndarray, speakers: Sequence) -> Sessions:
    """Infers sessions from fingerprints.

    Arguments
    ---------
    prints : np.ndarray [utterances, 4 * n_mels]
        Fingerprints, each speaker's in the order of the data's list.
    speakers : sequence
        The speaker of each utterance, by any name.

    Example
    -------
    >>> generator = np.random.default_rng(0)
    >>> rooms = np.repeat(generator.normal(size=(30, 8)), 6, axis=0)
    >>> prints = rooms + 0.1 * generator.normal(size=rooms.shape)
    >>> sessions = infer_sessions(prints, np.repeat(range(10), 18))
    >>> sessions.label[:18]
    array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    """
    speaker = numbered(speakers)
    all_rows = _rows(speaker)
    label = np.zeros(len(speaker), dtype=int)
    points = np.array(prints, dtype=np.float64)
    for rows in all_rows:
        points[rows] -= points[rows].mean(axis=0)
    if len(points) < 3 or not points.any():  # nothing to compare
        return Sessions(label, speaker)
    components = min(COMPONENTS, *points.shape)
    points = make_pipeline(
        StandardScaler(), PCA(components, svd_solver="full")
    ).fit_transform(points)
    order, ordered = _order(points, all_rows)
    near, owner = _near_pairs(points, all_rows, ordered)
    temper = TEMPER_ORDERED if ordered else TEMPER_UNORDERED
    # Initially: most of the nearest pairs share a session.
    size = (near**2).sum(axis=1)
    close = near[size <= np.quantile(size, 0.6)]
    within = close.T @ close / len(close) / 2
    between = points.T @ points / len(points) - within
    change = 0.2  # probability of a new session at an utterance
    for _ in range(ROUNDS):
        ridge = max(0.01 * np.trace(within) / components, 1e-6)
        within += ridge * np.eye(components)
        noise = _speaker_noise(near, owner, within, all_rows)
        # In these axes both covariances are diagonal, the residue's is 1.
        spread, axes = eigh(between, within)
        spread = np.maximum(spread, 1e-3)
        scale = np.sqrt(temper * noise)[speaker, None]
        projected = points @ axes / scale
        for index, rows in enumerate(all_rows):
            own = spread / (temper * noise[index])
            if ordered:
                label[rows] = _segment(projected[rows], own, change)
            else:
                label[rows] = _cluster(projected[rows], own)
        within, between, count = _covariances(
            points, speaker, label, np.sqrt(noise)
        )
        more = len(points) - len(all_rows)
        change = np.clip((count - len(all_rows)) / more, 0.01, 0.9)
    return Sessions(label, speaker, ordered, order)


def _order(points, all_rows):
    """Neighbours' distance over that of random pairs; whether the lists are in
    the order of recording, neither by chance nor weakly sorted otherwise."""
    generator = np.random.default_rng(0)

    def neighbours(shuffle):
        total = []
        for rows in all_rows:
            own = generator.permutation(rows) if shuffle else rows
            steps = np.diff(points[own], axis=0)
            total.append(np.log((steps**2).sum(axis=1) + 1e-12))
        return np.median(np.concatenate(total))  # robust against copies

    observed = neighbours(False)
    chance = np.array([neighbours(True) for _ in range(20)])
    far = (chance.mean() - observed) / (chance.std() + 1e-12)
    order = float(np.exp(observed - chance.mean()))
    return order, bool(far > 5 and order < MOST_ORDER)


def _near_pairs(points, all_rows, ordered):
    """Differences of pairs that mostly share a session, and their speakers:
    neighbours in the list, or in the space of fingerprints."""
    near, owner = [], []
    for index, rows in enumerate(all_rows):
        own = points[rows]
        if len(own) < 2:
            continue
        if ordered:
            difference = np.diff(own, axis=0)
        else:
            distance = cdist(own, own)
            np.fill_diagonal(distance, np.inf)
            difference = own - own[distance.argmin(axis=1)]
        near.append(difference)
        owner += [index] * len(difference)
    return np.concatenate(near), np.array(owner)


def _speaker_noise(near, owner, within, all_rows):
    """Variance of each speaker's residue over that of all [speakers].

    It is a median, which the boundaries of sessions don't move, drawn towards
    1 for speakers with few utterances.
    """
    size = np.einsum("ij,ij->i", near, np.linalg.solve(within, near.T).T)
    common = max(np.median(size), 1e-12)
    noise = np.ones(len(all_rows))
    for index in np.unique(owner):
        count = len(all_rows[index])
        own = np.median(size[owner == index]) / common
        noise[index] = (PRIOR_UTTERANCES + count * own) / (
            PRIOR_UTTERANCES + count
        )
    return np.maximum(noise, 0.3)


def _evidence(count, total, spread):
    """Log-likelihood ratio, in nats: the utterances are one session, against
    each having the speaker's mean; residues have unit variance.

    ``total`` [..., dimensions] sums ``count`` [...] fingerprints; ``spread``
    [dimensions] is the variance of the sessions' offsets.
    """
    gain = 1 + np.multiply.outer(count, spread)
    return 0.5 * (spread * total**2 / gain - np.log(gain)).sum(axis=-1)


def _segment(points, spread, change):
    """Labels of the likeliest division of a list into sessions, by dynamic
    programming."""
    count = len(points)
    sums = np.concatenate((np.zeros_like(points[:1]), points.cumsum(axis=0)))
    best, begin = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    prior = np.log(change / (1 - change))
    for end in range(1, count + 1):
        starts = np.arange(end)
        total = best[:end] + prior * (starts > 0)
        total += _evidence(end - starts, sums[end] - sums[:end], spread)
        begin[end] = total.argmax()
        best[end] = total[begin[end]]
    label, end = np.zeros(count, dtype=int), count
    while end > 0:
        label[begin[end] :] += begin[end] > 0
        end = begin[end]
    return label


def _cluster(points, spread):
    """Average linkage by the evidence that two utterances share a session;
    groups are joined while the evidence is positive."""
    count = len(points)
    if count < 2:
        return np.zeros(count, dtype=int)
    one = _evidence(np.ones(count), points, spread)
    pair = 0.5 * spread / (1 + 2 * spread)
    square = points**2 @ pair
    joint = square[:, None] + square + 2 * (points * pair) @ points.T
    joint -= 0.5 * np.log1p(2 * spread).sum()
    apart = one[:, None] + one - joint
    apart = (apart + apart.T) / 2
    lowest = apart.min()
    np.fill_diagonal(apart, lowest)
    tree = linkage(squareform(apart - lowest, checks=False), "average")
    return fcluster(tree, -lowest, "distance") - 1


def _covariances(points, speaker, label, noise):
    """Covariance within and between sessions, and the number of sessions.

    ``noise`` [speakers] is the deviation by which residues are divided. The
    speakers' means are treated as known, so only 1 - 1 / S of the covariance
    between S sessions is seen. The bias is left in: it makes too few sessions
    rather than too many, and too few leak nothing. Without it, 13 % instead of
    0.5 % of the utterances held out in VoxForge, where most speakers have one
    session, came from a session that was trained on.
    """
    pairs = np.stack((speaker, label))
    group = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()
    count = np.bincount(group)
    means = np.zeros((len(count), points.shape[1]))
    np.add.at(means, group, points)
    means /= count[:, None]
    residue = (points - means[group]) / noise[speaker, None]
    within = residue.T @ residue / max(1, len(points) - len(count))
    between = (means * count[:, None]).T @ means / len(points)
    # The mean of n residues has an n-th of their covariance.
    between -= within * len(count) / len(points)
    values, vectors = np.linalg.eigh(between)
    between = (vectors * np.maximum(values, 1e-6)) @ vectors.T
    return within, between, len(count)
