"""Embeddings of utterances of any length: whole, or by windows.

The number of frames that fit into memory depends on model, precision and
device. A batch that doesn't fit halves the frame budget from then on and is
tried again. No result depends on the budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from spkid.data.batches import LengthBatches
from spkid.errors import UserError, one_of
from spkid.models.masks import relative_lengths, valid_mask

logger = logging.getLogger(__name__)

EVALUATIONS = ("whole", "windows")


def window_starts(length: int, frames: int, hop: int) -> list[int]:
    """First frames of an utterance's windows, which cover all of it.

    Arguments
    ---------
    length : int
        Frames of the utterance.
    frames : int
        Frames of a window; a shorter utterance is one window.
    hop : int
        At most this many frames from one window to the next; the windows are
        spread evenly.

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
        Of a forward pass.

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
    """Embeds each utterance by the mean of its parts.

    Unit vectors and norms are averaged separately; a single part keeps its
    embedding. A norm says nothing of who speaks, but classifiers that aren't
    cosines use it.

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

    Windows are averaged by :func:`mean_embeddings`. An utterance that doesn't
    fit into memory alone is embedded by windows.

    Arguments
    ---------
    embedding_model : callable
        Maps (features, relative lengths or None) to [batch, 1, size].
    max_frames : int
        Padded frames of a forward pass; halved when memory runs out.
    equal : bool
        Only parts of the same length share a pass: for encoders that aren't
        exact under padding.
    evaluation : str
        "whole" or "windows".
    window_frames, window_hop : int
        As in :func:`window_starts`.

    Raises
    ------
    UserError
        If ``evaluation`` is neither, or windows would leave out frames.

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
        one_of(evaluation, EVALUATIONS, "evaluation")
        if not 0 < window_hop <= window_frames:
            raise UserError(
                f"window_hop={window_hop} must be at least 1 and at most "
                f"window_frames={window_frames}; otherwise frames are left out."
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
        TypeError
            If the lengths aren't integers.
        UserError
            If not even one window fits into memory.
        """
        batch, frames, _ = features.shape
        if lengths is not None:
            valid_mask(lengths, frames)  # refuses relative lengths
        counts = [frames] * batch if lengths is None else lengths.tolist()
        parts = [(row, 0, count) for row, count in enumerate(counts)]
        if self.evaluation == "windows":
            parts = [window for part in parts for window in self._cut(part)]
        rows: list[int] = []
        embeddings = []
        while parts:
            counts = [count for _, _, count in parts]
            batches = LengthBatches(counts, self.max_frames, self.equal)
            group = batches.batches[0]
            chosen = [parts[i] for i in group]
            done = self._try(features, chosen)
            if done is None:
                self._shrink(parts, chosen)
                continue
            embeddings.append(done)
            rows += [row for row, _, _ in chosen]
            parts = [p for i, p in enumerate(parts) if i not in set(group)]
        owner = torch.tensor(rows, device=features.device)
        found = torch.cat(embeddings)
        if len(rows) == batch:
            return found[owner.argsort()].unsqueeze(1)
        return mean_embeddings(found, owner, batch).unsqueeze(1)

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
        # Only here does no error hold the failed pass any more.
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
        relative = None  # no mask is needed
        if min(lengths) < longest:
            relative = relative_lengths(counts, longest)
        return self.embedding_model(x, relative).squeeze(1)

    def _shrink(self, parts, failed):
        """Halves the budget, and cuts what is too long even alone."""
        longest = max(count for _, _, count in failed)
        size = longest * len(failed)
        if size <= self.max_frames:
            self.max_frames = max(1, size // 2)
            logger.warning(
                "%d frames don't fit into memory; from now on at most %d are "
                "tried at once (max_frames_per_batch).",
                size,
                self.max_frames,
            )
        if len(failed) > 1:
            return
        if longest <= self.window_frames:
            raise UserError(
                f"Not even {longest} frames fit into memory: free some, give "
                "--device cpu, or start a run in another --output_folder with "
                f"--window_frames {-(-longest // 2)} --window_hop "
                f"{-(-longest // 4)}."
            )
        logger.warning(
            "An utterance of %d frames doesn't fit into memory; it is embedded "
            "by windows.",
            longest,
        )
        parts.remove(failed[0])
        parts.extend(self._cut(failed[0]))
