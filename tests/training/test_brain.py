"""The loop: accumulation, clipping, values that aren't finite."""

import errno
import math
import os
import signal
import time

import pytest
import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger

import spkid.training.brain
from spkid.errors import UserError
from spkid.training import AtomicCheckpointer, RobustBrain, RunState
from spkid.training.brain import STOP_SIGNALS


@pytest.fixture(autouse=True)
def without_flushing(monkeypatch):
    """No test here takes the power away."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


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
    with pytest.raises(UserError, match="3 steps in a row: start a run in"):
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


@pytest.fixture
def hangs_up():
    """SIGHUP as in a terminal, though the tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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
    [
        ("SIGTERM", 143),
        ("SIGINT", 130),
        ("SIGUSR1", 128 + signal.SIGUSR1),
        ("SIGHUP", 129),
    ],
)
def test_a_signal_saves_after_the_batch_and_ends(
    tmp_path, hangs_up, name, code
):
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


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_second_signal_ends_at_once(tmp_path, monkeypatch, hangs_up, name):
    monkeypatch.setattr(spkid.training.brain, "SAME_SIGNAL", -1.0)
    brain = make(Signalled)
    brain.checkpointer = AtomicCheckpointer(tmp_path)
    brain.times, brain.name = 2, name
    with pytest.raises(SystemExit) as caught:
        fit(brain, [1, 2, 4])
    assert caught.value.code == 128 + getattr(signal, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_signal_that_comes_twice_at_once_is_one(tmp_path, hangs_up, name):
    """torchrun passes on what its processes get themselves."""
    brain = make(Signalled)
    brain.checkpointer = AtomicCheckpointer(tmp_path)
    brain.times, brain.name = 2, name
    with pytest.raises(SystemExit):
        fit(brain, [1, 2, 4])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_an_ignored_signal_stays_ignored(hangs_up, name):
    """nohup ignores SIGHUP, and a shell's background job SIGINT."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        brain = make(Signalled, max_grad_norm=0.0)
        brain.name = name
        assert fit(brain, [1, 2, 4]) == [-7.0]
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(not hasattr(os, "forkpty"), reason="needs terminals")
def test_a_terminal_that_is_closed_costs_no_checkpoint(tmp_path):
    """What is printed there fails from then on."""

    class Printing(Signalled):
        def compute_forward(self, batch, stage):
            self.seen += 1
            if self.seen == 2:
                print("hang up", flush=True)
                while self._signal is None:
                    time.sleep(0.001)
            print("still here", flush=True)
            return Line.compute_forward(self, batch, stage)

    child, terminal = os.forkpty()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.dup2(0, 1)  # pytest has captured it
            os.dup2(0, 2)
            print_to = os.fdopen(1, "w", closefd=False)
            import sys

            sys.stdout = sys.stderr = print_to
            brain = make(Printing)
            brain.checkpointer = AtomicCheckpointer(tmp_path)
            brain.checkpointer.add_recoverable("brain", brain)
            brain.fit(range(1), loader([1, 2, 4]))  # with its progress bar
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code)
    said = b""
    while b"hang up" not in said:
        said += os.read(terminal, 1024)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert [path.name for path in tmp_path.iterdir()] == ["CKPT+save-000001"]


@pytest.mark.parametrize("missing", ["SIGUSR1", "SIGHUP"])
def test_where_a_signal_is_missing_the_others_work(
    tmp_path, monkeypatch, missing
):
    monkeypatch.delattr(signal, missing)
    brain = make(Signalled)
    with pytest.raises(SystemExit) as caught:
        fit(brain, [1, 2, 4])
    assert caught.value.code == 143


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


SCORES = {1: 0.3, 2: 0.5, 3: 0.9, 4: 0.7}  # of the epochs


class Learner(RobustBrain):
    """Saves each epoch; dropout tells whether random states came back."""

    def compute_forward(self, batch, stage):
        return self.modules.net(batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean() + predictions.mean()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.VALID:
            score = {"score": SCORES[epoch]}
            self.save_epoch(score, max_key="score", num_to_keep=2)


def learner(folder, **run_opts):
    """A run of four epochs, from what is in the folder."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1)
    )
    counter = EpochCounter(4)
    parts = {"net": net, "counter": counter, "state": RunState()}
    brain = Learner(
        {"net": net},
        lambda p: torch.optim.SGD(p, 0.1),
        run_opts={"device": "cpu", "ckpt_interval_steps": 1, **run_opts},
        checkpointer=AtomicCheckpointer(folder, parts),
    )
    return brain, counter


