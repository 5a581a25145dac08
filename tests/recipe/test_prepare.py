"""From a data folder to manifests and a submission."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus import make_corpus

import prepare
from ml2022hw4_prepare import read_corpus
from results import write_submission
from spkid.errors import UserError
from spkid.evaluation.scores import Score


@pytest.fixture
def data(tmp_path):
    return make_corpus(tmp_path / "data")


def test_classes_come_from_mapping_alone(data):
    corpus = read_corpus(data)
    mapping = json.loads((data / "mapping.json").read_text())
    assert corpus.speakers == list(mapping["speaker2id"])
    assert corpus.speakers != list(
        json.loads((data / "metadata.json").read_text())["speakers"]
    )
    assert len(corpus.labelled) == 32
    assert len(corpus.test) == 6
    assert corpus.has_test_labels


def test_a_test_without_labels_is_fine(tmp_path):
    corpus = read_corpus(make_corpus(tmp_path / "d", labels=False))
    assert [u.speaker for u in corpus.test] == [None] * 6


def test_a_wrong_folder_is_told_what_is_needed(tmp_path):
    words = r"must name the folder with mapping.json, metadata.json and test"
    with pytest.raises(UserError, match=words):
        read_corpus(tmp_path)
    with pytest.raises(UserError, match=words):
        read_corpus(tmp_path / "nowhere")


def test_more_than_ten_classes_keep_their_order(tmp_path):
    corpus = read_corpus(make_corpus(tmp_path / "d", n_speakers=12))
    mapping = json.loads((tmp_path / "d" / "mapping.json").read_text())
    indices = [mapping["speaker2id"][s] for s in corpus.speakers]
    assert indices == list(range(12))


def test_the_submission_keeps_odd_names_whole(data, tmp_path):
    corpus = read_corpus(data)
    corpus.speakers[0] = 'a "comma", too'
    scores = {u.path: Score(0, -1, 0.0) for u in corpus.test}
    write_submission(corpus, scores, tmp_path / "s.csv")
    import csv

    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == [corpus.test[0].path, 'a "comma", too']


def test_recordings_become_data_as_the_readme_says(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for name in ("ann/1", "ann/2", "bob/1", "bob/2"):
        path = tmp_path / "recordings" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.normal(0, 0.1, 16000), 16000)
    page = Path(prepare.__file__).with_name("README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    corpus = read_corpus(tmp_path / "data")
    assert corpus.speakers == ["ann", "bob"]
    assert [u.speaker for u in corpus.labelled] == ["ann"] * 2 + ["bob"] * 2
    prepare.pack_corpus(corpus, tmp_path / "packs")
