"""Whole runs of train.py: what they learn, and what they leave."""

import csv
import json
import shutil

import pytest
from corpus import make_corpus
from harness import results, run_predict, run_train, same, weights


def manifest(output, name):
    return json.loads((output / "manifests" / f"{name}.json").read_text())


def test_a_run_learns_and_says_where_its_results_are(finished):
    output, done = finished
    found = results(output)
    # Two of eight utterances of a speaker are held out, a whole session.
    assert found["valid"]["accuracy"] >= 0.7
    assert found["test"]["accuracy"] >= 0.8
    assert found["seed"] == 1986
    assert found["speakers"] == 4
    assert found["epochs"] == 4
    assert found["seconds"] > 0
    expected = found["expected"]
    assert 0 < expected["low"] <= expected["accuracy"] <= expected["high"]
    said = f"{expected['accuracy']:.4f} ({expected['low']:.4f} to "
    assert f"Estimated test accuracy (from confidence): {said}" in done.stdout
    parameters = sum(
        t.numel()
        for name, t in weights(output).items()
        if not any(b in name for b in ("running", "num_batches", "margin"))
    )
    assert found["parameters"] == parameters
    for name in (
        "results.json",
        "submission.csv",
        "train_log.txt",
        "report.html",
        "model",
    ):
        assert str(output / name) in done.stdout
        assert (output / name).exists()
    assert len((output / "train_log.txt").read_text().splitlines()) == 4


def test_the_submission_has_testdatas_order_and_names(data, finished):
    with open(finished[0] / "submission.csv", newline="") as file:
        header, *rows = list(csv.reader(file))
    testdata = json.loads((data / "testdata.json").read_text())
    assert header == ["Id", "Category"]
    listed = [u["feature_path"] for u in testdata["utterances"]]
    assert [row[0] for row in rows] == listed
    truth = json.loads((data / "testlabels.json").read_text())
    right = sum(truth[path] == name for path, name in rows) / len(rows)
    assert right == pytest.approx(results(finished[0])["test"]["accuracy"])


def test_a_finished_run_given_again_only_repeats_its_results(
    data, finished, tmp_path
):
    output = shutil.copytree(finished[0], tmp_path / "out")
    before = weights(output), results(output)
    for more in (["--test_only"], []):
        done = run_train(data, output, *more, report=True)
        assert done.returncode == 0, done.stderr
        assert "Going into epoch" not in done.stdout + done.stderr
        assert same(before[0], weights(output))
        after = results(output)
        assert after["test"] == before[1]["test"]
        assert after["epochs"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--num_workers=2"], ["--pack_on_device=True", "--num_workers=2"]],
    ids=["workers", "pack on device"],
)
def test_how_features_are_read_changes_no_bit(
    data, finished, tmp_path, options
):
    done = run_train(data, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(tmp_path / "out"))


@pytest.mark.slow
def test_a_final_fit_trains_on_all_for_as_many_steps(data, tmp_path):
    output = tmp_path / "out"
    more = ("--final_fit=True", "--known_fraction=0.15")
    done = run_train(data, output, *more, report=True)
    assert done.returncode == 0, done.stderr
    first, final = results(output), results(output / "final")
    assert {"valid", "known", "gap", "test"} <= first.keys()
    assert final["split"] == "none"
    assert final["valid"]["accuracy"] is None
    assert final["test"]["accuracy"] is not None
    assert len(manifest(output / "final", "train")) == 32
    assert manifest(output / "final", "valid") == {}
    # 32 utterances for the steps of 4 epochs of those not held out, at most.
    trained = manifest(output, "train")
    history = json.loads((output / "history.json").read_text())
    best = max(row["valid accuracy"] for row in history)
    chosen = [r["epoch"] for r in history if r["valid accuracy"] == best]
    steps = {max(1, round(epoch * len(trained) / 32)) for epoch in chosen}
    assert final["epochs"] in steps
    for place in (output, output / "final"):
        assert str(place / "report.html") in done.stdout
        assert (place / "report.html").exists()


@pytest.mark.slow
def test_other_ways_of_reading_and_evaluating_run(data, tmp_path):
    """Without a pack, balanced, in buckets, by windows; predict.py agrees."""
    output = tmp_path / "out"
    more = ["--pack=False", "--sampler=balanced", "--bucket_batches=2"]
    more += ["--evaluation=windows", "--window_frames=20", "--window_hop=10"]
    done = run_train(data, output, *more, "--number_of_epochs=8")
    assert done.returncode == 0, done.stderr
    assert results(output)["test"]["accuracy"] >= 0.8
    assert not (output / "packs").exists()
    submission = (output / "submission.csv").read_text()
    (output / "submission.csv").unlink()
    done = run_predict(output)
    assert done.returncode == 0, done.stderr
    assert (output / "submission.csv").read_text() == submission


