"""Attention against plain loops in float64, and its kernels and blocks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from spkid.models import attention
from spkid.models.attention import (
    SelfAttentionModule,
    relative_shift,
    rotary_angles,
    rotate,
)
from spkid.models.masks import valid_mask

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
@pytest.mark.parametrize("position", attention.POSITIONS)
def test_attention_is_the_naive_one_in_float64(position, window, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)  # several blocks
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


def test_a_wide_window_is_full_attention():
    torch.manual_seed(0)
    x = torch.randn(2, 9, D)
    full = SelfAttentionModule(D, HEADS)
    windowed = SelfAttentionModule(D, HEADS, window=8)
    windowed.load_state_dict(full.state_dict())
    assert torch.allclose(full(x), windowed(x), atol=1e-6)


@pytest.mark.parametrize("position", attention.POSITIONS)
def test_plain_products_are_the_fused_kernel(position, monkeypatch):
    torch.manual_seed(0)
    module = SelfAttentionModule(D, HEADS, position)
    x, valid = torch.randn(3, 9, D), valid_mask(torch.tensor([9, 4, 1]), 9)
    expected, unmasked = module(x, valid), module(x)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", attention._plain_attention
    )
    assert torch.allclose(module(x, valid), expected, atol=1e-5)
    assert torch.allclose(module(x), unmasked, atol=1e-5)


def test_bfloat16_training_on_short_crops_takes_plain_products(monkeypatch):
    called = []
    module, plain = SelfAttentionModule(D, HEADS), attention._plain_attention
    monkeypatch.setattr(
        attention,
        "_plain_attention",
        lambda *a, **k: called.append(1) or plain(*a, **k),
    )
    x = torch.randn(2, 9, D)
    module(x)
    assert not called
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert called
    assert torch.allclose(out.float(), module(x), atol=0.02)
