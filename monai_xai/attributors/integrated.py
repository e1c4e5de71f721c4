"""Integrated Gradients, with a fixed number of steps or refined until the attributions add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, BaselineAttributor, average
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.explanation import rounding
from monai_xai.forward import Scoring, Tensors, Term

_DEFAULT_TOLERANCE = 0.01


class Rule(NamedTuple):
    """A quadrature rule on [0, 1]."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def gauss_legendre(n: int) -> Rule:
    """Return the Gauss-Legendre rule with n nodes, exact for polynomials up to degree 2n - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return Rule(tuple((nodes + 1) / 2), tuple(weights / 2))


def fejer(n: int) -> Rule:
    """Return Fejér's second rule with n - 1 nodes, n even: those of n are every other one of those of 2n.

    It leaves out both ends and crowds its nodes there, where gradients change fastest from a poor baseline.

    Reference: Waldvogel, "Fast Construction of the Fejér and Clenshaw-Curtis Quadrature Rules", BIT 2006
    (doi:10.1007/s10543-006-0045-4).
    """
    angles = np.arange(1, n) * np.pi / n
    odd = np.arange(1, n, 2)
    weights = 4 * np.sin(angles) / n * (np.sin(np.outer(angles, odd)) / odd).sum(1)
    return Rule(tuple((1 - np.cos(angles)) / 2), tuple(weights / 2))


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

    Refinement doubles the nodes of a nested rule, so that every gradient is used at every later level, and each
    window of a sliding-window score is refined by itself: its own share of the gap is known exactly. What remains
    is reported as ``delta``; ``facts["passes"]`` counts forward-backward passes per window.

    Reference: Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017, equation 1
    (arXiv:1703.01365).
    """

    n_steps: int | None = None
    baseline: BaselineLike = field(default_factory=Blur)
    tolerance: float | None = None
    max_steps: int = 255

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    cause_of_gap: ClassVar[str] = (
        "raise n_steps or max_steps, or hold against a baseline that is not constant, such as Blur() or Noise(): "
        "instance and group normalization map every constant image to the same features"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.n_steps is not None and self.n_steps < 1) or self.max_steps < 1:
            raise InputError(f"IntegratedGradients needs n_steps and max_steps of at least 1, got {self}.")
        if self.tolerance is not None and self.tolerance <= 0:
            raise InputError(f"IntegratedGradients(tolerance={self.tolerance}) must be positive.")

    def attribute(self, scoring: Scoring) -> Attribution:
        return average([self._integrate(scoring, baseline) for baseline in self.draws(scoring)])

    def _integrate(self, scoring: Scoring, baseline: Tensors) -> Attribution:
        score, changes = self._ends(scoring, baseline)
        total_change = scoring.sum_scores(changes)
        allowed = self._relative_gap() * total_change.abs()
        budget = _Budget(allowed + rounding(score, score - total_change), scoring)
        rules, remaining, passes = self._rules(), iter(changes), 0

        def integrate(term: Term, inputs: Tensors, start: Tensors) -> Tensors:
            nonlocal passes
            path = _Path(
                term, start, tuple(x - b for x, b in zip(inputs, start, strict=True)), next(remaining)
            )
            maps, used = _integrate_path(path, rules, budget, scoring.track_within)
            passes += used
            return maps

        maps = scoring.accumulate(self.name, integrate, scoring.values, baseline)
        facts = {"passes": passes / max(len(scoring.terms), 1)}
        return Attribution(dict(zip(scoring.inputs, maps, strict=True)), score, score - total_change, facts)

    def _ends(self, scoring: Scoring, baseline: Tensors) -> tuple[Tensor, list[Tensor]]:
        """Return the score, and for each term how much it changes from the baseline to the input."""
        scores, changes = [], []
        for term, (inputs, start) in scoring.parts("score", scoring.values, baseline):
            scores.append(term(inputs))
            changes.append(scores[-1] - term(start))
        return scoring.sum_scores(scores), changes

    def _relative_gap(self) -> float:
        return _DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance

    def _rules(self) -> list[Rule]:
        """Return one rule, or the nested rules from the least number of steps to the largest."""
        if self.n_steps is not None and self.tolerance is None:
            return [gauss_legendre(self.n_steps)]
        levels = [fejer(2**k) for k in range(1, (self.max_steps + 1).bit_length())]
        least = min(self.n_steps or 3, self.max_steps)
        return [rule for rule in levels if len(rule.nodes) >= least] or levels[-1:]


