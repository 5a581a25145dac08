"""A checkpoint is whole or absent, and holds the random states."""

import errno
import pickle
import random
import shutil
import time
import zlib

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
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_leaves_the_last_good_one(
    tmp_path, layer, monkeypatch, caplog, error
):
    cure = "free some space"
    if getattr(error, "errno", None) == errno.EIO:
        cure = "check the disk"
    checkpointer = make(tmp_path, layer)
    set_to(layer, 1.0)
    checkpointer.save_checkpoint()
    set_to(layer, 2.0)

    def full(*_):
        raise error

    monkeypatch.setitem(checkpointer.custom_save_hooks, "layer", full)
    assert checkpointer.save_checkpoint() is None
    assert "keeps the last good one" in caplog.text
    assert f"); {cure}." in caplog.text
    assert checkpointer.failure[1] == cure
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


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(b"<html>404</html>"),
    "a bit": lambda path: path.write_bytes(
        path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])
    ),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


class Text:
    """Something that is saved as a text."""

    def save(self, path):
        path.write_text("7")
        path.with_name("state.ckpt.rank1").write_text("of another rank")

    def load(self, path, end_of_epoch):
        self.value = int(path.read_text())


@pytest.fixture
def pair(tmp_path, layer):
    """Checkpoints of two epochs; weights are 1 and 2."""
    checkpointer = make(tmp_path, layer)
    checkpointer.add_recoverable("text", Text(), Text.load, Text.save)
    for epoch in (1, 2):
        set_to(layer, float(epoch))
        checkpointer.save_checkpoint({"epoch": epoch, "accuracy": epoch})
    return checkpointer


FILES = ["layer.ckpt", "text.ckpt", "state.ckpt.rank1", "CKPT.yaml"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_of_each_kind_to_each_file_is_found(
    tmp_path, layer, pair, caplog, name, damage
):
    newest = pair.find_checkpoint().path
    assert checkpoints.damaged_file(newest) is None
    DAMAGES[damage](newest / name)
    assert pair.recover_if_possible().meta["epoch"] == 1
    assert (layer.weight == 1.0).all()
    assert f"{name} is damaged" in caplog.text
    assert {path.name for path in (tmp_path / "save").iterdir()} == {
        "CKPT+save-000001",
        "unreadable+CKPT+save-000002",
    }
    assert pair.save_checkpoint().path.name == "CKPT+save-000003"


@pytest.mark.parametrize("name", FILES)
def test_damaged_weights_are_not_averaged(pair, layer, name):
    (pair.find_checkpoint().path / name).write_bytes(b"")
    assert pair.load_average(2, "accuracy", ("layer",)) == 1
    assert (layer.weight == 1.0).all()


def test_a_meta_that_is_cut_anywhere_is_none(pair):
    path = pair.find_checkpoint().path
    whole = (path / "CKPT.yaml").read_bytes()
    assert checkpoints.read_meta(path)["epoch"] == 2
    for size in range(len(whole)):
        (path / "CKPT.yaml").write_bytes(whole[:size])
        assert checkpoints.read_meta(path) is None
    for place in range(whole.index(b"#")):
        for other in (whole[place] ^ 1, whole[place] ^ 16, 0):
            changed = whole[:place] + bytes([other]) + whole[place + 1 :]
            (path / "CKPT.yaml").write_bytes(changed)
            assert checkpoints.read_meta(path) is None


def test_what_is_damaged_is_not_used_where_nothing_can_be_renamed(
    pair, layer, monkeypatch
):
    (pair.find_checkpoint().path / "CKPT.yaml").write_bytes(b"")
    (pair.checkpoints_dir / "CKPT+other").mkdir()

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoints.os, "replace", refuse)
    assert pair.recover_if_possible().meta["epoch"] == 1


class Clock:
    """A time of day that jumps by some seconds at each look."""

    def __init__(self, monkeypatch, jump):
        self.now, self.jump = time.time(), jump
        real = time.strftime
        monkeypatch.setattr(time, "time", self.look)
        monkeypatch.setattr(
            time, "strftime", lambda f, *_: real(f, time.gmtime(self.now))
        )

    def look(self):
        self.now += self.jump
        return self.now


@pytest.mark.parametrize("jump", [600, 0, -600])
def test_no_clock_orders_checkpoints(tmp_path, layer, monkeypatch, jump):
    Clock(monkeypatch, jump)
    checkpointer = make(tmp_path, layer)
    places = [(1, False), (1, True), (2, False), (2, True), (10, False)]
    for epoch, end in places:
        set_to(layer, float(epoch))
        meta = {"epoch": epoch, "step": 0 if end else 5}
        checkpointer.save_checkpoint(meta, end_of_epoch=end)
        newest = checkpointer.find_checkpoint().meta
        assert (newest["epoch"], newest["end-of-epoch"]) == (epoch, end)
    found = checkpointer.find_checkpoints()
    order = [(c.meta["epoch"], c.meta["end-of-epoch"]) for c in found]
    assert order == places[::-1]
    assert checkpointer.recover_if_possible().meta["epoch"] == 10
    checkpointer.delete_checkpoints(num_to_keep=2)
    order = [(c.meta["epoch"], c.meta["end-of-epoch"]) for c in found[:2]]
    assert order == places[:2:-1]


