"""Inferred sessions against those that somebody wrote down."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.metrics import adjusted_rand_score
from variants import SYSTEM

from ml2022hw4_prepare import prepare
from spkid.errors import UserError
from spkid.hparams import Settings
from spkid.sessions import (
    Sessions,
    hold_out,
    infer_sessions,
    known_sessions,
    pack_fingerprints,
    written_sessions,
)


def session_scores(
    folder: Path, pack_folder: Path | None, seeds: int
) -> dict[str, float]:
    """How well a folder's sessions are found from its features alone.

    Arguments
    ---------
    folder : pathlib.Path
        The data; its sessions are written down, and only scored against.
    pack_folder : pathlib.Path, optional
        Where the packs are.
    seeds : int
        Draws that are averaged over.

    Returns
    -------
    dict
        The adjusted Rand index (Hubert and Arabie, 1985), mean over the
        speakers who have two or more sessions, in the order of the lists and
        shuffled; and for both orders, the share of the held-out utterances
        whose true session is also trained on.

    Raises
    ------
    UserError
        If the folder doesn't say its sessions.
    """
    corpus, features = prepare(folder, pack_folder=pack_folder)
    names, _ = written_sessions(corpus)
    if names is None:
        raise UserError(
            f"{folder / 'sessions.json'}: is missing; add it, or name a data "
            "folder that has one."
        )
    speakers = [u.speaker for u in corpus.labelled]
    true = known_sessions(names, speakers)
    prints = pack_fingerprints(features, [u.path for u in corpus.labelled])
    share = Settings(SYSTEM).values["valid_fraction"]
    found, total = infer_sessions(prints, true.speaker), Counter()
    for seed in range(1, seeds + 1):
        shuffled = _shuffled(prints, true, seed)
        for order, one in {"in order": found, "shuffled": shuffled}.items():
            held = hold_out(one, share, seed)
            total[f"ARI, {order}"] += _mean_rand_index(one, true) / seeds
            total[f"shared, {order}"] += _shared(held, true) / seeds
    return dict(total)


def _shuffled(prints, true, seed):
    """Sessions that are inferred from shuffled lists, in the lists' order."""
    generator = np.random.default_rng(seed)
    drawn = np.arange(len(prints))
    for rows in true.rows():
        drawn[rows] = generator.permutation(rows)
    found = infer_sessions(prints[drawn], true.speaker)
    label = np.empty_like(found.label)
    label[drawn] = found.label
    return Sessions(label, found.speaker, found.ordered, found.order)


def _mean_rand_index(found, true):
    scores = [
        adjusted_rand_score(true.label[rows], found.label[rows])
        for rows in true.rows()
        if true.label[rows].max() > 0
    ]
    return float(np.mean(scores))


def _shared(held, true):
    """Share of the held-out utterances whose session isn't held out whole."""
    pairs = np.stack((true.speaker, true.label))
    session = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()
    return float(np.isin(session[held], session[~held]).mean())
