"""Conformer encoder (Gulati et al., 2020), exact under padding.

Wherever frames mix (attention, convolution, batch statistics, subsampling),
padding is masked out, so an utterance's output doesn't depend on what shares
its batch. Every module maps [batch, frames, features] to the same.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from spkid.models.attention import SelfAttentionModule, rotary_angles
from spkid.models.layers import Dropout, Linear, MaskedBatchNorm
from spkid.models.masks import valid_mask

CONV_NORMS = ("layer", "batch")


class FeedForwardModule(nn.Module):
    """Pre-norm feed-forward module with Swish (Gulati et al., 2020, 2.3).

    Arguments
    ---------
    d_model : int
        Width of the model.
    d_ff : int
        Width of the hidden layer.
    dropout : float
        Dropout after the activation and at the end.

    Example
    -------
    >>> FeedForwardModule(8, 32)(torch.rand(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.expand = Linear(d_model, d_ff)
        self.project = Linear(d_ff, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, frames, d_model] to the same shape."""
        hidden = self.dropout(F.silu(self.expand(self.norm(x))))
        return self.dropout(self.project(hidden))


class ConvolutionModule(nn.Module):
    """Convolution module (Gulati et al., 2020, 2.2).

    Padding is zeroed between the gated linear unit and the depthwise
    convolution, which would otherwise mix it with its neighbours.

    Arguments
    ---------
    d_model : int
        Width of the model.
    kernel_size : int
        Frames of the depthwise convolution, odd.
    norm : str
        After the convolution: "layer", or "batch" (as in the paper) over
        the valid frames.
    dropout : float
        Dropout at the end.

    Example
    -------
    >>> ConvolutionModule(24, kernel_size=5)(torch.rand(2, 7, 24)).shape
    torch.Size([2, 7, 24])
    """

    def __init__(
        self,
        d_model: int,
        kernel_size: int = 15,
        norm: str = "layer",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size} must be odd, so that a frame sees "
                "as many frames before it as after it."
            )
        if d_model <= 16:
            raise ValueError(
                f"d_model={d_model} must exceed 16: with fewer channels the "
                "bfloat16 depthwise convolution hangs on a CPU."
            )
        if norm not in CONV_NORMS:
            raise ValueError(f"conv_norm must be layer or batch, not {norm!r}.")
        self.norm = nn.LayerNorm(d_model)
        self.gate = Linear(d_model, 2 * d_model)
        self.depthwise = nn.Conv2d(
            d_model,
            d_model,
            (1, kernel_size),
            padding=(0, kernel_size // 2),
            groups=d_model,
        )
        self.conv_norm = (
            MaskedBatchNorm(d_model)
            if norm == "batch"
            else nn.LayerNorm(d_model)
        )
        self.project = Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps [batch, frames, d_model] to the same shape.

        ``valid`` [batch, frames] is True on the utterances' own frames; None:
        nothing is padded.
        """
        x = F.glu(self.gate(self.norm(x)))
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        # A picture of height 1 in channels-last order is the layout that x
        # has already. On a CPU, Conv1d reorders it and takes 7 times as long.
        x = x.transpose(1, 2).unsqueeze(2)
        if x.is_cpu and torch.is_autocast_enabled("cpu"):
            # float32 is as fast, and oneDNN has been seen to hang while it
            # generated the bfloat16 kernel.
            with torch.autocast("cpu", enabled=False):
                x = self.depthwise(x.float())
        else:
            x = self.depthwise(x)
        x = x.squeeze(2).transpose(1, 2)
        if isinstance(self.conv_norm, MaskedBatchNorm):
            x = self.conv_norm(x, valid)
        else:
            x = self.conv_norm(x)
        return self.dropout(self.project(F.silu(x)))


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm.

    Arguments
    ---------
    d_model, n_heads, d_ff, kernel_size : int
        Sizes, as for the modules above.
    position, window, conv_norm, dropout, attention_dropout
        As for :class:`SelfAttentionModule` and :class:`ConvolutionModule`.
    drop_path : float
        Probability of skipping the whole block for an utterance in training
        (stochastic depth, Huang et al., 2016).

    Example
    -------
    >>> block = ConformerBlock(24, n_heads=2, d_ff=48, kernel_size=5)
    >>> block(torch.rand(2, 7, 24)).shape
    torch.Size([2, 7, 24])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        kernel_size: int = 15,
        position: str = "rope",
        window: int | None = None,
        conv_norm: str = "layer",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.first_feed_forward = FeedForwardModule(d_model, d_ff, dropout)
        self.attention = SelfAttentionModule(
            d_model, n_heads, position, window, dropout, attention_dropout
        )
        self.convolution = ConvolutionModule(
            d_model, kernel_size, conv_norm, dropout
        )
        self.second_feed_forward = FeedForwardModule(d_model, d_ff, dropout)
        self.norm = nn.LayerNorm(d_model)
        self.drop_path = drop_path

    def forward(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None = None,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Maps [batch, frames, d_model] to the same shape."""
        entry = x
        x = torch.add(x, self.first_feed_forward(x), alpha=0.5)
        x = x + self.attention(x, valid, angles)
        x = x + self.convolution(x, valid)
        x = torch.add(x, self.second_feed_forward(x), alpha=0.5)
        x = self.norm(x)
        if self.training and self.drop_path > 0:
            # 0 or 1 / (1 - p) for each utterance.
            keep = F.dropout(x.new_ones(len(x), 1, 1), self.drop_path)
            x = entry + keep * (x - entry)
        return x


class Subsampling(nn.Module):
    """Halves the frame rate once or twice by strided 3 x 3 convolutions.

    Each halving leaves ``ceil(frames / 2)`` frames. Padding is zeroed before
    each convolution, so it equals the zeros that the convolution itself adds.

    Arguments
    ---------
    input_size : int
        Features of a frame.
    output_size : int
        Width of the output.
    factor : int
        2 or 4.

    Example
    -------
    >>> x, lengths = torch.rand(2, 9, 40), torch.tensor([5, 9])
    >>> y, shorter = Subsampling(40, 16, factor=4)(x, lengths)
    >>> y.shape, shorter
    (torch.Size([2, 3, 16]), tensor([2, 3]))
    """

    def __init__(
        self, input_size: int, output_size: int, factor: int = 2
    ) -> None:
        super().__init__()
        channels = (1, 32) if factor == 2 else (1, 32, 32)
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            for inputs, outputs in itertools.pairwise(channels)
        )
        rest = math.ceil(input_size / factor)  # of the bands
        self.project = Linear(channels[-1] * rest, output_size)

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps [batch, frames, input_size] to [batch, fewer, output_size].

        ``lengths`` (integers, or None where nothing is padded) are returned
        in frames of the new rate.
        """
        x = x.unsqueeze(1)
        for conv in self.convs:
            if lengths is not None:
                valid = valid_mask(lengths, x.shape[2])
                x = x.masked_fill(~valid[:, None, :, None], 0.0)
                lengths = (lengths + 1) // 2
            x = F.silu(conv(x))
        return self.project(x.transpose(1, 2).flatten(2)), lengths


class ConformerEncoder(nn.Module):
    """Prenet and a stack of Conformer blocks.

    Arguments
    ---------
    input_size : int
        Features of a frame (mel bands).
    d_model : int
        Width of the model.
    n_layers : int
        Number of blocks.
    n_heads : int
        Attention heads of ``d_model / n_heads`` features each.
    d_ff : int
        Width of the feed-forward modules.
    kernel_size : int
        Frames of the depthwise convolution, odd.
    dropout : float
        Dropout inside the modules.
    position : str
        "none", "rope" (Su et al., 2021) or "relative" (Dai et al., 2019).
    window : int, optional
        Each frame sees this many frames to either side; None: all.
    conv_norm : str
        "layer", or "batch" over the valid frames.
    subsampling : int
        1: a linear prenet; 2 or 4: :class:`Subsampling`.
    drop_path : float
        Stochastic depth (Huang et al., 2016): the probability of skipping
        the last block; it grows linearly over the blocks.
    aggregate : bool
        Concatenates the outputs of all blocks and normalises them
        (multi-layer feature aggregation, MFA-Conformer, Zhang et al., 2022).
    attention_dropout : float
        Dropout of attention weights.

    Example
    -------
    >>> encoder = ConformerEncoder(40, d_model=24, n_layers=2, n_heads=2,
    ...                            d_ff=48, subsampling=2, aggregate=True)
    >>> x, lengths = encoder(torch.rand(2, 9, 40), torch.tensor([4, 9]))
    >>> x.shape, lengths, encoder.output_size
    (torch.Size([2, 5, 48]), tensor([2, 5]), 48)
    """

    def __init__(
        self,
        input_size: int = 40,
        d_model: int = 256,
        n_layers: int = 4,
        n_heads: int = 4,
        d_ff: int = 1024,
        kernel_size: int = 15,
        dropout: float = 0.1,
        position: str = "rope",
        window: int | None = None,
        conv_norm: str = "layer",
        subsampling: int = 1,
        drop_path: float = 0.0,
        aggregate: bool = False,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if subsampling not in (1, 2, 4):
            raise ValueError(
                f"subsampling must be 1, 2 or 4, not {subsampling}."
            )
        self.prenet = (
            Linear(input_size, d_model)
            if subsampling == 1
            else Subsampling(input_size, d_model, subsampling)
        )
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            ConformerBlock(
                d_model,
                n_heads,
                d_ff,
                kernel_size,
                position,
                window,
                conv_norm,
                dropout,
                attention_dropout,
                drop_path * (layer + 1) / n_layers,
            )
            for layer in range(n_layers)
        )
        self.rotary_size = d_model // n_heads if position == "rope" else None
        self.output_size = d_model * (n_layers if aggregate else 1)
        # A single block's output is normalised already.
        self.norm = nn.LayerNorm(self.output_size) if aggregate else None

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes a padded batch.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, input_size]
            Features; the padding may hold anything.
        lengths : torch.Tensor [batch], optional
            Frames of each utterance, integers; None: nothing is padded.

        Returns
        -------
        tuple
            The encoding [batch, frames', output_size], and the lengths in
            frames' (None as given).
        """
        if isinstance(self.prenet, Subsampling):
            x, lengths = self.prenet(x, lengths)
        else:
            x = self.prenet(x)
        valid = None
        if lengths is not None:
            valid = valid_mask(lengths, x.shape[1])
            # Whatever the padding held, infinities included, ends here.
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        x = self.dropout(x)
        angles = None
        if self.rotary_size is not None:
            angles = rotary_angles(x.shape[1], self.rotary_size, like=x)
        outputs = []
        for block in self.blocks:
            x = block(x, valid, angles)
            outputs.append(x)
        if self.norm is not None:
            x = self.norm(torch.cat(outputs, dim=-1))
        return x, lengths
