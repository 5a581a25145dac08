"""Atomic checkpoints that include random states and elapsed time."""

from __future__ import annotations

import errno
import functools
import logging
import os
import pickle
import random
import re
import shutil
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import yaml
from speechbrain.utils.checkpoints import (
    CKPT_PREFIX,
    DEFAULT_SAVE_HOOKS,
    METAFNAME,
    PARAMFILE_EXT,
    Checkpoint,
    Checkpointer,
    average_checkpoints,
    get_default_hook,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import (
    MainProcessContext,
    ddp_broadcast,
    get_rank,
    if_main_process,
)

from spkid.distributed import gather
from spkid.errors import UserError, cure_of
from spkid.files import flush_folder, open_regular

logger = logging.getLogger(__name__)

SAVING, DELETING, UNREADABLE = "saving+", "deleting+", "unreadable+"
CHECKSUM = "\n# crc32 of the line above: "
# What loading raises where a file holds something else.
UNLOADABLE = (
    *(pickle.UnpicklingError, yaml.YAMLError, ValueError, EOFError),
    *(KeyError, TypeError),
)
# How torch.save says that a file could not be written.
UNWRITTEN = re.compile(
    "inline_container|PytorchStreamWriter|file write failed|iostream error"
)


def write_meta(folder: Path, meta: dict) -> None:
    """Completes a checkpoint's folder with CKPT.yaml: its meta, and the size
    and the checksum of each file.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "a.ckpt").write_bytes(b"abc")
    >>> write_meta(folder, {"end-of-epoch": True})
    >>> read_meta(folder)
    {'end-of-epoch': True, 'files': {'a.ckpt': [3, 891568578]}}
    """
    files = {path.name: sizes_of(path) for path in sorted(folder.iterdir())}
    # In a line and in braces: no part of it is YAML.
    line = yaml.safe_dump(
        meta | {"files": files},
        default_flow_style=True,
        sort_keys=False,
        width=float("inf"),
    ).strip()
    checksum = zlib.crc32(line.encode())
    with open(folder / METAFNAME, "wb") as file:
        file.write(f"{line}{CHECKSUM}{checksum}\n".encode())


def read_meta(folder: Path) -> dict | None:
    """What CKPT.yaml holds; None if it is missing or damaged."""
    try:
        with open_regular(folder / METAFNAME) as file:
            text = file.read().decode()
        meta = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    line, _, checksum = text.partition(CHECKSUM)
    whole = checksum == f"{zlib.crc32(line.encode())}\n"
    return meta if whole and isinstance(meta, dict) else None


def sizes_of(path: Path) -> list[int]:
    """A file's bytes and checksum."""
    size = checksum = 0
    with open_regular(path) as file:
        while piece := file.read(2**20):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]


def damaged_file(folder: Path) -> Path | None:
    """The first file of a checkpoint that isn't as it was written.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> torch.save(torch.zeros(1000), folder / "a.ckpt")
    >>> write_meta(folder, {"end-of-epoch": True})
    >>> damaged_file(folder)
    >>> _ = (folder / "a.ckpt").write_bytes(b"PK cut off")
    >>> damaged_file(folder).name
    'a.ckpt'
    """
    meta = read_meta(folder)
    if meta is None:
        return folder / METAFNAME
    for name, sizes in meta["files"].items():
        try:
            if sizes_of(folder / name) != sizes:
                return folder / name
        except OSError:
            return folder / name
    return None


