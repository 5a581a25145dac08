"""A log has one line an epoch, whatever killed the run or filled the disk."""

import errno
import json
import os
from pathlib import Path

import pytest

from spkid.training import EpochLogger, EpochTensorboardLogger


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
        patched.setattr(os, "fsync", full)
        log.log_stats({"epoch": 1}, {"loss": 0.5}, verbose=False)
    assert "No space left" in caplog.text
    log.log_stats({"epoch": 2}, {"loss": 0.25}, verbose=False)
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def log_two(path, **more):
    for epoch in (1, 2):
        log = EpochLogger(path, **more)  # as after a kill
        log.log_stats({"epoch": epoch}, {"loss": 0.5}, verbose=False)


ILL = [
    b"{",
    b"7",
    b"[7]",
    b'{"epoch": 1}',
    b'[{"loss": 1}]',
    b'[{"epoch": "1"}]',
    b"[null]",
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", ILL)
def test_an_ill_shaped_history_costs_no_line(tmp_path, caplog, content):
    history = tmp_path / "history.json"
    history.write_bytes(content)
    log_two(tmp_path / "log.txt")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2
    assert "history.json: isn't a list of epochs; move it away" in caplog.text
    assert history.read_bytes() == content
    history.unlink()
    EpochLogger(tmp_path / "log.txt").log_stats({"epoch": 3}, verbose=False)
    assert [row["epoch"] for row in json.loads(history.read_text())] == [3]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["log.txt", "history.json"])
def test_a_text_of_the_users_own_is_left_as_it_is(tmp_path, caplog, name):
    (tmp_path / name).write_bytes(b"caf\xe9 notes\n")
    log_two(tmp_path / "log.txt")
    assert f"{name}: isn't text in UTF-8; move it away" in caplog.text
    assert (tmp_path / name).read_bytes() == b"caf\xe9 notes\n"


def test_two_logs_of_a_folder_keep_their_own_history(tmp_path):
    for name in ("a", "b"):
        history = tmp_path / name / "history.json"
        log_two(tmp_path / f"{name}.txt", history=history)
        assert len(json.loads(history.read_text())) == 2


@pytest.mark.parametrize("name", ["log.txt", "history.json"])
@pytest.mark.parametrize("kind", ["folder", "device"])
def test_what_is_no_file_is_left_alone(tmp_path, caplog, name, kind):
    if kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/dev/null")
    log_two(tmp_path / "log.txt")
    assert f"{name}: can't be read" in caplog.text
    assert "The run continues." in caplog.text
    kept = (tmp_path / name).is_symlink(), (tmp_path / name).is_dir()
    assert kept == (kind == "device", kind == "folder")
    (other,) = {"log.txt", "history.json"} - {name}
    assert (tmp_path / other).read_text().count("epoch") == 2


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").touch()
    log_two(tmp_path / "file" / "log.txt")
    assert "The run continues." in caplog.text


def test_other_lines_of_a_log_stay(tmp_path):
    path = Path(tmp_path / "log.txt")
    path.write_text("a note\nepoch: 1 - loss: 9\nepoch: 12 - loss: 9\n")
    log = EpochLogger(path)
    log.log_stats({"epoch": 2}, {"loss": 0.5}, verbose=False)
    assert path.read_text().splitlines() == [
        "a note",
        "epoch: 1 - loss: 9",
        "epoch: 2 - train loss: 5.00e-01",
    ]


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
