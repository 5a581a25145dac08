"""The encoder of the course's sample model, with a padding mask."""

from __future__ import annotations

import torch
from torch import nn

from spkid.models.masks import valid_mask


class TransformerEncoder(nn.Module):
    """Linear prenet and post-norm Transformer layers without positions.

    The encoder (Vaswani et al., 2017) of the sample model of ML2022 Spring
    HW4, except that it doesn't attend to padding. The defaults are the
    sample's: with its head, the model has 125,896 parameters.

    Arguments
    ---------
    input_size : int
        Features of a frame (mel bands).
    d_model : int
        Width of the model.
    n_layers : int
        Number of layers.
    n_heads : int
        Attention heads of ``d_model / n_heads`` features each.
    d_ff : int
        Width of the feed-forward layers.
    dropout : float
        Dropout inside the layers.

    Example
    -------
    >>> encoder = TransformerEncoder(40, d_model=16, d_ff=32)
    >>> x, lengths = encoder(torch.rand(2, 9, 40), torch.tensor([4, 9]))
    >>> x.shape, encoder.output_size
    (torch.Size([2, 9, 16]), 16)
    """

    def __init__(
        self,
        input_size: int = 40,
        d_model: int = 80,
        n_layers: int = 1,
        n_heads: int = 2,
        d_ff: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.prenet = nn.Linear(input_size, d_model)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d_model, n_heads, d_ff, dropout, batch_first=True
            )
            for _ in range(n_layers)
        )
        self.output_size = d_model

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
            The encoding [batch, frames, output_size], and ``lengths``.
        """
        x = self.prenet(x)
        padding = None
        if lengths is not None:
            padding = ~valid_mask(lengths, x.shape[1])
            x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x, lengths