@pytest.mark.slow
@pytest.mark.parametrize("system", ["transformer", "ecapa"])
def test_the_other_systems_run(data, tmp_path, system):
    output = tmp_path / "out"
    more = ["--batch_size=4", "--number_of_epochs=1"]
    done = run_train(data, output, *more, system=system)
    assert done.returncode == 0, done.stderr
    assert results(output)["valid"]


@pytest.mark.slow
def test_the_large_system_runs_a_few_batches(data, tmp_path):
    more = ["--batch_size=4", "--number_of_epochs=1", "--num_workers=0"]
    system = "conformer_large"
    done = run_train(data, tmp_path / "out", *more, "--debug", system=system)
    assert done.returncode == 0, done.stderr
    assert "debug run has passed" in done.stdout


def test_a_debug_run_leaves_nothing(data, tmp_path):
    done = run_train(data, tmp_path / "out", "--debug")
    assert done.returncode == 0, done.stderr
    assert "debug run has passed" in done.stdout
    assert not list((tmp_path / "out").glob("[!p]*")), "only packs are left"


def test_a_debug_run_leaves_what_it_did_not_make(data, tmp_path):
    mine = tmp_path / "out" / "debug" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    saved = tmp_path / "saved" / "saving+CKPT+1"
    saved.mkdir(parents=True)
    more = [f"--save_folder={saved.parent}", f"--manifest_folder={tmp_path}"]
    for fails in (["--lr=1000", "--nonfinite_patience=0"], []):
        done = run_train(data, tmp_path / "out", "--debug", *more, *fails)
        assert "Traceback" not in done.stderr
        assert mine.read_text() == "years of work"
        assert saved.exists()
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert left == {"debug", "packs"}
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out", "saved"}


SPEAKERS = ["Ann {guest}", "{{2}}", "%s <b>", '$x "q", y']


def test_names_are_kept_whatever_they_hold(data, tmp_path):
    """SpeechBrain's load_data_json formats them."""
    odd = shutil.copytree(data, tmp_path / "da{t}a")
    names = dict(zip([f"id{i:05d}" for i in range(4)], SPEAKERS, strict=True))
    for path in odd.glob("*.json"):
        text = path.read_text()
        for name, new in names.items():
            text = text.replace(f'"{name}"', json.dumps(new))
        path.write_text(text.replace("uttr-1-1.pt", "uttr-{1}-{{1}}.pt"))
    (odd / "uttr-1-1.pt").rename(odd / "uttr-{1}-{{1}}.pt")
    output = tmp_path / "o{u}t"
    done = run_train(odd, output, fate=("validation", 2, True))
    assert done.returncode == -9
    done = run_train(odd, output, report=True)
    assert done.returncode == 0, done.stderr
    found = (output / "speakers.txt").read_text().splitlines()
    assert found == SPEAKERS[::-1]
    submission = (output / "submission.csv").read_text()
    with open(output / "submission.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert {name for _, name in rows} <= set(SPEAKERS)
    assert results(output)["test"]["accuracy"] >= 0.5
    assert "%s <b>" not in (output / "report.html").read_text()
    (output / "submission.csv").unlink()
    done = run_predict(output)
    assert done.returncode == 0, done.stderr
    assert (output / "submission.csv").read_text() == submission


def test_without_test_utterances_there_still_is_a_run(tmp_path):
    data = make_corpus(tmp_path / "data", n_test=0, labels=False)
    done = run_train(data, tmp_path / "out", "--number_of_epochs=1")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out")["test"]["accuracy"] is None


def test_tensorboard_has_the_epochs(data, tmp_path):
    more = ["--use_tensorboard=True", "--number_of_epochs=1"]
    done = run_train(data, tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out" / "tensorboard").rglob("events.*"))


NAMES = ["run #2", "a: b", "r<seed>x", "lr=0.1/a", "7", "null"]


@pytest.mark.parametrize("name", NAMES)
def test_an_output_folder_may_have_any_name(data, tmp_path, name):
    done = run_train(data, name, "--debug", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Results go to {name}/debug" in done.stdout
    assert (tmp_path / name / "packs").exists()
    assert len(list(tmp_path.iterdir())) == 1
