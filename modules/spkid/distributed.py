"""What the processes of a distributed run say to each other."""

from __future__ import annotations

import torch


def gather(value: object) -> list:
    """What each rank has to say, on all ranks.

    Arguments
    ---------
    value : object
        This rank's; anything that can be pickled.

    Returns
    -------
    list
        By rank.

    Example
    -------
    >>> gather("fine")
    ['fine']
    """
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
