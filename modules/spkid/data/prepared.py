"""Recordings that were read: which are used, for what, and the files of that.

:func:`spkid.data.prepare_audio` reads them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spkid.errors import UserError
from spkid.files import save_atomically

N_MELS = 40
TABLE = "recordings.csv"


@dataclass
class Recording:
    """A file, and what became of it: a row of recordings.csv.

    Example
    -------
    >>> Recording("ann/a.wav", "ann", reason="unreadable: it is empty").verdict
    'skipped'
    """

    path: str  # in the folder of recordings, with slashes
    speaker: str = ""
    session: str = ""
    part: str = ""  # "train" or "test"
    seconds: float | None = None
    speech_seconds: float | None = None
    sample_rate: int | None = None  # Hz
    channels: int | None = None
    reason: str = ""  # "what: detail; what: detail"
    feature_path: str = ""  # in the data folder; empty if it is skipped
    mel_len: int = 0  # frames

    @property
    def verdict(self) -> str:
        """Whether it is "ok", read with a "warning", or "skipped"."""
        if not self.feature_path:
            return "skipped"
        return "warning" if self.reason else "ok"


Recordings = Sequence[Recording]  # in natural order, those of no use too


def _by_speaker(found: Recordings) -> dict[str, list[Recording]]:
    """Those that are used."""
    groups: dict[str, list[Recording]] = {}
    for one in found:
        if one.feature_path:
            groups.setdefault(one.speaker, []).append(one)
    return groups


def _used(found: Recordings) -> list[Recording]:
    return [one for own in _by_speaker(found).values() for one in own]


def _has_sessions(found: Recordings) -> bool:
    """Whether any is used that lies in a session's folder."""
    return any(one.path.count("/") > 1 for one in _used(found))


def leave_out_copies(found: Recordings) -> None:
    """Keeps the first of a speaker's equal recordings, and none of those that
    are equal to another speaker's: whose they are isn't known.

    Example
    -------
    >>> found = [Recording(f"{name}/a.wav", name, feature_path="uttr-1.pt")
    ...          for name in ("ann", "bob")]
    >>> leave_out_copies(found)
    >>> found[0].verdict, found[0].reason
    ('skipped', "MISTAKE, the same audio under two speakers: 'bob/a.wav'")
    """
    groups: dict[str, list[Recording]] = {}
    for one in _used(found):
        groups.setdefault(one.feature_path, []).append(one)
    for first, *more in groups.values():
        for one in more:
            what = "the same audio as an earlier file"
            if one.speaker != first.speaker:
                what = "MISTAKE, the same audio under two speakers"
                first.reason = f"{what}: {one.path!r}"
                first.feature_path = ""
            one.reason = f"{what}: {first.path!r}"
            one.feature_path = ""


def hold_out_sessions(
    found: Recordings, test_sessions: float | Sequence[str]
) -> None:
    """Says which recordings are for training and which for the test.

    Arguments
    ---------
    found : sequence of Recording
        Those that are used get their ``part``.
    test_sessions : float or sequence of str
        See :func:`spkid.data.prepare_audio`.

    Raises
    ------
    UserError
        If the share isn't one, or nothing has a name.

    Example
    -------
    >>> found = [Recording("", "ann", day, feature_path="a") for day in "1223"]
    >>> hold_out_sessions(found, 0.2)
    >>> [one.part for one in found]
    ['train', 'train', 'train', 'test']
    """
    share, names = 0.0, set()
    if isinstance(test_sessions, (int, float)):
        share = test_sessions
    else:
        names = set(test_sessions)
    if not 0 <= share < 1:
        raise UserError(f"test_sessions={share} must lie in [0, 1).")
    known = {f"{one.speaker}/{one.session}" for one in found if one.speaker}
    known |= {one.session for one in found if one.speaker}
    if wrong := sorted(names - known):
        raise UserError(
            f"test_sessions: there is no session {wrong[0]!r}; give names as "
            f"{max(known, default='')!r}."
        )
    for speaker, own in _by_speaker(found).items():
        sessions = list(dict.fromkeys(one.session for one in own))
        count = max(1, round(share * len(sessions))) if share else 0
        test = sessions[len(sessions) - count :]
        if names:
            test = [s for s in sessions if {s, f"{speaker}/{s}"} & names]
        if len(test) == len(sessions):  # one is left to train on
            del test[0]
        for one in own:
            one.part = "test" if one.session in test else "train"


