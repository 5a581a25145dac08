"""The split holds out what was asked for, and its report says what is not."""

import json
from dataclasses import replace

import pytest
from corpus import make_corpus

from ml2022hw4_prepare import prepare
from spkid.errors import UserError
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


def test_a_single_session_each_is_refused_with_the_cure(made):
    corpus, _ = made
    path = corpus.folder / "sessions.json"
    path.write_text(
        json.dumps(dict.fromkeys(json.loads(path.read_text()), "a"))
    )
    with pytest.raises(UserError, match="or give --sessions inferred"):
        divide(made)


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


def test_a_fold_that_holds_nothing_out_is_refused(made):
    with pytest.raises(UserError, match="fold=29 holds nothing out"):
        divide(made, split="folds", n_folds=30, fold=29)


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


def test_a_missing_gap_is_explained(made):
    def note():
        return divide(made, known_fraction=0.0)[1]["warnings"][-1]

    assert note().endswith("give a larger --known_fraction.")
    path = made[0].folder / "sessions.json"
    names = json.loads(path.read_text())
    path.write_text(json.dumps({key: key for key in names}))
    assert note().endswith("trained on has a second utterance.")


@pytest.mark.parametrize("name", ["session", "random"])
def test_a_set_with_nothing_to_hold_out_is_refused(tmp_path, name):
    folder = make_corpus(tmp_path / "d", n_utterances=1)
    made = prepare(folder, pack_folder=tmp_path / "packs")
    with pytest.raises(UserError, match="nothing can be held out"):
        divide(made, split=name)


def test_manifests_are_kept_while_nothing_changes(made, tmp_path):
    folder = tmp_path / "manifests"
    split.write_manifests(*made, folder, CHOICES)
    tests = json.loads((folder / "test.json").read_text())
    assert list(tests) == [u.path for u in made[0].test]
    (folder / "valid.json").write_text("kept")
    split.write_manifests(*made, folder, CHOICES)
    assert (folder / "valid.json").read_text() == "kept"
    split.write_manifests(*made, folder, {**CHOICES, "seed": 4})
    before = (folder / "valid.json").read_text()
    assert before != "kept"
    (folder / "valid.json").unlink()
    split.write_manifests(*made, folder, {**CHOICES, "seed": 4})
    assert (folder / "valid.json").read_text() == before
