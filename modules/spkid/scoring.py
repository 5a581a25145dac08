"""From the scores of utterances to figures."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Score(NamedTuple):
    """What a model said of one utterance."""

    guess: int  # class index
    target: int  # class index; -1 where it is unknown
    loss: float  # negative log-posterior of the target


def score_batch(
    ids: list[str], log_posteriors: torch.Tensor, targets: torch.Tensor
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
    guesses = log_posteriors.argmax(dim=1)
    rows = zip(guesses.tolist(), targets.tolist(), losses.tolist(), strict=True)
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
    >>> gather_scores({"a": Score(0, 0, 0.1)})
    {'a': Score(guess=0, target=0, loss=0.1)}
    """
    if not torch.distributed.is_initialized():
        return scores
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, scores)
    return {key: Score(*row) for part in parts for key, row in part.items()}


def summarize(scores: dict[str, Score]) -> dict[str, float | None]:
    """Accuracy and mean loss over the utterances whose speaker is known.

    Arguments
    ---------
    scores : dict
        Scores by utterance id.

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
    right = sum(score.guess == score.target for score in known)
    return {
        "accuracy": right / len(known),
        "loss": sum(score.loss for score in known) / len(known),
    }
