"""Lengths and masks.

Inside the package, lengths are whole numbers of frames; fractions raise a
TypeError. SpeechBrain passes lengths as fractions of the batch's longest item.
They are converted here and nowhere else, which is exact up to 2**22 frames for
fractions of frames in float32. SpeechBrain's
``length_to_mask(relative * n_frames)`` marks one frame too many for about 4 %
of all (length, n_frames) pairs, because the product lands just above the whole
number.
"""

from __future__ import annotations

import math

import torch


def absolute_lengths(relative: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Converts SpeechBrain's relative lengths to numbers of frames.

    Fractions of frames are rounded. What is farther from a whole number of
    frames than they can be is a fraction of samples: n of the longest item's
    N, of which there are 1 + n // hop and 1 + N // hop frames. Its product
    x = n / N (1 + N // hop) is rounded up, as SpeechBrain's
    ``InputNormalization`` does.

    * No frame is lost: x > n / hop. In float32 this needs N below 2.7 million
      samples (2.8 minutes at 16 kHz), since x exceeds a whole n / hop by
      n / (N hop) at least, and is off by 3 * 2**-23 n / hop at most.
    * One frame too many is possible, since x <= n / hop + n / N. There is none
      if (n % hop) / hop + n / N <= 1, as for whole hops. Otherwise it depends
      on N and the hop, which aren't known here: pass fractions of frames where
      it matters.

    Arguments
    ---------
    relative : torch.Tensor [batch]
        Fractions of ``n_frames`` frames or of the longest item's samples, in
        (0, 1].
    n_frames : int
        Frames of the padded batch.

    Returns
    -------
    torch.Tensor [batch]
        int64, at least 1.

    Raises
    ------
    TypeError
        If the lengths are whole numbers already.

    Example
    -------
    >>> absolute_lengths(torch.tensor([3 / 7, 1.0]), 7)
    tensor([3, 7])

    0.48 s beside 1.6 s, with 10 ms from frame to frame:

    >>> absolute_lengths(torch.tensor([7680 / 25600, 1.0]), 1 + 25600 // 160)
    tensor([ 49, 161])
    """
    if not relative.is_floating_point():
        raise TypeError(
            "Relative lengths must be fractions of the batch's frames, not "
            f"{relative.dtype}; convert numbers of frames with "
            "relative_lengths()."
        )
    frames = relative.to(torch.float32) * n_frames
    # The fraction and the product are off by half an epsilon each.
    precisions = (relative.dtype, torch.float32)
    off = 2 * max(torch.finfo(dtype).eps for dtype in precisions) * frames
    frames = torch.maximum(frames.round(), (frames - off).ceil())
    return frames.to(torch.int64).clamp(min=1)


def relative_lengths(lengths: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Converts numbers of frames to SpeechBrain's relative lengths.

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
    _refuse_fractions(lengths)
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
    _refuse_fractions(lengths)
    frames = torch.arange(n_frames, device=lengths.device)
    return frames < lengths.unsqueeze(1)


def zero_padding(
    x: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Sets the padding to 0, whatever it holds, NaN included.

    Arguments
    ---------
    x : torch.Tensor [batch, frames, features]
        Input; it isn't changed.
    lengths : torch.Tensor [batch], optional
        Frames of each utterance, integers; None: nothing is padded.

    Example
    -------
    >>> zero_padding(torch.ones(1, 3, 1), torch.tensor([2])).flatten()
    tensor([1., 1., 0.])
    """
    if lengths is None:
        return x
    return x.masked_fill(~valid_mask(lengths, x.shape[1]).unsqueeze(-1), 0.0)


def masked_mean(
    x: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over the valid frames.

    Arguments
    ---------
    x : torch.Tensor [batch, frames, features]
        Input.
    lengths : torch.Tensor [batch], optional
        Frames of each utterance, integers; None: nothing is padded.

    Returns
    -------
    torch.Tensor [batch, features]

    Example
    -------
    >>> x = torch.tensor([[[1.0], [3.0], [99.0]]])
    >>> masked_mean(x, torch.tensor([2]))
    tensor([[2.]])
    """
    if lengths is None:
        return x.mean(dim=1)
    total = zero_padding(x, lengths).sum(dim=1)
    return total / lengths.unsqueeze(1).to(x.dtype)


def masked_softmax(
    scores: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax over the valid frames; padding gets exactly 0.

    Arguments
    ---------
    scores : torch.Tensor [batch, frames, heads]
        Unnormalised weights.
    lengths : torch.Tensor [batch], optional
        Frames of each utterance, integers; None: nothing is padded.

    Returns
    -------
    torch.Tensor [batch, frames, heads]

    Example
    -------
    >>> masked_softmax(torch.zeros(1, 3, 1), torch.tensor([2])).flatten()
    tensor([0.5000, 0.5000, 0.0000])
    """
    if lengths is not None:
        valid = valid_mask(lengths, scores.shape[1]).unsqueeze(-1)
        scores = scores.masked_fill(~valid, -math.inf)
    return scores.softmax(dim=1)


def _refuse_fractions(lengths: torch.Tensor) -> None:
    """Looks at the type alone: no value is copied from a GPU."""
    if lengths.is_floating_point():
        raise TypeError(
            "lengths must be whole numbers of frames, not SpeechBrain's "
            "relative lengths; convert them with absolute_lengths()."
        )
