"""From embeddings to speakers: an affine map, cosines, decisions.

All is NumPy, so that a model exported to ONNX needs no PyTorch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spkid.errors import UserError, one_line
from spkid.files import check_stored, read_bounded, save_atomically

NEAREST = 5  # speakers of the background that a score is compared with
TAILS = ("stranger", "missed", "pair")
MOST, MOST_PAIRS = 0.3, 0.05  # the tails' shares; pairs are many
MAX_BYTES = 2**30  # of a file
AGAIN = "write it again with train.py --test_only, or train again"


def check_rate(rate: float, most: float, key: str) -> None:
    """Raises UserError unless a rate is above 0 and at most ``most``.

    Example
    -------
    >>> check_rate(0.01, 0.3, "fpir")
    """
    if not 0 < rate <= most:
        raise UserError(f"{key}={rate} must be above 0 and at most {most}.")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., size] of length 1; a zero stays zero.

    Example
    -------
    >>> unit(np.array([3.0, 4.0])).tolist()
    [0.6, 0.8]
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-posteriors [..., classes] of logits.

    Example
    -------
    >>> np.exp(log_softmax(np.zeros(4))).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def background_level(cosines: np.ndarray) -> np.ndarray:
    """Mean of an embedding's cosines with similar speakers.

    They are the 2nd to 6th nearest: the nearest may be the one who speaks.

    Arguments
    ---------
    cosines : np.ndarray [n, background]
        With each speaker of the background.

    Returns
    -------
    np.ndarray [n]
        0 without a second speaker.

    Example
    -------
    >>> background_level(np.array([[0.9, 0.25, 0.75]])).tolist()
    [0.5]
    """
    nearest = -np.sort(-cosines, axis=1)[:, 1 : 1 + NEAREST]
    return nearest.sum(axis=1) / max(nearest.shape[1], 1)


class Tail(NamedTuple):
    """The upper end of scores, as an exponential law.

    Where the highest share of them begins, and by how much these exceed it in
    the mean: peaks over a threshold (Davison and Smith, 1990).

    Example
    -------
    >>> scores = np.random.default_rng(0).exponential(size=10_000)
    >>> round(Tail.of(scores).reached_by(0.01), 1)  # -log(0.01)
    4.6
    """

    start: float = 4.0  # beyond any difference of cosines
    excess: float = 0.0
    share: float = 1.0

    @classmethod
    def of(cls, scores: np.ndarray, share: float = MOST) -> Tail:
        """Fits scores [n]; of none, nothing is reached."""
        if not len(scores):
            return cls()
        start = float(np.quantile(scores, 1 - share))
        above = scores[scores >= start] - start
        return cls(start, float(above.mean()), share)

    def reached_by(self, rate: float) -> float:
        """The score that this rate of them reaches; at most ``share``."""
        beyond = np.log(self.share / np.clip(rate, 1e-300, self.share))
        return self.start + self.excess * float(beyond)


NOTHING = Tail()


@dataclass(frozen=True)
class Calibration:
    """What scores are worth, by recordings that training hasn't heard.

    Attributes
    ----------
    scale : float
        Posteriors are softmax(scale * cosine).
    gallery : int
        Speakers whom the strangers were compared with.
    stranger : Tail
        A stranger's score with the likeliest speaker.
    missed : Tail
        A speaker's score in a new session, negated.
    pair : Tail
        Two recordings of different speakers.
    n : int
        Recordings that this was measured on; 0: nothing was held out.
    """

    scale: float = 30.0
    gallery: int = 1
    stranger: Tail = NOTHING
    missed: Tail = NOTHING
    pair: Tail = NOTHING
    n: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether strangers and enrolled speakers can be told apart at a
        known rate."""
        return self.n > 0 and NOTHING not in (self.stranger, self.missed)


