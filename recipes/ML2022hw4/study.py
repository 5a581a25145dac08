"""The riddles of the student's write-up, measured.

Usage:
  python study.py crops RUN [RUN ...]      accuracy by length of the test crop
  python study.py padding RUN [RUN ...]    what padding without a mask does
  python study.py widths   --data_folder DIR [DIR ...]     trains, by d_model
  python study.py segments --data_folder DIR [DIR ...]     by training crop
  python study.py validation --data_folder DIR [DIR ...]   which validation
                                                           predicts the test
RUN is the output folder of a finished run. The last three train small
Conformers, three seeds of each; runs that are finished are not repeated.
Tables and plots go to --folder (results/study).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm import tqdm

import prepare
from predict import load_run
from spkid.batching import LengthBatches
from spkid.checkpoints import save_atomically
from spkid.errors import UserError, run_command
from spkid.lengths import relative_lengths
from validate import read_corpus, read_json

HERE = Path(__file__).resolve().parent
SYSTEM = HERE / "hparams" / "conformer.yaml"
LENGTHS = (None, 2000, 1024, 512, 256, 128, 64)
PARTS = {
    "known": "known sessions",
    "new": "new sessions",
    "random": "random utterances",
    "test": "test",
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


# --- training ---------------------------------------------------------------


def train_runs(args, variants: dict[str, dict]) -> dict[tuple, Path]:
    """Trains each variant on each data folder with each seed.

    Returns
    -------
    dict
        (data folder's name, variant, split, seed) to the output folder.
    """
    runs, jobs = {}, []
    for data in args.data_folder:
        for split in args.split:
            for name, changes in variants.items():
                for seed in range(1, args.seeds + 1):
                    key = (data.name, name, split, seed)
                    place = args.folder / "runs" / _slug(args, changes)
                    place /= "-".join(map(str, (data.name, split, seed)))
                    runs[key] = place
                    if not (place / "results.json").exists():
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
    broken = [
        run for run in runs.values() if not (run / "results.json").exists()
    ]
    if broken:
        raise UserError(
            f"{broken[0]}: the run failed; its last words are in "
            f"{broken[0].with_suffix('.log')}."
        )
    return runs


def _slug(args, changes):
    """A folder's name that is the same for the same system."""
    changes = {"number_of_epochs": args.epochs, **changes}
    if args.precision != "fp32":
        changes["precision"] = args.precision
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
    system = output.with_suffix(".yaml")
    save_atomically(text, system)
    command = [sys.executable, str(HERE / "train.py"), str(system)]
    options = {
        "data_folder": data,
        "output_folder": output,
        "pack_folder": args.pack_folder,
        "split": split,
        "seed": seed,
        "precision": args.precision,
        **changes,
    }
    for key, value in options.items():
        if value is not None:
            command += [f"--{key}", str(value)]
    with open(output.with_suffix(".log"), "w", encoding="utf-8") as log:
        subprocess.run(
            command,
            stdout=log,
            stderr=log,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )


def accuracies(run: Path) -> dict[str, float]:
    """Accuracy on each part of a run, over the speakers that the held-out
    utterances and the test both cover; of what is validated on, the mean over
    speakers, as in training."""
    with np.load(run / "evaluation.npz") as evaluation:
        part, target, guess = (
            evaluation[key] for key in ("part", "target", "guess")
        )
    right, test = target == guess, part == "test"
    result = {}
    held_out = np.isin(part, ("new", "random"))
    both = np.intersect1d(target[test], target[held_out])
    covered = np.isin(target, both)
    for name in PARTS:
        chosen = covered & (part == name)
        if name == "test":
            result[name] = float(right[chosen].mean())
        elif chosen.any():
            result[name] = float(
                np.mean(
                    [
                        right[chosen & (target == s)].mean()
                        for s in np.unique(target[chosen])
                    ]
                )
            )
    return result


def by_variant(runs: dict[tuple, Path]) -> dict[tuple, list[dict]]:
    """Accuracies of each seed, by (data folder's name, variant, split)."""
    table = {}
    for (*key, _seed), run in runs.items():
        table.setdefault(tuple(key), []).append(accuracies(run))
    return table


def _mean(rows, name):
    values = [row[name] for row in rows if name in row]
    return float(np.mean(values)) if values else None


def variants_table(args, name: str, variants: dict, x_label: str) -> None:
    """Trains variants; shows each part's accuracy, mean over the seeds."""
    runs = train_runs(args, variants)
    columns = {"train": "training", **PARTS}
    rows, curves = [], {}
    for (data, variant, split), seeds in by_variant(runs).items():
        for seed, row in enumerate(seeds, start=1):
            row["train"] = train_accuracy(runs[data, variant, split, seed])
        means = [_mean(seeds, part) for part in columns]
        rows.append([data, variant, split, *means])
        for part, mean in zip(columns.values(), means, strict=True):
            if mean is not None:
                label = f"{data}: {part}" if split != "random" else None
                if label:
                    curves.setdefault(label, []).append(mean)
    header = ["data", x_label, "split", *columns.values()]
    write_table(args.folder / f"{name}.md", header, rows)
    plot(args.folder / f"{name}.png", list(variants), curves, x_label)


def validation_table(args) -> None:
    """Does a validation predict the test, in value and in rank?"""
    chosen = args.variants or list(VARIANTS)
    if wrong := set(chosen) - set(VARIANTS):
        raise UserError(
            f"--variants {min(wrong)!r} is none of {', '.join(VARIANTS)}."
        )
    variants = {name: VARIANTS[name] for name in chosen}
    table = by_variant(train_runs(args, variants))
    rows, summary = [], []
    for (data, variant, split), seeds in table.items():
        means = [_mean(seeds, part) for part in PARTS]
        rows.append([data, variant, split, *means])
    write_table(
        args.folder / "validation.md",
        ["data", "variant", "split", *PARTS.values()],
        rows,
    )
    for data in sorted({row[0] for row in rows}):
        for split in args.split:
            own = [row for row in rows if (row[0], row[2]) == (data, split)]
            test = np.array([row[-1] for row in own])
            for column, part in enumerate(PARTS, start=3):
                values = [row[column] for row in own]
                if part == "test" or None in values:
                    continue
                gaps = np.abs(np.array(values) - test)
                rank = float(spearmanr(values, test)[0])
                summary.append(
                    [data, split, PARTS[part], gaps[0], gaps.mean(), rank]
                )
    header = ["data", "split", "validated on", "gap of the first variant"]
    header += ["mean absolute gap", "Spearman correlation with the test"]
    write_table(args.folder / "validation_summary.md", header, summary)


# --- trained runs -----------------------------------------------------------


class Run:
    """A finished run's model, and the utterances it was validated on."""

    def __init__(self, folder: Path, pack_folder: Path | None = None) -> None:
        self.hparams = load_run(folder)
        for module in self.hparams["modules"].values():
            module.eval()
        keys = ("data_folder", "on_bad_file", "max_bad_share")
        corpus = read_corpus(*(self.hparams[key] for key in keys))
        self.speakers = corpus.speakers
        place = pack_folder or self.hparams["pack_folder"]
        keys = ("pack", "pack_dtype")
        self.pack = prepare.pack_corpus(
            corpus, place, *(self.hparams[key] for key in keys)
        )
        manifests = Path(self.hparams["manifest_folder"])
        self.parts = {}
        for name in ("train", "valid", "test"):
            entries = read_json(manifests / f"{name}.json")
            for key, entry in entries.items():
                if entry["spk_id"] is not None:
                    part = entry.get("part", name)
                    self.parts.setdefault(part, {})[key] = entry["spk_id"]

    def sample(self, part: str, count: int) -> dict[str, str]:
        """At most so many utterances of a part, drawn once and for all."""
        own = sorted(self.parts.get(part, {}).items())
        chosen = np.random.default_rng(0).permutation(len(own))[:count]
        return {own[i][0]: own[i][1] for i in sorted(chosen)}

    @torch.no_grad()
    def embed(
        self, pieces: list[torch.Tensor], rows: list[int]
    ) -> torch.Tensor:
        """Embeddings of unit length [pieces, size] of parts of utterances."""
        found = [None] * len(pieces)
        for batch in LengthBatches(
            [len(piece) for piece in pieces],
            self.hparams["max_frames_per_batch"],
            self.hparams["equal_length_batches"],
        ).batches:
            self._embed_batch(batch, pieces, rows, found)
        return torch.stack(found)

    def _embed_batch(self, batch, pieces, rows, found):
        lengths = torch.tensor([len(pieces[i]) for i in batch])
        padded = torch.nn.utils.rnn.pad_sequence(
            [pieces[i] for i in batch], batch_first=True
        )
        statistics = torch.stack([self.pack.statistics(rows[i]) for i in batch])
        modules = self.hparams["modules"]
        features = modules["preprocess"](padded, lengths, statistics)
        relative = relative_lengths(lengths, padded.shape[1])
        embeddings = modules["embedding_model"](features, relative).squeeze(1)
        for i, embedding in zip(batch, embeddings, strict=True):
            found[i] = torch.nn.functional.normalize(embedding, dim=0)

    def accuracy(
        self,
        utterances: dict[str, str],
        cut: Callable[[int], list[tuple[int, int]]],
    ) -> float:
        """Share of utterances that are recognised by the mean embedding of
        the (first frame, frames) pieces that ``cut`` makes of a length."""
        pieces, rows, owner = [], [], []
        for index, key in enumerate(utterances):
            row = self.pack.row[key]
            for start, count in cut(int(self.pack.lengths[row])):
                frames = self.pack.frames(row, start, count)
                pieces.append(torch.from_numpy(frames))
                rows.append(row)
                owner.append(index)
        embeddings = self.embed(pieces, rows)
        means = torch.zeros(len(utterances), embeddings.shape[1])
        means.index_add_(0, torch.tensor(owner), embeddings)
        with torch.no_grad():
            guesses = self.hparams["classifier"](means.unsqueeze(1))
        names = [
            self.speakers[guess]
            for guess in guesses.squeeze(1).argmax(dim=1).tolist()
        ]
        right = map(str.__eq__, names, utterances.values())
        return float(np.mean(list(right)))


def train_accuracy(folder: Path, count: int = 1000) -> float:
    """Accuracy on whole utterances that were trained on; kept in a file."""
    kept = folder / "train_accuracy.json"
    if not kept.exists():
        run = Run(folder)
        value = run.accuracy(run.sample("train", count), whole)
        save_atomically(json.dumps(value), kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def whole(length: int) -> list[tuple[int, int]]:
    """The utterance as one piece."""
    return [(0, length)]


def crop_kinds(size: int | None) -> dict[str, Callable]:
    """Ways to take ``size`` frames of an utterance, by their names."""
    if size is None:
        return dict.fromkeys(("random", "first", "windows"), whole)
    generator = np.random.default_rng(size)

    def random(length):
        last = max(0, length - size)
        return [(int(generator.integers(last + 1)), min(size, length))]

    def windows(length):
        last = max(0, length - size)
        starts = range(0, last + 1, max(1, size // 2))
        starts = sorted({*starts, last})
        return [(start, min(size, length)) for start in starts]

    return {
        "random": random,
        "first": lambda length: [(0, min(size, length))],
        "windows": windows,
    }


def crops_table(args) -> None:
    """Accuracy by length of the test crop, on known and on new sessions."""
    totals = {}
    for folder in tqdm(args.runs, desc="Runs"):
        run = Run(folder, args.pack_folder)
        for part in tqdm(PARTS, desc=folder.name, leave=False):
            utterances = run.sample(part, args.utterances)
            if not utterances:
                continue
            for size in LENGTHS:
                for kind, cut in crop_kinds(size).items():
                    value = run.accuracy(utterances, cut)
                    totals.setdefault((part, kind, size), []).append(value)
                    if size is None:  # all kinds are the same
                        for other in ("first", "windows"):
                            totals.setdefault((part, other, size), []).append(
                                value
                            )
                        break
    names = ["whole" if size is None else str(size) for size in LENGTHS]
    rows, curves = [], {}
    for part, kind in dict.fromkeys(key[:2] for key in totals):
        means = [np.mean(totals[part, kind, size]) for size in LENGTHS]
        rows.append([PARTS[part], kind, *map(float, means)])
        if kind == "random":
            curves[PARTS[part]] = means
    write_table(args.folder / "crops.md", ["utterances", "crop", *names], rows)
    plot(args.folder / "crops.png", names, curves, "frames of a random crop")


def padding_table(args) -> None:
    """What padded frames do if no mask keeps them out."""
    rows = []
    for value in (None, -20.0, 0.0):
        accuracy = {}
        for folder in args.runs:
            run = Run(folder, args.pack_folder)
            for part in PARTS:
                utterances = run.sample(part, args.utterances)
                if utterances:
                    accuracy.setdefault(part, []).append(
                        _padded_accuracy(run, utterances, value)
                    )
        name = "masked" if value is None else f"filled with {value:g}, no mask"
        rows.append([name, *(float(np.mean(a)) for a in accuracy.values())])
    header = ["padding", *(PARTS[part] for part in accuracy)]
    write_table(args.folder / "padding.md", header, rows)


def _padded_accuracy(run, utterances, value):
    """Accuracy in random batches of 32, padded to each batch's longest."""
    keys = list(utterances)
    np.random.default_rng(1).shuffle(keys)
    right = 0
    modules = run.hparams["modules"]
    for begin in range(0, len(keys), 32):
        rows = [run.pack.row[key] for key in keys[begin : begin + 32]]
        pieces = [torch.from_numpy(run.pack.frames(row)) for row in rows]
        lengths = torch.tensor([len(piece) for piece in pieces])
        padded = torch.nn.utils.rnn.pad_sequence(
            pieces, batch_first=True, padding_value=value or 0.0
        )
        if value is not None:
            lengths[:] = padded.shape[1]
        statistics = torch.stack([run.pack.statistics(row) for row in rows])
        with torch.no_grad():
            features = modules["preprocess"](padded, lengths, statistics)
            embeddings = modules["embedding_model"](
                features, relative_lengths(lengths, padded.shape[1])
            )
            guesses = modules["classifier"](embeddings).argmax(dim=-1)
        for key, guess in zip(
            keys[begin : begin + 32], guesses.flatten().tolist(), strict=True
        ):
            right += run.speakers[guess] == utterances[key]
    return right / len(keys)


# --- output -----------------------------------------------------------------


def write_table(path: Path, header: list[str], rows: list[list]) -> None:
    """Prints a Markdown table and writes it."""

    def cell(value):
        if isinstance(value, float):
            return f"{value:.3f}"
        return "" if value is None else str(value)

    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(map(cell, row)) for row in rows]
    text = "\n".join(f"| {line} |" for line in lines) + "\n"
    save_atomically(text, path)
    print(f"{text}{path}")


def plot(path: Path, names: list[str], curves: dict, x_label: str) -> None:
    """Draws accuracies over named points."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(names, values, marker="o", label=label)
    axes.set(xlabel=x_label, ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(path)


def main(arguments: list[str]) -> None:
    """Runs one study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ("crops", "padding", "widths", "segments", "validation")
    parser.add_argument("study", choices=names)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data_folder", nargs="+", type=Path, default=[])
    parser.add_argument("--pack_folder", type=Path)
    parser.add_argument(
        "--folder", type=Path, default=HERE.parents[1] / "results" / "study"
    )
    parser.add_argument("--split", nargs="+", default=["session"])
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--utterances", type=int, default=1000)
    args = parser.parse_args(arguments)
    trained = args.study in ("crops", "padding")
    if trained and not args.runs:
        raise UserError(f"{args.study}: name the output folder of a run.")
    if not trained and not args.data_folder:
        raise UserError(f"{args.study}: give --data_folder.")
    if args.study == "crops":
        crops_table(args)
    elif args.study == "padding":
        padding_table(args)
    elif args.study == "widths":
        variants_table(args, "widths", WIDTHS, "d_model")
    elif args.study == "segments":
        variants_table(args, "segments", SEGMENTS, "frames of a training crop")
    else:
        validation_table(args)


if __name__ == "__main__":
    run_command(main)
