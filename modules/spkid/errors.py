"""The one exception that a user is meant to read."""

from __future__ import annotations

import sys
from collections.abc import Callable


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


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs a command's main function; ends the process as a user expects.

    A :class:`UserError` is printed alone, with exit code 1; Ctrl-C ends with
    130. Anything else is a defect of ours and keeps its traceback.

    Arguments
    ---------
    main : callable
        Takes the command line's arguments.

    Example
    -------
    >>> run_command(lambda arguments: None)
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        # One of a loader's worker arrives with the worker's traceback.
        sentence = str(error).rpartition(f"{UserError.__name__}: ")[2]
        sys.exit(f"Error: {sentence.strip()}")
    except KeyboardInterrupt:
        sys.exit(130)
