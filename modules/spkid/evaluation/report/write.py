#!/usr/bin/env python3
"""Draws a finished run on one page that needs no network: report.html.

Usage: python report.py OUTPUT_FOLDER      (train.py does the same at its end)
"""

from __future__ import annotations

import argparse
import json
import zipfile
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from spkid.errors import UserError, run_command
from spkid.evaluation.report.page import (
    columns,
    figure,
    page,
    percent,
    percent_ticks,
    table,
)
from spkid.evaluation.report.scored import (
    GREY,
    PARTS,
    Evaluation,
    by_length,
    by_speaker,
    calibration,
    confusions,
    curve,
    embedding_map,
)
from spkid.files import save_atomically

ACCURACY = "valid accuracy"  # in history.json
MEANING = {
    "new": "Recordings of sessions that the model never heard, mean over "
    "speakers. It chooses the checkpoint, and predicts a test like them.",
    "random": "Utterances drawn at random, mean over speakers; the model was "
    "trained on others of their sessions. A flattering number: expect less on "
    "new recordings.",
    "known": "Held-out utterances of sessions that the model was trained on, "
    "mean over speakers. A flattering number, since room and microphone help.",
    "gap": "Known minus new, over the speakers who have both: how much of the "
    "flattering number is room and microphone rather than voice.",
    "expected": "The accuracy on new sessions, and as much lower (or higher) "
    "as the model is less (or more) sure of the test. Speakers' differences "
    "alone leave it between {low} and {high}.",
    "test": "The test utterances, whose speakers the data folder names.",
}


def first_part(results: dict) -> str:
    """Which of PARTS the run's validation is."""
    return "random" if results.get("split") == "random" else "new"


def headline(results: dict) -> str:
    """The accuracies and the gap, and what each of them means."""
    first = first_part(results)
    names = {part: f"Accuracy, {name}" for part, (name, *_) in PARTS.items()}
    names |= {"gap": "Gap, in points", "expected": "Expected in the test"}
    tiles = []
    for part in (first, "known", "gap", "expected", "test"):
        value = results.get("valid" if part == first else part)
        figures = {"accuracy": value} if part == "gap" else value or {}
        value = figures.get("accuracy")
        if value is None:
            continue
        shown = f"{100 * value:+.1f}" if part == "gap" else percent(value)
        meaning = MEANING[part]
        if part == "expected":
            ends = {end: percent(figures[end]) for end in ("low", "high")}
            meaning = meaning.format(**ends)
        tiles.append(f"<div>{names[part]}<b>{shown}</b>{meaning}</div>")
    return f'<div class="grid tiles">{"".join(tiles)}</div>'


def training(history: list[dict], first: str) -> str:
    """Accuracies, losses and the learning rate of each epoch."""
    epochs = [row["epoch"] for row in history]
    grey = curve("new", len(epochs)) | {"color": GREY, "label": "training"}

    def plot(axes, key, look):
        values = np.array([row.get(key) for row in history], dtype=float)
        if np.isfinite(values).any():
            axes.plot(epochs, values, **look)
        axes.xaxis.get_major_locator().set_params(integer=True)
        return values

    def accuracies(canvas):
        axes = canvas.subplots()
        new = plot(axes, ACCURACY, curve(first, len(epochs)))
        known = plot(axes, "valid known_accuracy", curve("known", len(epochs)))
        axes.fill_between(epochs, new, known, color=GREY, alpha=0.15, lw=0)
        axes.set(xlabel="epoch", ylabel="accuracy")
        percent_ticks(axes)

    def losses(canvas):
        upper, lower = canvas.subplots(2, sharex=True, height_ratios=(2, 1))
        plot(upper, "valid loss", curve(first, len(epochs)))
        plot(upper, "valid known_loss", curve("known", len(epochs)))
        plot(upper, "train loss", grey)
        plot(lower, "lr", grey)
        upper.set(ylabel="loss")
        lower.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))

    said = f"{len(epochs)} epochs."
    scored = [row for row in history if row.get(ACCURACY) is not None]
    if scored:
        best = max(scored, key=lambda row: row[ACCURACY])
        said = (
            f"Best on {PARTS[first][0]}: {percent(best[ACCURACY])}, in "
            f"epoch {best['epoch']} of {epochs[-1]}."
        )
    caption = (
        "The training loss is that of crops, with the margin if there is one: "
        "its level can't be compared with the others'."
    )
    return columns(
        figure(accuracies, f"Accuracy by epoch. {said}", said, height=3),
        figure(losses, "Loss and learning rate by epoch.", caption, height=3),
    )


