"""What is trained on and what is validated on.

``session`` holds out whole recording sessions, which no training utterance
of the speaker shares, and a few utterances of sessions that are trained on.
Accuracy on the first predicts accuracy on new recordings; accuracy on the
second is too optimistic.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from spkid.data import Corpus, FeatureFiles, PackedFeatures, manifest
from spkid.errors import DataError, UserError
from spkid.files import MAX_JSON, open_regular, read_json, save_atomically
from spkid.sessions.fingerprints import pack_fingerprints
from spkid.sessions.hold_out import (
    fold_numbers,
    hold_out,
    hold_out_known,
    hold_out_random,
)
from spkid.sessions.infer import (
    Sessions,
    infer_sessions,
    known_sessions,
    numbered,
)

BY_SESSION = ("session", "folds")
SPLITS = (*BY_SESSION, "random", "none")
SOURCES = ("auto", "inferred")
FILES = ("train.json", "valid.json", "test.json", "split_report.json")
# The keys of the YAML file that decide a split.
SPLIT_KEYS = (
    "split",
    "valid_fraction",
    "known_fraction",
    "sessions",
    "n_folds",
    "fold",
    "seed",
)


def written_sessions(corpus: Corpus) -> tuple[list[str] | None, str]:
    """The session of each labelled utterance, if the data folder names it.

    Arguments
    ---------
    corpus : Corpus
        Its folder may hold sessions.json (feature path to session, a text or
        a whole number), or its feature paths may be speaker/session/file,
        with the speaker's exact name.

    Returns
    -------
    tuple
        The names, or None, and where they are from.

    Raises
    ------
    UserError
        If sessions.json can't be read, or lacks an utterance's session.

    Example
    -------
    >>> from spkid.data import Utterance
    >>> utterance = Utterance("ann/monday/a.pt", 9, "ann")
    >>> written_sessions(Corpus(Path("data"), 40, labelled=(utterance,)))
    (['monday'], 'read from the folders speaker/session/file')
    """
    path = corpus.folder / "sessions.json"
    if os.path.lexists(path):
        names = read_json(path, inside=True)
        for utterance in corpus.labelled:
            name = names.get(utterance.path)
            if type(name) not in (str, int):  # True is no number
                raise UserError(
                    f"{path}: {utterance.path!r} has "
                    + (
                        "no session"
                        if name is None
                        else f"session {name!a:.60}"
                    )
                    + "; give each labelled utterance a text or a whole "
                    "number, or give --sessions inferred."
                )
        found = [str(names[u.path]) for u in corpus.labelled]
        return found, "read from sessions.json"
    parts = [Path(u.path).parts for u in corpus.labelled]
    if all(
        len(own) == 3 and own[0] == utterance.speaker
        for own, utterance in zip(parts, corpus.labelled, strict=True)
    ):
        found = [own[1] for own in parts]
        return found, "read from the folders speaker/session/file"
    return None, ""


def sessions_digest(corpus: Corpus, choices: dict[str, Any]) -> str | None:
    """16 hexadecimal digits that identify the content of sessions.json; None
    if there is none, or the split doesn't depend on it.

    Example
    -------
    >>> sessions_digest(Corpus(Path("data"), 40), {"split": "random"})
    """
    path = corpus.folder / "sessions.json"
    used = choices["split"] in BY_SESSION and choices["sessions"] == "auto"
    if not (used and os.path.lexists(path)):
        return None
    read_json(path, inside=True)  # refuses what is no file of sessions
    return _digest(path)


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.blake2b(file.read(MAX_JSON), digest_size=8).hexdigest()


def find_sessions(
    corpus: Corpus,
    features: PackedFeatures | FeatureFiles,
    sessions: str = "auto",
) -> tuple[Sessions, str]:
    """The sessions of the labelled utterances, and where they are from.

    Arguments
    ---------
    corpus : Corpus
        The data.
    features : PackedFeatures or FeatureFiles
        Their features.
    sessions : str
        "auto": from the data folder, else inferred; or "inferred".

    Example
    -------
    >>> from spkid.data import Utterance
    >>> utterances = [Utterance(f"ann/{n}/a.pt", 9, "ann") for n in range(3)]
    >>> corpus = Corpus(Path("data"), 40, ("ann",), tuple(utterances))
    >>> features = FeatureFiles(corpus.folder, utterances, n_mels=40)
    >>> find_sessions(corpus, features)[0].label
    array([0, 1, 2])
    """
    speakers = [str(u.speaker) for u in corpus.labelled]
    if sessions == "auto":
        names, source = written_sessions(corpus)
        if names is not None:
            return known_sessions(names, speakers), source
    prints = pack_fingerprints(features, [u.path for u in corpus.labelled])
    found = infer_sessions(prints, speakers)
    if not found.ordered:
        how = "by clustering (the list order carries no information)"
        return found, f"inferred {how}"
    how = f"neighbours {found.order:.2f} times as far apart as random pairs"
    return found, f"inferred from list order ({how})"


def divide(
    corpus: Corpus,
    features: PackedFeatures | FeatureFiles,
    choices: dict[str, Any],
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Manifests of the training and validation utterances, and a report.

    Arguments
    ---------
    corpus : Corpus
        The data.
    features : PackedFeatures or FeatureFiles
        Their features.
    choices : dict
        The values of ``SPLIT_KEYS``; each must be a valid one.

    Returns
    -------
    tuple of dict
        "train" and "valid", where ``part`` says whether the session of a
        validation utterance is "new" or "known", or that it was drawn at
        "random"; and speakers with their sessions, warnings, and where the
        sessions are from.

    Raises
    ------
    UserError
        If nothing can be held out.

    Example
    -------
    >>> from spkid.data import Utterance
    >>> utterances = [Utterance(f"ann/{n}/a.pt", 9, "ann") for n in range(3)]
    >>> corpus = Corpus(Path("data"), 40, ("ann",), tuple(utterances))
    >>> features = FeatureFiles(corpus.folder, utterances, n_mels=40)
    >>> choices = {"split": "session", "sessions": "auto", "seed": 0,
    ...            "valid_fraction": 0.3, "known_fraction": 0.0}
    >>> parts, report = divide(corpus, features, choices)
    >>> len(parts["train"]), len(parts["valid"])
    (2, 1)
    """
    split, seed = choices["split"], choices["seed"]
    share = choices["valid_fraction"]
    names = [str(u.speaker) for u in corpus.labelled]
    speaker = numbered(names)
    held = known = np.zeros(len(names), dtype=bool)
    sessions, source = None, "not needed"
    if split in BY_SESSION:
        sessions, source = find_sessions(corpus, features, choices["sessions"])
        if split == "folds":
            folds = fold_numbers(sessions, choices["n_folds"], seed)
            held = folds == choices["fold"]
            divided = _count(sessions)
            if not held.any() and divided:
                raise UserError(
                    f"fold={choices['fold']} holds nothing out: there are "
                    f"{divided} sessions to divide; give --n_folds {divided} "
                    f"and a --fold from 0 to {divided - 1}."
                )
        else:
            held = hold_out(sessions, share, seed)
        known = hold_out_known(sessions, held, choices["known_fraction"], seed)
    elif split == "random":
        held = hold_out_random(speaker, share, seed)
    if split != "none" and not held.any():
        what = "utterances"
        cure = "give --split none, which validates nothing"
        if len(set(names)) < len(names):  # a speaker has two utterances
            what = f"sessions (they were {source})"
            cure = "give --split random, which is too optimistic"
            needed = choices["fold"] + 1 if split == "folds" else 1
            if not source.startswith("inferred") and needed <= _count(
                find_sessions(corpus, features, "inferred")[0]
            ):
                cure = "give --sessions inferred"
        raise UserError(
            f"{corpus.folder / 'metadata.json'}: no speaker has two {what}, so "
            f"nothing can be held out for validation; record more, or {cure}."
        )
    parts: dict[str, dict] = {"train": {}, "valid": {}}
    entries = manifest(corpus.labelled)
    for row, (key, entry) in enumerate(entries.items()):
        if sessions is not None:
            entry["session"] = f"{entry['spk_id']}-{sessions.label[row]}"
        if held[row] or known[row]:
            new = "random" if split == "random" else "new"
            entry["part"] = new if held[row] else "known"
        parts["train" if "part" not in entry else "valid"][key] = entry
    return parts, _report(names, sessions, source, held, known, split)


