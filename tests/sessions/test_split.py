"""The split holds out what was asked for, and its report says what is not."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from corpus import make_corpus

from ml2022hw4_prepare import prepare
from spkid.data import Corpus, FeatureFiles, Utterance, manifest
from spkid.errors import UserError
from spkid.files import read_json
from spkid.sessions import split

CHOICES = {
    "split": "session",
    "sessions": "auto",
    "valid_fraction": 0.25,
    "known_fraction": 0.15,
    "n_folds": 4,
    "fold": 0,
    "seed": 3,
}


@pytest.fixture
def made(tmp_path):
    folder = make_corpus(tmp_path / "data")
    return prepare(folder, pack_folder=tmp_path / "packs")


def divide(made, **changes):
    return split.divide(*made, {**CHOICES, **changes})


def moved(corpus, form):
    """The corpus with other paths, of speaker, number, and number's parity."""
    labelled = [
        replace(utterance, path=form.format(utterance.speaker, n, n % 2))
        for n, utterance in enumerate(corpus.labelled)
    ]
    return replace(corpus, labelled=tuple(labelled))


def paths(entries, part=None):
    return {k for k, e in entries.items() if part in (None, e.get("part"))}


def test_whole_sessions_and_some_known_utterances_are_held_out(made):
    parts, report = divide(made)
    sessions = {
        part: {entry["session"] for entry in entries.values()}
        for part, entries in parts.items()
    }
    new = {
        entry["session"]
        for entry in parts["valid"].values()
        if entry["part"] == "new"
    }
    assert len(new) == 4  # one of each speaker
    assert not new & sessions["train"]
    assert sessions["valid"] - new <= sessions["train"]
    assert len(paths(parts["valid"], "new")) == 8 == report["held_out"]
    assert len(paths(parts["valid"], "known")) == 5 == report["known"]
    assert len(parts["train"]) == 32 - 8 - 5
    assert report["sessions"] == "read from sessions.json"
    assert all(s["sessions"] == 4 for s in report["speakers"].values())
    assert not report["warnings"]


def test_folds_cover_each_utterance_once(made):
    held = [
        paths(divide(made, split="folds", fold=fold)[0]["valid"], "new")
        for fold in range(4)
    ]
    assert sum(map(len, held)) == 32 == len(set().union(*held))


def test_a_random_split_is_stratified_seeded_and_warned_of(made):
    parts, report = divide(made, split="random")
    speakers = [e["spk_id"] for e in parts["valid"].values()]
    assert sorted(speakers.count(s) for s in set(speakers)) == [2] * 4
    assert {e["part"] for e in parts["valid"].values()} == {"random"}
    assert "too optimistic" in report["warnings"][-1]
    assert divide(made, split="random")[0] == parts
    assert divide(made, split="random", seed=4)[0] != parts


def test_split_none_holds_nothing_out(made):
    parts, report = divide(made, split="none")
    assert len(parts["train"]) == 32
    assert not parts["valid"]
    assert not report["warnings"]


def test_a_speaker_with_one_session_is_named_in_a_warning(made):
    corpus, _ = made
    path = corpus.folder / "sessions.json"
    names = json.loads(path.read_text())
    for key in names:
        if key.startswith("uttr-2"):
            names[key] = "the one"
    path.write_text(json.dumps(names))
    _, report = divide(made)
    assert "1 of 4 speakers have nothing held out" in report["warnings"][0]
    assert "id00002" in report["warnings"][0]
    assert report["speakers"]["id00002"]["held_out"] == 0


def test_folders_named_speaker_session_file_are_sessions(made):
    corpus, pack = made
    (corpus.folder / "sessions.json").unlink()
    assert split.written_sessions(corpus) == (None, "")
    corpus = moved(corpus, "{0}/{2}/{1}.pt")
    found, source = split.find_sessions(corpus, pack)
    assert source == "read from the folders speaker/session/file"
    assert set(found.label) == {0, 1}


@pytest.mark.parametrize("form", ["train/{0}/{1}.pt", "train/part{1}/{0}.pt"])
def test_other_folders_are_not_sessions(made, form):
    corpus = moved(made[0], form)
    (corpus.folder / "sessions.json").unlink()
    assert split.written_sessions(corpus) == (None, "")


