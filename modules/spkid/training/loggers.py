"""SpeechBrain's loggers for runs that are killed and resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger

from spkid.errors import UserError
from spkid.files import save_atomically

logger = logging.getLogger(__name__)


class EpochLogger(FileTrainLogger):
    """A text file with one line an epoch; history.json has the same figures.

    SpeechBrain's appends, so that an epoch which is repeated after a kill has
    two lines. Here its new line replaces the old one. A line that couldn't be
    written (a full disk) is written with the next one. Arguments as in
    SpeechBrain.

    Example
    -------
    >>> log = EpochLogger(getfixture("tmp_path") / "log.txt")
    >>> for loss in (0.5, 0.25):
    ...     log.log_stats({"epoch": 1}, {"loss": loss})
    >>> log.save_file.read_text()
    'epoch: 1 - train loss: 2.50e-01\\n'
    """

    def __init__(self, save_file: str | Path, precision: int = 2) -> None:
        super().__init__(save_file, precision)
        self.history = Path(save_file).with_name("history.json")
        self.rows: list[dict] | None = None

    def _read(self):
        try:
            return json.loads(self.history.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []

    def _line(self, row):
        parts: dict[str | None, dict] = {
            part: {} for part in (None, "train", "valid", "test")
        }
        for key, value in row.items():
            part, _, name = key.rpartition(" ")
            parts[part or None][name] = value
        return " - ".join(
            self._stats_to_string(stats, part)
            for part, stats in parts.items()
            if stats
        )

    @main_process_only
    def log_stats(
        self,
        stats_meta: dict,
        train_stats: dict | None = None,
        valid_stats: dict | None = None,
        test_stats: dict | None = None,
        verbose: bool = True,
    ) -> None:
        """As SpeechBrain's; ``stats_meta`` must have "epoch"."""
        parts = {"train": train_stats, "valid": valid_stats, "test": test_stats}
        row = dict(stats_meta)
        for part, stats in parts.items():
            row |= {f"{part} {key}": v for key, v in (stats or {}).items()}
        if self.rows is None:
            self.rows = self._read()
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        lines = [self._line(row) for row in self.rows]
        try:
            save_atomically("\n".join(lines) + "\n", self.save_file)
            save_atomically(json.dumps(self.rows, indent=1), self.history)
        except UserError as error:
            logger.error("%s The run continues.", error)
        if verbose:
            logger.info(lines[-1])


class EpochTensorboardLogger(TensorboardLogger):
    """TensorBoard's curves over epochs.

    SpeechBrain's counts its own calls, from 1 again when a run resumes.
    Arguments as in SpeechBrain.

    Example
    -------
    >>> log = EpochTensorboardLogger(getfixture("tmp_path"))
    >>> log.log_stats({"epoch": 7}, {"loss": 0.5})
    >>> log.global_step["train"]
    {'loss': 7}
    """

    @main_process_only
    def log_stats(
        self,
        stats_meta: dict,
        train_stats: dict | None = None,
        valid_stats: dict | None = None,
        test_stats: dict | None = None,
        verbose: bool = False,
    ) -> None:
        """As SpeechBrain's; ``stats_meta`` must have "epoch"."""
        before = stats_meta["epoch"] - 1  # SpeechBrain adds 1
        parts = {"train": train_stats, "valid": valid_stats, "test": test_stats}
        self.global_step = {"meta": before} | {
            name: dict.fromkeys(stats or (), before)
            for name, stats in parts.items()
        }
        super().log_stats(stats_meta, *parts.values(), verbose)
        self.writer.flush()
