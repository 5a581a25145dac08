"""The exceptions that a user is meant to read."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

FULL = (errno.ENOSPC, errno.EDQUOT)
# What helps against an error of the system; see cure_of().
CURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOENT: "name a place that exists",
    errno.ENOTDIR: "name a folder, not a file",
    errno.EEXIST: "name a folder, not a file",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the limit of open files",
    errno.EAGAIN: "close other programs, or raise their limit (ulimit -u)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EBUSY: "close what is using it",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the file system again",
    errno.ENOMEM: "free some memory",
    errno.ELOOP: "name a place that isn't a circle of links",
}


class UserError(Exception):
    """An error in the input that its user can fix.

    The message is one sentence that names the file, the key and the cure;
    the recipe's commands print it alone, without a traceback.

    Example
    -------
    >>> raise UserError("metadata.json: key 'speakers' is missing; add it.")
    Traceback (most recent call last):
    ...
    spkid.errors.UserError: metadata.json: key 'speakers' is missing; add it.
    """


class AudioError(UserError, ValueError):
    """A recording that can't be used, for a reason that its maker may cure.

    Example
    -------
    >>> raise AudioError("a.wav: holds no speech.")
    Traceback (most recent call last):
    spkid.errors.AudioError: a.wav: holds no speech.
    """


class Problem(NamedTuple):
    """One thing that is wrong in a data folder."""

    file: str  # inside the folder
    entry: str  # the key or entry; "" for the file as a whole
    what: str
    cure: str

    def sentence(self, folder: Path) -> str:
        """The problem in one sentence; ``folder`` is where its file is.

        Example
        -------
        >>> Problem("a.json", "key 'x'", "is missing", "add it").sentence(
        ...     Path("data"))
        "data/a.json: key 'x' is missing; add it."
        """
        words = f"{self.entry} {self.what}".strip()
        return f"{Path(folder, self.file).as_posix()}: {words}; {self.cure}."


def table(problems: Iterable[Problem], limit: int | None = 20) -> str:
    """Problems in columns, a row each.

    Arguments
    ---------
    problems : iterable of Problem
        Those to show.
    limit : int, optional
        Shows this many rows and counts the others; None: shows all.

    Example
    -------
    >>> print(table([Problem("a.json", "key 'x'", "is missing", "add it")] * 2,
    ...             limit=1))
    file    entry    what is wrong  cure
    a.json  key 'x'  is missing     add it
    and 1 more
    """
    problems = list(problems)
    rows = [("file", "entry", "what is wrong", "cure"), *problems[:limit]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if more := len(problems[limit:]) if limit else 0:
        lines.append(f"and {more:,} more")
    return "\n".join(lines)


class DataError(UserError):
    """Everything that is wrong in a data folder, in one message.

    Arguments
    ---------
    problems : iterable of Problem
        At least one.
    folder : pathlib.Path
        Where their files are.

    Example
    -------
    >>> error = DataError([Problem("a.pt", "", "is empty", "remove it")],
    ...                   Path("data"))
    >>> str(error), len(error.problems)
    ('data/a.pt: is empty; remove it.', 1)
    """

    def __init__(
        self, problems: Iterable[Problem] | str, folder: str | Path = ""
    ) -> None:
        self.folder = Path(folder)
        if isinstance(problems, str):  # as a DataLoader remakes a worker's
            self.problems = []
            super().__init__(problems)
            return
        self.problems = list(problems)
        if len(self.problems) == 1:
            message = self.problems[0].sentence(self.folder)
        else:
            message = f"{folder}: {len(self.problems):,} problems.\n"
            message += table(self.problems)
        super().__init__(message)

    def __reduce__(self) -> tuple:
        return type(self), (self.problems, self.folder)


def raise_for(problems: Iterable[Problem], folder: Path) -> None:
    """Raises DataError if there is a problem.

    Example
    -------
    >>> raise_for([], Path("data"))
    """
    if problems := list(problems):
        raise DataError(problems, folder)


def one_of(value: object, choices: Sequence[object], key: str) -> None:
    """Raises UserError unless a key's value is one of its choices.

    Example
    -------
    >>> one_of("skp", ("stop", "skip"), "on_bad_file")
    Traceback (most recent call last):
    ...
    spkid.errors.UserError: on_bad_file='skp' must be stop or skip.
    """
    if value not in choices:
        *most, last = map(str, choices)
        words = f"{', '.join(most)} or {last}" if most else last
        raise UserError(f"{key}={value!r} must be {words}.")


def cure_of(error: OSError) -> str:
    """What helps against an error of the system, in words.

    Example
    -------
    >>> cure_of(OSError(errno.ENOSPC, "No space left on device"))
    'free some space'
    """
    return CURES.get(error.errno or 0, "name another place")


def one_line(error: Any) -> str:
    """What an error says, in one line of at most 300 characters.

    Example
    -------
    >>> one_line(ValueError("a\\nb"))
    'a b'
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif hasattr(error, "problem_mark"):  # of YAML
        text = str(error.problem or error.context)
        if mark := error.problem_mark or error.context_mark:
            text += f" in line {mark.line + 1}"
    elif len(error.args) > 1:
        text = ": ".join(map(str, error.args))
    text = " ".join(text.split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def run_command(
    main: Callable[[list[str]], int | None], trouble: int = 1
) -> None:
    """Runs a command's main function and ends the process as users expect.

    A :class:`UserError` or an error of the system, as a full disk, is one
    sentence with exit status ``trouble``. Ctrl-C exits with 130, and with 141
    whoever writes to a reader that has gone, as ``head``. Anything else is a
    bug of ours and keeps its traceback.

    Arguments
    ---------
    main : callable
        Takes the command line's arguments; may give an exit status.
    trouble : int
        Exit status of an error.

    Example
    -------
    >>> run_command(lambda arguments: None)
    """
    # A full disk would cost a traceback for each line of a log.
    logging.raiseExceptions = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        # A script's first lines, for the time of its imports.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name may have letters that a terminal hasn't.
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        _end(_last_message(error), trouble)
    except MemoryError:
        _end(
            "the memory is full; close other programs, or give smaller sizes, "
            "as --batch_size or --max_frames_per_batch.",
            trouble,
        )
    except BrokenPipeError:
        if not _silence():
            raise
        sys.exit(141)
    except OSError as error:
        error = _of_worker(error)
        if error.errno not in CURES:
            raise
        _end(
            f"{error.filename or 'a file'}: {error.strerror}; "
            f"{cure_of(error)}, and give the same command again: a run "
            "resumes from its last checkpoint.",
            trouble,
        )
    except KeyboardInterrupt:
        sys.exit(130)
    if status:
        sys.exit(status)


def _end(words: str, status: int) -> NoReturn:
    """Ends the process with a sentence and an exit status."""
    if status == 1:  # that of a text
        sys.exit(f"Error: {words}")
    print(f"Error: {words}", file=sys.stderr)
    sys.exit(status)


def _last_message(error: Exception) -> str:
    """An error's message; one of a loader's worker arrives as a text with the
    worker's traceback, or several."""
    start = rf"^(?:[\w.]+\.)?{type(error).__name__}: "
    return re.split(start, str(error), flags=re.MULTILINE)[-1].strip()


def _of_worker(error: OSError) -> OSError:
    """An error of the system that arrives as a text from a loader's worker."""
    pattern = r"\[Errno (\d+)\] (.*?)(?:: '(.*)')?$"
    if error.errno or not (
        found := re.match(pattern, _last_message(error), re.DOTALL)
    ):
        return error
    number, words, name = found.groups()
    return OSError(int(number), words, name)


def _silence() -> bool:
    """Whether what a command prints has no reader; later words are dropped,
    also those at the interpreter's end."""
    if not hasattr(select, "poll"):  # Windows, which has no such error
        return False
    lost = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll = select.poll()
        poll.register(stream, 0)  # for errors alone
        if poll.poll(0):
            lost = True
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    return lost
