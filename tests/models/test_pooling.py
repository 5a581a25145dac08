"""Poolings against plain formulas on each utterance by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.lobes.models.ECAPA_TDNN import (
    AttentiveStatisticsPooling as SpeechBrainPooling,
)

from spkid.models.pooling import (
    AttentiveStatisticsPooling,
    FirstFramePooling,
    MeanPooling,
    SelfAttentivePooling,
)

D = 8
POOLINGS = {
    "mean": lambda: MeanPooling(D),
    "first": lambda: FirstFramePooling(D),
    "self-attentive": lambda: SelfAttentivePooling(D),
    "multi-head": lambda: SelfAttentivePooling(D, n_heads=4),
    "statistics": lambda: AttentiveStatisticsPooling(D, global_context=False),
    "statistics-context": lambda: AttentiveStatisticsPooling(D),
}


@pytest.mark.parametrize("name", POOLINGS)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    pad=st.sampled_from([0.0, -20.0, 1e4]),
)
def test_padding_does_not_count(name, lengths, pad):
    torch.manual_seed(sum(lengths))
    pooling = POOLINGS[name]().eval()
    utterances = [torch.randn(n, D) for n in lengths]
    batch = torch.full((len(lengths), max(lengths) + 2, D), pad)
    for row, utterance in zip(batch, utterances, strict=True):
        row[: len(utterance)] = utterance
    together = pooling(batch, torch.tensor(lengths))
    assert together.shape == (len(lengths), pooling.output_size)
    for row, utterance in zip(together, utterances, strict=True):
        assert (row - pooling(utterance[None])[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("frames", [1, 5])
def test_finite_on_one_frame_and_on_constant_input(name, frames):
    pooling = POOLINGS[name]()
    x = torch.full((2, frames, D), 3.0, requires_grad=True)
    pooled = pooling(x, torch.tensor([frames, 1]))
    pooled.sum().backward()
    assert pooled.isfinite().all()
    assert x.grad.isfinite().all()
    for parameter in pooling.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


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
    with pytest.raises(ValueError, match="n_heads=3 does not divide"):
        SelfAttentivePooling(D, n_heads=3)
