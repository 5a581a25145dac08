"""The JSON files of a data folder: what they may not say."""

import json
import os

import pytest
from corpus import make_corpus

import prepare
from spkid.errors import UserError
from spkid.scoring import Score


@pytest.fixture
def data(tmp_path):
    return make_corpus(tmp_path / "data")


def edit(data, name, change):
    content = json.loads((data / name).read_text())
    change(content)
    (data / name).write_text(json.dumps(content))


def first(content):
    return next(iter(content["speakers"].values()))[0]


def test_classes_come_from_mapping_alone(data):
    corpus = prepare.read_corpus(data)
    mapping = json.loads((data / "mapping.json").read_text())
    assert corpus.speakers == list(mapping["speaker2id"])
    assert corpus.speakers != list(
        json.loads((data / "metadata.json").read_text())["speakers"]
    )
    assert len(corpus.labelled) == 32
    assert len(corpus.test) == 6
    assert corpus.has_test_labels


def test_a_test_without_labels_is_fine(tmp_path):
    corpus = prepare.read_corpus(make_corpus(tmp_path / "d", labels=False))
    assert [u.speaker for u in corpus.test] == [None] * 6


def test_more_than_ten_classes_keep_their_order(tmp_path):
    corpus = prepare.read_corpus(make_corpus(tmp_path / "d", n_speakers=12))
    mapping = json.loads((tmp_path / "d" / "mapping.json").read_text())
    indices = [mapping["speaker2id"][s] for s in corpus.speakers]
    assert indices == list(range(12))


def mapping(**changes):
    return lambda d: edit(d, "mapping.json", lambda c: c.update(changes))


def entry(**changes):
    return lambda d: edit(
        d, "metadata.json", lambda c: first(c).update(changes)
    )


def drop(name, key):
    return lambda d: edit(d, name, lambda c: c.pop(key))


def write(name, text):
    return lambda d: (d / name).write_text(text)


def link_out(data):
    path = data / "uttr-0-0.pt"
    outside = data.parent / "outside.pt"
    path.rename(outside)
    path.symlink_to(outside)


def folder_link_out(data):
    (data.parent / "elsewhere").mkdir()
    (data / "uttr-0-0.pt").rename(data.parent / "elsewhere" / "a.pt")
    (data / "sub").symlink_to(data.parent / "elsewhere")
    entry(feature_path="sub/a.pt")(data)


def twice(data):
    edit(
        data,
        "testdata.json",
        lambda c: c["utterances"].append(c["utterances"][0]),
    )


def also_in_training(data):
    edit(
        data,
        "testdata.json",
        lambda c: c["utterances"][0].update(feature_path="uttr-0-0.pt"),
    )
    edit(
        data,
        "testlabels.json",
        lambda c: c.update({"uttr-0-0.pt": "id00000"}),
    )


