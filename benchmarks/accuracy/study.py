"""Measures the riddles of the student's write-up (docs/riddles.md).

Usage, in the project's folder:
  python benchmarks/accuracy/study.py STUDY [RUN ...] [options]

Studies of finished runs; RUN is the output folder of one:
  crops       accuracy by the length of a test crop
  padding     accuracy in padded batches, with and without a mask
Studies that train small Conformers on each --data_folder, with several seeds:
  widths      accuracy by d_model
  segments    accuracy by the length of a training crop
  validation  how well validation predicts the test
They use the sessions that a data folder gives; with --sessions inferred, they
ignore them. They need a testlabels.json. Finished runs aren't repeated.
Without any run:
  sessions    compares inferred sessions with those a --data_folder gives

Each study writes its tables and plots to --folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm import tqdm

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2] / "recipes" / "ML2022hw4")
)
from found_sessions import session_scores
from trained_run import Run, crop_kinds, train_accuracy
from variants import (
    COLUMNS,
    ROOT,
    SEGMENTS,
    VARIANTS,
    WIDTHS,
    Runs,
    accuracies,
    train_runs,
)

from spkid.errors import UserError, one_of, run_command
from spkid.evaluation import PARTS
from spkid.files import save_atomically

LENGTHS = (None, 2000, 1024, 512, 256, 128, 64)


# --- finished runs ----------------------------------------------------------


def each_run(args):
    """Yields each run, and a sample of each labelled part that isn't trained
    on: its name and utterances."""
    for folder in tqdm(args.runs, desc="Runs"):
        run = Run(folder, args.pack_folder)
        parts = [key for key in COLUMNS if key in run.parts]
        for part in tqdm(parts, desc=folder.name, leave=False):
            yield run, COLUMNS[part], run.sample(part, args.utterances)


def crops_table(args) -> None:
    """Accuracy by length of the test crop, on each part of the utterances."""
    totals = {}
    for run, part, utterances in each_run(args):
        for size in LENGTHS:
            for kind, cut in crop_kinds(size).items():
                value = run.accuracy(utterances, cut)
                by_size = totals.setdefault((part, kind), {})
                by_size.setdefault(size, []).append(value)
    names = ["whole" if size is None else str(size) for size in LENGTHS]
    rows, curves = [], {}
    for (part, kind), by_size in totals.items():
        whole = totals[part, "random"][None]  # is the same of any kind
        means = [_mean(by_size.get(size, whole)) for size in LENGTHS]
        rows.append([part, kind, *means])
        if kind != "first":
            curves[f"{part}, {kind}"] = means
    write_table(args, "", ["utterances", "crop", *names], rows)
    plot(args, names, curves, "frames of the test crop")


def padding_table(args) -> None:
    """What padded frames do if no mask keeps them out."""
    fillings = {"masked": None}
    fillings |= {f"filled with {v}, no mask": float(v) for v in (-20, 0)}
    found = {}
    for run, part, utterances in each_run(args):
        by_filling = found.setdefault(part, {name: [] for name in fillings})
        for name, filling in fillings.items():
            value = run.padded_accuracy(utterances, filling)
            by_filling[name].append(value)
    curves = {
        part: list(map(_mean, by_filling.values()))
        for part, by_filling in found.items()
    }
    rows = map(list, zip(fillings, *curves.values(), strict=True))
    write_table(args, "", ["padding", *curves], rows)
    plot(args, list(fillings), curves, "")


def sessions_table(args) -> None:
    """Inferred sessions against true ones; no run is needed."""
    rows = {
        folder.name: session_scores(folder, args.pack_folder, args.seeds)
        for folder in tqdm(args.data_folder, desc="Sessions")
    }
    header = ["data", *next(iter(rows.values()))]
    table = [[data, *scores.values()] for data, scores in rows.items()]
    write_table(args, "", header, table)


# --- runs that are trained --------------------------------------------------


def chosen(args, variants: dict[str, dict]) -> dict[str, dict]:
    """The variants that --variants names, or all."""
    names = args.variants or list(variants)
    for name in names:
        one_of(name, tuple(variants), "--variants")
    return {name: variants[name] for name in names}


def by_variant(runs: Runs) -> dict[tuple[str, str, str], list[Path]]:
    """The runs of all seeds by (data folder's name, variant, split)."""
    folders = {}
    for (*key, _seed), run in runs.items():
        folders.setdefault(tuple(key), []).append(run)
    return folders


def _mean(values):
    """The mean of what isn't None, or None."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def variants_table(args, x_label: str, variants: dict[str, dict]) -> None:
    """Trains variants; shows each part's accuracy, mean over the seeds."""
    variants = chosen(args, variants)
    columns = {"train": PARTS["train"].name, **COLUMNS}
    rows, curves = [], {}
    for key, runs in by_variant(train_runs(args, variants)).items():
        seeds = [accuracies(r) | {"train": train_accuracy(r)} for r in runs]
        means = [_mean(seed.get(part) for seed in seeds) for part in columns]
        rows.append([*key, *means])
        for part, mean in zip(columns.values(), means, strict=True):
            if mean is not None:
                label = f"{key[0]}, {key[2]} split: {part}"
                curves.setdefault(label, []).append(mean)
    write_table(args, "", ["data", x_label, "split", *columns.values()], rows)
    plot(args, list(variants), curves, x_label)


def widths_table(args) -> None:
    """Accuracy by the width of the model."""
    variants_table(args, "d_model", WIDTHS)


def segments_table(args) -> None:
    """Accuracy by the length of a training crop."""
    variants_table(args, "frames of a training crop", SEGMENTS)


def validation_table(args) -> None:
    """Does a validation predict the test, in value and in rank?"""
    rows, points = [], {}
    runs = train_runs(args, chosen(args, VARIANTS))
    for (data, variant, split), folders in by_variant(runs).items():
        seeds = list(map(accuracies, folders))
        means = {p: _mean(seed.get(p) for seed in seeds) for p in COLUMNS}
        rows.append([data, variant, split, *means.values()])
        test = means.pop("test"), means.pop("by speaker")
        for part, value in means.items():
            if value is not None:
                of_data = points.setdefault((split, COLUMNS[part]), {})
                of_data.setdefault(data, []).append((value, *test))
    header = ["data", "variant", "split", *COLUMNS.values()]
    write_table(args, "", header, rows)
    summary = []
    for kind, of_data in points.items():
        own = [distances(*zip(*one, strict=True)) for one in of_data.values()]
        for data, row in zip(of_data, own, strict=True):
            summary.append([*kind, data, *row])
        if len(own) > 1:
            summary.append([*kind, "mean", *np.mean(own, axis=0)])
    header = ["split", "validated on", "data", "mean distance to the test"]
    header += ["to the test by speaker", "rank correlation with the test"]
    write_table(args, "_summary", header, summary)
    scatter(args, points)


def distances(validated, test, by_speaker) -> list[float]:
    """Mean distances of validations to the test over utterances and the test
    by speaker, and the rank correlation with the first (NaN: undefined)."""
    ranked = len(test) > 2 and np.ptp(validated) and np.ptp(test)
    return [
        np.abs(np.subtract(validated, test)).mean(),
        np.abs(np.subtract(validated, by_speaker)).mean(),
        spearmanr(validated, test)[0] if ranked else np.nan,
    ]


# --- output -----------------------------------------------------------------


def write_table(args, suffix: str, header: list, rows) -> None:
    """Prints a Markdown table and writes it."""

    def cell(value):
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3f}"
        return "" if value is None else str(value)

    lines = [header, ["---"] * len(header), *rows]
    text = "".join(f"| {' | '.join(map(cell, row))} |\n" for row in lines)
    path = args.folder / f"{args.study}{suffix}.md"
    save_atomically(text, path)
    print(f"{text}{path}")


