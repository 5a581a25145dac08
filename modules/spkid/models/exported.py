"""The embedding model as SpeechBrain's interfaces want it."""

from __future__ import annotations

import torch
from torch import nn

from spkid.models.whitened import WhitenedCosine


class WhitenedEmbedding(nn.Module):
    """Embeddings whose plain cosine is the back-end's.

    Arguments
    ---------
    embedding_model : torch.nn.Module
        Maps (features, relative lengths) to [batch, 1, size].
    size : int
        Of an embedding.

    Example
    -------
    >>> from spkid.models import MeanPooling, SpeakerEmbedding
    >>> from spkid.models import TransformerEncoder
    >>> inner = SpeakerEmbedding(TransformerEncoder(40), MeanPooling(80))
    >>> WhitenedEmbedding(inner, 80)(torch.rand(2, 9, 40)).shape
    torch.Size([2, 1, 80])
    """

    def __init__(self, embedding_model: nn.Module, size: int) -> None:
        super().__init__()
        self.embedding_model = embedding_model
        self.backend = WhitenedCosine(size, 0)

    def forward(
        self,
        features: torch.Tensor,
        relative_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps [batch, frames, bands] to vectors [batch, 1, size] of length
        1."""
        return self.backend.project(
            self.embedding_model(features, relative_lengths)
        )
