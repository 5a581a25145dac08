"""Normalisation by whole utterances, and the order of things."""

import pytest
import torch

from spkid.features.preprocess import (
    Preprocess,
    UtteranceNorm,
    utterance_statistics,
)


@pytest.mark.parametrize("kind", ["none", "mean", "mean_std"])
def test_norm_uses_an_utterances_own_frames(kind):
    lengths, norm = torch.tensor([20, 7, 1]), UtteranceNorm(kind)
    x = torch.randn(3, 20, 40) * 3 - 4
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 1e4
    together = norm(x, lengths)
    for row, padded, length in zip(together, x, lengths, strict=True):
        own = padded[:length]
        expected = own
        if kind != "none":
            expected = own - own.mean(0)
        if kind == "mean_std":
            expected = expected / (own.std(0, correction=0) + 1e-5)
        assert torch.allclose(row[:length], expected, atol=1e-4)
        assert (row[length:] == 0).all()


def test_a_crop_is_normalised_by_the_whole_utterance():
    x, norm = torch.randn(2, 50, 40) * 3 - 4, UtteranceNorm("mean_std")
    statistics = utterance_statistics(x)
    crop = norm(x[:, 10:30], None, statistics)
    assert torch.allclose(crop, norm(x)[:, 10:30], atol=1e-6)


class Shift(torch.nn.Module):
    """A channel that adds 5, or a mask that sets 7, counting its calls."""

    def __init__(self, value, add):
        super().__init__()
        self.value, self.add, self.calls = value, add, 0

    def forward(self, x, lengths):
        self.calls += 1
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
    assert channel.calls == 1


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
