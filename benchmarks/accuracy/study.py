"""The riddles of the student's write-up, measured.

Usage:
  python study.py crops RUN [RUN ...]      accuracy by length of the test crop
  python study.py padding RUN [RUN ...]    what padding without a mask does
  python study.py widths   --data_folder DIR [DIR ...]     trains, by d_model
  python study.py segments --data_folder DIR [DIR ...]     by training crop
  python study.py validation --data_folder DIR [DIR ...]   which validation
                                                           predicts the test
  python study.py sessions --data_folder DIR [DIR ...]     are they found?
RUN is the output folder of a finished run. Widths, segments and validation
train small Conformers, three seeds of each; runs that are finished are not
repeated. They validate on the sessions that DIR has written down; with
--sessions inferred, as if it had none. Sessions compares the two.
Each writes a table, and a plot of accuracies, to --folder (results/study).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from found_sessions import session_scores
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm import tqdm
from trained_run import Run, crop_kinds, train_accuracy
from variants import PARTS, SEGMENTS, VARIANTS, WIDTHS, accuracies, train_runs

from spkid.errors import UserError, run_command
from spkid.files import save_atomically

LENGTHS = (None, 2000, 1024, 512, 256, 128, 64)


# --- finished runs ----------------------------------------------------------


def each_run(args):
    """Yields each run, and its utterances of each part that it has."""
    for folder in tqdm(args.runs, desc="Runs"):
        run = Run(folder, args.pack_folder)
        for part in tqdm(PARTS, desc=folder.name, leave=False):
            utterances = run.sample(part, args.utterances)
            if utterances:
                yield run, part, utterances


def crops_table(args) -> None:
    """Accuracy by length of the test crop, on known and on new sessions."""
    totals = {}
    for run, part, utterances in each_run(args):
        for size in LENGTHS:
            for kind, cut in crop_kinds(size).items():
                value = run.accuracy(utterances, cut)
                totals.setdefault((part, kind), {}).setdefault(size, [])
                totals[part, kind][size].append(value)
    names = ["whole" if size is None else str(size) for size in LENGTHS]
    rows, curves = [], {}
    for (part, kind), by_size in totals.items():
        whole = totals[part, "random"][None]  # is the same of any kind
        means = [np.mean(by_size.get(size, whole)) for size in LENGTHS]
        rows.append([PARTS[part], kind, *map(float, means)])
        if kind != "first":
            curves[f"{PARTS[part]}, {kind}"] = means
    write_table(args.folder / "crops.md", ["utterances", "crop", *names], rows)
    plot(args.folder / "crops.png", names, curves, "frames of the test crop")


def padding_table(args) -> None:
    """What padded frames do if no mask keeps them out."""
    fillings = {"masked": None}
    fillings |= {f"filled with {v}, no mask": float(v) for v in (-20, 0)}
    found = {name: {} for name in fillings}
    for run, part, utterances in each_run(args):
        for name, value in fillings.items():
            accuracy = run.padded_accuracy(utterances, value)
            found[name].setdefault(PARTS[part], []).append(accuracy)
    means = {
        name: {part: float(np.mean(values)) for part, values in parts.items()}
        for name, parts in found.items()
    }
    parts = list(means["masked"])
    rows = [[name, *means[name].values()] for name in means]
    write_table(args.folder / "padding.md", ["padding", *parts], rows)
    curves = {part: [means[name][part] for name in means] for part in parts}
    plot(args.folder / "padding.png", list(means), curves, "")


def sessions_table(args) -> None:
    """Inferred sessions against true ones; no run is needed."""
    rows = {
        folder.name: session_scores(folder, args.pack_folder, args.seeds)
        for folder in tqdm(args.data_folder, desc="Sessions")
    }
    header = ["data", *next(iter(rows.values()))]
    table = [[data, *scores.values()] for data, scores in rows.items()]
    write_table(args.folder / "sessions.md", header, table)


# --- runs that are trained --------------------------------------------------


def chosen(args, variants: dict[str, dict]) -> dict[str, dict]:
    """The variants that --variants names, or all."""
    names = args.variants or list(variants)
    if wrong := set(names) - set(variants):
        raise UserError(
            f"--variants {min(wrong)!r} is none of {', '.join(variants)}."
        )
    return {name: variants[name] for name in names}


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
    variants = chosen(args, variants)
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
                label = f"{data}, {split} split: {part}"
                curves.setdefault(label, []).append(mean)
    header = ["data", x_label, "split", *columns.values()]
    write_table(args.folder / f"{name}.md", header, rows)
    plot(args.folder / f"{name}.png", list(variants), curves, x_label)


def validation_table(args) -> None:
    """Does a validation predict the test, in value and in rank?"""
    runs = train_runs(args, chosen(args, VARIANTS))
    rows, points = [], {}
    for (data, variant, split), seeds in by_variant(runs).items():
        means = {part: _mean(seeds, part) for part in PARTS}
        rows.append([data, variant, split, *means.values()])
        test = means.pop("test"), means.pop("by speaker")
        for part, value in means.items():
            if value is not None:
                kind = split, PARTS[part]
                points.setdefault(kind, {}).setdefault(data, [])
                points[kind][data].append((value, *test))
    header = ["data", "variant", "split", *PARTS.values()]
    write_table(args.folder / "validation.md", header, rows)
    summary = []
    for kind, of_data in points.items():
        own = []
        for data, pairs in of_data.items():
            value, test, by_speaker = np.array(pairs).T
            ranked = len(pairs) > 2 and np.ptp(value) and np.ptp(test)
            rank = spearmanr(value, test)[0] if ranked else np.nan
            own.append(
                [
                    np.abs(value - test).mean(),
                    np.abs(value - by_speaker).mean(),
                    rank,
                ]
            )
            summary.append([*kind, data, *own[-1]])
        if len(own) > 1:
            summary.append([*kind, "mean", *np.mean(own, axis=0)])
    header = ["split", "validated on", "data", "mean distance to the test"]
    header += ["to the test by speaker", "rank correlation with the test"]
    write_table(args.folder / "validation_summary.md", header, summary)
    scatter(args.folder / "validation.png", points)


# --- output -----------------------------------------------------------------


def write_table(path: Path, header: list[str], rows: list[list]) -> None:
    """Prints a Markdown table and writes it."""

    def cell(value):
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3f}"
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
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    print(path)


def scatter(path: Path, points: dict[tuple, dict]) -> None:
    """Draws the test's accuracy over what each validation promised."""
    places = sorted({data for of_data in points.values() for data in of_data})
    figure = Figure(figsize=(4 * len(places), 4), layout="constrained")
    for axes, data in zip(
        figure.subplots(1, len(places), squeeze=False)[0], places, strict=True
    ):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for (split, part), of_data in points.items():
            if data in of_data:
                label = f"{split} split: {part}"
                axes.scatter(*np.array(of_data[data]).T[:2], label=label)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), title=data)
        axes.set(xlabel="accuracy in validation", ylabel="in the test")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    print(path)


def main(arguments: list[str]) -> None:
    """Runs one study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ("crops", "padding", "sessions")
    names += ("widths", "segments", "validation")
    parser.add_argument("study", choices=names)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data_folder", nargs="+", type=Path, default=[])
    parser.add_argument("--pack_folder", type=Path)
    place = Path(__file__).resolve().parents[2] / "results" / "study"
    parser.add_argument("--folder", type=Path, default=place)
    kinds = ("session", "random")
    parser.add_argument("--split", nargs="+", default=kinds[:1], choices=kinds)
    kinds = ("auto", "inferred")
    parser.add_argument("--sessions", default=kinds[0], choices=kinds)
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
    for key in ("seeds", "jobs", "epochs"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} must be at least 1.")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.study == "crops":
        crops_table(args)
    elif args.study == "padding":
        padding_table(args)
    elif args.study == "sessions":
        sessions_table(args)
    elif args.study == "widths":
        variants_table(args, "widths", WIDTHS, "d_model")
    elif args.study == "segments":
        variants_table(args, "segments", SEGMENTS, "frames of a training crop")
    else:
        validation_table(args)


if __name__ == "__main__":
    run_command(main)
