"""Seconds and additional peak memory of a piece of work, each measured in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from monai_xai.memory import GIB, PeakMemory

T = TypeVar("T")

LONG = 12.0  # seconds, from which on one run is enough


class Cost(NamedTuple):
    """What a piece of work took.

    Args:
        seconds: wall time.
        memory: additional peak memory in GiB, over what was there before.
        note: a result worth keeping beside the cost.
    """

    seconds: float
    memory: float
    note: float = 0.0


def measure(work: Callable[[], float]) -> Cost:
    """Run work in this process and return what it took (Linux: the peak is reset before it).

    Memory is of the first run. Work of a few seconds is run again, and its quickest run counts, since the first one
    also chooses kernels and maps memory.
    """
    with PeakMemory() as peak:
        seconds, note = _timed(work)
    repeats = int(LONG // seconds)
    return Cost(min([seconds, *(_timed(work)[0] for _ in range(repeats))]), peak.gib, note)


def seconds_in_turn(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median time of each of several pieces of work, run one after the other, in rounds after a first.

    A machine that others use too is slower for minutes at a time: in turn, that falls on all of them.
    """
    times = [[_timed(work)[0] for work in works] for _ in range(rounds + 1)]
    return [statistics.median(taken) for taken in zip(*times[1:], strict=True)]


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    note = work()
    return time.perf_counter() - start, note


def measure_apart(case: str, *, limit_gib: float | None = None) -> Cost | None:
    """Measure a case of :mod:`benchmarks.cases` in a fresh process; None if it does not live through it.

    It runs twice: for seconds as it is, and for memory with freed blocks of more than a mebibyte going back to the
    system at once (glibc keeps up to 32 otherwise), so that the peak is of what is alive and not of holes in the heap.
    Giving back costs time, so that one run cannot measure both.
    """
    timed = _run(case, {}, limit_gib)
    held = timed and _run(case, {"MALLOC_MMAP_THRESHOLD_": str(2**20)}, limit_gib)
    return timed._replace(memory=held.memory) if timed and held else None


def _run(case: str, settings: dict[str, str], limit_gib: float | None) -> Cost | None:

    def limit() -> None:
        if limit_gib is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * GIB),) * 2)

    command = [sys.executable, "-m", "benchmarks", "--case", case]
    environment = {**os.environ, **settings}
    result = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=limit, env=environment, check=False)
    return Cost(*json.loads(result.stdout)) if result.returncode == 0 else None
