"""Small systems that differ in one thing each, trained for the studies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ml2022hw4_prepare import read_json
from spkid.errors import UserError
from spkid.evaluation.metrics import expected_accuracy
from spkid.files import save_atomically

HERE = Path(__file__).resolve().parent
SYSTEM = HERE / "hparams" / "conformer.yaml"
PARTS = {
    "known": "known sessions",
    "new": "new sessions",
    "random": "random utterances",
    "expected": "expected in the test",
    "test": "test",
    "by speaker": "test, by speaker",
}
# What all the trained runs share: a small, quick Conformer.
SMALL = {"d_model": 64, "d_ff": 256, "n_layers": 2, "segment_frames": 128}
WIDTHS = {str(d): {"d_model": d, "d_ff": 4 * d} for d in (80, 128, 256, 512)}
SEGMENTS = {str(n): {"segment_frames": n} for n in (32, 64, 128, 256)}
# Changes of the YAML file's text: what stands there, and what shall.
AUGMENT = {
    "    # channel:": "    channel:",
    "    # masking:": "    masking:",
}
MEAN_POOLING = {
    "pooling.AttentiveStatisticsPooling": "pooling.MeanPooling",
}
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


def train_runs(args, variants: dict[str, dict]) -> dict[tuple, Path]:
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
        If a run fails, or one of other data is in its place.
    """
    _check(args)
    runs, jobs = {}, []
    for data in args.data_folder:
        for split in args.split:
            for name, changes in variants.items():
                for seed in range(1, args.seeds + 1):
                    key = (data.name, name, _label(args, split), seed)
                    place = args.folder / "runs" / _slug(args, changes)
                    place /= "-".join(map(str, (data.name, split, seed)))
                    runs[key] = place
                    if not (place / "results.json").exists():
                        jobs.append((data, changes, split, seed, place))
                        continue
                    of = read_json(place / "results.json")["data_folder"]
                    if Path(of).resolve() != data.resolve():
                        raise UserError(
                            f"{place}: is a run on {of}, not on {data}; give "
                            "another --folder."
                        )
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with (
        tqdm(total=len(jobs), desc="Training", unit="run") as bar,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        futures = [pool.submit(_train, args, threads, *job) for job in jobs]
        for done in as_completed(futures):
            done.result()
            bar.update()
    broken = [
        run for run in runs.values() if not (run / "results.json").exists()
    ]
    if broken:
        raise UserError(
            f"{broken[0]}: the run failed; its last words are in "
            f"{_beside(broken[0], 'log')}."
        )
    return runs


def _check(args):
    """What would be found out only after hours of training."""
    names = [data.name for data in args.data_folder]
    if len(set(names)) < len(names):
        raise UserError("--data_folder: two have one name; rename one.")
    for data in args.data_folder:
        if data.is_dir() and not (data / "testlabels.json").exists():
            raise UserError(
                f"{data / 'testlabels.json'}: is missing; validations can't be "
                "compared to a test whose speakers nobody knows."
            )


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


def _train(args, threads, data, changes, split, seed, output):
    """One run, in a process of its own."""
    text = SYSTEM.read_text(encoding="utf-8")
    changes = {"number_of_epochs": args.epochs, **SMALL, **changes}
    for old, new in changes.pop("text", {}).items():
        if old not in text:
            raise UserError(f"{SYSTEM}: {old!r} doesn't stand there.")
        text = text.replace(old, new)
    output.parent.mkdir(parents=True, exist_ok=True)
    system = _beside(output, "yaml")
    save_atomically(text, system)
    command = [sys.executable, str(HERE / "train.py"), str(system)]
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
    """Accuracy on each part of a run, over the speakers whom both the held-out
    utterances and the test cover: of what is validated on, the mean over
    speakers, as in training; of the test as it is scored, over utterances,
    and "by speaker", too; and what was expected of those test utterances."""
    keys = ("part", "target", "guess", "confidence")
    with np.load(run / "evaluation.npz") as evaluation:
        part, target, guess, confidence = (evaluation[key] for key in keys)
    right, held_out = target == guess, np.isin(part, ("new", "random"))
    both = np.intersect1d(target[part == "test"], target[held_out])
    if not len(both):
        raise UserError(
            f"{run}: no speaker has both held-out and test utterances, so they "
            "can't be compared."
        )
    covered = np.isin(target, both)
    result = {}
    for name in ("known", "new", "random", "test"):
        chosen = covered & (part == name)
        if chosen.any():
            who = target[chosen]
            result[name] = float(
                np.mean(
                    [right[chosen][who == s].mean() for s in both if s in who]
                )
            )
    result["by speaker"] = result["test"]
    held_out, test = covered & held_out, covered & (part == "test")
    result["test"] = float(right[test].mean())
    result["expected"] = expected_accuracy(
        confidence[held_out],
        right[held_out],
        target[held_out],
        confidence[test],
        guess[test],
    ).accuracy
    return result