class _Budget:
    """How much of the allowed gap each remaining term may use; what one saves, the later ones may spend."""

    def __init__(self, allowed: Tensor, scoring: Scoring) -> None:
        self._allowed = allowed
        self._gap = torch.zeros_like(allowed)
        self._remaining = torch.zeros_like(allowed)
        for term in scoring.terms:
            self._remaining[term.samples] += 1

    def share(self, samples: slice) -> Tensor:
        """Return the gap that the next term of these samples may have."""
        left = self._allowed[samples] - self._gap[samples].abs()
        return left / self._remaining[samples].clamp(min=1)

    def spend(self, samples: slice, gap: Tensor) -> None:
        """Note the gap that a term has."""
        self._gap[samples] += gap.to(self._gap)
        self._remaining[samples] -= 1


class _Path(NamedTuple):
    """The straight line through one term, and how much the term changes along it."""

    term: Term
    start: Tensors
    direction: Tensors
    change: Tensor

    def gradient(self, node: float) -> Tensors:
        """Return the gradient at a point of the line."""
        return self.term.gradient([b + node * d for b, d in zip(self.start, self.direction, strict=True)])[1]

    def gap(self, maps: Tensors) -> Tensor:
        """Return how far maps are from adding up, for each sample."""
        sums = [values.flatten(1).sum(1) for values in maps]
        return sum(sums[1:], sums[0]) - self.change


def _integrate_path(
    path: _Path, rules: Sequence[Rule], budget: _Budget, track: Callable[..., Iterable[float]]
) -> tuple[Tensors, int]:
    """Integrate along a path, rule by rule until each sample's share of the gap is met.

    Every rule contains the nodes of the one before. A gradient is weighted into the sums of all later rules at once,
    so that one sum per rule is kept, not one gradient per node. Each sample keeps the maps of the first rule that
    meets its share, so that it does not depend on its neighbors in the batch.

    Returns:
        The maps, and how many passes they took.
    """
    samples = path.term.samples
    sums = [[torch.zeros_like(d) for d in path.direction] for _ in rules]
    seen: set[float] = set()
    maps: Tensors = ()
    met = torch.zeros_like(path.change, dtype=torch.bool)
    for level, rule in enumerate(rules):
        for node in track([node for node in rule.nodes if _key(node) not in seen], "nodes"):
            seen.add(_key(node))
            gradients = path.gradient(node)
            for later, totals in zip(rules[level:], sums[level:], strict=True):
                _add(totals, gradients, _weight(later, node))
        found = tuple(total * d for total, d in zip(sums[level], path.direction, strict=True))
        maps = tuple(_choose(met, *pair) for pair in zip(maps, found, strict=True)) if maps else found
        met |= path.gap(found).abs() <= budget.share(samples).to(path.change)
        if met.all():
            break
    budget.spend(samples, path.gap(maps))
    return maps, len(seen)


def _choose(first: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return for each sample the one or the other map."""
    return torch.where(first.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


def _key(node: float) -> float:
    """Return a node such that those of nested rules are equal in spite of rounding."""
    return round(node, 12)


def _weight(rule: Rule, node: float) -> float:
    return rule.weights[int(np.argmin(np.abs(np.asarray(rule.nodes) - node)))]


def _add(totals: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        total.add_(gradient, alpha=weight)
