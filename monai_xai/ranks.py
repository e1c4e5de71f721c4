"""Several processes: who I am, what the first one says, and waiting for each other."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from monai_xai.errors import InputError, OtherProcessError, OutOfStepError

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")


_PATIENCE = timedelta(days=1)
"""How long a process waits for the others: as long as their cases take. Of one that dies, the launcher ends all."""
_steps: list[str] = []
"""What this process does in step with the others, from the outermost on."""
_tables: dict[Any, Any] = {}
"""The group at which processes meet, by the one that they belong to."""


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
        _tables.clear()
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
        distributed.broadcast_object_list(values, src=0, group=_table())
    return values[0]


def _table() -> Any:
    """Return a group at which processes meet, made at the first meeting: on CPUs, and with patience.

    That of a training waits for minutes, which is less than a case may take, and with NCCL what is told would go
    through the memory of GPUs.
    """
    own = distributed.group.WORLD
    if own not in _tables:
        _tables[own] = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    return _tables[own]


def wait_for_all(place: str) -> None:
    """Go on when every process has come here.

    Args:
        place: where this is, the same in all.

    Raises:
        OtherProcessError: if another process failed on its way here.
        OutOfStepError: if another process is elsewhere.
    """
    meet(place)


def meet(place: str, value: Any = None, failure: str | None = None) -> list[Any]:
    """Meet the other processes, and return what each brings, in their order.

    Args:
        place: where this process is in its work; all must be at the same.
        value: what it brings.
        failure: why it goes no further; the others then hear of it in place of a value.

    Raises:
        OtherProcessError: if another process failed on its way here.
        OutOfStepError: if another process is elsewhere.
    """
    if world_size() == 1:
        return [value]
    met: list[Any] = [None] * world_size()
    distributed.all_gather_object(met, (place, value, failure), group=_table())
    # So that gloo's thread has let go of what was gathered: at a program's end it waits for ever.
    distributed.barrier(group=_table())
    places, values, failures = zip(*met, strict=True)
    failed = [f"in process {number}: {words}" for number, words in enumerate(failures) if words is not None]
    if failed and failure is None:
        raise OtherProcessError("; ".join(failed))
    if not failed and len(set(places)) > 1:
        raise OutOfStepError(
            f"Processes that share the work are at different places: {list(places)}. All must explain the same "
            "cases in the same order, from data that all can read."
        )
    return list(values)


def exchange(place: str, value: _Value, device: torch.device | None = None) -> list[_Value]:
    """Meet the other processes, and return what each brings, in their order, also where it holds tensors.

    Args:
        place: where this process is in its work; all must be at the same.
        value: what it brings.
        device: where tensors come to that others had on a GPU; None: the CPU.

    Raises:
        InputError: if what it brings cannot be handed over.
        OtherProcessError: if another process failed on its way here.
        OutOfStepError: if another process is elsewhere.
    """
    if world_size() == 1:
        return [value]
    sealed = io.BytesIO()
    try:
        torch.save(value, sealed)
    except Exception as error:
        raise InputError(
            f"What this process found cannot be handed to the others ({place}): {type(error).__name__}: {error}. "
            "Classes of your own must be importable; or let every process work by itself, spread=False."
        ) from error

    def place_near(storage: Any, location: str) -> Any:
        is_here = device is not None and device.type == "cuda" and location.startswith("cuda")
        return storage.cuda(device) if is_here else storage

    return [
        torch.load(io.BytesIO(brought), map_location=place_near, weights_only=False)  # of our own processes
        for brought in meet(place, sealed.getvalue())
    ]


@dataclass(frozen=True)
class Crew:
    """Processes that share work, such as the terms of a score: each takes every n-th piece.

    Args:
        number: of this process.
        size: how many there are.
        share: part of all pieces that this one has.
    """

    number: int = 0
    size: int = 1
    share: float = 1.0

    @classmethod
    def among(cls, terms: int) -> Crew:
        """Return the processes there are, for so many pieces of work."""
        number, size = rank(), world_size()
        return cls(number, size, len(range(number, terms, size)) / max(terms, 1))

    def own(self, terms: Sequence[_Value]) -> Sequence[_Value]:
        """Return the pieces of this process."""
        return terms[self.number :: self.size]

    def each(
        self,
        items: Sequence[_Item],
        work: Callable[[_Item], _Value],
        what: str,
        *,
        along: Callable[[Sequence[_Item]], Iterable[_Item]] = iter,
        device: torch.device | None = None,
    ) -> list[_Value]:
        """Return what a function gives for every item, in their order; each is done by one process and told to all.

        If it fails in one process, the others hear of it from :func:`in_step`, within which they all are.

        Args:
            items: the same in all processes.
            work: does one of them; what it gives can be pickled.
            what: is done, and with which items: the same words in all processes.
            along: shows how far the items of this process are.
            device: where tensors of other processes come to that were on a GPU there; None: the CPU.
        """
        done = [work(item) for item in along(self.own(items))]
        if self.size == 1:
            return done
        parts = exchange(what, done, device)
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def tell(self, what: str, value: _Value) -> list[_Value]:
        """Return what each process says, in their order; each must say something."""
        return [value] if self.size == 1 else exchange(what, value)

    def place(self, number: int) -> int:
        """Return the number among all pieces of one that this process has."""
        return self.number + number * self.size

    def total(self, x: Tensor, what: str) -> Tensor:
        """Return the sum over all processes, which must all ask for it."""
        if self.size == 1:
            return x
        on_gpu = distributed.get_backend() == "nccl"
        total = x.detach().to("cuda" if on_gpu else "cpu")
        total = total.clone(memory_format=torch.contiguous_format)
        meet(f"{what} {tuple(x.shape)}")
        distributed.all_reduce(total)
        return total.to(x.device)


def agree(place: str, numbers: Sequence[float] = ()) -> None:
    """Meet the other processes, with numbers that must be the same in all but for rounding.

    Raises:
        OtherProcessError: if another process failed on its way here.
        OutOfStepError: if some process is elsewhere, or has other numbers; in all of them.
    """
    met = meet(place, list(numbers))
    for other in met[1:]:
        if not same_numbers(met[0], other):
            apart = [
                pair for pair in zip(met[0], other, strict=False) if not same_numbers(*([n] for n in pair))
            ]
            raise OutOfStepError(
                f"Processes that share the work on {place} have different data, such as "
                f"{' and '.join(map(str, apart[0])) if apart else f'{len(met[0])} and {len(other)} numbers'}. All must "
                "have the same cases in the same order, and the same weights."
            )


@contextmanager
def in_step(place: str, numbers: Sequence[float] = ()) -> Iterator[None]:
    """Work on something together; if one process fails, so do the others, and none waits.

    Args:
        place: what is worked on, the same in all.
        numbers: what must be the same in all but for rounding.

    Raises:
        OtherProcessError: if another process failed.
        OutOfStepError: if another process is at something else.
    """
    agree(place, numbers)
    if _steps:  # the outermost tells of what fails, and waits for the others
        yield
        return
    _steps.append(place)
    try:
        yield
        meet(f"the end of {place}")
    except (OtherProcessError, OutOfStepError):
        raise
    except Exception as error:
        meet(place, failure=f"{type(error).__name__}: {error}")
        raise
    finally:
        _steps.clear()


def numbers_of(x: Tensor) -> list[float]:
    """Return numbers by which a tensor is known again: standardized ones are told apart by the second."""
    sizes = x.detach().double().abs().flatten()
    places = torch.arange(len(sizes), dtype=sizes.dtype, device=sizes.device) / max(len(sizes), 1)
    return [float(sizes.sum()), float(sizes @ places)]


def same_numbers(some: Sequence[float], others: Sequence[float]) -> bool:
    """Tell whether numbers are the same but for rounding."""
    return len(some) == len(others) and all(map(_alike, some, others))


def _alike(one: float, other: float) -> bool:
    """Tell whether two numbers are the same but for rounding, or neither is one."""
    return math.isclose(one, other, rel_tol=1e-5) or (math.isnan(one) and math.isnan(other))


def _is_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