def summary(found: Recordings) -> str:
    """What became of recordings, in a few lines.

    Example
    -------
    >>> print(summary([Recording("a.txt", reason="not audio")]))
    0 of 1 files are read: 0 speakers, 0.00 hours of speech, 0 for the test.
          1 skipped, not audio: 'a.txt'
    """
    groups, used = _by_speaker(found), _used(found)
    hours = sum(one.speech_seconds or 0 for one in used) / 3600
    test = sum(one.part == "test" for one in used)
    lines = [
        f"{len(used):,} of {len(found):,} files are read: {len(groups):,} "
        f"speakers, {hours:.2f} hours of speech, {test:,} for the test."
    ]
    kinds: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: one.verdict):
        for reason in filter(None, one.reason.split("; ")):
            what, _, detail = reason.partition(": ")
            example = f"{one.path!r}" + f" ({detail})" * bool(detail)
            kinds.setdefault(f"{one.verdict}, {what}", []).append(example)
    for what, examples in kinds.items():
        some = ", ".join(examples[:2]) + ", ..." * (len(examples) > 2)
        lines.append(f"{len(examples):>7,} {what}: {some}")
    if _has_sessions(found):
        sessions = {(one.speaker, one.session) for one in used}
        loose = sum(one.path.count("/") == 1 for one in used)
        lines.append(
            "Note: the first folder is the speaker, the second one the session "
            f"({len(sessions):,} in all), and deeper ones belong to it"
            + f"; a file without one is a session ({loose:,})" * bool(loose)
            + "."
        )
    elif used:
        lines.append(
            "Note: there are no folders of sessions (SPEAKER/SESSION/FILE); "
            "training will infer sessions from the features"
            + ", and those of the test are single files" * bool(test)
            + "."
        )
    bare = [
        name
        for name, own in groups.items()
        if len({one.session for one in own if one.part == "train"}) < 2
    ]
    if bare:
        lines.append(
            f"Note: {len(bare):,} of {len(groups):,} speakers, as {bare[0]!r}, "
            "have no second recording or session to train on, so they can't "
            "be validated; record more."
        )
    return "\n".join(lines)


def save_table(found: Recordings, folder: Path) -> None:
    """Writes recordings.csv: a row for each file.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> save_table([Recording("a.txt", reason="not audio")], folder)
    >>> print((folder / TABLE).read_text().splitlines()[1])
    skipped,a.txt,,,,,,,,not audio,,0
    """
    text = io.StringIO()
    columns = ["verdict", *Recording.__annotations__]
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(vars(one) | {"verdict": one.verdict} for one in found)
    # A file's name may be no text.
    content = text.getvalue().encode("utf-8", "backslashreplace")
    save_atomically(content, folder / TABLE)


def save_corpus(found: Recordings, folder: Path, silence: str) -> None:
    """Writes the JSON files of the HW4 data; the features are there already.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> found = [Recording("ann/a.wav", "ann", "a", "train", mel_len=120,
    ...                    feature_path="uttr-1.pt")]
    >>> save_corpus(found, folder, "vad")
    >>> json.loads((folder / "metadata.json").read_text())["speakers"]
    {'ann': [{'feature_path': 'uttr-1.pt', 'mel_len': 120}]}
    """
    groups, used = _by_speaker(found), _used(found)

    def entries(own: Recordings, part: str) -> list[dict]:
        return [
            {"feature_path": one.feature_path, "mel_len": one.mel_len}
            for one in own
            if one.part == part
        ]

    speakers = {name: entries(own, "train") for name, own in groups.items()}
    sessions = {
        one.feature_path: f"{one.speaker}/{one.session}" for one in used
    }
    contents = {
        "mapping.json": {
            "speaker2id": {name: i for i, name in enumerate(groups)},
            "id2speaker": {str(i): name for i, name in enumerate(groups)},
        },
        "metadata.json": {
            "n_mels": N_MELS,
            "silence": silence,
            "speakers": speakers,
        },
        "testdata.json": {
            "n_mels": N_MELS,
            "utterances": entries(used, "test"),
        },
        "testlabels.json": {
            one.feature_path: one.speaker for one in used if one.part == "test"
        },
        "sessions.json": sessions if _has_sessions(found) else {},
    }
    for name, content in contents.items():
        if content:
            save_atomically(json.dumps(content, indent=1), folder / name)
        else:  # an earlier run's
            (folder / name).unlink(missing_ok=True)
