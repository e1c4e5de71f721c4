"""Integrated Gradients, with a fixed number of steps or refined until the attributions add up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, Attributor, BaselineAttributor, average
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.clock import Clock
from monai_xai.errors import InputError
from monai_xai.explanation import rounding
from monai_xai.forward import Scoring
from monai_xai.joined import AHEAD, Asking, JoinedGradients
from monai_xai.terms import Tensors, Term
from monai_xai.trials import Trial

_DEFAULT_TOLERANCE = 0.01
_CANCELLATION = 4.0  # how much larger than the allowed gap the gaps of all pieces may be together
_PIECES_KEPT = 16  # how many pieces hold their gradients; those that miss least are summed up


class Rule(NamedTuple):
    """A quadrature rule on [0, 1]."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def gauss_legendre(n: int) -> Rule:
    """Return the Gauss-Legendre rule with n nodes, exact for polynomials up to degree 2n - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return Rule(tuple((nodes + 1) / 2), tuple(weights / 2))


@dataclass(frozen=True)
class IntegratedGradients(BaselineAttributor):
    """The gradient integrated along the straight line from the baseline to the input, times their difference.

    Args:
        n_steps: None refines until ``tolerance`` is met. A number alone takes that many Gauss-Legendre steps, as
            Captum does; together with ``tolerance`` it is the least number to begin with.
        baseline: what the input is held against; attributions are averaged over several (``Samples``).
        tolerance: the completeness gap, relative to ``|score - baseline_score|``, at which refinement ends; 0.01
            if neither it nor ``n_steps`` is given.
        max_steps: refinement ends here at the latest.

    Refinement halves the piece of the path that misses most of its own part of the change: the score at every node
    comes with its gradient, so that what each piece misses is known exactly, and every gradient is used to the end.
    Each window of a sliding-window score is refined by itself. What remains is reported as ``delta``;
    ``facts["passes"]`` counts forward-backward passes per window.

    Reference: Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017, equation 1
    (arXiv:1703.01365).
    """

    n_steps: int | None = None
    baseline: BaselineLike = field(default_factory=Blur)
    tolerance: float | None = None
    max_steps: int = 255

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    by_window: ClassVar[bool] = True
    cause_of_gap: ClassVar[str] = (
        "raise n_steps or max_steps, or hold against a baseline that is not constant, such as Blur() or Noise(): "
        "instance and group normalization map every constant image to the same features"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.n_steps is not None and self.n_steps < 1) or self.max_steps < 3:
            raise InputError(f"IntegratedGradients needs n_steps >= 1 and max_steps >= 3, got {self}.")
        if self.is_adaptive and (self.n_steps or 0) > self.max_steps:
            raise InputError(f"{self} asks for more steps than max_steps={self.max_steps} allows.")
        if self.tolerance is not None and self.tolerance <= 0:
            raise InputError(f"IntegratedGradients(tolerance={self.tolerance}) must be positive.")

    def remedies(self) -> Iterator[Attributor]:
        if not self.is_adaptive:
            assert self.n_steps is not None
            yield replace(self, n_steps=4 * self.n_steps)
        yield from super().remedies()

    def attribute(self, scoring: Scoring) -> Attribution:
        ends = scoring.term_scores()
        return average([self._integrate(part, ends, start) for part, start in self.in_turn(scoring)])

    def _integrate(self, scoring: Scoring, ends: Sequence[Tensor], baseline: Tensors) -> Attribution:
        """Return the integral from a baseline to the inputs, at which the terms have the scores ``ends``."""
        changes = [end - start for end, start in zip(ends, scoring.term_scores(baseline), strict=True)]
        score, total_change = scoring.sum_scores(ends), scoring.sum_scores(changes)
        whole = scoring.crew.total(total_change, "the change of the score")
        allowed = self._relative_gap() * whole.abs() + rounding(score, score - total_change)
        budget = _Budget(allowed * scoring.crew.share, scoring.terms)
        numbers, passes = itertools.count(), 0
        clocks = scoring.clock.split(len(scoring.terms))

        def integrate(term: Term, inputs: Tensors, start: Tensors) -> Asking[Tensors]:
            nonlocal passes
            path, number = _Path(term, start, inputs), next(numbers)
            if self.is_adaptive:
                maps, used = yield from self._refine(path, budget.share(number), clocks[number])
            else:
                maps, used = yield from self._follow_rule(path, scoring.joined_gradients)
            budget.spend(number, _sums(maps) - changes[number])
            passes += used
            return maps

        maps = scoring.accumulate_jointly(
            self.name, integrate, scoring.values, baseline, held=2 * _PIECES_KEPT + 2
        )
        facts = {"passes": passes / max(len(scoring.terms), 1)}
        return Attribution(scoring.named(maps), score, score - total_change, facts)

    @property
    def ends_early(self) -> bool:
        return self.is_adaptive

    @property
    def is_adaptive(self) -> bool:
        """Whether the path is refined until ``tolerance`` is met."""
        return self.n_steps is None or self.tolerance is not None

    def _follow_rule(self, path: _Path, joined: JoinedGradients) -> Asking[tuple[Tensors, int]]:
        """Return the maps of one term by a fixed rule, and the number of its nodes."""
        assert self.n_steps is not None
        rule = gauss_legendre(self.n_steps)
        totals = [torch.zeros_like(x) for x in path.inputs]
        done = 0
        while done < self.n_steps:
            nodes = rule.nodes[done : done + joined.at_once]
            found = yield [path.trial([node] * len(path.inputs[0])) for node in nodes]
            for (_, gradients), weight in zip(found, rule.weights[done:], strict=False):
                _add(totals, gradients, weight)
            done += len(nodes)
        return tuple(t * d for t, d in zip(totals, path.direction, strict=True)), self.n_steps

    def _refine(self, path: _Path, shares: Tensor, clock: Clock) -> Asking[tuple[Tensors, int]]:
        """Return the maps of one term, refined for each of its samples, and how many passes that took."""
        least = self.n_steps or 1
        refinements = [_refine(float(share), least, self.max_steps, clock) for share in shares]
        nodes = [next(refinement) for refinement in refinements]
        integrals: dict[int, Tensors] = {}
        passes = 0
        while len(integrals) < len(nodes):
            found = yield [path.trial(column) for column in zip(*nodes, strict=True)]
            passes += len(found)
            slopes = [
                _sums([g * d for g, d in zip(f[1], path.direction, strict=True)]).tolist() for f in found
            ]
            for row in [row for row in range(len(nodes)) if row not in integrals]:
                points = [
                    _Point(node, float(scores[row]), slope[row], tuple(g[row].clone() for g in gradients))
                    for node, (scores, gradients), slope in zip(nodes[row], found, slopes, strict=True)
                ]
                try:
                    nodes[row] = refinements[row].send(points)
                except StopIteration as end:
                    integrals[row] = end.value
                    nodes[row] = 1.0, 1.0  # goes on beside the others
        stacked = [torch.stack(rows) for rows in zip(*(integrals[i] for i in range(len(nodes))), strict=True)]
        return tuple(i * d for i, d in zip(stacked, path.direction, strict=True)), passes

    @property
    def wanted_gap(self) -> float:
        return self._relative_gap() if self.is_adaptive else math.inf

    def _relative_gap(self) -> float:
        return _DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance


class _Budget:
    """How much of the allowed gap each remaining term may use; what one saves, later ones may spend.

    Terms run side by side, in an order that depends on memory: what counts for a term is what those saved that come
    :data:`~monai_xai.joined.AHEAD` before it.
    """

    def __init__(self, allowed: Tensor, terms: Sequence[Term]) -> None:
        self._allowed = allowed
        self._terms = terms
        self._gap = torch.zeros_like(allowed)
        self._remaining = torch.zeros_like(allowed)
        for term in terms:
            self._remaining[term.samples] += 1
        self._equal = allowed / self._remaining.clamp(min=1)
        self._gaps: dict[int, Tensor] = {}
        self._counted = 0

    def share(self, number: int) -> Tensor:
        """Return the gap that a term may have, by its place in the order: never less than an equal share of all."""
        while self._counted <= number - AHEAD:
            samples = self._terms[self._counted].samples
            self._gap[samples] += self._gaps.pop(self._counted)
            self._remaining[samples] -= 1
            self._counted += 1
        samples = self._terms[number].samples
        left = self._allowed[samples] - self._gap[samples].abs()
        return (left / self._remaining[samples].clamp(min=1)).clamp(min=self._equal[samples])

    def spend(self, number: int, gap: Tensor) -> None:
        """Note the gap that a term has."""
        self._gaps[number] = gap.to(self._gap)


class _Path(NamedTuple):
    """The straight line through one term."""

    term: Term
    start: Tensors
    inputs: Tensors

    @property
    def direction(self) -> Tensors:
        """The inputs minus the baseline."""
        return tuple(x - b for x, b in zip(self.inputs, self.start, strict=True))

    def trial(self, nodes: Sequence[float]) -> Trial[None]:
        """Return the term at points of the line, one for each sample."""
        points = []
        for x, b in zip(self.inputs, self.start, strict=True):
            node = torch.as_tensor(nodes, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
            points.append(b + node * (x - b))
        return Trial(None, self.term, tuple(points))


class _Point(NamedTuple):
    """What one sample has at a node of the path.

    Args:
        node: where, from 0 (baseline) to 1 (input).
        score: the score there.
        slope: the derivative of the score along the path.
        gradient: the gradient, for each input.
    """

    node: float
    score: float
    slope: float
    gradient: Tensors


class _Piece(NamedTuple):
    """A piece of the path with the point in its middle, and the rule that adds up better on it.

    Simpson's rule is the better one where the gradient is smooth, trapezoids where it jumps (ReLU).
    """

    points: tuple[_Point, _Point, _Point]
    weights: tuple[float, float, float]
    gap: float

    @classmethod
    def of(cls, *points: _Point) -> _Piece:
        """Return the piece between the first and the last of three points."""
        first, middle, last = points
        length, change = last.node - first.node, last.score - first.score
        rules = [tuple(length * w for w in rule) for rule in ((1 / 6, 4 / 6, 1 / 6), (1 / 4, 2 / 4, 1 / 4))]
        gaps = [sum(w * p.slope for w, p in zip(rule, points, strict=True)) - change for rule in rules]
        best = min((0, 1), key=lambda i: abs(gaps[i]))
        return cls((first, middle, last), rules[best], gaps[best])  # type: ignore[arg-type]

    def add_to(self, totals: Sequence[Tensor]) -> None:
        """Add the integral of the gradient over this piece."""
        for point, weight in zip(self.points, self.weights, strict=True):
            _add(totals, point.gradient, weight)


def _refine(
    share: float, least: int, most: int, clock: Clock
) -> Generator[tuple[float, ...], Sequence[_Point], Tensors]:
    """Integrate the gradient of one sample: yields where points are wanted, returns the integral for each input.

    The path is halved where it misses most until it adds up. Gaps of pieces may cancel: their sum must be within
    ``share``, and their sizes must not exceed it by much, or the maps would add up without being right.

    Args:
        share: the gap that is allowed.
        least: how many points are taken at least.
        most: how many points are taken at most, 3 or more.
        clock: how long it may go on.
    """
    first, middle, last = yield 0.0, 0.5, 1.0
    pieces = [_Piece.of(first, middle, last)]
    totals = [torch.zeros_like(gradient) for gradient in middle.gradient]
    taken, gap, size = 3, 0.0, 0.0  # gap and size: of the pieces that are in the totals already

    def adds_up() -> bool:
        gaps = [piece.gap for piece in pieces]
        return abs(gap + sum(gaps)) <= share and size + sum(map(abs, gaps)) <= _CANCELLATION * share

    while pieces and taken + 2 <= most and not ((taken >= least and adds_up()) or clock.is_over):
        first, middle, last = pieces.pop(_by_gap(pieces, max)).points
        left, right = yield (first.node + middle.node) / 2, (middle.node + last.node) / 2
        pieces += [_Piece.of(first, left, middle), _Piece.of(middle, right, last)]
        taken += 2
        if len(pieces) > _PIECES_KEPT:
            best = pieces.pop(_by_gap(pieces, min))
            best.add_to(totals)
            gap, size = gap + best.gap, size + abs(best.gap)
    for piece in pieces:
        piece.add_to(totals)
    return tuple(totals)


def _by_gap(pieces: Sequence[_Piece], choose: Callable[..., int]) -> int:
    """Return the index of the piece whose gap is largest or smallest in size."""
    return choose(range(len(pieces)), key=lambda i: abs(pieces[i].gap))


def _sums(maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of maps over all inputs, for each sample."""
    sums = [values.flatten(1).sum(1) for values in maps]
    return sum(sums[1:], sums[0])


def _add(totals: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        total.add_(gradient, alpha=weight)
