"""Multi-head self-attention over the valid frames, for long utterances.

Attention maps are never returned, and no table of frames x frames x features
is built. The frames x frames bias of relative positions or of a window is
built for a block of queries at a time, so that in inference memory grows
linearly with the frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from spkid.models.layers import Dropout, Linear

POSITIONS = ("none", "rope", "relative")
QUERY_BLOCK = 512  # queries that share a bias
# In bfloat16 on a CPU, the fused kernel's backward pass takes several times
# as long as plain products up to this many frames.
SHORT_FRAMES = 256


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
        Gives the device, and the precision from float32 upwards.

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
    frames = torch.arange(n_frames, device=like.device, dtype=_exact(like))
    angles = frames[:, None, None] * _frequencies(head_size // 2, like)
    return angles.cos(), angles.sin()


def rotate(
    x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Rotates the feature pairs (i, i + half) of each frame by its angles.

    Arguments
    ---------
    x : torch.Tensor [..., frames, heads, head_size]
        Queries or keys; the result has the same shape.
    angles : tuple of torch.Tensor [frames, 1, head_size / 2]
        From :func:`rotary_angles`.

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
    """Turns scores by distance into scores by key, without an index table.

    Arguments
    ---------
    scores : torch.Tensor [..., queries, queries + n_keys]
        Column c holds the distance ``last_query - first_key - c``, so
        distances fall from left to right (Dai et al., 2019, appendix B). The
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

    Arguments
    ---------
    d_model : int
        Width of the model.
    n_heads : int
        Number of heads; divides ``d_model``.
    position : str
        "none"; "rope": rotary (Su et al., 2021); "relative": the sinusoidal
        relative positions of Transformer-XL (Dai et al., 2019), as in the
        Conformer paper.
    window : int, optional
        Each frame sees this many frames to either side (Longformer's sliding
        window, Beltagy et al., 2020). None: the whole utterance.
    dropout : float
        Dropout at the end.
    attention_dropout : float
        Dropout of attention weights. Above 0, training on a CPU can't use the
        fused kernels.

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
            raise ValueError(f"n_heads={n_heads} must divide {d_model=}.")
        if position not in POSITIONS:
            raise ValueError(
                f"position must be none, rope or relative, not {position!r}."
            )
        self.n_heads, self.head_size = n_heads, d_model // n_heads
        if position != "none" and self.head_size % 2:
            raise ValueError(
                f"position={position!r} needs heads of an even size, not "
                f"{self.head_size}; change d_model or n_heads."
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
        """Maps [batch, frames, d_model] to the same shape.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, d_model]
            Input.
        valid : torch.Tensor [batch, frames], optional
            True on the utterances' own frames; None: nothing is padded.
        angles : tuple of torch.Tensor, optional
            :func:`rotary_angles`, which blocks can share; None: made here.
        """
        batch, frames, d_model = x.shape
        qkv = self.query_key_value(self.norm(x)).view(
            batch, frames, 3, self.n_heads, self.head_size
        )
        query_key, value = qkv[:, :, :2], qkv[:, :, 2]
        if self.position == "rope":
            if angles is None:
                angles = rotary_angles(frames, self.head_size, like=x)
            cos, sin = angles
            query_key = rotate(query_key, (cos.unsqueeze(1), sin.unsqueeze(1)))
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
        """Attention of [batch, heads, frames, head_size].

        ``mask`` is True where a key is seen, or a bias of the scores.
        """
        plain = (
            self.training
            and query.is_cpu
            and query.dtype == torch.bfloat16
            and key.shape[2] <= SHORT_FRAMES
        )
        attend = _plain_attention if plain else F.scaled_dot_product_attention
        dropout = self.attention_dropout if self.training else 0.0
        return attend(query, key, value, attn_mask=mask, dropout_p=dropout)

    def _attend_in_blocks(self, query, key, value, mask):
        """The same with a bias or a window, a block of queries at a time."""
        frames = query.shape[2]
        blocks = [(0, frames)]
        # One exported graph for any length can't hold a loop over the length.
        if not torch.compiler.is_exporting():
            starts = range(0, frames, QUERY_BLOCK)
            blocks = [(i, min(i + QUERY_BLOCK, frames)) for i in starts]
        content = query
        if self.position == "relative":
            content = query + self.content_bias.to(query.dtype)
        heads = []
        for start, stop in blocks:
            low, high = 0, frames  # the keys that these queries can see
            if self.window is not None and len(blocks) > 1:
                low = max(0, start - self.window)
                high = min(frames, stop + self.window)
            heads.append(
                self._attend(
                    content[:, :, start:stop],
                    key[:, :, low:high],
                    value[:, :, low:high],
                    self._bias(query, mask, start, stop, low, high),
                )
            )
        return torch.cat(heads, dim=2)

    def _bias(self, query, mask, start, stop, low, high):
        """The mask or bias of queries start:stop and keys low:high."""
        seen = None if mask is None else mask[..., low:high]
        if self.window is not None:
            rows = torch.arange(start, stop, device=query.device)[:, None]
            columns = torch.arange(low, high, device=query.device)
            band = (rows - columns).abs() <= self.window
            # A padded query that sees no key sees itself, since an empty row
            # gives NaN. Its output is masked out later.
            seen = band if seen is None else (seen & band) | (rows == columns)
        if self.position != "relative":
            return seen
        distances = torch.arange(
            stop - 1 - low, start - high - 1, -1, device=query.device
        )
        half = self.n_heads * self.head_size // 2
        angles = distances[:, None] * _frequencies(half, self.content_bias)
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
        table = self.distance(waves.to(query.dtype)).to(query.dtype)
        table = table.view(-1, self.n_heads, self.head_size).transpose(0, 1)
        shifted = query[:, :, start:stop] + self.distance_bias.to(query.dtype)
        scores = shifted @ table.transpose(1, 2)
        bias = relative_shift(scores, high - low) / math.sqrt(self.head_size)
        return bias if seen is None else bias.masked_fill(~seen, -math.inf)


def _plain_attention(query, key, value, attn_mask, dropout_p):
    """``scaled_dot_product_attention`` in plain products."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ value


def _exact(like: torch.Tensor) -> torch.dtype:
    """float32 or better: half precision can't count to a thousand frames."""
    return torch.promote_types(like.dtype, torch.float32)


def _frequencies(count: int, like: torch.Tensor) -> torch.Tensor:
    """Angular frequencies [count] (Vaswani et al., 2017)."""
    index = torch.arange(count, device=like.device, dtype=_exact(like))
    return 10000.0 ** (-index / count)
