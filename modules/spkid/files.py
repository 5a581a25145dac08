"""Files that are whole or absent, and folders that one process owns."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import zipfile
from collections import Counter
from pathlib import Path
from typing import IO, BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from spkid.errors import DataError, Problem, UserError, cure_of

MISSING = "the file is missing"
MAX_JSON = 64 * 2**20  # bytes; parsed, up to 25 times that
MOST_REPEATED = 1000  # keys that are listed
# What JSON calls its values.
KINDS = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
KINDS |= {float: "a decimal number", bool: "a boolean", type(None): "null"}
# A file system that can't flush says so in one of these ways.
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF}


def save_atomically(content: str | bytes, path: str | Path) -> None:
    """Writes a file that is whole or absent.

    Arguments
    ---------
    content : str or bytes
        What it holds; text is written in UTF-8.
    path : str or pathlib.Path
        Where; an older file stays until the new one is on the disk. A link
        stays, and the file that it leads to is replaced.

    Raises
    ------
    UserError
        If it cannot be written, as where a pipe or a device is.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.txt"
    >>> save_atomically("hello", path)
    >>> path.read_text()
    'hello'
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(
            f"{path}: is no regular file; move it away, or name another place."
        )
    real = Path(os.path.realpath(path))
    # Two runs may write a file that they share at the same time.
    part = real.with_name(f"{real.name}.{os.getpid()}.part")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(
                content.encode() if isinstance(content, str) else content
            )
            file.flush()
            flush(file.fileno())
        os.replace(part, real)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: could not be written ({error.strerror}); "
            f"{cure_of(error)}, and give the same command again."
        ) from None


def flush(descriptor: int) -> None:
    """Flushes an open file to the disk, where the file system can do so.

    Example
    -------
    >>> with open(getfixture("tmp_path") / "a.txt", "w") as file:
    ...     flush(file.fileno())
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


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
            flush(handle)
        finally:
            os.close(handle)


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file to read its bytes; a pipe or a device is an error.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a"
    >>> _ = path.write_bytes(b"abc")
    >>> with open_regular(path) as file:
    ...     file.read()
    b'abc'
    """
    # Opening a pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb", buffering=0)


def read_bounded(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file of a bounded size.

    Raises
    ------
    OSError
        If it is missing, larger, or no regular file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a"
    >>> _ = path.write_bytes(b"abc")
    >>> read_bounded(path, most=3)
    b'abc'
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            words = f"it has {size:,} bytes, more than {most:,}"
            raise OSError(errno.EFBIG, words, str(path))
        return file.read(most)


def check_stored(file: IO[bytes]) -> int:
    """The bytes of a zip's members, none of which is more than it seems.

    Raises
    ------
    ValueError
        If members are compressed, or are larger than the file together.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.npz"
    >>> with zipfile.ZipFile(path, "w") as archive:
    ...     archive.writestr("a", "abc")
    >>> with open_regular(path) as file:
    ...     check_stored(file)
    3
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise ValueError("it is compressed, as this program writes none")
    total = sum(member.file_size for member in members)
    if total > file.seek(0, os.SEEK_END):
        raise ValueError("its members are larger than the file")
    file.seek(0)
    return total


def read_json(path: str | Path, inside: bool = False) -> dict:
    """Reads a JSON object; a key that appears twice is an error.

    Arguments
    ---------
    path : str or pathlib.Path
        A regular file of at most ``MAX_JSON`` bytes in UTF-8 or, with a byte
        order mark, UTF-16.
    inside : bool
        Whether a link must not lead out of the file's folder.

    Raises
    ------
    DataError
        With a problem for each repeated key, or for the file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.json"
    >>> _ = path.write_text('{"a": 1}')
    >>> read_json(path)
    {'a': 1}
    """
    path, repeated = Path(path), []

    def bad(what: str, cure: str = "make or download it again") -> DataError:
        return DataError([Problem(path.name, "", what, cure)], path.parent)

    def unique(pairs):
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                entry = f"key {ascii(key)[:60]}"
                what = path.name, entry, "appears twice", "keep one"
                repeated.append(Problem(*what))
                if len(repeated) > MOST_REPEATED:
                    raise bad(
                        f"has more than {MOST_REPEATED:,} keys that appear "
                        f"twice, as {ascii(key)[:60]}",
                        "keep one of each",
                    )
        return dict(pairs)

    try:
        root = os.path.join(os.path.realpath(path.parent), "")
        if inside and not os.path.realpath(path).startswith(root):
            what = "is a link that leaves its folder"
            raise bad(what, "copy the file into it")
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JSON:
                raise bad(
                    f"has {size:,} bytes, more than {MAX_JSON:,}",
                    "make it smaller",
                )
            text = file.read(size)
        content = json.loads(text, object_pairs_hook=unique)
    except FileNotFoundError:
        what = "is a link to nothing" if path.is_symlink() else MISSING
        raise bad(what, "restore it") from None
    except OSError as error:
        cure = cure_of(error)
        if error.errno == errno.EINVAL:  # a pipe, a device, a folder
            cure = "put the file itself there"
        raise bad(f"can't be read ({error.strerror})", cure) from None
    except UnicodeDecodeError:
        raise bad("isn't text in UTF-8", "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise bad(f"not valid JSON ({error})") from None
    if repeated:
        raise DataError(repeated, path.parent)
    if not isinstance(content, dict):
        raise bad(f"holds {KINDS[type(content)]}, not an object")
    return content


def lock_folder(
    folder: str | Path, key: str = "", patience: float = 0
) -> BaseFileLock | None:
    """Reserves a folder for this process while the returned lock lives.

    Two runs in one folder would both write checkpoints of the same epochs.
    The system releases the lock when the process ends, however it ends;
    worker processes don't keep it.

    Arguments
    ---------
    folder : str or pathlib.Path
        Is made if it is missing.
    key : str
        The option that names it.
    patience : float
        Seconds to wait for another process.

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
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(
            f"{folder}: another process is using it; wait until it ends, "
            + (f"or give another --{key}." if key else "and try again.")
        ) from None
    except (OSError, NotImplementedError):
        return None
    return lock
