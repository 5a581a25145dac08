"""What a data folder says, and all that is wrong in it, found in one pass.

Nothing in a data folder is trusted: no file is unpickled, no path may leave
it, and every number is looked at before anything is built on it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from spkid.data.corpus import Corpus, Utterance
from spkid.data.feature_file import load_feature_file
from spkid.errors import Problem, UserError, stop_for

NEEDED = "the folder with mapping.json, metadata.json and testdata.json"
MAX_FRAMES, MAX_MELS = 10_000_000, 10_000  # 28 hours; beyond any front end
# Line breaks, NUL and half characters: no text file of names survives them.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
AGAIN = "make or download it again"
POLICIES = ("stop", "skip")
MANY = 2**31 - 1
# What the keys of hparams/*.yaml may be; a float: any number in between.
LIMITS = {
    "seed": (0, 2**32 - 1),
    "valid_fraction": (0.0, 1.0),
    "known_fraction": (0.0, 1.0),
    "n_folds": (2, MANY),
    "fold": (0, MANY),
    "max_bad_share": (0.0, 1.0),
    "number_of_epochs": (1, MANY),
    "batch_size": (2, MANY),
    "segment_frames": (1, MANY),
    "max_frames_per_batch": (1, MANY),
    "average_checkpoints": (1, MANY),
    "nonfinite_patience": (0, MANY),
    "num_workers": (0, 1024),
    "lr": (0.0, 1e3),
    "weight_decay": (0.0, 1e3),
    "label_smoothing": (0.0, 1.0),
    "dropout": (0.0, 1.0),
    "d_model": (1, MANY),
    "n_layers": (1, MANY),
    "n_heads": (1, MANY),
    "d_ff": (1, MANY),
    "kernel_size": (1, MANY),
    "embedding_size": (1, MANY),
}


def read_json(path: Path) -> dict:
    """A JSON object without duplicate keys.

    Arguments
    ---------
    path : pathlib.Path
        The file.

    Returns
    -------
    dict

    Raises
    ------
    UserError
        If it is missing, isn't JSON, isn't an object or repeats a key.
    """
    reader = _Reader(Path(path).parent)
    content = reader.json(Path(path).name)
    stop_for(reader.problems, reader.folder)
    return content


def _short(value, length=60):
    """Foreign text, safe for a terminal: escaped and cut."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _without_utterance(speakers, heard):
    for speaker in speakers:
        if speaker not in heard:
            yield Problem(
                "metadata.json",
                f"speaker {_short(speaker)}",
                "of mapping.json has no utterance",
                "add some, or remove it from mapping.json",
            )


