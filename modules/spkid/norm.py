"""Batch normalisation that knows of padding, and of other processes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose statistics are those of the batch over all processes.

    torch's SyncBatchNorm (Ioffe and Szegedy, 2015, over processes) is for
    GPUs alone; SpeechBrain converts to it there, this class included. On CPUs,
    this one gathers the statistics itself. Arguments are BatchNorm1d's.

    Example
    -------
    >>> BatchNorm(3)(torch.rand(4, 3)).shape
    torch.Size([4, 3])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises [items, features]."""
        alone = not torch.distributed.is_initialized()
        if alone or not (self.training and x.is_cpu):
            return super().forward(x)
        dtype, x = x.dtype, x.float()  # as torch's in autocast
        total = all_reduce(torch.tensor(float(len(x))))
        mean = all_reduce(x.sum(dim=0)) / total
        variance = all_reduce((x - mean).square().sum(dim=0)) / total
        with torch.no_grad():
            # As torch: the running variance is the unbiased one.
            unbiased = variance * total / (total - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((x - mean) * scale + self.bias).to(dtype)


class MaskedBatchNorm(nn.Module):
    """Batch normalisation whose statistics skip padded frames.

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
        # Held, not inherited: SyncBatchNorm conversion then finds it.
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
