"""A linear layer that takes the faster of torch's two CPU libraries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """nn.Linear of frames; in float32 on a CPU, as a 1 x 1 convolution.

    torch hands float32 matrix products to MKL, which runs at half speed on
    processors of other makers, and convolutions to oneDNN, which doesn't care.
    The layout is the same (channels last), the parameters are nn.Linear's.

    Arguments are those of ``torch.nn.Linear``.

    Example
    -------
    >>> Linear(3, 5)(torch.rand(2, 7, 3)).shape
    torch.Size([2, 7, 5])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, frames, in_features] to [..., out_features]."""
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
