"""A data folder is read whole, or refused with all that is wrong in it."""

import csv
import errno
import gzip
import json
import os
import pickle
import re
import shutil
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from corpus import make_corpus
from harness import assert_one_sentence, run, run_predict, run_train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ml2022hw4_prepare
from ml2022hw4_prepare import prepare, read_corpus
from predict import write_submission
from spkid import cli, files
from spkid.data import FeatureFiles, Utterance, build, feature_file
from spkid.errors import DataError, UserError
from spkid.sessions import divide, sessions_digest, written_sessions

NAMES = ("mapping.json", "metadata.json", "testdata.json", "testlabels.json")
SESSIONS = "sessions.json"
FILE = "uttr-0-0.pt"  # the first of speaker id00000


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid") / "data"
    return make_corpus(folder, n_utterances=4, n_test=4)


@pytest.fixture
def data(valid, tmp_path):
    return shutil.copytree(valid, tmp_path / "data")


def load(data, **options):
    """All that train.py does with a data folder before it trains."""
    return prepare(data, pack_folder=data.parent / "packs", **options)


# --- what a valid folder gives ---------------------------------------------


@pytest.fixture
def standard(tmp_path):
    return make_corpus(tmp_path / "data")


def test_classes_come_from_mapping_alone(standard):
    corpus, problems = read_corpus(standard)
    assert not problems
    mapping = json.loads((standard / "mapping.json").read_text())
    assert corpus.speakers == tuple(mapping["speaker2id"])
    assert corpus.speakers != tuple(
        json.loads((standard / "metadata.json").read_text())["speakers"]
    )
    assert len(corpus.labelled) == 32
    assert len(corpus.test) == 6
    assert None not in {u.speaker for u in corpus.test}
    assert corpus.test_paths == tuple(u.path for u in corpus.test)


def test_a_test_without_labels_is_fine(tmp_path):
    corpus, _ = read_corpus(make_corpus(tmp_path / "d", labels=False))
    assert [u.speaker for u in corpus.test] == [None] * 6


def test_a_wrong_folder_is_refused_with_what_is_needed(tmp_path):
    words = r"must name the folder with mapping.json, metadata.json and test"
    with pytest.raises(UserError, match=words):
        read_corpus(tmp_path)
    with pytest.raises(UserError, match=words):
        read_corpus(tmp_path / "nowhere")


def test_more_than_ten_classes_keep_their_order(tmp_path):
    corpus, _ = read_corpus(make_corpus(tmp_path / "d", n_speakers=12))
    mapping = json.loads((tmp_path / "d" / "mapping.json").read_text())
    indices = [mapping["speaker2id"][s] for s in corpus.speakers]
    assert indices == list(range(12))


def test_a_test_alone_needs_no_training_data(standard, tmp_path):
    (standard / "metadata.json").unlink()
    for path in standard.glob("uttr-[0-9]*"):
        path.unlink()
    (standard / "uttr-test-0.pt").write_bytes(b"x")
    corpus, features = prepare(
        standard,
        pack=False,
        test_only=True,
        on_bad_file="skip",
        max_bad_share=1,
    )
    assert isinstance(features, FeatureFiles)
    assert (corpus.n_mels, len(corpus.speakers)) == (40, 4)
    assert not corpus.labelled
    assert features.paths == [u.path for u in corpus.test]
    assert len(corpus.test) == 5 and len(corpus.test_paths) == 6
    with pytest.raises(UserError, match=r"uttr-test-0\.pt: not a readable"):
        prepare(standard, pack_folder=tmp_path, test_only=True)


def test_recordings_become_data_as_the_readme_says(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for name in ("ann/1", "ann/2", "bob/1", "bob/2"):
        path = tmp_path / "recordings" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.normal(0, 0.1, 32000), 16000)
    readme = Path(ml2022hw4_prepare.__file__).with_name("README.md")
    text = readme.read_text(encoding="utf-8")
    assert "\npython -m spkid prepare RECORDINGS data/mine\n" in text
    monkeypatch.chdir(tmp_path)
    # The detector hears no speech in noise.
    cli.main(["prepare", "recordings", "data", "--silence", "hw4"])
    corpus, _ = prepare(tmp_path / "data", pack_folder=tmp_path / "packs")
    assert corpus.speakers == ("ann", "bob")
    assert [u.speaker for u in corpus.labelled] == ["ann"] * 2 + ["bob"] * 2
    assert corpus.silence == "hw4"


# --- mutations: functions of the folder -----------------------------------


def edit(name, change):
    def mutate(data):
        content = json.loads((data / name).read_text())
        change(content)
        (data / name).write_text(json.dumps(content))

    return mutate


def first(content):
    return next(iter(content["speakers"].values()))[0]


def entry(**changes):
    return edit("metadata.json", lambda c: first(c).update(changes))


def heldout(**changes):
    return edit("testdata.json", lambda c: c["utterances"][0].update(changes))


def mapping(**changes):
    return edit("mapping.json", lambda c: c.update(changes))


def numbers(**changes):
    return edit("mapping.json", lambda c: c["speaker2id"].update(changes))


def names(**changes):
    return edit("mapping.json", lambda c: c["id2speaker"].update(changes))


def speakers(**changes):
    return edit("metadata.json", lambda c: c["speakers"].update(changes))


def top(name, **changes):
    return edit(name, lambda c: c.update(changes))


def drop(name, key):
    return edit(name, lambda c: c.pop(key))


def write(name, content):
    return lambda data: (data / name).write_bytes(content)


def remove(name):
    return lambda data: (data / name).unlink()


def cut(name, share=0.6):
    def mutate(data):
        content = (data / name).read_bytes()
        (data / name).write_bytes(content[: int(share * len(content))])

    return mutate


def both(*mutations):
    return lambda data: [mutate(data) for mutate in mutations]


