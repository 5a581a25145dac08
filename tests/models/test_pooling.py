"""Poolings against plain formulas; test_padding.py holds what all share."""

import pytest
import torch
from speechbrain.lobes.models.ECAPA_TDNN import (
    AttentiveStatisticsPooling as SpeechBrainPooling,
)

from spkid.models import (
    AttentiveStatisticsPooling,
    FirstFramePooling,
    MeanPooling,
    SelfAttentivePooling,
)

D = 8


def test_mean_and_first_frame_are_what_they_say():
    x, lengths = torch.randn(2, 5, D), torch.tensor([3, 5])
    expected = torch.stack((x[0, :3].mean(0), x[1].mean(0)))
    assert torch.allclose(MeanPooling(D)(x, lengths), expected, atol=1e-6)
    assert torch.equal(FirstFramePooling(D)(x, lengths), x[:, 0])


def test_self_attentive_is_its_formula():
    pooling, x = SelfAttentivePooling(D), torch.randn(5, D)
    weights = (x @ pooling.score.weight[0]).softmax(0)
    expected = (weights[:, None] * x).sum(0)
    assert torch.allclose(pooling(x[None])[0], expected, atol=1e-6)


def test_heads_weigh_their_own_parts():
    pooling, x = SelfAttentivePooling(D, n_heads=2), torch.randn(5, D)
    weights = (x @ pooling.score.weight.T).softmax(0)
    expected = torch.cat(
        [weights[:, 0] @ x[:, : D // 2], weights[:, 1] @ x[:, D // 2 :]]
    )
    assert torch.allclose(pooling(x[None])[0], expected, atol=1e-6)


def test_flat_attention_gives_mean_and_deviation():
    pooling, x = AttentiveStatisticsPooling(D), torch.randn(1, 7, D)
    torch.nn.init.zeros_(pooling.score.weight)
    expected = torch.cat((x.mean(1), x.std(1, correction=0)), dim=1)
    assert torch.allclose(pooling(x), expected, atol=1e-6)


def test_statistics_are_speechbrains():
    """Its layers take our weights; batch norm at rest is the identity."""
    ours = AttentiveStatisticsPooling(D, attention_size=6)
    theirs = SpeechBrainPooling(D, attention_channels=6).eval()
    block = theirs.tdnn
    block.activation = torch.nn.Identity()  # theirs: ReLU before the tanh
    weight = torch.cat((ours.hidden.weight, ours.context.weight), dim=1)
    block.conv.conv.weight.data = weight[..., None]
    block.conv.conv.bias.data = ours.hidden.bias.data
    block.norm.norm.eps = 1e-12
    theirs.conv.conv.weight.data = ours.score.weight.data[..., None]
    torch.nn.init.zeros_(theirs.conv.conv.bias)
    x, lengths = torch.randn(3, 10, D), torch.tensor([10, 5, 2])
    expected = theirs(x.transpose(1, 2), lengths / 10).squeeze(2)
    assert torch.allclose(ours(x, lengths), expected, atol=1e-5)


def test_heads_must_divide_the_features():
    with pytest.raises(ValueError, match="n_heads=3 must divide input_size=8"):
        SelfAttentivePooling(D, n_heads=3)
