#!/usr/bin/env python3
"""Kills training runs at random moments; each must end in the same bits.

Usage: python tests/chaos.py [--runs 30] [--seed 0]

Each run trains a tiny system with dropout, augmentation, a random number of
loader workers, and with or without gradient accumulation. It is killed by
SIGKILL one to three times: at a random time, or at a random call of a chosen
function (in a step, in validation, while packing, saving, renaming, deleting
or logging). It goes on by the same command, and its final weights and its log
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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from corpus import make_corpus

from spkid.data import pack as packed
from spkid.errors import run_command
from spkid.training.brain import RobustBrain
from spkid.training.loggers import EpochLogger

ROOT = Path(__file__).resolve().parents[1]
# What a run does, and the function that does it.
ACTS = {
    "packing": (packed, "load_feature_file"),
    "step": (RobustBrain, "fit_batch"),
    "optimiser": (RobustBrain, "optimizers_step"),
    "validation": (RobustBrain, "evaluate_batch"),
    "saving": (torch, "save"),
    "renaming": (os, "replace"),
    "deleting": (shutil, "rmtree"),
    "logging": (EpochLogger, "log_stats"),
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
}
OPTIONS = [
    "--d_model=24",
    "--n_layers=1",
    "--n_heads=2",
    "--d_ff=32",
    "--embedding_size=16",
    "--segment_frames=16",
    "--batch_size=4",
    "--number_of_epochs=6",
    "--split=random",
    "--ckpt_interval_minutes=0",
    "--noprogressbar",
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


def child(arguments: list[str]) -> None:
    """train.py, which is to die: ACT COUNT AFTER, then its arguments."""
    sys.path.insert(0, str(ROOT / "recipes" / "ML2022hw4"))
    import train

    act, count, after, *arguments = arguments
    at(act, int(count), die, after == "True")
    train.main(arguments)


def start(yaml: Path, data: Path, output: Path, more: list[str], fate=()):
    """A training process, its output in a file beside the results; its fate:
    ACT, COUNT and AFTER of :func:`at`."""
    program = (
        [__file__, "child", *map(str, fate)]
        if fate
        else [str(ROOT / "train.py")]
    )
    output.mkdir(exist_ok=True)
    with open(output / "said.txt", "a") as said:
        return subprocess.Popen(
            [
                sys.executable,
                *program,
                str(yaml),
                f"--data_folder={data}",
                f"--output_folder={output}",
                f"--pack_folder={output}/packs",
                *OPTIONS,
                *more,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


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


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The tested weights of a finished run."""
    found = {}
    for path in sorted((output / "model").glob("*.ckpt")):
        found |= torch.load(path, weights_only=True)
    return found


def log(output: Path) -> str:
    """A run's lines, one for each epoch."""
    return (output / "train_log.txt").read_text()


def said(output: Path) -> str:
    """All that a run's processes printed."""
    return (output / "said.txt").read_text()


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
        begun, output = time.monotonic(), folder / f"calm-{factor}"
        more = [f"--grad_accumulation_factor={factor}"]
        assert start(yaml, data, output, more).wait() == 0, said(output)
        return weights(output), log(output), time.monotonic() - begun

    result = {"runs": runs, "kills": 0, "lost": 0, "different": 0}
    moments = Counter()
    for number in range(runs):
        output, factor = folder / f"run-{number}", draw.choice([1, 2])
        expected, lines, duration = calm(factor)
        more = [
            f"--num_workers={draw.choice([0, 0, 2])}",
            f"--ckpt_interval_steps={draw.choice([1, 3])}",
            f"--grad_accumulation_factor={factor}",
        ]
        for _ in range(draw.randint(1, 3)):
            fate, limit = (), draw.uniform(0.3, 1.0) * duration
            if draw.random() < 0.7:
                act = draw.choice(list(ACTS))
                count = draw.randint(1, CALLS[act])
                fate, limit = (act, count, draw.random() < 0.5), None
            process = start(yaml, data, output, more, fate)
            try:
                # Little of interest happens in the first third: imports.
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode == -signal.SIGKILL:
                result["kills"] += 1
                moments[fate[0] if fate else f"random: {moment(output)}"] += 1
            else:  # it was quicker
                assert process.returncode == 0, said(output)
        if start(yaml, data, output, more).wait() != 0:
            result["lost"] += 1
            print(said(output)[-2000:])
            continue
        found = weights(output)
        same = found.keys() == expected.keys() and all(
            torch.equal(found[key], expected[key]) for key in expected
        )
        result["different"] += not (same and log(output) == lines)
        print(f"{number + 1}/{runs} {result} {dict(moments)}", flush=True)
    return {**result, "moments": dict(moments)}


def main() -> None:
    """Reads the arguments and prints the result."""
    if sys.argv[1:2] == ["child"]:
        run_command(lambda arguments: child(arguments[1:]))
        return
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
