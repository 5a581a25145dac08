"""What a data folder may not say: a table of mutations, and a fuzzer."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import make_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from ml2022hw4_prepare import read_corpus
from results import write_submission
from spkid.data.corpus import Utterance
from spkid.errors import UserError
from spkid.evaluation.scores import Score

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("mapping.json", "metadata.json", "testdata.json", "testlabels.json")
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
    corpus = read_corpus(data, **options)
    pack = prepare.pack_corpus(corpus, data.parent / "packs")
    return corpus, pack


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
        for name in NAMES
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
    "no text": (write(TEST, b"\xff\xfe{"), TEST, NO_JSON),
    "a mark before it": (write(TEST, b"\xef\xbb\xbf{}"), TEST, NO_JSON),
    "deep nesting": (write(TEST, b"[" * 100_000), TEST, NO_JSON),
    "a number of 5,000 digits": (
        write(TEST, b'{"n_mels": ' + b"4" * 5000 + b"}"),
        TEST,
        NO_JSON,
    ),
    "a list": (write(MAP, b"[]"), MAP, "holds a list"),
    "null": (write(META, b"null"), META, "holds a NoneType"),
    "a folder": (
        both(remove(META), lambda d: (d / META).mkdir()),
        META,
        NO_JSON,
    ),
    "a key twice": (
        write(MAP, b'{"speaker2id": {}, "speaker2id": {}}'),
        MAP,
        "key 'speaker2id'",
        "stands there twice",
    ),
    "a speaker twice": (
        lambda d: write(
            META, (d / META).read_bytes().replace(b"id00001", b"id00000")
        )(d),
        META,
        "key 'id00000'",
        "stands there twice",
    ),
    "no speaker2id": (drop(MAP, "speaker2id"), MAP, "'speaker2id'", "missing"),
    "no id2speaker": (drop(MAP, "id2speaker"), MAP, "'id2speaker'", "missing"),
    "speaker2id a list": (mapping(speaker2id=[]), MAP, "is a list, not a dict"),
    "id2speaker null": (mapping(id2speaker=None), MAP, "is a NoneType"),
    "nobody": (mapping(speaker2id={}), MAP, "'speaker2id'", "is empty"),
    "a gap": (numbers(id00000=7), MAP, "'id00000'", "is 7", "from 0 to 3"),
    "below 0": (numbers(id00000=-1), MAP, "'id00000'", "is -1"),
    "two of one index": (numbers(id00000=1), MAP, "is 1, as that of"),
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
    "a speaker without a name": (rename_speaker(""), MAP, "is empty"),
    "no n_mels": (drop(META, "n_mels"), META, "key 'n_mels'", "is missing"),
    "n_mels in text": (top(META, n_mels="40"), META, "'n_mels'", "is a str"),
    "n_mels true": (top(META, n_mels=True), META, "'n_mels'", "is a bool"),
    "n_mels 0": (both(top(META, n_mels=0)), META, "'n_mels'", "is 0"),
    "n_mels below 0": (top(TEST, n_mels=-40), TEST, "'n_mels'", "is -40"),
    "n_mels huge": (top(META, n_mels=10**9), META, "'n_mels'", "1000000000"),
    "other n_mels": (top(TEST, n_mels=80), TEST, "is 80, but"),
    "speakers a list": (top(META, speakers=[]), META, "is a list"),
    "speakers missing": (drop(META, "speakers"), META, "'speakers'", "missing"),
    "a speaker no list": (speakers(id00000={}), META, "'id00000'", "is a dict"),
    "a speaker without any": (
        speakers(id00000=[]),
        META,
        "speaker 'id00000'",
        "has no utterance",
    ),
    "a speaker not there": (
        edit(META, lambda c: c["speakers"].pop("id00001")),
        META,
        "speaker 'id00001'",
        "has no utterance",
    ),
    "an unknown speaker": (
        speakers(id9=[]),
        META,
        "speaker 'id9'",
        "is missing from mapping.json",
    ),
    "an entry in text": (speakers(id00000=["x"]), META, "'x'", "is no object"),
    "an entry of null": (
        edit(TEST, lambda c: c["utterances"].append(None)),
        TEST,
        "None",
        "is no object",
    ),
    "no utterances": (
        drop(TEST, "utterances"),
        TEST,
        "'utterances'",
        "missing",
    ),
    "utterances an object": (top(TEST, utterances={}), TEST, "is a dict"),
    "no path": (
        edit(META, lambda c: first(c).pop("feature_path")),
        META,
        "'id00000': key 'feature_path'",
        "is missing",
    ),
    "a path of numbers": (entry(feature_path=7), META, "is a int"),
    "no length": (
        edit(META, lambda c: first(c).pop("mel_len")),
        META,
        "'mel_len'",
        "is missing",
    ),
    "negative": (entry(mel_len=-3), META, f"mel_len of '{FILE}'", "is -3"),
    "zero": (heldout(mel_len=0), TEST, "mel_len of 'uttr-test-0.pt'", "is 0"),
    "huge": (entry(mel_len=10**12), META, "is 1000000000000"),
    "a fraction": (entry(mel_len=30.5), META, "'mel_len'", "is a float"),
    "not a number": (entry(mel_len=float("nan")), META, "is a float"),
    "a length in text": (entry(mel_len="30"), META, "'mel_len'", "is a str"),
    "a length that is true": (heldout(mel_len=True), TEST, "is a bool"),
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
        "is missing from mapping.json",
    ),
    "a label of numbers": (
        top(LABELS, **{"uttr-test-0.pt": 7}),
        LABELS,
        "is a int",
    ),
}
# What can be skipped: one feature file, always the same one.
FILE_MUTATIONS = {
    "missing": (remove(FILE), "is missing"),
    "no bytes": (write(FILE, b""), "has no bytes"),
    "a folder": (become(Path.mkdir), "is missing"),
    "a pipe": (become(os.mkfifo), "is missing"),
    "a link to itself": (link_loop, "is missing"),
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


def test_there_are_enough_of_them():
    assert len(JSON_MUTATIONS) + len(FILE_MUTATIONS) >= 80


def assert_one_line_says(message, file, words):
    lines = [line for line in message.splitlines() if file in line]
    assert any(all(w in line for w in words) for line in lines), message


@pytest.mark.parametrize("name", JSON_MUTATIONS)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_what_is_wrong_in_the_json_always_stops(data, name, policy):
    mutate, file, *words = JSON_MUTATIONS[name]
    mutate(data)
    with pytest.raises(UserError) as caught:
        load(data, on_bad_file=policy)
    message = str(caught.value)
    assert message.startswith(str(data))
    assert_one_line_says(message, file, words)
    assert message.isprintable() or "\n" in message
    assert not (data.parent / "packs").exists()


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


def test_a_mended_file_is_used_again(data):
    before = (data / FILE).read_bytes()
    cut(FILE)(data)
    load(data, on_bad_file="skip", max_bad_share=0.1)
    (data / FILE).write_bytes(before)
    corpus, pack = load(data, on_bad_file="skip")
    assert not corpus.skipped
    assert FILE in pack.row


def test_all_problems_are_said_at_once(data):
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
    with pytest.raises(UserError, match="has no utterance"):
        load(data, on_bad_file="skip", max_bad_share=1.0)


def test_nobody_is_skipped_whole(data):
    for number in range(4):
        cut(f"uttr-2-{number}.pt")(data)
    with pytest.raises(UserError, match=r"'id00002' .* has no utterance"):
        load(data, on_bad_file="skip", max_bad_share=0.5)


def test_a_skipped_test_utterance_still_has_its_row(data, tmp_path, caplog):
    cut("uttr-test-1.pt")(data)
    remove("uttr-3-3.pt")(data)
    options = {"on_bad_file": "skip", "max_bad_share": 0.1}
    remove("uttr-0-1.pt")(data)
    remove("uttr-1-1.pt")(data)
    options["max_bad_share"] = 0.2
    corpus, _ = load(data, **options)
    scores = {u.path: Score(3, -1, 0.0) for u in corpus.test}
    write_submission(corpus, scores, tmp_path / "s.csv")
    rows = (tmp_path / "s.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [
        f"uttr-test-{n}.pt" for n in range(4)
    ]
    # Of id00002 alone all utterances are left.
    assert rows[1] == "uttr-test-1.pt,id00002"
    assert rows[0].endswith(corpus.speakers[3])
    assert "1 test utterances could not be read" in caplog.text


def test_copies_under_other_names_are_said(data, caplog):
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
        prepare.main([str(data), *arguments])


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
    return make_corpus(folder, n_speakers=2, n_utterances=2, n_test=2)


@given(st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_any_json_is_refused_in_words_or_consistent(tiny, data):
    texts = {name: (tiny / name).read_bytes() for name in NAMES}
    try:
        contents = {name: json.loads(text) for name, text in texts.items()}
        for _ in range(data.draw(st.integers(1, 3))):
            mutated(data.draw, contents)
        for name in NAMES:
            if name in contents:
                text = json.dumps(contents[name]).encode()
                (tiny / name).write_bytes(text)
            else:
                (tiny / name).unlink()
        try:
            corpus, pack = load(tiny)
        except UserError as error:
            assert str(error).startswith(str(tiny))
            return
        assert_consistent(corpus, pack, tiny)
    finally:
        for name, text in texts.items():
            (tiny / name).write_bytes(text)


@given(st.sampled_from(NAMES), st.data())
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
            corpus, pack = load(tiny)
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
    arguments = [str(data), f"--pack_folder={data.parent / 'packs'}"]
    done = subprocess.run(
        [sys.executable, "recipes/ML2022hw4/prepare.py", *arguments],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for file in (FILE, "uttr-1-1.pt"):
        assert_one_line_says(done.stderr, file, ["not a readable"])
    assert not (data.parent / "canary").exists()


def test_the_command_lists_what_it_skips(data, capsys):
    cut(FILE)(data)
    packs = f"--pack_folder={data.parent / 'packs'}"
    options = ["--on_bad_file=skip", "--max_bad_share=0.1"]
    prepare.main([str(data), packs, *options])
    said = capsys.readouterr().out
    assert_one_line_says(said, FILE, ["not a readable"])
    assert "15 labelled and 4 test utterances" in said
