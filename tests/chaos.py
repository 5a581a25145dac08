#!/usr/bin/env python3
"""Training runs to which things happen; each must end in the same bits.

Usage: python tests/chaos.py [--runs 30] [--seed 0]

Each run trains a tiny system with dropout, augmentation, a random number of
loader workers, and with or without gradient accumulation. One to three of its
processes meet one of ``EVENTS`` each, at a random time or at a random call of
a function. Between two processes, a file may be damaged (``DAMAGES``). At last
the same command ends the run. Its weights and its log are compared, bit for
bit, with those of a run that nobody disturbed. Ends with one line of JSON.
``--runs 1 --seed N`` repeats the run of number N.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.extend(  # where it is started as a command
    str(Path(__file__).resolve().parents[1] / place)
    for place in ("tests/recipe", "recipes/ML2022hw4")
)

import torch
import yaml
from corpus import make_corpus
from harness import (
    ROOT,
    TIMEOUT,
    results,
    same,
    start,
    train_arguments,
    weights,
)

import train
from spkid.data import build
from spkid.training import EpochLogger, RobustBrain

# What a run does: the function that does it, and about how many calls of it a
# run makes that nobody disturbs.
ACTS = {
    "packing": (build, "load_feature_file", 32),
    "step": (RobustBrain, "fit_batch", 42),
    "optimiser": (RobustBrain, "optimizers_step", 21),
    "validation": (RobustBrain, "evaluate_batch", 6),
    "saving": (torch, "save", 90),
    "renaming": (os, "replace", 40),
    "deleting": (shutil, "rmtree", 20),
    "logging": (EpochLogger, "log_stats", 6),
    "submission": (train, "write_submission", 1),
}
OPTIONS = [
    "--number_of_epochs=6",
    "--split=random",
    "--ckpt_interval_minutes=0",
]
STOPS = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"
SIGNALS = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
KILLED = -9


def augmented_yaml(folder: Path) -> Path:
    """The default system with its augmentation switched on."""
    text = (ROOT / "hparams" / "conformer.yaml").read_text()
    for name in ("channel", "masking"):
        assert f"# {name}: !new" in text
        text = text.replace(f"# {name}: !new", f"{name}: !new")
    path = folder / "augmented.yaml"
    path.write_text(text)
    return path


def at(act: str, count: float, do: Callable[[], None], after: bool) -> None:
    """Does something at the count-th call of a key of ``ACTS``, before or
    after it; or, if ``act`` is "time", after ``count`` seconds."""
    if act == "time":
        later(count, do)
        return
    place, name, _ = ACTS[act]
    function, calls = getattr(place, name), 0

    @functools.wraps(function)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            do()
        result = function(*args, **kwargs)
        if calls == count and after:
            do()
        return result

    setattr(place, name, counted)


def later(seconds: float | None, do: Callable[[], None]) -> None:
    """Does something after some seconds, if the process still lives."""
    if seconds is not None:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        timer.start()


# What happens in a process: each function draws the details, and knows the
# run's folder and the small disk that it lies on.


def die(*_) -> None:
    """SIGKILL for this process and its workers."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def jump(draw: random.Random, output: Path, _) -> None:
    """The clock is wrong from now on; some of the processes die later."""
    seconds = draw.choice([-1, 1]) * draw.choice([600, 7200, 2 * 86400])
    now, local, text = time.time, time.localtime, time.strftime
    time.time = lambda: now() + seconds
    time.time_ns = lambda: int(time.time() * 1e9)
    time.localtime = lambda at=None: local(time.time() if at is None else at)
    time.strftime = lambda form, at=None: text(form, at or time.localtime())
    for path in output.rglob("*"):
        with contextlib.suppress(OSError):  # it has just been deleted
            os.utime(path, (path.stat().st_mtime - seconds,) * 2)
    later(draw.choice([None, 0.5]), die)


