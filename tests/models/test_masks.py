"""Lengths come back exactly from SpeechBrain's relative ones."""

import torch
from speechbrain.dataio.dataio import length_to_mask

from spkid.models.masks import absolute_lengths, relative_lengths, valid_mask


def test_every_pair_up_to_2000_frames_comes_back():
    for frames in range(1, 2001, 7):
        lengths = torch.arange(1, frames + 1)
        relative = relative_lengths(lengths, frames)
        assert torch.equal(absolute_lengths(relative, frames), lengths)


def test_a_product_alone_would_be_one_frame_too_long():
    """The fault that makes lengths.py necessary; see its docstring."""
    wrong = 0
    for frames in range(1, 301):
        lengths = torch.arange(1, frames + 1)
        relative = relative_lengths(lengths, frames)
        mask = length_to_mask(relative * frames, max_len=frames)
        wrong += int((mask.sum(1) != lengths).sum())
    assert wrong > 0


def test_mask_marks_the_first_frames():
    mask = valid_mask(torch.tensor([2, 3, 1]), 3)
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
