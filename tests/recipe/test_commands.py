"""The commands as a user gives them: new processes that import everything.

Few, since each takes seconds; the other tests fork (see ``harness.py``).
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from harness import (
    ENVIRONMENT,
    RECIPE,
    ROOT,
    assert_one_sentence,
    run,
    run_predict,
    run_train,
    same,
    train_arguments,
    weights,
)

pytestmark = pytest.mark.slow


def test_the_repositorys_root_and_a_fork_give_the_same_bits(
    data, finished, tmp_path
):
    """What they print is the same, too, but loggers' lines, which have times
    in them."""

    def printed(text, output):
        lines = text.replace(str(output), "OUT").splitlines()
        return [line for line in lines if " - " not in line]

    output = tmp_path / "out"
    done = run_train(data, output, real=True)
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(output))
    ours = printed(done.stdout, output)
    assert len(ours) > 5
    assert ours == printed(finished[1].stdout, finished[0])


def test_the_recipe_folder_gives_the_same_bits(data, finished, tmp_path):
    arguments = train_arguments(data, tmp_path / "out")
    arguments[0] = "hparams/conformer.yaml"
    done = run("train", arguments, folder=RECIPE, real=True)
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(tmp_path / "out"))


def test_a_wrong_choice_is_one_sentence(data, tmp_path):
    output = tmp_path / "out"
    done = run_train(data, output, "--split=sesion", real=True)
    assert_one_sentence(done, "split='sesion' must be")
    assert not output.exists()


def test_predict_runs_from_any_folder(finished, tmp_path):
    output, target = finished[0], tmp_path / "again.csv"
    more = f"--submission={target}"
    done = run_predict(output, more, folder=tmp_path, real=True)
    assert done.returncode == 0, done.stderr
    assert target.read_text() == (output / "submission.csv").read_text()


def test_prepare_runs_from_any_folder(data, tmp_path):
    arguments = [data, f"--pack_folder={tmp_path / 'packs'}"]
    done = run("ml2022hw4_prepare", arguments, folder=tmp_path, real=True)
    assert done.returncode == 0, done.stderr
    assert "32 labelled and 6 test utterances" in done.stdout
    assert list((tmp_path / "packs").iterdir())


def read_if_there(path):
    try:
        return path.read_text()
    except OSError:
        return ""


def start_and_stop(arguments, output, number):
    """Sends a signal once a mid-epoch checkpoint of epoch 2 is there."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments],
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


@pytest.mark.parametrize(
    ("name", "code", "workers"),
    [("SIGINT", 130, 0), ("SIGTERM", 143, 2), ("SIGKILL", -9, 2)],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    data, finished, tmp_path, name, code, workers
):
    output = tmp_path / "out"
    more = [
        "--ckpt_interval_steps=1",
        "--ckpt_interval_minutes=0",
        f"--num_workers={workers}",
    ]
    arguments = train_arguments(data, output, *more)
    returned, text = start_and_stop(arguments, output, getattr(signal, name))
    assert returned == code, text
    assert not (output / "results.json").exists()
    if name != "SIGKILL":
        assert "give the same command again to resume" in text
        assert "Traceback" not in text
    done = run_train(data, output, *more)
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(output))
