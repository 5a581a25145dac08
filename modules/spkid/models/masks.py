"""Lengths and masks: the one place where relative lengths become integers.

SpeechBrain hands a batch's lengths around as fractions of its longest item.
``length_to_mask(relative * n_frames)`` is one frame too long for about 4 % of
all (length, n_frames) pairs, because the product lands just above the whole
number; rounding once, here, is exact up to 2**23 frames.
"""

from __future__ import annotations

import torch


def absolute_lengths(relative: torch.Tensor, n_frames: int) -> torch.Tensor:
    """SpeechBrain's relative lengths as numbers of frames.

    Arguments
    ---------
    relative : torch.Tensor [batch]
        Fractions of ``n_frames``, in (0, 1].
    n_frames : int
        Frames of the padded batch.

    Returns
    -------
    torch.Tensor [batch]
        int64, at least 1.

    Example
    -------
    >>> absolute_lengths(torch.tensor([3 / 7, 1.0]), 7)
    tensor([3, 7])
    """
    frames = torch.round(relative.to(torch.float32) * n_frames)
    return frames.to(torch.int64).clamp(min=1)


def relative_lengths(lengths: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Numbers of frames as SpeechBrain's relative lengths.

    Arguments
    ---------
    lengths : torch.Tensor [batch]
        Integers in 1 ... ``n_frames``.
    n_frames : int
        Frames of the padded batch.

    Returns
    -------
    torch.Tensor [batch]
        float32.

    Example
    -------
    >>> relative_lengths(torch.tensor([2, 4]), 4)
    tensor([0.5000, 1.0000])
    """
    return lengths.to(torch.float32) / n_frames


def valid_mask(lengths: torch.Tensor, n_frames: int) -> torch.Tensor:
    """True where a frame belongs to its utterance, False on padding.

    Arguments
    ---------
    lengths : torch.Tensor [batch]
        Integers in 1 ... ``n_frames``.
    n_frames : int
        Frames of the padded batch.

    Returns
    -------
    torch.Tensor [batch, n_frames]
        bool.

    Example
    -------
    >>> valid_mask(torch.tensor([1, 3]), 3)
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    frames = torch.arange(n_frames, device=lengths.device)
    return frames < lengths.unsqueeze(1)
