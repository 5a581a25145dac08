"""Fits the back-end on embeddings of all labelled utterances.

Embeddings of utterances that were trained on are packed tightly, and say
little about how a voice moves from one recording to another. Held-out sessions
say it: the within-speaker covariance learns from them which directions are
recording and not voice. They are enrolled, too, without training again.

What the whole system is worth stays honest: each held-out utterance is scored
by a back-end that was fitted without its session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.covariance import shrunk_covariance

from spkid.backend.scoring import (
    Backend,
    Calibration,
    Tail,
    log_softmax,
    unit,
)

FOLDS = 10
SHRINKAGE = 0.1
# The highest shares of scores, whose laws are fitted; pairs are many.
TAILS = {"stranger": 0.3, "missed": 0.3, "pair": 0.05}
MOST = 2_000  # utterances that stand in where nothing is held out
SCALES = (1.0, 200.0)  # of cosines


def fit_map(
    embeddings: np.ndarray,
    targets: np.ndarray,
    speakers: Sequence[str],
    shrinkage: float = SHRINKAGE,
) -> Backend:
    """Whitens by the within-speaker covariance, and enrols everybody.

    Its cosines to class means are those of linear discriminant analysis with
    vectors of length 1.

    Arguments
    ---------
    embeddings : np.ndarray [n, size]
        Of labelled utterances.
    targets : np.ndarray [n]
        Class indices.
    speakers : sequence of str
        Names by class index. Who has no utterance can't be the answer.
    shrinkage : float
        Of the covariance towards a multiple of the identity (Ledoit and Wolf,
        2004): 0 keeps it, 1 keeps only its trace.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> targets = np.arange(40) % 2
    >>> voices = np.eye(8)[targets] + 0.1 * rng.normal(size=(40, 8))
    >>> backend = fit_map(voices, targets, ["ann", "bob"])
    >>> bool((backend.cosines(voices).argmax(1) == targets).all())
    True
    """
    vectors = unit(np.asarray(embeddings, np.float64))
    counts = np.bincount(targets, minlength=len(speakers))
    means = np.zeros((len(speakers), vectors.shape[1]))
    np.add.at(means, targets, vectors)
    means /= np.maximum(counts, 1)[:, None]
    centre = means[counts > 0].mean(0)
    means[counts == 0] = centre  # whose cosines are 0
    residuals = vectors - means[targets]
    covariance = residuals.T @ residuals / len(vectors)
    covariance = shrunk_covariance(covariance, shrinkage)
    # A model that gives one embedding to everybody has no covariance.
    covariance += 1e-9 * np.eye(len(covariance))
    projection = np.linalg.inv(np.linalg.cholesky(covariance)).T
    means, centre, projection = (
        array.astype(np.float32) for array in (means, centre, projection)
    )
    names = tuple(speakers)
    return Backend(names, means, counts, means, names, centre, projection)


class Fitted(NamedTuple):
    """A back-end, and what the whole system says of held-out utterances."""

    backend: Backend
    log_posteriors: np.ndarray  # [held out, speakers], by honest back-ends


def fit_backend(
    embeddings: np.ndarray,
    targets: np.ndarray,
    sessions: Sequence[str],
    parts: Sequence[str],
    speakers: Sequence[str],
) -> Fitted:
    """Fits on all utterances, and measures on what training hasn't heard.

    Two back-ends score each held-out utterance. One was fitted without its
    session: its posteriors are those of the whole system on a new recording.
    The other was fitted without its speaker, who is a stranger to it.

    Arguments
    ---------
    embeddings : np.ndarray [n, size]
        Of all labelled utterances.
    targets : np.ndarray [n]
        Class indices.
    sessions : sequence [n]
        A session of each utterance; the same name with two speakers is two.
    parts : sequence of str [n]
        "train", or the part of validation. What scores are worth is measured
        on new sessions. Where there are none, it is measured on other held-out
        utterances or on those of training, and is too optimistic.
    speakers : sequence of str
        Names by class index.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> targets = np.arange(80) % 4
    >>> voices = np.eye(8)[targets] + 0.1 * rng.normal(size=(80, 8))
    >>> fitted = fit_backend(
    ...     voices, targets, np.arange(80) // 8, ["train", "new"] * 40,
    ...     ["ann", "bob", "cem", "dee"])
    >>> fitted.log_posteriors.shape, fitted.backend.calibration.n
    ((40, 4), 40)
    """
    embeddings, sessions = np.asarray(embeddings), np.asarray(sessions)
    held_out, new = np.asarray(parts) != "train", np.asarray(parts) == "new"
    probes = np.flatnonzero(held_out)
    if not len(probes):
        probes = np.arange(0, len(targets), -(-len(targets) // MOST))
    owner = targets[probes]
    measured = new[probes] if new.any() else np.ones(len(probes), bool)
    groups = np.unique(
        [f"{s} {t}" for s, t in zip(sessions[probes], owner, strict=True)],
        return_inverse=True,
    )[1]
    cosines = np.zeros((len(probes), len(speakers)), np.float32)
    scores: dict[str, list[np.ndarray]] = {key: [] for key in TAILS}
    for fold in range(FOLDS):
        inside = groups % FOLDS == fold
        if not inside.any():
            continue
        own, target = embeddings[probes[inside]], owner[inside]
        rest = np.ones(len(targets), bool)
        rest[probes[inside]] = False
        without = fit_map(embeddings[rest], targets[rest], speakers)
        cosines[inside] = without.cosines(own)
        inside &= measured
        own, target = embeddings[probes[inside]], owner[inside]
        enrolled = without.counts[target] > 0
        found = without.scores(own)[enrolled, target[enrolled]]
        scores["missed"].append(-found)
        strange = ~np.isin(targets, target)
        if not (strange.any() and len(own)):
            continue
        names, index = np.unique(targets[strange], return_inverse=True)
        without = fit_map(embeddings[strange], index, names.astype(str))
        scores["stranger"].append(without.scores(own).max(1))
        pairs = without.pair_scores(own, embeddings[probes[measured]])
        scores["pair"].append(pairs[target[:, None] != owner[measured]])
    law = {
        key: Tail.of(np.concatenate([np.zeros(0), *scores[key]]), share)
        for key, share in TAILS.items()
    }
    scale = _fit_scale(cosines[measured], owner[measured])
    whole = fit_map(embeddings, targets, speakers)
    n = int(measured.sum()) if held_out.any() else 0
    calibration = Calibration(scale, len(speakers), **law, n=n)
    fitted = replace(whole, calibration=calibration)
    return Fitted(fitted, log_softmax(scale * cosines)[: held_out.sum()])


def _fit_scale(cosines: np.ndarray, targets: np.ndarray) -> float:
    """Scale that makes posteriors of cosines [n, speakers] most likely.

    One utterance that could be anybody's is added, so that a system without
    errors isn't infinitely sure.
    """

    def loss(scale: float) -> float:
        log_posteriors = log_softmax(scale * cosines)
        own = np.take_along_axis(log_posteriors, targets[:, None], 1)
        return float(-own.sum() - log_posteriors.mean(1).mean())

    return float(minimize_scalar(loss, bounds=SCALES, method="bounded").x)
