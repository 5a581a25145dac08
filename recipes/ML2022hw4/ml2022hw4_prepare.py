#!/usr/bin/env python3
"""Reads and checks a data folder in the form of ML2022 HW4, and packs it.

Usage: python ml2022hw4_prepare.py DATA_FOLDER [--on_bad_file stop | skip]
                                   [--max_bad_share 0.05] [--pack_folder DIR]

``train.py`` does the same before it trains. Nothing is trusted: no file is
unpickled, no path may leave the folder, every number is checked before it is
used. All problems are reported at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import stat
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from spkid.data import (
    POLICIES,
    Corpus,
    FeatureFiles,
    PackedFeatures,
    Utterance,
    check_feature_files,
    leave_out,
    open_features,
)
from spkid.errors import Problem, UserError, raise_for, run_command, table

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "data"
NEEDED = (
    "--data_folder must name the folder with mapping.json, metadata.json and "
    "testdata.json"
)
MAX_FRAMES, MAX_MELS = 10_000_000, 10_000  # 28 hours; beyond any front end
# Line breaks, NUL and half characters would break the text files of a run.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
AGAIN = "make or download it again"
KINDS = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
KINDS |= {float: "a decimal number", bool: "a boolean", type(None): "null"}


def _short(value: object, length: int = 60) -> str:
    """Foreign text, safe for a terminal: escaped and cut."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


class _Reader:
    """Reads a data folder and collects what is wrong: in ``problems``, or in
    ``bad`` what concerns a feature file alone, which can be skipped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n_mels = folder, 0
        self.speakers: tuple[str, ...] = ()  # by class index
        self.problems: list[Problem] = []
        self.bad: list[Problem] = []
        self.seen: dict[str, tuple[str, str]] = {}

    def wrong(self, file: str, entry: str, what: str, cure: str) -> None:
        self.problems.append(Problem(file, entry, what, cure))

    def json(self, file: str) -> dict | None:
        """An object whose keys are unique."""

        def unique(pairs: list[tuple[str, Any]]) -> dict:
            counts = Counter(key for key, _ in pairs)
            for key, count in counts.items():
                if count > 1:
                    entry = f"key {_short(key)}"
                    self.wrong(file, entry, "appears twice", "keep one")
            return dict(pairs)

        try:
            text = (self.folder / file).read_text(encoding="utf-8")
            content = json.loads(text, object_pairs_hook=unique)
        except FileNotFoundError:
            self.wrong(file, "", "the file is missing", NEEDED)
            return None
        except (OSError, ValueError, RecursionError) as error:
            self.wrong(file, "", f"not valid JSON ({error})", AGAIN)
            return None
        if not isinstance(content, dict):
            what = f"holds {KINDS[type(content)]}, not an object"
            self.wrong(file, "", what, AGAIN)
            return None
        return content

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
        if text and not UNPRINTABLE.search(text):
            return True
        wrong = "has control characters" if text else "is empty"
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

    def known(self, speaker: str, file: str) -> None:
        """Says if mapping.json lacks a speaker."""
        if self.speakers and speaker not in self.speakers:
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

    def utterance(
        self, entry: Any, speaker: str | None, file: str, where: str = ""
    ) -> list[Utterance]:
        """The utterance of a list's entry; none if the entry is wrong."""
        if not isinstance(entry, dict):
            entry = f"{where}{_short(entry)}"
            self.wrong(file, entry, "is not an object", AGAIN)
            return []
        path = self.value(entry, "feature_path", str, file, where)
        length = self.value(entry, "mel_len", int, file, where)
        if path is None or length is None:
            return []
        shown = f"{where}feature_path {_short(path)}"
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if not parts or path[0] in "/\\" or ".." in parts or ":" in parts[0]:
            cure = "give a path inside it"
            self.wrong(file, shown, "leaves the data folder", cure)
        elif not 0 < length < MAX_FRAMES:
            shown = f"{where}mel_len of {_short(path)}"
            cure = "give the number of frames"
            self.wrong(file, shown, f"is {_short(length)}", cure)
        elif self.name(path, f"{where}feature_path", file):
            return [Utterance(path, length, speaker)]
        return []

    def labelled(self, metadata: dict) -> list[Utterance]:
        """The training utterances, of each speaker at least one."""
        file, found = "metadata.json", []
        listed = self.value(metadata, "speakers", dict, file)
        if listed is None:
            return []
        for speaker in listed:
            self.known(speaker, file)
            for entry in self.value(listed, speaker, list, file) or ():
                where = f"{_short(speaker)}: "
                found += self.utterance(entry, speaker, file, where)
        for speaker in self.speakers:
            if listed.get(speaker, []) == []:
                what = "of mapping.json has no utterance"
                cure = "add some, or remove it from mapping.json"
                self.wrong(file, f"speaker {_short(speaker)}", what, cure)
        return found

    def test(self, testdata: dict) -> list[Utterance]:
        """The test utterances, with their speakers if these are known."""
        file, found = "testdata.json", []
        for entry in self.value(testdata, "utterances", list, file) or ():
            found += self.utterance(entry, None, file)
        file = "testlabels.json"
        labels = self.json(file) if (self.folder / file).exists() else None
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
        root, resolve = os.path.realpath(self.folder), cache(os.path.realpath)
        there = []
        for utterance in found:
            file = os.path.normpath(os.path.join(root, utterance.path))
            parent, base = os.path.split(file)
            real = os.path.join(resolve(parent), base)
            try:
                info = os.lstat(real)
                if stat.S_ISLNK(info.st_mode):
                    real = os.path.realpath(real)
                    info = os.stat(real)
                size = info.st_size if stat.S_ISREG(info.st_mode) else None
            except OSError:
                size = None
            entry = f"feature_path {_short(utterance.path)}"
            if os.path.commonpath((root, real)) != root:
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
            elif size:
                there.append(utterance)
            else:
                what = "is missing" if size is None else "has no bytes"
                what = f"the feature file {what}"
                cure = "download it again, or remove its entry"
                self.bad.append(Problem(utterance.path, "", what, cure))
            self.seen.setdefault(real, (utterance.path, listed))
        return there


