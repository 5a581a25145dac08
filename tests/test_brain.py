"""The loop: accumulation, clipping, values that aren't finite."""

import math

import pytest
import speechbrain as sb
import torch

from spkid.brain import RobustBrain
from spkid.errors import UserError


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
    import signal

    before = signal.getsignal(signal.SIGTERM)
    fit(make(), [1.0])
    assert signal.getsignal(signal.SIGTERM) is before


def test_speechbrain_still_has_the_faults_that_brain_py_works_around():
    """Red when upstream has mended one: then its override can go."""

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
