"""Atomic checkpoints that include random states and elapsed time."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from speechbrain.utils.checkpoints import (
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
    ddp_barrier,
    ddp_broadcast,
    get_rank,
    if_main_process,
)

from spkid.distributed import gather
from spkid.errors import UserError
from spkid.files import flush_folder

logger = logging.getLogger(__name__)

SAVING, DELETING, UNREADABLE = "saving+", "deleting+", "unreadable+"


def damaged_file(folder: Path) -> Path | None:
    """The first file of a checkpoint that is empty or fails its checksums.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> torch.save(torch.zeros(1000), folder / "a.ckpt")
    >>> damaged_file(folder)
    >>> _ = (folder / "a.ckpt").write_bytes(b"PK cut off")
    >>> damaged_file(folder).name
    'a.ckpt'
    """
    for path in sorted(Path(folder).iterdir()):
        with open(path, "rb") as file:
            start = file.read(2)
        if not start:
            return path
        if start == b"PK":  # what torch.save writes; the rest is text
            try:
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return path
            except zipfile.BadZipFile:
                return path
    return None


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, safe if the process dies at any moment.

    SpeechBrain fills a checkpoint's folder under its final name; a crash
    leaves one that can't be loaded but is preferred from then on. Here a
    folder is filled under another name, flushed, and renamed, and one to be
    deleted is renamed first. A checkpoint that can't be loaded is set aside
    with a warning and the one before it is used. If one can't be saved (a full
    disk), the earlier ones stay. Arguments as in SpeechBrain.

    Example
    -------
    >>> layer = torch.nn.Linear(2, 2)
    >>> checkpointer = AtomicCheckpointer(getfixture("tmp_path"), {"m": layer})
    >>> _ = checkpointer.save_checkpoint(meta={"accuracy": 0.5})
    >>> checkpointer.recover_if_possible(max_key="accuracy").meta["accuracy"]
    0.5
    """

    def __init__(self, checkpoints_dir: str | Path, *args, **kwargs) -> None:
        super().__init__(checkpoints_dir, *args, **kwargs)
        if if_main_process():
            for prefix in (SAVING, DELETING):
                for left in self.checkpoints_dir.glob(f"{prefix}*"):
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
            Plain values by which checkpoints are chosen.
        end_of_epoch : bool
            Whether the next epoch begins with it.
        name : str, optional
            None: a time stamp.
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
        files, saved, error = {}, None, None
        try:
            part.mkdir(exist_ok=True)
            if if_main_process():
                meta = self._save_checkpoint_metafile(
                    part / METAFNAME, meta or {}, end_of_epoch
                )
            with MainProcessContext():  # within it, no rank waits
                for key, part_of_run in self.recoverables.items():
                    save = self.custom_save_hooks.get(key) or get_default_hook(
                        part_of_run, DEFAULT_SAVE_HOOKS
                    )
                    files[key] = final / f"{key}{PARAMFILE_EXT}"
                    save(part_of_run, part / files[key].name)
            flush_folder(part)
        except (OSError, RuntimeError) as caught:
            # torch.save reports a full disk as a RuntimeError.
            error = str(caught).partition("\n")[0]
        errors = [e for e in gather(error) if e is not None]
        if if_main_process():
            try:
                if not errors:
                    os.replace(part, final)
                    flush_folder(self.checkpoints_dir)
                    saved = Checkpoint(final, meta, files)
                    logger.log(verbosity, "Saved a checkpoint in %s", final)
            except OSError as caught:
                errors = [str(caught)]
            if errors:
                shutil.rmtree(part, ignore_errors=True)
                logger.error(
                    "%s: a checkpoint could not be saved (%s); the run goes "
                    "on and keeps the last good one. Free some space.",
                    self.checkpoints_dir,
                    errors[0],
                )
        ddp_barrier()
        return saved

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

    def recover_if_possible(self, *args, **kwargs) -> Checkpoint | None:
        """Loads the chosen checkpoint, or the next one that can be read; None
        if there is none."""
        while True:
            chosen = self.find_checkpoint(*args, **kwargs)
            if chosen is None:
                return None
            damaged = damaged_file(chosen.path)
            ddp_barrier()  # no rank renames what another one still reads
            if damaged is None:
                self.load_checkpoint(chosen)
                return chosen
            aside = chosen.path.with_name(UNREADABLE + chosen.path.name)
            if if_main_process():
                os.replace(chosen.path, aside)
            ddp_barrier()
            logger.warning(
                "%s is damaged; its checkpoint is set aside as %s and the one "
                "before it is used.",
                damaged,
                aside.name,
            )

    def load_average(
        self, count: int, max_key: str, names: tuple[str, ...]
    ) -> None:
        """Loads the mean of the best checkpoints' weights.

        Arguments
        ---------
        count : int
            How many of the best, if there are as many.
        max_key : str
            The metric in their meta that ranks them.
        names : tuple of str
            The recoverables to load.

        Raises
        ------
        UserError
            If there is no checkpoint.
        """
        found = self.find_checkpoints(
            max_key=max_key, max_num_checkpoints=count
        )
        if not found:
            raise UserError(
                f"{self.checkpoints_dir}: there is no checkpoint to test; "
                "train first, or name the run's --output_folder."
            )
        for name in names:
            weights = average_checkpoints(found, name)
            self.recoverables[name].load_state_dict(weights)


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
