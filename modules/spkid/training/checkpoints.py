"""Checkpoints that are whole or absent, and that hold all that a run is."""

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

    Arguments
    ---------
    folder : pathlib.Path
        The checkpoint.

    Returns
    -------
    pathlib.Path, optional
        None if all is well.

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


def check_identity(path: Path, theirs: dict, ours: dict) -> None:
    """Raises UserError if a run would go on as another run.

    Arguments
    ---------
    path : pathlib.Path
        Where the earlier run's identity was found.
    theirs, ours : dict
        What the run was begun with, and what it would go on with. A value
        that begins with "yaml " is a digest; ``data`` is one, too, of what
        was in ``data_folder``, which isn't compared.

    Example
    -------
    >>> check_identity(Path("results"), {"seed": 1}, {"seed": 1})
    """
    for key, value in ours.items():
        if key == "data_folder" or theirs.get(key) == value:
            continue  # the same data may lie elsewhere now
        begun, cure = f"{key}={theirs.get(key)}, not {value}", ""
        if key == "data":
            begun = f"other data, those of {theirs.get('data_folder')}"
        elif str(value).startswith("yaml "):
            begun = f"another '{key}' in its YAML file"
        else:
            cure = f"go on with {theirs.get(key)}, or "
        raise UserError(
            f"{path}: this run was begun with {begun}; {cure}give another "
            "--output_folder to begin anew."
        )


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, safe against a death at any moment.

    SpeechBrain fills a checkpoint's folder under its final name, so a crash
    leaves one that is preferred from then on and cannot be loaded. Here it is
    filled under another name, flushed, and renamed; deleted ones are renamed
    first, too. A checkpoint that cannot be loaded is set aside, with a
    warning, and the one before is used; one that cannot be saved (a full
    disk) leaves those before it alone. Arguments as in SpeechBrain.

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

        In SpeechBrain's, a rank that can't write leaves the others waiting.

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
            None where it could not be saved, and on ranks but the first.
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
            with MainProcessContext():  # in it, no rank waits for another
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
        """As SpeechBrain's, whose deletion goes by the class, not by self."""
        original = Checkpointer._delete_checkpoint
        Checkpointer._delete_checkpoint = staticmethod(self._delete_checkpoint)
        try:
            super().delete_checkpoints(**kwargs)
        finally:
            Checkpointer._delete_checkpoint = original

    def recover_if_possible(self, *args, **kwargs) -> Checkpoint | None:
        """Loads the chosen checkpoint, or the next one that can be read.

        Returns
        -------
        Checkpoint, optional
            None if there is none.
        """
        while True:
            chosen = self.find_checkpoint(*args, **kwargs)
            if chosen is None:
                return None
            damaged = damaged_file(chosen.path)
            ddp_barrier()  # nobody renames what another one still reads
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
            So many of the best, or as many as there are.
        max_key : str
            The metric in their meta by which they rank.
        names : tuple of str
            The recoverables to load; the others stay as they are.

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
    """What SpeechBrain's checkpoints lack: random states, the time spent, and
    what the run may not change when it goes on.

    Arguments
    ---------
    identity : dict
        Plain values that must be the same when a run resumes (data, seed,
        number of processes, ...).

    Example
    -------
    >>> state = RunState({"seed": 1})
    >>> state.save(getfixture("tmp_path") / "state.ckpt")
    >>> first = torch.rand(1)
    >>> state.load(getfixture("tmp_path") / "state.ckpt", end_of_epoch=True)
    >>> torch.equal(first, torch.rand(1))
    True
    """

    def __init__(self, identity: dict | None = None) -> None:
        self.identity = identity or {}
        self._earlier, self._started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, those before a resume included."""
        return self._earlier + time.monotonic() - self._started

    @mark_as_saver
    def save(self, path: Path) -> None:
        """Writes this process's state; each rank has a file of its own."""
        _, keys, *rest = np.random.get_state()
        state = {
            "identity": self.identity,
            "seconds": self.seconds,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "python": random.getstate(),
            "numpy": (torch.from_numpy(keys.astype(np.int64)), *rest),
        }
        torch.save(state, self._own(path))

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        """Restores this process's state.

        Raises
        ------
        UserError
            If the checkpoint belongs to a run of another identity.
        """
        del end_of_epoch
        state = torch.load(self._own(path), weights_only=True)
        check_identity(Path(path).parent, state["identity"], self.identity)
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
