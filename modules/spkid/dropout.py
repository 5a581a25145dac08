"""Dropout whose random numbers cost a fraction of torch's on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

LEVELS = 2**16


class Dropout(nn.Dropout):
    """torch's Dropout (Srivastava et al., 2014), about 3 times as fast on CPU.

    torch draws 64 random bits for each number on a CPU, on one core; here 16
    are used, so the rate is rounded to the nearest 1/65,536, and what is kept
    is scaled by the rounded rate: the expectation is exact. Elsewhere this is
    torch's. Random numbers come from torch's default generator.

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
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
        bits = words.random_(-(2**63), None).view(torch.int16)
        keep = bits[: x.numel()].view(x.shape) >= zeros - LEVELS // 2
        return x * keep.to(x.dtype).mul_(LEVELS / (LEVELS - zeros))
