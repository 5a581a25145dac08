"""Conformer encoder, exact under padding.

"Conformer: Convolution-augmented Transformer for Speech Recognition"
(Gulati et al., 2020), with the options that speaker work uses. Every module
takes and gives [batch, frames, features]. Wherever frames mix (attention,
convolution, batch statistics, subsampling), padding is masked out, so that an
utterance's output does not depend on what shares its batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from spkid.models.layers import Dropout, Linear, MaskedBatchNorm
from spkid.models.masks import valid_mask

POSITIONS = ("none", "rope", "relative")
CONV_NORMS = ("layer", "batch")
# Queries are attended to in blocks of this many frames where a bias of
# frames x frames (relative positions, windows) would otherwise be built.
QUERY_BLOCK = 512
# In bfloat16 on a CPU, training crops up to this don't use the fused kernel.
SHORT_FRAMES = 256


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


def rotary_angles(
    n_frames: int, head_size: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary position embedding (Su et al., 2021).

    Arguments
    ---------
    n_frames : int
        Positions 0 ... n_frames - 1.
    head_size : int
        Features of one attention head, even.
    like : torch.Tensor
        Gives the device and, from float32 upwards, the precision.

    Returns
    -------
    tuple of torch.Tensor [n_frames, 1, head_size / 2]
        Cosines and sines.

    Example
    -------
    >>> cos, sin = rotary_angles(3, 4, like=torch.zeros(1))
    >>> cos.shape
    torch.Size([3, 1, 2])
    """
    half = head_size // 2
    # Half precision cannot count to a thousand frames.
    kind = {
        "device": like.device,
        "dtype": torch.promote_types(like.dtype, torch.float32),
    }
    frequencies = 10000.0 ** (-torch.arange(half, **kind) / half)
    angles = torch.arange(n_frames, **kind)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(
    x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Rotates the feature pairs (i, i + half) of each frame by its angles.

    Arguments
    ---------
    x : torch.Tensor [..., frames, heads, head_size]
        Queries or keys.
    angles : tuple of torch.Tensor [frames, 1, head_size / 2]
        From :func:`rotary_angles`.

    Returns
    -------
    torch.Tensor [..., frames, heads, head_size]

    Example
    -------
    >>> x = torch.rand(3, 1, 4)
    >>> y = rotate(x, rotary_angles(3, 4, like=x))
    >>> torch.allclose(x.norm(dim=-1), y.norm(dim=-1))
    True
    """
    cos, sin = (a.to(x.dtype) for a in angles)
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * cos - second * sin, second * cos + first * sin), dim=-1
    )


def relative_shift(scores: torch.Tensor, n_keys: int) -> torch.Tensor:
    """Scores by distance become scores by key, without an index table.

    Arguments
    ---------
    scores : torch.Tensor [..., queries, queries + n_keys]
        Column c belongs to the distance ``last_query - first_key - c``, so
        distances fall from left to right (Dai et al., 2019, appendix B); the
        last column only makes the rows long enough to be shifted.
    n_keys : int
        Number of keys.

    Returns
    -------
    torch.Tensor [..., queries, n_keys]
        A view: entry (i, j) is column ``queries - 1 - i + j`` of row i.

    Example
    -------
    >>> relative_shift(torch.tensor([[1, 0, -1, -2], [1, 0, -1, -2]]), 2)
    tensor([[ 0, -1],
            [ 1,  0]])
    """
    n_queries, n_distances = scores.shape[-2:]
    flat = scores.flatten(-2)[..., n_queries - 1 :]
    rows = flat[..., : n_queries * (n_distances - 1)]
    return rows.unflatten(-1, (n_queries, n_distances - 1))[..., :n_keys]


class SelfAttentionModule(nn.Module):
    """Pre-norm multi-head self-attention (Gulati et al., 2020, 2.1).

    All variants end in ``scaled_dot_product_attention``; attention maps are
    never returned. No table of frames x frames x features is ever built, and
    the frames x frames bias of relative positions only for a block of
    queries, so in inference memory grows linearly with the frames.

    Arguments
    ---------
    d_model : int
        Width of the model.
    n_heads : int
        Number of heads; divides ``d_model``.
    position : str
        "none"; "rope": rotary (Su et al., 2021); "relative": sinusoidal
        relative positions of Transformer-XL (Dai et al., 2019), as in the
        Conformer paper.
    window : int, optional
        Each frame sees this many frames to either side (Longformer's sliding
        window, Beltagy et al., 2020). None: the whole utterance.
    dropout : float
        Dropout at the end.
    attention_dropout : float
        Dropout of attention weights. Above 0, training leaves the fused
        kernels on CPU, so the default is 0.

    Example
    -------
    >>> attention = SelfAttentionModule(8, n_heads=2, position="relative")
    >>> attention(torch.rand(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        position: str = "rope",
        window: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(
                f"n_heads={n_heads} does not divide d_model={d_model}."
            )
        if position not in POSITIONS:
            raise ValueError(
                f"position={position!r} is none of {', '.join(POSITIONS)}."
            )
        self.n_heads, self.head_size = n_heads, d_model // n_heads
        if position != "none" and self.head_size % 2:
            raise ValueError(
                f"position={position!r} needs heads of an even size, "
                f"not {self.head_size}."
            )
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1 frame.")
        self.position, self.window = position, window
        self.attention_dropout = attention_dropout
        self.norm = nn.LayerNorm(d_model)
        self.query_key_value = Linear(d_model, 3 * d_model)
        self.project = Linear(d_model, d_model)
        self.dropout = Dropout(dropout)
        if position == "relative":
            self.distance = Linear(d_model, d_model, bias=False)
            # Transformer-XL's u and v.
            self.content_bias = nn.Parameter(
                torch.zeros(n_heads, 1, self.head_size)
            )
            self.distance_bias = nn.Parameter(
                torch.zeros(n_heads, 1, self.head_size)
            )

    def forward(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None = None,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention over the valid frames.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, d_model]
            Input.
        valid : torch.Tensor [batch, frames], optional
            True on the utterances' own frames; None: no padding.
        angles : tuple of torch.Tensor, optional
            :func:`rotary_angles`, made here where it isn't shared.

        Returns
        -------
        torch.Tensor [batch, frames, d_model]
        """
        batch, frames, d_model = x.shape
        qkv = self.query_key_value(self.norm(x)).view(
            batch, frames, 3, self.n_heads, self.head_size
        )
        query_key, value = qkv[:, :, :2], qkv[:, :, 2]
        if self.position == "rope":
            if angles is None:
                angles = rotary_angles(frames, self.head_size, like=x)
            query_key = rotate(query_key, tuple(a.unsqueeze(1) for a in angles))
        query, key = query_key.unbind(2)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        mask = None if valid is None else valid[:, None, None, :]
        if self.position == "relative" or self.window is not None:
            heads = self._attend_in_blocks(query, key, value, mask)
        else:
            heads = self._attend(query, key, value, mask)
        merged = heads.transpose(1, 2).reshape(batch, frames, d_model)
        return self.dropout(self.project(merged))

    def _attend(self, query, key, value, mask):
        dropout = self.attention_dropout if self.training else 0.0
        if (
            self.training
            and query.is_cpu
            and query.dtype == torch.bfloat16
            and key.shape[2] <= SHORT_FRAMES
        ):
            return self._attend_in_full(query, key, value, mask, dropout)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout
        )

    def _attend_in_full(self, query, key, value, mask, dropout):
        """The same in plain products: on short crops in bfloat16, the fused
        CPU kernel's backward pass takes several times as long."""
        scores = (query * self.head_size**-0.5) @ key.transpose(-1, -2)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        elif mask is not None:
            scores = scores + mask
        return F.dropout(scores.softmax(dim=-1), dropout) @ value

    def _attend_in_blocks(self, query, key, value, mask):
        """Attention with a bias or a band, a block of queries at a time."""
        frames = query.shape[2]
        if torch.compiler.is_exporting():
            # One graph for any length cannot hold a loop over the length.
            starts = [0]
        else:
            starts = range(0, frames, QUERY_BLOCK)
        content = query
        if self.position == "relative":
            content = query + self.content_bias.to(query.dtype)
        blocks = []
        for start in starts:
            stop = frames
            if len(starts) > 1:
                stop = min(start + QUERY_BLOCK, frames)
            low, high = 0, frames
            if self.window is not None and len(starts) > 1:
                low = max(0, start - self.window)
                high = min(frames, stop + self.window)
            blocks.append(
                self._attend(
                    content[:, :, start:stop],
                    key[:, :, low:high],
                    value[:, :, low:high],
                    self._bias(query, mask, start, stop, low, high),
                )
            )
        return torch.cat(blocks, dim=2)

    def _bias(self, query, mask, start, stop, low, high):
        """What is added to the scores of queries start:stop, keys low:high."""
        seen = None if mask is None else mask[..., low:high]
        if self.window is not None:
            rows = torch.arange(start, stop, device=query.device)[:, None]
            columns = torch.arange(low, high, device=query.device)
            band = (rows - columns).abs() <= self.window
            # A padded query may see no key at all; it then sees itself, so
            # that no row is empty (its output is masked out later).
            seen = band if seen is None else (seen & band) | (rows == columns)
        if self.position != "relative":
            return seen
        distances = torch.arange(
            stop - 1 - low, start - high - 1, -1, device=query.device
        )
        table = self.distance(self._sinusoids(distances).to(query.dtype))
        table = table.view(-1, self.n_heads, self.head_size).transpose(0, 1)
        scores = (
            query[:, :, start:stop] + self.distance_bias.to(query.dtype)
        ) @ table.to(query.dtype).transpose(1, 2)
        bias = relative_shift(scores, high - low) / math.sqrt(self.head_size)
        if seen is None:
            return bias
        return bias.masked_fill(~seen, -math.inf)

    def _sinusoids(self, distances):
        """Vaswani et al. (2017), at signed distances."""
        half = self.n_heads * self.head_size // 2
        dtype = torch.promote_types(
            self.content_bias.dtype, torch.float32
        )  # angles stay exact when the model is in half precision
        exponents = torch.arange(half, device=distances.device, dtype=dtype)
        angles = distances[:, None] * 10000.0 ** (-exponents / half)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class ConvolutionModule(nn.Module):
    """Convolution module (Gulati et al., 2020, 2.2).

    Padding is zeroed between the gated linear unit and the depthwise
    convolution, where it would otherwise leak into its neighbours.

    Arguments
    ---------
    d_model : int
        Width of the model.
    kernel_size : int
        Frames of the depthwise convolution, odd.
    norm : str
        After the convolution: "layer", or "batch" (the paper's) over the
        valid frames.
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
                f"kernel_size={kernel_size} must be odd, so that a frame has "
                "as many neighbours before as behind it."
            )
        if d_model <= 16:
            raise ValueError(
                f"d_model={d_model} must exceed 16: on CPU the bfloat16 "
                "depthwise convolution of so few channels never returns."
            )
        if norm not in CONV_NORMS:
            raise ValueError(f"norm={norm!r} is none of {CONV_NORMS}.")
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

        Arguments
        ---------
        x : torch.Tensor [batch, frames, d_model]
            Input.
        valid : torch.Tensor [batch, frames], optional
            True on the utterances' own frames; None: no padding.

        Returns
        -------
        torch.Tensor [batch, frames, d_model]
        """
        x = F.glu(self.gate(self.norm(x)))
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        # Seen as a picture of height 1 in channels-last order, the layout x
        # already has: on CPU 7 times faster than Conv1d, which reorders it.
        x = x.transpose(1, 2).unsqueeze(2)
        if x.is_cpu and torch.is_autocast_enabled("cpu"):
            # As fast in float32, and what generates oneDNN's bfloat16 kernel
            # has been seen to loop for ever.
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
        Sizes, as in the modules above.
    position, window, conv_norm, dropout, attention_dropout
        As in :class:`SelfAttentionModule` and :class:`ConvolutionModule`.
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

    Out come ``ceil(frames / 2)`` frames for each halving. Padding is zeroed
    before each convolution, as its own zero padding at an utterance's end is.

    Arguments
    ---------
    input_size : int
        Features of a frame.
    output_size : int
        Width of the output.
    factor : int
        2 or 4.
    channels : int
        Channels of the convolutions.

    Example
    -------
    >>> x, lengths = torch.rand(2, 9, 40), torch.tensor([5, 9])
    >>> y, shorter = Subsampling(40, 16, factor=4)(x, lengths)
    >>> y.shape, shorter
    (torch.Size([2, 3, 16]), tensor([2, 3]))
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        factor: int = 2,
        channels: int = 32,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        inputs = 1
        for _ in range(int(math.log2(factor))):
            self.convs.append(
                nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
            )
            inputs, input_size = channels, (input_size + 1) // 2
        self.project = Linear(channels * input_size, output_size)

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, frames, input_size] to [batch, fewer frames, output_size].

        ``lengths`` (integers, or None where nothing is padded) come back for
        the new frame rate.
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
        Attention sees this many frames to either side; None: all.
    conv_norm : str
        "layer", or "batch" over the valid frames.
    subsampling : int
        1: a linear prenet; 2 or 4: :class:`Subsampling`.
    drop_path : float
        Stochastic depth (Huang et al., 2016): skipping probability of the
        last block; it grows linearly over the blocks.
    aggregate : bool
        Concatenate the outputs of all blocks and normalise (multi-layer
        feature aggregation, MFA-Conformer, Zhang et al., 2022).
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
            raise ValueError(f"subsampling={subsampling} is none of 1, 2, 4.")
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
        self.aggregate = aggregate
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
            Features; what stands in the padding is of no consequence.
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
        attention = self.blocks[0].attention
        angles = None
        if attention.position == "rope":
            angles = rotary_angles(x.shape[1], attention.head_size, like=x)
        outputs = []
        for block in self.blocks:
            x = block(x, valid, angles)
            outputs.append(x)
        if self.aggregate:
            x = self.norm(torch.cat(outputs, dim=-1))
        return x, lengths
