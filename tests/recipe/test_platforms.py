"""The commands where a system lacks what Linux has.

Honest as far as it goes: each process, and each that it starts, loses these
names before it imports anything but what Python itself starts with, so torch,
SpeechBrain and ``multiprocessing`` lack them, too. ``sys.platform`` and
``os.name`` stay: with "nt", Python itself would look for what only Windows
has. So torch, which goes by the former, keeps ``os.register_at_fork`` and
``SIGCHLD``. Without ``fcntl``, filelock locks by a file's existence, where
Windows has ``msvcrt``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import (
    ENVIRONMENT,
    ROOT,
    run,
    run_predict,
    run_train,
    same,
    weights,
)

import spkid

pytestmark = pytest.mark.slow
TAKEN = {
    "os": [
        *["pwrite", "pread", "fork", "forkpty", "killpg"],
        *["setsid", "mkfifo", "O_NONBLOCK", "sched_getaffinity"],
        *["posix_fallocate", "posix_fadvise", "getuid", "statvfs"],
    ],
    "signal": [
        *["SIGUSR1", "SIGHUP"],
        *["sigwaitinfo", "sigwait", "pthread_sigmask", "setitimer"],
    ],
}
CUSTOMIZE = f"""
import importlib
import sys

for module, names in {TAKEN!r}.items():
    module = importlib.import_module(module)
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # to import it fails
import multiprocessing
multiprocessing.set_start_method("spawn")
"""
IMPORT_ALL = """
import importlib, os, pkgutil, signal
import spkid
for module in pkgutil.walk_packages(spkid.__path__, "spkid."):
    importlib.import_module(module.name)
assert not hasattr(os, "fork") and not hasattr(signal, "SIGUSR1")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The variables of a process that lacks these names."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "sitecustomize.py").write_text(CUSTOMIZE)
    modules = Path(spkid.__file__).parents[1]
    paths = [str(folder), str(modules), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "USERNAME": "me",  # as Windows says it, without the module pwd
    }


def test_all_modules_can_be_imported(elsewhere):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        check=False,
        cwd=ROOT,
        env={**ENVIRONMENT, **elsewhere},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_data_are_packed(data, tmp_path, elsewhere):
    arguments = [data, f"--pack_folder={tmp_path / 'packs'}"]
    done = run("ml2022hw4_prepare", arguments, real=True, environment=elsewhere)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "packs").iterdir())


def test_a_run_gives_the_same_bits_and_resumes_and_predicts(
    data, finished, tmp_path, elsewhere
):
    output, there = tmp_path / "out", {"real": True, "environment": elsewhere}
    done = run_train(data, output, **there)
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(output))

    def epoch(folder):
        return (folder / "CKPT.yaml").read_text().split("epoch: ")[1]

    newest = max((output / "save").glob("CKPT*"), key=epoch)
    shutil.rmtree(newest)
    shutil.rmtree(output / "model")
    done = run_train(data, output, **there)
    assert done.returncode == 0, done.stderr
    assert same(weights(finished[0]), weights(output))
    target = tmp_path / "again.csv"
    done = run_predict(output, f"--submission={target}", **there)
    assert done.returncode == 0, done.stderr
    theirs = (finished[0] / "submission.csv").read_text()
    assert target.read_text() == theirs


def test_workers_that_are_spawned_give_the_same_bits(data, tmp_path, elsewhere):
    short = "--number_of_epochs=1"
    done = run_train(
        *[data, tmp_path / "out", short, "--num_workers=2"],
        real=True,
        environment=elsewhere,
    )
    assert done.returncode == 0, done.stderr
    done = run_train(data, tmp_path / "here", short)
    assert same(weights(tmp_path / "here"), weights(tmp_path / "out"))
