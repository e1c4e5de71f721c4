"""The integral of a gradient along a path, refined where it misses most of the change of the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from monai_xai.attributors.base import Attributor, BaselineAttributor
from monai_xai.clock import Clock
from monai_xai.errors import InputError
from monai_xai.explanation import rounding
from monai_xai.forward import Scoring
from monai_xai.terms import Tensors

PIECES_KEPT = 16
"""How many pieces hold their gradients, if nothing is said; those that miss least are summed up."""

_TOLERANCE = 0.01  # if nothing is said
_CANCELLATION = 4.0  # how much larger than the allowed gap the gaps of all pieces may be together

# How much the gradients at the beginning, in the middle and at the end count for the first and for the second half of
# a piece. Simpson's rule is the better one where the gradient is smooth, trapezoids where it jumps (ReLU).
_SIMPSON = ((3 / 6, -1 / 6), (4 / 6, 4 / 6), (-1 / 6, 3 / 6))
_TRAPEZOIDS = ((1 / 2, 0.0), (1 / 2, 1 / 2), (0.0, 1 / 2))


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
        for name, least in (("n_steps", 1), ("max_steps", 3)):
            steps = getattr(self, name)
            if (
                isinstance(steps, bool)
                or not isinstance(steps, int | None)
                or (steps or least) < least
                or steps == 0
            ):
                raise InputError(
                    f"{self.name}({name}={steps}) needs a whole number of steps, {least} or more."
                )
        if self.is_adaptive and (self.n_steps or 0) > self.max_steps:
            raise InputError(f"{self} asks for more steps than max_steps={self.max_steps} allows.")
        if self.tolerance is not None and self.tolerance <= 0:
            raise InputError(f"{self.name}(tolerance={self.tolerance}) must be positive.")

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
        if not self.is_adaptive:
            assert self.n_steps is not None
            yield replace(self, n_steps=4 * self.n_steps)  # type: ignore[call-arg]
        yield from super().remedies()

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
        self.rule, self.gap = (_SIMPSON, _TRAPEZOIDS)[best], gaps[best]

    @abstractmethod
    def _rise(self, node: Node, half: int) -> float:
        """Return how far the score would rise in a half where the gradient is that of the node."""

    @abstractmethod
    def add_to(self, totals: Sequence[Tensor]) -> None:
        """Add the integral over this piece."""


class StraightPiece(PathPiece):
    """A piece of a straight line, whose integral is of the gradient alone: its direction is the same all along."""

    @property
    def _half(self) -> float:
        return (self.nodes[2].way - self.nodes[0].way) / 2

    def _rise(self, node: Node, half: int) -> float:
        return node.slope * self._half

    def add_to(self, totals: Sequence[Tensor]) -> None:
        for node, weights in zip(self.nodes, self.rule, strict=True):
            for total, gradient in zip(totals, node.gradient, strict=True):
                total.add_(gradient, alpha=sum(weights) * self._half)


class CurvedPiece(PathPiece):
    """A piece of a curve, a parabola through three points, whose integral is of the gradient times the way."""

    def _steps(self, half: int) -> Iterator[Tensor]:
        begin, end = self.nodes[half].point, self.nodes[half + 1].point
        return (b - a for a, b in zip(begin, end, strict=True))

    def _rise(self, node: Node, half: int) -> float:
        return sum(float((g * s).sum()) for g, s in zip(node.gradient, self._steps(half), strict=True))

    def add_to(self, totals: Sequence[Tensor]) -> None:
        for half in (0, 1):
            for node, weights in zip(self.nodes, self.rule, strict=True):
                for total, gradient, step in zip(totals, node.gradient, self._steps(half), strict=True):
                    total.addcmul_(gradient, step, value=weights[half])


Refinement = Generator[tuple[float, ...], Sequence[Node], Tensors]


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
    ``share``, and their sizes must not exceed it by much, or the maps would add up without being right.

    Args:
        piece: makes a piece of the path from its nodes.
        share: the gap that is allowed.
        least: how many nodes are taken at least.
        most: how many nodes are taken at most, 3 or more.
        clock: how long it may go on.
        kept: how many pieces may hold their gradients.
    """
    first, middle, last = yield 0.0, 0.5, 1.0
    pieces = [piece(first, middle, last)]
    totals = [torch.zeros_like(gradient) for gradient in middle.gradient]
    taken, gap, size = 3, 0.0, 0.0  # gap and size: of the pieces that are in the totals already

    def adds_up() -> bool:
        gaps = [piece.gap for piece in pieces]
        return abs(gap + sum(gaps)) <= share and size + sum(map(abs, gaps)) <= _CANCELLATION * share

    while pieces and taken + 2 <= most and not ((taken >= least and adds_up()) or clock.is_over):
        first, middle, last = pieces.pop(_by_gap(pieces, max)).nodes
        left, right = yield (first.way + middle.way) / 2, (middle.way + last.way) / 2
        pieces += [piece(first, left, middle), piece(middle, right, last)]
        taken += 2
        if len(pieces) > kept:
            best = pieces.pop(_by_gap(pieces, min))
            best.add_to(totals)
            gap, size = gap + best.gap, size + abs(best.gap)
    for rest in pieces:
        rest.add_to(totals)
    return tuple(totals)


class Refinements:
    """Refinements of the samples of a batch, which ask for their nodes together.

    Args:
        of: one for each sample.
    """

    def __init__(self, of: Iterable[Refinement]) -> None:
        self._refinements = list(of)
        self._wanted = [next(refinement) for refinement in self._refinements]
        self._integrals: dict[int, Tensors] = {}

    @property
    def running(self) -> list[int]:
        """The numbers of the samples that want more nodes."""
        return [number for number in range(len(self._refinements)) if number not in self._integrals]

    @property
    def columns(self) -> list[tuple[float, ...]]:
        """Where nodes are wanted, one for each sample; samples that have ended are asked for at the input."""
        return list(zip(*self._wanted, strict=True))

    def send(self, number: int, nodes: Sequence[Node]) -> None:
        """Go on with a sample whose nodes are known."""
        try:
            self._wanted[number] = self._refinements[number].send(nodes)
        except StopIteration as end:
            self._integrals[number] = end.value
            self._wanted[number] = 1.0, 1.0

    def integrals(self) -> Tensors:
        """Return the integrals of all samples, for each input."""
        rows = (self._integrals[number] for number in range(len(self._refinements)))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _by_gap(pieces: Sequence[PathPiece], choose: Callable[..., int]) -> int:
    """Return the index of the piece whose gap is largest or smallest in size."""
    return choose(range(len(pieces)), key=lambda i: abs(pieces[i].gap))