def plot(args, names: list[str], curves: dict, x_label: str) -> None:
    """Draws accuracies over named points."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(names, values, marker="o", label=label)
    axes.set(xlabel=x_label, ylabel="accuracy", ylim=(0, 1.02))
    save_figure(args, figure)


def scatter(args, points: dict[tuple, dict]) -> None:
    """Draws the test accuracy over what each validation predicted."""
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
    save_figure(args, figure)


def save_figure(args, figure: Figure) -> None:
    """Adds grids and legends, and writes the plot."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    path = args.folder / f"{args.study}.png"
    figure.savefig(path, dpi=120)
    print(path)


STUDIES = {
    "crops": crops_table,
    "padding": padding_table,
    "widths": widths_table,
    "segments": segments_table,
    "validation": validation_table,
    "sessions": sessions_table,
}


def main(arguments: list[str]) -> None:
    """Runs one study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("study", choices=STUDIES, help="what to measure")
    add("runs", nargs="*", type=Path, metavar="RUN", help="a finished run")
    add("--data_folder", nargs="+", type=Path, default=[], metavar="DIR")
    add("--pack_folder", type=Path, help="default: the run's, or data/packs")
    place = ROOT / "results" / "study"
    add("--folder", type=Path, default=place, help="default: results/study")
    kinds = ("session", "random")
    add("--split", nargs="+", default=kinds[:1], choices=kinds)
    kinds = ("auto", "inferred")
    add("--sessions", default=kinds[0], choices=kinds)
    add("--variants", nargs="+", help="which to train; default: all")
    add("--seeds", type=int, default=3, help="1 to this number; default: 3")
    add("--epochs", type=int, default=8, help="of each training; default: 8")
    add("--precision", default="fp32", help="of training; default: fp32")
    jobs = os.cpu_count() or 1
    add("--jobs", type=int, default=jobs, help="runs at a time; default: cores")
    most = "of a part at most, in crops and padding; default: 1000"
    add("--utterances", type=int, default=1000, help=most)
    args = parser.parse_args(arguments)
    of_runs = args.study in ("crops", "padding")
    if of_runs and not args.runs:
        raise UserError(f"{args.study}: name the output folder of a run.")
    if not of_runs and not args.data_folder:
        raise UserError(f"{args.study}: give --data_folder.")
    for key in ("seeds", "jobs", "epochs", "utterances"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} must be at least 1.")
    args.folder.mkdir(parents=True, exist_ok=True)
    STUDIES[args.study](args)


if __name__ == "__main__":
    run_command(main)
