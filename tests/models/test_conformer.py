"""The Conformer's own parts; test_padding.py holds what all encoders share."""

import math

import pytest
import torch
import torch.nn.functional as F

from spkid.models import ConformerEncoder, attention
from spkid.models.conformer import (
    ConformerBlock,
    ConvolutionModule,
    Subsampling,
)

D, HEADS = 24, 2


def test_depthwise_convolution_is_conv1d():
    module = ConvolutionModule(D, kernel_size=5).double()
    x = torch.randn(2, 9, D, dtype=torch.float64)
    gated = F.glu(module.gate(module.norm(x))).transpose(1, 2)
    plain = F.conv1d(
        gated,
        module.depthwise.weight.squeeze(2),
        module.depthwise.bias,
        padding=2,
        groups=D,
    ).transpose(1, 2)
    plain = module.project(F.silu(module.conv_norm(plain)))
    assert torch.allclose(module(x), plain, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 4])
def test_subsampled_lengths_are_those_of_the_utterance_alone(factor):
    module = Subsampling(40, D, factor)
    for length in range(1, 20):
        alone, _ = module(torch.randn(1, length, 40))
        _, lengths = module(torch.randn(1, 25, 40), torch.tensor([length]))
        assert lengths.item() == alone.shape[1] == math.ceil(length / factor)


def test_blocks_of_queries_change_nothing(monkeypatch):
    torch.manual_seed(0)
    encoder = ConformerEncoder(
        40, D, 2, HEADS, 32, position="relative", window=20
    ).eval()
    x = torch.randn(1, 70, 40)
    with torch.no_grad():
        whole, _ = encoder(x)
        monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
        blocks, _ = encoder(x)
    assert torch.allclose(whole, blocks, atol=1e-5)


def test_stochastic_depth_keeps_the_mean_and_skips_whole_utterances():
    torch.manual_seed(0)
    block = ConformerBlock(D, HEADS, 32, drop_path=0.5)
    x = torch.randn(1, 3, D).expand(4000, -1, -1)
    with torch.no_grad():
        out = block.train()(x)
        kept = block.eval()(x[:1])
    skipped = (out == x).all(dim=(1, 2)).float().mean()
    assert 0.45 < skipped < 0.55
    assert torch.allclose(out.mean(0), kept[0], atol=0.15)


def test_on_a_cpu_the_depthwise_convolution_stays_in_float32():
    """oneDNN has been seen to hang in bfloat16."""
    encoder = ConformerEncoder(
        40, d_model=D, n_layers=1, n_heads=2, dropout=0.0
    )
    kinds = {}
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.register_forward_hook(
                lambda _, given, __: kinds.update(conv=given[0].dtype)
            )
    x = torch.randn(2, 9, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = encoder(x)
    assert kinds == {"conv": torch.float32}
    expected, _ = encoder(x)
    assert (found.float() - expected).abs().max() < 0.1
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_heads": 5}, "n_heads=5 must divide d_model=24"),
        (
            {"position": "ropes"},
            "position must be none, rope or relative, not 'ropes'",
        ),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"conv_norm": "group"}, "norm must be layer or batch, not 'group'"),
        ({"subsampling": 3}, "subsampling must be 1, 2 or 4, not 3"),
        ({"d_model": 16}, "d_model=16 must exceed 16"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"d_model": 6, "n_heads": 2}, "heads of an even size, not 3"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        ConformerEncoder(40, **{"d_model": D, "n_heads": 2, **options})
