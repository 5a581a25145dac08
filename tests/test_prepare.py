"""From a data folder to manifests and a submission."""

import json

import pytest
from corpus import make_corpus

import prepare
from spkid.errors import UserError
from spkid.scoring import Score


@pytest.fixture
def data(tmp_path):
    return make_corpus(tmp_path / "data")


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


def test_the_split_is_stratified_seeded_and_kept(data, tmp_path):
    corpus = prepare.read_corpus(data)
    train, valid = prepare.split_random(corpus.labelled, 0.25, seed=3)
    assert len(train) + len(valid) == 32
    assert not {u.path for u in train} & {u.path for u in valid}
    counts = [sum(u.speaker == s for u in valid) for s in corpus.speakers]
    assert counts == [2, 2, 2, 2]
    again = prepare.split_random(corpus.labelled, 0.25, seed=3)
    assert again == (train, valid)
    assert prepare.split_random(corpus.labelled, 0.25, seed=4)[1] != valid

    folder = tmp_path / "manifests"
    options = {"split": "random", "valid_fraction": 0.25, "seed": 3}
    prepare.write_manifests(corpus, folder, **options)
    held = json.loads((folder / "valid.json").read_text())
    assert list(held) == [u.path for u in valid]
    tests = json.loads((folder / "test.json").read_text())
    assert list(tests) == [u.path for u in corpus.test]
    (folder / "valid.json").write_text("kept")
    prepare.write_manifests(corpus, folder, **options)
    assert (folder / "valid.json").read_text() == "kept"
    corpus.labelled[0].length += 1  # other data
    prepare.write_manifests(corpus, folder, **options)
    assert (folder / "valid.json").read_text() != "kept"


def test_a_speaker_with_one_utterance_is_trained_on(tmp_path):
    corpus = prepare.read_corpus(make_corpus(tmp_path / "d", n_utterances=1))
    train, valid = prepare.split_random(corpus.labelled, 0.5, seed=0)
    assert len(train) == 4
    assert not valid
    options = {"split": "random", "valid_fraction": 0.5, "seed": 0}
    with pytest.raises(UserError, match="nothing can be held out"):
        prepare.write_manifests(corpus, tmp_path / "m", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "sesion"}, "split='sesion' is none of"),
        ({"valid_fraction": 1.5}, "valid_fraction=1.5 isn't in"),
    ],
)
def test_impossible_choices_are_refused(data, tmp_path, options, words):
    corpus = prepare.read_corpus(data)
    given = {"split": "random", "valid_fraction": 0.1, "seed": 0, **options}
    with pytest.raises(UserError, match=words):
        prepare.write_manifests(corpus, tmp_path, **given)


def test_the_submission_keeps_odd_names_whole(data, tmp_path):
    corpus = prepare.read_corpus(data)
    corpus.speakers[0] = 'a "comma", too'
    scores = {u.path: Score(0, -1, 0.0) for u in corpus.test}
    prepare.write_submission(corpus, scores, tmp_path / "s.csv")
    import csv

    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == [corpus.test[0].path, 'a "comma", too']
