"""Lengths: exact conversion from SpeechBrain's, and one convention."""

import pytest
import torch
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.processing.features import make_padding_mask

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


def test_random_pairs_up_to_100000_frames_come_back():
    """And as the same integers as with rounding alone."""
    generator = torch.Generator().manual_seed(0)
    for frames in torch.randint(1, 100_001, (500,), generator=generator):
        n = torch.randint(1, int(frames) + 1, (2000,), generator=generator)
        n[:2] = torch.tensor([1, int(frames)])
        relative = relative_lengths(n, int(frames))
        assert torch.equal(absolute_lengths(relative, int(frames)), n)
        rounded = torch.round(relative * int(frames)).long()
        assert torch.equal(rounded, n)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float64, 3000), (torch.float16, 1000), (torch.bfloat16, 120)],
)
def test_other_precisions_come_back_as_far_as_they_can(dtype, most):
    for frames in range(1, most, 7):
        lengths = torch.arange(1, frames + 1)
        relative = (lengths.double() / frames).to(dtype)
        assert torch.equal(absolute_lengths(relative, frames), lengths)


def waveforms(hop, whole):
    """Samples of 4,000 utterances and of the longest ones beside them."""
    generator = torch.Generator().manual_seed(0)
    most = torch.randint(hop, 2_600_000, (4000,), generator=generator)
    share = torch.rand(4000, generator=generator).double()
    n = (share * most).long().clamp(min=1)
    if whole:
        n = n // hop * hop
    most[::2] += hop - 1 - most[::2] % hop  # where least is left over
    return n, most


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("hop", [80, 160])
def test_a_waveform_keeps_its_last_frame(hop, whole):
    """And gets one more at most, and none if it lasts whole hops."""
    n, most = waveforms(hop, whole)
    for own, longest in zip(n, most, strict=True):
        total, expected = 1 + int(longest) // hop, 1 + int(own) // hop
        relative = (own / longest).reshape(1)
        frames = int(absolute_lengths(relative, total))
        more = (own % hop) / hop + own / longest > 1
        assert expected <= frames <= expected + bool(more)


def test_a_waveform_has_the_frames_that_speechbrain_normalises():
    n, most = waveforms(160, whole=False)
    for own, longest in zip(n[:400], most[:400] // 100 + 160, strict=True):
        relative = (own % longest + 1).div(longest).reshape(1)
        total = 1 + int(longest) // 160
        theirs = make_padding_mask(torch.empty(1, total), relative).sum(1)
        assert torch.equal(absolute_lengths(relative, total), theirs)


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