def fill(draw: random.Random, _, disk: Path | None) -> None:
    """Takes the disk's last byte, for a while or until the process ends; where
    there is no small disk, what writes raises the error that a full one has."""
    if disk is None:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for place, name in ((os, "mkdir"), (os, "replace"), (torch, "save")):
            # An exception that is thrown into a generator is raised there.
            setattr(place, name, lambda *_, **__: (_ for _ in ()).throw(full))
        return
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    later(draw.choice([None, 0.5]), filler.unlink)


def kill_worker(draw: random.Random, *_) -> None:
    """SIGKILL for one of this process's workers, or for this one."""
    if os.getpid() != os.getpgrp():
        os.kill(os.getpid(), signal.SIGKILL)
    while not (workers := multiprocessing.active_children()):
        time.sleep(0.01)
    os.kill(draw.choice(workers).pid, signal.SIGKILL)


def send(draw: random.Random, *_) -> None:
    """One or two signals, to the first process or, as a terminal's, to all."""
    kill = draw.choice([os.kill, os.killpg])
    for number in draw.choices(SIGNALS, k=draw.choice([1, 1, 2])):
        kill(os.getpgrp(), number)


class Event(NamedTuple):
    """What happens in a process, and how it may then end."""

    do: Callable[[random.Random, Path, Path | None], None]
    codes: tuple[int, ...]
    acts: tuple[str, ...] = ("time", *ACTS)


EVENTS = {
    "kill": Event(die, (KILLED,)),
    "clock": Event(jump, (0, KILLED)),
    "full disk": Event(fill, (0, 1)),
    "killed worker": Event(
        kill_worker, (0, 1), ("time", "packing", "step", "validation")
    ),
    # Before it trains, a process ends by a signal as any other does.
    "signal": Event(
        send, (0, *(code for n in SIGNALS for code in (128 + n, -n)))
    ),
}


def happen(mark: Path, kind: str, seed: int, *places: Path | None) -> None:
    """Lets an event happen, and leaves a mark that says so."""
    mark.touch()
    EVENTS[kind].do(random.Random(seed), *places)


def newest(output: Path) -> list[Path]:
    """Files of the checkpoint with the most steps, whatever its time."""

    def progress(folder):
        with contextlib.suppress(Exception):  # it is damaged already
            brain = yaml.safe_load((folder / "brain.ckpt").read_text())
            meta = yaml.safe_load((folder / "CKPT.yaml").read_text())
            return brain["optimizer_step"], meta["end-of-epoch"]
        return -1, False

    found = sorted((output / "save").glob("CKPT+*"), key=progress)
    return list(found[-1].iterdir()) if found else []


# What is damaged between two processes, and how (or it is deleted).
DAMAGES = {
    "checkpoint": newest,
    "manifest": lambda output: list(output.glob("manifests/*.json")),
    "history": lambda output: list(output.glob("history.json")),
}
WAYS = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "replaced": lambda content: b'[{"a": [1]}, 2]',
}


