"""Tests of the mini corpus: its form, its channels, its reproducibility."""

import errno
import itertools
import json
import os
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import run, train_arguments

import mini_corpus
from spkid.data import prepare_audio
from spkid.errors import UserError
from spkid.features import load_features

pytest.importorskip("espeakng_loader")
SIZES = {"n_speakers": 3, "n_sessions": 2, "n_sentences": 2}


def read_json(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """With its recordings beside it, which the other one lacks."""
    folder = tmp_path_factory.mktemp("corpus") / "mini"
    recordings = folder.with_name("voices")
    return mini_corpus.build(
        folder, recordings=recordings, progress=False, **SIZES
    )


@pytest.mark.slow
def test_same_seed_gives_same_bytes(corpus, tmp_path):
    again = mini_corpus.build(tmp_path / "again", progress=False, **SIZES)
    names = sorted(path.name for path in corpus.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (corpus / name).read_bytes() == (again / name).read_bytes()
    assert not list(tmp_path.glob("again.part*"))


@pytest.mark.slow
def test_form_is_that_of_hw4(corpus):
    mapping = read_json(corpus, "mapping.json")
    metadata = read_json(corpus, "metadata.json")
    testdata = read_json(corpus, "testdata.json")
    assert set(mapping) == {"speaker2id", "id2speaker"}
    for speaker, index in mapping["speaker2id"].items():
        assert re.fullmatch(r"id\d{5}", speaker)
        assert mapping["id2speaker"][str(index)] == speaker
    assert sorted(mapping["speaker2id"].values()) == [0, 1, 2]
    assert set(metadata) == {"n_mels", "speakers"}
    assert set(metadata["speakers"]) == set(mapping["speaker2id"])
    assert set(testdata) == {"n_mels", "utterances"}
    assert metadata["n_mels"] == testdata["n_mels"] == 40

    speakers = metadata["speakers"].values()
    assert [len(entries) for entries in speakers] == [4, 4, 4]
    assert len(testdata["utterances"]) == 9
    entries = [*itertools.chain(*speakers), *testdata["utterances"]]
    for entry in entries:
        assert set(entry) == {"feature_path", "mel_len"}
        assert re.fullmatch(r"uttr-[0-9a-f]{32}\.pt", entry["feature_path"])
        features = torch.load(corpus / entry["feature_path"], weights_only=True)
        assert features.dtype == torch.float32
        assert features.shape == (entry["mel_len"], 40)
        assert features.isfinite().all()
        assert 100 < len(features) < 600
    paths = {entry["feature_path"] for entry in entries}
    assert paths == {path.name for path in corpus.glob("*.pt")}
    assert len(paths) == len(entries)


@pytest.mark.slow
def test_orders_are_those_of_hw4(corpus):
    mapping = read_json(corpus, "mapping.json")
    speakers = read_json(corpus, "metadata.json")["speakers"]
    sessions = read_json(corpus, "sessions.json")
    labels = read_json(corpus, "testlabels.json")
    for i, speaker in enumerate(speakers):
        assert mapping["speaker2id"][speaker] != i
    for speaker, entries in speakers.items():
        recorded = [sessions[entry["feature_path"]] for entry in entries]
        assert recorded == [f"{speaker}/{k}" for k in (0, 0, 1, 1)]
    test = read_json(corpus, "testdata.json")["utterances"]
    tested = [labels[entry["feature_path"]] for entry in test]
    assert tested != sorted(tested)
    assert {sessions[path] for path in labels} == {f"{s}/2" for s in speakers}


@pytest.mark.slow
def test_sessions_differ_in_channel(corpus):
    """Means of one session are closer than those of a speaker's two."""
    sessions = read_json(corpus, "sessions.json")
    within, across = [], []
    for entries in read_json(corpus, "metadata.json")["speakers"].values():
        paths = [entry["feature_path"] for entry in entries]
        means = [
            torch.load(corpus / path, weights_only=True).mean(0)
            for path in paths
        ]
        for i in range(len(paths)):
            for j in range(i):
                same = sessions[paths[i]] == sessions[paths[j]]
                distance = (means[i] - means[j]).norm().item()
                (within if same else across).append(distance)
    assert sum(across) / len(across) > 1.5 * sum(within) / len(within)


@pytest.mark.slow
def test_complete_folder_is_left_alone(corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    assert mini_corpus.build(corpus, seed=1) == corpus
    assert before == {p: p.stat().st_mtime_ns for p in corpus.iterdir()}


@pytest.mark.slow
def test_recordings_hold_what_the_features_are_made_of(corpus):
    sessions = read_json(corpus, "sessions.json")
    voices = corpus.with_name("voices")
    for name, session in sessions.items():
        speaker, number = session.split("/")
        path = voices / speaker / f"session{number}" / name
        path = path.with_suffix(".wav")
        assert b"PEAK" not in path.read_bytes()[:100]  # has the time of day
        features = load_features(path, silence="hw4")
        expected = torch.load(corpus / name, weights_only=True)
        torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)
    assert len(list(voices.glob("*/*/*.wav"))) == len(sessions)


@pytest.mark.slow
def test_recordings_become_a_corpus_that_is_trained_on(corpus, tmp_path):
    """Their speech is found, and the recipe takes what is made of it."""
    voices, data = corpus.with_name("voices"), tmp_path / "data"
    found = prepare_audio(voices, data, "vad", 0.3, progress=False)
    assert {one.verdict for one in found} == {"ok"}
    truth = read_json(corpus, "sessions.json")
    names = {one.path: Path(one.path).with_suffix(".pt").name for one in found}
    for one in found:
        number = one.session.removeprefix("session")
        assert truth[names[one.path]] == f"{one.speaker}/{number}"
        assert (one.part == "test") == (number == "2")
        assert 0.5 < one.speech_seconds / one.seconds <= 1
    result = run("train", train_arguments(data, tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "read from sessions.json" in result.stdout
    listed = read_json(data, "testdata.json")["utterances"]
    lines = (tmp_path / "out/submission.csv").read_text().splitlines()
    assert len(lines) == 1 + len(listed)


def test_recordings_are_written_with_a_new_corpus_only(tmp_path):
    (tmp_path / "mini").mkdir()
    with pytest.raises(UserError, match="name two folders that don't exist"):
        mini_corpus.build(tmp_path / "mini", recordings=tmp_path / "voices")


def test_other_files_are_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="empty folder"):
        mini_corpus.build(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_missing_espeak_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        mini_corpus.build(tmp_path / "mini")
    assert not any(tmp_path.iterdir())


TINY = {"n_speakers": 1, "n_sessions": 1, "n_sentences": 1}
CURE = "can't be built there .*give it as --data_folder"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
def test_a_corpus_is_readable_for_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        folder = mini_corpus.build(tmp_path / "mini", progress=False, **TINY)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "metadata.json").stat().st_mode & 0o777 == 0o644


def write_tables(folder, *_):
    (folder / "metadata.json").write_text("ours")


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_corpus, "_record", write_tables)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert mini_corpus.build(tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "metadata.json").read_text() == "ours"


@pytest.mark.parametrize("theirs", ["metadata.json", "notes.txt"])
def test_what_others_wrote_in_the_meantime_stays(tmp_path, monkeypatch, theirs):
    """Another process's corpus is taken; a user's files are in the way."""

    def record(folder, *_):
        write_tables(folder)
        (tmp_path / "mini").mkdir()
        (tmp_path / "mini" / theirs).write_text("theirs")

    monkeypatch.setattr(mini_corpus, "_record", record)
    if theirs == "metadata.json":
        mini_corpus.build(tmp_path / "mini")
    else:
        with pytest.raises(UserError, match=CURE):
            mini_corpus.build(tmp_path / "mini")
    assert [p.name for p in tmp_path.iterdir()] == ["mini"]
    assert (tmp_path / "mini" / theirs).read_text() == "theirs"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        BrokenProcessPool(),
        KeyboardInterrupt(),
    ],
)
def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr(mini_corpus, "_record", mock.Mock(side_effect=error))
    expected, words = (UserError, CURE)
    if isinstance(error, KeyboardInterrupt):
        expected, words = KeyboardInterrupt, None
    with pytest.raises(expected, match=words):
        mini_corpus.build(tmp_path / "mini")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_names_the_cure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"Not a directory\); .*{CURE[-18:]}"):
        mini_corpus.build(tmp_path / "file" / "mini")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seed", value) for value in (-1, 2**32)),
        *(("n_speakers", value) for value in (-1, 0, 9991)),
        *(("n_sessions", value) for value in (0, 1001)),
        *(("n_sentences", value) for value in (0, 1001)),
    ],
)
def test_a_number_out_of_its_range_costs_no_work(tmp_path, key, value):
    with pytest.raises(UserError, match=rf"^{key}={value} must lie in \["):
        mini_corpus.build(tmp_path / "mini", **{key: value})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_read_names_the_cure(tmp_path, monkeypatch):
    (tmp_path / "mini").mkdir()

    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(mini_corpus, "_record", write_tables)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=CURE):
        patch.setattr(os, "listdir", refuse)
        mini_corpus.build(tmp_path / "mini")
