"""Several processes: who I am, what the first one says, and waiting for each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import distributed

_Value = TypeVar("_Value")


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
