#!/usr/bin/env python3
"""Kills training runs at random moments; each must end in the same bits.

Usage: python tests/chaos.py [--runs 30] [--seed 0]

Each run trains a tiny system with dropout, augmentation and a random number
of loader workers, is killed by SIGKILL one to three times, wherever it is
(preparing, packing, in a step, saving, validating), goes on by the same
command, and its final weights are compared, bit for bit, with those of a run
that nobody disturbed. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from corpus import make_corpus

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = [
    "--d_model=24",
    "--n_layers=1",
    "--n_heads=2",
    "--d_ff=32",
    "--embedding_size=16",
    "--segment_frames=16",
    "--batch_size=4",
    "--number_of_epochs=6",
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


def start(yaml: Path, data: Path, output: Path, more: list[str]):
    """A training process, its output in a file beside the results."""
    output.mkdir(exist_ok=True)
    with open(output / "said.txt", "a") as said:
        return subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "train.py"),
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
    begun = time.monotonic()
    calm = start(yaml, data, folder / "calm", ["--ckpt_interval_steps=1"])
    assert calm.wait() == 0, (folder / "calm" / "said.txt").read_text()
    duration = time.monotonic() - begun
    expected = weights(folder / "calm")
    result = {"runs": runs, "kills": 0, "lost": 0, "different": 0}
    moments = Counter()
    for number in range(runs):
        output = folder / f"run-{number}"
        more = [
            f"--num_workers={draw.choice([0, 0, 2])}",
            f"--ckpt_interval_steps={draw.choice([1, 3])}",
        ]
        for _ in range(draw.randint(1, 3)):
            process = start(yaml, data, output, more)
            try:
                # Little of interest happens in the first third: imports.
                process.wait(draw.uniform(0.3, 1.0) * duration)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                result["kills"] += 1
                moments[moment(output)] += 1
        if start(yaml, data, output, more).wait() != 0:
            result["lost"] += 1
            print((output / "said.txt").read_text()[-2000:])
            continue
        found = weights(output)
        same = found.keys() == expected.keys() and all(
            torch.equal(found[key], expected[key]) for key in expected
        )
        result["different"] += not same
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
