"""Integrated Gradients, with a fixed number of steps or refined until the attributions add up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, average, sum_over
from monai_xai.attributors.refinement import (
    PIECES_KEPT,
    Node,
    PathAttributor,
    Refinements,
    StraightPiece,
    pieces_kept,
    refine,
)
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.clock import Clock
from monai_xai.forward import Scoring
from monai_xai.joined import AHEAD, Asking, JoinedGradients
from monai_xai.terms import Tensors, Term
from monai_xai.trials import Trial


class Rule(NamedTuple):
    """A quadrature rule on [0, 1]."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def gauss_legendre(n: int) -> Rule:
    """Return the Gauss-Legendre rule with n nodes, exact for polynomials up to degree 2n - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return Rule(tuple((nodes + 1) / 2), tuple(weights / 2))


@dataclass(frozen=True)
class IntegratedGradients(PathAttributor):
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

    def attribute(self, scoring: Scoring) -> Attribution:
        ends = scoring.term_scores()
        return average([self._integrate(part, ends, start) for part, start in self.in_turn(scoring)])

    def _integrate(self, scoring: Scoring, ends: Sequence[Tensor], baseline: Tensors) -> Attribution:
        """Return the integral from a baseline to the inputs, at which the terms have the scores ``ends``."""
        changes = [end - start for end, start in zip(ends, scoring.term_scores(baseline), strict=True)]
        score, total_change = scoring.sum_scores(ends), scoring.sum_scores(changes)
        budget = _Budget(self.allowed(scoring, score, total_change), scoring.terms)
        numbers, passes = itertools.count(), 0
        clocks = scoring.clock.split(len(scoring.terms))

        def integrate(term: Term, inputs: Tensors, start: Tensors) -> Asking[Tensors]:
            nonlocal passes
            path, number = _Path(term, start, inputs), next(numbers)
            if self.is_adaptive:
                maps, used = yield from self._refine(path, budget.share(number), clocks[number])
            else:
                maps, used = yield from self._follow_rule(path, scoring.joined_gradients)
            budget.spend(number, sum_over(maps) - changes[number])
            passes += used
            return maps

        maps = scoring.accumulate_jointly(
            self.name, integrate, scoring.values, baseline, held=2 * PIECES_KEPT + 2
        )
        facts = {"passes": passes / max(len(scoring.terms), 1)}
        return Attribution(scoring.named(maps), score, score - total_change, facts)

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
        least, kept = self.n_steps or 1, pieces_kept(sum(x.nbytes for x in path.inputs))
        refinements = Refinements(
            refine(StraightPiece, float(share), least, self.max_steps, clock, kept=kept) for share in shares
        )
        passes = 0
        while refinements.running:
            columns = refinements.columns
            found = yield [path.trial(column) for column in columns]
            passes += len(found)
            slopes = [
                sum_over([g * d for g, d in zip(f[1], path.direction, strict=True)]).tolist() for f in found
            ]
            for row in refinements.running:
                nodes = [
                    Node(
                        column[row], float(scores[row]), tuple(g[row].clone() for g in gradients), slope[row]
                    )
                    for column, (scores, gradients), slope in zip(columns, found, slopes, strict=True)
                ]
                refinements.send(row, nodes)
        return tuple(i * d for i, d in zip(refinements.integrals(), path.direction, strict=True)), passes


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


def _add(totals: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        total.add_(gradient, alpha=weight)
