"""Writes report.html from the files of a finished run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spkid.errors import UserError, one_line
from spkid.evaluation.report import scored
from spkid.evaluation.report.blocks import (
    Table,
    curve,
    figure,
    percent,
    percent_ticks,
)
from spkid.evaluation.report.verification import verification
from spkid.evaluation.scores import PARTS, Evaluation
from spkid.files import read_bounded, save_atomically

logger = logging.getLogger(__name__)
MAX_BYTES = 2**24  # of each text file
PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
HISTORY, ACCURACY = "history.json", "valid accuracy"
SOURCES = (
    *("results.json", HISTORY, "evaluation.npz", "hyperparams.yaml"),
    "manifests/split_report.json",
)
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


def share(value: Any) -> float:
    """A number of results.json, from 0 to 1.

    Raises
    ------
    ValueError
        If it isn't one.

    Example
    -------
    >>> share(0.5)
    0.5
    """
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r:.60} isn't a number from 0 to 1")
    return value


def headline(results: dict, first: str) -> list[dict[str, str]]:
    """The accuracies and the gap, and what each of them means."""

    def accuracy(key):
        value = (results.get(key) or {}).get("accuracy")
        return None if value is None else share(value)

    values = {
        first: accuracy("valid"),
        "known": accuracy("known"),
        "gap": results.get("gap"),
        "expected": accuracy("expected"),
        "test": accuracy("test"),
    }
    if values["gap"] is not None:
        share(abs(values["gap"]))
    ends = {}
    if values["expected"] is not None:
        ends = {
            key: percent(share(results["expected"][key]))
            for key in ("low", "high")
        }
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
    if any(type(epoch) is not int or epoch < 1 for epoch in epochs):
        raise ValueError("an epoch isn't a whole number from 1")
    for row in history:
        for value in row.values():
            if type(value) not in (int, float, type(None)):
                raise ValueError(f"{value!r:.60} isn't a number")

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
        highest = max(share(row[ACCURACY]) for row in scored)
        row = next(row for row in scored if row[ACCURACY] == highest)
        best = (
            f"Best on {PARTS[first].name}: {percent(highest)}, in epoch "
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
        for key in ("sessions", "utterances", "held_out"):
            if type(row[key] or 0) is not int or (row[key] or 0) < 0:
                raise ValueError(f"{key} isn't a whole number from 0")
        line = found.setdefault(row["sessions"] or 0, np.zeros(4, dtype=int))
        line += (1, row["utterances"], row["held_out"], not row["held_out"])
    table = Table(
        "Speakers by number of sessions; all utterances of those in the last "
        "column are trained on",
        ["sessions", "speakers", "utterances", "held out", "none held out"],
        [[count or "unknown", *one] for count, one in sorted(found.items())],
    )
    if not isinstance(split["warnings"], list):
        raise ValueError("its warnings aren't a list")
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
        if not (value is None or key == "gap" or isinstance(value, dict | list))
    ]
    return {
        "table": Table("The run", ["what", "value"], rows, "text"),
        "text": text,
    }


def read(path: Path) -> Any:
    """The content of a run's file; None where it is missing.

    Raises
    ------
    Exception
        If it can't be read, or isn't of the kind that a run writes.

    Example
    -------
    >>> path = getfixture("tmp_path") / "history.json"
    >>> _ = path.write_text("[]")
    >>> read(path)
    []
    """
    if not path.exists():
        return None
    if path.suffix == ".npz":
        return Evaluation.load(path)
    text = read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    if path.suffix != ".json":
        return text
    content, kind = json.loads(text), list if path.name == HISTORY else dict
    if not isinstance(content, kind):
        raise ValueError(f"it doesn't hold a {kind.__name__}")
    return content


def attempt(path: Path, make: Callable[[], Any]) -> tuple[Any, str]:
    """What is made of a file; if it is damaged, None and a sentence's end.

    Example
    -------
    >>> attempt(Path("history.json"), lambda: [])
    ([], '')
    """
    try:
        return make(), ""
    except Exception as error:  # a stranger's file may hold anything
        what = one_line(error).removeprefix(f"{path}: ")
        logger.warning("%s: can't be shown (%s).", path, what)
        return None, f"can't be shown ({what})."


def write_report(output_folder: str | Path) -> Path:
    """Draws report.html from the files of a finished run.

    Arguments
    ---------
    output_folder : str or pathlib.Path
        Holds results.json, history.json, evaluation.npz, hyperparams.yaml and
        manifests/split_report.json; where one is missing or damaged, a sentence
        replaces its sections, and a damaged one costs a warning.

    Returns
    -------
    pathlib.Path
        The page. The same files give the same bytes.

    Raises
    ------
    UserError
        If none of these files can be read.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text("seed: 1")
    >>> write_report(folder).name
    'report.html'
    """
    folder = Path(output_folder)
    found, missing = {}, {}
    for name in SOURCES:
        path = folder / name
        found[name], why = attempt(path, partial(read, path))
        missing[name] = why or "is missing or empty."
    if not any(found.values()):
        raise UserError(
            f"{folder}: holds no finished run (results.json is missing); name "
            "the --output_folder of one."
        )
    results = found["results.json"] or {}
    first = "random" if results.get("split") == "random" else "new"
    makers: dict[str, tuple[str, Callable]] = {
        "Accuracy": ("results.json", partial(headline, first=first)),
        "Training": (HISTORY, partial(training, first=first)),
        "Accuracy by length": ("evaluation.npz", scored.by_length),
        "Accuracy by speaker": ("evaluation.npz", scored.by_speaker),
        "Most confused": ("evaluation.npz", scored.confusions),
        "Embedding map": ("evaluation.npz", scored.embedding_map),
        "Calibration": ("evaluation.npz", scored.calibration),
        "Verification and strangers": ("evaluation.npz", verification),
        "Sessions": ("manifests/split_report.json", sessions),
        "Settings": ("hyperparams.yaml", partial(settings, results=results)),
    }
    table = found["evaluation.npz"]
    if table:
        found["evaluation.npz"] = table.select(table.known)
        missing["evaluation.npz"] = "has no utterance of a known speaker."
    sections = {}
    for title, (name, make) in makers.items():
        made, why = None, missing[name]
        if found[name]:
            made, why = attempt(folder / name, partial(make, found[name]))
        if made is not None or why:
            sections[title] = f"{name} {why}" if made is None else made
    title = f"Report of {folder.resolve().name}"
    if all(
        isinstance(results.get(key), str | int)
        for key in ("system", "split", "seed")
    ):
        title = "Report: {system}, {split} split, seed {seed}".format(**results)
    page = PAGES.get_template("page.html.j2").render(
        title=title, sections=sections
    )
    # A name that isn't UTF-8 has letters that can't be written.
    save_atomically(page.encode(errors="replace"), folder / "report.html")
    return folder / "report.html"