def rename_speaker(new):
    def mutate(data):
        for name in NAMES:
            text = (data / name).read_text()
            text = text.replace('"id00000"', json.dumps(new))
            (data / name).write_text(text)

    return mutate


def rename_file(new):
    return lambda data: [
        (data / name).write_text(
            (data / name).read_text().replace(f'"{FILE}"', json.dumps(new))
        )
        for name in (*NAMES, SESSIONS)
    ]


def link_out(data):
    (data / FILE).rename(data.parent / "outside.pt")
    (data / FILE).symlink_to(data.parent / "outside.pt")


def folder_link_out(data):
    (data.parent / "elsewhere").mkdir()
    (data / FILE).rename(data.parent / "elsewhere" / "a.pt")
    (data / "sub").symlink_to(data.parent / "elsewhere")
    entry(feature_path="sub/a.pt")(data)


def link_loop(data):
    remove(FILE)(data)
    (data / FILE).symlink_to(data / FILE)


def link_inside(data):
    remove(FILE)(data)
    (data / FILE).symlink_to(data / "uttr-0-1.pt")


def rename(new):
    def mutate(data):
        (data / new).parent.mkdir(exist_ok=True)
        (data / FILE).rename(data / new)

    return mutate


def become(make):
    return lambda data: (remove(FILE)(data), make(data / FILE))


def copy_of_the_first(content):
    content["utterances"].append(content["utterances"][0])


def tensor(change):
    def mutate(data):
        torch.save(change(torch.load(data / FILE)), data / FILE)

    return mutate


def value_at(value, row=0):
    def change(mel):
        mel[row, 3] = value
        return mel

    return tensor(change)


class Canary:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def code(save):
    return lambda data: save(Canary(data.parent / "canary"), data / FILE)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