def train(folder, **run_opts):
    """Fits to the end; gives the tested weights."""
    brain, counter = learner(folder, **run_opts)
    # Else starting an epoch would draw from the dropout's generator.
    apart = {"batch_size": None, "generator": torch.Generator()}
    data = sb.dataio.dataloader.SaveableDataLoader(
        [torch.full((2, 1), float(value)) for value in (1, 2, 3)], **apart
    )
    valid = torch.utils.data.DataLoader([torch.ones(1, 1)], **apart)
    brain.checkpointer.add_recoverable("dataloader", data)
    brain.fit(counter, data, valid, progressbar=False)
    brain.checkpointer.load_average(2, "score", ("net",))
    flat = torch.cat([p.detach().flatten() for p in brain.modules.parameters()])
    return flat, brain


def epochs_of(folder):
    return [
        (c.meta["epoch"], c.meta["end-of-epoch"])
        for c in AtomicCheckpointer(folder).list_checkpoints()
    ]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    weights = train(folder)[0]
    assert epochs_of(folder) == [(2, True), (3, True), (4, True)][-3:]
    return weights


def dies_at(monkeypatch, call):
    """The run ends at this call of fit_batch; what is saved stays."""
    calls, real = 0, Learner.fit_batch

    def fit_batch(self, batch):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Learner, "fit_batch", fit_batch)


@pytest.mark.parametrize("death", [None, 5, 8])
@pytest.mark.parametrize(
    "jumps", [{4: 600}, {4: -600}, {4: 600, 7: -600}, "still"]
)
def test_clocks_change_nothing(calm, tmp_path, monkeypatch, jumps, death):
    """They jump once by ten minutes at some batch, or stand still."""
    now, batches, real = time.time(), 0, Learner.fit_batch
    show = time.strftime

    def fit_batch(self, batch):
        nonlocal now, batches
        batches += 1
        now += 0.0 if jumps == "still" else 1.0 + jumps.get(batches, 0)
        return real(self, batch)

    monkeypatch.setattr(Learner, "fit_batch", fit_batch)
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(
        time, "strftime", lambda form, *_: show(form, time.gmtime(now))
    )
    if death:
        with monkeypatch.context() as patched:
            dies_at(patched, death)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path)
    assert torch.equal(train(tmp_path)[0], calm)
    assert epochs_of(tmp_path) == [(2, True), (3, True), (4, True)]


@pytest.mark.parametrize("jump", [-6000, 6000])
def test_mid_epoch_checkpoints_have_their_own_clock(
    tmp_path, monkeypatch, jump
):
    """Every ten minutes, whatever the time of day says."""
    now, saved = 0.0, []

    class Slow(Line):
        def fit_batch(self, batch):
            nonlocal now
            now += 240
            if self.step == 2:
                monkeypatch.setattr(time, "time", lambda: 1e9 + jump)
            return super().fit_batch(batch)

        def _save_intra_epoch_ckpt(self):
            saved.append(self.step)
            super()._save_intra_epoch_ckpt()

    monkeypatch.setattr(time, "monotonic", lambda: now)
    brain = make(Slow, ckpt_interval_minutes=10)
    brain.checkpointer = AtomicCheckpointer(tmp_path)
    fit(brain, [0.0] * 10)
    assert saved == [3, 6, 9, 10]


FILES = ["net", "counter", "state", "dataloader", "brain", "optimizer"]


