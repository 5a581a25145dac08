"""Writes report.html from the files of a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spkid.errors import UserError
from spkid.evaluation.report import scored
from spkid.evaluation.report.blocks import (
    Table,
    curve,
    figure,
    percent,
    percent_ticks,
)
from spkid.evaluation.scores import PARTS, Evaluation
from spkid.files import save_atomically

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ACCURACY = "valid accuracy"  # in history.json
TILES = {key: f"Accuracy, {part.name}" for key, part in PARTS.items()}
TILES |= {
    "gap": "Gap, in points",
    "expected": "Estimated test accuracy (from confidence)",
}
MEANING = {
    "new": "Mean over speakers, on sessions (occasions of recording) that the "
    "model never heard. It chooses the checkpoint, and predicts the accuracy "
    "on such recordings.",
    "random": "Mean over speakers, on utterances drawn at random; the model "
    "was trained on others of their sessions. It is too optimistic: expect "
    "less on new recordings.",
    "known": "Mean over speakers, on held-out utterances of sessions that the "
    "model was trained on. It is too optimistic, since room and microphone "
    "help.",
    "gap": "Known minus new sessions, over the speakers who have both: what "
    "room and microphone contribute.",
    "expected": "The accuracy on new sessions, changed by as much as the "
    "model's confidence changes from there to the test. The 95 % interval, "
    "from differences between speakers alone, is {low} to {high}.",
    "test": "Mean over utterances; the data folder names their speakers.",
}


def headline(results: dict, first: str) -> list[dict[str, str]]:
    """The accuracies and the gap, and what each of them means."""

    def accuracy(key):
        return (results.get(key) or {}).get("accuracy")

    values = {
        first: accuracy("valid"),
        "known": accuracy("known"),
        "gap": results.get("gap"),
        "expected": accuracy("expected"),
        "test": accuracy("test"),
    }
    expected = results.get("expected") or {}
    ends = {key: percent(value) for key, value in expected.items()}
    return [
        {
            "name": TILES[part],
            "value": f"{100 * value:+.1f}" if part == "gap" else percent(value),
            "meaning": MEANING[part].format(**ends),
        }
        for part, value in values.items()
        if value is not None
    ]


def training(history: list[dict], first: str) -> dict[str, Any]:
    """Accuracies, losses and the learning rate of each epoch."""
    epochs = [row["epoch"] for row in history]

    def plot(axes, key, part):
        values = np.array([row.get(key) for row in history], dtype=float)
        if np.isfinite(values).any():
            axes.plot(epochs, values, **curve(part, len(epochs)))
        axes.xaxis.get_major_locator().set_params(integer=True)
        return values

    def accuracies(canvas):
        axes = canvas.subplots()
        new = plot(axes, ACCURACY, first)
        known = plot(axes, "valid known_accuracy", "known")
        grey = PARTS["train"].colour
        axes.fill_between(epochs, new, known, color=grey, alpha=0.15, lw=0)
        axes.set(xlabel="epoch", ylabel="accuracy")
        percent_ticks(axes)

    def losses(canvas):
        upper, lower = canvas.subplots(2, sharex=True, height_ratios=(2, 1))
        plot(upper, "valid loss", first)
        plot(upper, "valid known_loss", "known")
        plot(upper, "train loss", "train")
        plot(lower, "lr", "train")
        upper.set(ylabel="loss")
        lower.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))

    best = f"{len(epochs)} epochs."
    scored = [row for row in history if row.get(ACCURACY) is not None]
    if scored:
        row = max(scored, key=lambda row: row[ACCURACY])
        best = (
            f"Best on {PARTS[first].name}: {percent(row[ACCURACY])}, in epoch "
            f"{row['epoch']} of {epochs[-1]}."
        )
    caption = (
        "The training loss is of crops, with the margin if there is one; its "
        "level can't be compared with the others."
    )
    return {
        "accuracies": figure(
            accuracies, f"Accuracy by epoch. {best}", best, height=3
        ),
        "losses": figure(
            losses, "Loss and learning rate by epoch.", caption, height=3
        ),
    }


def sessions(split: dict) -> dict[str, Any]:
    """How many sessions the speakers have, and what could be held out."""
    found: dict[int, np.ndarray] = {}
    for row in split["speakers"].values():
        line = found.setdefault(row["sessions"], np.zeros(4, dtype=int))
        line += (1, row["utterances"], row["held_out"], not row["held_out"])
    table = Table(
        "Speakers by number of sessions; all utterances of those in the last "
        "column are trained on",
        ["sessions", "speakers", "utterances", "held out", "none held out"],
        [[count or "unknown", *one] for count, one in sorted(found.items())],
    )
    return {
        "table": table,
        "source": split["sessions"],
        "warnings": split["warnings"],
    }


def settings(text: str, results: dict) -> dict[str, Any]:
    """The run's figures, and its hyperparameters as they were given."""
    rows = [
        [key.replace("_", " "), value]
        for key, value in results.items()
        if not (value is None or key == "gap" or isinstance(value, dict))
    ]
    return {
        "table": Table("The run", ["what", "value"], rows, "text"),
        "text": text,
    }