MAP, META, TEST, LABELS = NAMES
NO_JSON = "not valid JSON"
LEAVES = "leaves the data folder"
# What is done: the file that must be named, and words that stand beside it.
JSON_MUTATIONS = {
    "no mapping": (remove(MAP), MAP, "the file is missing"),
    "no metadata": (remove(META), META, "the file is missing"),
    "no testdata": (remove(TEST), TEST, "the file is missing"),
    "empty mapping file": (write(MAP, b""), MAP, NO_JSON),
    "empty metadata file": (write(META, b""), META, NO_JSON),
    "empty testlabels file": (write(LABELS, b""), LABELS, NO_JSON),
    "cut mapping": (cut(MAP), MAP, NO_JSON),
    "cut metadata": (cut(META), META, NO_JSON),
    "cut testdata": (cut(TEST), TEST, NO_JSON),
    "cut testlabels": (cut(LABELS), LABELS, NO_JSON),
    "cut by one": (cut(META, 0.9999), META, NO_JSON),
    "no text": (write(TEST, b"\xff\xfe{"), TEST, "isn't text in UTF-8"),
    "a mark before it": (write(TEST, b"\xef\xbb\xbf{"), TEST, NO_JSON),
    "deep nesting": (write(TEST, b"[" * 100_000), TEST, NO_JSON),
    "a number of 5,000 digits": (
        write(TEST, b'{"n_mels": ' + b"4" * 5000 + b"}"),
        TEST,
        NO_JSON,
    ),
    "a list": (write(MAP, b"[]"), MAP, "holds a list"),
    "null": (write(META, b"null"), META, "holds", "not an object"),
    "a key twice": (
        write(MAP, b'{"speaker2id": {}, "speaker2id": {}}'),
        MAP,
        "key 'speaker2id'",
        "appears twice",
    ),
    "a speaker twice": (
        lambda d: write(
            META, (d / META).read_bytes().replace(b"id00001", b"id00000")
        )(d),
        META,
        "key 'id00000'",
        "appears twice",
    ),
    "no speaker2id": (drop(MAP, "speaker2id"), MAP, "'speaker2id'", "missing"),
    "no id2speaker": (drop(MAP, "id2speaker"), MAP, "'id2speaker'", "missing"),
    "speaker2id a list": (
        mapping(speaker2id=[]),
        MAP,
        "is a list, not an object",
    ),
    "id2speaker null": (mapping(id2speaker=None), MAP, "is null, not an obj"),
    "nobody": (mapping(speaker2id={}), MAP, "'speaker2id'", "is empty"),
    "a gap": (numbers(id00000=7), MAP, "'id00000'", "is 7", "from 0 to 3"),
    "below 0": (numbers(id00000=-1), MAP, "'id00000'", "is -1"),
    "two of one index": (numbers(id00000=1), MAP, "is 1, like that of"),
    "an index in text": (numbers(id00000="3"), MAP, "'id00000'", "is '3'"),
    "an index with a point": (numbers(id00000=3.0), MAP, "is 3.0"),
    "an index that is true": (numbers(id00002=True), MAP, "is True"),
    "not the inverse": (names(**{"0": "x"}), MAP, "'id2speaker' of '0'"),
    "a name too many": (names(**{"9": "x"}), MAP, "'id2speaker' of '9'"),
    "a name too few": (
        edit(MAP, lambda c: c["id2speaker"].pop("2")),
        MAP,
        "'id2speaker' of '2'",
        "is None",
    ),
    "a speaker in two lines": (
        rename_speaker("a\nb"),
        MAP,
        r"speaker 'a\nb'",
        "control characters",
    ),
    "a speaker of half characters": (
        rename_speaker("\ud800"),
        MAP,
        "control characters",
    ),
    "a speaker without a name": (rename_speaker(""), MAP, "has 0 characters"),
    "a speaker of a novel's name": (
        rename_speaker("x" * 10**6),
        MAP,
        "has 1,000,000 characters, not 1 to 1,000",
    ),
    "no n_mels": (drop(META, "n_mels"), META, "key 'n_mels'", "is missing"),
    "n_mels in text": (top(META, n_mels="40"), META, "'n_mels'", "is a string"),
    "n_mels true": (top(META, n_mels=True), META, "'n_mels'", "is a boolean"),
    "n_mels 0": (both(top(META, n_mels=0)), META, "'n_mels'", "is 0"),
    "n_mels below 0": (top(TEST, n_mels=-40), TEST, "'n_mels'", "is -40"),
    "n_mels huge": (top(META, n_mels=10**9), META, "'n_mels'", "1000000000"),
    "other n_mels": (top(TEST, n_mels=80), TEST, "is 80, but"),
    "speakers a list": (
        top(META, speakers=[]),
        META,
        "is a list, not an object",
    ),
    "speakers missing": (drop(META, "speakers"), META, "'speakers'", "missing"),
    "a speaker no list": (
        speakers(id00000={}),
        META,
        "'id00000'",
        "is an object, not",
    ),
    "a speaker without any": (
        speakers(id00000=[]),
        META,
        "speaker 'id00000'",
        "has no usable utterance",
    ),
    "a speaker not there": (
        edit(META, lambda c: c["speakers"].pop("id00001")),
        META,
        "speaker 'id00001'",
        "has no usable utterance",
    ),
    "an unknown speaker": (
        speakers(id9=[]),
        META,
        "speaker 'id9'",
        "isn't in mapping.json",
    ),
    "an entry in text": (
        speakers(id00000=["x"]),
        META,
        "'id00000', utterance 1 of 1",
        "is 'x', not an object",
    ),
    "an entry of null": (
        edit(TEST, lambda c: c["utterances"].append(None)),
        TEST,
        "utterance 5 of 5",
        "is None, not an object",
    ),
    "no utterances": (
        drop(TEST, "utterances"),
        TEST,
        "'utterances'",
        "missing",
    ),
    "utterances an object": (
        top(TEST, utterances={}),
        TEST,
        "is an object, not a list",
    ),
    "no path": (
        edit(META, lambda c: first(c).pop("feature_path")),
        META,
        "'id00000', utterance 1 of 4: key 'feature_path'",
        "is missing",
    ),
    "a path of numbers": (entry(feature_path=7), META, "is an integer, not"),
    "no length": (
        edit(META, lambda c: first(c).pop("mel_len")),
        META,
        "'mel_len'",
        "is missing",
    ),
    "negative": (entry(mel_len=-3), META, f"('{FILE}'): key 'mel_len'", "-3"),
    "zero": (
        heldout(mel_len=0),
        TEST,
        "utterance 1 of 4 ('uttr-test-0.pt'): key 'mel_len'",
        "is 0",
    ),
    "the third of a speaker": (
        edit(META, lambda c: c["speakers"]["id00002"][2].update(mel_len=0.5)),
        META,
        "'id00002', utterance 3 of 4 ('uttr-2-2.pt'): key 'mel_len'",
        "is a decimal number",
    ),
    "huge": (entry(mel_len=10**12), META, "is 1000000000000"),
    "a fraction": (
        entry(mel_len=30.5),
        META,
        "'mel_len'",
        "is a decimal number",
    ),
    "not a number": (entry(mel_len=float("nan")), META, "is a decimal number"),
    "a length in text": (entry(mel_len="30"), META, "'mel_len'", "is a string"),
    "a length that is true": (heldout(mel_len=True), TEST, "is a boolean, not"),
    "absolute": (entry(feature_path="/etc/passwd"), META, LEAVES),
    "climbs": (entry(feature_path="a/../../x.pt"), META, LEAVES),
    "climbs in the test": (heldout(feature_path="../x.pt"), TEST, LEAVES),
    "climbs, Windows": (entry(feature_path="..\\x.pt"), META, LEAVES),
    "a drive": (entry(feature_path="C:\\x.pt"), META, LEAVES),
    "a share": (entry(feature_path="\\\\host\\x.pt"), META, LEAVES),
    "empty path": (entry(feature_path=""), META, LEAVES),
    "the folder itself": (entry(feature_path="."), META, LEAVES),
    "a NUL": (entry(feature_path="a\0.pt"), META, "control characters"),
    "an escape": (rename_file("\x1b[2J.pt"), META, r"\x1b", "control"),
    "half a character": (rename_file("\udcff.pt"), META, "control characters"),
    "a link": (link_out, META, f"'{FILE}'", "is a link that leaves"),
    "a linked folder": (folder_link_out, META, "is a link that leaves"),
    "the same file by a link": (link_inside, META, "once as 'uttr-0-0.pt'"),
    "the same file by a dot": (
        heldout(feature_path="./uttr-test-1.pt"),
        TEST,
        "'uttr-test-1.pt'",
        "is listed twice, once as './uttr-test-1.pt'",
    ),
    "twice": (edit(TEST, copy_of_the_first), TEST, "is listed twice"),
    "twice in training": (
        edit(META, lambda c: c["speakers"]["id00001"].append(first(c))),
        META,
        f"'{FILE}'",
        "is listed twice",
    ),
    "test in training": (
        heldout(feature_path=FILE),
        TEST,
        f"'{FILE}'",
        "is listed twice, for training and for test",
    ),
    "no label": (drop(LABELS, "uttr-test-0.pt"), LABELS, "'uttr-test-0.pt'"),
    "a strange label": (
        top(LABELS, **{"uttr-test-0.pt": "id7"}),
        LABELS,
        "'id7'",
        "isn't in mapping.json",
    ),
    "a label of numbers": (
        top(LABELS, **{"uttr-test-0.pt": 7}),
        LABELS,
        "is an integer, not a string",
    ),
}
# What each of the JSON files may be instead, whichever it is.
SPOILED = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link outside": lambda path: path.symlink_to("../kept.json"),
    "a link to nothing": lambda path: path.symlink_to("nothing.json"),
    "a link to nothing outside": lambda path: path.symlink_to("/no/a.json"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to its folder": lambda path: path.symlink_to("."),
    "a terabyte": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "empty": Path.touch,
    "zeros": lambda path: path.write_bytes(bytes(999)),
    "only a mark": lambda path: path.write_bytes(b"\xef\xbb\xbf"),
    "a half UTF-16": lambda path: path.write_bytes(b"\xff\xfe{"),
    "a half UTF-32": lambda path: path.write_bytes(b"\xff\xfe\0\0{\0"),
    "Latin-1": lambda path: path.write_bytes(b'{"caf\xe9": 1}'),
    "compressed": lambda path: path.write_bytes(gzip.compress(b"{}")),
    "a web page": lambda path: path.write_bytes(b"<html>404</html>"),
    "a pointer": lambda path: path.write_bytes(b"version https://git-lfs.gi"),
    "NaN": lambda path: path.write_bytes(b"NaN"),
    "a list": lambda path: path.write_bytes(b"[{}]"),
    "a text": lambda path: path.write_bytes(b'"a"'),
    "a long number": lambda path: path.write_bytes(
        b'{"a": 1%s}' % (b"0" * 5000)
    ),
    "deep lists": lambda path: path.write_bytes(b"[" * 10**6),
    "deep objects": lambda path: path.write_bytes(b'{"a":' * 10**6),
    "a key twice": lambda path: path.write_bytes(b'{"a": 1, "a": 1}'),
    "half a character": lambda path: path.write_bytes(b'{"a": "\\ud8'),
}
# What can be skipped: one feature file, always the same one.
FILE_MUTATIONS = {
    "missing": (remove(FILE), "is missing"),
    "no bytes": (write(FILE, b""), "has no bytes"),
    "of another case": (rename(FILE.upper()), f"there is '{FILE.upper()}'"),
    "in a folder": (rename(f"a/{FILE}"), f"there is 'a/{FILE}'"),
    "a NumPy array": (rename("uttr-0-0.npy"), "there is 'uttr-0-0.npy'"),
    "a folder": (become(Path.mkdir), "is not a regular file"),
    "a pipe": (become(os.mkfifo), "is not a regular file"),
    "a link to itself": (link_loop, "can't be read"),
    "half a file": (cut(FILE), "not a readable"),
    "rubbish": (write(FILE, os.urandom(3000)), "not a readable"),
    "rubbish in a zip": (write(FILE, b"PK\x03\x04rub"), "not a readable"),
    "a web page": (write(FILE, b"<html>404</html>"), "not a readable"),
    "code": (code(torch.save), "not a readable"),
    "code, old form": (code(legacy), "not a readable"),
    "code, bare pickle": (code(plain_pickle), "not a readable"),
    "integers": (tensor(torch.Tensor.int), "no float tensor"),
    "complex": (tensor(lambda m: m * 1j), "no float tensor"),
    "a list": (tensor(torch.Tensor.tolist), "no float tensor"),
    "a dict": (tensor(lambda m: {"mel": m}), "no float tensor"),
    "sparse": (tensor(torch.Tensor.to_sparse), "no float tensor"),
    "without values": (tensor(lambda m: m.to("meta")), "no float tensor"),
    "of 8 bits": (
        tensor(lambda m: torch.quantize_per_tensor(m, 0.1, 0, torch.qint8)),
        "no",
    ),
    "one dimension": (tensor(torch.Tensor.flatten), "its shape is"),
    "three dimensions": (tensor(lambda m: m[None]), "its shape is"),
    "turned": (tensor(lambda m: m.T.contiguous()), "its shape is"),
    "other bands": (tensor(lambda m: m[:, :39]), "n_mels=40"),
    "a frame too few": (tensor(lambda m: m[1:]), "'mel_len' in the JSON"),
    "nothing": (tensor(lambda m: m[:0]), "has 0 frames"),
    "NaN": (value_at(float("nan")), "NaN or infinite"),
    "NaN at the end": (value_at(float("nan"), -1), "NaN or infinite"),
    "infinite": (value_at(float("-inf")), "NaN or infinite"),
}


