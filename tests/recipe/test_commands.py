"""The commands as a user gives them: new processes that import everything.

Few, since each takes seconds; the other tests fork (see ``harness.py``).
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from corpus import make_corpus
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


@pytest.mark.parametrize(
    "options",
    [
        [
            *["--noprogressbar", "--tqdm_colored_bar", "--device=cpu:0"],
            *["--skip_nonfinite_grads", "--remove_vector_weight_decay"],
            *["--max_grad_norm=-1", "--nonfinite_patience=0"],
            *["--ckpt_interval_steps=2", "--ckpt_interval_minutes=0"],
            *["--grad_accumulation_factor=2", "--eval_precision=bf16"],
            *["--find_unused_parameters", "--distributed_backend=gloo"],
        ],
        [
            *["--debug", "--debug_batches=1", "--debug_epochs=0"],
            *["--debug_persistently", "--precision=bf16"],
        ],
        ["--profile_training", "--profile_steps=1", "--profile_warmup=0"],
        ["--compile", "--compile_module_keys", "classifier"],
    ],
    ids=["settings", "debug", "profile", "compile"],
)
def test_what_options_are_allowed_work(data, tmp_path, options):
    """One by one they are checked in tests/test_run_options.py."""
    done = run_train(data, tmp_path, "--number_of_epochs=1", *options)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no SIGPIPE there")
def test_a_reader_that_goes_costs_no_checkpoint(data, tmp_path):
    """As in ``train.py | head -1``: quiet, and the same command resumes."""
    output, more = tmp_path / "out", "--number_of_epochs=1"
    process = subprocess.Popen(
        [sys.executable, "train.py", *train_arguments(data, output, more)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("Results go to" in line for line in process.stdout)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 141, said
    assert "Traceback" not in said
    assert "ignored" not in said
    assert list(output.glob("save/CKPT*"))
    done = run_train(data, output, more)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="another Ctrl-C there")
@pytest.mark.parametrize(
    "program", ["train", "predict", "ml2022hw4_prepare", "mini_corpus"]
)
def test_ctrl_c_while_libraries_are_imported_is_quiet(tmp_path, program):
    """The first of them that is looked for brings the signal."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
    )
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = run(program, ["x"], real=True, environment=environment)
    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stderr == ""


def test_a_folder_whose_name_a_terminal_lacks_is_no_obstacle(tmp_path):
    name = os.fsdecode(b"voix \xc3\xa9" + b" \xff" * (sys.platform == "linux"))
    folder = make_corpus(tmp_path / name)
    ascii_terminal = {
        **{"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "PYTHONIOENCODING": "ascii:strict",
    }
    arguments = [folder, f"--pack_folder={tmp_path / 'packs'}"]
    done = run(
        "ml2022hw4_prepare", arguments, real=True, environment=ascii_terminal
    )
    assert done.returncode == 0, done.stderr
    assert "voix" in done.stdout
    (folder / "mapping.json").unlink()
    done = run(
        "ml2022hw4_prepare", arguments, real=True, environment=ascii_terminal
    )
    assert_one_sentence(done, "voix", "mapping.json")
