#!/usr/bin/env python3
"""Kills training runs at random moments; each must end in the same bits.

Usage: python tests/chaos.py [--runs 30] [--seed 0]

Each run trains a tiny system with dropout, augmentation, a random number of
loader workers, and with or without gradient accumulation. It is killed by
SIGKILL one to three times: at a random time, or at a random call of a chosen
function (in a step, in validation, while packing, saving, renaming, deleting
or logging). The same command resumes it, and its final weights and its log
are compared, bit for bit, with those of a run that nobody disturbed. Ends with
one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.extend(  # where it is started as a command
    str(Path(__file__).resolve().parents[1] / place)
    for place in ("tests/recipe", "recipes/ML2022hw4")
)

import torch
from corpus import make_corpus
from harness import ROOT, Running, same, start, train_arguments, weights

import train
from spkid.data import build
from spkid.training import EpochLogger, RobustBrain

# What a run does, and the function that does it.
ACTS = {
    "packing": (build, "load_feature_file"),
    "step": (RobustBrain, "fit_batch"),
    "optimiser": (RobustBrain, "optimizers_step"),
    "validation": (RobustBrain, "evaluate_batch"),
    "saving": (torch, "save"),
    "renaming": (os, "replace"),
    "deleting": (shutil, "rmtree"),
    "logging": (EpochLogger, "log_stats"),
    "submission": (train, "write_submission"),
}
# Calls of it until the end of a run that nobody disturbs, about.
CALLS = {
    "packing": 38,
    "step": 42,
    "optimiser": 21,
    "validation": 6,
    "saving": 150,
    "renaming": 60,
    "deleting": 40,
    "logging": 6,
    "submission": 1,
}
OPTIONS = [
    "--number_of_epochs=6",
    "--split=random",
    "--ckpt_interval_minutes=0",
]


def augmented_yaml(folder: Path) -> Path:
    """The default system with its augmentation switched on."""
    text = (ROOT / "hparams" / "conformer.yaml").read_text()
    for name in ("channel", "masking"):
        assert f"# {name}: !new" in text
        text = text.replace(f"# {name}: !new", f"{name}: !new")
    path = folder / "augmented.yaml"
    path.write_text(text)
    return path


def at(act: str, count: int, do: Callable[[], None], after: bool) -> None:
    """Does something at the count-th call of a function, before or after it.

    Arguments
    ---------
    act : str
        A key of ``ACTS``.
    count : int
        From 1.
    do : callable
        What to do.
    after : bool
        Whether the function is called first.
    """
    place, name = ACTS[act]
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


def die() -> None:
    """SIGKILL for this process and its workers."""
    os.killpg(os.getpid(), signal.SIGKILL)


def begin(
    yaml: Path, data: Path, output: Path, more: list[str], fate=None
) -> Running:
    """A training process, and its fate: ACT, COUNT and AFTER of :func:`at`."""
    arguments = train_arguments(data, output, *OPTIONS, *more)
    return start("train", [str(yaml), *arguments[1:]], fate=fate)


def moment(output: Path) -> str:
    """Where a run was when it died, by what it left."""
    signs = {
        "packing": "packs/*.part-*",
        "saving": "save/saving+*",
        "deleting": "save/deleting+*",
        "testing": "model",
        "training": "save/CKPT+*",
    }
    found = (name for name, sign in signs.items() if list(output.glob(sign)))
    return next(found, "before the first checkpoint")


def log(output: Path) -> str:
    """A run's lines, one for each epoch."""
    return (output / "train_log.txt").read_text()


def chaos(runs: int, seed: int, folder: Path) -> dict:
    """Kills ``runs`` runs; says what came of them.

    Arguments
    ---------
    runs : int
        Number of runs that are killed, each one to three times.
    seed : int
        Of the moments.
    folder : pathlib.Path
        Where to work.

    Returns
    -------
    dict
        Counts, among them ``lost`` and ``different``, which must be 0.
    """
    draw = random.Random(seed)
    data, yaml = make_corpus(folder / "data"), augmented_yaml(folder)

    @functools.cache
    def calm(factor):
        """Weights, log and seconds of a run that nobody disturbs."""
        began, output = time.monotonic(), folder / f"calm-{factor}"
        more = [f"--grad_accumulation_factor={factor}"]
        done = begin(yaml, data, output, more).wait()
        assert done.returncode == 0, done.stderr
        return weights(output), log(output), time.monotonic() - began

    result = {"runs": runs, "kills": 0, "lost": 0, "different": 0}
    moments: Counter[str] = Counter()
    for number in range(runs):
        output, factor = folder / f"run-{number}", draw.choice([1, 2])
        expected, lines, duration = calm(factor)
        more = [
            f"--num_workers={draw.choice([0, 0, 2])}",
            f"--ckpt_interval_steps={draw.choice([1, 3])}",
            f"--grad_accumulation_factor={factor}",
        ]
        for _ in range(draw.randint(1, 3)):
            fate, limit = None, draw.uniform(0.1, 1.0) * duration
            if draw.random() < 0.7:
                act = draw.choice(list(ACTS))
                count = draw.randint(1, CALLS[act])
                fate, limit = (act, count, draw.random() < 0.5), None
            done = begin(yaml, data, output, more, fate).wait(limit)
            if done.returncode == -signal.SIGKILL:
                result["kills"] += 1
                moments[fate[0] if fate else f"random: {moment(output)}"] += 1
            else:  # it was quicker
                assert done.returncode == 0, done.stderr
        done = begin(yaml, data, output, more).wait()
        if done.returncode != 0:
            result["lost"] += 1
            print(done.stderr[-2000:])
            continue
        equal = same(weights(output), expected) and log(output) == lines
        result["different"] += not equal
        print(f"{number + 1}/{runs} {result} {dict(moments)}", flush=True)
    return {**result, "moments": dict(moments)}


def main() -> None:
    """Reads the arguments and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = chaos(args.runs, args.seed, Path(folder))
    print(json.dumps(result))
    sys.exit(result["lost"] + result["different"] > 0)


if __name__ == "__main__":
    main()