def position(checkpoint: Checkpoint) -> tuple:
    """Where in its run a checkpoint was saved; no clock is asked.

    Example
    -------
    >>> meta = {"epoch": 3, "step": 7, "end-of-epoch": False}
    >>> position(Checkpoint(Path("CKPT+save-000002"), meta, {}))
    (3, False, 7, 'CKPT+save-000002')
    """
    meta = checkpoint.meta
    return (
        meta.get("epoch", 0),
        meta.get("end-of-epoch", True),
        meta.get("step", 0),
        checkpoint.path.name,
    )


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, safe if the process dies at any moment.

    * SpeechBrain fills a checkpoint's folder under its final name; a crash
      leaves one that can't be loaded but is preferred from then on. Here a
      folder is filled under another name, flushed, and renamed, and one to be
      deleted is renamed first.
    * SpeechBrain's newest checkpoint is that of the latest time of day; here
      it is that of the latest epoch and step. An epoch's checkpoint replaces
      an older one of the same epoch.
    * A checkpoint with a damaged or missing file is set aside with a warning,
      and the one before it is used.
    * If one can't be saved (a full disk), the earlier ones stay; ``failure``
      says why, and what to do.

    Arguments as in SpeechBrain.

    Example
    -------
    >>> layer = torch.nn.Linear(2, 2)
    >>> checkpointer = AtomicCheckpointer(getfixture("tmp_path"), {"m": layer})
    >>> _ = checkpointer.save_checkpoint(meta={"accuracy": 0.5})
    >>> checkpointer.recover_if_possible(max_key="accuracy").meta["accuracy"]
    0.5
    """

    failure: tuple[str, str] | None = None  # of the last save; and its cure

    def __init__(self, checkpoints_dir: str | Path, *args, **kwargs) -> None:
        super().__init__(checkpoints_dir, *args, **kwargs)
        self._bad: set[Path] = set()
        if if_main_process():
            for prefix in (SAVING, DELETING):
                pattern = f"{prefix}{CKPT_PREFIX}+*"
                for left in self.checkpoints_dir.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)

    def save_checkpoint(
        self,
        meta: dict | None = None,
        end_of_epoch: bool = True,
        name: str | None = None,
        verbosity: int = logging.INFO,
    ) -> Checkpoint | None:
        """Saves a checkpoint whole, or not at all.

        In SpeechBrain, a rank that can't write leaves the others waiting.

        Arguments
        ---------
        meta : dict, optional
            Plain values by which checkpoints are chosen; a RobustBrain that
            is saved adds its "epoch" and "step".
        end_of_epoch : bool
            Whether the next epoch begins with it.
        name : str, optional
            None: a number.
        verbosity : int
            Level at which it is logged.

        Returns
        -------
        Checkpoint, optional
            None if it could not be saved, and on all ranks but the first.
        """
        final = (
            self._new_checkpoint_dirpath()
            if name is None
            else self._custom_checkpoint_dirpath(name)
        )
        final = ddp_broadcast(final)
        part = final.with_name(SAVING + final.name)
        place = getattr(self.recoverables.get("brain"), "position", {})
        meta = {"end-of-epoch": end_of_epoch, **place, **(meta or {})}
        meta["name"] = final.name
        files, saved, failure = {}, None, None
        try:
            part.mkdir(parents=True, exist_ok=True)
            with MainProcessContext():  # within it, no rank waits
                for key, part_of_run in self.recoverables.items():
                    save = self.custom_save_hooks.get(key) or get_default_hook(
                        part_of_run, DEFAULT_SAVE_HOOKS
                    )
                    files[key] = final / f"{key}{PARAMFILE_EXT}"
                    save(part_of_run, part / files[key].name)
            if not if_main_process():
                flush_folder(part)
        except (OSError, RuntimeError) as error:
            failure = _failure(error)
        failures = [each for each in gather(failure) if each]
        if if_main_process():
            try:
                if not failures:
                    write_meta(part, meta)
                    flush_folder(part)
                    os.replace(part, final)
                    flush_folder(self.checkpoints_dir)
                    saved = Checkpoint(final, meta, files)
            except OSError as error:
                failures = [_failure(error)]
            if failures:
                shutil.rmtree(part, ignore_errors=True)
                logger.error(
                    "%s: a checkpoint could not be saved (%s); %s. The run "
                    "keeps the last good one.",
                    self.checkpoints_dir,
                    *failures[0],
                )
            if saved:
                logger.log(verbosity, "Saved a checkpoint in %s", final)
                self._delete_older(saved, verbosity)
        self.failure = gather(failures[0] if failures else None)[0]
        return saved

    def _new_checkpoint_dirpath(self):
        """A number higher than all there: time stamps may come again."""
        names = [path.name for path in self.checkpoints_dir.glob("*")]
        found = re.findall(r"\+save-(\d+)$", "\n".join(names), re.MULTILINE)
        number = max(map(int, found), default=0) + 1
        return self._custom_checkpoint_dirpath(f"save-{number:06d}")

    def _delete_older(self, saved, verbosity):
        """Deletes other checkpoints of the same epoch and kind."""
        keys = ("epoch", "end-of-epoch")
        for other in self.list_checkpoints():
            same = all(other.meta.get(k) == saved.meta.get(k) for k in keys)
            if "epoch" in saved.meta and same and other.path != saved.path:
                self._delete_checkpoint(other, verbosity)

    @staticmethod
    def _delete_checkpoint(checkpoint, verbosity=logging.INFO):
        if if_main_process():
            path = Path(checkpoint.path)
            doomed = path.with_name(DELETING + path.name)
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            logger.log(verbosity, f"Deleted checkpoint in {path}")

    def delete_checkpoints(self, **kwargs) -> None:
        """As SpeechBrain's, which calls the class's method, not self's."""
        original = Checkpointer._delete_checkpoint
        Checkpointer._delete_checkpoint = staticmethod(self._delete_checkpoint)
        try:
            super().delete_checkpoints(**kwargs)
        finally:
            Checkpointer._delete_checkpoint = original

    def list_checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, the newest one last.

        Where SpeechBrain looks for the newest, it compares "unixtime", the
        time of day; here each one's place in this order stands there.
        """
        found = []
        for folder in self._list_checkpoint_dirs():
            meta = read_meta(folder)
            # A user's copy has another name than it was saved with.
            own = meta is not None and meta["name"] == folder.name
            if own and folder not in self._bad:
                files = folder.glob(f"*{PARAMFILE_EXT}")
                by_key = {path.stem: path for path in files}
                found.append(Checkpoint(folder, meta, by_key))
        found.sort(key=position)
        for place, checkpoint in enumerate(found):
            checkpoint.meta["unixtime"] = place
        return found

    def _find_sound(self, **choice) -> list[Checkpoint]:
        """As find_checkpoints, on all ranks; damaged ones are set aside."""
        found = []
        if if_main_process():
            for folder in self.checkpoints_dir.glob(f"{CKPT_PREFIX}+*"):
                if folder.is_dir() and read_meta(folder) is None:
                    self._set_aside(folder / METAFNAME)
            found = self.find_checkpoints(**choice)
            while damaged := [
                path for c in found if (path := damaged_file(c.path))
            ]:
                for path in damaged:
                    self._set_aside(path)
                found = self.find_checkpoints(**choice)
        return gather(found)[0]

    def _set_aside(self, damaged):
        """Renames a checkpoint, or forgets it where nothing can be renamed."""
        folder = damaged.parent
        self._bad.add(folder)
        with suppress(OSError):
            os.replace(folder, folder.with_name(UNREADABLE + folder.name))
        logger.warning(
            "%s is damaged; its checkpoint is set aside as %s and the one "
            "before it is used.",
            damaged,
            UNREADABLE + folder.name,
        )

    def recover_if_possible(self, *args, **kwargs) -> Checkpoint | None:
        """Loads the chosen checkpoint, or the next one that can be read; None
        if there is none."""
        keys = ("importance_key", "max_key", "min_key", "ckpt_predicate")
        choice = dict(zip(keys, args, strict=False)) | kwargs
        found = self._find_sound(**choice, max_num_checkpoints=1)
        if not found:
            return None
        self.load_checkpoint(found[0])
        return found[0]

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Loads a checkpoint.

        Raises
        ------
        UserError
            If one of its files holds something else than it should.
        """
        try:
            super().load_checkpoint(checkpoint)
        except UNLOADABLE as error:
            why = str(error).strip().partition("\n")[0][:100]
            raise UserError(
                f"{checkpoint.path}: can't be loaded ({why}); move this folder "
                "away, and give the same command again: the run resumes from "
                "the checkpoint before it."
            ) from None

    def load_average(
        self, count: int, max_key: str, names: tuple[str, ...]
    ) -> int:
        """Loads the mean of the best epochs' weights.

        Arguments
        ---------
        count : int
            How many of the best, if there are as many.
        max_key : str
            The metric in their meta that ranks them.
        names : tuple of str
            The recoverables to load.

        Returns
        -------
        int
            How many there were.

        Raises
        ------
        UserError
            If there is no checkpoint.
        """
        found: dict = {}
        for checkpoint in self._find_sound(
            max_key=max_key, ckpt_predicate=lambda c: c.meta["end-of-epoch"]
        ):
            epoch = checkpoint.meta.get("epoch", checkpoint.path)
            found.setdefault(epoch, checkpoint)
        chosen = list(found.values())[:count]
        if not chosen:
            raise UserError(
                f"{self.checkpoints_dir}: there is no checkpoint to test; "
                "train first, or name the run's --output_folder."
            )
        load = functools.partial(torch.load, weights_only=True)
        for name in names:
            weights = average_checkpoints(chosen, name, load)
            self.recoverables[name].load_state_dict(weights)
        return len(chosen)


