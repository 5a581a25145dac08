"""The back-end as a torch module: what ONNX and SpeechBrain load."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class WhitenedCosine(nn.Module):
    """Log-posteriors of embeddings by cosines in a whitened space.

    The same as :meth:`spkid.backend.Backend.log_posteriors`, for PyTorch. Its
    values are a back-end's; it isn't trained.

    Arguments
    ---------
    input_size : int
        Size of an embedding.
    n_speakers : int
        Number of enrolled speakers.
    scale : float
        Posteriors are softmax(scale * cosine).

    Example
    -------
    >>> classifier = WhitenedCosine(8, n_speakers=5)
    >>> classifier(torch.rand(2, 1, 8)).shape
    torch.Size([2, 1, 5])
    """

    centre: torch.Tensor
    projection: torch.Tensor
    prototypes: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, input_size: int, n_speakers: int, scale: float = 30.0
    ) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(input_size))
        self.register_buffer("projection", torch.eye(input_size))
        self.register_buffer("prototypes", torch.zeros(n_speakers, input_size))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Maps [..., input_size] to vectors of length 1 to compare."""
        centred = F.normalize(embeddings.float(), dim=-1) - self.centre
        return F.normalize(centred @ self.projection, dim=-1)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Maps [..., input_size] to log-posteriors [..., n_speakers]."""
        cosines = self.project(embeddings) @ self.prototypes.T
        return F.log_softmax(self.scale * cosines, dim=-1)