def read_corpus(
    folder: str | Path, test_only: bool = False, on_bad_file: str = "stop"
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
    on_bad_file : str
        "stop" or "skip", as for :func:`spkid.data.leave_out`.

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
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; {NEEDED}.")
    reader = _Reader(folder)
    reader.read_speakers()
    labelled, test = [], []
    metadata = None if test_only else reader.json("metadata.json")
    if metadata is not None:
        reader.read_n_mels(metadata, "metadata.json")
        labelled = reader.labelled(metadata)
    if (testdata := reader.json("testdata.json")) is not None:
        reader.read_n_mels(testdata, "testdata.json")
        test = reader.test(testdata)
    there = reader.files(labelled, "metadata.json")
    there += reader.files(test, "testdata.json")
    if reader.problems or (reader.bad and on_bad_file == "stop"):
        if reader.n_mels:
            reader.bad += check_feature_files(folder, there, reader.n_mels)
        raise_for(reader.problems + reader.bad, folder)
    parts = tuple(labelled), tuple(test), tuple(u.path for u in test)
    return Corpus(folder, reader.n_mels, reader.speakers, *parts), reader.bad


def prepare(
    data_folder: str | Path,
    *,
    pack_folder: str | Path | None = None,
    pack: bool = True,
    pack_dtype: str = "float16",
    on_bad_file: str = "stop",
    max_bad_share: float = 0.05,
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
    on_bad_file, max_bad_share
        As for :func:`spkid.data.leave_out`.
    """
    corpus, problems = read_corpus(data_folder, test_only, on_bad_file)
    corpus = leave_out(corpus, problems, on_bad_file, max_bad_share)
    features, problems = open_features(
        corpus,
        pack_folder or DEFAULT_DATA / "packs",
        pack=pack,
        pack_dtype=pack_dtype,
        check=on_bad_file == "skip",
    )
    corpus = leave_out(corpus, problems, on_bad_file, max_bad_share)
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
            corpus.folder,
            len(copies),
            copies[0],
        )


def main(arguments: list[str]) -> None:
    """Checks and packs a data folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("--on_bad_file", choices=POLICIES, default="stop")
    parser.add_argument("--max_bad_share", type=float, default=0.05)
    parser.add_argument("--pack_folder", type=Path)
    corpus, features = prepare(**vars(parser.parse_args(arguments)))
    if corpus.skipped:
        print(f"Skipped:\n{table(corpus.skipped)}")
    print(
        f"{corpus.folder} is valid: {len(corpus.speakers)} speakers, "
        f"{len(corpus.labelled)} labelled and {len(corpus.test)} test "
        f"utterances, {features.lengths.sum() / 360_000:.1f} hours.\n"
        f"The pack is {features.file}."
    )


if __name__ == "__main__":
    run_command(main)
