"""The commands as a user gives them, in processes of their own."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from corpus import make_corpus

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "ML2022hw4"
TINY = [
    "--d_model=24",
    "--n_layers=1",
    "--n_heads=2",
    "--d_ff=32",
    "--embedding_size=16",
    "--segment_frames=16",
    "--lr=0.01",
]
BRIEF = ["--batch_size=4", "--number_of_epochs=4"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


def command(data, output, *more, system="conformer"):
    if system == "conformer":
        more = (*TINY, *BRIEF, *more)
    return [
        sys.executable,
        "train.py",
        f"hparams/{system}.yaml",
        f"--data_folder={data}",
        f"--output_folder={output}",
        f"--pack_folder={output}/packs",
        *more,
    ]


def run(arguments, folder=ROOT, **options):
    return subprocess.run(
        arguments,
        check=False,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def weights(output):
    found = {}
    for name in ("embedding_model", "classifier"):
        path = output / "model" / f"{name}.ckpt"
        found |= torch.load(path, weights_only=True)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An undisturbed run from the repository's root."""
    output = tmp_path_factory.mktemp("run") / "out"
    done = run(command(data, output))
    assert done.returncode == 0, done.stderr
    return output, done


def test_a_final_fit_trains_on_all_for_as_many_steps(data, tmp_path):
    output = tmp_path / "out"
    more = ("--final_fit=True", "--known_fraction=0.15")
    done = run(command(data, output, *more))
    assert done.returncode == 0, done.stderr
    first = json.loads((output / "results.json").read_text())
    final = json.loads((output / "final" / "results.json").read_text())
    assert {"valid", "known", "gap", "test"} <= first.keys()
    assert final["split"] == "none"
    assert final["valid"]["accuracy"] is None
    assert final["test"]["accuracy"] is not None
    folder = output / "final" / "manifests"
    assert len(json.loads((folder / "train.json").read_text())) == 32
    assert json.loads((folder / "valid.json").read_text()) == {}
    # 32 utterances for the steps of 4 epochs of those not held out, at most.
    trained = json.loads((output / "manifests" / "train.json").read_text())
    history = json.loads((output / "history.json").read_text())
    best = max(row["valid accuracy"] for row in history)
    chosen = [r["epoch"] for r in history if r["valid accuracy"] == best]
    steps = {max(1, round(epoch * len(trained) / 32)) for epoch in chosen}
    assert final["epochs"] in steps
    for place in (output, output / "final"):
        assert str(place / "report.html") in done.stdout
        assert (place / "report.html").exists()


def test_a_choice_that_cannot_be_carried_out_is_not_the_run_s(data, tmp_path):
    arguments = command(data, tmp_path / "out", "--debug", "--split=folds")
    wrong = run([*arguments, "--fold=7"])
    assert wrong.returncode == 1
    assert "fold=7 isn't in 0 ... n_folds - 1 = 4" in wrong.stderr
    right = run([*arguments, "--fold=1"])
    assert right.returncode == 0, right.stderr
    assert not list((tmp_path / "out").glob("[!p]*")), "only the packs are left"


def test_a_run_learns_and_says_where_its_results_are(data, finished):
    output, done = finished
    results = json.loads((output / "results.json").read_text())
    # Two of eight utterances of a speaker are held out, a whole session.
    assert results["valid"]["accuracy"] >= 0.7
    assert results["test"]["accuracy"] >= 0.8
    assert results["seed"] == 1986
    assert results["speakers"] == 4
    assert results["epochs"] == 4
    assert results["seconds"] > 0
    expected = results["expected"]
    assert 0 < expected["low"] <= expected["accuracy"] <= expected["high"]
    said = f"{expected['accuracy']:.4f} ({expected['low']:.4f} to "
    assert f"by how sure the model is of it: {said}" in done.stdout
    parameters = sum(
        t.numel()
        for name, t in weights(output).items()
        if not any(b in name for b in ("running", "num_batches", "margin"))
    )
    assert results["parameters"] == parameters
    for name in ("results.json", "submission.csv", "train_log.txt"):
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
    results = json.loads((finished[0] / "results.json").read_text())
    assert right == pytest.approx(results["test"]["accuracy"])


