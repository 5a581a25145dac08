#!/usr/bin/env python3
"""Reads and checks a data folder in the form of ML2022 HW4, and packs it.

Usage: python ml2022hw4_prepare.py DATA_FOLDER [--on_bad_file stop | skip]
                   [--max_bad_share 0.05] [--speakers all | present]
                   [--pack_folder DIR] [--pack_dtype float16 | float32]
                   [--pack True | False]

``train.py`` does the same before it trains. Nothing is trusted: no file is
unpickled, no path may leave the folder, every number is checked before it is
used. All problems are reported at once.
"""

from __future__ import annotations

import signal

if __name__ in ("__main__", "__mp_main__") and (
    signal.getsignal(signal.SIGINT) != signal.SIG_IGN
):  # Ctrl-C in the imports is quiet
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import logging
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from spkid.audio import SILENCES
from spkid.data import (
    DTYPES,
    POLICIES,
    Corpus,
    FeatureFiles,
    PackedFeatures,
    Utterance,
    check_feature_files,
    leave_out,
    missing,
    open_features,
)
from spkid.data.corpus import SPEAKERS, without_utterance
from spkid.errors import DataError, Problem, raise_for, run_command, table
from spkid.files import KINDS, read_json
from spkid.keys import SHARE

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "data"
NEEDED = (
    "--data_folder must name the folder with mapping.json, metadata.json and "
    "testdata.json"
)
MAX_FRAMES, MAX_MELS = 10_000_000, 10_000  # 28 hours; beyond any front end
MAX_NAME = 1_000
MOST_PROBLEMS = 1_000  # in the JSON files, before reading them ends
# Line breaks, NUL and half characters would break the text files of a run.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
AGAIN = "make or download it again"


