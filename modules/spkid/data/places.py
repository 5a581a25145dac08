"""Where packs lie: built by one process, and nothing else is deleted there."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from spkid.data.pack import FRAMES, INDEX

# Each place's data folder has such a file in a pack; and while it is written.
SOURCES = "sources-????????.npy", "sources-????????.npy.*.part"
# What a build makes: a pack's name, and what tells builds apart.
PART = re.compile(r"(.*-[0-9a-f]{8}-[0-9a-f]{8})\.part-[0-9a-f]{8}")
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[bool]:
    """Waits until no other process builds a pack, and keeps others from it.

    Gives False where the file system can't lock. If nothing can be written
    there, the build says so.

    Example
    -------
    >>> with locked(getfixture("tmp_path") / "pack") as alone:
    ...     alone
    True
    """
    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: another process builds it; waiting.", target)
        lock.acquire()
    except (OSError, NotImplementedError):
        pass
    try:
        yield lock.is_locked
    finally:
        _release(lock)


def _release(lock: FileLock) -> None:
    """Who waits for the lock sees that its file is gone, and makes another."""
    if lock.is_locked:
        with contextlib.suppress(OSError):  # Windows keeps a file in use
            os.unlink(lock.lock_file)
    lock.release()


def sweep(target: Path) -> None:
    """Deletes what killed builds left beside a pack that is locked.

    A build holds its pack's lock, and loses it when it is killed.

    Example
    -------
    >>> target = getfixture("tmp_path") / "data-01234567-89abcdef"
    >>> target.with_name(f"{target.name}.part-01234567").mkdir()
    >>> with locked(target):
    ...     sweep(target)
    >>> list(target.parent.iterdir())
    []
    """
    for left in target.parent.glob("*.part-*"):
        if not (made := PART.fullmatch(left.name)):
            continue
        name = made[1]
        with contextlib.suppress(OSError, Timeout, NotImplementedError):
            if name == target.name:
                remove_pack(left)
                continue
            lock = FileLock(left.with_name(f"{name}.lock"), timeout=0)
            lock.acquire()
            try:
                remove_pack(left)
            finally:
                _release(lock)


def remove_pack(folder: Path) -> None:
    """Deletes a pack's own files, and its folder if nothing else is there.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> for name in ("index.npz", "notes.txt"):
    ...     (folder / name).touch()
    >>> remove_pack(folder)
    >>> [path.name for path in folder.iterdir()]
    ['notes.txt']
    """
    for file in (folder / INDEX, folder / FRAMES, *_sources(folder)):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sources(folder: Path) -> list[Path]:
    return [path for form in SOURCES for path in folder.glob(form)]


def publish(part: Path, target: Path) -> None:
    """Moves a pack to its place, its index, which makes it one, last.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "part").mkdir()
    >>> publish(folder / "part", folder / "pack")
    >>> (folder / "pack").is_dir()
    True
    """
    try:
        os.replace(part, target)
    except OSError:  # other files lie there
        target.mkdir(exist_ok=True)
        for file in (part / FRAMES, *_sources(part), part / INDEX):
            os.replace(file, target / file.name)
