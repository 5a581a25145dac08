"""Work on feature files by all cores."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread

import torch

from spkid.errors import UserError


def in_processes(work: Callable, chunks: Sequence, folder: Path) -> Generator:
    """Yields work(chunk) for each, in order, from a process for each core.

    Where no processes can be forked, this one does the work.

    Arguments
    ---------
    work : callable
        Takes a chunk; can be pickled.
    chunks : sequence
        What it takes.
    folder : pathlib.Path
        Whose files it reads, for the error.

    Raises
    ------
    UserError
        If a process was killed.

    Example
    -------
    >>> list(in_processes(abs, [-1, 2], Path("data")))
    [1, 2]
    """
    count = 1
    # Elsewhere a fork is missing or unsafe.
    if sys.platform == "linux" and hasattr(os, "fork"):
        count = min(len(os.sched_getaffinity(0)), len(chunks))
    if count > 1:
        try:
            pool = ProcessPoolExecutor(
                count, get_context("fork"), initializer=start_worker
            )
        except (OSError, NotImplementedError):  # /dev/shm is full or missing
            count = 1
    if count < 2:
        yield from map(work, chunks)
        return
    with pool:
        others = active_children()
        try:
            results: Iterator = pool.map(work, chunks)
        except OSError:  # no more processes are allowed
            for child in set(active_children()) - set(others):
                child.kill()
            results = map(work, chunks)
        try:
            yield from results
        except (BrokenExecutor, EOFError):
            raise UserError(
                f"{folder}: a process that reads its features was killed, as "
                "a system does that has no memory left; free some memory, "
                "and give the same command again."
            ) from None


def start_worker() -> None:
    """Prepares a worker process: its parent ends it, or the parent's death.

    Example
    -------
    >>> pool = ProcessPoolExecutor(1, get_context("spawn"), start_worker)
    >>> pool.shutdown()
    """
    # What the parent does on a signal is not for its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()  # type: ignore[union-attr]
    os._exit(1)
