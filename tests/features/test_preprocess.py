"""Normalisation by whole utterances, lengths, and the order of steps."""

import pytest
import torch

from spkid.features import (
    NORMALIZATIONS,
    ChannelAugment,
    Preprocess,
    SpectrogramMasking,
    UtteranceNorm,
    utterance_statistics,
)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_norm_uses_an_utterances_own_frames(kind):
    lengths, norm = torch.tensor([20, 7, 1]), UtteranceNorm(kind)
    x = torch.randn(3, 20, 40) * 3 - 4
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 1e4
    together = norm(x, lengths / 20)
    for row, padded, length in zip(together, x, lengths, strict=True):
        own = padded[:length]
        expected = own
        if kind != "none":
            expected = own - own.mean(0)
        if kind == "mean_std":
            expected = expected / (own.std(0, correction=0) + 1e-5)
        assert torch.allclose(row[:length], expected, atol=1e-4)
        assert (row[length:] == 0).all()


def test_norm_takes_speechbrains_lengths_and_refuses_whole_numbers():
    x = torch.tensor([[[1.0], [3.0], [99.0]]])
    for module in (UtteranceNorm(), Preprocess(UtteranceNorm())):
        normalised = module(x, torch.tensor([2 / 3]))
        assert normalised.flatten().tolist() == [-1, 1, 0]
        with pytest.raises(TypeError, match="must be fractions"):
            module(x, torch.tensor([2]))


def test_statistics_refuse_relative_lengths():
    with pytest.raises(TypeError, match="must be whole numbers of frames"):
        utterance_statistics(torch.ones(1, 3, 1), torch.tensor([2 / 3]))


def test_an_unknown_kind_is_refused_in_a_sentence():
    words = "normalization must be none, mean or mean_std, not 'sdt'"
    with pytest.raises(ValueError, match=words):
        UtteranceNorm("sdt")


def test_a_crop_is_normalised_by_the_whole_utterance():
    x, norm = torch.randn(2, 50, 40) * 3 - 4, UtteranceNorm("mean_std")
    statistics = utterance_statistics(x)
    crop = norm(x[:, 10:30], None, statistics)
    assert torch.allclose(crop, norm(x)[:, 10:30], atol=1e-6)


class Shift(torch.nn.Module):
    """A channel that adds, or a mask that sets a value; it keeps the lengths
    of its calls."""

    def __init__(self, value, add):
        super().__init__()
        self.value, self.add, self.calls = value, add, []

    def forward(self, x, lengths):
        self.calls.append(lengths)
        return x + self.value if self.add else torch.full_like(x, self.value)


def test_a_channels_shift_is_normalised_away_in_a_crop_too():
    """The crop's gain is added to the statistics of the whole utterance."""
    x = torch.randn(2, 50, 40)
    statistics, channel = utterance_statistics(x), Shift(5.0, add=True)
    preprocess = Preprocess(UtteranceNorm("mean"), channel)
    crop = x[:, 10:30]
    expected = UtteranceNorm("mean")(crop, None, statistics)
    assert torch.allclose(
        preprocess(crop, None, statistics), expected, atol=1e-5
    )
    assert channel.calls == [None]


def test_a_channels_stretch_is_normalised_away_too():
    class Halve(torch.nn.Module):
        def forward(self, x, lengths):
            return x / 2

    x = torch.randn(2, 50, 40)
    statistics, norm = utterance_statistics(x), UtteranceNorm("mean_std")
    augmented = Preprocess(norm, Halve())(x, None, statistics)
    assert torch.allclose(augmented, norm(x), atol=1e-3)


def test_evaluation_only_normalises():
    x, norm = torch.randn(2, 50, 40), UtteranceNorm("mean")
    preprocess = Preprocess(norm, Shift(5.0, True), Shift(7.0, False))
    assert (preprocess(x) == 7).all()
    assert torch.equal(preprocess.eval()(x), norm(x))


def test_channel_and_masking_get_whole_numbers_of_frames():
    """And the package's own augmentations refuse anything else."""
    x, relative = torch.randn(2, 50, 40), torch.tensor([0.5, 1.0])
    channel, masking = Shift(5.0, True), Shift(7.0, False)
    Preprocess(UtteranceNorm(), channel, masking)(x, relative)
    for module in (channel, masking):
        assert module.calls[0].tolist() == [25, 50]
    for augment in (ChannelAugment(), SpectrogramMasking()):
        with pytest.raises(TypeError, match="must be whole numbers of frames"):
            augment(x, relative)
