"""Augmentation of log-mel features: other channels, and hidden patches.

Nothing is edited in place, padding is neither read nor left with anything in
it, and all draws come from torch's generator of the input's device, whose
state a checkpoint holds. (SpeechBrain's SpectrogramDrop isn't used because it
edits in place, ignores lengths and sticks to its first random choice.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from spkid.models.masks import valid_mask
from spkid.models.pooling import masked_mean

NAT_PER_DB = math.log(10) / 10  # log-mels are natural logs of power
POWER_FLOOR = 1e-9  # the front end's


def _uniform(low, high, *shape, like):
    draw = torch.rand(*shape, device=like.device, dtype=like.dtype)
    return low + (high - low) * draw


def _clear_padding(x, lengths):
    if lengths is None:
        return x
    return x.masked_fill(~valid_mask(lengths, x.shape[1]).unsqueeze(-1), 0.0)


def smooth_curve(
    batch: int, n_bands: int, deviation_db: float, like: torch.Tensor
) -> torch.Tensor:
    """Random smooth curves over the bands: four cosines of random height.

    Arguments
    ---------
    batch, n_bands : int
        Number and length of the curves.
    deviation_db : float
        Standard deviation at a band, in dB.
    like : torch.Tensor
        Gives device and precision.

    Returns
    -------
    torch.Tensor [batch, 1, n_bands]
        In nat of power, about mean 0 over the bands.

    Example
    -------
    >>> smooth_curve(2, 40, 3.0, like=torch.zeros(1)).shape
    torch.Size([2, 1, 40])
    """
    kind = {"device": like.device, "dtype": like.dtype}
    places = (torch.arange(n_bands, **kind) + 0.5) / n_bands
    waves = torch.cos(math.pi * torch.arange(1, 5, **kind)[:, None] * places)
    heights = torch.randn(batch, 4, **kind) / math.sqrt(2)
    return (deviation_db * NAT_PER_DB * heights @ waves).unsqueeze(1)


class ChannelAugment(nn.Module):
    """Another microphone, room and noise, drawn for each utterance.

    Works on raw log-mels (natural log of power, not normalised): reverberation
    smears power forward in time, noise adds power, an equaliser and a gain add
    to the log. A test on new recordings shifts just these.

    Arguments
    ---------
    equalizer_db : float
        Standard deviation of a smooth frequency response.
    gain_db : float
        Gains are uniform in plus or minus this.
    snr_db : tuple of float
        Range of the signal-to-noise ratio of stationary noise with a smooth
        random spectrum.
    rt60 : tuple of float
        Range of the reverberation time, in seconds.
    reverberant_db : tuple of float
        Range of the reverberant over the direct power.
    probability : float
        Of each of noise and reverberation.
    frame_shift : float
        Seconds from frame to frame.

    Example
    -------
    >>> augment = ChannelAugment()
    >>> augment(torch.randn(2, 50, 40), torch.tensor([50, 20])).shape
    torch.Size([2, 50, 40])
    """

    def __init__(
        self,
        equalizer_db: float = 4.0,
        gain_db: float = 6.0,
        snr_db: tuple[float, float] = (5.0, 30.0),
        rt60: tuple[float, float] = (0.1, 0.6),
        reverberant_db: tuple[float, float] = (-15.0, 0.0),
        probability: float = 0.5,
        frame_shift: float = 0.01,
    ) -> None:
        super().__init__()
        self.equalizer_db, self.gain_db = equalizer_db, gain_db
        self.snr_db, self.rt60 = snr_db, rt60
        self.reverberant_db, self.probability = reverberant_db, probability
        self.frame_shift = frame_shift
        self.tail_frames = math.ceil(rt60[1] / frame_shift)

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """New log-mels of the same shape, padding set to 0.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, bands]
            Raw log-mels.
        lengths : torch.Tensor [batch], optional
            Frames of each utterance, integers; None: nothing is padded.

        Returns
        -------
        torch.Tensor [batch, frames, bands]
        """
        batch, _, n_bands = x.shape
        x = _clear_padding(x, lengths)
        power = self._reverberate(x.exp())
        noise = self._noise(power, lengths)
        x = (power + noise).clamp(min=POWER_FLOOR).log()
        x = x + smooth_curve(batch, n_bands, self.equalizer_db, like=x)
        gain = _uniform(-self.gain_db, self.gain_db, batch, 1, 1, like=x)
        return _clear_padding(x + gain * NAT_PER_DB, lengths)

    def _chosen(self, x):
        draw = torch.rand(len(x), 1, 1, device=x.device)
        return (draw < self.probability).to(x.dtype)

    def _reverberate(self, power):
        """Each frame's power, plus an exponentially decaying tail of it."""
        batch, frames, _ = power.shape
        count = min(self.tail_frames, frames)
        time = torch.arange(count, device=power.device, dtype=power.dtype)
        rt60 = _uniform(*self.rt60, batch, 1, like=power)
        tail = 10 ** (-6 * time * self.frame_shift / rt60)
        tail = tail / tail.sum(dim=1, keepdim=True)
        ratio = _uniform(*self.reverberant_db, batch, 1, like=power)
        tail = tail * 10 ** (ratio / 10) * self._chosen(power).squeeze(2)
        # Bands are the convolution's batch, utterances its channels.
        smeared = F.conv1d(
            F.pad(power.permute(2, 0, 1), (count - 1, 0)),
            tail.flip(1).unsqueeze(1),
            groups=batch,
        )
        return power + smeared.permute(1, 2, 0)

    def _noise(self, power, lengths):
        """Stationary noise: a smooth spectrum that flickers as mels do."""
        batch, _, n_bands = power.shape
        level = masked_mean(power, lengths).mean(dim=1)[:, None, None]
        snr = _uniform(*self.snr_db, batch, 1, 1, like=power)
        shape = smooth_curve(batch, n_bands, 6.0, like=power).exp()
        flicker = -torch.rand_like(power).clamp(min=1e-6).log()
        return self._chosen(power) * level * 10 ** (-snr / 10) * shape * flicker