def assert_one_line_says(message, file, words):
    lines = [line for line in message.splitlines() if file in line]
    assert any(all(w in line for w in words) for line in lines), message


@pytest.mark.parametrize("name", JSON_MUTATIONS)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_error_in_the_json_always_stops(data, name, policy):
    mutate, file, *words = JSON_MUTATIONS[name]
    mutate(data)
    with pytest.raises(UserError) as caught:
        load(data, on_bad_file=policy)
    message = str(caught.value)
    assert message.startswith(str(data))
    assert_one_line_says(message, file, words)
    assert message.isprintable() or "\n" in message
    assert not (data.parent / "packs").exists()


def read_all(data):
    """All that a run reads of the JSON files."""
    corpus, _ = load(data)
    return corpus, sessions_digest(corpus, CHOICES), written_sessions(corpus)


@pytest.mark.parametrize("file", [*NAMES, SESSIONS])
@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_file_is_refused_in_a_sentence(data, file, name):
    (data / file).rename(data.parent / "kept.json")
    SPOILED[name](data / file)
    with pytest.raises(DataError) as caught:
        read_all(data)
    message = str(caught.value)
    assert message.startswith(f"{data / file}: ")
    assert "\n" not in message and message.isprintable()
    assert (data.parent / "packs").exists() == (file == SESSIONS)


@pytest.mark.parametrize("file", [*NAMES, SESSIONS])
def test_a_file_that_may_not_be_read_is_refused(data, file, monkeypatch):
    os_open = os.open

    def refuse(path, *more):
        if Path(path).name == file:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os_open(path, *more)

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(DataError) as caught:
        read_all(data)
    assert str(caught.value) == (
        f"{data / file}: can't be read (Permission denied); change its "
        "permissions, or name another place."
    )


