"""A checkpoint is whole or absent, and holds the random states."""

import errno
import random
import shutil

import numpy as np
import pytest
import torch

from spkid.errors import UserError
from spkid.files import save_atomically
from spkid.training import checkpoints
from spkid.training.checkpoints import AtomicCheckpointer, RunState
from spkid.training.loggers import EpochLogger, EpochTensorboardLogger


@pytest.fixture
def layer():
    return torch.nn.Linear(2, 2)


def make(tmp_path, layer):
    return AtomicCheckpointer(tmp_path / "save", {"layer": layer})


def set_to(layer, value):
    torch.nn.init.constant_(layer.weight, value)


def test_a_checkpoint_appears_under_its_name_only_when_whole(
    tmp_path, layer, monkeypatch
):
    checkpointer = make(tmp_path, layer)
    flushed = []

    def flush(folder):
        assert not list((tmp_path / "save").glob("CKPT*")) or flushed
        flushed.append(folder.name)

    monkeypatch.setattr(checkpoints, "flush_folder", flush)
    saved = checkpointer.save_checkpoint(meta={"accuracy": 0.5})
    assert [name[:6] for name in flushed] == ["saving", "save"]
    assert saved.path.name.startswith("CKPT")
    assert all(path.exists() for path in saved.paramfiles.values())
    assert checkpointer.find_checkpoint().meta["accuracy"] == 0.5


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_leaves_the_last_good_one(
    tmp_path, layer, monkeypatch, caplog, error
):
    checkpointer = make(tmp_path, layer)
    set_to(layer, 1.0)
    checkpointer.save_checkpoint()
    set_to(layer, 2.0)

    def full(*_):
        raise error

    monkeypatch.setitem(checkpointer.custom_save_hooks, "layer", full)
    assert checkpointer.save_checkpoint() is None
    assert "keeps the last good one" in caplog.text
    assert len(list((tmp_path / "save").iterdir())) == 1
    checkpointer.recover_if_possible()
    assert (layer.weight == 1.0).all()


def test_an_unreadable_checkpoint_is_set_aside(tmp_path, layer, caplog):
    checkpointer = make(tmp_path, layer)
    set_to(layer, 1.0)
    checkpointer.save_checkpoint()
    set_to(layer, 2.0)
    newer = checkpointer.save_checkpoint()
    file = newer.paramfiles["layer"]
    file.write_bytes(file.read_bytes()[:-40])
    loaded = checkpointer.recover_if_possible()
    assert (layer.weight == 1.0).all()
    assert loaded.path != newer.path
    assert "set aside" in caplog.text
    assert "layer.ckpt is damaged" in caplog.text
    assert list((tmp_path / "save").glob("unreadable+*"))


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit"])
def test_each_kind_of_damage_is_found(tmp_path, layer, damage):
    saved = make(tmp_path, layer).save_checkpoint()
    assert checkpoints.damaged_file(saved.path) is None
    file = saved.paramfiles["layer"]
    content = bytearray(file.read_bytes())
    weights = layer.weight.detach().numpy().tobytes()
    content[content.index(weights)] ^= 1
    pieces = {"cut": content[:-40], "empty": b"", "a bit": content}
    file.write_bytes(pieces[damage])
    assert checkpoints.damaged_file(saved.path) == file


def test_a_checkpoint_of_another_model_is_an_error_not_damage(tmp_path, layer):
    make(tmp_path, layer).save_checkpoint()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(tmp_path, torch.nn.Linear(3, 3)).recover_if_possible()
    assert not list((tmp_path / "save").glob("unreadable*"))


def test_leftovers_of_a_death_are_swept_and_never_loaded(tmp_path, layer):
    saved = make(tmp_path, layer).save_checkpoint()
    for prefix in ("saving+", "deleting+"):
        shutil.copytree(saved.path, tmp_path / "save" / f"{prefix}CKPT+x")
    checkpointer = make(tmp_path, layer)
    assert len(checkpointer.list_checkpoints()) == 1
    assert len(list((tmp_path / "save").iterdir())) == 1


