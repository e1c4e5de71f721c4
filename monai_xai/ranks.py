"""Several processes: who I am, what the first one says, and waiting for each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

_Value = TypeVar("_Value")


_PATIENCE = timedelta(days=1)
"""How long a process waits for the others: as long as their cases take. Of one that dies, the launcher ends all."""


def join() -> torch.device:
    """Join the processes that ``torchrun`` has started, if it has, and return the device of this one.

    The device is a GPU of its own, or the CPU. What tells processes of each other are the environment variables
    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, which ``torchrun`` sets.
    """
    has_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if has_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _is_several():
        distributed.init_process_group("nccl" if has_gpu else "gloo", timeout=_PATIENCE)
    return device


def leave() -> None:
    """Take leave of the other processes."""
    if _is_several():
        distributed.destroy_process_group()


def rank() -> int:
    """Return the number of this process, 0 where there is only one."""
    return distributed.get_rank() if _is_several() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if _is_several() else 1


def share(items: Sequence[_Value]) -> list[_Value]:
    """Return the items of this process: every one goes to exactly one process, and none is added to even them out.

    ``torch.utils.data.DistributedSampler`` repeats items until all processes have equally many, so that some cases come
    twice.

    Example:
        >>> share(["a", "b", "c"])  # in one process
        ['a', 'b', 'c']
    """
    return list(items[rank() :: world_size()])


def from_first(value: _Value) -> _Value:
    """Return the value that the first process has; all processes must call it."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        distributed.barrier()


def _is_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
