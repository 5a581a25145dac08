"""Inferred sessions against those that somebody wrote down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.metrics import adjusted_rand_score
from variants import SYSTEM

import prepare
from ml2022hw4_prepare import read_corpus
from spkid.errors import UserError
from spkid.hparams import plain_values
from spkid.sessions.fingerprints import pack_fingerprints
from spkid.sessions.hold_out import hold_out
from spkid.sessions.infer import Sessions, infer_sessions, known_sessions
from spkid.sessions.split import written_sessions


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
        shuffled; and in both the share of the utterances held out as by
        default whose true session is in part left to training.

    Raises
    ------
    UserError
        If nobody wrote down the sessions.
    """
    corpus = read_corpus(folder)
    names, _ = written_sessions(corpus)
    if names is None:
        raise UserError(
            f"{folder / 'sessions.json'}: is missing; without true sessions "
            "there is nothing to score against."
        )
    pack = prepare.pack_corpus(corpus, pack_folder)
    speakers = [u.speaker for u in corpus.labelled]
    true = known_sessions(names, speakers)
    prints = pack_fingerprints(pack, [u.path for u in corpus.labelled])
    share = plain_values(SYSTEM)["valid_fraction"]
    found, total = infer_sessions(prints, true.speaker), {}

    def add(name, value):
        total[name] = total.get(name, 0) + value / seeds

    for seed in range(1, seeds + 1):
        shuffled = _shuffled(prints, true, seed)
        for order, one in {"in order": found, "shuffled": shuffled}.items():
            add(f"ARI, {order}", _mean_rand_index(one, true))
            held = hold_out(one, share, seed)
            add(f"shared, {order}", _shared(held, true))
    return total


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