def log(output: Path) -> str:
    """A run's lines, one for each epoch."""
    return (output / "train_log.txt").read_text()


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A real file system of a few megabytes; None where none can be made."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class Chaos:
    """Runs in a folder, or on a small disk; what happened, what came of it."""

    def __init__(self, folder: Path, disk: Path | None) -> None:
        self.folder, self.disk = folder, disk
        self.output = (disk or folder) / "out"
        # Enough test files for two packing processes.
        self.data = make_corpus(folder / "data", n_test=40)
        self.yaml = augmented_yaml(folder)
        self.events: Counter[str] = Counter()
        self.acts: Counter[str] = Counter()
        self.bad = Counter(lost=0, different=0, hangs=0, tracebacks=0)
        self.calm = functools.cache(self._calm)

    def _train(self, output, factor, more, **options):
        more = [*OPTIONS, f"--grad_accumulation_factor={factor}", *more]
        arguments = train_arguments(self.data, output, *more)[1:]
        running = start("train", [str(self.yaml), *arguments], **options)
        return running.wait(TIMEOUT)  # then it is killed

    def _calm(self, factor: int):
        """Weights, log and seconds of a run that nobody disturbs."""
        output = self.folder / f"calm-{factor}"
        done = self._train(output, factor, [])
        assert done.returncode == 0, done.stderr
        # A second until it trains, about.
        return weights(output), log(output), 1 + results(output)["seconds"]

    def process(
        self, factor: int = 1, more=(), kind: str = "", fate=None, seed: int = 0
    ) -> None:
        """One process of a run, and the event that it meets: a key of
        ``EVENTS``, the ACT, COUNT and AFTER of :func:`at`, and a seed."""
        mark, codes = self.folder / "mark", (0,)
        weights_, lines, _ = self.calm(factor)
        where = mark, kind, seed, self.output, self.disk
        do, began = functools.partial(happen, *where), time.monotonic()
        done = self._train(self.output, factor, more, fate=fate, do=do)
        if self.disk is not None:
            (self.disk / "filler").unlink(missing_ok=True)
        if mark.exists():
            mark.unlink()
            codes = EVENTS[kind].codes
            self.events[kind] += 1
            self.acts[fate[0]] += 1
        code, said = done.returncode, (done.stdout + done.stderr).rstrip()
        wrong = ""
        if code == KILLED and time.monotonic() - began > TIMEOUT:
            wrong = "hangs"
        elif code != KILLED and "Traceback" in said:
            wrong = "tracebacks"
        elif code not in codes or (
            code == 1 and "\nError: " not in f"\n{said}"
        ):
            wrong = "lost"
        elif code == 0 and not (
            same(weights(self.output), weights_) and log(self.output) == lines
        ):
            wrong = "different"
        print(f"  {kind or 'nothing'} at {fate}, seed {seed}: {code} {wrong}")
        if wrong:
            self.bad[wrong] += 1
            print(said[-3000:])

    def damage(self, kind: str, draw: random.Random) -> None:
        """Damages one of the files of a key of ``DAMAGES``, if there is one."""
        if not (files := sorted(DAMAGES[kind](self.output))):
            return
        path, way = draw.choice(files), draw.choice([*WAYS, "deleted"])
        if way in WAYS:
            path.write_bytes(WAYS[way](path.read_bytes()))
        else:
            path.unlink()
        self.events[f"damaged {kind}"] += 1
        print(f"  {path.relative_to(self.output)} is {way}")

    def run(self, seed: int) -> None:
        """A run with random events."""
        draw = random.Random(seed)
        factor, interval = draw.choice([1, 2]), draw.choice([1, 3])
        for _ in range(draw.randint(1, 3)):
            kind = draw.choice(list(EVENTS))
            act = draw.choice(EVENTS[kind].acts)
            # Early rather than late: the others are to meet something, too.
            part = draw.random() ** 2
            count = part * self.calm(factor)[2]
            if act != "time":
                count = 1 + int(part * ACTS[act][2])
            fate = act, count, draw.random() < 0.5
            workers = 2 if kind == "killed worker" else draw.choice([0, 0, 2])
            options = f"--num_workers={workers}"
            options = [options, f"--ckpt_interval_steps={interval}"]
            self.process(factor, options, kind, fate, draw.randrange(10**6))
            if draw.random() < 0.4:
                self.damage(draw.choice(list(DAMAGES)), draw)
        self.process(factor)
        shutil.rmtree(self.output, ignore_errors=True)


def main() -> None:
    """Reads the arguments and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        small_disk(Path(name, "disk")) as disk,
    ):
        chaos = Chaos(Path(name), disk)
        for number in range(args.seed, args.seed + args.runs):
            print(f"run {number}", flush=True)
            chaos.run(number)
    counted = {"events": dict(chaos.events), "acts": dict(chaos.acts)}
    print(json.dumps({"runs": args.runs, **chaos.bad, **counted}))
    sys.exit(sum(chaos.bad.values()) > 0)


if __name__ == "__main__":
    main()
