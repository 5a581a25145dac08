"""The recipe's commands in processes of their own, without the imports.

A server process imports torch, SpeechBrain and the commands once. Each run is
forked from it, so that a test costs what the run costs. Where processes can't
be forked (Windows), each run imports everything itself.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "ML2022hw4"
# On the CPU, where the same seed gives the same bits.
FEW = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT = {**os.environ, **FEW}
TIMEOUT = 120  # seconds, after which a run counts as hanging
PRELOADED = [
    "torch._dynamo",  # the first optimiser imports it
    "matplotlib.pyplot",  # the report
    "sklearn.manifold",
    "chaos",
    "ml2022hw4_prepare",
    "predict",
    "train",
    "harness",
]
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
# A system that is trained in a second.
TINY = [
    "--d_model=24",
    "--n_layers=1",
    "--n_heads=2",
    "--d_ff=32",
    "--embedding_size=16",
    "--segment_frames=16",
    "--lr=0.01",
    "--batch_size=4",
    "--number_of_epochs=4",
]


def train_arguments(data, output, *more, system="conformer") -> list[str]:
    """Arguments of train.py; a key in ``more`` replaces an earlier one."""
    given = [
        f"--data_folder={data}",
        f"--output_folder={output}",
        f"--pack_folder={output}/packs",
        "--noprogressbar",
        *(TINY if system == "conformer" else []),
        *more,
    ]
    by_key = {word.partition("=")[0]: word for word in given}
    return [str(ROOT / "hparams" / f"{system}.yaml"), *by_key.values()]


def run(
    program: str,
    arguments,
    folder: Path = ROOT,
    real: bool = False,
    environment: dict | None = None,
    **more,
) -> CompletedProcess:
    """Runs a command; gives its exit code and what it printed.

    Arguments
    ---------
    program : str
        "train", "predict" or "ml2022hw4_prepare".
    arguments : list of str
        Of the command line.
    folder : pathlib.Path
        The current folder.
    real : bool
        As a user would, with ``python PROGRAM.py``.
    environment : dict, optional
        More variables.
    **more
        ``fate`` and ``do``: something that happens at a call of a function,
        as in :func:`chaos.at`. ``report``: whether a forked run draws its
        report, which takes a second.
    """
    arguments = list(map(str, arguments))
    if real:
        name = f"{program}.py"
        script = name if (folder / name).exists() else RECIPE / name
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            check=False,
            cwd=folder,
            env={**ENVIRONMENT, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    return start(program, arguments, folder, environment, **more).wait()


def start(
    program,
    arguments,
    folder=ROOT,
    environment=None,
    fate=None,
    do=None,
    report=False,
) -> Running:
    """Begins a run in a forked process; arguments as in :func:`run`."""
    place, faults = (folder, environment or {}), (fate, do)
    return Running(_command, program, arguments, place, faults, report)


class Running:
    """A forked process that calls ``function(*arguments)``."""

    def __init__(self, function, *arguments) -> None:
        _start_server()
        self.folder = tempfile.TemporaryDirectory()
        self.process = CONTEXT.Process(
            target=_child, args=(self.folder.name, function, *arguments)
        )
        self.process.start()

    def wait(self, limit: float | None = None) -> CompletedProcess:
        """Its exit code and what it printed.

        Arguments
        ---------
        limit : float, optional
            Seconds after which it and its workers are killed; None: if it
            takes longer than it ever should, it hangs, which is an error.
        """
        self.process.join(TIMEOUT if limit is None else limit)
        late = self.process.is_alive()
        if late:
            self.send(signal.SIGKILL)
            self.process.join()
        texts = [self.printed(name) for name in ("stdout", "stderr")]
        self.folder.cleanup()
        assert limit is not None or not late, f"hangs:\n{''.join(texts)}"
        return CompletedProcess("", self.process.exitcode, *texts)

    def send(self, number: int) -> None:
        """A signal to it and its workers, as a terminal and Slurm do."""
        os.killpg(self.process.pid, number)

    def printed(self, name) -> str:
        """What it has printed so far."""
        path = Path(self.folder.name, name)
        return path.read_text() if path.exists() else ""


def _start_server():
    """The server is to find the modules that the tests find."""
    if CAN_FORK:
        CONTEXT.set_forkserver_preload(PRELOADED)
        paths = os.pathsep.join(filter(None, sys.path))
        with mock.patch.dict(os.environ, {**FEW, "PYTHONPATH": paths}):
            forkserver.ensure_running()


def _child(place, function, *arguments):
    """In the new process: files take what it prints."""
    # The loaders' workers begin as usual, not in the server.
    multiprocessing.set_start_method(None, force=True)
    if hasattr(os, "setsid"):
        os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(Path(place, name), "wb") as file:
            os.dup2(file.fileno(), number)
        stream = os.fdopen(os.dup(number), "wb")
        text = io.TextIOWrapper(stream, "utf-8", line_buffering=True)
        setattr(sys, name, text)
    logging.getLogger().handlers.clear()
    os.environ.update(FEW)
    torch.set_num_threads(1)
    function(*arguments)


def _command(program, arguments, place, faults, report):
    """What ``python PROGRAM.py`` does after its imports."""
    import chaos
    import speechbrain as sb

    import spkid.evaluation.report
    from spkid.errors import run_command

    folder, environment = place
    os.chdir(folder)
    os.environ.update(environment)
    sb.utils.logger.get_environment_description = str  # asks pip
    if not report:
        spkid.evaluation.report.write_report = lambda folder: folder / "none"
    fate, do = faults
    if fate:
        act, count, after = fate
        chaos.at(act, count, do or chaos.die, after)
    sys.argv = [f"{program}.py", *arguments]
    run_command(importlib.import_module(program).main)


def run_train(data, output, *more, system="conformer", **options):
    """train.py on a data folder; options as in :func:`run`."""
    arguments = train_arguments(data, output, *more, system=system)
    return run("train", arguments, **options)


def run_predict(output, *more, **options):
    """predict.py on a run's folder; options as in :func:`run`."""
    return run("predict", [output, *more], **options)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The tested weights of a finished run."""
    found = {}
    for path in sorted((output / "model").glob("*.ckpt")):
        found |= torch.load(path, weights_only=True)
    assert found, f"{output} has no weights"
    return found


def same(ours: dict, theirs: dict) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) for key in ours
    )


def results(output: Path) -> dict:
    """What results.json holds."""
    return json.loads((output / "results.json").read_text())


def assert_one_sentence(done: CompletedProcess, *words: str) -> None:
    """The run has ended with one "Error: ..." that has these words."""
    last = (done.stderr.strip().splitlines() or [""])[-1]
    assert done.returncode == 1, done.stdout + done.stderr
    assert last.startswith("Error: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last
