"""Small systems that differ in one thing each, trained for the studies."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spkid.errors import UserError
from spkid.evaluation import PARTS, Evaluation
from spkid.evaluation.metrics import expected_accuracy
from spkid.files import read_json, save_atomically

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "recipes" / "ML2022hw4" / "train.py"
SYSTEM = ROOT / "hparams" / "conformer.yaml"
# What is known of a run, and how the tables name it.
COLUMNS = {part: PARTS[part].name for part in ("known", "new", "random")}
COLUMNS |= {
    "expected": "estimate from confidence",
    "test": PARTS["test"].name,
    "by speaker": f"{PARTS['test'].name}, by speaker",
}
# What all trained runs share: a small, quick Conformer.
SMALL = {"d_model": 64, "d_ff": 256, "n_layers": 2, "segment_frames": 128}
WIDTHS = {str(d): {"d_model": d, "d_ff": 4 * d} for d in (80, 128, 256, 512)}
SEGMENTS = {str(n): {"segment_frames": n} for n in (32, 64, 128, 256)}
# Changes of the YAML file's text: old to new.
AUGMENT = {
    "    # channel:": "    channel:",
    "    # masking:": "    masking:",
}
MEAN_POOLING = {"AttentiveStatisticsPooling": "MeanPooling"}
VARIANTS = {
    "default size": {"d_model": 144, "d_ff": 576, "n_layers": 4},
    "small": {},
    "narrow": {"d_model": 32, "d_ff": 128},
    "shallow": {"n_layers": 1},
    "not normalised": {"normalization": "none"},
    "augmented": {"text": AUGMENT},
    "mean pooling": {"text": MEAN_POOLING},
    "short crops": {"segment_frames": 32},
    "long crops": {"segment_frames": 256},
    "few epochs": {"number_of_epochs": 3},
}

Runs = dict[tuple[str, str, str, int], Path]


def train_runs(args: argparse.Namespace, variants: dict[str, dict]) -> Runs:
    """Trains each variant on each data folder with each split and seed; those
    that are finished stay as they are.

    Arguments
    ---------
    args : argparse.Namespace
        That of study.py.
    variants : dict
        Name to what it changes: keys of the YAML file, and ``text``.

    Returns
    -------
    dict
        (data folder's name, variant, split, seed) to the output folder.

    Raises
    ------
    UserError
        If a run fails, or its folder holds a run on other data.
    """
    _check_data(args.data_folder)
    runs, jobs = {}, []
    for data in args.data_folder:
        for split in args.split:
            for name, changes in variants.items():
                for seed in range(1, args.seeds + 1):
                    key = (data.name, name, _label(args, split), seed)
                    place = args.folder / "runs" / _slug(args, changes)
                    runs[key] = place / f"{data.name}-{split}-{seed}"
                    if not _is_finished(runs[key], data):
                        jobs.append((data, changes, split, seed, runs[key]))
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with (
        tqdm(total=len(jobs), desc="Training", unit="run") as bar,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        futures = [pool.submit(_train, args, threads, *job) for job in jobs]
        for done in as_completed(futures):
            done.result()
            bar.update()
    for *_, run in jobs:
        if not (run / "results.json").exists():
            raise UserError(
                f"{run}: the run failed; see its error in "
                f"{_beside(run, 'log')}."
            )
    return runs


def _check_data(folders):
    """Raises UserError for what only hours of training would show."""
    if len({data.name for data in folders}) < len(folders):
        raise UserError(
            "--data_folder: two folders have the same name; rename one."
        )
    for data in folders:
        if data.is_dir() and not (data / "testlabels.json").exists():
            raise UserError(
                f"{data / 'testlabels.json'}: is missing; add it, or name data "
                "whose test speakers are known."
            )


def _is_finished(run, data):
    """Whether a run has its results; UserError if they are of other data."""
    if not (run / "results.json").exists():
        return False
    found = read_json(run / "results.json")["data_folder"]
    if Path(found).resolve() != data.resolve():
        raise UserError(
            f"{run}: holds a run on {found}, not on {data}; give another "
            "--folder."
        )
    return True


def _beside(run, suffix):
    return run.with_name(f"{run.name}.{suffix}")


def _label(args, split):
    """How the tables name a split."""
    if split == "session" and args.sessions != "auto":
        return f"{args.sessions} session"
    return split


def _slug(args, changes):
    """A folder's name that is the same for the same system."""
    changes = {"number_of_epochs": args.epochs, **changes}
    if args.precision != "fp32":
        changes["precision"] = args.precision
    if args.sessions != "auto":
        changes["sessions"] = args.sessions
    own = {k: v for k, v in changes.items() if SMALL.get(k) != v}
    words = [*own.pop("text", {}).values()]
    words += [f"{key}={value}" for key, value in own.items()]
    return re.sub(r"[^\w=.]+", "-", "-".join(words)).strip("-")


def system_text(replacements: dict[str, str]) -> str:
    """The default system's YAML text with some parts replaced."""
    text = SYSTEM.read_text(encoding="utf-8")
    for old, new in replacements.items():
        if old not in text:
            raise UserError(
                f"{SYSTEM}: {old.strip()!r} is missing; restore it."
            )
        text = text.replace(old, new)
    return text


def _train(args, threads, data, changes, split, seed, output):
    """One run, in a process of its own."""
    changes = {"number_of_epochs": args.epochs, **SMALL, **changes}
    text = system_text(changes.pop("text", {}))
    system = _beside(output, "yaml")
    save_atomically(text, system)
    options = {
        "data_folder": data,
        "output_folder": output,
        "pack_folder": args.pack_folder,
        "split": split,
        "sessions": args.sessions,
        "seed": seed,
        "precision": args.precision,
        **changes,
    }
    command = [sys.executable, str(TRAIN), str(system)]
    for key, value in options.items():
        if value is not None:
            command += [f"--{key}", str(value)]
    with open(_beside(output, "log"), "w", encoding="utf-8") as log:
        subprocess.run(
            command,
            stdout=log,
            stderr=log,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )


def accuracies(run: Path) -> dict[str, float]:
    """Accuracies of a run by the keys of ``COLUMNS``, over the speakers who
    have both held-out and test utterances.

    Accuracies are means over speakers, as in training, except the test's,
    which is one over utterances; "expected" is its estimate.
    """
    table = Evaluation.load(run / "evaluation.npz")
    held_out, test = table.of_part("new", "random"), table.of_part("test")
    both = np.intersect1d(test.target, held_out.target)
    if not len(both):
        raise UserError(
            f"{run}: no speaker has both held-out and test utterances, so they "
            "can't be compared; name other data."
        )
    table, held_out, test = (
        one.select(np.isin(one.target, both)) for one in (table, held_out, test)
    )
    result = {
        part: table.of_part(part).accuracy(by_speaker=True)
        for part in ("known", "new", "random")
        if len(table.of_part(part))
    }
    result["test"] = test.accuracy()
    result["by speaker"] = test.accuracy(by_speaker=True)
    result["expected"] = expected_accuracy(
        held_out.confidence,
        held_out.right,
        held_out.target,
        test.confidence,
        test.guess,
    ).accuracy
    return result
