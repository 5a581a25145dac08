"""What is there in place of a folder or a file that is missing."""

from __future__ import annotations

import os
import posixpath
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from spkid.errors import Problem, UserError, cure_of

AGAIN = "download it again, or remove its entry"
MISSING = "the feature file is missing"
IN_UTF8 = "set the environment variable PYTHONUTF8=1"
MOST_NAMES = 1_000_000  # of a folder are looked at; somebody may name "/"
TAIL = 4  # folders above a file that are compared


def check_folder(folder: Path, needed: str) -> None:
    """Raises UserError unless there is a folder that can be looked at.

    Arguments
    ---------
    folder : pathlib.Path
        Of any name.
    needed : str
        What must be given instead of what is no folder.

    Example
    -------
    >>> check_folder(Path("nowhere"), "name another")
    Traceback (most recent call last):
    ...
    spkid.errors.UserError: nowhere: there is no such folder; name another.
    """
    try:
        what, cure = "is not a folder", needed
        if stat.S_ISDIR(os.stat(folder).st_mode):
            return
    except (FileNotFoundError, NotADirectoryError):
        what = "there is no such folder"
    except OSError as error:
        what, cure = f"can't be opened ({error.strerror})", cure_of(error)
    except UnicodeEncodeError:  # of a YAML file; the command line's always can
        what, cure = "can't be named in this system's locale", IN_UTF8
    except ValueError:
        what = "has a NUL character"
    raise UserError(f"{folder}: {what}; {cure}.")


def can_be_named(path: str) -> bool:
    """Whether the locale of this system can write a path.

    Example
    -------
    >>> can_be_named("a.pt")
    True
    """
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def look_at(file: str) -> tuple[str, str, str]:
    """Where a feature file really is, what is wrong with it, and the cure.

    Arguments
    ---------
    file : str
        Its folder must hold no link.

    Returns
    -------
    tuple of str
        The last two are empty if it is a regular file that holds something.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> look_at(str(folder))[1]
    'is not a regular file'
    >>> look_at(str(folder / "a.pt"))[1:] == (MISSING, AGAIN)
    True
    """
    try:
        info = os.lstat(file)
        if stat.S_ISLNK(info.st_mode):
            file = os.path.realpath(file)
            info = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return file, MISSING, AGAIN
    except OSError as error:
        return file, f"can't be read ({error.strerror})", cure_of(error)
    if not stat.S_ISREG(info.st_mode):
        return file, "is not a regular file", "put the feature file there"
    if not info.st_size:
        return file, "the feature file has no bytes", AGAIN
    return file, "", ""


def explain(
    problems: Iterable[Problem], folder: Path, listed: Sequence[str]
) -> tuple[list[Problem], list[Problem]]:
    """Says what is there instead of missing feature files.

    It may differ in upper and lower case, in the form of its accents (NFC,
    NFD), in the sign between folders, in the folders above it, or in its
    suffix.

    Arguments
    ---------
    problems : iterable of Problem
        Of feature files.
    folder : pathlib.Path
        The data folder.
    listed : sequence of str
        All feature paths of the JSON files.

    Returns
    -------
    tuple of list of Problem
        The problems, in more words; or, if of several files none is there, a
        single one, apart, because this can't be skipped.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "A.PT").touch()
    >>> problem = Problem("a.pt", "", MISSING, "download it again")
    >>> (problem,), _ = explain([problem], folder, ["a.pt"])
    >>> print(problem.what, problem.cure[:20], sep="; ")
    the feature file is missing, but there is 'A.PT'; correct the JSON, or
    """
    problems = list(problems)
    lost = [p.file for p in problems if p.what == MISSING]
    if not lost:
        return problems, []
    found = _alike(folder, lost, {posixpath.normpath(path) for path in listed})
    if len(lost) == len(listed) > 1:
        path = next(iter(found), lost[0])
        what = f"none of the {len(lost):,} feature files is there, as {path!a}"
        cure = "unpack the feature files into this folder"
        if path in found:
            what += f", but there is {found[path]!a}"
            cure = _correction(path, found[path])
        return [], [Problem("", "", what, cure)]
    return [
        problem._replace(
            what=f"{MISSING}, but there is {found[problem.file]!a}",
            cure=_correction(problem.file, found[problem.file]),
        )
        if problem.what == MISSING and problem.file in found
        else problem
        for problem in problems
    ], []


def _correction(path: str, found: str) -> str:
    suffixes = {_fold(os.path.splitext(name)[1]) for name in (path, found)}
    if len(suffixes) == 1:
        return "correct the JSON, or rename the file"
    return "save it with torch.save under the JSON's name"


def _alike(folder: Path, lost: list[str], listed: set[str]) -> dict[str, str]:
    """Lost paths, and the one file of the folder, listed nowhere, that each
    must mean; none where several would do."""
    there: dict[str, list[str]] = defaultdict(list)
    for path in islice(_files(folder), MOST_NAMES):
        if path not in listed:
            for key in _keys(path):
                there[key].append(path)
    found = {}
    for path in lost:
        for key in _keys(path):
            if key in there:
                if len(there[key]) == 1:
                    found[path] = there[key][0]
                break
    claims = Counter(found.values())
    return {path: name for path, name in found.items() if claims[name] == 1}


def _files(folder: Path) -> Iterator[str]:
    """All files below a folder, as the JSON files would name them."""
    for place, _, names in os.walk(folder):
        above = Path(os.path.relpath(place, folder)).as_posix()
        yield from (posixpath.normpath(f"{above}/{name}") for name in names)


def _fold(path: str) -> str:
    path = unicodedata.normalize("NFC", path.replace("\\", "/"))
    return unicodedata.normalize("NFC", path.casefold())


def _keys(path: str) -> list[str]:
    """By what a path is found, the most exact first: its last parts, with
    the suffix and without."""
    parts = posixpath.normpath(_fold(path)).split("/")
    tails = ["/".join(parts[-n:]) for n in range(min(len(parts), TAIL), 0, -1)]
    return tails + [os.path.splitext(tail)[0] + "/" for tail in tails]
