"""Scores at many perturbed inputs, as many to a call of the network as memory holds.

Perturbation methods and deletion curves say lazily which parts of the inputs (whole images, windows) they want to know
the score of; here they fill batches together, whichever window or perturbation they come from.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from monai_xai.errors import AttributionError, UnsupportedNetworkError
from monai_xai.forward import Scoring, Tensors, Term
from monai_xai.memory import GIB, LiveTensors

Key = TypeVar("Key")

ON_CPU = 1 / 16
"""GiB of a batch on a CPU, if nothing is said: as measured, larger ones fall out of its caches and are slower."""
OF_GPU = 1 / 4
"""Share of a GPU's free memory that a batch may take, if nothing is said."""
MOST_PARTS = 64
"""Most parts of a batch: more do not make a call cheaper."""


class Trial(NamedTuple, Generic[Key]):
    """A part of perturbed inputs whose score is asked for.

    Args:
        key: what it is to whoever asks.
        term: whose part it is.
        part: what the term sees.
    """

    key: Key
    term: Term
    part: Tensors


class OutOfMemoryWarning(UserWarning):
    """A batch did not fit into memory; half of it is tried from now on."""


class PerturbedScores:
    """The scores of trials, in their order, from as few calls of the network as memory allows.

    How many make a batch is found once, from what the first call holds at its peak. It does not change the scores but
    for rounding: that the parts of a batch do not influence each other is checked once, and where they do (batch
    statistics), or the network takes no batch of this size, each part is a call of its own.

    Args:
        memory_gib: what a batch may take; None: what is quickest on a CPU, a quarter of what is free on a GPU.

    Attributes:
        evaluations: how many parts went through the network.

    Raises:
        AttributionError: if ``memory_gib`` does not hold one part, saying how much is needed.
        UnsupportedNetworkError: if the same part gets another score each time.
    """

    def __init__(self, memory_gib: float | None = None) -> None:
        self.evaluations = 0
        self._memory_gib = memory_gib
        self._size = 0
        self._is_checked = False
        self._kept: dict[int, Tensor] = {}

    def __call__(self, trials: Iterable[Trial[Key]]) -> Iterator[tuple[Key, Tensor]]:
        """Yield the key of each trial with its scores, shape (n,)."""
        waiting: list[Trial[Key]] = []
        for trial in trials:
            if waiting and not (len(waiting) < self._size and _fit_together(waiting[0], trial)):
                yield from self._evaluate(waiting)
                waiting = []
            if not trial.term.joins_batches:
                yield trial.key, self._call([trial])[0]
            elif not self._size:
                yield trial.key, self._find_size(trial)
            else:
                waiting.append(trial)
        if waiting:
            yield from self._evaluate(waiting)

    def _find_size(self, trial: Trial[Key]) -> Tensor:
        """Return the scores of a first trial, and keep how many like it make a batch."""
        with LiveTensors() as live:
            score = self._call([trial])[0]
        needed = live.peak + sum(x.nbytes for x in trial.part)
        self._size = max(1, min(MOST_PARTS, int(self._room(trial, needed) // needed)))
        return score

    def _room(self, trial: Trial[Key], needed: int) -> float:
        """Return how many bytes a batch may take."""
        if self._memory_gib is None:
            device = trial.part[0].device
            is_gpu = device.type == "cuda"
            return OF_GPU * torch.cuda.mem_get_info(device)[0] if is_gpu else ON_CPU * GIB
        if self._memory_gib * GIB < needed:
            raise AttributionError(
                f"memory_gib={self._memory_gib:.3g} does not hold one call of the network on inputs "
                f"{[tuple(x.shape) for x in trial.part]}, which takes {needed / GIB:.3g} GiB. Allow that much, or use "
                "smaller windows."
            )
        return self._memory_gib * GIB

    def _evaluate(self, trials: Sequence[Trial[Key]]) -> Iterator[tuple[Key, Tensor]]:
        """Yield the scores of trials that fit together."""
        scores = self._scores(trials) if self._is_checked or len(trials) == 1 else self._checked(trials)
        for trial, score in zip(trials, scores, strict=True):
            yield trial.key, score

    def _checked(self, trials: Sequence[Trial[Key]]) -> list[Tensor]:
        """Return scores, after a look whether a part's score depends on what else is in its batch.

        The last part is asked for alone as well: what a network takes from the first of a batch would not show in it.
        """
        try:
            scores = self._scores(trials)
        except Exception as error:
            if isinstance(error, RuntimeError) and _is_out_of_memory(error):
                raise
            self._size = 1  # made for a batch of its own size; an error that has another cause comes again
            return self._scores(trials)
        if self._size < len(trials):
            return scores  # memory did not hold the batch: the next one is looked at
        self._is_checked = True
        alone = self._call(trials[-1:])[0]
        if _agree(alone, scores[-1]):
            return scores
        again = self._call(trials[-1:])[0]
        if not _agree(alone, again):
            raise UnsupportedNetworkError(
                f"The network scores the same input {alone.tolist()} and then {again.tolist()}: it keeps something "
                "from call to call, or draws random numbers, so that effects of perturbations mean nothing."
            )
        self._size = 1
        return self._scores(trials)

    def _scores(self, trials: Sequence[Trial[Any]]) -> list[Tensor]:
        """Return the scores of each trial; where memory does not hold a batch, from smaller ones."""
        while True:
            size = min(self._size, len(trials))
            try:
                batches = (trials[start : start + size] for start in range(0, len(trials), size))
                return [score for batch in batches for score in self._call(batch)]
            except RuntimeError as error:
                if size == 1 or not _is_out_of_memory(error):
                    raise
            self._size = size // 2
            warnings.warn(
                f"Memory does not hold a batch of {size} perturbed inputs; going on with {self._size}.",
                OutOfMemoryWarning,
                stacklevel=2,
            )

    def _call(self, trials: Sequence[Trial[Any]]) -> list[Tensor]:
        """Return the scores of each trial from one call of the network."""
        self.evaluations += len(trials)
        first = trials[0]
        if len(trials) == 1:
            return [first.term(first.part)]
        columns = zip(*((*trial.part, *trial.term.selection()) for trial in trials), strict=True)
        with torch.no_grad():
            batch = [self._join(number, rows) for number, rows in enumerate(columns)]
            scores: Tensor = first.term.function(*batch)
        return list(scores.clone().split([len(trial.part[0]) for trial in trials]))

    def _join(self, number: int, rows: tuple[Tensor, ...]) -> Tensor:
        """Return an argument of all trials, in memory that is kept: new memory costs more than the copy."""
        count, kept = sum(map(len, rows)), self._kept.get(number)
        if (
            kept is None
            or len(kept) < count
            or kept.shape[1:] != rows[0].shape[1:]
            or kept.dtype != rows[0].dtype
        ):
            kept = self._kept[number] = torch.cat(rows)
            return kept
        return torch.cat(rows, out=kept[:count])


class CachedScore:
    """A score at many whole inputs that differ in places: only terms (windows) that see a difference are computed.

    Args:
        scoring: the score.
    """

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self._scores = PerturbedScores(scoring.memory_gib)
        padded = [scoring.padding.pad(x) for x in scoring.values]
        self._terms = [term.near(term.cut(padded)) for term in scoring.terms]
        self._pinned: _Seen | None = None
        self._last: _Seen | None = None

    def pin(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the scores at inputs that all later ones are held against, shape (N,)."""
        score = self(inputs)
        self._pinned = self._last
        return score

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the scores at whole inputs, shape (N,)."""
        return next(self.many([(None, inputs)]))[1]

    def many(self, wholes: Iterable[tuple[Key, Sequence[Tensor]]]) -> Iterator[tuple[Key, Tensor]]:
        """Yield the key of each of many whole inputs with their scores, shape (N,), in their order."""
        waiting: deque[tuple[Key, list[_Cell]]] = deque()
        for cell, score in self._scores(self._trials(wholes, waiting)):
            cell.score = score
            while waiting and all(cell.score is not None for cell in waiting[0][1]):
                yield self._sum(*waiting.popleft())
        while waiting:
            yield self._sum(*waiting.popleft())

    def _trials(
        self, wholes: Iterable[tuple[Key, Sequence[Tensor]]], waiting: deque[tuple[Key, list[_Cell]]]
    ) -> Iterator[Trial[_Cell]]:
        for key, inputs in wholes:
            padded, cells = tuple(self.scoring.padding.pad(x) for x in inputs), []
            for number, term in enumerate(self._terms):
                part = term.cut(padded)
                cell = self._known(number, term, part)
                if cell is None:
                    cell = _Cell()
                    # A window is copied, so that what waits for a batch does not hold on to whole volumes.
                    yield Trial(cell, term, part if len(self._terms) == 1 else tuple(x.clone() for x in part))
                cells.append(cell)
            self._last = _Seen(padded, cells)
            waiting.append((key, cells))

    def _known(self, number: int, term: Term, part: Tensors) -> _Cell | None:
        """Return the score of a part that is what the term saw last, or of what is pinned."""
        for seen in (self._last, self._pinned):
            if seen is not None and all(map(torch.equal, part, term.cut(seen.padded))):
                return seen.cells[number]
        return None

    def _sum(self, key: Key, cells: list[_Cell]) -> tuple[Key, Tensor]:
        return key, self.scoring.sum_scores([cell.score for cell in cells if cell.score is not None])

    @property
    def evaluations(self) -> float:
        """How often the terms were computed, on average over them."""
        return self._scores.evaluations / max(len(self._terms), 1)


class _Cell:
    """The score of a term that was asked for, once it is known."""

    score: Tensor | None = None


class _Seen(NamedTuple):
    """Padded whole inputs and the scores of the terms at them."""

    padded: Tensors
    cells: list[_Cell]


def _fit_together(one: Trial[Any], other: Trial[Any]) -> bool:
    """Tell whether one call can score both."""
    shapes = ([(x.shape[1:], x.dtype, x.device) for x in trial.part] for trial in (one, other))
    return one.term.function is other.term.function and next(shapes) == next(shapes)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Tell whether scores are the same up to half of their digits."""
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    largest = float(one.abs().nan_to_num().max())
    return torch.allclose(one, other, rtol=0, atol=tolerance * largest, equal_nan=True)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