def test_predict_writes_the_same_submission(data, finished, tmp_path):
    output, target = finished[0], tmp_path / "again.csv"
    predict = [sys.executable, str(RECIPE / "predict.py"), str(output)]
    done = run([*predict, f"--submission={target}"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    assert target.read_text() == (output / "submission.csv").read_text()
    expected = re.search(r"Expected in the test, .*", done.stdout)[0]
    assert expected in finished[1].stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.csv"]
    done = run([*predict[:2], str(tmp_path)])
    assert done.returncode == 1
    assert "no finished run is there" in done.stderr


def test_the_recipe_folder_and_the_same_seed_give_the_same_bits(
    data, finished, tmp_path
):
    done = run(command(data, tmp_path / "out"), folder=RECIPE)
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(tmp_path / "out"))


def test_workers_change_no_bit(data, finished, tmp_path):
    done = run(command(data, tmp_path / "out", "--num_workers=2"))
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(tmp_path / "out"))


def test_a_pack_in_the_devices_memory_changes_no_bit(data, finished, tmp_path):
    more = ["--pack_on_device=True", "--num_workers=2"]
    done = run(command(data, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(tmp_path / "out"))


def test_other_ways_of_reading_and_evaluating_run(data, tmp_path):
    """Without a pack, balanced, in buckets, by windows; predict.py agrees."""
    output = tmp_path / "out"
    more = ["--pack=False", "--sampler=balanced", "--bucket_batches=2"]
    more += ["--evaluation=windows", "--window_frames=20", "--window_hop=10"]
    given = [*command(data, output, *more), "--number_of_epochs=8"]
    given.remove("--number_of_epochs=4")
    done = run(given)
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["test"]["accuracy"] >= 0.8
    assert not (output / "packs").exists()
    submission = (output / "submission.csv").read_text()
    (output / "submission.csv").unlink()
    done = run([sys.executable, str(RECIPE / "predict.py"), str(output)])
    assert done.returncode == 0, done.stderr
    assert (output / "submission.csv").read_text() == submission


def test_a_finished_run_given_again_only_repeats_its_results(data, finished):
    before = weights(finished[0])
    done = run(command(data, finished[0]))
    assert done.returncode == 0, done.stderr
    assert "Going into epoch" not in done.stderr
    assert same(before, weights(finished[0]))


def start_and_stop(arguments, output, number):
    """Sends a signal once a mid-epoch checkpoint of epoch 2 is there."""
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metas = [
            text
            for path in (output / "save").glob("CKPT*/CKPT.yaml")
            if "end-of-epoch: false" in (text := read_if_there(path))
        ]
        log = read_if_there(output / "train_log.txt")
        if metas and "epoch: 1," in log:
            os.killpg(process.pid, number)  # as a terminal and Slurm do
            break
        time.sleep(0.002)
    text, _ = process.communicate(timeout=120)
    return process.returncode, text


def read_if_there(path):
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("name", "code", "workers"),
    [("SIGINT", 130, 0), ("SIGTERM", 143, 2), ("SIGKILL", -9, 0)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    data, finished, tmp_path, name, code, workers
):
    output = tmp_path / "out"
    arguments = command(
        data,
        output,
        "--ckpt_interval_steps=1",
        "--ckpt_interval_minutes=0",
        f"--num_workers={workers}",
    )
    returned, text = start_and_stop(arguments, output, getattr(signal, name))
    assert returned == code, text
    assert not (output / "results.json").exists()
    if name != "SIGKILL":
        assert "give the same command again to go on" in text
        assert "Traceback" not in text
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(output))


@pytest.mark.parametrize("system", ["transformer", "ecapa"])
def test_the_other_systems_run(data, tmp_path, system):
    output = tmp_path / "out"
    more = ["--batch_size=4", "--number_of_epochs=1"]
    done = run(command(data, output, *more, system=system))
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "results.json").read_text())["valid"]


