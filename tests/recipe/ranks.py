"""What test_distributed.py runs in each of several processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch

from spkid.data import LengthBatches
from spkid.errors import UserError, run_command
from spkid.evaluation import Evaluation
from spkid.training import AtomicCheckpointer, RobustBrain
from spkid.training.run import on_first

# Ranks get 2 and 2, 2 and 1, and 1 and 1 of these utterances.
BATCHES = [[1.0, 2.0, 4.0, -3.0], [0.5, 6.0, -2.0], [3.0, 8.0]]
LENGTHS = [7, 3, 9, 4, 4, 2, 8]  # batches of 8 frames: an odd number of them


class Line(RobustBrain):
    """Fits w * x to 2 x - 1, badly; keeps the epochs' mean losses."""

    losses: list
    signal = None  # that rank 1 gets in its second batch

    def compute_forward(self, batch, stage):
        if self.signal and self.step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), self.signal)
        return self.modules.line(batch)

    def compute_objectives(self, predictions, batch, stage):
        return (predictions - 2 * batch + 1).square().mean()

    def on_stage_end(self, stage, stage_loss, epoch):
        self.losses.append(float(stage_loss))


def learn(rank: int, n_ranks: int, number: int | None = None) -> tuple:
    """Weights and mean losses after three epochs."""
    line = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(line.weight)
    shares = [torch.tensor(b[rank::n_ranks])[:, None] for b in BATCHES]
    brain = Line(
        {"line": line},
        lambda p: torch.optim.SGD(p, 0.01),
        run_opts={
            "device": "cpu",
            "distributed_backend": "gloo",
            "max_grad_norm": 0.0,
        },
    )
    brain.losses, brain.signal = [], number
    loader = torch.utils.data.DataLoader(shares, batch_size=None)
    brain.fit(range(1, 4), loader, progressbar=False)
    return line.weight.item(), brain.losses


def save_with_a_fault(folder: Path, rank: int, faulty: int) -> list:
    """Names of what is there after a save that fails on one rank."""
    checkpointer = AtomicCheckpointer(folder)
    checkpointer.add_recoverable("part", torch.nn.Linear(1, 1))

    def hook(part, path):
        if rank == faulty:
            raise OSError(28, "No space left on device")

    checkpointer.add_recoverable("other", object(), custom_save_hook=hook)
    assert checkpointer.save_checkpoint() is None
    faulty = -1
    saved = checkpointer.save_checkpoint()
    assert (saved is None) == (rank > 0)
    return sorted(p.name[:4] for p in folder.iterdir())


def score(rank: int, n_ranks: int) -> tuple[list[str], list[str]]:
    """Names that this rank has scored, and those of the gathered table."""
    own = [
        f"utterance {index}"
        for batch in LengthBatches(LENGTHS, 8, rank=rank, n_ranks=n_ranks)
        for index in batch
    ]
    n = len(own)
    scored = Evaluation.of_batch(
        own,
        torch.zeros(n, 2),
        torch.zeros(n, dtype=torch.long),
        torch.zeros(n, 3),
        [1] * n,
        ["new"] * n,
        ("ann", "bob"),
    )
    return own, sorted(scored.gather().id.tolist())


def main(output: Path) -> None:
    """Writes what this rank found; then rank 1 is killed in a step."""
    rank, n_ranks = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE"))
    torch.distributed.init_process_group("gloo")
    weight, losses = learn(rank, n_ranks)
    own, everybodys = score(rank, n_ranks)
    found = {
        "weight": weight,
        "losses": losses,
        "own": own,
        "all": everybodys,
        "left": [
            save_with_a_fault(output / f"fault {n}", rank, n) for n in (0, 1)
        ],
    }
    try:
        learn(rank, n_ranks, signal.SIGUSR1)
    except SystemExit as error:
        found["code"] = error.code
    (output / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    learn(rank, n_ranks, signal.SIGKILL)


def process(output: Path, environment: dict[str, str]) -> None:
    """One rank, as a command."""
    os.environ.update(environment)
    run_command(lambda _: main(output))


def fail_alone(environment: dict[str, str]) -> None:
    """The first rank fails in what it does for all; then none goes on."""

    def fail(cure):
        raise UserError(f"There is no disk; {cure}.")

    def main(_):
        torch.distributed.init_process_group("gloo")
        on_first(print, "this works")
        on_first(fail, "buy one")
        print("too far")

    os.environ.update(environment)
    run_command(main)
