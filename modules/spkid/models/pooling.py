"""Poolings: from the frames of an utterance to one vector.

Each maps ([batch, frames, input_size], integer lengths or None) to
[batch, output_size]. Padding doesn't count. Value and gradient are finite on
one frame and on constant input. SpeechBrain's ``AttentiveStatisticsPooling``
isn't used because in training its batch normalisation counts padded frames,
and its ``StatisticsPooling`` because it adds noise in evaluation and gives
NaN on one frame.
"""

from __future__ import annotations

import torch
from torch import nn

from spkid.models.layers import Linear
from spkid.models.masks import masked_mean, masked_softmax

VARIANCE_FLOOR = 1e-5


class MeanPooling(nn.Module):
    """Mean over time, the pooling of the course's sample model.

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
        """Maps [batch, frames, input_size] to [batch, output_size]."""
        return masked_mean(x, lengths)


class FirstFramePooling(nn.Module):
    """Takes the first frame, as BERT its first token (Devlin et al., 2019).

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
        """Maps [batch, frames, input_size] to [batch, output_size]."""
        return x[:, 0]


class SelfAttentivePooling(nn.Module):
    """Mean weighted by a learned score of each frame (Safari et al., 2020).

    Arguments
    ---------
    input_size : int
        Features of a frame.
    n_heads : int
        Above 1, each head weighs its own part of the features (India et
        al., 2019).

    Example
    -------
    >>> SelfAttentivePooling(4, n_heads=2)(torch.ones(2, 5, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, input_size: int, n_heads: int = 1) -> None:
        super().__init__()
        if input_size % n_heads:
            raise ValueError(f"n_heads={n_heads} must divide {input_size=}.")
        # A bias, the same for all frames, would cancel in the softmax. Each
        # head scores the whole frame, not only its part as in the paper.
        self.score = Linear(input_size, n_heads, bias=False)
        self.output_size = input_size

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps [batch, frames, input_size] to [batch, output_size]."""
        weights = masked_softmax(self.score(x), lengths)
        parts = x.unflatten(-1, (weights.shape[-1], -1))  # one for each head
        return (weights.unsqueeze(-1) * parts).sum(dim=1).flatten(1)


class AttentiveStatisticsPooling(nn.Module):
    """Weighted mean and standard deviation (Okabe et al., 2018).

    Each feature has its own weights over time. With ``global_context``, the
    score of a frame also sees the mean and deviation of the utterance
    (ECAPA-TDNN, Desplanques et al., 2020).

    Arguments
    ---------
    input_size : int
        Features of a frame.
    attention_size : int
        Width of the layer that scores.
    global_context : bool
        Whether scores see the utterance's statistics.

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
        # The statistics' share of the hidden layer is the same at each frame,
        # so it is computed once an utterance.
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
        """Maps [batch, frames, input_size] to [batch, output_size]."""
        hidden = self.hidden(x)
        if self.context is not None:
            even = masked_softmax(x.new_zeros(*x.shape[:2], 1), lengths)
            statistics = self._statistics(x, even.to(x.dtype))
            hidden = hidden + self.context(statistics).unsqueeze(1)
        weights = masked_softmax(self.score(hidden.tanh()), lengths)
        return self._statistics(x, weights)

    @staticmethod
    def _statistics(x, weights):
        """Mean and deviation [batch, 2 * features] under the weights."""
        mean = (weights * x).sum(dim=1)
        square = (weights * (x - mean.unsqueeze(1)).square()).sum(dim=1)
        # The root's slope is infinite at 0.
        deviation = square.clamp(min=VARIANCE_FLOOR).sqrt()
        return torch.cat((mean, deviation), dim=-1)
