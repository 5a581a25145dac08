"""From the scores of utterances to figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch

from spkid.errors import UserError
from spkid.evaluation.metrics import Expectation, expected_accuracy
from spkid.files import save_atomically


class Score(NamedTuple):
    """What a model said of one utterance."""

    guess: int  # class index
    target: int  # class index; -1 where it is unknown
    loss: float  # negative log-posterior of the target
    confidence: float = float("nan")  # posterior of the guess
    embedding: np.ndarray | None = None  # float16


def score_batch(
    ids: list[str],
    log_posteriors: torch.Tensor,
    targets: torch.Tensor,
    embeddings: torch.Tensor | None = None,
) -> dict[str, Score]:
    """Scores of a batch by utterance id.

    Arguments
    ---------
    ids : list of str
        Names of the utterances.
    log_posteriors : torch.Tensor [batch, speakers]
        The model's output.
    targets : torch.Tensor [batch]
        Class indices; -1 where they are unknown.
    embeddings : torch.Tensor [batch, size], optional
        Kept beside the scores.

    Returns
    -------
    dict

    Example
    -------
    >>> log_posteriors = torch.tensor([[0.75, 0.25]]).log()
    >>> score_batch(["a"], log_posteriors, torch.tensor([0]))["a"].guess
    0
    """
    known = targets.clamp(min=0).unsqueeze(1)
    losses = -log_posteriors.gather(1, known).squeeze(1)
    best, guesses = log_posteriors.max(dim=1)
    kept = [None] * len(ids)
    if embeddings is not None:
        kept = embeddings.detach().half().cpu().numpy()
    columns = (guesses, targets, losses, best.exp())
    rows = zip(*(column.tolist() for column in columns), kept, strict=True)
    return {key: Score(*row) for key, row in zip(ids, rows, strict=True)}


def gather_scores(scores: dict[str, Score]) -> dict[str, Score]:
    """The scores of all ranks, each utterance once.

    Arguments
    ---------
    scores : dict
        This rank's.

    Returns
    -------
    dict

    Example
    -------
    >>> gather_scores({"a": Score(0, 0, 0.5)})["a"].loss
    0.5
    """
    if not torch.distributed.is_initialized():
        return scores
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, scores)
    return {key: Score(*row) for part in parts for key, row in part.items()}


def summarize(
    scores: dict[str, Score], by_speaker: bool = False
) -> dict[str, float | None]:
    """Accuracy and mean loss over the utterances whose speaker is known.

    Arguments
    ---------
    scores : dict
        Scores by utterance id.
    by_speaker : bool
        Accuracy is the mean of the speakers' accuracies.

    Returns
    -------
    dict
        ``accuracy`` and ``loss``; None where no speaker is known.

    Example
    -------
    >>> summarize({"a": Score(0, 0, 0.5), "b": Score(1, -1, 0.0)})
    {'accuracy': 1.0, 'loss': 0.5}
    """
    known = [score for score in scores.values() if score.target >= 0]
    if not known:
        return {"accuracy": None, "loss": None}
    targets = np.array([score.target for score in known])
    right = targets == [score.guess for score in known]
    if by_speaker:
        index = np.unique(targets, return_inverse=True)[1]
        right = np.bincount(index, right) / np.bincount(index)
    return {
        "accuracy": float(right.mean()),
        "loss": sum(score.loss for score in known) / len(known),
    }


def summarize_parts(
    scores: dict[str, Score], parts: dict[str, str]
) -> dict[str, float | None]:
    """Figures of a validation on new and on known sessions.

    Accuracies are means over speakers: whose held-out sessions happen to be
    long have more utterances there and fewer in training, so that a mean over
    utterances would be too low.

    Arguments
    ---------
    scores : dict
        Scores by utterance id.
    parts : dict
        What each utterance is: "known" if its session is trained on; anything
        else counts as new.

    Returns
    -------
    dict
        ``accuracy`` and ``loss`` on what isn't known; where some is known,
        ``known_accuracy`` and ``known_loss``; and ``gap``, by how much the
        known flatter, over the speakers that both cover.

    Example
    -------
    >>> right, wrong = Score(1, 1, 0.5), Score(0, 1, 1.5)
    >>> summarize_parts({"a": right, "b": wrong}, {"a": "known", "b": "new"})[
    ...     "gap"
    ... ]
    1.0
    """
    known = {key: s for key, s in scores.items() if parts.get(key) == "known"}
    new = {key: score for key, score in scores.items() if key not in known}
    result = summarize(new, True)
    if not known:
        return result
    result |= {f"known_{key}": v for key, v in summarize(known, True).items()}
    both = {s.target for s in known.values()} & {s.target for s in new.values()}
    accuracies = [
        summarize({k: s for k, s in part.items() if s.target in both}, True)[
            "accuracy"
        ]
        for part in (known, new)
    ]
    result["gap"] = accuracies[0] - accuracies[1] if both else None
    return result


def expect(
    validated: dict[str, Score], parts: dict[str, str], tested: dict[str, Score]
) -> Expectation | None:
    """What accuracy to expect in a test, from how sure the model is there.

    Arguments
    ---------
    validated : dict
        Scores of the validation by utterance id.
    parts : dict
        What each of them is; only those of "new" sessions count, since others
        flatter.
    tested : dict
        Scores of the test; no target is looked at.

    Returns
    -------
    Expectation
        See :func:`spkid.evaluation.metrics.expected_accuracy`; None where no new session
        was validated on, or nothing tested.

    Example
    -------
    >>> sure, unsure = Score(0, 0, 0.1, 0.9), Score(0, 1, 2.3, 0.5)
    >>> tested = {"c": Score(1, -1, 0.0, 0.8), "d": Score(0, -1, 0.0, 0.4)}
    >>> told = expect({"a": sure, "b": unsure}, dict(a="new", b="new"), tested)
    >>> round(told.accuracy, 4)  # 0.5 - (0.7 - 0.6)
    0.4
    """
    new = [s for key, s in validated.items() if parts.get(key) == "new"]
    if not new or not tested:
        return None
    return expected_accuracy(
        np.array([score.confidence for score in new]),
        np.array([score.guess == score.target for score in new]),
        np.array([score.target for score in new]),
        np.array([score.confidence for score in tested.values()]),
        np.array([score.guess for score in tested.values()]),
    )


def save_evaluation(
    path: str | Path,
    scores: dict[str, Score],
    parts: dict[str, str],
    frames: dict[str, int],
) -> None:
    """Writes what a model said of each utterance, for reports and studies.

    Arguments
    ---------
    path : str or pathlib.Path
        A NumPy .npz file with ``id``, ``part``, ``target``, ``guess``,
        ``confidence``, ``loss``, ``frames`` and ``embedding``.
    scores : dict
        Scores by utterance id.
    parts : dict
        What each utterance was evaluated as.
    frames : dict
        Length of each utterance.
    """
    content = io.BytesIO()
    values = scores.values()
    np.savez(
        content,
        id=np.array(list(scores), dtype=str),
        part=np.array([parts[key] for key in scores], dtype=str),
        frames=np.array([frames[key] for key in scores], dtype=np.int64),
        target=np.array([score.target for score in values], dtype=np.int64),
        guess=np.array([score.guess for score in values], dtype=np.int64),
        loss=np.array([score.loss for score in values], dtype=np.float32),
        confidence=np.array([s.confidence for s in values], dtype=np.float32),
        embedding=np.array([score.embedding for score in values]),
    )
    save_atomically(content.getvalue(), Path(path))


def load_evaluation(
    path: str | Path,
) -> tuple[dict[str, Score], dict[str, str]]:
    """What :func:`save_evaluation` wrote, without the embeddings.

    Arguments
    ---------
    path : str or pathlib.Path
        The .npz file.

    Returns
    -------
    tuple of dict
        Scores by utterance id, and what each was evaluated as.

    Raises
    ------
    UserError
        If the file is damaged.
    """
    keys = ("guess", "target", "loss", "confidence")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, parts, *columns = (
                arrays[key].tolist() for key in ("id", "part", *keys)
            )
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(
            f"{path}: could not be read ({error}); train.py with --test_only "
            "writes it again."
        ) from None
    scores = map(Score, *columns)
    return (
        dict(zip(ids, scores, strict=True)),
        dict(zip(ids, parts, strict=True)),
    )
