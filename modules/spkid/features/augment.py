"""Augmentation of log-mels: other channels, and masks in time and frequency.

Input isn't changed in place, padding isn't read and becomes 0, and random
numbers come from torch's generator of the input's device, whose state is in
the checkpoints. SpeechBrain's ``SpectrogramDrop`` isn't used because it works
in place, ignores lengths and keeps its first random choice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from spkid.models.masks import masked_mean, zero_padding

NAT_PER_DB = math.log(10) / 10  # log-mels are natural logs of power
POWER_FLOOR = 1e-9  # that of LogMel


def smooth_curve(
    batch: int, n_bands: int, deviation_db: float, like: torch.Tensor
) -> torch.Tensor:
    """Random smooth curves over the bands, sums of four cosines.

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
        In nats of power; the expected mean over the bands is 0.

    Example
    -------
    >>> smooth_curve(2, 40, 3.0, like=torch.zeros(1)).shape
    torch.Size([2, 1, 40])
    """
    device, dtype = like.device, like.dtype
    places = torch.arange(n_bands, device=device, dtype=dtype) + 0.5
    orders = torch.arange(1, 5, device=device, dtype=dtype)[:, None]
    waves = torch.cos(math.pi * orders * (places / n_bands))
    heights = torch.randn(batch, 4, device=device, dtype=dtype) / math.sqrt(2)
    return (deviation_db * NAT_PER_DB * heights @ waves).unsqueeze(1)


class ChannelAugment(nn.Module):
    """Simulates another microphone, room and noise for each utterance.

    The input is raw log-mels: natural logarithms of power, not normalised.
    Reverberation spreads power forward in time, noise adds power, an
    equaliser and a gain add to the logarithm. These are what differs in new
    recordings.

    Arguments
    ---------
    equalizer_db : float
        Standard deviation of the equaliser's smooth frequency response.
    gain_db : float
        Gains are uniform between minus and plus this.
    snr_db : tuple of float
        Range of the signal-to-noise ratio. The noise is stationary and has a
        smooth random spectrum.
    rt60 : tuple of float
        Range of the reverberation time, in seconds.
    reverberant_db : tuple of float
        Range of the ratio of reverberant to direct power.
    probability : float
        Probability of noise, and of reverberation.
    frame_shift : float
        Seconds from one frame to the next.

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
        """Maps [batch, frames, bands] to the same shape; padding becomes 0.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, bands]
            Raw log-mels.
        lengths : torch.Tensor [batch], optional
            Frames of each utterance, integers; None: nothing is padded.
        """
        batch, _, n_bands = x.shape
        x = zero_padding(x, lengths)
        power = self._reverberate(x.exp())
        noise = self._noise(power, lengths)
        x = (power + noise).clamp(min=POWER_FLOOR).log()
        x = x + smooth_curve(batch, n_bands, self.equalizer_db, like=x)
        gain = _uniform(-self.gain_db, self.gain_db, batch, 1, 1, like=x)
        return zero_padding(x + gain * NAT_PER_DB, lengths)

    def _chosen(self, x):
        draw = torch.rand(len(x), 1, 1, device=x.device)
        return (draw < self.probability).to(x.dtype)

    def _reverberate(self, power):
        """Adds to each frame's power an exponentially decaying tail."""
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
        """Noise power: a smooth spectrum, times the flicker of each cell."""
        batch, _, n_bands = power.shape
        level = masked_mean(power, lengths).mean(dim=1)[:, None, None]
        snr = _uniform(*self.snr_db, batch, 1, 1, like=power)
        shape = smooth_curve(batch, n_bands, 6.0, like=power).exp()
        flicker = -torch.rand_like(power).clamp(min=1e-6).log()
        return self._chosen(power) * level * 10 ** (-snr / 10) * shape * flicker


class SpectrogramMasking(nn.Module):
    """SpecAugment's time and frequency masks (Park et al., 2019).

    Masked values become 0, the mean of normalised features.

    Arguments
    ---------
    time_masks, frequency_masks : int
        Number of masks of each kind.
    time_width, frequency_width : int
        Widths are uniform in 0 ... this, in frames and in bands.
    time_share : float
        A time mask covers at most this share of its utterance.

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
        """Maps [batch, frames, bands] to the same shape; padding becomes 0.

        Arguments
        ---------
        x : torch.Tensor [batch, frames, bands]
            Normalised features.
        lengths : torch.Tensor [batch], optional
            Frames of each utterance, integers; None: nothing is padded.
        """
        batch, frames, bands = x.shape
        own = x.new_full((batch,), frames) if lengths is None else lengths
        widest = (own * self.time_share).clamp(max=self.time_width)
        time = self._spans(self.time_masks, widest, own, frames, x)
        widest = x.new_full((batch,), self.frequency_width)
        all_bands = x.new_full((batch,), bands)
        band = self._spans(self.frequency_masks, widest, all_bands, bands, x)
        hidden = time.unsqueeze(2) | band.unsqueeze(1)
        return zero_padding(x.masked_fill(hidden, 0.0), lengths)

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


def _uniform(low, high, *shape, like):
    draw = torch.rand(*shape, device=like.device, dtype=like.dtype)
    return low + (high - low) * draw
