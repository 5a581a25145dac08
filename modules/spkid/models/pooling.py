"""From the frames of an utterance to one vector, padding left out.

Each pooling takes ([batch, frames, input_size], integer lengths or None) and
gives [batch, output_size]. All are finite, in value and in gradient, on one
frame and on constant input. SpeechBrain's ``AttentiveStatisticsPooling`` isn't
used because its batch normalisation counts padded frames while training, and
its ``StatisticsPooling`` because it adds noise in evaluation and gives NaN on
one frame.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from spkid.models.layers import Linear
from spkid.models.masks import valid_mask

VARIANCE_FLOOR = 1e-5


def masked_mean(
    x: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over the valid frames.

    Arguments
    ---------
    x : torch.Tensor [batch, frames, features]
        Input.
    lengths : torch.Tensor [batch], optional
        Frames of each utterance, integers; None: nothing is padded.

    Returns
    -------
    torch.Tensor [batch, features]

    Example
    -------
    >>> x = torch.tensor([[[1.0], [3.0], [99.0]]])
    >>> masked_mean(x, torch.tensor([2]))
    tensor([[2.]])
    """
    if lengths is None:
        return x.mean(dim=1)
    valid = valid_mask(lengths, x.shape[1]).unsqueeze(-1)
    total = x.masked_fill(~valid, 0.0).sum(dim=1)
    return total / lengths.unsqueeze(1).to(x.dtype)


def masked_softmax(
    scores: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax over the valid frames; padding gets exactly 0.

    Arguments
    ---------
    scores : torch.Tensor [batch, frames, heads]
        Unnormalised weights.
    lengths : torch.Tensor [batch], optional
        Frames of each utterance, integers; None: nothing is padded.

    Returns
    -------
    torch.Tensor [batch, frames, heads]

    Example
    -------
    >>> masked_softmax(torch.zeros(1, 3, 1), torch.tensor([2])).flatten()
    tensor([0.5000, 0.5000, 0.0000])
    """
    if lengths is not None:
        valid = valid_mask(lengths, scores.shape[1]).unsqueeze(-1)
        scores = scores.masked_fill(~valid, -math.inf)
    return scores.softmax(dim=1)


def weighted_sum(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums frames by weight; a frame of weight 0 may hold anything finite.

    Arguments
    ---------
    weights : torch.Tensor [batch, frames, heads]
        Weights, one column for each head.
    x : torch.Tensor [batch, frames, features]
        Input; head h weighs the h-th of ``heads`` equal parts of its features.

    Returns
    -------
    torch.Tensor [batch, features]

    Example
    -------
    >>> weighted_sum(torch.full((1, 2, 1), 0.5), torch.ones(1, 2, 3))
    tensor([[1., 1., 1.]])
    """
    parts = x.unflatten(-1, (weights.shape[-1], -1))
    return (weights.unsqueeze(-1) * parts).sum(dim=1).flatten(1)


class MeanPooling(nn.Module):
    """Mean over time: the course's pooling.

    Arguments
    ---------
    input_size : int
        Features of a frame.

    Example
    -------
    >>> MeanPooling(3)(torch.ones(2, 5, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.output_size = input_size

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[batch, frames, input_size] to [batch, output_size]."""
        return masked_mean(x, lengths)


class FirstFramePooling(nn.Module):
    """The first frame, as BERT reads its first token (Devlin et al., 2019).

    Arguments
    ---------
    input_size : int
        Features of a frame.

    Example
    -------
    >>> FirstFramePooling(3)(torch.ones(2, 5, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.output_size = input_size

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[batch, frames, input_size] to [batch, output_size]."""
        return x[:, 0]


class SelfAttentivePooling(nn.Module):
    """Mean weighted by a learned score of each frame (Safari et al., 2020).

    Arguments
    ---------
    input_size : int
        Features of a frame.
    n_heads : int
        1: "Self-attention encoding and pooling for speaker recognition".
        More: each head weighs its own part of the features ("Self
        multi-head attention for speaker recognition", India et al., 2019).

    Example
    -------
    >>> SelfAttentivePooling(4, n_heads=2)(torch.ones(2, 5, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, input_size: int, n_heads: int = 1) -> None:
        super().__init__()
        if input_size % n_heads:
            raise ValueError(
                f"n_heads={n_heads} does not divide input_size={input_size}."
            )
        # One bias for all frames would cancel in the softmax. A head scores
        # the whole frame: a superset of India et al.'s per-part query.
        self.score = Linear(input_size, n_heads, bias=False)
        self.output_size = input_size

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[batch, frames, input_size] to [batch, output_size]."""
        return weighted_sum(masked_softmax(self.score(x), lengths), x)


class AttentiveStatisticsPooling(nn.Module):
    """Weighted mean and standard deviation (Okabe et al., 2018).

    Each feature has its own weights over time and, with ``global_context``,
    the score sees the utterance's mean and deviation beside the frame
    (ECAPA-TDNN, Desplanques et al., 2020).

    Arguments
    ---------
    input_size : int
        Features of a frame.
    attention_size : int
        Width of the layer that scores.
    global_context : bool
        Whether the score sees the whole utterance's statistics.

    Example
    -------
    >>> AttentiveStatisticsPooling(4)(torch.rand(2, 5, 4)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        input_size: int,
        attention_size: int = 128,
        global_context: bool = True,
    ) -> None:
        super().__init__()
        self.hidden = Linear(input_size, attention_size)
        # Statistics are the same at each frame, so their share of the hidden
        # layer is computed once an utterance, not once a frame.
        self.context = (
            Linear(2 * input_size, attention_size, bias=False)
            if global_context
            else None
        )
        self.score = Linear(attention_size, input_size, bias=False)
        self.output_size = 2 * input_size

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[batch, frames, input_size] to [batch, output_size]."""
        hidden = self.hidden(x)
        if self.context is not None:
            if lengths is None:
                weights = x.new_full(x.shape[:2], 1 / x.shape[1])
            else:
                weights = valid_mask(lengths, x.shape[1]).to(x.dtype)
                weights = weights / lengths.unsqueeze(1).to(x.dtype)
            statistics = self._statistics(x, weights.unsqueeze(-1))
            hidden = hidden + self.context(statistics).unsqueeze(1)
        weights = masked_softmax(self.score(hidden.tanh()), lengths)
        return self._statistics(x, weights)

    @staticmethod
    def _statistics(x, weights):
        """Mean and deviation [batch, 2 * features] under the weights."""
        mean = (weights * x).sum(dim=1)
        square = (weights * (x - mean.unsqueeze(1)).square()).sum(dim=1)
        # The root's slope is infinite at 0, hence the floor.
        deviation = square.clamp(min=VARIANCE_FLOOR).sqrt()
        return torch.cat((mean, deviation), dim=-1)