def test_without_epochs_the_last_one_saved_is_the_newest(
    tmp_path, layer, monkeypatch
):
    Clock(monkeypatch, -600)
    checkpointer = make(tmp_path, layer)
    for value in (1.0, 2.0, 3.0):
        set_to(layer, value)
        checkpointer.save_checkpoint()
    make(tmp_path, layer).recover_if_possible()
    assert (layer.weight == 3.0).all()


def test_an_epoch_has_one_checkpoint(tmp_path, layer):
    checkpointer = make(tmp_path, layer)
    for value, epoch, end in (
        (1.0, 1, True),
        (2.0, 2, False),
        (3.0, 2, True),
        (4.0, 2, False),
        (5.0, 2, True),
    ):
        set_to(layer, value)
        checkpointer.save_checkpoint({"epoch": epoch}, end_of_epoch=end)
    left = [
        (c.meta["epoch"], c.meta["end-of-epoch"])
        for c in checkpointer.list_checkpoints()
    ]
    assert left == [(1, True), (2, False), (2, True)]
    checkpointer.recover_if_possible()
    assert (layer.weight == 5.0).all()


def test_a_users_copy_of_a_checkpoint_is_left_alone(tmp_path, layer):
    checkpointer = make(tmp_path, layer)
    saved = checkpointer.save_checkpoint({"epoch": 1, "accuracy": 0.9})
    copy = shutil.copytree(saved.path, saved.path.with_name("CKPT+my copy"))
    for epoch, accuracy in ((1, 0.9), (2, 0.8)):
        checkpointer.save_checkpoint({"epoch": epoch, "accuracy": accuracy})
    checkpointer.delete_checkpoints(num_to_keep=1, max_keys=["accuracy"])
    assert copy.exists()
    assert copy not in [c.path for c in checkpointer.list_checkpoints()]


def test_two_checkpoints_of_an_epoch_are_not_averaged(
    tmp_path, layer, monkeypatch
):
    """A kill comes before the older one is deleted."""
    checkpointer = make(tmp_path, layer)
    monkeypatch.setattr(checkpointer, "_delete_older", lambda *_: None)
    for value, epoch, accuracy in ((1.0, 1, 0.5), (3.0, 2, 0.9), (3.0, 2, 0.9)):
        set_to(layer, value)
        checkpointer.save_checkpoint({"epoch": epoch, "accuracy": accuracy})
    assert checkpointer.load_average(5, "accuracy", ("layer",)) == 2
    assert (layer.weight == 2.0).all()


class Canary:
    """Sings when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_nothing_of_a_checkpoint_is_unpickled(
    tmp_path, pair, name, zipped, listed
):
    newest, song = pair.find_checkpoint(), tmp_path / "song"
    if zipped:
        torch.save(Canary(song), newest.path / name)
    else:
        (newest.path / name).write_bytes(pickle.dumps(Canary(song)))
    if listed:  # its author has mended the checksums, too
        meta = {k: v for k, v in newest.meta.items() if k != "files"}
        checkpoints.write_meta(newest.path, meta)
    for load in (
        pair.recover_if_possible,
        lambda: pair.load_average(1, "accuracy", ("layer",)),
    ):
        try:
            load()
        except UserError as error:
            assert "can't be loaded" in str(error)
    assert not song.exists()
    pickle.loads(pickle.dumps(Canary(song)))
    assert song.exists(), "a canary that can't sing proves nothing"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!x"])
def test_no_tag_of_a_meta_is_obeyed(tmp_path, pair, tag):
    path = pair.find_checkpoint().path / "CKPT.yaml"
    line = f"{{end-of-epoch: true, files: {{}}, a: {tag} [{tmp_path}/song]}}"
    crc = zlib.crc32(line.encode())
    path.write_text(f"{line}{checkpoints.CHECKSUM}{crc}\n")
    assert pair.recover_if_possible().meta["epoch"] == 1
    assert not (tmp_path / "song").exists()


def test_a_checkpoint_of_another_model_is_an_error_not_damage(tmp_path, layer):
    make(tmp_path, layer).save_checkpoint()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(tmp_path, torch.nn.Linear(3, 3)).recover_if_possible()
    assert not list((tmp_path / "save").glob("unreadable*"))


def test_leftovers_of_a_death_are_swept_and_never_loaded(tmp_path, layer):
    saved = make(tmp_path, layer).save_checkpoint()
    for prefix in ("saving+", "deleting+"):
        shutil.copytree(saved.path, tmp_path / "save" / f"{prefix}CKPT+x")
        (tmp_path / "save" / f"{prefix}of the user").mkdir()
    checkpointer = make(tmp_path, layer)
    assert len(checkpointer.list_checkpoints()) == 1
    assert {path.name for path in (tmp_path / "save").iterdir()} == {
        saved.path.name,
        "saving+of the user",
        "deleting+of the user",
    }


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


def test_another_error_than_a_full_disk_is_not_hidden(tmp_path, layer):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    checkpointer = make(tmp_path, layer)
    checkpointer.custom_save_hooks["layer"] = fail
    with pytest.raises(RuntimeError, match="illegal memory"):
        checkpointer.save_checkpoint()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_where_a_file_system_cannot_flush_checkpoints_are_saved(
    tmp_path, layer, monkeypatch, number
):
    def refuse(_):
        raise OSError(number, "not supported")

    monkeypatch.setattr(checkpoints.os, "fsync", refuse)
    checkpointer = make(tmp_path, layer)
    assert checkpointer.save_checkpoint() is not None
    assert checkpointer.recover_if_possible() is not None


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
