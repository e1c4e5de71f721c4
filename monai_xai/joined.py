"""Parts of inputs that go through the network together, as many to a call as memory holds.

Whoever wants scores or gradients says lazily of which parts (whole images, windows); here they fill batches together,
whichever window or perturbation they come from.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from monai_xai.memory import GIB, LiveTensors
from monai_xai.terms import Cuts, Tensors, Term, pull_back, trace_inputs
from monai_xai.trials import Batches, Key, Trial

Result = TypeVar("Result")
Returned = TypeVar("Returned")
Gradient = tuple[Tensor, Tensors]

ON_CPU = 1 / 16
"""GiB that a batch with its graph is to fill on a CPU, if nothing is said: far larger ones fall out of its caches."""
ON_CPU_WITHOUT_GRAPH = 1 / 32
"""The same of a batch without a graph, whose memory is written over and over."""
OF_GPU = 1 / 4
"""Share of a GPU's free memory that a batch may take, if nothing is said."""
MOST_PARTS = 64
"""Most parts of a batch: more do not make a call cheaper."""

_FEW = 3  # parts: up to here, calls alone are no more than a batch of them and two looks at it

AHEAD = 3
"""How far computations that run side by side may be apart."""


Asking = Generator[list[Trial[Any]], list[Gradient], Returned]
"""A computation that asks for gradients in turn: it yields trials and gets scores and gradients of each."""


class OutOfMemoryWarning(UserWarning):
    """A batch did not fit into memory; half of it is tried from now on."""