@pytest.mark.parametrize("name", [*(f"{f}.ckpt" for f in FILES), "CKPT.yaml"])
@pytest.mark.parametrize(
    "damage", ["empty", "cut", "zeroed", "deleted", "junk"]
)
def test_a_damaged_file_costs_a_checkpoint_but_no_bit(
    calm, tmp_path, monkeypatch, caplog, name, damage
):
    with monkeypatch.context() as patched:
        dies_at(patched, 8)  # after epoch 2 and a batch of the third
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert epochs_of(tmp_path) == [(1, True), (2, True), (3, False)]
    file = AtomicCheckpointer(tmp_path).find_checkpoint().path / name
    content = file.read_bytes()
    pieces = {
        "empty": b"",
        "cut": content[:-1],
        "zeroed": bytes(len(content)),
        "junk": b"7",
    }
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(pieces[damage])
        if pieces[damage] == content:
            file.write_bytes(b"9")
    assert torch.equal(train(tmp_path)[0], calm)
    assert f"{name} is damaged" in caplog.text


def full_at(monkeypatch, epochs, number=errno.ENOSPC):
    """These epochs can't be saved, nor the batches after the one before."""

    def save(self, path):
        if self.brain.epoch in epochs:
            raise OSError(number, os.strerror(number))
        return real(self, path)

    real = RunState.save
    monkeypatch.setitem(sb.utils.checkpoints.DEFAULT_SAVE_HOOKS, RunState, save)
    original = learner

    def with_brain(*args, **kwargs):
        brain, counter = original(*args, **kwargs)
        brain.checkpointer.recoverables["state"].brain = brain
        return brain, counter

    monkeypatch.setitem(globals(), "learner", with_brain)


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "free some space"), (errno.EIO, "check the disk")],
)
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_an_epoch_that_is_not_saved_ends_the_run(
    calm, tmp_path, monkeypatch, epoch, number, cure
):
    """Another one could not take its place in the mean of the best."""
    with monkeypatch.context() as patched:
        full_at(patched, {epoch}, number)
        words = rf"epoch {epoch} could not be saved \(.*\); {cure}, and give"
        with pytest.raises(UserError, match=words):
            train(tmp_path)
    before = [(e, True) for e in range(1, epoch)]
    assert epochs_of(tmp_path) == before
    assert torch.equal(train(tmp_path)[0], calm)


def test_a_step_that_is_not_saved_does_not(calm, tmp_path, monkeypatch, caplog):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(self, meta=None, end_of_epoch=True, **kwargs):
        with monkeypatch.context() as patched:
            if not end_of_epoch:
                patched.setattr(os, "replace", no_space)
            return real(self, meta, end_of_epoch, **kwargs)

    real = AtomicCheckpointer.save_checkpoint
    monkeypatch.setattr(AtomicCheckpointer, "save_checkpoint", save)
    assert torch.equal(train(tmp_path)[0], calm)
    assert "The run keeps the last good one" in caplog.text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Killed. "
            ),
            "give fewer --num_workers, as 0, and give the same command again",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            "free some memory, or give fewer --num_workers, as 0",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It "
                "is possible that dataloader's workers are out of shared "
                "memory. Please try to raise your shared memory limit."
            ),
            r"\(/dev/shm\) is full: give --num_workers 0, or enlarge it",
        ),
        (
            RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1_2>: "
                "No space left on device (28)"
            ),
            r"\(/dev/shm\) is full: give --num_workers 0, or enlarge it",
        ),
    ],
)
def test_what_happens_to_workers_is_a_sentence(error, words):
    class Broken(Line):
        def compute_forward(self, batch, stage):
            raise error

    with pytest.raises(UserError, match=words):
        fit(make(Broken), [1])


class Deadly(torch.utils.data.Dataset):
    """Its worker is killed while it loads the second item."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(1, 1)


def test_a_killed_worker_ends_the_run_with_a_sentence():
    data = torch.utils.data.DataLoader(Deadly(), None, num_workers=1)
    with pytest.raises(UserError, match="process that loads features has end"):
        make().fit(range(1), data, progressbar=False)
    data = torch.utils.data.DataLoader(Deadly(), None)  # as the cure says
    make().fit(range(1), data, progressbar=False)


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