class _Reader:
    """Reads a data folder; whatever is wrong goes to ``problems``, and what
    is wrong with feature files alone, which can be skipped, to ``bad``."""

    def __init__(self, folder):
        self.folder, self.problems, self.bad = folder, [], []

    def wrong(self, *problem):
        self.problems.append(Problem(*problem))

    def json(self, file):
        """An object of unique keys; None where there is none."""

        def unique(pairs):
            counts = Counter(key for key, _ in pairs)
            for key, count in counts.items():
                if count > 1:
                    entry = f"key {_short(key)}"
                    self.wrong(file, entry, "stands there twice", "keep one")
            return dict(pairs)

        try:
            text = (self.folder / file).read_text(encoding="utf-8")
            content = json.loads(text, object_pairs_hook=unique)
        except FileNotFoundError:
            cure = f"--data_folder must name {NEEDED}"
            self.wrong(file, "", "the file is missing", cure)
            return None
        except (OSError, ValueError, RecursionError) as error:
            self.wrong(file, "", f"not valid JSON ({error})", AGAIN)
            return None
        if not isinstance(content, dict):
            what = f"holds a {type(content).__name__}, no object"
            self.wrong(file, "", what, AGAIN)
            return None
        return content

    def value(self, content, key, kind, file, where=""):
        """A value of the right type; None where there is none."""
        entry = f"{where}key {_short(key)}"
        if key not in content:
            self.wrong(file, entry, "is missing", "add it")
        elif type(content[key]) is not kind:  # True is no number
            what = f"is a {type(content[key]).__name__}, not a {kind.__name__}"
            self.wrong(file, entry, what, "correct it")
        else:
            return content[key]
        return None

    def name(self, text, what, file):
        """Whether a speaker's or a file's name can be one."""
        if text and not UNPRINTABLE.search(text):
            return True
        entry = f"{what} {_short(text)}"
        what = "has control characters" if text else "is empty"
        self.wrong(file, entry, what, "give it another name")
        return False

    def speakers(self, file="mapping.json"):
        """Speakers by class index: mapping.json alone decides."""
        mapping = self.json(file)
        if mapping is None:
            return []
        indices = self.value(mapping, "speaker2id", dict, file)
        names = self.value(mapping, "id2speaker", dict, file)
        if indices is None or names is None:
            return []
        before = len(self.problems)
        if not indices:
            cure = "give each speaker a number"
            self.wrong(file, "key 'speaker2id'", "is empty", cure)
        by_index, rule = {}, f"the whole numbers from 0 to {len(indices) - 1}"
        for speaker, index in indices.items():
            entry = f"'speaker2id' of {_short(speaker)}"
            self.name(speaker, "speaker", file)
            if type(index) is not int or not 0 <= index < len(indices):
                cure = f"use {rule}, each once"
                self.wrong(file, entry, f"is {_short(index)}", cure)
            elif index in by_index:
                what = f"is {index}, as that of {_short(by_index[index])}"
                self.wrong(file, entry, what, f"use {rule}, each once")
            else:
                by_index[index] = speaker
        if len(self.problems) > before:
            return []
        inverse = {str(index): name for index, name in by_index.items()}
        cure = "make 'id2speaker' the inverse of 'speaker2id'"
        for key in [*inverse, *(key for key in names if key not in inverse)]:
            if (theirs := names.get(key)) != inverse.get(key):
                what = f"is {_short(theirs)}, not {_short(inverse.get(key))}"
                self.wrong(file, f"'id2speaker' of {_short(key)}", what, cure)
        return [by_index[index] for index in range(len(by_index))]

    def n_mels(self, content, file):
        """Bands of each frame."""
        n_mels = self.value(content, "n_mels", int, file)
        if n_mels is not None and not 0 < n_mels <= MAX_MELS:
            what = f"is {_short(n_mels)}"
            self.wrong(file, "key 'n_mels'", what, "give the number of bands")
            return None
        return n_mels

    def utterance(self, entry, speaker, file, where):
        """One entry of a list of utterances; None if it is none."""
        if not isinstance(entry, dict):
            self.wrong(file, f"{where}{_short(entry)}", "is no object", AGAIN)
            return None
        path = self.value(entry, "feature_path", str, file, where)
        length = self.value(entry, "mel_len", int, file, where)
        if path is None or length is None:
            return None
        shown = f"{where}feature_path {_short(path)}"
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if not parts or path[0] in "/\\" or ".." in parts or ":" in parts[0]:
            cure = "give a path inside it"
            self.wrong(file, shown, "leaves the data folder", cure)
        elif not 0 < length < MAX_FRAMES:
            entry = f"{where}mel_len of {_short(path)}"
            self.wrong(file, entry, f"is {_short(length)}", "give its frames")
        elif self.name(path, f"{where}feature_path", file):
            return Utterance(path, length, speaker)
        return None

    def labelled(self, metadata, speakers, file="metadata.json"):
        """The training utterances."""
        listed = self.value(metadata, "speakers", dict, file)
        if listed is None:
            return []
        known, found = set(speakers), []
        for speaker in listed:
            if known and speaker not in known:
                what = "is missing from mapping.json's 'speaker2id'"
                cure = "add it there, or remove it here"
                self.wrong(file, f"speaker {_short(speaker)}", what, cure)
            for entry in self.value(listed, speaker, list, file) or ():
                where = f"{_short(speaker)}: "
                found.append(self.utterance(entry, speaker, file, where))
        heard = {speaker for speaker in listed if listed[speaker] != []}
        self.problems += _without_utterance(speakers, heard)
        return [utterance for utterance in found if utterance]

    def test(self, testdata, speakers, file="testdata.json"):
        """The test utterances, with their speakers where they are known."""
        entries = self.value(testdata, "utterances", list, file) or ()
        found = [self.utterance(entry, None, file, "") for entry in entries]
        found = [utterance for utterance in found if utterance]
        file, known = "testlabels.json", set(speakers)
        if not (self.folder / file).exists():
            return found, False
        labels = self.json(file)
        if labels is None:
            return found, False
        for utterance in found:
            speaker = self.value(labels, utterance.path, str, file)
            utterance.speaker = speaker
            if speaker is not None and known and speaker not in known:
                what = "is missing from mapping.json"
                cure = "add it there, or remove the utterance"
                self.wrong(file, f"speaker {_short(speaker)}", what, cure)
        return found, True

    def files(self, utterances, n_labelled):
        """Those whose file is there, once, and inside the folder, whatever
        links say; only these are ever opened."""
        root = os.path.realpath(self.folder)
        parents, seen, there = {}, {}, []
        for number, utterance in enumerate(utterances):
            file = os.path.normpath(os.path.join(root, utterance.path))
            parent, base = os.path.split(file)
            if parent not in parents:
                parents[parent] = os.path.realpath(parent)
            real = os.path.join(parents[parent], base)
            try:
                info = os.lstat(real)
                if stat.S_ISLNK(info.st_mode):
                    real = os.path.realpath(real)
                    info = os.stat(real)
            except OSError:
                info = None
            listed = "metadata.json" if number < n_labelled else "testdata.json"
            entry = f"feature_path {_short(utterance.path)}"
            if os.path.commonpath((root, real)) != root:
                what = "is a link that leaves the data folder"
                self.wrong(listed, entry, what, "copy the file into it")
            elif real in seen:
                path, first = seen[real]
                what = "is listed twice"
                if first != listed:
                    what = "is listed twice, for training and for test"
                if path != utterance.path:
                    what += f", once as {_short(path)}"
                self.wrong(listed, entry, what, "keep one")
            elif info is None or not stat.S_ISREG(info.st_mode):
                cure = "download it again, or remove its entry"
                what = "the feature file is missing"
                self.bad.append(Problem(utterance.path, "", what, cure))
            elif info.st_size == 0:
                what = "the feature file has no bytes"
                self.bad.append(Problem(utterance.path, "", what, AGAIN))
            else:
                there.append(utterance)
            seen.setdefault(real, (utterance.path, listed))
        return there


