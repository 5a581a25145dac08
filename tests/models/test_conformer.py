"""The Conformer against naive float64 oracles, and its invariants."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spkid.models import conformer
from spkid.models.conformer import (
    ConformerEncoder,
    ConvolutionModule,
    SelfAttentionModule,
    Subsampling,
    relative_shift,
    rotary_angles,
    rotate,
)
from spkid.models.masks import valid_mask
from spkid.models.transformer import TransformerEncoder

D, HEADS = 24, 2


def naive_attention(module, x, length):
    """One utterance, head by head and pair by pair, in plain loops."""
    x = module.norm(x[:length])
    q, k, v = module.query_key_value(x).view(length, 3, HEADS, -1).unbind(1)
    size = q.shape[-1]
    heads = []
    for h in range(HEADS):
        qh, kh, vh = q[:, h], k[:, h], v[:, h]
        scores = torch.full((length, length), -math.inf, dtype=x.dtype)
        for i, j in itertools.product(range(length), repeat=2):
            if module.window is not None and abs(i - j) > module.window:
                continue
            if module.position == "rope":
                half = size // 2
                score = 0.0
                for f in range(half):
                    # Only the difference of the angles can matter.
                    angle = (i - j) * 10000.0 ** (-f / half)
                    a = complex(qh[i, f], qh[i, f + half])
                    b = complex(kh[j, f], kh[j, f + half])
                    turn = complex(math.cos(angle), math.sin(angle))
                    score += (a * turn * b.conjugate()).real
                scores[i, j] = score / math.sqrt(size)
                continue
            score = qh[i] @ kh[j]
            if module.position == "relative":
                waves = [
                    (i - j) * 10000.0 ** (-f / (D // 2)) for f in range(D // 2)
                ]
                wave = torch.tensor(
                    [math.sin(w) for w in waves] + [math.cos(w) for w in waves],
                    dtype=x.dtype,
                )
                r = module.distance(wave).view(HEADS, -1)[h]
                score = (qh[i] + module.content_bias[h, 0]) @ kh[j]
                score = score + (qh[i] + module.distance_bias[h, 0]) @ r
            scores[i, j] = score / math.sqrt(size)
        heads.append(scores.softmax(-1) @ vh)
    return module.project(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("position", conformer.POSITIONS)
def test_attention_is_the_naive_one_in_float64(position, window, monkeypatch):
    monkeypatch.setattr(conformer, "QUERY_BLOCK", 4)  # several blocks
    torch.manual_seed(0)
    module = SelfAttentionModule(D, HEADS, position, window).double()
    for name in ("content_bias", "distance_bias"):
        if hasattr(module, name):
            torch.nn.init.normal_(getattr(module, name))
    lengths = torch.tensor([11, 6, 1])
    x = torch.randn(3, 11, D, dtype=torch.float64)
    with torch.no_grad():
        ours = module(x, valid_mask(lengths, 11))
        for row, length in enumerate(lengths):
            naive = naive_attention(module, x[row], length)
            difference = (ours[row, :length] - naive).abs().max()
            assert difference <= 1e-9


def test_relative_shift_puts_each_distance_in_its_place():
    queries, keys = 3, 5
    distances = torch.arange(queries - 1, -keys - 1, -1)  # first key is frame 0
    shifted = relative_shift(distances.expand(queries, -1), keys)
    expected = torch.arange(queries)[:, None] - torch.arange(keys)
    assert torch.equal(shifted, expected)


def test_rotation_is_complex_multiplication():
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    cos, sin = rotary_angles(7, 8, like=x)
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos, sin)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert torch.allclose(rotate(x, (cos, sin)), expected, atol=1e-12)


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


def encoders():
    """Each encoder under each option that mixes frames."""
    small = {"d_model": D, "n_layers": 2, "n_heads": HEADS, "d_ff": 32}
    for position, subsampling, norm, window in itertools.product(
        conformer.POSITIONS, (1, 2, 4), conformer.CONV_NORMS, (None, 3)
    ):
        yield (
            f"{position}-{subsampling}-{norm}-{window}",
            lambda p=position, s=subsampling, n=norm, w=window: (
                ConformerEncoder(
                    position=p,
                    subsampling=s,
                    conv_norm=n,
                    window=w,
                    aggregate=True,
                    **small,
                )
            ),
        )
    yield "transformer", TransformerEncoder


ENCODERS = dict(encoders())


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 33), min_size=2, max_size=4),
    pad=st.sampled_from([0.0, -20.0, 1e4]),
    data=st.data(),
)
def test_output_does_not_depend_on_the_batch(name, lengths, pad, data):
    """In any company, any order, and whatever the padding holds."""
    torch.manual_seed(len(lengths))
    encoder = ENCODERS[name]().eval()
    utterances = [torch.randn(n, 40) for n in lengths]
    order = data.draw(st.permutations(range(len(lengths))))
    batch = torch.full((len(lengths), max(lengths) + 3, 40), pad)
    for row, index in enumerate(order):
        batch[row, : lengths[index]] = utterances[index]
    with torch.no_grad():
        together, frames = encoder(
            batch, torch.tensor([lengths[i] for i in order])
        )
        for row, index in enumerate(order):
            alone, _ = encoder(utterances[index][None])
            assert frames[row] == alone.shape[1]
            difference = together[row, : frames[row]] - alone[0]
            assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_are_finite_and_padding_gets_none(name):
    torch.manual_seed(0)
    encoder = ENCODERS[name]().train()
    x = torch.randn(3, 12, 40, requires_grad=True)
    lengths = torch.tensor([12, 1, 5])
    encoded, frames = encoder(x, lengths)
    valid = valid_mask(frames, encoded.shape[1]).unsqueeze(-1)
    encoded.masked_fill(~valid, 0.0).square().sum().backward()
    for parameter in encoder.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    padding = ~valid_mask(lengths, 12)
    assert x.grad.isfinite().all()
    assert (x.grad[padding] == 0).all()


def test_blocks_of_queries_change_nothing(monkeypatch):
    torch.manual_seed(0)
    encoder = ConformerEncoder(
        40, D, 2, HEADS, 32, position="relative", window=20
    ).eval()
    x = torch.randn(1, 70, 40)
    with torch.no_grad():
        whole, _ = encoder(x)
        monkeypatch.setattr(conformer, "QUERY_BLOCK", 16)
        blocks, _ = encoder(x)
    assert torch.allclose(whole, blocks, atol=1e-5)


def test_a_wide_window_is_full_attention():
    torch.manual_seed(0)
    x = torch.randn(2, 9, D)
    full = SelfAttentionModule(D, HEADS)
    windowed = SelfAttentionModule(D, HEADS, window=8)
    windowed.load_state_dict(full.state_dict())
    assert torch.allclose(full(x), windowed(x), atol=1e-6)


def test_stochastic_depth_keeps_the_mean_and_skips_whole_utterances():
    torch.manual_seed(0)
    block = conformer.ConformerBlock(D, HEADS, 32, drop_path=0.5)
    x = torch.randn(1, 3, D).expand(4000, -1, -1)
    with torch.no_grad():
        out = block.train()(x)
        kept = block.eval()(x[:1])
    skipped = (out == x).all(dim=(1, 2)).float().mean()
    assert 0.45 < skipped < 0.55
    assert torch.allclose(out.mean(0), kept[0], atol=0.15)


def test_on_cpu_the_depthwise_convolution_stays_in_float32():
    """oneDNN's in bfloat16 has been seen not to return."""
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
        ({"n_heads": 5}, "n_heads=5 does not divide d_model=24"),
        ({"position": "ropes"}, "position='ropes' is none of"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"conv_norm": "group"}, "norm='group' is none of"),
        ({"subsampling": 3}, "subsampling=3 is none of"),
        ({"d_model": 16}, "d_model=16 must exceed 16"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"d_model": 6, "n_heads": 2}, "heads of an even size, not 3"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        ConformerEncoder(40, **{"d_model": D, "n_heads": 2, **options})