@pytest.mark.parametrize("file", [*NAMES, SESSIONS])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_windows_editors_are_read(data, file, encoding):
    before = read_all(data)
    (data / file).write_text((data / file).read_text(), encoding)
    after = read_all(data)
    assert after[0] == before[0] and after[2] == before[2]


@pytest.mark.parametrize("file", [MAP, META, TEST])
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "1" * 4000])
def test_numbers_that_are_none_are_refused(data, file, value):
    text = (data / file).read_text()
    number = re.compile(r": -?\d+")
    for place in list(number.finditer(text))[:3]:
        changed = f"{text[: place.start()]}: {value}{text[place.end() :]}"
        (data / file).write_text(changed)
        with pytest.raises(UserError, match=file) as caught:
            load(data)
        assert len(str(caught.value)) < 500


def test_a_data_folder_that_cannot_be_looked_at(tmp_path):
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError):
            load(tmp_path / name)


@pytest.mark.parametrize("name", FILE_MUTATIONS)
def test_a_bad_file_stops_or_is_skipped(data, name):
    mutate, words = FILE_MUTATIONS[name]
    mutate(data)
    for _ in range(2):  # the second time, the pack lacks it already
        with pytest.raises(UserError) as caught:
            load(data)
        assert_one_line_says(str(caught.value), FILE, [words])
    for _ in range(2):
        corpus, pack = load(data, on_bad_file="skip", max_bad_share=0.1)
        assert [problem.file for problem in corpus.skipped] == [FILE]
        assert words in corpus.skipped[0].what
        assert FILE not in pack.row
        assert FILE not in {u.path for u in corpus.labelled}
        assert len(corpus.labelled) == 15
    assert not (data.parent / "canary").exists()


def test_the_canary_itself_works(data):
    code(torch.save)(data)
    torch.load(data / FILE, weights_only=False)
    assert (data.parent / "canary").exists()


def test_no_feature_file_is_opened_twice(data, monkeypatch):
    """Bad or good, whatever is wrong, and whatever is to be done about it."""
    opened = []
    load_file = feature_file.load_feature_file

    def logged(folder, path, *more):
        opened.append(path)
        return load_file(folder, path, *more)

    monkeypatch.setattr(sys, "platform", "one process")
    monkeypatch.setattr(build, "load_feature_file", logged)
    monkeypatch.setattr(feature_file, "load_feature_file", logged)

    def prepared(**options):
        opened.clear()
        try:
            load(data, **options)
        except DataError as error:
            assert options.get("on_bad_file") != "skip", error
        assert len(set(opened)) == len(opened)
        return len(opened)

    skip = {"on_bad_file": "skip", "max_bad_share": 0.2}
    assert prepared() == 20
    assert prepared() == 0
    cut(FILE)(data)
    assert prepared() == 20
    assert prepared() == prepared(**skip) == 1
    assert prepared(pack=False, **skip) == 20
    remove("uttr-1-1.pt")(data)
    assert prepared() == 19
    assert prepared(**skip) == 19
    assert prepared(**skip) == 1
    mapping(speaker2id={})(data)
    assert prepared() == 19


def test_a_fixed_file_is_used_again(data):
    before = (data / FILE).read_bytes()
    cut(FILE)(data)
    load(data, on_bad_file="skip", max_bad_share=0.1)
    (data / FILE).write_bytes(before)
    corpus, pack = load(data, on_bad_file="skip")
    assert not corpus.skipped
    assert FILE in pack.row


def test_all_problems_are_reported_at_once(data):
    numbers(id00000=9)(data)
    entry(mel_len=-1)(data)
    heldout(feature_path="../x.pt")(data)
    remove("uttr-1-1.pt")(data)
    cut("uttr-2-2.pt")(data)
    with pytest.raises(UserError) as caught:
        load(data)
    head, *rows = str(caught.value).splitlines()
    assert "5 problems" in head
    assert len(rows) == 6
    for file in (MAP, META, TEST, "uttr-1-1.pt", "uttr-2-2.pt"):
        assert any(row.startswith(file) for row in rows)


def test_a_long_table_is_cut_and_counted(data):
    for path in data.glob("uttr*"):
        path.write_bytes(b"x")
    edit(TEST, lambda c: c["utterances"].extend([7] * 30))(data)
    with pytest.raises(UserError, match="50 problems") as caught:
        load(data)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 1 + 20 + 1
    assert lines[-1] == "and 30 more"


def test_too_many_bad_files_stop_nevertheless(data):
    for number in range(3):
        cut(f"uttr-{number}-0.pt")(data)
    share = {"on_bad_file": "skip", "max_bad_share": 3 / 20}
    assert len(load(data, **share)[0].skipped) == 3
    remove("uttr-0-1.pt")(data)  # found before the pack, counted with it
    with pytest.raises(UserError, match=r"max_bad_share=0\.15") as caught:
        load(data, **share)
    assert "4 of 20 feature files" in str(caught.value)


