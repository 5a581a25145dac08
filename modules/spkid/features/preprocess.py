"""What happens to features between the loader and the encoder."""

from __future__ import annotations

import torch
from torch import nn

from spkid.models.masks import valid_mask
from spkid.models.pooling import masked_mean

NORMALIZATIONS = ("none", "mean", "mean_std")


class UtteranceNorm(nn.Module):
    """Takes off each utterance's mean (and scales by its deviation) per band.

    The mean of log-mels over an utterance holds most of what a microphone's
    frequency response adds (cepstral mean subtraction, Atal, 1974).
    SpeechBrain's ``InputNormalization`` isn't used because a crop is to be
    normalised by the statistics of the whole utterance.

    Arguments
    ---------
    kind : str
        "none", "mean" or "mean_std".

    Example
    -------
    >>> norm = UtteranceNorm("mean")
    >>> norm(torch.tensor([[[1.0], [3.0], [0.0]]]), torch.tensor([2]))
    tensor([[[-1.],
             [ 1.],
             [ 0.]]])
    """

    def __init__(self, kind: str = "mean") -> None:
        super().__init__()
        if kind not in NORMALIZATIONS:
            raise ValueError(
                f"normalization {kind!r} is none of "
                f"{', '.join(NORMALIZATIONS)}."
            )
        self.kind = kind

    def forward(
        self,
        x: torch.Tensor,
        lengths: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalises a padded batch; padding becomes 0.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, bands]
            Log-mels.
        lengths : torch.Tensor [batch], optional
            Frames of each utterance, integers; None: nothing is padded.
        statistics : torch.Tensor [batch, 2, bands], optional
            Means and deviations of the whole utterances; None: those of
            ``x`` itself.

        Returns
        -------
        torch.Tensor [batch, frames, bands]
        """
        if self.kind != "none":
            if statistics is None:
                statistics = utterance_statistics(x, lengths)
            mean, deviation = statistics.unsqueeze(2).unbind(1)
            x = x - mean
            if self.kind == "mean_std":
                x = x / (deviation + 1e-5)
        if lengths is None:
            return x
        return x.masked_fill(~valid_mask(lengths, x.shape[1])[..., None], 0.0)


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


class Preprocess(nn.Module):
    """Channel augmentation, normalisation, masking; the latter two's order is
    that of their definitions, and evaluation only normalises.

    Arguments
    ---------
    normalize : UtteranceNorm
        Applied always.
    channel : torch.nn.Module, optional
        Maps (raw log-mels, lengths) to the same; in training only.
    masking : torch.nn.Module, optional
        Maps (normalised features, lengths) to the same; in training only.

    Example
    -------
    >>> from spkid.augment import SpectrogramMasking
    >>> preprocess = Preprocess(UtteranceNorm(), None, SpectrogramMasking())
    >>> preprocess(torch.randn(2, 50, 40)).shape
    torch.Size([2, 50, 40])
    """

    def __init__(
        self,
        normalize: UtteranceNorm,
        channel: nn.Module | None = None,
        masking: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.channel, self.masking = channel, masking

    def forward(
        self,
        x: torch.Tensor,
        lengths: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps [batch, frames, bands] to the same shape.

        Arguments are those of :meth:`UtteranceNorm.forward`.
        """
        if self.training and self.channel is not None:
            clean, x = x, self.channel(x, lengths)
            if statistics is not None:
                # What the crop's mean has gained and its deviation has been
                # stretched by, the whole utterance's would have been, too.
                old = utterance_statistics(clean, lengths)
                new = utterance_statistics(x, lengths)
                ratio = (new[:, 1] + 1e-5) / (old[:, 1] + 1e-5)
                mean = statistics[:, 0] + new[:, 0] - old[:, 0]
                statistics = torch.stack((mean, statistics[:, 1] * ratio), 1)
        x = self.normalize(x, lengths, statistics)
        if self.training and self.masking is not None:
            x = self.masking(x, lengths)
        return x