def test_the_large_system_runs_a_few_batches(data, tmp_path):
    more = ["--batch_size=4", "--number_of_epochs=1", "--num_workers=0"]
    system = "conformer_large"
    done = run(command(data, tmp_path / "out", *more, "--debug", system=system))
    assert done.returncode == 0, done.stderr
    assert "debug run has passed" in done.stdout


def test_without_test_utterances_there_still_is_a_run(tmp_path):
    data = make_corpus(tmp_path / "data", n_test=0, labels=False)
    arguments = command(data, tmp_path / "out")
    done = run([a.replace("epochs=4", "epochs=1") for a in arguments])
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["test"]["accuracy"] is None


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first(content):
    return next(iter(content["speakers"].values()))[0]


MISTAKES = {
    "a wrong key": (None, ["--learning_rate=1"], "no key 'learning_rate'"),
    "nearly a key": (None, ["--drop_out=1"], "did you mean --dropout?"),
    "a key twice": (None, ["--lr=1", "--lr=2"], "--lr is given twice"),
    "a wrong value": (None, ["--n_heads=5"], "n_heads=5 does not divide"),
    "an unknown evaluation": (
        None,
        ["--evaluation=crops"],
        "evaluation='crops' is none of whole, windows",
    ),
    "a missing folder": (None, ["--data_folder=/no/such"], "no such folder"),
    "a corrupt feature file": (
        lambda d: (d / "uttr-1-1.pt").write_bytes(b"PK\x03\x04rubbish"),
        [],
        "uttr-1-1.pt: not a readable feature file",
    ),
    "a missing feature file": (
        lambda d: (d / "uttr-1-1.pt").unlink(),
        [],
        "uttr-1-1.pt: the feature file is missing",
    ),
    "a speaker that mapping.json lacks": (
        lambda d: edit(
            d / "metadata.json",
            lambda c: c["speakers"].update(id9=[]),
        ),
        [],
        "speaker 'id9' is missing from mapping.json",
    ),
    "a mel_len that lies": (
        lambda d: edit(
            d / "metadata.json", lambda c: first(c).update(mel_len=7)
        ),
        [],
        "'mel_len' in the JSON says 7",
    ),
    "half a JSON": (
        lambda d: (d / "testdata.json").write_text('{"n_mels": 40,'),
        [],
        "testdata.json: not valid JSON",
    ),
    "a path that climbs out": (
        lambda d: edit(
            d / "metadata.json",
            lambda c: first(c).update(feature_path="../x.pt"),
        ),
        [],
        "leaves the data folder",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_sentence(name, tmp_path):
    change, arguments, words = MISTAKES[name]
    data = make_corpus(tmp_path / "data")
    if change:
        change(data)
    given = command(data, tmp_path / "out")
    if name != "a key twice":
        new = [a.split("=")[0] for a in arguments]
        given = [a for a in given if a.split("=")[0] not in new]
    done = run([*given, *arguments])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/save/CKPT*")), "training had begun"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--seed=7", "begun with seed=1986, not 7"),
        ("--valid_fraction=0.5", "begun with valid_fraction=0.1, not 0.5"),
        ("--kernel_size=7", "begun with kernel_size=15, not 7"),
        ("--margin=0.5", "begun with margin=0.2, not 0.5"),
        ("--precision=bf16", "begun with precision=fp32, not bf16"),
        ("--pack=False", "begun with pack=True, not False"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--test_only"]])
def test_another_run_cannot_be_gone_on_with(
    data, finished, option, words, more
):
    def contents():
        return {
            path: path.read_bytes()
            for path in sorted(finished[0].rglob("*"))
            if path.is_file() and "packs" not in path.parts
        }

    before = contents()
    done = run(command(data, finished[0], option, *more))
    assert done.returncode == 1
    assert words in done.stderr
    assert contents() == before, "nothing of the run is touched"


def test_an_object_changed_in_the_yaml_file_is_another_run(
    data, finished, tmp_path
):
    text = (ROOT / "hparams" / "conformer.yaml").read_text()
    assert "AttentiveStatisticsPooling" in text
    changed = tmp_path / "conformer.yaml"
    changed.write_text(text.replace("begin: 0.0", "begin: 0.1"))
    given = command(data, finished[0])
    given[2] = str(changed)
    done = run(given)
    assert done.returncode == 1
    assert "begun with another 'margin_schedule' in its YAML" in done.stderr


def test_other_data_are_another_run(finished, tmp_path):
    other = make_corpus(tmp_path / "other", seed=1)
    done = run(command(other, finished[0]))
    assert done.returncode == 1
    assert "begun with other data, those of " in done.stderr


def test_new_recordings_need_no_training_data(data, finished, tmp_path):
    new = make_corpus(tmp_path / "new", n_test=9, seed=0)
    for path in [*new.glob("uttr-[0-9]*"), new / "metadata.json"]:
        path.unlink()
    output, before = finished[0], (finished[0] / "submission.csv").read_bytes()
    predict = [sys.executable, str(RECIPE / "predict.py"), str(output)]
    done = run([*predict, f"--data_folder={new}"])
    assert done.returncode == 0, done.stderr
    said = re.search(r"Test accuracy ([\d.]+)", done.stdout)
    assert float(said[1]) >= 0.7
    assert "Expected in the test" in done.stdout
    rows = (output / "submission-new.csv").read_text().splitlines()
    assert len(rows) == 10
    assert (output / "submission.csv").read_bytes() == before
    testdata = json.loads((new / "testdata.json").read_text())
    (new / "testdata.json").write_text(
        json.dumps({**testdata, "utterances": []})
    )
    done = run([*predict, f"--data_folder={new}"])
    assert done.returncode == 1
    assert "testdata.json: has no utterance" in done.stderr
    done = run([*predict, "--device=nonsense"])
    assert done.returncode == 1
    assert "--device nonsense: can't be used here" in done.stderr
    assert "Traceback" not in done.stderr


def test_test_only_repeats_the_results(data, finished):
    before = json.loads((finished[0] / "results.json").read_text())
    done = run(command(data, finished[0], "--test_only"))
    assert done.returncode == 0, done.stderr
    after = json.loads((finished[0] / "results.json").read_text())
    assert after["test"] == before["test"]
    assert after["epochs"] == 4


def test_confidences_of_windows_are_not_those_of_utterances(
    data, finished, tmp_path
):
    """As if --test_only --evaluation=windows had been killed before its end,
    whose hyperparams.yaml is written first."""
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    predict = [sys.executable, str(RECIPE / "predict.py"), str(output)]
    assert "Expected in the test" in run(predict).stdout
    settings = output / "hyperparams.yaml"
    text = settings.read_text()
    assert "evaluation: whole" in text
    settings.write_text(
        text.replace("evaluation: whole", "evaluation: windows")
    )
    done = run(predict)
    assert done.returncode == 0, done.stderr
    assert "Test accuracy" in done.stdout
    assert "Expected in the test" not in done.stdout


def test_test_only_without_a_checkpoint_is_refused(data, tmp_path):
    done = run(command(data, tmp_path / "out", "--test_only"))
    assert done.returncode == 1
    assert "there is no checkpoint to test" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "hparams").glob("*.yaml")))
def test_every_key_of_a_yaml_is_used(path):
    """By train.py, the package, SpeechBrain's run options or the YAML."""
    text = path.read_text()
    code = "".join(
        p.read_text()
        for folder in (ROOT / "modules", RECIPE)
        for p in folder.rglob("*.py")
    )
    from speechbrain.utils.run_opts import RunOptions

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *a: None)
    for key in yaml.load(text, Loader):
        used = (
            f"<{key}>" in text
            or f'"{key}"' in code
            or f"hparams.{key}" in code
            or key in RunOptions().as_dict()
            or key == "__set_seed"
        )
        assert used, key