class SpectrogramMasking(nn.Module):
    """SpecAugment's time and frequency masks (Park et al., 2019).

    For normalised features: what is masked becomes 0, the mean.

    Arguments
    ---------
    time_masks, frequency_masks : int
        Number of masks of each kind.
    time_width, frequency_width : int
        Widths are uniform in 0 ... this, in frames and bands.
    time_share : float
        No time mask is wider than this share of its utterance.

    Example
    -------
    >>> masking = SpectrogramMasking()
    >>> masking(torch.randn(2, 50, 40), torch.tensor([50, 20])).shape
    torch.Size([2, 50, 40])
    """

    def __init__(
        self,
        time_masks: int = 2,
        time_width: int = 16,
        frequency_masks: int = 2,
        frequency_width: int = 6,
        time_share: float = 0.2,
    ) -> None:
        super().__init__()
        self.time_masks, self.time_width = time_masks, time_width
        self.frequency_masks = frequency_masks
        self.frequency_width = frequency_width
        self.time_share = time_share

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """New features of the same shape, masks and padding set to 0.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, bands]
            Normalised features.
        lengths : torch.Tensor [batch], optional
            Frames of each utterance, integers; None: nothing is padded.

        Returns
        -------
        torch.Tensor [batch, frames, bands]
        """
        batch, frames, bands = x.shape
        own = x.new_full((batch,), frames) if lengths is None else lengths
        widest = (own * self.time_share).clamp(max=self.time_width)
        time = self._spans(self.time_masks, widest, own, frames, x)
        widest = x.new_full((batch,), self.frequency_width)
        all_bands = x.new_full((batch,), bands)
        band = self._spans(self.frequency_masks, widest, all_bands, bands, x)
        hidden = time.unsqueeze(2) | band.unsqueeze(1)
        return _clear_padding(x.masked_fill(hidden, 0.0), lengths)

    @staticmethod
    def _spans(count, widest, size, places, like):
        """True on ``count`` random spans within the first ``size`` places."""
        shape = (len(widest), count, 1)
        draw = torch.rand(2, *shape, device=like.device)
        widest, size = widest[:, None, None], size[:, None, None]
        width = (draw[0] * (widest.floor() + 1)).floor()
        start = (draw[1] * (size - width + 1)).floor()
        place = torch.arange(places, device=like.device)
        return ((place >= start) & (place < start + width)).any(dim=1)
