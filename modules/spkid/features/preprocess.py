"""Normalisation and augmentation, between the loader and the encoder."""

from __future__ import annotations

import torch
from torch import nn

from spkid.models.masks import absolute_lengths, masked_mean, zero_padding

NORMALIZATIONS = ("none", "mean", "mean_std")


def utterance_statistics(
    x: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean and deviation of each band over an utterance's own frames.

    Arguments
    ---------
    x : torch.Tensor [batch, frames, bands]
        Log-mels.
    lengths : torch.Tensor [batch], optional
        Frames of each utterance, integers; None: nothing is padded.

    Returns
    -------
    torch.Tensor [batch, 2, bands]

    Example
    -------
    >>> utterance_statistics(torch.tensor([[[1.0], [3.0]]])).flatten()
    tensor([2., 1.])
    """
    mean = masked_mean(x, lengths)
    square = masked_mean((x - mean.unsqueeze(1)).square(), lengths)
    return torch.stack((mean, square.sqrt()), dim=1)


class UtteranceNorm(nn.Module):
    """Subtracts each band's mean over the utterance.

    That removes most of what a microphone's frequency response adds to
    log-mels (cepstral mean subtraction, Atal, 1974). SpeechBrain's
    ``InputNormalization`` isn't used because a crop must be normalised by the
    statistics of its whole utterance.

    Arguments
    ---------
    kind : str
        "mean"; "mean_std": also divides by each band's deviation; "none".

    Example
    -------
    >>> norm = UtteranceNorm("mean")
    >>> x = torch.tensor([[[1.0], [3.0], [99.0]]])
    >>> norm(x, torch.tensor([2 / 3])).flatten()
    tensor([-1.,  1.,  0.])
    """

    def __init__(self, kind: str = "mean") -> None:
        super().__init__()
        if kind not in NORMALIZATIONS:
            raise ValueError(
                f"normalization must be none, mean or mean_std, not {kind!r}."
            )
        self.kind = kind

    def forward(
        self,
        x: torch.Tensor,
        relative_lengths: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps [batch, frames, bands] to the same shape; padding becomes 0.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, bands]
            Log-mels.
        relative_lengths : torch.Tensor [batch], optional
            SpeechBrain's relative lengths; None: nothing is padded.
        statistics : torch.Tensor [batch, 2, bands], optional
            Means and deviations of the whole utterances; None: those of
            ``x`` itself.
        """
        lengths = None
        if relative_lengths is not None:
            lengths = absolute_lengths(relative_lengths, x.shape[1])
        if self.kind != "none":
            if statistics is None:
                statistics = utterance_statistics(x, lengths)
            mean, deviation = statistics.unsqueeze(2).unbind(1)
            x = x - mean
            if self.kind == "mean_std":
                x = x / (deviation + 1e-5)
        return zero_padding(x, lengths)


class Preprocess(nn.Module):
    """Channel augmentation, normalisation and masking, in that order.

    Evaluation only normalises.

    Arguments
    ---------
    mean_var_norm : torch.nn.Module
        Maps (log-mels, relative lengths, statistics) to features.
    channel : torch.nn.Module, optional
        Maps (log-mels, lengths) to log-mels; in training only.
    masking : torch.nn.Module, optional
        Maps (features, lengths) to features; in training only.

    Example
    -------
    >>> from spkid.features import SpectrogramMasking
    >>> preprocess = Preprocess(UtteranceNorm(), masking=SpectrogramMasking())
    >>> preprocess(torch.randn(2, 50, 40), torch.tensor([0.5, 1.0])).shape
    torch.Size([2, 50, 40])
    """

    def __init__(
        self,
        mean_var_norm: nn.Module,
        channel: nn.Module | None = None,
        masking: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.mean_var_norm = mean_var_norm
        self.channel, self.masking = channel, masking

    def forward(
        self,
        x: torch.Tensor,
        relative_lengths: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps [batch, frames, bands] to the same shape.

        Arguments are those of :meth:`UtteranceNorm.forward`.
        """
        lengths = None
        if self.training and relative_lengths is not None:
            lengths = absolute_lengths(relative_lengths, x.shape[1])
        if self.training and self.channel is not None:
            clean, x = x, self.channel(x, lengths)
            if statistics is not None:
                # The channel shifts and stretches the whole utterance as it
                # does the crop.
                old = utterance_statistics(clean, lengths)
                new = utterance_statistics(x, lengths)
                ratio = (new[:, 1] + 1e-5) / (old[:, 1] + 1e-5)
                mean = statistics[:, 0] + new[:, 0] - old[:, 0]
                statistics = torch.stack((mean, statistics[:, 1] * ratio), 1)
        x = self.mean_var_norm(x, relative_lengths, statistics)
        if self.training and self.masking is not None:
            x = self.masking(x, lengths)
        return x