def _count(sessions: Sessions) -> int:
    """The sessions of those speakers who have more than one."""
    counts = [sessions.label[rows].max() + 1 for rows in sessions.rows()]
    return int(sum(count for count in counts if count > 1))


def _report(names, sessions, source, held, known, split) -> dict[str, Any]:
    """Speakers with their sessions, and what cannot be validated."""
    speaker, speakers = numbered(names), {}
    for rows in Sessions(speaker, speaker).rows():
        count = None if sessions is None else sessions.label[rows].max() + 1
        speakers[names[rows[0]]] = {
            "utterances": len(rows),
            "sessions": count and int(count),
            "held_out": int(held[rows].sum()),
        }
    bare = [name for name, entry in speakers.items() if not entry["held_out"]]
    warnings = []
    if bare and split != "none":
        some = ", ".join(bare[:5]) + (", ..." if len(bare) > 5 else "")
        why = {
            "session": "most have a single session",
            "folds": "they have a single session, or are in another fold",
            "random": "they have a single utterance",
        }[split]
        warnings.append(
            f"{len(bare)} of {len(speakers)} speakers have nothing held out "
            f"({why}), so they are not validated: {some}."
        )
    if sessions is not None and held.any() and not known.any():
        trained = zip(speaker[~held], sessions.label[~held], strict=True)
        cure = "no session that is trained on has a second utterance"
        if max(Counter(trained).values(), default=0) > 1:
            cure = "give a larger --known_fraction"
        warnings.append(
            "nothing is held out of known sessions, so the gap cannot be "
            f"measured; {cure}."
        )
    if "clustering" in source:
        warnings.append(
            "the list order carries no information about sessions, so the "
            "utterances were clustered, which also divides speakers with a "
            "single session. A sessions.json in the data folder is more "
            "reliable."
        )
    if split == "random":
        warnings.append(
            "--split random validates on sessions that are trained on, which "
            "is too optimistic; --split session is not, where speakers have "
            "several sessions."
        )
    return {
        "sessions": source,
        "held_out": int(held.sum()),
        "known": int(known.sum()),
        "warnings": warnings,
        "speakers": speakers,
    }