def _short(value: object, length: int = 60) -> str:
    """Foreign text, safe for a terminal: escaped and cut."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


class _Reader:
    """Reads a data folder and collects what is wrong: in ``problems``, or in
    ``bad`` what concerns a feature file alone, which can be skipped."""

    def __init__(self, folder: Path, need_all: bool) -> None:
        self.folder, self.n_mels, self.silence = folder, 0, "hw4"
        self.need_all = need_all  # whether each speaker must have utterances
        self.speakers: tuple[str, ...] = ()  # by class index
        self.names: frozenset[str] = frozenset()  # the same
        self.problems: list[Problem] = []
        self.bad: list[Problem] = []
        self.seen: dict[str, tuple[str, str]] = {}

    def wrong(self, file: str, entry: str, what: str, cure: str) -> None:
        self.problems.append(Problem(file, entry, what, cure))
        if len(self.problems) >= MOST_PROBLEMS:
            raise DataError(
                f"{self.folder}: {MOST_PROBLEMS:,} problems or more; the first "
                f"are:\n{table(self.problems[:20])}"
            )

    def json(self, file: str) -> dict | None:
        """An object whose keys are unique; None if there is none."""
        path = self.folder / file
        try:
            return read_json(path, inside=True)
        except DataError as error:
            problems = error.problems
        if not os.path.lexists(path) and problems[0].what.endswith("missing"):
            problems = [problems[0]._replace(cure=NEEDED)]
        self.problems += problems
        return None

    def value(
        self, content: dict, key: str, kind: type, file: str, where: str = ""
    ) -> Any:
        """A value of the right type; None if there is none."""
        entry = f"{where}key {_short(key)}"
        if key not in content:
            self.wrong(file, entry, "is missing", "add it")
        elif type(content[key]) is kind:  # True is not an integer
            return content[key]
        else:
            what = f"is {KINDS[type(content[key])]}, not {KINDS[kind]}"
            self.wrong(file, entry, what, "correct it")
        return None

    def name(self, text: str, what: str, file: str) -> bool:
        """Whether a speaker or a file can have this name."""
        wrong = "has control characters" if UNPRINTABLE.search(text) else ""
        if not 0 < len(text) <= MAX_NAME:
            wrong = f"has {len(text):,} characters, not 1 to {MAX_NAME:,}"
        if not wrong:
            return True
        self.wrong(file, f"{what} {_short(text)}", wrong, "rename it")
        return False

    def read_speakers(self, file: str = "mapping.json") -> None:
        """The speakers: mapping.json alone decides their order."""
        if (mapping := self.json(file)) is None:
            return
        indices = self.value(mapping, "speaker2id", dict, file)
        names = self.value(mapping, "id2speaker", dict, file)
        if indices is None or names is None:
            return
        by_index: dict[int, str] = {}
        before = len(self.problems)
        if not indices:
            self.wrong(file, "key 'speaker2id'", "is empty", "add speakers")
        rule = f"use the integers from 0 to {len(indices) - 1}, each once"
        for speaker, index in indices.items():
            entry = f"'speaker2id' of {_short(speaker)}"
            self.name(speaker, "speaker", file)
            if type(index) is not int or not 0 <= index < len(indices):
                self.wrong(file, entry, f"is {_short(index)}", rule)
            elif index in by_index:
                what = f"is {index}, like that of {_short(by_index[index])}"
                self.wrong(file, entry, what, rule)
            else:
                by_index[index] = speaker
        if len(self.problems) > before:
            return
        inverse = {str(index): name for index, name in by_index.items()}
        cure = "make 'id2speaker' the inverse of 'speaker2id'"
        for key in inverse | names:
            if (theirs := names.get(key)) != inverse.get(key):
                what = f"is {_short(theirs)}, not {_short(inverse.get(key))}"
                self.wrong(file, f"'id2speaker' of {_short(key)}", what, cure)
        self.speakers = tuple(by_index[index] for index in range(len(by_index)))
        self.names = frozenset(self.speakers)

    def known(self, speaker: str, file: str) -> None:
        """Says if mapping.json lacks a speaker."""
        if self.names and speaker not in self.names:
            entry, what = f"speaker {_short(speaker)}", "isn't in mapping.json"
            self.wrong(file, entry, what, "add it there, or remove it here")

    def read_n_mels(self, content: dict, file: str) -> None:
        """Bands of each frame, the same in both lists."""
        n_mels = self.value(content, "n_mels", int, file)
        if n_mels is None:
            return
        what, cure = f"is {_short(n_mels)}", "give the number of bands"
        if not 0 < n_mels <= MAX_MELS:
            self.wrong(file, "key 'n_mels'", what, cure)
        elif self.n_mels not in (0, n_mels):
            what += f", but metadata.json's is {self.n_mels}"
            self.wrong(file, "key 'n_mels'", what, cure)
        else:
            self.n_mels = n_mels

    def read_silence(self, metadata: dict) -> None:
        """How recordings became features: HW4's data don't say it."""
        self.silence = metadata.get("silence", "hw4")
        if self.silence not in SILENCES:
            what, cure = f"is {_short(self.silence)}", "give vad or hw4"
            self.wrong("metadata.json", "key 'silence'", what, cure)

    def utterances(
        self, entries: list, speaker: str | None, file: str
    ) -> list[Utterance]:
        """The utterances of a list, without the entries that are wrong."""
        found = []
        whose = "" if speaker is None else f"{_short(speaker)}, "
        for number, entry in enumerate(entries, 1):
            where = f"{whose}utterance {number} of {len(entries)}"
            if not isinstance(entry, dict):
                what = f"is {_short(entry)}, not an object"
                self.wrong(file, where, what, AGAIN)
                continue
            if isinstance(entry.get("feature_path"), str):
                where += f" ({_short(entry['feature_path'])})"
            where += ": "
            path = self.value(entry, "feature_path", str, file, where)
            length = self.value(entry, "mel_len", int, file, where)
            if path is None or length is None:
                continue
            parts = PurePosixPath(path.replace("\\", "/")).parts
            if not parts or ".." in parts or re.search("[/:]", parts[0]):
                what, cure = "leaves the data folder", "give a path inside it"
                if parts and re.search("[^:]:.|..:", parts[0]):  # not "C:"
                    what = "has a colon in its first part, as a drive has"
                    cure += ", or rename the file and its entry"
                self.wrong(file, f"{where}the path", what, cure)
            elif not 0 < length < MAX_FRAMES:
                what, cure = f"is {_short(length)}", "give the number of frames"
                self.wrong(file, f"{where}key 'mel_len'", what, cure)
            elif self.name(path, f"{where}feature_path", file):
                found.append(Utterance(path, length, speaker))
        return found

    def labelled(self, metadata: dict) -> list[Utterance]:
        """The training utterances, of each speaker at least one."""
        file, found = "metadata.json", []
        listed = self.value(metadata, "speakers", dict, file)
        if listed is None:
            return []
        for speaker in listed:
            self.known(speaker, file)
            entries = self.value(listed, speaker, list, file) or []
            found += self.utterances(entries, speaker, file)
        absent = [n for n in self.speakers if listed.get(n, []) == []]
        total = len(self.speakers)
        if absent and (self.need_all or len(absent) == total):
            self.problems.append(without_utterance(file, absent, total))
        return found

    def test(self, testdata: dict) -> list[Utterance]:
        """The test utterances, with their speakers if these are known."""
        file = "testdata.json"
        entries = self.value(testdata, "utterances", list, file) or []
        found = self.utterances(entries, None, file)
        file, labels = "testlabels.json", None
        if os.path.lexists(self.folder / file):
            labels = self.json(file)
        if labels is None:
            return found
        for number, utterance in enumerate(found):
            speaker = self.value(labels, utterance.path, str, file)
            if speaker is not None:
                self.known(speaker, file)
            found[number] = replace(utterance, speaker=speaker)
        return found

    def files(self, found: list[Utterance], listed: str) -> list[Utterance]:
        """Those whose file is there, once, and inside the folder, wherever
        links lead; only these are ever opened."""
        strange = [u.path for u in found if not missing.can_be_named(u.path)]
        if strange:
            entry = f"feature_path {_short(strange[0])} (1 of {len(strange)})"
            what = "can't be named in this system's locale"
            self.wrong(listed, entry, what, missing.IN_UTF8)
            return []
        root, resolve = os.path.realpath(self.folder), cache(os.path.realpath)
        there = []
        for utterance in found:
            file = os.path.normpath(os.path.join(root, utterance.path))
            parent, base = os.path.split(file)
            real = os.path.join(resolve(parent), base)
            real, what, cure = missing.look_at(real)
            entry = f"feature_path {_short(utterance.path)}"
            if not f"{real}{os.sep}".startswith(os.path.join(root, "")):
                what = "is a link that leaves the data folder"
                self.wrong(listed, entry, what, "copy the file into it")
            elif real in self.seen:
                path, first = self.seen[real]
                what = "is listed twice"
                if first != listed:
                    what = "is listed twice, for training and for test"
                if path != utterance.path:
                    what += f", once as {_short(path)}"
                self.wrong(listed, entry, what, "keep one")
            elif what:
                self.bad.append(Problem(utterance.path, "", what, cure))
            else:
                there.append(utterance)
            self.seen.setdefault(real, (utterance.path, listed))
        return there


def read_corpus(
    folder: str | Path,
    test_only: bool = False,
    on_bad_file: str = "stop",
    speakers: str = "all",
) -> tuple[Corpus, list[Problem]]:
    """Reads and checks the JSON files of a data folder.

    Arguments
    ---------
    folder : str or pathlib.Path
        Holds mapping.json, metadata.json and testdata.json; and
        testlabels.json (feature path to speaker) if the test's labels are
        known.
    test_only : bool
        Whether metadata.json and its files are ignored.
    on_bad_file, speakers : str
        As for :func:`spkid.data.leave_out`.

    Returns
    -------
    tuple
        The corpus, and a problem for each feature file that is missing or
        empty; the others have not been opened.

    Raises
    ------
    UserError
        For all that is wrong in the JSON files, and for any bad feature file
        if these must stop. All feature files are opened before it is raised,
        so that no problem is left for the next attempt.
    """
    folder = Path(folder)
    missing.check_folder(folder, NEEDED)
    reader = _Reader(folder, speakers == "all")
    reader.read_speakers()
    labelled, test = [], []
    metadata = None if test_only else reader.json("metadata.json")
    if metadata is not None:
        reader.read_n_mels(metadata, "metadata.json")
        reader.read_silence(metadata)
        labelled = reader.labelled(metadata)
    if (testdata := reader.json("testdata.json")) is not None:
        reader.read_n_mels(testdata, "testdata.json")
        test = reader.test(testdata)
    there = reader.files(labelled, "metadata.json")
    there += reader.files(test, "testdata.json")
    paths = [utterance.path for utterance in labelled + test]
    reader.bad, none_there = missing.explain(reader.bad, folder, paths)
    reader.problems += none_there
    if reader.problems or (reader.bad and on_bad_file == "stop"):
        if reader.n_mels:
            reader.bad += check_feature_files(folder, there, reader.n_mels)
        raise_for(reader.problems + reader.bad, folder)
    parts = tuple(labelled), tuple(test), tuple(u.path for u in test)
    corpus = Corpus(
        *(folder, reader.n_mels, reader.speakers, *parts),
        silence=reader.silence,
    )
    return corpus, reader.bad


def prepare(
    data_folder: str | Path,
    *,
    pack_folder: str | Path | None = None,
    pack: bool = True,
    pack_dtype: str = "float16",
    on_bad_file: str = "stop",
    max_bad_share: float = 0.05,
    speakers: str = "all",
    test_only: bool = False,
) -> tuple[Corpus, PackedFeatures | FeatureFiles]:
    """A data folder's corpus and features, without the files that are skipped.

    Arguments
    ---------
    data_folder, test_only
        As for :func:`read_corpus`.
    pack_folder : str or pathlib.Path, optional
        Where packs are kept; None: data/packs of this project.
    pack, pack_dtype
        As for :func:`spkid.data.open_features`.
    on_bad_file, max_bad_share, speakers
        As for :func:`spkid.data.leave_out`.
    """
    SHARE.check(max_bad_share, "max_bad_share")
    policy = on_bad_file, max_bad_share, speakers
    corpus, bad = read_corpus(data_folder, test_only, on_bad_file, speakers)
    corpus = leave_out(corpus, bad, *policy)
    features, bad = open_features(
        corpus,
        pack_folder or DEFAULT_DATA / "packs",
        pack=pack,
        pack_dtype=pack_dtype,
        check=True,
    )
    corpus = leave_out(corpus, bad, *policy)
    if isinstance(features, PackedFeatures):
        _warn_of_copies(corpus, features)
    return corpus, features


def _warn_of_copies(corpus: Corpus, pack: PackedFeatures) -> None:
    """Names files that hold the same features."""
    seen: dict[tuple[int, int], str] = {}
    copies = []
    for row, path in enumerate(pack.paths):
        key = int(pack.lengths[row]), int(pack.checksums[row])
        if seen.setdefault(key, path) != path:
            copies.append(f"{path} and {seen[key]}")
    if copies:
        logging.getLogger(__name__).warning(
            "%s: %d feature files hold what another one holds (%s, ...); "
            "copies make the measured accuracy too optimistic.",
            *(corpus.folder, len(copies), copies[0]),
        )


def data_options() -> argparse.ArgumentParser:
    """Options of :func:`prepare`, for the commands that call it; what isn't
    given is absent."""
    options = argparse.ArgumentParser(
        add_help=False, argument_default=argparse.SUPPRESS
    )
    options.add_argument("--on_bad_file", choices=POLICIES)
    options.add_argument("--max_bad_share", type=float)
    options.add_argument("--speakers", choices=SPEAKERS)
    options.add_argument("--pack_folder", type=Path)
    options.add_argument("--pack_dtype", choices=DTYPES)
    flags = {"True": True, "False": False}
    options.add_argument("--pack", type=flags.get, choices=flags.values())
    return options


def main(arguments: list[str]) -> None:
    """Checks and packs a data folder."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        parents=[data_options()],
    )
    parser.add_argument("data_folder", type=Path)
    args = parser.parse_args(arguments)
    corpus, features = prepare(**vars(args))
    if corpus.skipped:
        print(f"Skipped:\n{table(corpus.skipped)}")
    print(
        f"{corpus.folder} is valid: {len(corpus.speakers)} speakers, "
        f"{len(corpus.labelled)} labelled and {len(corpus.test)} test "
        f"utterances, {features.lengths.sum() / 360_000:.1f} hours."
    )
    if features.file:
        print(f"The pack is {features.file}.")


if __name__ == "__main__":
    run_command(main)
