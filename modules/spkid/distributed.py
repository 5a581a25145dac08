"""What the processes of a distributed run tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from speechbrain.core import RunOptions
from speechbrain.utils.distributed import ddp_init_group

from spkid.errors import UserError


def join_group(options: RunOptions) -> None:
    """Joins the other processes, if torchrun or Slurm has started several.

    Raises
    ------
    UserError
        If they can't be reached, or the backend can't be used.

    Example
    -------
    >>> join_group(RunOptions())
    """
    try:
        ddp_init_group(options)
    except (ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[-1].rstrip(".!")
        raise UserError(
            f"The processes can't form a group ({why}); check MASTER_ADDR, "
            "MASTER_PORT, RANK, LOCAL_RANK and WORLD_SIZE, or give another "
            "--distributed_backend, as gloo."
        ) from None


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
def together() -> Iterator[None]:
    """In a distributed run, an error of one process is an error of all.

    Example
    -------
    >>> with together():
    ...     "each process does its part"
    'each process does its part'
    """
    error = None
    try:
        yield
    except (UserError, OSError) as caught:
        error = caught
    errors = [each for each in gather(error and str(error)) if each]
    if error is not None:
        raise error
    if errors:
        raise UserError(errors[0])


def on_first(function: Callable, *arguments: Any) -> Any:
    """Calls a function in the first process, while the others wait.

    Returns
    -------
    Any
        What it returns; None in the others.

    Example
    -------
    >>> on_first(max, 1, 2)
    2
    """
    with together():
        return function(*arguments) if rank() == 0 else None
