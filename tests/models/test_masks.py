"""Lengths: exact conversion from SpeechBrain's, and one convention."""

import pytest
import torch
from speechbrain.dataio.dataio import length_to_mask

from spkid.models.masks import (
    absolute_lengths,
    masked_mean,
    masked_softmax,
    relative_lengths,
    valid_mask,
    zero_padding,
)


def test_every_pair_up_to_2000_frames_comes_back():
    for frames in range(1, 2001, 7):
        lengths = torch.arange(1, frames + 1)
        relative = relative_lengths(lengths, frames)
        assert torch.equal(absolute_lengths(relative, frames), lengths)


def test_a_product_alone_would_be_one_frame_too_long():
    """Why absolute_lengths exists; see the docstring of masks.py."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "function",
    [
        lambda lengths: valid_mask(lengths, 3),
        lambda lengths: relative_lengths(lengths, 3),
        lambda lengths: masked_mean(torch.ones(1, 3, 1), lengths),
        lambda lengths: masked_softmax(torch.ones(1, 3, 1), lengths),
        lambda lengths: zero_padding(torch.ones(1, 3, 1), lengths),
    ],
)
def test_relative_lengths_are_refused_where_whole_numbers_belong(
    function, dtype
):
    with pytest.raises(TypeError) as error:
        function(torch.tensor([2 / 3], dtype=dtype))
    assert str(error.value) == (
        "lengths must be whole numbers of frames, not SpeechBrain's relative "
        "lengths; convert them with absolute_lengths()."
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_whole_numbers_are_refused_where_relative_lengths_belong(dtype):
    with pytest.raises(TypeError, match="must be fractions"):
        absolute_lengths(torch.tensor([2], dtype=dtype), 3)


def test_padding_is_set_to_zero_whatever_it_holds():
    x = torch.tensor([[[1.0], [2.0], [float("nan")]]])
    assert zero_padding(x, torch.tensor([2])).flatten().tolist() == [1, 2, 0]
    assert zero_padding(x) is x
