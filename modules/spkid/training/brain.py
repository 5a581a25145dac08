"""SpeechBrain's training loop with fixes for interruption, accumulation and
NaN.

Each override names the fault of SpeechBrain 1.1 that it works around. A test
in ``tests/training/test_brain.py`` fails once upstream has fixed it.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import speechbrain as sb
import torch
import yaml
from speechbrain.core import INTRA_EPOCH_CKPT_FLAG
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import if_main_process
from torch.nn.parallel import DistributedDataParallel

from spkid.distributed import gather
from spkid.errors import UserError
from spkid.evaluation.embedder import is_out_of_memory
from spkid.models.layers import BatchNorm

logger = logging.getLogger(__name__)

RESUME = (
    "give the same command again: the run resumes from the last checkpoint."
)
# How the backends report that another process is gone.
LOST_PEER = re.compile("Connection (closed|reset)|Broken pipe|remote process")
# How a DataLoader reports that a worker has died, and that the memory which
# workers share with this process is full.
LOST_WORKER = re.compile(r"DataLoader worker \(pid.*(exited|killed)")
SHARED_MEMORY = re.compile("allocate shared memory|</torch_|Bus error")
# SIGUSR1 is Slurm's; SIGHUP comes when a terminal or a connection is closed.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
# Seconds in which a signal may come again: torchrun passes on to its processes
# what they get themselves, too, when a whole job is stopped.
SAME_SIGNAL = 1.0


@contextmanager
def explained() -> Iterator[None]:
    """Makes a UserError of full memory, of dead workers and other ranks.

    Example
    -------
    >>> with explained():
    ...     "nothing has failed"
    'nothing has failed'
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read what this process prints has gone
    except (RuntimeError, OSError) as error:
        message = str(error)
        first = message.partition("\n")[0][:120]
        if is_out_of_memory(error):
            raise UserError(
                f"The memory is full ({first}): free some, or start a run in "
                "another --output_folder with half the --batch_size and "
                "--grad_accumulation_factor 2."
            ) from None
        if SHARED_MEMORY.search(message):
            raise UserError(
                "The memory that processes share (/dev/shm) is full: give "
                f"--num_workers 0, or enlarge it, and {RESUME}"
            ) from None
        if LOST_WORKER.search(message):
            raise UserError(
                f"A process that loads features has ended ({first}): free "
                f"some memory, or give fewer --num_workers, as 0, and {RESUME}"
            ) from None
        if torch.distributed.is_initialized() and LOST_PEER.search(message):
            raise UserError(
                f"Another process of this run has ended ({first}); read its "
                f"error, and {RESUME}"
            ) from None
        raise