MUTATIONS = {
    "no mapping": (
        lambda d: os.remove(d / "mapping.json"),
        "mapping.json: the file is missing",
    ),
    "no metadata": (
        lambda d: os.remove(d / "metadata.json"),
        "metadata.json: the file is missing",
    ),
    "empty file": (write("metadata.json", ""), "metadata.json: not valid JSON"),
    "a list": (write("mapping.json", "[]"), "mapping.json: holds a list"),
    "deep nesting": (
        write("testdata.json", "[" * 100000),
        "testdata.json: not valid JSON",
    ),
    "bytes": (
        lambda d: (d / "testdata.json").write_bytes(b"\xff\xfe{"),
        "testdata.json: not valid JSON",
    ),
    "a key twice": (
        write("mapping.json", '{"speaker2id": {}, "speaker2id": {}}'),
        "'speaker2id' stands there twice",
    ),
    "no speaker2id": (
        drop("mapping.json", "speaker2id"),
        "key 'speaker2id' is missing",
    ),
    "no id2speaker": (
        drop("mapping.json", "id2speaker"),
        "key 'id2speaker' is missing",
    ),
    "empty mapping": (mapping(speaker2id={}), "'speaker2id' is empty"),
    "a gap": (
        mapping(speaker2id={"id00000": 0, "id00001": 2}),
        "whole numbers from 0 to 1",
    ),
    "two of one index": (
        mapping(speaker2id={"a": 0, "b": 0}),
        "whole numbers from 0 to 1",
    ),
    "an index in text": (mapping(speaker2id={"a": "0"}), "whole numbers"),
    "not the inverse": (mapping(id2speaker={"0": "x"}), "not the inverse"),
    "n_mels in text": (
        lambda d: edit(d, "metadata.json", lambda c: c.update(n_mels="40")),
        "key 'n_mels' is a str",
    ),
    "n_mels true": (
        lambda d: edit(d, "metadata.json", lambda c: c.update(n_mels=True)),
        "key 'n_mels' is a bool",
    ),
    "other n_mels": (
        lambda d: edit(d, "testdata.json", lambda c: c.update(n_mels=80)),
        "n_mels isn't metadata.json's",
    ),
    "speakers a list": (
        lambda d: edit(d, "metadata.json", lambda c: c.update(speakers=[])),
        "key 'speakers' is a list",
    ),
    "a speaker no list": (
        lambda d: edit(
            d, "metadata.json", lambda c: c["speakers"].update(id00000={})
        ),
        "key 'id00000' is a dict",
    ),
    "a speaker without any": (
        lambda d: edit(
            d, "metadata.json", lambda c: c["speakers"].update(id00000=[])
        ),
        "'id00000' of mapping.json has no utterance",
    ),
    "an entry in text": (
        lambda d: edit(
            d, "metadata.json", lambda c: c["speakers"]["id00000"].append("x")
        ),
        "'x' is no object",
    ),
    "no path": (
        lambda d: edit(
            d, "metadata.json", lambda c: first(c).pop("feature_path")
        ),
        "key 'feature_path' is missing",
    ),
    "no length": (
        lambda d: edit(d, "metadata.json", lambda c: first(c).pop("mel_len")),
        "key 'mel_len' is missing",
    ),
    "negative": (entry(mel_len=-3), "mel_len of 'uttr-0-0.pt' is -3"),
    "zero": (entry(mel_len=0), "mel_len of 'uttr-0-0.pt' is 0"),
    "huge": (
        entry(mel_len=10**12),
        "mel_len of 'uttr-0-0.pt' is 1000000000000",
    ),
    "a fraction": (entry(mel_len=30.5), "key 'mel_len' is a float"),
    "absolute": (entry(feature_path="/etc/passwd"), "leaves the data folder"),
    "climbs": (entry(feature_path="a/../../x.pt"), "leaves the data folder"),
    "climbs, Windows": (
        entry(feature_path="..\\x.pt"),
        "leaves the data folder",
    ),
    "a drive": (entry(feature_path="C:\\x.pt"), "leaves the data folder"),
    "empty path": (entry(feature_path=""), "leaves the data folder"),
    "a link": (link_out, "is a link that leaves"),
    "a linked folder": (folder_link_out, "is a link that leaves"),
    "missing": (
        entry(feature_path="none.pt"),
        "none.pt: the feature file is missing",
    ),
    "a folder": (
        lambda d: ((d / "uttr-0-0.pt").unlink(), (d / "uttr-0-0.pt").mkdir()),
        "the feature file is missing",
    ),
    "twice": (twice, "is listed twice"),
    "test in training": (also_in_training, "is listed twice"),
    "no label": (
        lambda d: edit(d, "testlabels.json", lambda c: c.pop("uttr-test-0.pt")),
        "key 'uttr-test-0.pt' is missing",
    ),
    "a strange label": (
        lambda d: edit(
            d, "testlabels.json", lambda c: c.update({"uttr-test-0.pt": "id7"})
        ),
        "speaker 'id7' is missing from mapping.json",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mistake_is_one_sentence_that_names_it(data, name):
    mutate, words = MUTATIONS[name]
    mutate(data)
    with pytest.raises(UserError) as caught:
        prepare.read_corpus(data)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert str(data) in message


def test_the_submission_keeps_odd_names_whole(data, tmp_path):
    corpus = prepare.read_corpus(data)
    corpus.speakers[0] = 'a "comma", too'
    scores = {u.path: Score(0, -1, 0.0) for u in corpus.test}
    prepare.write_submission(corpus, scores, tmp_path / "s.csv")
    import csv

    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == [corpus.test[0].path, 'a "comma", too']