def one_session_each(corpus):
    path = corpus.folder / "sessions.json"
    names = json.loads(path.read_text())
    path.write_text(json.dumps(dict.fromkeys(names, "a")))


def follow(made, choices):
    """What a refused split says; then it is done as it says, and runs."""
    with pytest.raises(UserError) as caught:
        divide(made, **choices)
    said = str(caught.value)
    advised = dict(re.findall(r"--(\w+) (\w+)", said))
    for key in advised.keys() & {"n_folds"}:
        advised[key] = int(advised[key])
    if "fold" in advised:
        advised["fold"] = int(re.search(r"from 0 to (\d+)", said)[1])
    assert advised, said
    parts, _ = divide(made, **{**choices, **advised})
    assert bool(parts["valid"]) == (advised.get("split") != "none")
    return said


@pytest.mark.parametrize("name", ["session", "folds"])
def test_a_single_session_each_is_refused_with_a_cure_that_works(made, name):
    one_session_each(made[0])
    said = follow(made, {"split": name})
    assert "no speaker has two sessions (they were read from" in said
    assert "record more, or give --sessions inferred." in said


@pytest.mark.parametrize("sessions", ["auto", "inferred"])
def test_where_no_sessions_can_be_inferred_a_random_split_is_the_cure(
    made, sessions, monkeypatch
):
    one_session_each(made[0])
    monkeypatch.setattr(
        split, "pack_fingerprints", lambda _, paths: np.ones((len(paths), 8))
    )
    said = follow(made, {"split": "session", "sessions": sessions})
    assert "give --split random, which is too optimistic" in said


@pytest.mark.parametrize("name", ["session", "folds", "random"])
def test_one_utterance_each_can_be_trained_on_without_validation(
    tmp_path, name
):
    folder = make_corpus(tmp_path / "d", n_utterances=1)
    made = prepare(folder, pack_folder=tmp_path / "packs")
    said = follow(made, {"split": name})
    assert "no speaker has two utterances, so nothing can be held out" in said
    assert "--split none" in said


@pytest.mark.parametrize(("n_folds", "fold"), [(30, 29), (17, 16), (30, 16)])
def test_a_fold_that_holds_nothing_out_is_refused_with_one_that_does(
    made, n_folds, fold
):
    said = follow(made, {"split": "folds", "n_folds": n_folds, "fold": fold})
    assert f"fold={fold} holds nothing out: there are 16 sessions" in said


def test_sessions_are_inferred_if_asked_though_they_are_written(made):
    _, report = divide(made, sessions="inferred")
    assert report["sessions"].startswith("inferred by clustering")
    # The corpus's features have no sessions, so their order says nothing.
    assert "clustered" in report["warnings"][0]


def test_another_sessions_file_is_another_split(made, tmp_path):
    corpus, _ = made
    folder, path = tmp_path / "manifests", made[0].folder / "sessions.json"
    split.write_manifests(*made, folder, CHOICES)
    before = (folder / "valid.json").read_text()
    names = json.loads(path.read_text())
    path.write_text(json.dumps({k: v[::-1] for k, v in names.items()}))
    assert split.sessions_digest(corpus, {**CHOICES, "split": "random"}) is None
    assert split.sessions_digest(corpus, CHOICES)
    path.write_text(json.dumps({k: k[:8] + k[-4:] for k in names}))
    split.write_manifests(*made, folder, CHOICES)
    assert (folder / "valid.json").read_text() != before


def test_an_utterance_without_session_is_named(made):
    path = made[0].folder / "sessions.json"
    path.write_text('{"uttr-0-0.pt": "a"}')
    with pytest.raises(UserError, match=r"sessions.json: 'uttr-0-1.pt' has no"):
        divide(made)
    path.write_text('{"uttr-0-0.pt": ["a"]}')
    with pytest.raises(UserError, match=r"'uttr-0-0.pt' has session \['a'\];"):
        divide(made)


def test_sessions_may_be_numbers(made):
    path = made[0].folder / "sessions.json"
    names = json.loads(path.read_text())
    numbers = {name: number for number, name in enumerate(names.values())}
    splits = []
    for form in (str, int):
        said = {key: form(numbers[name]) for key, name in names.items()}
        path.write_text(json.dumps(said))
        splits.append(divide(made))
    assert splits[0] == splits[1]


