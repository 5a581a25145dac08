"""Batch normalisation over valid frames, and over two real processes."""

import subprocess
import sys

import torch

from spkid.models.layers import MaskedBatchNorm
from spkid.models.masks import valid_mask

D = 24

TWO_PROCESSES = """
import sys
import torch
from spkid.norm import BatchNorm
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
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


def test_masked_batch_norm_counts_valid_frames_only():
    x, valid = torch.randn(3, 6, D), valid_mask(torch.tensor([6, 2, 1]), 6)
    ours, plain = MaskedBatchNorm(D), torch.nn.BatchNorm1d(D)
    assert torch.allclose(ours(x, valid)[valid], plain(x[valid]))
    assert torch.allclose(ours.norm.running_var, plain.running_var)


def test_two_processes_have_the_statistics_of_one(tmp_path):
    """Output, gradient and running statistics, with shares of uneven size."""
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node=2", "two.py"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
