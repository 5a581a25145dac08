"""The loop: accumulation, clipping, values that aren't finite."""

import math
import os
import signal

import pytest
import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger

from spkid.errors import UserError
from spkid.training import AtomicCheckpointer, RobustBrain


class Line(RobustBrain):
    """Fits w so that the mean of w * x is 0; its gradient is mean(x)."""

    def compute_forward(self, batch, stage):
        return self.modules.line(batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.mean()


def make(brain=Line, width=1, **run_opts):
    line = torch.nn.Linear(width, 1, bias=False)
    torch.nn.init.zeros_(line.weight)
    return brain(
        {"line": line},
        lambda p: torch.optim.SGD(p, 1.0),
        run_opts={"device": "cpu", **run_opts},
    )


def loader(values):
    batches = [torch.as_tensor(v, dtype=torch.float32) for v in values]
    return torch.utils.data.DataLoader(
        [b.reshape(1, -1) for b in batches], batch_size=None
    )


def fit(brain, values, epochs=1):
    brain.fit(range(epochs), loader(values), progressbar=False)
    return brain.modules.line.weight.detach().flatten().tolist()


def test_each_group_of_batches_is_one_step_of_its_mean():
    brain = make(grad_accumulation_factor=2, max_grad_norm=0.0)
    # Steps: mean(1, 3), mean(5, 7), and 9 alone, which SpeechBrain drops.
    assert fit(brain, [1, 3, 5, 7, 9]) == [-(2.0 + 6.0 + 9.0)]
    assert brain.optimizer_step == 3


def test_a_last_group_of_several_batches_is_their_mean():
    brain = make(grad_accumulation_factor=3, max_grad_norm=0.0)
    assert fit(brain, [1, 2, 3, 4, 8]) == [-(2.0 + 6.0)]


def test_clipping_is_of_all_parameters_together():
    class TwoGroups(Line):
        def init_optimizers(self):
            a, b = self.modules.a, self.modules.b
            self.optimizer = torch.optim.SGD(
                [{"params": a.parameters()}, {"params": b.parameters()}], 1.0
            )
            self.optimizers_dict = {"opt_class": self.optimizer}

        def compute_forward(self, batch, stage):
            return self.modules.a(batch[:, :1]) + self.modules.b(batch[:, 1:])

    parts = {n: torch.nn.Linear(1, 1, bias=False) for n in ("a", "b")}
    for part in parts.values():
        torch.nn.init.zeros_(part.weight)
    brain = TwoGroups(
        parts, torch.optim.SGD, run_opts={"device": "cpu", "max_grad_norm": 1.0}
    )
    brain.fit(range(1), loader([[3.0, 4.0]]), progressbar=False)
    moved = [-p.weight.item() for p in parts.values()]
    assert moved == pytest.approx([0.6, 0.8], abs=1e-4)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_clipping_can_be_off(limit):
    assert fit(make(max_grad_norm=limit), [100.0]) == [-100.0]


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    brain = make(max_grad_norm=0.0)
    nan, infinite = float("nan"), float("inf")
    assert fit(brain, [1, nan, 2, infinite, 3]) == [-6.0]
    assert brain.skipped_steps == 2


def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    class Root(Line):
        def compute_objectives(self, predictions, batch, stage):
            return predictions.abs().sqrt().mean()  # slope infinite at 0

    brain = make(Root)
    weights = fit(brain, [1.0])
    assert weights == [0.0]
    assert brain.skipped_steps == 1


def test_persistent_nan_ends_the_run_with_advice():
    brain = make(nonfinite_patience=2)
    with pytest.raises(UserError, match="3 steps in a row: lower --lr"):
        fit(brain, [float("nan")] * 9)


def test_a_skipped_step_leaves_no_trace_in_batch_statistics():
    class Normalised(Line):
        def compute_forward(self, batch, stage):
            return self.modules.line(batch.reshape(-1, 1))

    values = [[1.0, 2.0], [float("nan"), 1.0], [3.0, 5.0]]

    def statistics(rows):
        model = torch.nn.Sequential(
            torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1)
        )
        brain = Normalised(
            {"line": model},
            lambda p: torch.optim.SGD(p, 0.0),
            run_opts={"device": "cpu"},
        )
        brain.fit(range(1), loader(rows), progressbar=False)
        return torch.cat(list(model[0].buffers())[:2])

    assert torch.equal(statistics(values), statistics(values[::2]))


def test_a_group_with_a_bad_batch_is_no_step_and_patience_counts_it():
    nan = float("nan")
    brain = make(grad_accumulation_factor=2, max_grad_norm=0.0)
    assert fit(brain, [1, nan, 3, 5, nan, 2]) == [-4.0]
    assert brain.skipped_steps == 2
    brain = make(grad_accumulation_factor=2, nonfinite_patience=2)
    with pytest.raises(UserError, match="3 steps in a row"):
        fit(brain, [nan] * 40)


def test_scattered_nan_does_not_end_it():
    brain = make(nonfinite_patience=2, max_grad_norm=0.0)
    nan = float("nan")
    assert fit(brain, [nan, nan, 1, nan, nan, 1, nan, nan, 1]) == [-3.0]


def test_signal_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    fit(make(), [1.0])
    assert signal.getsignal(signal.SIGTERM) is before