def read(path: Path) -> Any:
    """The content of a run's file; None where it is missing.

    Raises
    ------
    UserError
        If it cannot be read.
    """
    if not path.exists():
        return None
    if path.suffix == ".npz":
        return Evaluation.load(path)
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else text
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: could not be read ({error}); delete it to have a report "
            "without its sections."
        ) from None


def write_report(output_folder: str | Path) -> Path:
    """Draws report.html from the files of a finished run.

    Arguments
    ---------
    output_folder : str or pathlib.Path
        Holds results.json, history.json, evaluation.npz, hyperparams.yaml and
        manifests/split_report.json; where one is missing, a sentence replaces
        its sections.

    Returns
    -------
    pathlib.Path
        The page. The same files give the same bytes.

    Raises
    ------
    UserError
        If none of these files is there, or one cannot be read.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text("seed: 1")
    >>> write_report(folder).name
    'report.html'
    """
    folder = Path(output_folder)
    results = read(folder / "results.json") or {}
    first = "random" if results.get("split") == "random" else "new"
    makers: dict[str, tuple[str, Callable]] = {
        "Accuracy": ("results.json", partial(headline, first=first)),
        "Training": ("history.json", partial(training, first=first)),
        "Accuracy by length": ("evaluation.npz", scored.by_length),
        "Accuracy by speaker": ("evaluation.npz", scored.by_speaker),
        "Most confused": ("evaluation.npz", scored.confusions),
        "Embedding map": ("evaluation.npz", scored.embedding_map),
        "Calibration": ("evaluation.npz", scored.calibration),
        "Sessions": ("manifests/split_report.json", sessions),
        "Settings": ("hyperparams.yaml", partial(settings, results=results)),
    }
    found = {name: read(folder / name) for name, _ in makers.values()}
    if not any(found.values()):
        raise UserError(
            f"{folder}: holds no finished run (results.json is missing); name "
            "the --output_folder of one."
        )
    missing = dict.fromkeys(found, "is missing or empty.")
    table = found["evaluation.npz"]
    if table:
        found["evaluation.npz"] = table.select(table.known)
        missing["evaluation.npz"] = "has no utterance of a known speaker."
    sections = {
        title: make(found[name]) if found[name] else f"{name} {missing[name]}"
        for title, (name, make) in makers.items()
    }
    title = f"Report of {folder.resolve().name}"
    if results:
        title = "Report: {system}, {split} split, seed {seed}".format(**results)
    page = PAGES.get_template("page.html.j2").render(
        title=title, sections=sections
    )
    save_atomically(page, folder / "report.html")
    return folder / "report.html"
