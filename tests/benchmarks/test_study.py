"""The studies' tables hold what the runs hold."""

import json
from pathlib import Path
from types import SimpleNamespace

import found_sessions
import harness
import numpy as np
import pytest
import study
import variants
from corpus import make_corpus
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from trained_run import Run, crop_kinds
from variants import COLUMNS, accuracies

from spkid.errors import UserError
from spkid.evaluation import Evaluation
from spkid.hparams import Settings
from spkid.sessions import Sessions

CHOSEN = ["small", "narrow", "mean pooling"]


def train_forked(command, stdout, **_):
    """Runs train.py as a study does, without the seconds of imports."""
    done = harness.run("train", command[2:])
    stdout.write(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A validation study of three variants, one seed and epoch of each."""
    folder = tmp_path_factory.mktemp("study")
    data = make_corpus(folder / "data", n_utterances=10, n_test=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "subprocess", SimpleNamespace(run=train_forked))
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


def test_validation_table_shows_what_the_runs_recorded(place):
    header, _, *rows = table(place / "out=1" / "validation.md")
    assert [row[1] for row in rows] == CHOSEN
    assert len(runs(place)) == 3
    kept = [accuracies(run) for run in runs(place)]
    assert {row[-2] for row in rows} == {f"{a['test']:.3f}" for a in kept}
    results = json.loads((runs(place)[0] / "results.json").read_text())
    assert kept[0]["new"] == pytest.approx(results["valid"]["accuracy"])
    # All speakers are covered.
    assert kept[0]["expected"] == results["expected"]["accuracy"]
    column = header.index(COLUMNS["new"])
    values, tests = np.array([[r[column], r[-2]] for r in rows], float).T
    _, _, *summary = table(place / "out=1" / "validation_summary.md")
    summary = {row[1]: row for row in summary}
    distance = float(summary[COLUMNS["new"]][3])
    assert distance == pytest.approx(np.abs(values - tests).mean(), abs=2e-3)
    tests = [one["test"] for one in kept]
    for part in ("known", "new", "expected"):
        values, row = [one[part] for one in kept], summary[COLUMNS[part]]
        if len(set(values)) == 1:  # they tie, and have no rank
            assert len(row) < 6 or not row[5]
            continue
        expected = spearmanr(values, tests)[0]
        assert float(row[5]) == pytest.approx(expected, abs=1e-3)
    assert (place / "out=1" / "validation.png").stat().st_size > 5000


def test_mean_over_data_folders_counts_each_folder_the_same(place, monkeypatch):
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
        if row[1] == COLUMNS["new"]
    )
    assert a != b
    assert mean == pytest.approx(np.mean([a, b], axis=0), abs=1e-3)


@pytest.mark.slow
def test_sessions_inferred_ignores_those_of_the_data_folder(place, tmp_path):
    options = ("--variants", "narrow", "--sessions", "inferred")
    validation(tmp_path, place / "data", *options)  # in a real process
    (hidden,) = runs(tmp_path)
    assert hidden.parent.name.endswith("-sessions=inferred")
    for run, inferred in (hidden, True), (runs(place)[0], False):
        report = (run / "manifests" / "split_report.json").read_text()
        source = json.loads(report)["sessions"]
        assert source.startswith("inferred") == inferred
        assert ("sessions.json" in source) != inferred


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_each_variant_is_a_valid_system(name, tmp_path):
    changes = {**variants.SMALL, **variants.VARIANTS[name]}
    text = variants.system_text(changes.pop("text", {}))
    (tmp_path / "system.yaml").write_text(text)
    settings = Settings(tmp_path / "system.yaml", changes)
    settings.check()
    preprocess = settings.build(["preprocess"])["preprocess"]
    augmented = preprocess.channel is not None, preprocess.masking is not None
    assert augmented == ((name == "augmented"),) * 2


def test_finished_runs_are_not_repeated(place):
    before = [(run / "results.json").stat().st_mtime_ns for run in runs(place)]
    validation(place, place / "data")
    after = [(run / "results.json").stat().st_mtime_ns for run in runs(place)]
    assert before == after


def test_crops_and_padding_repeat_the_runs_accuracies(place):
    """For whole utterances and for masked batches."""
    run = runs(place)[0]
    for name in ("crops", "padding"):
        study.main([name, str(run), "--folder", str(place / name)])
        assert (place / name / f"{name}.png").stat().st_size > 5000
    scored = Evaluation.load(run / "evaluation.npz")
    expected = {
        COLUMNS[part]: f"{scored.of_part(part).accuracy():.3f}"
        for part in np.unique(scored.part)
    }
    _, _, *rows = table(place / "crops" / "crops.md")
    assert {row[0] for row in rows} == set(expected)
    assert all(row[2] == expected[row[0]] for row in rows)
    header, _, *rows = table(place / "padding" / "padding.md")
    assert dict(zip(header[1:], rows[0][1:], strict=True)) == expected


def test_widths_table_shows_accuracy_on_training_utterances(place, monkeypatch):
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
    column = header.index(study.PARTS["train"].name)
    assert 0 <= float(row[column]) <= 1


@given(st.integers(1, 500), st.integers(1, 200))
def test_crops_lie_inside_the_utterance(length, size):
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


def test_inferred_sessions_are_scored_against_those_given(place, monkeypatch):
    data = make_corpus(place / "pairs")  # two utterances make a session

    def prints(_features, paths):  # what is heard: the place in the list
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


def test_speakers_who_are_not_tested_cannot_be_compared(tmp_path):
    Evaluation(
        id=np.array(["a", "b"]),
        part=np.array(["new", "test"]),
        target=np.array([0, 1]),
        guess=np.array([0, 0]),
        loss=np.ones(2, np.float32),
        confidence=np.ones(2, np.float32),
        frames=np.array([9, 9]),
        embedding=np.zeros((2, 3), np.float16),
        speakers=("ann", "bob"),
    ).save(tmp_path / "evaluation.npz")
    with pytest.raises(UserError, match="no speaker has both held-out and"):
        accuracies(tmp_path)


def test_refusals_are_one_sentence(place, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="--variants='wide' must be default size, small, "
    ):
        validation(place, place / "data", "--variants", "wide")
    with pytest.raises(UserError, match="name the output folder of a run"):
        study.main(["crops"])
    with pytest.raises(UserError, match="give --data_folder"):
        study.main(["widths"])
    with pytest.raises(UserError, match="--jobs must be at least 1"):
        validation(place, place / "data", "--jobs", "0")
    other = make_corpus(tmp_path / "data")
    with pytest.raises(UserError, match=r"holds a run on .*, not on"):
        validation(place, other)
    with pytest.raises(UserError, match="two folders have the same name"):
        validation(place, other, "--data_folder", str(other), str(other))
    (other / "sessions.json").unlink()
    with pytest.raises(UserError, match=r"sessions\.json: is missing"):
        sessions(tmp_path, other)
    (other / "testlabels.json").unlink()
    with pytest.raises(UserError, match=r"testlabels\.json: is missing"):
        validation(place, other)
    monkeypatch.setattr(
        variants, "subprocess", SimpleNamespace(run=train_forked)
    )
    with pytest.raises(UserError, match=r"the run failed; .*\.log"):
        validation(tmp_path, tmp_path / "nothing", "--variants", "small")
    log = next(tmp_path.glob("out=1/runs/*/*.log")).read_text()
    assert "Error: " in log