class Signalled(Line):
    """Gets a signal once, or twice, in its second batch."""

    times, name, seen = 1, "SIGTERM", 0

    def compute_forward(self, batch, stage):
        self.seen += 1
        if self.seen == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), getattr(signal, self.name))
        return super().compute_forward(batch, stage)


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 128 + signal.SIGUSR1)],
)
def test_a_signal_saves_after_the_batch_and_ends(tmp_path, name, code):
    brain = make(Signalled, max_grad_norm=0.0)
    brain.checkpointer = AtomicCheckpointer(tmp_path)
    brain.checkpointer.add_recoverable("brain", brain)
    brain.checkpointer.add_recoverable("line", brain.modules.line)
    brain.name = name
    with pytest.raises(SystemExit) as caught:
        fit(brain, [1, 2, 4])
    assert caught.value.code == code
    (saved,) = tmp_path.iterdir()
    weights = torch.load(saved / "line.ckpt")
    assert weights["weight"].item() == -3.0
    assert "step: 2" in (saved / "brain.ckpt").read_text()


def test_a_signal_waits_for_the_end_of_a_group(tmp_path):
    """Within it there are gradients that no checkpoint holds."""
    brain = make(Signalled, max_grad_norm=0.0, grad_accumulation_factor=3)
    brain.checkpointer = AtomicCheckpointer(tmp_path)
    brain.checkpointer.add_recoverable("brain", brain)
    with pytest.raises(SystemExit):
        fit(brain, [1, 2, 4, 8, 16])
    (saved,) = tmp_path.iterdir()
    assert "step: 3" in (saved / "brain.ckpt").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_second_signal_ends_at_once(tmp_path, name):
    brain = make(Signalled)
    brain.checkpointer = AtomicCheckpointer(tmp_path)
    brain.times, brain.name = 2, name
    with pytest.raises(SystemExit) as caught:
        fit(brain, [1, 2, 4])
    assert caught.value.code == 128 + getattr(signal, name)
    assert not list(tmp_path.iterdir())


def test_a_signal_in_validation_ends_it_at_once():
    class Validated(Signalled):
        def compute_forward(self, batch, stage):
            if stage == sb.Stage.TRAIN:
                return Line.compute_forward(self, batch, stage)
            return super().compute_forward(batch, stage)

    brain = make(Validated)
    with pytest.raises(SystemExit) as caught:
        brain.fit(range(1), loader([1]), loader([1] * 9), progressbar=False)
    assert caught.value.code == 143
    assert brain.seen == 2


def test_the_mean_loss_is_that_of_the_batches_that_are_finite():
    """Where a batch is not, SpeechBrain's running mean leans to the first."""

    class Recorded(Line):
        def on_stage_end(self, stage, stage_loss, epoch):
            self.means = [*getattr(self, "means", ()), float(stage_loss)]

        def compute_objectives(self, predictions, batch, stage):
            return predictions.mean() * 0 + batch.mean()

    for losses in ([2.0, 8.0, 5.0], [2.0, float("nan"), 8.0, float("inf")]):
        brain = make(Recorded)
        data = loader(losses)
        brain.fit(range(2), data, data, progressbar=False)
        assert len(brain.means) == 4
        assert all(2.0 < mean < 8.0 for mean in brain.means)
        if len(losses) == 3:
            assert brain.means == pytest.approx([5.0] * 4)


def test_another_kind_of_runtime_error_keeps_its_traceback():
    class Broken(Line):
        def compute_forward(self, batch, stage):
            raise RuntimeError("a gloomy mistake of ours")

    with pytest.raises(RuntimeError, match="gloomy"):
        fit(make(Broken), [1])


def test_speechbrain_still_has_the_faults_that_brain_py_works_around():
    """Red when upstream has fixed one: then its override can go."""

    class Plain(sb.Brain):
        compute_forward = Line.compute_forward
        compute_objectives = Line.compute_objectives

    brain = make(Plain, grad_accumulation_factor=2)
    brain.max_grad_norm = 1e9
    assert fit(brain, [1, 3, 5, 7, 9]) != [-17.0], "leftovers are used"
    weights = fit(make(Plain, max_grad_norm=-1.0), [100.0])
    assert weights != [-100.0], "a negative max_grad_norm turns clipping off"
    (weight,) = fit(make(Plain, max_grad_norm=1e9), [1.0, float("nan")])
    assert math.isnan(weight), "NaN is not back-propagated"


def test_speechbrain_still_has_its_loggers_faults(tmp_path):
    """Red when upstream has fixed them: then loggers.py can go."""
    log = FileTrainLogger(tmp_path / "log.txt")
    for _ in range(2):
        log.log_stats({"epoch": 1}, {"loss": 0.5}, verbose=False)
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2
    board = TensorboardLogger(tmp_path)
    board.log_stats({"epoch": 7}, {"loss": 0.5})
    assert board.global_step["train"] == {"loss": 1}


def test_speechbrain_still_saves_under_the_final_name(tmp_path):
    """Red when upstream is atomic: then AtomicCheckpointer can shrink."""

    def dies(part, path):
        raise KeyboardInterrupt

    checkpointer = Checkpointer(tmp_path)
    checkpointer.add_recoverable("a", object(), custom_save_hook=dies)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save_checkpoint()
    assert checkpointer.list_checkpoints(), "half a checkpoint is offered"