def sessions(split: dict) -> str:
    """How many sessions the speakers have, and what could be held out."""
    found = {}
    for row in split["speakers"].values():
        line = found.setdefault(row["sessions"], np.zeros(4, dtype=int))
        line += (1, row["utterances"], row["held_out"], not row["held_out"])
    notes = [f"<li>{escape(text)}</li>" for text in split["warnings"]]
    opened = " open" if len(notes) < 6 else ""
    return (
        table(
            "Speakers by their number of sessions; the last column counts "
            "those all of whose utterances are trained on",
            ["sessions", "speakers", "utterances", "held out", "none held out"],
            [
                [count or "unknown", *one]
                for count, one in sorted(found.items())
            ],
        )
        + f"<p>Sessions are {escape(split['sessions'])}.</p>"
        + f"<details{opened}><summary>Warnings: {len(notes)}</summary>"
        + f"<ul>{''.join(notes)}</ul></details>"
    )


def settings(text: str, results: dict) -> str:
    """The run's figures, and its hyperparameters as they were given."""
    rows = [
        [key.replace("_", " "), value]
        for key, value in results.items()
        if not (value is None or key == "gap" or isinstance(value, dict))
    ]
    return (
        f"{table('The run', ['what', 'value'], rows, 'text')}"
        "<details><summary>hyperparams.yaml</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )


def read(path: Path) -> object:
    """The content of a run's file; None where it is missing.

    Raises
    ------
    UserError
        If it cannot be read.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else text
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: could not be read ({error}); take it away to have a "
            "report without its part."
        ) from None


def labelled(arrays: dict, speakers: str | None) -> Evaluation | None:
    """The utterances whose speaker is known; None if there is none."""
    keys = ("part", "target", "guess", "confidence", "frames", "embedding")
    known = arrays["target"] >= 0
    if not known.any():
        return None
    highest = max(arrays["target"].max(), arrays["guess"].max())
    names = [str(i) for i in range(highest + 1)]
    if speakers is not None:
        names = speakers.removesuffix("\n").split("\n")
    if highest >= len(names):
        raise UserError(
            f"speakers.txt: it names {len(names)} speakers, evaluation.npz has "
            f"speaker {highest}; train again, so that both are of one run."
        )
    return Evaluation(names, *(arrays[key][known] for key in keys))


def write_report(output_folder: str | Path) -> Path:
    """Draws report.html from the files of a finished run.

    Arguments
    ---------
    output_folder : str or pathlib.Path
        Holds results.json, history.json, evaluation.npz, speakers.txt,
        hyperparams.yaml and manifests/split_report.json; where one is
        missing, a sentence says so in place of its sections.

    Returns
    -------
    pathlib.Path
        The page. The same files give the same bytes.

    Raises
    ------
    UserError
        If no such file is there, or one cannot be read.
    """
    folder = Path(output_folder)
    results = read(folder / "results.json") or {}
    first = first_part(results)
    sources = {
        "Accuracy": ("results.json", headline),
        "Training": ("history.json", partial(training, first=first)),
        "Accuracy by length": ("evaluation.npz", by_length),
        "Accuracy by speaker": ("evaluation.npz", by_speaker),
        "Most confused": ("evaluation.npz", confusions),
        "Embedding map": ("evaluation.npz", embedding_map),
        "Calibration": ("evaluation.npz", calibration),
        "Sessions": ("manifests/split_report.json", sessions),
        "Settings": ("hyperparams.yaml", partial(settings, results=results)),
    }
    found = {name: read(folder / name) for name, _ in sources.values()}
    if not any(found.values()):
        raise UserError(
            f"{folder}: no finished run is there (results.json is missing); "
            "name the --output_folder of one."
        )
    why = dict.fromkeys(found, "{} is missing or empty.")
    if found["evaluation.npz"] is not None:
        why["evaluation.npz"] = "No utterance of {} has a known speaker."
        found["evaluation.npz"] = labelled(
            found["evaluation.npz"], read(folder / "speakers.txt")
        )
    body = []
    for title, (name, section) in sources.items():
        content = found[name]
        missing = f"<p>{why[name].format(name)}</p>"
        html = section(content) if content else missing
        body.append(f"<section><h2>{title}</h2>{html}</section>")
    path = folder / "report.html"
    title = f"Report of {folder.resolve().name}"
    if results:
        title = "Report: {system}, {split} split, seed {seed}".format(**results)
    save_atomically(page(title, "\n".join(body)), path)
    return path


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_folder", type=Path)
    print(write_report(parser.parse_args(arguments).output_folder))


if __name__ == "__main__":
    run_command(main)
