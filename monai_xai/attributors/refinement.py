"""The integral of a gradient along a path, refined where it misses most of the change of the score."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from monai_xai.attributors.base import Attributor, BaselineAttributor
from monai_xai.clock import Clock
from monai_xai.errors import InputError
from monai_xai.explanation import rounding
from monai_xai.forward import Scoring
from monai_xai.memory import GIB
from monai_xai.terms import Tensors

PIECES_KEPT = 16
"""How many pieces hold their gradients, where these are neither small nor very large; others are summed up."""

_LEAST_KEPT, _MOST_KEPT = 4, 128  # pieces
_HELD_GIB, _FREELY_HELD_GIB = 1.0, 1 / 16  # by up to PIECES_KEPT pieces, and by more
_TOLERANCE = 0.01  # if nothing is said
_BRIEF_STEPS = 255  # of one try among several
_COARSE_STEPS = 31  # of a network of few digits: more would follow its rounding
_CANCELLATION = 4.0  # how much larger than the allowed gap the gaps of all pieces may be together

# How much the gradients at the beginning, in the middle and at the end count for the first and for the second half of
# a piece. Simpson's rule is the better one where the gradient is smooth, trapezoids where it jumps (ReLU).
_SIMPSON = ((3 / 6, -1 / 6), (4 / 6, 4 / 6), (-1 / 6, 3 / 6))
_TRAPEZOIDS = ((1 / 2, 0.0), (1 / 2, 1 / 2), (0.0, 1 / 2))
_Weights = tuple[tuple[float, float], ...]


def pieces_kept(node: int) -> int:
    """Return how many pieces of each sample may hold their three nodes, each of so many bytes in all samples."""
    as_many, freely = (int(gib * GIB / (3 * node)) for gib in (_HELD_GIB, _FREELY_HELD_GIB))
    return max(min(as_many, PIECES_KEPT), min(freely, _MOST_KEPT), _LEAST_KEPT)


class PathAttributor(BaselineAttributor):
    """A method along a path, with the fields ``n_steps``, ``tolerance`` and ``max_steps``.

    ``n_steps=None`` refines until the relative gap is ``tolerance``, 0.01 if that is None; a number alone takes that
    many steps, together with ``tolerance`` no fewer.
    """

    n_steps: int | None
    tolerance: float | None
    max_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps is not None:
            self._require_steps("n_steps", self.n_steps, 1)
        self._require_steps("max_steps", self.max_steps, 3)
        if self.is_adaptive and (self.n_steps or 0) > self.max_steps:
            raise InputError(f"{self} asks for more steps than max_steps={self.max_steps} allows.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise InputError(f"{self.name}(tolerance={self.tolerance}) must be positive.")

    def _require_steps(self, name: str, steps: object, least: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, Integral) or int(steps) < least:
            raise InputError(f"{self.name}({name}={steps}) needs a whole number of steps, {least} or more.")

    @property
    def is_adaptive(self) -> bool:
        """Whether the path is refined until ``tolerance`` is met."""
        return self.n_steps is None or self.tolerance is not None

    @property
    def ends_early(self) -> bool:
        return self.is_adaptive

    @property
    def wanted_gap(self) -> float:
        if not self.is_adaptive:
            return super().wanted_gap
        return _TOLERANCE if self.tolerance is None else self.tolerance

    def remedies(self) -> Iterator[Attributor]:
        yield from self.finer()
        yield from super().remedies()

    def finer(self) -> Iterator[Attributor]:
        """Yield the method with more steps, where their number is fixed."""
        if not self.is_adaptive:
            assert self.n_steps is not None
            yield replace(self, n_steps=4 * self.n_steps)  # type: ignore[call-arg]

    def coarser(self, gap: float) -> Attributor:
        if not self.is_adaptive:
            return self
        return replace(
            self, tolerance=max(self.wanted_gap, gap), max_steps=min(self.max_steps, _COARSE_STEPS)
        )  # type: ignore[call-arg]

    def briefly(self) -> Attributor:
        few = max(_BRIEF_STEPS, self.n_steps or 0)
        if not self.is_adaptive or self.max_steps < 2 * few:
            return self
        return replace(self, max_steps=few)  # type: ignore[call-arg]

    def allowed(self, scoring: Scoring, score: Tensor, change: Tensor) -> Tensor:
        """Return the gap that each sample may have.

        Shapes: score, and its change from the baseline, (N,); result (N,).
        """
        if not self.is_adaptive:
            return torch.full_like(score, torch.inf)
        whole = scoring.crew.total(change, "the change of the score")
        return (self.wanted_gap * whole.abs() + rounding(score, score - change)) * scoring.crew.share


class Node(NamedTuple):
    """What one sample has at a point of the path.

    Args:
        way: where, from 0 (baseline) to 1 (input).
        score: the score there.
        gradient: the gradient, for each input.
        slope: on a straight path, the derivative of the score along it.
        point: on a curved path, the point itself, for each input.
    """

    way: float
    score: float
    gradient: Tensors
    slope: float = 0.0
    point: Tensors = ()


class PathPiece(ABC):
    """A piece of a path, of which the gradients in three places say how the score changes.

    Args:
        first: its beginning.
        middle: its middle.
        last: its end.

    Attributes:
        gap: what they miss of the change.
    """

    def __init__(self, first: Node, middle: Node, last: Node) -> None:
        self.nodes = first, middle, last
        rises = [(self._rise(node, 0), self._rise(node, 1)) for node in self.nodes]
        gaps = []
        for rule in (_SIMPSON, _TRAPEZOIDS):
            parts = (
                w * r for row, rise in zip(rule, rises, strict=True) for w, r in zip(row, rise, strict=True)
            )
            gaps.append(sum(parts) - (last.score - first.score))
        best = min((0, 1), key=lambda number: abs(gaps[number]))
        self.rule: _Weights = (_SIMPSON, _TRAPEZOIDS)[best]
        self.gap: float = gaps[best]

    @abstractmethod
    def _rise(self, node: Node, half: int) -> float:
        """Return how far the score would rise in a half where the gradient is that of the node."""

    @property
    def ways(self) -> tuple[float, float, float]:
        """Where its nodes are."""
        first, middle, last = self.nodes
        return first.way, middle.way, last.way

    @abstractmethod
    def add_to(self, totals: Sequence[Tensor], sign: float = 1.0) -> None:
        """Add the integral over this piece, or take it away."""


class StraightPiece(PathPiece):
    """A piece of a straight line, whose integral is of the gradient alone: its direction is the same all along."""

    @property
    def _half(self) -> float:
        return (self.nodes[2].way - self.nodes[0].way) / 2

    def _rise(self, node: Node, half: int) -> float:
        return node.slope * self._half

    def add_to(self, totals: Sequence[Tensor], sign: float = 1.0) -> None:
        for node, weights in zip(self.nodes, self.rule, strict=True):
            for total, gradient in zip(totals, node.gradient, strict=True):
                total.add_(gradient, alpha=sign * sum(weights) * self._half)


class CurvedPiece(PathPiece):
    """A piece of a curve, a parabola through three points, whose integral is of the gradient times the way."""

    def _steps(self, half: int) -> Iterator[Tensor]:
        begin, end = self.nodes[half].point, self.nodes[half + 1].point
        return (b - a for a, b in zip(begin, end, strict=True))

    def _rise(self, node: Node, half: int) -> float:
        return sum(float((g * s).sum()) for g, s in zip(node.gradient, self._steps(half), strict=True))

    def add_to(self, totals: Sequence[Tensor], sign: float = 1.0) -> None:
        for half in (0, 1):
            for node, weights in zip(self.nodes, self.rule, strict=True):
                for total, gradient, step in zip(totals, node.gradient, self._steps(half), strict=True):
                    total.addcmul_(gradient, step, value=sign * weights[half])


Refinement = Generator[tuple[float, ...], Sequence[Node], Tensors]


class _Summed(NamedTuple):
    """A piece that is in the totals already: where its nodes were, by which rule, and what it misses."""

    ways: tuple[float, float, float]
    rule: _Weights
    gap: float


def refine(
    piece: Callable[[Node, Node, Node], PathPiece],
    share: float,
    least: int,
    most: int,
    clock: Clock,
    *,
    kept: int = PIECES_KEPT,
) -> Refinement:
    """Integrate the gradient of one sample: yields where nodes are wanted, returns the integral for each input.

    The path is halved where it misses most until it adds up. Gaps of pieces may cancel: their sum must be within
    ``share``, and their sizes must not exceed it by much, or the maps would add up without being right. A gap that is
    not finite ends it.

    Args:
        piece: makes a piece of the path from its nodes.
        share: the gap that is allowed.
        least: how many nodes are taken at least.
        most: how many nodes are taken at most, 3 or more.
        clock: how long it may go on.
        kept: how many pieces may hold their gradients. Those that miss least are summed up; where one of them comes to
            miss most, its three nodes are taken once more.
    """
    first, middle, last = yield 0.0, 0.5, 1.0
    pieces, summed = [piece(first, middle, last)], list[_Summed]()
    totals = [torch.zeros_like(gradient) for gradient in middle.gradient]
    taken = 3

    def parts() -> list[PathPiece | _Summed]:
        return [*pieces, *summed]

    def goes_on() -> bool:
        gaps = [part.gap for part in parts()]
        total, size = sum(gaps), sum(map(abs, gaps))
        adds_up = abs(total) <= share and size <= _CANCELLATION * share
        return math.isfinite(size) and (taken < least or not adds_up) and not clock.is_over

    while taken + 2 <= most and goes_on():
        worst = max(parts() if taken + 5 <= most else pieces, key=lambda part: abs(part.gap))
        if isinstance(worst, _Summed):
            summed.remove(worst)
            again = piece(*(yield worst.ways))
            again.rule = worst.rule  # as it was added, whatever rounding says now
            again.add_to(totals, -1.0)
            taken += 3
        else:
            pieces.remove(again := worst)
        first, middle, last = again.nodes
        left, right = yield (first.way + middle.way) / 2, (middle.way + last.way) / 2
        pieces += [piece(first, left, middle), piece(middle, right, last)]
        taken += 2
        while len(pieces) > kept:
            best = min(pieces, key=lambda part: abs(part.gap))
            pieces.remove(best)
            best.add_to(totals)
            summed.append(_Summed(best.ways, best.rule, best.gap))
    for rest in pieces:
        rest.add_to(totals)
    return tuple(totals)


class Refinements:
    """Refinements of the samples of a batch, which ask for their nodes together.

    Args:
        of: one for each sample.

    Attributes:
        taken: how many nodes each sample has taken.
    """

    def __init__(self, of: Iterable[Refinement]) -> None:
        self._refinements = list(of)
        self._wanted = [next(refinement) for refinement in self._refinements]
        self._integrals: dict[int, Tensors] = {}
        self.taken = [0] * len(self._refinements)

    @property
    def running(self) -> list[int]:
        """The numbers of the samples that want more nodes."""
        return [number for number in range(len(self._refinements)) if number not in self._integrals]

    @property
    def columns(self) -> list[tuple[float, ...]]:
        """Where nodes are wanted, one for each sample; those that want fewer are asked for at the input."""
        return list(zip_longest(*self._wanted, fillvalue=1.0))

    def send(self, number: int, nodes: Sequence[Node]) -> None:
        """Go on with a sample, with its nodes of all columns."""
        nodes = nodes[: len(self._wanted[number])]
        self.taken[number] += len(nodes)
        try:
            self._wanted[number] = self._refinements[number].send(nodes)
        except StopIteration as end:
            self._integrals[number] = end.value
            self._wanted[number] = ()

    def integrals(self) -> Tensors:
        """Return the integrals of all samples, for each input."""
        rows = (self._integrals[number] for number in range(len(self._refinements)))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))