@pytest.mark.parametrize(
    "spoil",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("nowhere.json"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("../outside.json"),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b"{"),
        lambda path: path.write_bytes(b"\xff\xfe{"),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b'{"a": 1, "a": 2}'),
        lambda path: (path.touch(), os.truncate(path, 2**40)),
    ],
)
def test_sessions_are_read_as_warily_as_the_rest(made, spoil):
    path = made[0].folder / "sessions.json"
    path.rename(made[0].folder.parent / "outside.json")
    spoil(path)
    for read in (
        lambda: split.written_sessions(made[0]),
        lambda: split.sessions_digest(made[0], CHOICES),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_sessions_of_windows_editors_are_read(made, encoding):
    before = divide(made)
    path = made[0].folder / "sessions.json"
    path.write_text(path.read_text(), encoding)
    assert divide(made) == before


def test_true_is_no_session(made):
    path = made[0].folder / "sessions.json"
    names = json.loads(path.read_text())
    path.write_text(json.dumps(names | {"uttr-0-0.pt": True}))
    with pytest.raises(UserError, match=r"'uttr-0-0.pt' has session True;"):
        divide(made)


def test_a_missing_gap_is_explained(made):
    def note(share=0.0):
        notes = divide(made, known_fraction=share)[1]["warnings"]
        return notes[-1] if notes else ""

    assert note().endswith("give a larger --known_fraction.")
    assert not note(0.5)
    path = made[0].folder / "sessions.json"
    names = json.loads(path.read_text())
    path.write_text(json.dumps({key: key for key in names}))
    assert note().endswith("trained on has a second utterance.")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_manifests_are_kept_while_nothing_changes(made, tmp_path):
    folder = tmp_path / "manifests"

    def written(**changes):
        split.write_manifests(*made, folder, {**CHOICES, **changes})
        return {path.name: path.stat().st_ino for path in folder.iterdir()}

    before = written()
    tests = json.loads((folder / "test.json").read_text())
    assert list(tests) == [u.path for u in made[0].test]
    assert written() == before
    text = (folder / "valid.json").read_text()
    assert written(seed=4) != before
    assert (folder / "valid.json").read_text() != text


@pytest.mark.parametrize("name", [*split.FILES, "split.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_text(json.dumps({"files": [1]})),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b" "),
        lambda path: path.unlink(),
    ],
)
def test_damaged_manifests_are_written_again(made, tmp_path, name, damage):
    folder = tmp_path / "manifests"
    split.write_manifests(*made, folder, CHOICES)
    before = contents(folder)
    damage(folder / name)
    split.write_manifests(*made, folder, CHOICES)
    assert contents(folder) == before


@pytest.mark.parametrize("name", [*split.FILES, "split.json"])
@pytest.mark.parametrize(
    "damage",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
    ],
)
def test_what_is_no_manifest_is_left_alone(made, tmp_path, name, damage):
    folder = tmp_path / "manifests"
    split.write_manifests(*made, folder, CHOICES)
    (folder / name).unlink()
    damage(folder / name)
    with pytest.raises(UserError, match=f"{name}: is no .*; move it away"):
        split.write_manifests(*made, folder, CHOICES)
    os.replace(folder / name, tmp_path / "away")
    split.write_manifests(*made, folder, CHOICES)


@pytest.mark.parametrize(
    "name", ["Ann {guest}", "{{2}}", "{}", "%s", "{0!r}", "$x", "é", "\\N{x}"]
)
def test_manifests_keep_odd_names(tmp_path, name):
    utterances = tuple(
        Utterance(f"{part}/{name}.pt", 9, name) for part in ("a", "b")
    )
    corpus = Corpus(tmp_path, 40, (name,), utterances[:1], utterances[1:])
    features = FeatureFiles(tmp_path, utterances, n_mels=40)
    choices = {**CHOICES, "split": "none"}
    split.write_manifests(corpus, features, tmp_path, choices)
    for part, own in (("train", utterances[:1]), ("test", utterances[1:])):
        text = (tmp_path / f"{part}.json").read_bytes()
        assert text.isascii()  # whatever the locale of who reads it
        assert read_json(tmp_path / f"{part}.json") == manifest(own)
