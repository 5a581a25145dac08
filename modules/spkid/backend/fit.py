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
    MOST_PAIRS,
    Backend,
    Calibration,
    Tail,
    log_softmax,
    unit,
)
from spkid.errors import UserError

FOLDS = 10  # of sessions
SPEAKER_FOLDS = 50
SHRINKAGE = 0.1
FEWEST = 3  # speakers whom a stranger is compared with
STAND_INS = 2_000  # utterances, where nothing is held out
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
    floats = np.float32
    kept = means.astype(floats)
    rest = centre.astype(floats), projection.astype(floats)
    return Backend(tuple(speakers), kept, counts, kept, *rest)


class Fitted(NamedTuple):
    """A back-end, and what the whole system says of held-out utterances."""

    backend: Backend
    log_posteriors: np.ndarray  # [held out, speakers], by honest back-ends


def fit_backend(
    embeddings: np.ndarray,
    targets: np.ndarray,
    sessions: Sequence,
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

    Raises
    ------
    UserError
        If an embedding isn't finite.

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
    embeddings, held_out = np.asarray(embeddings), np.asarray(parts) != "train"
    if not np.isfinite(embeddings).all():
        raise UserError(
            "The embeddings aren't finite: the training has diverged; start "
            "again with a smaller --lr, in another --output_folder."
        )
    probes = np.flatnonzero(held_out)
    if not len(probes):
        probes = np.arange(0, len(targets), -(-len(targets) // STAND_INS))
    new = np.asarray(parts)[probes] == "new"
    measured = new if new.any() else np.ones(len(probes), bool)
    voices, owner = embeddings[probes], targets[probes]
    groups = [f"{sessions[i]} {targets[i]}" for i in probes.tolist()]
    session = np.unique(np.array(groups), return_inverse=True)[1]
    cosines = np.zeros((len(probes), len(speakers)), np.float32)
    missed, strangers, pairs, compared = [], [], [], [1]
    for fold in range(FOLDS):  # without the fold's sessions
        inside = session % FOLDS == fold
        if inside.all() or not inside.any():
            continue
        rest = np.ones(len(targets), bool)
        rest[probes[inside]] = False
        without = fit_map(embeddings[rest], targets[rest], speakers)
        cosines[inside] = without.cosines(voices[inside])
        inside &= measured & (without.counts[owner] > 0)
        scores = without.scores(voices[inside])
        missed.append(-scores[np.arange(len(scores)), owner[inside]])
    for fold in range(SPEAKER_FOLDS):  # without the fold's speakers
        rest = targets % SPEAKER_FOLDS != fold
        inside = (owner % SPEAKER_FOLDS == fold) & measured
        names, index = np.unique(targets[rest], return_inverse=True)
        if len(names) < FEWEST or not inside.any():
            continue
        without = fit_map(embeddings[rest], index, [*map(str, names)])
        strangers.append(without.scores(voices[inside]).max(1))
        both = without.pair_scores(voices[inside], voices[measured])
        pairs.append(both[owner[inside][:, None] != owner[measured]])
        compared.append(len(names))
    scale = _fit_scale(cosines[measured], owner[measured])
    calibration = Calibration(
        scale,
        round(np.mean(compared[1:] or compared)),
        Tail.of(np.concatenate([[], *strangers])),
        Tail.of(np.concatenate([[], *missed])),
        Tail.of(np.concatenate([[], *pairs]), MOST_PAIRS),
        int(measured.sum()) if held_out.any() else 0,
    )
    whole = fit_map(embeddings, targets, speakers)
    honest = log_softmax(scale * cosines)[: held_out.sum()]
    return Fitted(replace(whole, calibration=calibration), honest)


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
