"""Linear layers by either library, and attention by either kernel."""

import pytest
import torch

from spkid.models import conformer
from spkid.models.conformer import SelfAttentionModule
from spkid.models.layers import Linear
from spkid.models.masks import valid_mask


@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 24), (7, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_torchs(shape, bias):
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40, bias), torch.nn.Linear(24, 40, bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    goal = torch.randn(*shape[:-1], 40)
    (ours(x) * goal).sum().backward()
    (theirs(y) * goal).sum().backward()
    assert torch.allclose(ours(x), theirs(y), atol=1e-5)
    assert torch.allclose(x.grad, y.grad, atol=1e-5)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, atol=1e-4)


@pytest.mark.parametrize("position", conformer.POSITIONS)
def test_plain_products_are_the_fused_kernel(position, monkeypatch):
    torch.manual_seed(0)
    attention = SelfAttentionModule(24, 2, position)
    x, valid = torch.randn(3, 9, 24), valid_mask(torch.tensor([9, 4, 1]), 9)
    expected, unmasked = attention(x, valid), attention(x)

    def in_full(query, key, value, mask):
        return attention._attend_in_full(query, key, value, mask, 0.0)

    monkeypatch.setattr(attention, "_attend", in_full)
    assert torch.allclose(attention(x, valid), expected, atol=1e-5)
    assert torch.allclose(attention(x), unmasked, atol=1e-5)


def test_bfloat16_training_on_short_crops_takes_plain_products(monkeypatch):
    called = []
    attention = SelfAttentionModule(24, 2)
    full = attention._attend_in_full
    monkeypatch.setattr(
        attention, "_attend_in_full", lambda *a: called.append(1) or full(*a)
    )
    x = torch.randn(2, 9, 24)
    attention(x)
    assert not called
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    assert called
    assert torch.allclose(out.float(), attention(x), atol=0.02)
