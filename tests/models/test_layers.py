"""Linear, dropout and batch normalisation against torch's."""

import subprocess
import sys

import pytest
import torch

from spkid.models.layers import Dropout, Linear, MaskedBatchNorm
from spkid.models.masks import valid_mask

TWO_PROCESSES = """
import sys
import torch
from spkid.models.layers import BatchNorm
rank = int(sys.argv[1])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2
)
x = torch.randn(10, 5, generator=torch.manual_seed(0)) * 3 + 1
goal = torch.randn(10, 5)
shares = (slice(0, 7), slice(7, 10))  # of uneven size
ours, plain = BatchNorm(5), torch.nn.BatchNorm1d(5)
for norm in (ours, plain):
    torch.nn.init.uniform_(norm.weight, generator=torch.manual_seed(1))
whole = x.clone().requires_grad_()
(plain(whole) * goal).sum().backward()
part = x[shares[rank]].clone().requires_grad_()
(ours(part) * goal[shares[rank]]).sum().backward()
def close(a, b):
    assert torch.allclose(a, b, atol=1e-5), (a, b)
close(part.grad, whole.grad[shares[rank]])
close(ours.running_mean, plain.running_mean)
close(ours.running_var, plain.running_var)
grad = ours.weight.grad
torch.distributed.all_reduce(grad)
close(grad, plain.weight.grad)
half = ours(part.detach().bfloat16())
assert half.dtype == torch.bfloat16 and half.isfinite().all()
plain.load_state_dict(ours.state_dict())
close(ours.eval()(x), plain.eval()(x))
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 24), (7, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_output_and_gradients_are_torchs(shape, bias):
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


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_has_its_rate_scale_and_gradient(p, dtype):
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


def test_dropout_is_off_in_evaluation_and_at_zero():
    x = torch.randn(7)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert (Dropout(1.0)(x) == 0).all()


def test_dropout_depends_on_the_generators_state_alone():
    x, dropout = torch.ones(1001), Dropout(0.5)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, second)


def test_masked_batch_norm_counts_valid_frames_only():
    x, valid = torch.randn(3, 6, 24), valid_mask(torch.tensor([6, 2, 1]), 6)
    ours, plain = MaskedBatchNorm(24), torch.nn.BatchNorm1d(24)
    assert torch.allclose(ours(x, valid)[valid], plain(x[valid]))
    assert torch.allclose(ours.norm.running_var, plain.running_var)


@pytest.mark.slow
def test_two_processes_have_the_batch_statistics_of_one(tmp_path):
    """Output, gradient and running statistics, with shares of uneven size."""
    command = [sys.executable, "-c", TWO_PROCESSES]
    meeting = str(tmp_path / "meeting")
    processes = [
        subprocess.Popen([*command, rank, meeting], stderr=subprocess.PIPE)
        for rank in "01"
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
