"""Our dropout against what dropout is."""

import pytest
import torch

from spkid.models.layers import Dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_scale_and_gradient(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(500, 401, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    zeros = (y == 0).float()
    rounded = round(p * 256) / 256
    assert zeros.mean().item() == pytest.approx(rounded, abs=0.003)
    kept = y[y != 0].float().unique()
    assert len(kept) == 1
    assert kept.item() == pytest.approx(1 / (1 - rounded), rel=4e-3)
    assert torch.equal(x.grad, y)
    # Neighbours, in both directions, are independent.
    for pair in (
        (zeros[:, :-1], zeros[:, 1:]),
        (zeros[:-1], zeros[1:]),
        (zeros[:, :-4], zeros[:, 4:]),
    ):
        both = torch.stack([part.flatten() for part in pair])
        assert abs(torch.corrcoef(both)[0, 1].item()) < 0.01


def test_off_in_evaluation_and_at_zero():
    x = torch.randn(7)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert (Dropout(1.0)(x) == 0).all()


def test_the_generators_state_decides():
    x, dropout = torch.ones(1001), Dropout(0.5)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, second)