def unusable(
    folder: Path, utterances: Iterable[Utterance], n_mels: int
) -> list[Problem]:
    """Opens feature files; says which of them can't be used.

    Arguments
    ---------
    folder : pathlib.Path
        The data folder.
    utterances : iterable of Utterance
        Whose files to open.
    n_mels : int
        Bands that they must have.

    Returns
    -------
    list of Problem
        In the order of the utterances; nothing is unpickled.
    """

    def check(utterance):
        file = Path(folder, utterance.path)
        try:
            load_feature_file(file, n_mels, utterance.length)
        except UserError as error:
            words = str(error).removeprefix(f"{file}: ").rstrip(".")
            what, _, cure = words.partition("; ")
            return Problem(utterance.path, "", what, cure or AGAIN)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [problem for problem in pool.map(check, utterances) if problem]


def read_corpus(
    folder: str | Path,
    on_bad_file: str = "stop",
    max_bad_share: float = 0.05,
    test_only: bool = False,
) -> Corpus:
    """Reads and checks the JSON files of a data folder.

    Arguments
    ---------
    folder : str or pathlib.Path
        Holds mapping.json, metadata.json and testdata.json, and
        testlabels.json (feature path to speaker) where the test's labels are
        known.
    on_bad_file : str
        "stop", or "skip": to go on without feature files that can't be used.
        What is wrong in the JSON files always stops.
    max_bad_share : float
        Stops nevertheless if more than this share of the files is bad.
    test_only : bool
        Whether metadata.json and its files don't matter.

    Returns
    -------
    Corpus

    Raises
    ------
    UserError
        For all that is wrong, each with its file, its entry and the cure. If
        anything is, the feature files are opened, too, before it is raised,
        so that nothing is left for the next attempt.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; --data_folder must name "
            f"{NEEDED}."
        )
    if on_bad_file not in POLICIES:
        raise UserError(
            f"on_bad_file={on_bad_file!r} is none of {', '.join(POLICIES)}."
        )
    reader = _Reader(folder)
    speakers = reader.speakers()
    n_mels, labelled, test, has_labels = None, [], [], False
    metadata = None if test_only else reader.json("metadata.json")
    if metadata is not None:
        n_mels = reader.n_mels(metadata, "metadata.json")
        labelled = reader.labelled(metadata, speakers)
    if (testdata := reader.json("testdata.json")) is not None:
        theirs = reader.n_mels(testdata, "testdata.json")
        if test_only:
            n_mels = theirs
        elif None not in (n_mels, theirs) and theirs != n_mels:
            what = f"is {theirs}, but metadata.json's is {n_mels}"
            reader.wrong("testdata.json", "key 'n_mels'", what, "correct it")
        test, has_labels = reader.test(testdata, speakers)
    there = reader.files(labelled + test, len(labelled))
    stopped = reader.problems or (reader.bad and on_bad_file == "stop")
    if stopped and n_mels is not None:
        reader.bad += unusable(folder, there, n_mels)
    if reader.problems:
        stop_for(reader.problems + reader.bad, folder)
    corpus = Corpus(folder, n_mels, speakers, labelled, test, has_labels)
    corpus.on_bad_file, corpus.max_bad_share = on_bad_file, max_bad_share
    corpus.test_paths = [utterance.path for utterance in test]
    corpus.leave_out(reader.bad)
    return corpus
