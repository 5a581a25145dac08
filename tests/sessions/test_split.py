import json

import pytest
from corpus import make_corpus

import prepare
from ml2022hw4_prepare import read_corpus
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
    corpus = read_corpus(make_corpus(tmp_path / "data"))
    return corpus, prepare.pack_corpus(corpus, tmp_path / "packs")


def divide(made, **changes):
    return split.divide(*made, {**CHOICES, **changes})


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
    assert report["sessions"] == "as sessions.json says"
    assert all(s["sessions"] == 4 for s in report["speakers"].values())
    assert not report["warnings"]


def test_folds_cover_each_utterance_once(made):
    held = [
        paths(divide(made, split="folds", fold=fold)[0]["valid"], "new")
        for fold in range(4)
    ]
    assert sum(map(len, held)) == 32 == len(set().union(*held))


def test_random_is_stratified_seeded_and_warned_of(made):
    parts, report = divide(made, split="random")
    speakers = [e["spk_id"] for e in parts["valid"].values()]
    assert sorted(speakers.count(s) for s in set(speakers)) == [2] * 4
    assert {e["part"] for e in parts["valid"].values()} == {"random"}
    assert "flatters" in report["warnings"][-1]
    assert divide(made, split="random")[0] == parts
    assert divide(made, split="random", seed=4)[0] != parts


def test_none_holds_nothing_out(made):
    parts, report = divide(made, split="none")
    assert len(parts["train"]) == 32
    assert not parts["valid"]
    assert not report["warnings"]


def test_a_speaker_with_one_session_is_said(made):
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


def test_folders_of_sessions_are_taken(made):
    corpus, pack = made
    (corpus.folder / "sessions.json").unlink()
    assert split.written_sessions(corpus) == (None, "")
    for number, utterance in enumerate(corpus.labelled):
        utterance.path = f"{utterance.speaker}/{number % 2}/{number}.pt"
    found, source = split.find_sessions(corpus, pack)
    assert source == "the folders speaker/session/file"
    assert set(found.label) == {0, 1}


@pytest.mark.parametrize("form", ["train/{0}/{1}.pt", "train/part{1}/{0}.pt"])
def test_other_folders_are_no_sessions(made, form):
    corpus, _ = made
    (corpus.folder / "sessions.json").unlink()
    for number, utterance in enumerate(corpus.labelled):
        utterance.path = form.format(utterance.speaker, number)
    assert split.written_sessions(corpus) == (None, "")


def test_single_written_sessions_name_the_cure(made):
    corpus, _ = made
    path = corpus.folder / "sessions.json"
    path.write_text(
        json.dumps(dict.fromkeys(json.loads(path.read_text()), "a"))
    )
    with pytest.raises(UserError, match="or give --sessions inferred"):
        divide(made)


def test_sessions_can_be_inferred_all_the_same(made):
    _, report = divide(made, sessions="inferred")
    assert report["sessions"].startswith("inferred from the features")
    # The corpus's features have no sessions, so their order says nothing.
    assert "clustered" in report["warnings"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "sesion"}, "split='sesion' is none of"),
        ({"valid_fraction": 1.5}, "valid_fraction=1.5 isn't in"),
        ({"known_fraction": -0.1}, "known_fraction=-0.1 isn't in"),
        ({"fold": 4}, "fold=4 isn't in 0 ... n_folds - 1 = 3"),
        ({"sessions": "known"}, "sessions='known' is neither"),
    ],
)
def test_impossible_choices_are_refused(made, change, words):
    with pytest.raises(UserError, match=words):
        divide(made, **change)


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


def test_a_fold_too_many_is_said(made):
    with pytest.raises(UserError, match="fold=29 holds out nothing"):
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


def test_no_gap_has_its_reason(made):
    def note():
        return divide(made, known_fraction=0.0)[1]["warnings"][-1]

    assert note().endswith("a larger --known_fraction would do it.")
    path = made[0].folder / "sessions.json"
    names = json.loads(path.read_text())
    path.write_text(json.dumps({key: key for key in names}))
    assert note().endswith("trained on has a second utterance.")


@pytest.mark.parametrize("name", ["session", "random"])
def test_nothing_to_hold_out_is_said(tmp_path, name):
    corpus = read_corpus(make_corpus(tmp_path / "d", n_utterances=1))
    pack = prepare.pack_corpus(corpus, tmp_path / "packs")
    with pytest.raises(UserError, match="nothing can be held out"):
        divide((corpus, pack), split=name)


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
