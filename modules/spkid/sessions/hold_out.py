"""Which sessions, and which utterances of the others, are held out."""

from __future__ import annotations

import numpy as np

from spkid.sessions.infer import Sessions


def hold_out(sessions: Sessions, share: float, seed: int) -> np.ndarray:
    """Whole sessions to validate on, of each speaker with two or more.

    If the list is in the order of recording, a speaker's last sessions are
    held out: validation then predicts later recordings from earlier ones, and
    the two sets meet at a single boundary. If the last session is more than
    two thirds of the list, the first ones are held out. In lists without
    order, sessions are drawn at random, and each that brings the share nearer
    is taken; if none does, the first drawn that is at most half of the list.

    Arguments
    ---------
    sessions : Sessions
        Of all utterances.
    share : float
        Of a speaker's utterances, in (0, 1); whole sessions come as near to
        it as possible.
    seed : int
        Of the draw.

    Returns
    -------
    np.ndarray [utterances]
        bool, True for those to hold out.

    Example
    -------
    >>> from spkid.sessions import known_sessions
    >>> sessions = known_sessions([0, 0, 0, 1, 0], list("aaaab"))
    >>> hold_out(sessions, 0.25, seed=1)
    array([False, False, False,  True, False])
    """
    held = np.zeros(len(sessions.label), dtype=bool)
    generator = np.random.default_rng(seed)
    for rows in sessions.rows():
        label, count = sessions.label[rows], len(rows)
        sizes = np.bincount(label)
        if len(sizes) < 2:
            continue
        if sessions.ordered:
            cuts = np.flatnonzero(np.diff(label)) + 1
            if 3 * (count - cuts[-1]) <= 2 * count:
                cut = _nearest(cuts, count - share * count)
                held[rows[cut:]] = True
            else:
                held[rows[: _nearest(cuts, share * count)]] = True
            continue
        drawn = generator.permutation(len(sizes))
        chosen: list[int] = []
        missing = share * count
        for session in drawn:
            left = missing - sizes[session]
            if abs(left) < missing and len(chosen) < len(sizes) - 1:
                chosen.append(session)
                missing = left
        if not chosen:
            chosen = drawn[2 * sizes[drawn] <= count][:1].tolist()
        held[rows[np.isin(label, chosen)]] = True
    return held


def _nearest(values: np.ndarray, wanted: float) -> int:
    return values[np.abs(values - wanted).argmin()]


def fold_numbers(sessions: Sessions, folds: int, seed: int) -> np.ndarray:
    """Divides the sessions of each speaker among folds of about equal size.

    Arguments
    ---------
    sessions : Sessions
        Of all utterances.
    folds : int
        Number of folds, at least 2.
    seed : int
        Of the order among sessions of the same size.

    Returns
    -------
    np.ndarray [utterances]
        The fold that holds an utterance out; -1 for speakers with a single
        session, who are always trained on.

    Example
    -------
    >>> from spkid.sessions import known_sessions
    >>> sessions = known_sessions([0, 1, 1, 2, 0], list("aaaab"))
    >>> fold_numbers(sessions, 3, seed=0).tolist()[-1]
    -1
    """
    fold = np.full(len(sessions.label), -1)
    filled = np.zeros(folds)
    generator = np.random.default_rng(seed)
    for rows in sessions.rows():
        label = sessions.label[rows]
        sizes = np.bincount(label)
        if len(sizes) < 2:
            continue
        own = np.zeros(folds)
        drawn = generator.permutation(len(sizes))
        for session in sorted(drawn, key=lambda one: -sizes[one]):
            # First the speaker's sessions are spread, then the total.
            emptiest = np.lexsort((filled, own))[0]
            fold[rows[label == session]] = emptiest
            own[emptiest] += sizes[session]
            filled[emptiest] += sizes[session]
    return fold


def hold_out_known(
    sessions: Sessions, held: np.ndarray, share: float, seed: int
) -> np.ndarray:
    """Utterances to validate on from sessions that are also trained on.

    Arguments
    ---------
    sessions : Sessions
        Of all utterances.
    held : np.ndarray [utterances]
        True for those that are held out already.
    share : float
        Of the utterances, in [0, 1), spread evenly over the speakers.
    seed : int
        Of the draw.

    Returns
    -------
    np.ndarray [utterances]
        bool; each of their sessions keeps an utterance in training.

    Example
    -------
    >>> from spkid.sessions import known_sessions
    >>> sessions = known_sessions([0, 0, 1, 1], list("aaaa"))
    >>> held = np.array([False, False, True, True])
    >>> int(hold_out_known(sessions, held, 0.25, seed=0).sum())
    1
    """
    known = np.zeros(len(held), dtype=bool)
    generator = np.random.default_rng(seed)
    wanted = 0.5  # what one speaker cannot give, the next one gives
    for rows in sessions.rows():
        left = rows[~held[rows]]
        wanted = min(wanted, 1.0) + share * len(rows)
        remaining = np.bincount(sessions.label[left])
        for row in generator.permutation(left):
            if wanted >= 1 and remaining[sessions.label[row]] > 1:
                known[row] = True
                remaining[sessions.label[row]] -= 1
                wanted -= 1
    return known


def hold_out_random(speaker: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Random utterances of each speaker, but never all [utterances].

    Example
    -------
    >>> int(hold_out_random(np.zeros(8, dtype=int), 0.25, seed=0).sum())
    2
    """
    held = np.zeros(len(speaker), dtype=bool)
    generator = np.random.default_rng(seed)
    for rows in Sessions(speaker, speaker).rows():
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[generator.permutation(rows)[:count]] = True
    return held