def _failure(error: Exception) -> tuple[str, str]:
    """Why a file could not be written, and what helps."""
    if isinstance(error, OSError):
        return error.strerror or str(error), cure_of(error)
    if not UNWRITTEN.search(str(error)):
        raise error
    # torch.save doesn't say why; most often the disk is full.
    why = str(error).partition("\n")[0]
    return why, cure_of(OSError(errno.ENOSPC, why))


class RunState:
    """What SpeechBrain's checkpoints lack: random states and elapsed time.

    Example
    -------
    >>> state = RunState()
    >>> state.save(getfixture("tmp_path") / "state.ckpt")
    >>> first = torch.rand(1)
    >>> state.load(getfixture("tmp_path") / "state.ckpt", end_of_epoch=True)
    >>> torch.equal(first, torch.rand(1))
    True
    """

    def __init__(self) -> None:
        self._earlier, self._started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, including those before a resume."""
        return self._earlier + time.monotonic() - self._started

    @mark_as_saver
    def save(self, path: Path) -> None:
        """Writes this process's state; each rank has its own file."""
        _, keys, *rest = np.random.get_state(legacy=True)
        state = {
            "seconds": self.seconds,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "python": random.getstate(),
            "numpy": (
                torch.from_numpy(np.asarray(keys).astype(np.int64)),
                *rest,
            ),
        }
        torch.save(state, self._own(path))

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        """Restores this process's state."""
        del end_of_epoch
        state = torch.load(self._own(path), weights_only=True)
        self._earlier = state["seconds"]
        self._started = time.monotonic()
        torch.set_rng_state(state["torch"])
        for device in range(min(torch.cuda.device_count(), len(state["cuda"]))):
            torch.cuda.set_rng_state(state["cuda"][device], device)
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        keys, *rest = state["numpy"]
        keys = keys.numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, *rest))

    @staticmethod
    def _own(path):
        rank = get_rank() or 0
        return Path(path) if rank == 0 else Path(f"{path}.rank{rank}")


register_checkpoint_hooks(RunState, save_on_main_only=False)
