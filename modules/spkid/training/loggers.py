"""SpeechBrain's loggers for runs that are killed and resumed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger

from spkid.errors import UserError, cure_of
from spkid.files import open_regular, save_atomically

logger = logging.getLogger(__name__)


class EpochLogger(FileTrainLogger):
    """A text file with one line an epoch; history.json has the same figures.

    SpeechBrain's appends, so that an epoch which is repeated after a kill has
    two lines. Here its new line replaces the old one. A line that couldn't be
    written (a full disk) is written with the next one. What isn't a log of
    this kind is left as it is, with a warning.

    Arguments
    ---------
    save_file, precision
        As in SpeechBrain.
    history : str or pathlib.Path, optional
        None: history.json beside the text file.

    Example
    -------
    >>> log = EpochLogger(getfixture("tmp_path") / "log.txt")
    >>> for loss in (0.5, 0.25):
    ...     log.log_stats({"epoch": 1}, {"loss": loss})
    >>> log.save_file.read_text()
    'epoch: 1 - train loss: 2.50e-01\\n'
    """

    def __init__(
        self,
        save_file: str | Path,
        precision: int = 2,
        history: str | Path | None = None,
    ) -> None:
        super().__init__(save_file, precision)
        beside = Path(save_file).with_name("history.json")
        self.history = Path(history or beside)
        self.rows: list[dict] = []  # of this process

    def _lines(self):
        """Earlier lines of the text, and ours."""
        first, earlier = self.rows[0]["epoch"], []
        for line in _read(self.save_file).splitlines():
            epoch = re.match(r"epoch: (\d+)\b", line)
            if epoch is None or int(epoch[1]) < first:
                earlier.append(line)
        return "\n".join([*earlier, *map(self._line, self.rows)]) + "\n"

    def _history(self):
        """Earlier rows of history.json, and ours."""
        first = self.rows[0]["epoch"]
        try:
            rows = json.loads(_read(self.history) or "[]")
            earlier = [row for row in rows if row["epoch"] < first]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"{self.history}: isn't a list of epochs; move it away."
            ) from None
        return json.dumps(earlier + self.rows, indent=1)

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
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        for path, content in (
            (Path(self.save_file), self._lines),
            (self.history, self._history),
        ):
            try:
                save_atomically(content(), path)
            except UserError as error:
                logger.error("%s The run continues.", error)
        if verbose:
            logger.info(self._line(row))


def _read(path):
    """A log's text; "" where there is none yet."""
    try:
        with open_regular(path) as file:
            return file.read().decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise UserError(f"{path}: isn't text in UTF-8; move it away.") from None
    except OSError as error:
        raise UserError(
            f"{path}: can't be read ({error.strerror}); {cure_of(error)}."
        ) from None


def check_tensorboard() -> None:
    """Raises UserError if TensorBoard isn't installed.

    Example
    -------
    >>> check_tensorboard()
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "--use_tensorboard True: tensorboard isn't installed; pip install "
            "tensorboard, or give --use_tensorboard False."
        ) from None


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
        try:
            super().log_stats(stats_meta, *parts.values(), verbose)
            self.writer.flush()
        except OSError as error:
            logger.error("TensorBoard: %s. The run continues.", error)
