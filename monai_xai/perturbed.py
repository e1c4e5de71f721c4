"""Scores at many perturbed inputs, of which only what differs is computed, in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monai_xai.errors import AttributionError, UnsupportedNetworkError
from monai_xai.forward import Scoring
from monai_xai.joined import JoinedScores
from monai_xai.memory import GIB
from monai_xai.terms import Tensors, Term
from monai_xai.trials import Key, Trial


class PerturbedScores(JoinedScores):
    """The scores of perturbed parts, which mean nothing where a network does not give the same score twice.

    Raises:
        AttributionError: if ``memory_gib`` does not hold one part, saying how much is needed.
        UnsupportedNetworkError: if the same part gets another score each time.
    """

    _measures_one = True

    def _room(self, trial: Trial[Any], needed: int) -> float:
        room = super()._room(trial, needed)
        if self._memory_gib is not None and room < needed:
            raise AttributionError(
                f"memory_gib={self._memory_gib:.3g} does not hold one call of the network on inputs "
                f"{[tuple(x.shape) for x in trial.part]}, which takes {needed / GIB:.3g} GiB. Allow that much, or use "
                "smaller windows."
            )
        return room

    def _distrust(self, trial: Trial[Any], result: Tensor) -> None:
        again = self._call([trial])[0]
        if not self._agree(result, again):
            raise UnsupportedNetworkError(
                f"The network scores the same input {result.tolist()} and then {again.tolist()}: it keeps something "
                "from call to call, or draws random numbers, so that effects of perturbations mean nothing."
            )


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
        try:
            for cell, score in self._scores(self._trials(wholes, waiting)):
                cell.score = score
                while waiting and all(cell.score is not None for cell in waiting[0][1]):
                    yield self._sum(*waiting.popleft())
        except Exception:
            self._last = None  # some of its scores will never be known
            raise
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