@register_checkpoint_hooks
class RobustBrain(sb.Brain):
    """A Brain whose runs survive signals, kills and non-finite steps.

    * SIGINT, SIGTERM, SIGUSR1 and SIGHUP save a checkpoint and exit with 128
      + the signal's number; one that comes a second or more later exits at
      once. SIGHUP and SIGINT stay ignored, as by ``nohup``.
    * A checkpoint is also saved between an epoch's training and validation.
    * An epoch that can't be saved ends the run, which resumes from the
      checkpoint before it.
    * A step whose loss or gradient isn't finite is skipped and counted;
      more than ``nonfinite_patience`` in a row end the run with advice.
    * ``max_grad_norm`` clips all parameters together; 0 or less: no clipping.
    * The last batches of an epoch are used even if they don't fill a group of
      ``grad_accumulation_factor``.
    * Every utterance of a batch weighs the same, whichever rank has it.

    Arguments are those of ``speechbrain.Brain``.

    Example
    -------
    >>> class Doubler(RobustBrain):
    ...     def compute_forward(self, batch, stage):
    ...         return self.modules.model(batch[0])
    ...     def compute_objectives(self, predictions, batch, stage):
    ...         return (predictions - 2 * batch[0]).square().mean()
    >>> brain = Doubler({"model": torch.nn.Linear(1, 1)},
    ...                 lambda p: torch.optim.SGD(p, 0.1))
    >>> brain.fit(range(1), [torch.ones(1, 4, 1)] * 3, progressbar=False)
    >>> brain.optimizer_step
    3
    """

    nonfinite_patience: int

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.batches_per_epoch = 0
        self.skipped_steps = 0
        self.epoch = 0
        self._saved_at = time.monotonic()
        self._terminal: list[int] = []
        self._skipped_in_a_row = 0
        self._group_is_bad = False
        self._signal: int | None = None
        self._signalled = 0.0

    # --- gradient accumulation, non-finite values, clipping ---------------

    def fit_batch(self, batch):
        """Trains on one batch. SpeechBrain drops the batches after the last
        whole group of ``grad_accumulation_factor``, backpropagates NaN, and
        weighs ranks equally whatever their numbers of items."""
        factor, total = self.grad_accumulation_factor, self.batches_per_epoch
        should_step = self._at_boundary()
        rest = total % factor
        if rest and self.step > total - rest:
            factor = rest  # the last group of an epoch is smaller
        self.on_fit_batch_start(batch, should_step)
        buffers = [buffer.clone() for buffer in self.modules.buffers()]
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            items, mean = self._pool(loss.detach(), len(batch))
            if torch.isfinite(mean):
                # DistributedDataParallel averages gradients over the ranks.
                share = len(batch) * self._n_ranks() / items
                self.scaler.scale(loss * share / factor).backward()
            else:
                # The batch statistics have seen the bad values, too.
                for buffer, before in zip(
                    self.modules.buffers(), buffers, strict=True
                ):
                    buffer.copy_(before)
                self._group_is_bad = True
                self._count_skipped("loss")
        if should_step and self._group_is_bad:
            self.zero_grad(set_to_none=True)
        elif should_step:
            self.optimizers_step()
        self._group_is_bad &= not should_step
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return mean

    def optimizers_step(self):
        """Makes one step. SpeechBrain clips only the first parameter group,
        reverses the gradient if ``max_grad_norm`` is negative, and steps on
        infinite gradients."""
        for optimizer in self.optimizers_dict.values():
            self.scaler.unscale_(optimizer)
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.modules.parameters(), limit)
        if self._agree(bool(torch.isfinite(norm))):
            self._skipped_in_a_row = 0
        else:
            self._count_skipped("gradient")
        # A scaler skips such steps itself, and lowers its scale.
        if self._skipped_in_a_row == 0 or self.scaler.is_enabled():
            for optimizer in self.optimizers_dict.values():
                self.scaler.step(optimizer)
            self.scaler.update()
        self.zero_grad(set_to_none=True)
        self.optimizer_step += 1

    def _at_boundary(self):
        """Whether a group's last batch was this one, so that a step is due."""
        epoch_done = self.step == self.batches_per_epoch
        return epoch_done or self.step % self.grad_accumulation_factor == 0

    def _n_ranks(self):
        if not self.distributed_launch:
            return 1
        return torch.distributed.get_world_size()

    def _pool(self, mean, items):
        """Number of items and their mean loss over all ranks; the mean is
        finite only if each rank's is."""
        if not self.distributed_launch:
            return items, mean.cpu()
        sums = torch.tensor([items, float(mean) * items], device=self.device)
        torch.distributed.all_reduce(sums)
        return int(sums[0]), (sums[1] / sums[0]).cpu()

    def _agree(self, fine):
        """Whether it is fine on every rank."""
        if not self.distributed_launch:
            return fine
        flag = torch.tensor(float(fine), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _count_skipped(self, what):
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        logger.warning(
            "Step %d is skipped: its %s isn't finite.", self.step, what
        )
        if self._skipped_in_a_row > self.nonfinite_patience:
            raise UserError(
                f"The {what} wasn't finite in {self._skipped_in_a_row} steps "
                "in a row: start a run in another --output_folder with a lower "
                "--lr, with --precision fp32, or with --max_grad_norm 1; the "
                "earlier checkpoints are intact."
            )

    # --- stopping and resuming --------------------------------------------

    @mark_as_saver
    def _save(self, path):
        super()._save(path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"skipped_steps: {self.skipped_steps}\n")

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        super()._recover(path, end_of_epoch)
        state = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        self.skipped_steps = state["skipped_steps"]

    @property
    def position(self) -> dict[str, int]:
        """Epoch, and batches of it that were trained on; each checkpoint has
        them in its meta."""
        return {"epoch": self.epoch, "step": self.step}

    @explained()
    def fit(self, epoch_counter, train_set, *args, **kwargs):
        """As ``speechbrain.Brain.fit``; a signal ends it with a checkpoint."""
        self.batches_per_epoch = len(train_set)
        self._terminal = [n for n in (1, 2) if os.isatty(n)]
        previous = {}
        for name in STOP_SIGNALS:
            if not hasattr(signal, name):  # Windows lacks some
                continue
            number = getattr(signal, name)
            # nohup ignores SIGHUP, and a shell's background job SIGINT.
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if ignored and name in ("SIGHUP", "SIGINT"):
                continue
            with suppress(ValueError):  # not the main thread
                previous[number] = signal.signal(number, self._on_signal)
        try:
            super().fit(epoch_counter, train_set, *args, **kwargs)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _fit_train(self, train_set, epoch, enable):
        self.epoch, self._saved_at = epoch, time.monotonic()
        super()._fit_train(train_set, epoch, enable)

    def _on_signal(self, number, _frame):
        if self._signal is None:
            self._signal, self._signalled = number, time.monotonic()
        elif time.monotonic() - self._signalled > SAME_SIGNAL:
            sys.exit(128 + number)
        if number == getattr(signal, "SIGHUP", None):
            # The terminal is gone; what is printed from now on fails.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminal:
                os.dup2(nowhere, stream)

    def _stop_if_asked(self):
        """Exits with the signal's usual code, on all ranks at once."""
        number = max(gather(self._signal or 0))  # not all ranks may have it
        if not number:
            return
        if if_main_process():
            logger.warning(
                "Stopped by a signal; give the same command again to resume."
            )
        sys.exit(128 + number)

    def _should_save_intra_epoch_ckpt(self, _, steps):
        """SpeechBrain asks the time of day, which may jump."""
        epoch_done = self.step == self.batches_per_epoch
        minutes = (time.monotonic() - self._saved_at) / 60
        due = 0 < self.ckpt_interval_minutes < minutes
        due |= 0 < self.ckpt_interval_steps <= steps
        due = not self._agree(not due and self._signal is None)
        # Within a group there are gradients, which no checkpoint holds.
        return epoch_done or (due and self._at_boundary())

    def _save_intra_epoch_ckpt(self):
        """Saves a mid-epoch checkpoint and deletes the earlier ones."""
        if self.checkpointer is not None:
            saved = self.checkpointer.save_checkpoint(
                end_of_epoch=False,
                meta={INTRA_EPOCH_CKPT_FLAG: True},
                verbosity=logging.DEBUG,
            )
            if not self.checkpointer.failure:
                self._forget_intra_epoch(saved)
        self._saved_at = time.monotonic()
        self._stop_if_asked()

    def _forget_intra_epoch(self, newer):
        """Deletes mid-epoch checkpoints once a newer one is safe."""
        self.checkpointer.delete_checkpoints(
            num_to_keep=0,
            ckpt_predicate=lambda c: (
                INTRA_EPOCH_CKPT_FLAG in c.meta
                and (newer is None or c.path != newer.path)
            ),
            verbosity=logging.DEBUG,
        )

    def save_epoch(self, meta: dict, max_key: str, num_to_keep: int) -> None:
        """Saves a checkpoint at an epoch's end and deletes poorer ones.

        Arguments
        ---------
        meta : dict
            Metrics of the epoch, as plain Python numbers.
        max_key : str
            The metric that ranks checkpoints, or "epoch"; higher is better.
        num_to_keep : int
            How many of the best are kept, beside the newest.

        Raises
        ------
        UserError
            If it can't be saved. Going on would test a mean that lacks it.
        """
        saved = self.checkpointer.save_checkpoint(meta=meta)
        if self.checkpointer.failure:
            why, cure = self.checkpointer.failure
            raise UserError(
                f"{self.checkpointer.checkpoints_dir}: epoch {self.epoch} "
                f"could not be saved ({why}); {cure}, and {RESUME}"
            )
        self._forget_intra_epoch(saved)
        self.checkpointer.delete_checkpoints(
            num_to_keep=num_to_keep,
            max_keys=[max_key],
            importance_keys=[],
            ckpt_predicate=lambda c: saved is None or c.path != saved.path,
        )
        self._stop_if_asked()

    def _fit_valid(self, valid_set, epoch, enable):
        if self.distributed_launch:
            # Batch statistics are each rank's own after the last step.
            for buffer in self.modules.buffers():
                torch.distributed.broadcast(buffer, src=0)
        super()._fit_valid(valid_set, epoch, enable)
        self._stop_if_asked()

    def evaluate_batch(self, batch, stage):
        """Scores one batch. A signal ends a validation at once, since a
        checkpoint was saved before it; ranks, which may have different numbers
        of batches, agree only at its end."""
        if not self.distributed_launch:
            self._stop_if_asked()
        return super().evaluate_batch(batch, stage)

    # --- distribution -----------------------------------------------------

    def _wrap_distributed(self):
        """Wraps modules for distributed training. SpeechBrain converts to
        SyncBatchNorm even on CPUs, where it fails in the first batch; there
        our BatchNorm does the same."""
        if not (self.distributed_launch and self.device_type == "cpu"):
            super()._wrap_distributed()
            return
        for module in self.modules.modules():
            if type(module) is torch.nn.BatchNorm1d:
                module.__class__ = BatchNorm  # of the same parameters
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                self.modules[name] = DistributedDataParallel(
                    module, find_unused_parameters=self.find_unused_parameters
                )
