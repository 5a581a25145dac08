"""The one exception that a user is meant to read."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class UserError(Exception):
    """A mistake in the input that its user can mend.

    The message is one sentence that names the file, the key and the cure;
    the recipe's commands print it alone, without a traceback.

    Example
    -------
    >>> raise UserError("metadata.json: key 'speakers' is missing; add it.")
    Traceback (most recent call last):
    ...
    spkid.errors.UserError: metadata.json: key 'speakers' is missing; add it.
    """


class Problem(NamedTuple):
    """One thing that is wrong in a data folder."""

    file: str  # inside the folder
    entry: str  # the key or entry; "" for the file as a whole
    what: str
    cure: str

    def sentence(self, folder: Path) -> str:
        """The problem as the message of a :class:`UserError`.

        Arguments
        ---------
        folder : pathlib.Path
            Where the file is.

        Returns
        -------
        str

        Example
        -------
        >>> Problem("a.json", "key 'x'", "is missing", "add it").sentence(
        ...     Path("data"))
        "data/a.json: key 'x' is missing; add it."
        """
        words = f"{self.entry} {self.what}".strip()
        return f"{Path(folder, self.file).as_posix()}: {words}; {self.cure}."


def table(problems: Iterable[Problem], limit: int | None = 20) -> str:
    """Problems one below the other, in columns.

    Arguments
    ---------
    problems : iterable of Problem
        Those to show.
    limit : int, optional
        So many rows at most, and the others are counted; None: all.

    Returns
    -------
    str

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


def stop_for(problems: Iterable[Problem], folder: Path) -> None:
    """Raises UserError if there is a problem: all of them, in one message.

    Arguments
    ---------
    problems : iterable of Problem
        What was found.
    folder : pathlib.Path
        Where.

    Example
    -------
    >>> stop_for([], Path("data"))
    """
    problems = list(problems)
    if len(problems) == 1:
        raise UserError(problems[0].sentence(folder))
    if problems:
        raise UserError(
            f"{folder}: {len(problems):,} problems.\n{table(problems)}"
        )


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs a command's main function; ends the process as a user expects.

    A :class:`UserError` is printed alone, with exit code 1, and so is a full
    disk or a place that is forbidden; Ctrl-C ends with 130. Anything else is a
    defect of ours and keeps its traceback.

    Arguments
    ---------
    main : callable
        Takes the command line's arguments.

    Example
    -------
    >>> run_command(lambda arguments: None)
    """
    # A full disk would cost a traceback for each line of a log.
    logging.raiseExceptions = False
    try:
        main(sys.argv[1:])
    except UserError as error:
        # One of a loader's worker arrives with the worker's traceback.
        sentence = str(error).rpartition(f"{UserError.__name__}: ")[2]
        sys.exit(f"Error: {sentence.strip()}")
    except OSError as error:
        if error.errno in FORBIDDEN and error.filename:
            sys.exit(
                f"Error: {error.filename}: {error.strerror}; name another "
                "folder, or have this one opened to you."
            )
        if error.errno not in FULL:
            raise
        sys.exit(
            f"Error: {error.filename or 'a file'}: could not be written "
            f"({error.strerror}); free some space and give the same command "
            "again: it goes on from the last checkpoint."
        )
    except KeyboardInterrupt:
        sys.exit(130)
