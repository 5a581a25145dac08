"""What the processes of a distributed run tell each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def rank() -> int:
    """This process's number, from 0; 0 where it is alone.

    Example
    -------
    >>> rank()
    0
    """
    alone = not torch.distributed.is_initialized()
    return 0 if alone else torch.distributed.get_rank()


def world_size() -> int:
    """Number of processes; 1 where this one is alone.

    Example
    -------
    >>> world_size()
    1
    """
    alone = not torch.distributed.is_initialized()
    return 1 if alone else torch.distributed.get_world_size()


def gather(value: Any) -> list:
    """Collects a picklable value of each process, on all of them.

    Returns
    -------
    list
        By rank.

    Example
    -------
    >>> gather("fine")
    ['fine']
    """
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def first_process_first() -> Iterator[None]:
    """Lets the first process finish before the others begin.

    Example
    -------
    >>> with first_process_first():
    ...     "the first one writes what the others then find"
    'the first one writes what the others then find'
    """
    if rank() > 0:
        torch.distributed.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        torch.distributed.barrier()