def write_manifests(
    corpus: Corpus,
    features: PackedFeatures | FeatureFiles,
    folder: str | Path,
    choices: dict[str, Any],
) -> None:
    """Writes train.json, valid.json and test.json in SpeechBrain's form, and
    split_report.json.

    A whole split of the same files by the same choices is left as it is; one
    of which a file is missing or damaged is made again, and is the same.

    Arguments
    ---------
    corpus : Corpus
        The data.
    features : PackedFeatures or FeatureFiles
        Their features.
    folder : str or pathlib.Path
        Where to write.
    choices : dict
        The values of ``SPLIT_KEYS``; other keys are ignored.

    Example
    -------
    >>> from spkid.data import Utterance
    >>> folder, utterance = getfixture("tmp_path"), Utterance("a.pt", 9, "ann")
    >>> corpus = Corpus(folder, 40, ("ann",), labelled=(utterance,))
    >>> features = FeatureFiles(folder, corpus.utterances, n_mels=40)
    >>> choices = dict.fromkeys(SPLIT_KEYS, 0) | {"split": "none"}
    >>> write_manifests(corpus, features, folder, choices)
    >>> list(read_json(folder / "train.json"))
    ['a.pt']
    """
    folder = Path(folder)
    choices = {key: choices[key] for key in SPLIT_KEYS}
    made_of = {
        "data": corpus.digest(),
        "written_sessions": sessions_digest(corpus, choices),
        **choices,
    }
    done = folder / "split.json"
    try:
        kept = {name: _digest(folder / name) for name in FILES}
        if read_json(done) == {**made_of, "files": kept}:
            return
    except (OSError, DataError):  # none yet, or damaged
        pass
    parts, report = divide(corpus, features, choices)
    parts["test"] = manifest(corpus.test)
    save_atomically("{}", done)  # the mark that what follows is ours
    contents = [*(parts[name] for name in ("train", "valid", "test")), report]
    for name, content in zip(FILES, contents, strict=True):
        save_atomically(json.dumps(content, indent=1), folder / name)
    made_of["files"] = {name: _digest(folder / name) for name in FILES}
    save_atomically(json.dumps(made_of, indent=1), done)
    if choices["split"] in BY_SESSION:
        print(f"Sessions: {report['sessions']}.")
    for warning in report["warnings"]:
        print(f"Note: {warning}", flush=True)
