"""Files that are whole or absent, and folders that one process owns."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from spkid.errors import UserError


def save_atomically(content: str | bytes, path: str | Path) -> None:
    """Writes a file that is whole or absent.

    Arguments
    ---------
    content : str or bytes
        What it holds; text is written in UTF-8.
    path : str or pathlib.Path
        Where; an older file stays until the new one is on the disk.

    Raises
    ------
    UserError
        If it cannot be written.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.txt"
    >>> save_atomically("hello", path)
    >>> path.read_text()
    'hello'
    """
    path = Path(path)
    # Two runs may write a file that they share at the same time.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(
                content.encode() if isinstance(content, str) else content
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: could not be written ({error.strerror}); free the space "
            "or fix the permissions, and give the same command again."
        ) from None


def flush_folder(folder: Path) -> None:
    """Flushes a folder's files, and their names, to the disk.

    Example
    -------
    >>> flush_folder(getfixture("tmp_path"))
    """
    if os.name == "nt":  # folders can't be opened there
        return
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(path: str | Path) -> dict:
    """Reads a JSON object; a key that appears twice is an error.

    Raises
    ------
    UserError
        If the file is missing, isn't JSON, isn't an object or repeats a key.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.json"
    >>> _ = path.write_text('{"a": 1}')
    >>> read_json(path)
    {'a': 1}
    """

    def unique(pairs):
        counts = Counter(key for key, _ in pairs)
        if repeated := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"key {repeated[0]!a} appears twice")
        return dict(pairs)

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; restore it.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); make or download it again."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, not an object; make "
            "or download it again."
        )
    return content


def lock_folder(folder: str | Path) -> BaseFileLock | None:
    """Reserves a folder for this process while the returned lock lives.

    Two runs in one folder would both write checkpoints of the same epochs.
    The system releases the lock when the process ends, however it ends;
    worker processes don't keep it.

    Arguments
    ---------
    folder : str or pathlib.Path
        Is made if it is missing.

    Returns
    -------
    filelock.BaseFileLock, optional
        None where the file system has no locks, or forbids to write: who
        writes there next gets the error.

    Raises
    ------
    UserError
        If another process holds it.

    Example
    -------
    >>> lock = lock_folder(getfixture("tmp_path"))
    >>> lock.is_locked
    True
    """
    folder = Path(folder)
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder}: another process is using it; wait until it ends, or "
            "give another --output_folder."
        ) from None
    except (OSError, NotImplementedError):
        return None
    return lock