class Joined(ABC, Generic[Result]):
    """What trials give, in their order, from as few calls of the network as memory allows.

    How many make a batch is found once, from what the first call holds at its peak. It does not change the results but
    for rounding: that the parts of a batch do not influence each other is checked once, and where they do (batch
    statistics), or the network takes no batch of this size, each part is a call of its own.

    Args:
        memory_gib: what a batch may take. None: a quarter of what is free on a GPU; on a CPU, as many parts as it takes
            to fill what is quickest. A part that takes more goes alone.

    Attributes:
        evaluations: how many parts went through the network.
        at_work: the trials that are in the network, also after an error in it.
    """

    _on_cpu: ClassVar[float] = ON_CPU
    """GiB that a batch is to fill on a CPU, if nothing is said."""
    _measures_one: ClassVar[bool] = False
    """Whether a trial that comes alone is measured, for which no batch is made."""

    def __init__(self, memory_gib: float | None = None) -> None:
        self.evaluations = 0
        self.at_work: Sequence[Trial[Any]] = ()
        self._memory_gib = memory_gib
        self._size = 0
        self._bytes = 0.0
        self._is_checked = False
        self._known: _Known[Result] | None = None
        self._batches = Batches()

    def __call__(
        self, trials: Iterable[Trial[Key]], *, goes_on: bool = False
    ) -> Iterator[tuple[Key, Result]]:
        """Yield the key of each trial with what it gives.

        Args:
            trials: as many as there are.
            goes_on: whether there will be more calls for more of them.
        """
        waiting: list[Trial[Key]] = []
        for trial in trials:
            if waiting and not self._size:
                yield from self._measured(waiting)
            if waiting and not (len(waiting) < self._size and waiting[0].fits(trial)):
                yield from zip([w.key for w in waiting], self._together(waiting), strict=True)
                waiting = []
            if trial.term.joins_batches:
                waiting.append(trial)
            else:
                yield trial.key, self._call([trial])[0]
        if waiting and not self._size and self._measures_one:
            yield from self._measured(waiting)
        if waiting:
            rest = self._together(waiting) if goes_on else self._rest(waiting)
            yield from zip([w.key for w in waiting], rest, strict=True)

    def _measured(self, waiting: list[Trial[Key]]) -> Iterator[tuple[Key, Result]]:
        """Find how many trials like the first one make a batch; yield what it gives, if no batch is held against it."""
        trial = waiting[0]
        with LiveTensors() as live:
            result = self._alone(trial)
        needed = live.peak + trial.nbytes
        self._bytes = self._room(trial, needed)
        self._size = max(1, min(MOST_PARTS, int(self._bytes // needed)))
        if self._size == 1 or not trial.varies:
            yield waiting.pop(0).key, result
        else:
            self._known = _Known(trial, result)

    def _room(self, trial: Trial[Any], needed: int) -> float:
        """Return how many bytes a batch may take, of which one part needs some."""
        if self._memory_gib is not None:
            return self._memory_gib * GIB
        device = trial.like[0].device
        if device.type == "cuda":
            return OF_GPU * torch.cuda.mem_get_info(device)[0]
        return math.ceil(self._on_cpu * GIB / needed) * needed

    def _together(self, trials: Sequence[Trial[Any]]) -> list[Result]:
        """Return what trials give that fit together."""
        if self._is_checked:
            return self._in_batches(trials)
        return self._checked(trials) if len(trials) > 1 else self._one_by_one(trials)

    def _rest(self, trials: Sequence[Trial[Any]]) -> list[Result]:
        """Return what the last trials give: where they are few, a look at their batch costs more than it saves."""
        few = not self._is_checked and len(trials) <= _FEW
        return self._one_by_one(trials) if few else self._together(trials)

    def _one_by_one(self, trials: Sequence[Trial[Any]]) -> list[Result]:
        results = [self._alone(trial) for trial in trials]
        self._known = None
        return results

    def _checked(self, trials: Sequence[Trial[Any]]) -> list[Result]:
        """Return results, after a look whether what a part gives depends on what else is in its batch.

        Two parts that differ are asked for alone as well. Of one, nothing shows where it is the very part that the
        others depend on, as the one with the largest value, or the first of a batch; and nothing of one that is
        constant, such as empty background.
        """
        try:
            results = self._in_batches(trials)
        except Exception as error:
            if isinstance(error, RuntimeError) and _is_out_of_memory(error):
                raise
            self._size = 1  # made for a batch of its own size; an error that has another cause comes again
            return self._in_batches(trials)
        if self._size < len(trials):
            return results  # memory did not hold the batch: the next one is looked at
        probes = self._probes(trials)
        for number in probes:
            trial = trials[number]
            alone = self._alone(trial)
            if not self._agree(alone, results[number]):
                self._is_checked = True
                self._distrust(trial, alone)
                self._size = 1
                return self._in_batches(trials)
        self._is_checked = len(probes) == 2
        self._known = None
        return results

    def _probes(self, trials: Sequence[Trial[Any]]) -> list[int]:
        """Return the numbers of two trials that show whether the parts of a batch influence each other, or of one."""
        varied = [number for number, trial in enumerate(trials) if trial.varies]
        if not varied:
            return [len(trials) - 1]
        first, rest = varied[-1], varied[:-1]
        if self._known and self._known.trial is trials[varied[0]]:
            first, rest = varied[0], varied[:0:-1]  # known already, and the others from the last on
        differing = (number for number in rest if trials[number].differs(trials[first]))
        return [first, *itertools.islice(differing, 1)]

    def _alone(self, trial: Trial[Any]) -> Result:
        """Return what a trial gives with nothing beside it, which may be known already."""
        known = self._known
        return known.result if known and known.trial is trial else self._call([trial])[0]

    def _distrust(self, trial: Trial[Any], result: Result) -> None:
        """Take note of a trial that gave something else in its batch than alone."""

    def _in_batches(self, trials: Sequence[Trial[Any]]) -> list[Result]:
        """Return what each trial gives; where memory does not hold a batch, from smaller ones."""
        while True:
            size = max(1, min(self._size, len(trials)))
            try:
                batches = (trials[start : start + size] for start in range(0, len(trials), size))
                return [r for batch in batches for r in self._call(batch)]
            except RuntimeError as error:
                if size == 1 or not _is_out_of_memory(error):
                    raise
            self._size = size // 2
            warnings.warn(
                f"Memory does not hold a batch of {size} inputs; going on with {self._size}.",
                OutOfMemoryWarning,
                stacklevel=2,
            )

    def _call(self, trials: Sequence[Trial[Any]]) -> list[Result]:
        """Return what each trial gives, from one call of the network."""
        self.evaluations += len(trials)
        self.at_work = trials
        results = self._ask(trials)
        self.at_work = ()
        return results

    @abstractmethod
    def _ask(self, trials: Sequence[Trial[Any]]) -> list[Result]:
        """Return what each trial gives, from one call of the network."""

    @staticmethod
    @abstractmethod
    def _agree(one: Result, other: Result) -> bool:
        """Tell whether two results are the same but for rounding."""


class JoinedScores(Joined[Tensor]):
    """The scores of trials, each of shape (n,), without a graph."""

    _on_cpu = ON_CPU_WITHOUT_GRAPH

    def _ask(self, trials: Sequence[Trial[Any]]) -> list[Tensor]:
        first = trials[0]
        if len(trials) == 1:
            return [first.term(first.part)]
        inputs, selection = self._batches.of(trials)
        with torch.no_grad():
            scores: Tensor = first.term.function(*inputs, *selection)
        return list(scores.clone().split([len(trial.like[0]) for trial in trials]))

    @staticmethod
    def _agree(one: Tensor, other: Tensor) -> bool:
        """Tell whether scores are the same up to half of their digits."""
        tolerance = torch.finfo(one.dtype).eps ** 0.5
        largest = float(one.abs().nan_to_num().max())
        return torch.allclose(one, other, rtol=0, atol=tolerance * largest, equal_nan=True)


class JoinedGradients(Joined[Gradient]):
    """The scores of trials, each of shape (n,), and their gradients with respect to every input of the part.

    The first warns of a network that cuts its own graph.
    """

    _ALIKE: ClassVar[float] = 0.01
    """Share of its norm by which a gradient may differ: where ReLU switches, rounding moves single values far."""

    def __init__(self, memory_gib: float | None = None) -> None:
        super().__init__(memory_gib)
        self._is_watched = False
        self._running = 1

    def _ask(self, trials: Sequence[Trial[Any]]) -> list[Gradient]:
        first = trials[0]
        inputs, selection = (
            self._batches.of(trials) if len(trials) > 1 else (tuple(first.part), first.term.selection())
        )
        scores, leaves = self._trace(first.term, inputs, selection)
        sizes = [len(trial.like[0]) for trial in trials]
        columns = zip(*(g.split(sizes) for g in pull_back(scores, leaves)), strict=True)
        return list(zip(scores.detach().split(sizes), columns, strict=True))

    def _trace(self, term: Term, inputs: Tensors, selection: Tensors) -> tuple[Tensor, list[Tensor]]:
        if self._is_watched:
            return trace_inputs(term.function, inputs, selection)
        with Cuts() as cuts:
            found = trace_inputs(term.function, inputs, selection)
        self._is_watched = True
        cuts.warn(term.network)
        return found

    @classmethod
    def _agree(cls, one: Gradient, other: Gradient) -> bool:
        if not JoinedScores._agree(one[0], other[0]):
            return False
        pairs = zip(one[1], other[1], strict=True)
        return all(bool((a - b).norm() <= cls._ALIKE * a.norm()) or bool(a.isnan().any()) for a, b in pairs)

    @property
    def at_once(self) -> int:
        """How many parts it is worth to ask for at a time, beside others that run: they are held besides the batch."""
        return max(self._size // (2 * self._running), 1) if self._size else 2

    def side_by_side(self, routines: Iterable[Asking[Returned]], held: float) -> Iterator[Returned]:
        """Run computations that ask for gradients in turn, so that several share a call of the network.

        Args:
            routines: begun when their turn comes.
            held: how many bytes one of them may hold on to: no more run at a time than the memory of a batch holds.

        Yields:
            What they return, in the order in which they end. None begins before all are known that come
            :data:`AHEAD` or more before it, so that what it takes from these does not depend on memory.
        """
        waiting = enumerate(routines)
        running: dict[int, tuple[Asking[Returned], list[Trial[Any]]]] = {}
        begun = 0
        while True:
            most = max(1, min(self._size, int(self._bytes // held)))
            while (
                len(running) < most
                and begun - min(running, default=begun) < AHEAD
                and (new := next(waiting, None))
            ):
                number, routine = new
                running[number] = routine, next(routine)
                begun = number + 1
            if not running:
                return
            self._running = len(running)
            answers: dict[int, list[Gradient]] = {number: [] for number in running}
            asked = (Trial(n, t.term, t.part) for n, (_, trials) in running.items() for t in trials)
            for number, found in self(asked, goes_on=True):
                answers[number].append(found)
            for number, answer in answers.items():
                routine, _ = running.pop(number)
                try:
                    running[number] = routine, routine.send(answer)
                except StopIteration as end:
                    yield end.value


@dataclass(frozen=True)
class _Known(Generic[Result]):
    """What a trial gives with nothing beside it."""

    trial: Trial[Any]
    result: Result


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
