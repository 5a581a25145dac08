"""Encoder, pooling and projection: what SpeechBrain calls embedding_model."""

from __future__ import annotations

import torch
from torch import nn

from spkid.models.layers import BatchNorm, Dropout
from spkid.models.masks import absolute_lengths


class SpeakerEmbedding(nn.Module):
    """One embedding of each utterance, with SpeechBrain's call.

    Arguments
    ---------
    encoder : torch.nn.Module
        Maps (features, integer lengths or None) to (frames, lengths).
    pooling : torch.nn.Module
        Maps (frames, lengths) to [batch, pooling.output_size].
    batch_norm : bool
        Batch normalisation after pooling, as in MFA-Conformer (Zhang et al.,
        2022). It gained 2.8 points in the best known HW4 model.
    embedding_size : int, optional
        Size of a linear projection; None: no projection.
    dropout : float
        Dropout of the pooled vector.

    Example
    -------
    >>> from spkid.models import MeanPooling, TransformerEncoder
    >>> model = SpeakerEmbedding(
    ...     TransformerEncoder(40, d_model=16), MeanPooling(16),
    ...     embedding_size=8)
    >>> model(torch.rand(2, 9, 40), torch.tensor([4 / 9, 1.0])).shape
    torch.Size([2, 1, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        pooling: nn.Module,
        batch_norm: bool = True,
        embedding_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        size = int(pooling.output_size)  # type: ignore[arg-type]
        self.norm = BatchNorm(size) if batch_norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.project = (
            nn.Identity()
            if embedding_size is None
            else nn.Linear(size, embedding_size)
        )
        self.output_size = embedding_size or size

    def forward(
        self,
        features: torch.Tensor,
        relative_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps [batch, frames, bands] to [batch, 1, output_size].

        Arguments
        ---------
        features : torch.Tensor [batch, frames, bands]
            Padded features.
        relative_lengths : torch.Tensor [batch], optional
            SpeechBrain's relative lengths. None: nothing is padded; this is
            faster, since no mask is made.
        """
        lengths = None
        if relative_lengths is not None:
            lengths = absolute_lengths(relative_lengths, features.shape[1])
        pooled = self.pooling(*self.encoder(features, lengths))
        return self.project(self.dropout(self.norm(pooled))).unsqueeze(1)