@dataclass(frozen=True, eq=False)
class Backend:
    """Compares embeddings with enrolled speakers.

    An embedding of length 1 is centred and projected to a space in which the
    recordings of one speaker vary equally in all directions (within-class
    covariance normalisation, Hatch et al., 2006). A speaker is the mean of the
    enrolled embeddings; the cosine with it is the closed-set score. Decisions
    about strangers use the same cosine, less the mean of those with similar
    speakers of the background (after adaptive T-norm, Sturim and Reynolds,
    2005): some voices and rooms are near to everybody's.

    Attributes
    ----------
    speakers : tuple of str [speakers]
        Names by index.
    means : np.ndarray [speakers, size]
        Mean of each speaker's enrolled embeddings, each of length 1.
    counts : np.ndarray [speakers]
        How many there are.
    background : np.ndarray [n, size]
        Means of the speakers of training, without names. It stays when
        speakers come and go, and with it what scores are worth.
    centre, projection : np.ndarray [size], [size, size]
        The map: (unit(embedding) - centre) @ projection.
    calibration : Calibration
        What scores are worth.

    Example
    -------
    >>> backend = Backend.of_means(np.eye(2), ["ann", "bob"])
    >>> np.exp(backend.log_posteriors(np.array([[5.0, 0.0]]))).round(3).tolist()
    [[1.0, 0.0]]
    """

    speakers: tuple[str, ...]
    means: np.ndarray
    counts: np.ndarray
    background: np.ndarray
    centre: np.ndarray
    projection: np.ndarray
    calibration: Calibration = Calibration()

    @classmethod
    def of_means(
        cls, means: np.ndarray, speakers: Sequence[str], scale: float = 30.0
    ) -> Backend:
        """Plain cosines with means [speakers, size], without a map."""
        size = means.shape[1]
        names = tuple(speakers)
        return cls(
            *(names, means, np.ones(len(names), np.int64), means),
            *(np.zeros(size, np.float32), np.eye(size, dtype=np.float32)),
            Calibration(scale, len(names)),
        )

    @property
    def size(self) -> int:
        """Of an embedding."""
        return len(self.centre)

    @cached_property
    def prototypes(self) -> np.ndarray:
        """The enrolled speakers [speakers, size], projected, of length 1."""
        return unit((self.means - self.centre) @ self.projection)

    @cached_property
    def background_prototypes(self) -> np.ndarray:
        """The background [n, size], projected, of length 1."""
        return unit((self.background - self.centre) @ self.projection)

    def project(self, embeddings: np.ndarray) -> np.ndarray:
        """Maps embeddings [..., size] to vectors of length 1 to compare."""
        return unit((unit(embeddings) - self.centre) @ self.projection)

    def cosines(self, embeddings: np.ndarray) -> np.ndarray:
        """Cosines [n, speakers] of embeddings [n, size]."""
        return self.project(embeddings) @ self.prototypes.T

    def log_posteriors(self, embeddings: np.ndarray) -> np.ndarray:
        """Log-posteriors [n, speakers], if an enrolled speaker speaks."""
        return log_softmax(self.calibration.scale * self.cosines(embeddings))

    def level(self, embeddings: np.ndarray) -> np.ndarray:
        """Background levels [n] of embeddings [n, size]."""
        return background_level(
            self.project(embeddings) @ self.background_prototypes.T
        )

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Normalised scores [n, speakers], which thresholds apply to."""
        return self.cosines(embeddings) - self.level(embeddings)[:, None]

    def pair_scores(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Scores [n, m] of each of a [n, size] with each of b [m, size].

        They are normalised by the backgrounds of both (after adaptive S-norm,
        Matejka et al., 2017).
        """
        levels = self.level(a)[:, None] + self.level(b)
        return self.project(a) @ self.project(b).T - levels / 2

    def threshold(self, fpir: float) -> float:
        """Score that a stranger reaches with this rate.

        Arguments
        ---------
        fpir : float
            False-positive identification rate: the share of strangers who are
            taken for an enrolled speaker. With more enrolled speakers than it
            was measured with, chance has more tries, and the threshold rises.

        Raises
        ------
        UserError
            If the rate isn't above 0 and at most ``MOST``.
        """
        check_rate(fpir, MOST, "fpir")
        measured = self.calibration
        share = measured.gallery / max(len(self.speakers), 1)
        rate = -float(np.expm1(np.log1p(-fpir) * share))
        return measured.stranger.reached_by(rate)

    def rejection_threshold(self, miss: float = 0.05) -> float:
        """Score that all but this share of the enrolled speakers reach."""
        return -self.calibration.missed.reached_by(miss)

    def pair_threshold(self, false_alarm: float) -> float:
        """Score that pairs of different speakers reach with this rate, which
        is at most ``MOST_PAIRS``."""
        check_rate(false_alarm, MOST_PAIRS, "false_alarm")
        return self.calibration.pair.reached_by(false_alarm)

    def enroll(self, name: str, embeddings: np.ndarray) -> Backend:
        """With recordings [n, size] of a speaker, new or enrolled."""
        vectors = unit(np.asarray(embeddings, np.float64))
        speakers, means, counts = self.speakers, self.means, self.counts
        if name not in speakers:
            speakers = (*speakers, name)
            means = np.vstack(
                (means, np.zeros_like(means, shape=self.centre.shape))
            )
            counts = np.append(counts, 0)
        means, counts, i = means.copy(), counts.copy(), speakers.index(name)
        total = means[i] * counts[i] + vectors.sum(0)
        counts[i] += len(vectors)
        means[i] = total / counts[i]
        return replace(self, speakers=speakers, means=means, counts=counts)

    def forget(self, *names: str) -> Backend:
        """Without these speakers; the background stays."""
        kept = [i for i, s in enumerate(self.speakers) if s not in names]
        return replace(
            self,
            speakers=tuple(self.speakers[i] for i in kept),
            means=self.means[kept],
            counts=self.counts[kept],
        )

    def to_bytes(self) -> bytes:
        """The content of a NumPy .npz file, which holds no code."""
        content, arrays = io.BytesIO(), vars(self) | vars(self.calibration)
        found = {key: np.asarray(arrays[key]) for key in SAVED}
        found["speakers"] = found["speakers"].astype(np.str_)  # () has no type
        np.savez(content, **found)  # type: ignore[arg-type]
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Backend:
        """What :meth:`to_bytes` gave; NumPy has many exceptions for others."""
        file = io.BytesIO(content)
        check_stored(file)
        with np.load(file, allow_pickle=False) as arrays:
            return cls._of_arrays({key: arrays[key] for key in SAVED})

    def save(self, path: str | Path) -> None:
        """Writes :meth:`to_bytes` to a file."""
        save_atomically(self.to_bytes(), path)

    @classmethod
    def load(cls, path: str | Path, cure: str = AGAIN) -> Backend:
        """Reads what :meth:`save` wrote.

        Raises
        ------
        UserError
            If the file is missing, damaged or of an older version; ``cure``
            says what helps.
        """
        try:
            return cls.from_bytes(read_bounded(path, MAX_BYTES))
        except Exception as error:
            raise UserError(
                f"{path}: can't be loaded ({one_line(error)}); {cure}."
            ) from None

    @classmethod
    def _of_arrays(cls, found: dict[str, np.ndarray]) -> Backend:
        """Checks what a file holds: finite numbers that fit each other."""
        size = len(found["centre"])
        n, m = len(found["speakers"]), len(found["background"])
        shapes: dict[str, tuple[int, ...]] = {
            **{"means": (n, size), "background": (m, size)},
            **{"centre": (size,), "projection": (size, size)},
        }
        arrays = {key: found[key].astype(np.float32) for key in shapes}
        arrays["counts"] = found["counts"].astype(np.int64)
        shapes["counts"] = (n,)
        for key, array in arrays.items():
            if array.shape != shapes[key] or not np.isfinite(array).all():
                raise ValueError(f"{key} isn't finite, or has another shape")
        if (arrays["counts"] < 0).any():
            raise ValueError("counts are negative")
        names = found["speakers"].tolist()
        if found["speakers"].dtype.kind != "U" or len({*names, ""}) <= n:
            raise ValueError("speakers isn't a list of different names")
        scale, gallery, rows = (
            found[key].item() for key in ("scale", "gallery", "n")
        )
        tails = {key: Tail(*map(float, found[key])) for key in TAILS}
        if not (0 < scale <= 1e4 and gallery >= 1 and rows >= 0):
            raise ValueError("scale, gallery or n is out of range")
        for key, tail in tails.items():
            if not (abs(tail.start) < 1e4 and 0 <= tail.excess < 1e4) or not (
                0 < tail.share <= 1
            ):
                raise ValueError(f"{key} is out of range")
        law = Calibration(scale, gallery, **tails, n=rows)
        return cls(speakers=tuple(names), **arrays, calibration=law)


SAVED = [f.name for f in (*fields(Backend), *fields(Calibration))]
SAVED.remove("calibration")
