"""torch's layers with the same parameters: faster on a CPU, or exact under
padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce

LEVELS = 2**8  # dropout rates are multiples of 1 / LEVELS


class Linear(nn.Linear):
    """nn.Linear of frames; in float32 on a CPU it is a 1 x 1 convolution.

    torch leaves float32 matrix products to MKL, which is half as fast on CPUs
    that Intel didn't make, and convolutions to oneDNN, which is fast on all.
    Both read the same memory layout. Arguments are those of ``nn.Linear``.

    Example
    -------
    >>> Linear(3, 5)(torch.rand(2, 7, 3)).shape
    torch.Size([2, 7, 5])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        if (
            x.ndim != 3
            or not x.is_cpu
            or x.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        picture = x.transpose(1, 2).unsqueeze(2)
        kernel = self.weight[:, :, None, None]
        return F.conv2d(picture, kernel, self.bias).squeeze(2).transpose(1, 2)


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al., 2014), on a CPU 3 times as fast as torch's.

    There torch draws 64 random bits for each number; this draws 8. So the
    rate is rounded to a multiple of 1/256 (0.1 to 0.1016); what is kept is
    scaled by the rounded rate, so the expectation is exact. On other devices
    this is torch's. The bits come from torch's default generator.

    Arguments
    ---------
    p : float
        Probability of a zero.

    Example
    -------
    >>> dropout = Dropout(0.5)
    >>> sorted(dropout(torch.ones(1000)).unique().tolist())
    [0.0, 2.0]
    >>> dropout.eval()(torch.ones(2))
    tensor([1., 1.])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps any shape to the same shape."""
        zeros = round(self.p * LEVELS)
        if not self.training or zeros == 0:
            return x
        if not x.is_cpu or zeros == LEVELS:
            return F.dropout(x, self.p)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
        bits = words.random_(-(2**63), None).view(torch.int8)
        keep = bits[: x.numel()].view(x.shape).ge_(zeros - LEVELS // 2)
        return x * keep.to(x.dtype).mul_(LEVELS / (LEVELS - zeros))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d with the statistics of the batch over all processes.

    torch's SyncBatchNorm does this on GPUs alone, where SpeechBrain converts
    this class to it, too. On CPUs this class gathers the statistics itself.
    Arguments are those of ``nn.BatchNorm1d``.

    Example
    -------
    >>> BatchNorm(3)(torch.rand(4, 3)).shape
    torch.Size([4, 3])
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises [items, features] or [items, features, frames]."""
        alone = not torch.distributed.is_initialized()
        if alone or not (self.training and x.is_cpu):
            return super().forward(x)
        if x.ndim == 3:
            frames = x.transpose(1, 2)
            flat = self(frames.flatten(0, 1))
            return flat.view(frames.shape).transpose(1, 2)
        dtype, x = x.dtype, x.float()  # as torch does in autocast
        total = all_reduce(torch.tensor(float(len(x))))
        mean = all_reduce(x.sum(dim=0)) / total
        variance = all_reduce((x - mean).square().sum(dim=0)) / total
        with torch.no_grad():
            # As in torch, the running variance is the unbiased one.
            unbiased = variance * total / (total - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((x - mean) * scale + self.bias).to(dtype)


class MaskedBatchNorm(nn.Module):
    """Batch normalisation by the statistics of the valid frames.

    Arguments
    ---------
    n_features : int
        Width of the input.

    Example
    -------
    >>> norm = MaskedBatchNorm(3)
    >>> norm(torch.rand(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        # Held, not inherited, so that the conversion to SyncBatchNorm finds it.
        self.norm = BatchNorm(n_features)

    def forward(
        self, x: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalises [batch, frames, n_features].

        ``valid`` [batch, frames] is True on the utterances' own frames; None:
        nothing is padded.
        """
        if valid is None or not self.training:
            return self.norm(x.flatten(0, 1)).view_as(x)
        normalised = torch.zeros_like(x)
        normalised[valid] = self.norm(x[valid]).to(x.dtype)
        return normalised
