"""What a finished run leaves in its output folder."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter
from pathlib import Path

import torch

from spkid.data.corpus import Corpus
from spkid.evaluation.metrics import Expectation
from spkid.evaluation.scores import Score, expect, save_evaluation
from spkid.files import save_atomically

logger = logging.getLogger(__name__)

WEIGHTS = ("embedding_model", "classifier")
# How utterances are scored; --test_only may change it, since nothing is
# trained.
EVALUATION = (
    *("evaluation", "window_frames", "window_hop", "equal_length_batches"),
    "average_checkpoints",
)


def evaluation_settings(hparams: dict) -> dict:
    """How a run scores utterances; confidences compare only if it is equal.

    Arguments
    ---------
    hparams : dict
        The run's hyperparameters.

    Returns
    -------
    dict
        The value of each of ``EVALUATION``.
    """
    return {key: hparams[key] for key in EVALUATION}


def by_part(result: dict[str, float | None]) -> dict:
    """The figures of a validation, those on known sessions by themselves.

    Arguments
    ---------
    result : dict
        From :func:`spkid.evaluation.scores.summarize_parts`.

    Returns
    -------
    dict
        "valid" and, where known sessions were validated on, "known", with
        accuracy and loss; and their "gap".

    Example
    -------
    >>> by_part({"accuracy": 0.5, "loss": 1.0})
    {'valid': {'accuracy': 0.5, 'loss': 1.0}}
    """
    nested = {"valid": {key: result[key] for key in ("accuracy", "loss")}}
    if "gap" in result:
        nested["known"] = {
            key: result[f"known_{key}"] for key in ("accuracy", "loss")
        }
        nested["gap"] = result["gap"]
    return nested


def expectation_line(expected: Expectation | None) -> str:
    """A line that says what to expect of a test; empty if nothing is.

    Arguments
    ---------
    expected : Expectation
        May be None.

    Returns
    -------
    str
    """
    if expected is None:
        return ""
    accuracy, low, high = expected
    return (
        f"Expected in the test, by how sure the model is of it: {accuracy:.4f} "
        f"({low:.4f} to {high:.4f})\n"
    )


def write_submission(
    corpus: Corpus, scores: dict[str, Score], path: str | Path
) -> None:
    """Writes the competition's CSV, in the order of testdata.json.

    A test utterance that was skipped gets the speaker with most training
    utterances (the first one, where those aren't at hand), since the
    competition wants a row for each.

    Arguments
    ---------
    corpus : Corpus
        The data.
    scores : dict
        By feature path.
    path : str or pathlib.Path
        The CSV file.
    """
    counts = Counter(utterance.speaker for utterance in corpus.labelled)
    counts[corpus.speakers[0]] += 0  # so that there is one
    ((commonest, _),) = counts.most_common(1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Id", "Category"])
    for name in corpus.test_paths:
        scored = name in scores
        guess = corpus.speakers[scores[name].guess] if scored else commonest
        writer.writerow([name, guess])
    if len(corpus.test_paths) > len(corpus.test):
        logger.warning(
            "%s: %d test utterances could not be read; their rows say %s.",
            path,
            len(corpus.test_paths) - len(corpus.test),
            commonest,
        )
    save_atomically(text.getvalue(), path)


def write_results(
    output: Path,
    corpus: Corpus,
    modules: dict[str, torch.nn.Module],
    results: dict,
    validated: tuple[dict[str, Score], dict[str, str]],
    tested: dict[str, Score],
) -> None:
    """Writes weights, figures, scores, submission and report; says where.

    Arguments
    ---------
    output : pathlib.Path
        The run's output folder.
    corpus : Corpus
        The data.
    modules : dict
        Has a module for each of ``WEIGHTS``.
    results : dict
        The figures.
    validated : tuple of dict
        Scores of the validation, and what part each utterance was of.
    tested : dict
        Scores of the test.
    """
    for name in WEIGHTS:
        weights = io.BytesIO()
        torch.save(modules[name].state_dict(), weights)
        save_atomically(weights.getvalue(), output / "model" / f"{name}.ckpt")
    scores, parts = validated
    expected = expect(scores, parts, tested)
    if expected:
        results["expected"] = expected._asdict()
    utterances = corpus.labelled + corpus.test
    save_evaluation(
        output / "evaluation.npz",
        scores | tested,
        parts | dict.fromkeys(tested, "test"),
        {utterance.path: utterance.length for utterance in utterances},
    )
    write_submission(corpus, tested, output / "submission.csv")
    save_atomically(json.dumps(results, indent=1), output / "results.json")
    # Costly to import, and needed here alone.
    from spkid.evaluation.report.write import write_report

    page = write_report(output)

    def shown(part):
        value = results.get(part, {}).get("accuracy")
        return "unknown" if value is None else f"{value:.4f}"

    drawn = results["split"] == "random"
    parts = {
        "valid": "random utterances" if drawn else "new sessions",
        "known": "known sessions",
        "test": "the test",
    }
    figures = [
        f"{shown(part)} on {name}"
        for part, name in parts.items()
        if part == "test" or results.get(part, {}).get("accuracy") is not None
    ]
    print(
        f"Accuracy {', '.join(figures)}\n"
        f"{expectation_line(expected)}"
        f"{page}: the run on one page\n"
        f"{output / 'results.json'}: these figures\n"
        f"{output / 'submission.csv'}: a row for each test utterance\n"
        f"{output / 'model'}: the weights",
        flush=True,
    )
