"""A log has one line an epoch, whatever killed the run or filled the disk."""

import errno
import os

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
