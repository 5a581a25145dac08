"""Files that are whole or absent, and a folder that has one owner."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from spkid.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def save_atomically(content: str | bytes, path: Path) -> None:
    """Writes a file that is whole or absent.

    Arguments
    ---------
    content : str or bytes
        What it holds; text is written in UTF-8.
    path : pathlib.Path
        Where; what was there before stays until the new one is on the disk.

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
    # Two runs may write what they share at the same time.
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
            "or mend the permissions, and give the same command again."
        ) from None


def flush_folder(folder: Path) -> None:
    """Sees a folder's files, and their names, onto the disk.

    Arguments
    ---------
    folder : pathlib.Path
        The folder.

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


def lock_folder(folder: Path) -> None:
    """Takes a folder for this process, until it ends, however it ends.

    Two runs in one folder would write checkpoints of the same epochs, and the
    mean of the best ones would count some twice. A record lock, since worker
    processes don't inherit it; none on Windows, nor where none can be had.

    Arguments
    ---------
    folder : pathlib.Path
        Is made if it is missing.

    Raises
    ------
    UserError
        If another process has it.

    Example
    -------
    >>> lock_folder(getfixture("tmp_path"))
    """
    if fcntl is None:
        return
    handle = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Never closed: that would give the folder back.
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # who can't write there will say so
        if handle is not None and error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{folder}: another process is at work in it; wait until it "
                "ends, or give another --output_folder."
            ) from None
