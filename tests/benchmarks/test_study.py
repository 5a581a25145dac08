"""The studies' tables hold what the runs hold."""

import json
from pathlib import Path

import found_sessions
import numpy as np
import pytest
import study
import variants
from corpus import make_corpus
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from trained_run import Run, crop_kinds
from variants import accuracies

from spkid.errors import UserError
from spkid.sessions.infer import Sessions

CHOSEN = ["small", "narrow", "mean pooling"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A validation study of three variants, one seed and epoch of each."""
    folder = tmp_path_factory.mktemp("study")
    data = make_corpus(folder / "data", n_utterances=10, n_test=20)
    validation(folder, data)
    return folder


def validation(folder, data, *more):
    study.main(
        [
            *("validation", "--data_folder", str(data), "--variants", *CHOSEN),
            *("--folder", str(folder / "out=1"), "--seeds", "1"),
            *("--pack_folder", str(folder / "packs"), "--epochs", "1", *more),
        ]
    )


def runs(place):
    found = (place / "out=1" / "runs").glob("*/*/results.json")
    return sorted(path.parent for path in found)


def table(path):
    rows = [line.strip("| ") for line in path.read_text().splitlines()]
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_a_validation_is_told_as_the_runs_told_it(place):
    header, _, *rows = table(place / "out=1" / "validation.md")
    assert [row[1] for row in rows] == CHOSEN
    assert len(runs(place)) == 3
    kept = [accuracies(run) for run in runs(place)]
    assert {row[-2] for row in rows} == {f"{a['test']:.3f}" for a in kept}
    results = json.loads((runs(place)[0] / "results.json").read_text())
    assert kept[0]["new"] == pytest.approx(results["valid"]["accuracy"])
    # All speakers are covered.
    assert kept[0]["expected"] == results["expected"]["accuracy"]
    column = header.index("new sessions")
    values, tests = np.array([[r[column], r[-2]] for r in rows], float).T
    _, _, *summary = table(place / "out=1" / "validation_summary.md")
    summary = {row[1]: row for row in summary}
    distance = float(summary["new sessions"][3])
    assert distance == pytest.approx(np.abs(values - tests).mean(), abs=2e-3)
    tests = [one["test"] for one in kept]
    for part in ("known", "expected"):  # untrained, they tie on the new ones
        rank = float(summary[variants.PARTS[part]][5])
        expected = spearmanr([one[part] for one in kept], tests)[0]
        assert rank == pytest.approx(expected, abs=1e-3)
    assert (place / "out=1" / "validation.png").stat().st_size > 5000


def test_several_data_folders_have_a_mean(place, monkeypatch):
    """Of each figure, and each folder counts the same."""
    near, far, also = runs(place)
    trained = {
        ("a", "near", "session", 1): near,
        ("a", "far", "session", 1): far,
        ("b", "also", "session", 1): also,
    }
    monkeypatch.setattr(study, "train_runs", lambda *_: trained)
    validation(place / "mean", place / "data")
    _, _, *rows = table(place / "mean" / "out=1" / "validation_summary.md")
    a, b, mean = (
        [float(cell) for cell in row[3:5]]
        for row in rows
        if row[1] == "new sessions"
    )
    assert a != b
    assert mean == pytest.approx(np.mean([a, b], axis=0), abs=1e-3)


def test_written_sessions_can_be_hidden(place, tmp_path):
    options = ("--variants", "narrow", "--sessions", "inferred")
    validation(tmp_path, place / "data", *options)
    (hidden,) = runs(tmp_path)
    assert hidden.parent.name.endswith("-sessions=inferred")
    for run, source in (hidden, "inferred"), (runs(place)[0], "as sessions.js"):
        report = (run / "manifests" / "split_report.json").read_text()
        assert json.loads(report)["sessions"].startswith(source)


def test_finished_runs_are_not_repeated(place):
    before = [(run / "results.json").stat().st_mtime_ns for run in runs(place)]
    validation(place, place / "data")
    after = [(run / "results.json").stat().st_mtime_ns for run in runs(place)]
    assert before == after


def test_whole_and_masked_are_what_the_run_was_told(place):
    """The way of the studies and the way of train.py: the same numbers."""
    run = runs(place)[0]
    for name in ("crops", "padding"):
        study.main([name, str(run), "--folder", str(place / name)])
        assert (place / name / f"{name}.png").stat().st_size > 5000
    with np.load(run / "evaluation.npz") as told:
        part, right = told["part"], told["target"] == told["guess"]
        expected = {
            variants.PARTS[name]: f"{right[part == name].mean():.3f}"
            for name in np.unique(part)
        }
    _, _, *rows = table(place / "crops" / "crops.md")
    assert {row[0] for row in rows} == set(expected)
    assert all(row[2] == expected[row[0]] for row in rows)
    header, _, *rows = table(place / "padding" / "padding.md")
    assert dict(zip(header[1:], rows[0][1:], strict=True)) == expected


def test_widths_say_how_well_the_training_is_learned(place, monkeypatch):
    widths = {"32": {"d_model": 32, "d_ff": 128}}  # is there: "narrow"
    monkeypatch.setattr(study, "WIDTHS", widths)
    study.main(
        [
            *("widths", "--data_folder", str(place / "data"), "--seeds", "1"),
            *("--folder", str(place / "out=1"), "--epochs", "1"),
        ]
    )
    header, _, row = table(place / "out=1" / "widths.md")
    assert row[:3] == ["data", "32", "session"]
    run = Run(next(run for run in runs(place) if "32" in run.parent.name))
    keys = run.sample("train", 1000)
    assert len(keys) == len(run.parts["train"])
    assert 0 <= float(row[header.index("training")]) <= 1


@given(st.integers(1, 500), st.integers(1, 200))
def test_crops_lie_in_the_utterance(length, size):
    for kind, cut in crop_kinds(size).items():
        pieces = cut(length)
        for start, count in pieces:
            assert count == min(size, length)
            assert 0 <= start <= length - count
        covered = {
            t for start, count in pieces for t in range(start, start + count)
        }
        assert len(covered) == (length if kind == "windows" else count)


def sessions(place, data):
    """The table of one data folder: two draws."""
    options = ("--pack_folder", str(place / "packs"), "--seeds", "2")
    where = ("--folder", str(place / "sessions"))
    study.main(["sessions", "--data_folder", str(data), *options, *where])
    header, _, row = table(place / "sessions" / "sessions.md")
    return dict(zip(header[1:], map(float, row[1:]), strict=True))


def test_sessions_are_scored_against_those_written_down(place, monkeypatch):
    data = make_corpus(place / "pairs")  # two utterances make a session

    def prints(_pack, paths):  # what is heard: the place in the list
        places = [int(Path(path).stem.rpartition("-")[2]) for path in paths]
        return np.array(places)[:, None]

    def scores(size):
        def infer(prints, speaker):
            return Sessions(prints[:, 0] // size, speaker)

        monkeypatch.setattr(found_sessions, "infer_sessions", infer)
        return sessions(place, data)

    monkeypatch.setattr(found_sessions, "pack_fingerprints", prints)
    exact, single, coarse = scores(2), scores(1), scores(4)
    for order in ("in order", "shuffled"):
        index, shared = f"ARI, {order}", f"shared, {order}"
        assert (exact[index], exact[shared]) == (1, 0)
        assert (single[index], single[shared]) == (0, 1)
        assert 0.3 < coarse[index] < 0.7 and coarse[shared] == 0


def test_mistakes_cost_one_sentence(place, tmp_path):
    nobody = {"part": np.array(["new", "test"]), "target": np.array([0, 1])}
    nobody |= {"guess": np.zeros(2), "confidence": np.ones(2)}
    np.savez(tmp_path / "evaluation.npz", **nobody)
    with pytest.raises(UserError, match="no speaker has both held-out and"):
        accuracies(tmp_path)
    with pytest.raises(UserError, match="--variants 'wide' is none of"):
        validation(place, place / "data", "--variants", "wide")
    with pytest.raises(UserError, match="name the output folder of a run"):
        study.main(["crops"])
    with pytest.raises(UserError, match=r"its last words are in .*\.log"):
        validation(tmp_path, tmp_path / "nothing")
    with pytest.raises(UserError, match="--jobs must be at least 1"):
        validation(place, place / "data", "--jobs", "0")
    other = make_corpus(tmp_path / "data")
    with pytest.raises(UserError, match=r"is a run on .*, not on"):
        validation(place, other)
    (other / "sessions.json").unlink()
    with pytest.raises(UserError, match=r"sessions\.json: is missing"):
        sessions(tmp_path, other)
    (other / "testlabels.json").unlink()
    with pytest.raises(UserError, match=r"testlabels\.json: is missing"):
        validation(place, other)
