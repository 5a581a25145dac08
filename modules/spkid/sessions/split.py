"""What is trained on and what is validated on.

``session`` holds out whole recording sessions, which no training utterance
of the speaker shares, and beside them a few utterances of sessions that are
trained on. The accuracy on the first predicts that on new recordings; the
second flatters.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from ml2022hw4_prepare import read_json
from spkid.data.corpus import Corpus, manifest
from spkid.data.pack import PackedFeatures
from spkid.errors import UserError
from spkid.files import save_atomically
from spkid.sessions.fingerprints import pack_fingerprints
from spkid.sessions.hold_out import (
    fold_numbers,
    hold_out,
    hold_out_known,
)
from spkid.sessions.infer import Sessions, infer_sessions, known_sessions

BY_SESSION = ("session", "folds")
SPLITS = (*BY_SESSION, "random", "none")
# The keys of the YAML file that decide a split.
KEYS = (
    "split",
    "valid_fraction",
    "known_fraction",
    "sessions",
    "n_folds",
    "fold",
    "seed",
)


def written_sessions(corpus: Corpus) -> tuple[list[str] | None, str]:
    """The session of each labelled utterance, where the data folder says it.

    Arguments
    ---------
    corpus : Corpus
        Its folder may hold sessions.json (feature path to session, a text or
        a whole number), or its feature paths may be speaker/session/file, by
        the speaker's very name.

    Returns
    -------
    tuple
        A list of names, and what says so; None where nothing does.

    Raises
    ------
    UserError
        If sessions.json doesn't name an utterance's session.
    """
    path = corpus.folder / "sessions.json"
    if path.exists():
        names = read_json(path)
        for utterance in corpus.labelled:
            name = names.get(utterance.path)
            if not isinstance(name, str | int):
                raise UserError(
                    f"{path}: {utterance.path!r} has "
                    + ("no session" if name is None else f"session {name!r}")
                    + "; name one, by a text or a whole number, for each "
                    "labelled utterance, or give --sessions inferred."
                )
        said = [str(names[u.path]) for u in corpus.labelled]
        return said, "as sessions.json says"
    parts = [Path(u.path).parts for u in corpus.labelled]
    if all(
        len(own) == 3 and own[0] == utterance.speaker
        for own, utterance in zip(parts, corpus.labelled, strict=True)
    ):
        return [own[1] for own in parts], "the folders speaker/session/file"
    return None, ""


def sessions_digest(corpus: Corpus, choices: dict) -> str | None:
    """What sessions.json holds, if the split is made of it.

    Arguments
    ---------
    corpus : Corpus
        The data.
    choices : dict
        The values of ``KEYS``.

    Returns
    -------
    str
        16 hexadecimal digits; None if it isn't there or doesn't matter.
    """
    path = corpus.folder / "sessions.json"
    used = choices["split"] in BY_SESSION and choices["sessions"] == "auto"
    if not (used and path.exists()):
        return None
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def find_sessions(
    corpus: Corpus, pack: PackedFeatures, sessions: str = "auto"
) -> tuple[Sessions, str]:
    """The sessions of the labelled utterances, and where they are from.

    Arguments
    ---------
    corpus : Corpus
        The data.
    pack : PackedFeatures
        Their features.
    sessions : str
        "auto": as the data folder says, else inferred; or "inferred".

    Returns
    -------
    tuple
        The sessions and a sentence about them.
    """
    if sessions not in ("auto", "inferred"):
        raise UserError(f"sessions={sessions!r} is neither auto nor inferred.")
    speakers = [u.speaker for u in corpus.labelled]
    if sessions == "auto":
        names, source = written_sessions(corpus)
        if names is not None:
            return known_sessions(names, speakers), source
    prints = pack_fingerprints(pack, [u.path for u in corpus.labelled])
    found = infer_sessions(prints, speakers)
    how = "clustered; the lists' order says nothing"
    if found.ordered:
        how = f"runs of the lists; neighbours are {found.order:.2f} x as far"
        how += " apart as random pairs"
    return found, f"inferred from the features ({how})"


def _hold_out_random(speaker, share, seed):
    """Utterances at random, whatever their session; of each speaker at least
    one, but never all."""
    held = np.zeros(len(speaker), dtype=bool)
    generator = np.random.default_rng(seed)
    for rows in Sessions(speaker, speaker).rows():
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[generator.permutation(rows)[:count]] = True
    return held


def divide(
    corpus: Corpus, pack: PackedFeatures, choices: dict
) -> tuple[dict[str, dict], dict]:
    """Manifests of the training and validation utterances, and a report.

    Arguments
    ---------
    corpus : Corpus
        The data.
    pack : PackedFeatures
        Their features.
    choices : dict
        The values of ``KEYS``.

    Returns
    -------
    tuple of dict
        "train" and "valid", where ``part`` says of a validation utterance
        whether its session is "new" or "known", or the draw "random"; and
        speakers with their sessions, warnings, and where sessions are from.

    Raises
    ------
    UserError
        If a choice is none, or nothing can be held out.
    """
    split, seed = choices["split"], choices["seed"]
    _check(choices)
    names = [u.speaker for u in corpus.labelled]
    speaker = np.unique(names, return_inverse=True)[1]
    known = np.zeros(len(names), dtype=bool)
    sessions, source = None, "not looked for"
    if split in BY_SESSION:
        sessions, source = find_sessions(corpus, pack, choices["sessions"])
        if split == "folds":
            held = fold_numbers(sessions, choices["n_folds"], seed)
            held = held == choices["fold"]
        else:
            held = hold_out(sessions, choices["valid_fraction"], seed)
        known = hold_out_known(sessions, held, choices["known_fraction"], seed)
    elif split == "random":
        held = _hold_out_random(speaker, choices["valid_fraction"], seed)
    else:
        held = known.copy()
    if split == "folds" and not held.any() and (sessions.label > 0).any():
        raise UserError(
            f"fold={choices['fold']} holds out nothing: no speaker has so many "
            f"sessions; give a smaller --n_folds than {choices['n_folds']}."
        )
    if split != "none" and not held.any():
        raise UserError(
            f"{corpus.folder / 'metadata.json'}: no speaker has two "
            + ("utterances" if split == "random" else "sessions")
            + ("" if sessions is None else f" (sessions are {source})")
            + ", so nothing can be held out for validation; record more"
            + _other_split(split, source)
        )
    parts = {"train": {}, "valid": {}}
    entries = manifest(corpus.labelled)
    for row, (key, entry) in enumerate(entries.items()):
        if sessions is not None:
            entry["session"] = f"{entry['spk_id']}-{sessions.label[row]}"
        if held[row] or known[row]:
            new = "random" if split == "random" else "new"
            entry["part"] = new if held[row] else "known"
        parts["train" if "part" not in entry else "valid"][key] = entry
    return parts, _report(names, sessions, source, held, known, split)


def _other_split(split, source):
    if split == "random":
        return "."
    if "inferred" in source:
        return ", or give --split random, which flatters."
    return ", or give --sessions inferred."


def _check(choices):
    if choices["split"] not in SPLITS:
        raise UserError(
            f"split={choices['split']!r} is none of {', '.join(SPLITS)}."
        )
    if not 0 < choices["valid_fraction"] < 1:
        raise UserError(
            f"valid_fraction={choices['valid_fraction']} isn't in (0, 1)."
        )
    if not 0 <= choices["known_fraction"] < 1:
        raise UserError(
            f"known_fraction={choices['known_fraction']} isn't in [0, 1)."
        )
    if not 0 <= choices["fold"] < choices["n_folds"]:
        raise UserError(
            f"fold={choices['fold']} isn't in 0 ... n_folds - 1 = "
            f"{choices['n_folds'] - 1}."
        )


def _report(names, sessions, source, held, known, split):
    """Speakers with their sessions, and what cannot be validated."""
    unique, speaker = np.unique(names, return_inverse=True)
    speakers = {}
    for name, rows in zip(
        unique.tolist(), Sessions(speaker, speaker).rows(), strict=True
    ):
        count = None if sessions is None else sessions.label[rows].max() + 1
        speakers[name] = {
            "utterances": len(rows),
            "sessions": count and int(count),
            "held_out": int(held[rows].sum()),
        }
    bare = [name for name, entry in speakers.items() if not entry["held_out"]]
    warnings = []
    if bare and split != "none":
        some = ", ".join(bare[:5]) + (", ..." if len(bare) > 5 else "")
        why = "most for want of a second session"
        if split == "random":
            why = "for want of a second utterance"
        elif split == "folds":
            why = "for want of a second session, or in another fold"
        warnings.append(
            f"{len(bare)} of {len(speakers)} speakers have nothing held out, "
            f"{why}: {some}; the validation says nothing about them."
        )
    if held.any() and split in BY_SESSION and not known.any():
        trained = zip(speaker[~held], sessions.label[~held], strict=True)
        cure = "no session that is trained on has a second utterance."
        if max(Counter(trained).values(), default=0) > 1:
            cure = "a larger --known_fraction would do it."
        warnings.append(
            "nothing is held out of known sessions, so there is no gap to "
            f"see; {cure}"
        )
    if "clustered" in source:
        warnings.append(
            "the order of the lists says nothing about sessions, so utterances "
            "were clustered; that divides a speaker with a single session, "
            "too. A sessions.json in the data folder would be surer."
        )
    if split == "random":
        warnings.append(
            "split: random validates on sessions that are trained on, which "
            "flatters; --split session is honest."
        )
    return {
        "sessions": source,
        "held_out": int(held.sum()),
        "known": int(known.sum()),
        "warnings": warnings,
        "speakers": speakers,
    }


def write_manifests(
    corpus: Corpus, pack: PackedFeatures, folder: str | Path, choices: dict
) -> None:
    """Writes train.json, valid.json and test.json in SpeechBrain's form, and
    split_report.json.

    A split that is there already, whole, made of the same files by the same
    choices, is left as it is.

    Arguments
    ---------
    corpus : Corpus
        The data.
    pack : PackedFeatures
        Their features.
    folder : str or pathlib.Path
        Where to.
    choices : dict
        Holds the values of ``KEYS``; may hold more.
    """
    folder = Path(folder)
    choices = {key: choices[key] for key in KEYS}
    made_of = {
        "data": corpus.digest(),
        "written_sessions": sessions_digest(corpus, choices),
        **choices,
    }
    done = folder / "split.json"
    files = ("train.json", "valid.json", "test.json", "split_report.json")
    whole = all((folder / name).exists() for name in (done.name, *files))
    if whole and read_json(done) == made_of:
        return
    parts, report = divide(corpus, pack, choices)
    parts["test"] = manifest(corpus.test)
    for name, part in parts.items():
        save_atomically(json.dumps(part, indent=1), folder / f"{name}.json")
    save_atomically(json.dumps(report, indent=1), folder / "split_report.json")
    save_atomically(json.dumps(made_of, indent=1), done)
    if choices["split"] in BY_SESSION:
        print(f"Sessions are {report['sessions']}.")
    for warning in report["warnings"]:
        print(f"Note: {warning}", flush=True)
