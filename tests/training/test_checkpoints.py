"""A checkpoint is whole or absent, and holds the random states."""

import errno
import random
import shutil

import numpy as np
import pytest
import torch

from spkid.errors import UserError
from spkid.training import AtomicCheckpointer, RunState, checkpoints


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
    state = RunState()
    random.gauss(0, 1)  # leaves a cached second value
    state.save(tmp_path / "state.ckpt")
    expected = draw()
    draw()
    RunState().load(tmp_path / "state.ckpt", True)
    for ours, theirs in zip(draw(), expected, strict=True):
        assert np.array_equal(ours, theirs)


def test_time_goes_on_where_it_was(tmp_path):
    state = RunState()
    state._earlier = 1000.0
    state.save(tmp_path / "state.ckpt")
    other = RunState()
    other.load(tmp_path / "state.ckpt", True)
    assert 1000 <= other.seconds < 1060