def test_a_pack_of_nothing_is_not_tried(data):
    for path in data.glob("uttr*"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for policy in ("stop", "skip"):
        with pytest.raises(UserError, match="20"):
            load(data, on_bad_file=policy)
    with pytest.raises(UserError, match="4 of 4 speakers have no usable utt"):
        load(data, on_bad_file="skip", max_bad_share=1.0)


def test_nobody_is_skipped_whole(data):
    for number in range(4):
        cut(f"uttr-2-{number}.pt")(data)
    with pytest.raises(UserError, match=r"'id00002' has no usable utterance"):
        load(data, on_bad_file="skip", max_bad_share=0.5)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_feature_files_of_another_folder_are_one_sentence(data, policy):
    for path in data.glob("uttr*"):
        path.unlink()
    with pytest.raises(DataError) as caught:
        load(data, on_bad_file=policy, max_bad_share=1.0)
    assert str(caught.value) == (
        f"{data}: none of the 20 feature files is there, as 'uttr-0-0.pt'; "
        "unpack the feature files into this folder."
    )


def test_paths_of_windows_are_explained_and_the_cure_works(data):
    texts = {name: (data / name).read_text() for name in NAMES}
    (data / "uttr").mkdir()
    for path in data.glob("uttr-*"):
        path.rename(data / "uttr" / path.name)
    for name in (META, TEST, LABELS):
        moved = texts[name].replace('"uttr-', '"uttr\\\\uttr-')
        (data / name).write_text(moved)
    words = r"as 'uttr\\\\uttr-0-0.pt', but there is 'uttr/uttr-0-0.pt'; corr"
    with pytest.raises(DataError, match=words):
        load(data)
    for name in (META, TEST, LABELS):
        (data / name).write_text((data / name).read_text().replace("\\\\", "/"))
    assert len(load(data)[0].labelled) == 16


def some_speakers(data):
    """Leaves the utterances of two speakers of four."""
    edit(META, lambda c: [c["speakers"].pop(f"id0000{n}") for n in (0, 2)])(
        data
    )


def test_a_trial_with_some_of_the_speakers(data):
    some_speakers(data)
    with pytest.raises(UserError) as caught:
        load(data)
    assert str(caught.value) == (
        f"{data / META}: 2 of 4 speakers have no usable utterance, as "
        "'id00002'; add or fix some, or give --speakers present to train "
        "without them."
    )
    corpus, pack = load(data, speakers="present")
    assert corpus.speakers == ("id00003", "id00001")  # in mapping.json's order
    assert len(corpus.labelled) == 8 and len(corpus.test) == 4
    labels = json.loads((data / LABELS).read_text())
    assert [u.speaker for u in corpus.test] == [
        labels[u.path] if labels[u.path] in corpus.speakers else None
        for u in corpus.test
    ]
    assert None in {u.speaker for u in corpus.test}
    assert len(pack.row) == 12


def test_a_trial_with_the_files_of_some_speakers(data):
    for path in data.glob("uttr-2-*"):
        path.unlink()
    share = {"on_bad_file": "skip", "max_bad_share": 0.2}
    with pytest.raises(UserError, match="or give --speakers present to train"):
        load(data, **share)
    corpus, _ = load(data, **share, speakers="present")
    assert corpus.speakers == ("id00003", "id00001", "id00000")


def test_nobody_is_no_trial(data):
    top(META, speakers={})(data)
    for speakers in ("all", "present"):
        with pytest.raises(UserError, match="4 of 4 speakers have no") as error:
            load(data, speakers=speakers)
        assert "present" not in str(error.value)


def test_a_test_alone_keeps_all_speakers(data):
    corpus, _ = load(data, speakers="present", test_only=True)
    assert len(corpus.speakers) == 4


@pytest.mark.parametrize("name", ["Ann {guest}", "{{2}}", "{}", "%s", "$HOME"])
def test_any_name_is_a_name(data, name):
    rename_speaker(name)(data)
    rename_file(f"{name.replace('$', '')}.pt")(data)
    (data / FILE).rename(data / f"{name.replace('$', '')}.pt")
    corpus, _ = load(data)
    assert corpus.speakers[3] == name


def guesses(corpus, speaker):
    """What a submission needs of an evaluation: the same guess for all."""
    names = np.array([utterance.path for utterance in corpus.test])
    return SimpleNamespace(id=names, guess=np.full(len(names), speaker))


def test_the_submission_keeps_odd_names_whole(data, tmp_path):
    rename_speaker('a "comma", too')(data)
    corpus, _ = load(data)
    speaker = corpus.speakers.index('a "comma", too')
    write_submission(corpus, guesses(corpus, speaker), tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == [corpus.test[0].path, 'a "comma", too']


def test_a_skipped_test_utterance_still_has_its_row(data, tmp_path, caplog):
    cut("uttr-test-1.pt")(data)
    for name in ("uttr-3-3.pt", "uttr-0-1.pt", "uttr-1-1.pt"):
        remove(name)(data)
    corpus, _ = load(data, on_bad_file="skip", max_bad_share=0.2)
    write_submission(corpus, guesses(corpus, 3), tmp_path / "s.csv")
    rows = (tmp_path / "s.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [
        f"uttr-test-{n}.pt" for n in range(4)
    ]
    # Of id00002 alone all utterances are left.
    assert rows[1] == "uttr-test-1.pt,id00002"
    assert rows[0].endswith(corpus.speakers[3])
    assert "1 test utterances could not be read" in caplog.text


def test_copies_under_other_names_are_reported(data, caplog):
    shutil.copy(data / FILE, data / "uttr-test-0.pt")
    length = len(torch.load(data / FILE))
    heldout(mel_len=length)(data)
    load(data)
    assert "1 feature files hold what another one holds" in caplog.text
    assert f"uttr-test-0.pt and {FILE}" in caplog.text


def test_a_parameter_is_a_tensor_too(data):
    tensor(torch.nn.Parameter)(data)
    assert FILE in load(data)[1].row


def test_links_inside_the_folder_are_fine(data):
    (data / FILE).rename(data / "elsewhere.pt")
    (data / FILE).symlink_to("elsewhere.pt")
    (data / "sub").mkdir()
    (data / "uttr-0-1.pt").rename(data / "sub" / "a.pt")
    edit(
        META,
        lambda c: c["speakers"]["id00000"][1].update(feature_path="sub/a.pt"),
    )(data)
    assert load(data)[1].row.keys() >= {FILE, "sub/a.pt"}


@pytest.mark.parametrize(
    "arguments", [["--on_bad_file=ignore"], ["--max_bad_share=x"]]
)
def test_a_wrong_policy_is_refused(data, arguments):
    with pytest.raises((UserError, SystemExit)):
        ml2022hw4_prepare.main([str(data), *arguments])


# --- the fuzzer -----------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.text(st.characters(), max_size=8),  # half characters, too
    st.sampled_from(["id00000", "id00001", FILE, "../x", "/", ".", "a\0b"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(node):
    """Every (container, key) of a JSON value."""
    keys = node if isinstance(node, dict) else range(len(node))
    for key in list(keys):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def mutated(draw, contents):
    """One structural change somewhere in one of the files."""
    found = list(places(contents))
    container, key = draw(st.sampled_from(found))
    kind = draw(st.sampled_from(["replace", "drop", "copy", "rename"]))
    if kind == "replace":
        container[key] = draw(VALUES)
    elif kind == "drop":
        del container[key]
    elif kind == "copy":
        other, theirs = draw(st.sampled_from(found))
        container[key] = json.loads(json.dumps(other[theirs]))
    elif isinstance(container, dict):
        container[draw(st.text(max_size=8))] = container.pop(key)
    else:
        container.append(container[key])


CHOICES = {"split": "session", "sessions": "auto", "seed": 0}
CHOICES |= {"valid_fraction": 0.3, "known_fraction": 0.1}


def load_and_divide(data):
    """All that a run reads of the JSON files, and what it makes of them."""
    made = load(data)
    sessions_digest(made[0], CHOICES)
    parts, _ = divide(*made, CHOICES)
    assert sum(map(len, parts.values())) == len(made[0].labelled)
    return made


def assert_consistent(corpus, pack, data):
    assert corpus.speakers
    assert len(set(corpus.speakers)) == len(corpus.speakers)
    assert {u.speaker for u in corpus.labelled} == set(corpus.speakers)
    assert {u.speaker for u in corpus.test} <= {None, *corpus.speakers}
    utterances = corpus.labelled + corpus.test
    files = [os.path.realpath(data / u.path) for u in utterances]
    assert len(set(files)) == len(files)
    for utterance, file in zip(utterances, files, strict=True):
        assert isinstance(utterance, Utterance)
        assert file.startswith(os.path.realpath(data) + os.sep)
        row = pack.row[utterance.path]
        assert pack.frames(row).shape == (utterance.length, corpus.n_mels)
    assert len(corpus.digest()) == 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    return make_corpus(folder, n_speakers=2, n_utterances=4, n_test=2)


@given(st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_any_json_is_refused_in_words_or_consistent(tiny, data):
    texts = {name: (tiny / name).read_bytes() for name in (*NAMES, SESSIONS)}
    try:
        contents = {name: json.loads(text) for name, text in texts.items()}
        for _ in range(data.draw(st.integers(1, 3))):
            mutated(data.draw, contents)
        for name in texts:
            if name in contents:
                text = json.dumps(contents[name]).encode()
                (tiny / name).write_bytes(text)
            else:
                (tiny / name).unlink()
        try:
            corpus, pack = load_and_divide(tiny)
        except UserError as error:
            assert str(error).startswith(str(tiny))
            return
        assert_consistent(corpus, pack, tiny)
    finally:
        for name, text in texts.items():
            (tiny / name).write_bytes(text)


@given(st.sampled_from([*NAMES, SESSIONS]), st.data())
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_any_bytes_are_refused_in_words_or_consistent(tiny, name, data):
    text = (tiny / name).read_bytes()
    where = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(where, min(len(text), where + 5)))
    junk = data.draw(st.binary(max_size=3))
    try:
        (tiny / name).write_bytes(text[:where] + junk + text[end:])
        try:
            corpus, pack = load_and_divide(tiny)
        except UserError as error:
            assert str(error).startswith(str(tiny))
            return
        assert_consistent(corpus, pack, tiny)
    finally:
        (tiny / name).write_bytes(text)


# --- through the real command ---------------------------------------------


def test_the_command_ends_with_a_table_and_no_traceback(data):
    code(torch.save)(data)
    cut("uttr-1-1.pt")(data)
    arguments = [data, f"--pack_folder={data.parent / 'packs'}"]
    done = run("ml2022hw4_prepare", arguments)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for file in (FILE, "uttr-1-1.pt"):
        assert_one_line_says(done.stderr, file, ["not a readable"])
    assert not (data.parent / "canary").exists()


def test_the_command_lists_what_it_skips(data, capsys):
    cut(FILE)(data)
    packs = f"--pack_folder={data.parent / 'packs'}"
    options = ["--on_bad_file=skip", "--max_bad_share=0.1"]
    ml2022hw4_prepare.main([str(data), packs, *options])
    said = capsys.readouterr().out
    assert_one_line_says(said, FILE, ["not a readable"])
    assert "15 labelled and 4 test utterances" in said


POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("name", "environment"),
    [(b"caf\xe9", {}), ("caf\u00e9 \u2603".encode(), POSIX)],
)
def test_a_folder_of_any_name_is_prepared(data, name, environment):
    folder = data.rename(data.parent / os.fsdecode(name))
    cut(FILE)(folder)
    packs = f"--pack_folder={folder.parent / 'packs'}"
    options = ["--on_bad_file=skip", "--max_bad_share=0.1"]
    for _ in range(2):  # packs, then finds the pack
        done = run(
            "ml2022hw4_prepare",
            [folder, packs, *options],
            real=True,
            environment=environment,
        )
        assert done.returncode == 0, done.stderr
        assert "15 labelled and 4 test utterances" in done.stdout
    done = run("ml2022hw4_prepare", [folder, packs])
    assert_one_sentence(done, f"{FILE}: not a readable")


def test_files_that_a_locale_cannot_name(data):
    """One sentence says so, and its cure works."""
    new = unicodedata.normalize("NFC", "\u00e9\u2603.pt")
    rename_file(new)(data)
    (data / FILE).rename(data / new)
    arguments = [data, f"--pack_folder={data.parent / 'packs'}"]
    done = run("ml2022hw4_prepare", arguments, real=True, environment=POSIX)
    assert_one_sentence(
        done,
        r"feature_path '\xe9\u2603.pt' (1 of 1) can't be named in this sys",
        "set the environment variable PYTHONUTF8=1",
    )
    cured = {**POSIX, "PYTHONUTF8": "1"}
    done = run("ml2022hw4_prepare", arguments, real=True, environment=cured)
    assert done.returncode == 0, done.stderr


def test_a_pack_folder_that_cannot_be_written_names_its_option(data):
    packs = data.parent / "packs"
    packs.write_text("a file")
    done = run("ml2022hw4_prepare", [data, f"--pack_folder={packs}"])
    assert_one_sentence(done, "--pack_folder", str(packs))


def test_features_beyond_a_type_are_packed_in_the_one_that_is_advised(data):
    value_at(1e6)(data)
    arguments = [data, f"--pack_folder={data.parent / 'packs'}"]
    done = run("ml2022hw4_prepare", arguments)
    assert_one_sentence(
        done, "values beyond float16; give --pack_dtype float32"
    )
    done = run("ml2022hw4_prepare", [*arguments, "--pack_dtype=float32"])
    assert done.returncode == 0, done.stderr


def test_the_command_trains_on_those_who_are_there(data):
    some_speakers(data)
    arguments = [data, f"--pack_folder={data.parent / 'packs'}"]
    done = run("ml2022hw4_prepare", arguments)
    assert_one_sentence(done, "or give --speakers present")
    done = run("ml2022hw4_prepare", [*arguments, "--speakers", "present"])
    assert "is valid: 2 speakers, 8 labelled and 4 test" in done.stdout


def test_a_folder_of_any_name_is_trained_on(data):
    rename_file("\u00e9 {0}.pt")(data)
    (data / FILE).rename(data / "\u00e9 {0}.pt")
    data = data.rename(data.parent / os.fsdecode(b"caf\xe9 {x}"))
    output = data.parent / "out"
    done = run_train(data, output, "--number_of_epochs=1")
    assert done.returncode == 0, done.stderr
    before = (output / "submission.csv").read_text()
    for more in ([], [f"--data_folder={data}", f"--submission={output}/b.csv"]):
        done = run_predict(output, *more)
        assert done.returncode == 0, done.stderr
    for name in ("submission.csv", "b.csv"):
        assert (output / name).read_text() == before


@pytest.mark.parametrize("split", ["session", "random"])
def test_one_utterance_each_is_trained_on_as_advised(tmp_path, split):
    data = make_corpus(tmp_path / "data", n_utterances=1)
    output = tmp_path / "out"
    done = run_train(data, output, f"--split={split}")
    assert_one_sentence(done, "no speaker has two utterances", "--split none")
    done = run_train(data, output, "--split=none", "--number_of_epochs=1")
    assert done.returncode == 0, done.stderr


# --- what is refused before it costs something -------------------------------


def edited(data, name, change):
    content = json.loads((data / name).read_text())
    change(content)
    (data / name).write_text(json.dumps(content))


@pytest.mark.parametrize("share", [float("nan"), -1, 5, float("inf"), "0.1"])
def test_a_share_lies_between_0_and_1(data, share):
    with pytest.raises(UserError, match=r"^max_bad_share=.* must "):
        load(data, on_bad_file="skip", max_bad_share=share)
    assert not (data.parent / "packs").exists()


@pytest.mark.parametrize("kind", ["entries", "speakers", "inverse", "labels"])
def test_reading_ends_at_a_thousand_problems(data, kind):
    """What is said of them is true: there may be more."""
    many = 1_500
    if kind == "inverse":
        new = {str(i): "x" for i in range(many)}
        edited(data, MAP, lambda c: c["id2speaker"].update(new))
    elif kind == "speakers":
        new = {f"x{i}": [] for i in range(many)}
        edited(data, META, lambda c: c["speakers"].update(new))
    elif kind == "labels":
        entry = {"feature_path": "x.pt", "mel_len": 5}
        edited(data, TEST, lambda c: c.update(utterances=[entry] * many))
    else:
        edited(data, META, lambda c: c["speakers"].update(id00000=[{}] * many))
    with pytest.raises(DataError) as caught:
        read_corpus(data)
    message = str(caught.value)
    assert message.startswith(
        f"{data}: 1,000 problems or more; the first are:\nfile "
    )
    assert len(message.splitlines()) == 22  # with the columns' names
    assert "and " not in message.splitlines()[-1]


def test_frames_that_a_file_cannot_have_take_no_space(data, monkeypatch):
    reserve = build._reserve

    def reserved(file, size):
        assert size < 10**7
        reserve(file, size)

    monkeypatch.setattr(build, "_reserve", reserved)

    def invent(content):
        for entries in content["speakers"].values():
            entries[0]["mel_len"] = 1_000_000

    edited(data, META, invent)
    with pytest.raises(DataError) as caught:
        load(data)
    assert [p.cure for p in caught.value.problems] == ["make the two agree"] * 4
    corpus, _ = load(data, on_bad_file="skip", max_bad_share=0.5)
    assert len(corpus.labelled) == 12


@pytest.mark.parametrize("path", ["a:b.pt", "a:b/c.pt", "12:30:00.pt"])
def test_a_colon_is_refused_in_words_that_say_so(data, path):
    def name(content):
        content["speakers"]["id00000"][0]["feature_path"] = path

    edited(data, META, name)
    words = "colon in its first part.*or rename the file and its entry"
    with pytest.raises(UserError, match=words):
        read_corpus(data)
