"""Embeddings of utterances of any length: whole, or by windows.

How many frames fit into memory depends on model, precision and device, so it
isn't guessed: a batch that doesn't fit halves the frame budget for good and
is tried again. No result depends on the budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from spkid.data.batches import LengthBatches
from spkid.errors import UserError
from spkid.models.masks import relative_lengths, valid_mask

logger = logging.getLogger(__name__)

EVALUATIONS = ("whole", "windows")


def window_starts(length: int, frames: int, hop: int) -> list[int]:
    """First frames of the windows of an utterance, the last at its end.

    Arguments
    ---------
    length : int
        Frames of the utterance.
    frames : int
        Frames of a window; a shorter utterance is one window.
    hop : int
        Frames from one window to the next at most; they are spread evenly.

    Returns
    -------
    list of int

    Example
    -------
    >>> window_starts(900, frames=400, hop=200)
    [0, 167, 333, 500]
    >>> window_starts(300, frames=400, hop=200)
    [0]
    """
    last = max(length - frames, 0)
    count = -(-last // hop) + 1
    return np.linspace(0, last, count).round().astype(int).tolist()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or a CPU.

    Arguments
    ---------
    error : Exception
        What a forward pass raised.

    Returns
    -------
    bool

    Example
    -------
    >>> is_out_of_memory(RuntimeError("the shapes don't match"))
    False
    """
    said = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in said
    )


def mean_embeddings(
    embeddings: torch.Tensor, owner: torch.Tensor, count: int
) -> torch.Tensor:
    """One embedding of each utterance from those of its parts: their mean
    direction, and their mean norm, which some classifiers look at, too.

    Arguments
    ---------
    embeddings : torch.Tensor [parts, size]
        Of the parts.
    owner : torch.Tensor [parts]
        The utterance of each part, from 0.
    count : int
        Number of utterances; each has a part.

    Returns
    -------
    torch.Tensor [count, size]

    Example
    -------
    >>> parts = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    >>> mean_embeddings(parts, torch.tensor([0, 0, 1]), 2)
    tensor([[1.4142, 1.4142],
            [3.0000, 0.0000]])
    """
    embeddings = embeddings.float()
    own = owner == torch.arange(count, device=owner.device).unsqueeze(1)
    own = own.float() / own.sum(dim=1, keepdim=True)
    direction = F.normalize(own @ F.normalize(embeddings, dim=1), dim=1)
    return direction * (own @ embeddings.norm(dim=1, keepdim=True))