def test_only_what_is_not_worth_keeping_is_deleted(tmp_path, layer):
    checkpointer = make(tmp_path, layer)
    for accuracy in (0.3, 0.9, 0.1, 0.5):
        checkpointer.save_checkpoint(meta={"accuracy": accuracy})
    checkpointer.delete_checkpoints(
        num_to_keep=2, max_keys=["accuracy"], importance_keys=[]
    )
    left = {c.meta["accuracy"] for c in checkpointer.list_checkpoints()}
    assert left == {0.9, 0.5}
    assert len(list((tmp_path / "save").iterdir())) == 2


def test_the_best_ones_are_averaged(tmp_path, layer):
    checkpointer = make(tmp_path, layer)
    for value, accuracy in ((1.0, 0.3), (2.0, 0.9), (4.0, 0.8)):
        set_to(layer, value)
        checkpointer.save_checkpoint(meta={"accuracy": accuracy})
    checkpointer.load_average(2, "accuracy", ("layer",))
    assert (layer.weight == 3.0).all()
    checkpointer.load_average(1, "accuracy", ("layer",))
    assert (layer.weight == 2.0).all()
    with pytest.raises(UserError, match="no checkpoint to test"):
        checkpointer.load_average(1, "other", ("layer",))


def draw():
    return torch.rand(3), np.random.rand(3), random.random()


def test_all_random_states_come_back(tmp_path):
    state = RunState({"seed": 1})
    random.gauss(0, 1)  # leaves a cached second value
    state.save(tmp_path / "state.ckpt")
    expected = draw()
    draw()
    RunState({"seed": 1}).load(tmp_path / "state.ckpt", True)
    for ours, theirs in zip(draw(), expected, strict=True):
        assert np.array_equal(ours, theirs)


def test_time_goes_on_where_it_was(tmp_path):
    state = RunState()
    state._earlier = 1000.0
    state.save(tmp_path / "state.ckpt")
    other = RunState()
    other.load(tmp_path / "state.ckpt", True)
    assert 1000 <= other.seconds < 1060


def test_another_identity_is_refused(tmp_path):
    begun = {"seed": 1, "data": "a", "data_folder": "x", "pooling": "yaml 0"}
    RunState(begun).save(tmp_path / "state.ckpt")
    for change, words in (
        ({"seed": 2}, "begun with seed=1, not 2; go on with 1, or give"),
        ({"data": "b"}, "begun with other data, those of x; give another"),
        ({"pooling": "yaml 1"}, "begun with another 'pooling' in its YAML"),
    ):
        with pytest.raises(UserError, match=words):
            RunState(begun | change).load(tmp_path / "state.ckpt", True)
    moved = RunState(begun | {"data_folder": "y"})
    moved.load(tmp_path / "state.ckpt", True)


def test_a_text_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.txt"
    save_atomically("first", path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.txt: could not be written"):
        save_atomically("second", path)
    assert path.read_text() == "first"
    assert len(list(path.parent.iterdir())) == 1


def test_an_epoch_that_is_logged_again_has_one_line(tmp_path):
    path = tmp_path / "log.txt"
    log = EpochLogger(path)
    for epoch, loss in ((1, 0.5), (2, 0.25)):
        log.log_stats({"epoch": epoch}, {"loss": loss}, verbose=False)
    again = EpochLogger(path)  # after a kill, from the checkpoint of epoch 1
    again.log_stats({"epoch": 2}, {"loss": 0.125}, verbose=False)
    assert path.read_text().splitlines() == [
        "epoch: 1 - train loss: 5.00e-01",
        "epoch: 2 - train loss: 1.25e-01",
    ]


def test_a_line_that_could_not_be_written_comes_with_the_next(
    tmp_path, monkeypatch, caplog
):
    log = EpochLogger(tmp_path / "log.txt")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.os, "fsync", full)
        log.log_stats({"epoch": 1}, {"loss": 0.5}, verbose=False)
    assert "No space left" in caplog.text
    log.log_stats({"epoch": 2}, {"loss": 0.25}, verbose=False)
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_tensorboards_steps_are_epochs(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    for epochs in ((1, 2), (3, 4)):  # two processes of one run
        log = EpochTensorboardLogger(tmp_path)
        for epoch in epochs:
            log.log_stats({"epoch": epoch}, {"loss": epoch / 8})
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/train")
    assert [(e.step, e.value) for e in found] == [
        (epoch, epoch / 8) for epoch in (1, 2, 3, 4)
    ]