class UtteranceEmbedder:
    """Embeds utterances of any length within a budget of frames.

    The embedding of several windows has the direction of the mean of their
    unit vectors, since a window's norm says nothing of who speaks, and the
    mean of their norms, for classifiers that aren't cosines; so one window's
    is its own. An utterance that doesn't fit into memory alone goes by
    windows.

    Arguments
    ---------
    embedding_model : callable
        Maps (features, relative lengths or None) to [batch, 1, size].
    max_frames : int
        Padded frames of a forward pass; halved when memory runs out.
    equal : bool
        Only parts of one length share a pass: for encoders that aren't exact
        under padding.
    evaluation : str
        "whole" or "windows".
    window_frames, window_hop : int
        As in :func:`window_starts`.

    Example
    -------
    >>> mean = lambda x, relative: x.mean(dim=1, keepdim=True)
    >>> embed = UtteranceEmbedder(mean, 1000, True, "windows", 4, 2)
    >>> embed(torch.ones(2, 9, 3), torch.tensor([9, 5])).shape
    torch.Size([2, 1, 3])
    """

    def __init__(
        self,
        embedding_model: Callable,
        max_frames: int,
        equal: bool = False,
        evaluation: str = "whole",
        window_frames: int = 400,
        window_hop: int = 200,
    ) -> None:
        if evaluation not in EVALUATIONS:
            raise UserError(
                f"evaluation={evaluation!r} is none of "
                f"{', '.join(EVALUATIONS)}."
            )
        if not 0 < window_hop <= window_frames:
            raise UserError(
                f"window_hop={window_hop} must be at least 1 and at most "
                f"window_frames={window_frames}, or frames would be left out."
            )
        self.embedding_model, self.max_frames = embedding_model, max_frames
        self.equal, self.evaluation = equal, evaluation
        self.window_frames, self.window_hop = window_frames, window_hop

    def __call__(
        self, features: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeds a padded batch.

        Arguments
        ---------
        features : torch.Tensor [batch, frames, bands]
            Normalised features.
        lengths : torch.Tensor [batch], optional
            Frames of each utterance, integers; None: nothing is padded.

        Returns
        -------
        torch.Tensor [batch, 1, size]

        Raises
        ------
        UserError
            If not even one window fits into memory.
        """
        batch, frames, _ = features.shape
        lengths = [frames] * batch if lengths is None else lengths.tolist()
        parts = [(row, 0, length) for row, length in enumerate(lengths)]
        if self.evaluation == "windows":
            parts = [window for part in parts for window in self._cut(part)]
        rows, embeddings = [], []
        while parts:
            counts = [count for _, _, count in parts]
            group = LengthBatches(counts, self.max_frames, self.equal).batches[
                0
            ]
            chosen = [parts[i] for i in group]
            done = self._try(features, chosen)
            if done is None:
                self._shrink(parts, chosen)
                continue
            embeddings.append(done)
            rows += [row for row, _, _ in chosen]
            parts = [p for i, p in enumerate(parts) if i not in set(group)]
        rows = torch.tensor(rows, device=features.device)
        embeddings = torch.cat(embeddings)
        if len(rows) == batch:
            return embeddings[rows.argsort()].unsqueeze(1)
        return mean_embeddings(embeddings, rows, batch).unsqueeze(1)

    def _cut(self, part):
        """The windows of a part (row, first frame, frames)."""
        row, _, length = part
        frames = min(length, self.window_frames)
        starts = window_starts(length, self.window_frames, self.window_hop)
        return [(row, start, frames) for start in starts]

    def _try(self, features, parts):
        """Embeddings [parts, size]; None if memory runs out."""
        try:
            return self._embed(features, parts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Only here, where the failed pass is no longer held by its error.
        if features.is_cuda:
            torch.cuda.empty_cache()
        return None

    def _embed(self, features, parts):
        lengths = [count for _, _, count in parts]
        longest = max(lengths)
        as_loaded = [(row, 0) for row in range(len(features))]
        rows, starts, counts = torch.tensor(parts, device=features.device).T
        if [part[:2] for part in parts] == as_loaded:
            x = features[:, :longest]
        else:
            index = starts[:, None] + torch.arange(longest, device=rows.device)
            index.clamp_(max=features.shape[1] - 1)
            x = features[rows[:, None], index]
            x = x.masked_fill(~valid_mask(counts, longest)[..., None], 0.0)
        if min(lengths) == longest:
            return self.embedding_model(x, None).squeeze(1)
        relative = relative_lengths(counts, longest)
        return self.embedding_model(x, relative).squeeze(1)

    def _shrink(self, parts, failed):
        """Halves the budget, and cuts what is too long even alone."""
        longest = max(count for _, _, count in failed)
        size = longest * len(failed)
        if size <= self.max_frames:
            self.max_frames = max(1, size // 2)
            logger.warning(
                "%d frames at once are too many for the memory; from now on "
                "at most %d (max_frames_per_batch).",
                size,
                self.max_frames,
            )
        if len(failed) > 1:
            return
        if longest <= self.window_frames:
            raise UserError(
                f"Not even {longest} frames fit into memory: lower "
                "--window_frames, or free memory, or give --device cpu."
            )
        logger.warning(
            "An utterance of %d frames is too long for the memory; it is "
            "embedded by windows.",
            longest,
        )
        parts.remove(failed[0])
        parts.extend(self._cut(failed[0]))
