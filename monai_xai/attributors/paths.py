"""Integrated Gradients along curved paths: into focus, or where the gradient is small."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, Attributor, average
from monai_xai.attributors.refinement import (
    CurvedPiece,
    Node,
    PathAttributor,
    Refinements,
    StraightPiece,
    pieces_kept,
    refine,
)
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.clock import Clock
from monai_xai.errors import InputError
from monai_xai.explanation import rounding
from monai_xai.forward import Scoring
from monai_xai.terms import Tensors

_STEPS = 50  # of the guided path, before each of which features are chosen anew


@dataclass(frozen=True)
class BlurIntegratedGradients(PathAttributor):
    """The gradient integrated while images come into focus, through their Gaussian scale space.

    The path leads through blurred copies of the input, which have no structure that the image does not have; on the
    straight line of :class:`IntegratedGradients`, all scales fade in at once.

    Args:
        n_steps: None refines the path until ``tolerance`` is met. A number alone is how many short straight lines it is
            made of, one gradient in the middle of each; together with ``tolerance``, how many gradients are taken at
            least.
        baseline: a ``Blur``, whose sigma is where the path begins; or baselines by input name, with a ``Blur`` for one
            image at least. Inputs with another baseline and vectors, which cannot be blurred, take the straight line
            from their baseline (of vectors under a ``Blur``: zeros).
        tolerance: the completeness gap, relative to ``|score - baseline_score|``, at which refinement ends; 0.01
            if neither it nor ``n_steps`` is given.
        max_steps: refinement ends here at the latest.

    Sigma falls with the square of the rest of the way, since small scales hold most of the detail; for images alone the
    integral does not depend on it, with a vector it says how far each has come at the same time. The steps add up to
    the input minus its blurred copy, so ``delta`` is what the gradients miss and nothing else. Each image is blurred in
    voxels, channel by channel. With a small sigma the coarse anatomy belongs to the baseline, as in
    ``IntegratedGradients(baseline=Blur(sigma))``, and is not explained; the authors begin at 50 pixels. A large sigma
    needs more steps.

    Reference: Xu et al., "Attribution in Scale and Space", CVPR 2020 (arXiv:2004.03383).
    """

    n_steps: int | None = None
    baseline: BaselineLike = field(default_factory=Blur)
    tolerance: float | None = None
    max_steps: int = 255

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    by_window: ClassVar[bool] = True
    cause_of_gap: ClassVar[str] = "raise n_steps or max_steps, or begin at a smaller sigma"

    def __post_init__(self) -> None:
        super().__post_init__()
        baselines = self.baseline.values() if isinstance(self.baseline, Mapping) else [self.baseline]
        if not any(isinstance(baseline, Blur) for baseline in baselines):
            raise InputError(
                f"BlurIntegratedGradients needs a Blur(sigma) to begin at, or a mapping with a Blur for an image, got "
                f"{self.baseline}. IntegratedGradients(baseline=...) takes the straight line from any baseline."
            )

    def remedies(self) -> Iterator[Attributor]:
        return self.finer()  # any other baseline would be another path

    def attribute(self, scoring: Scoring) -> Attribution:
        blurs, score = self._blurs(scoring), scoring.score()
        return average([self._follow(part, start, blurs, score) for part, start in self.in_turn(scoring)])

    def _blurs(self, scoring: Scoring) -> list[Blur | None]:
        """Return the blur that the path of each input begins at, None where it is a straight line."""
        named = {
            name: self.baseline[name] if isinstance(self.baseline, Mapping) else self.baseline
            for name in scoring.inputs
        }
        blurs = [
            blur if isinstance(blur, Blur) and scoring.inputs[name].ndim > 2 else None
            for name, blur in named.items()
        ]
        if not any(blurs):
            shapes = {name: tuple(x.shape) for name, x in scoring.inputs.items()}
            raise InputError(
                f"BlurIntegratedGradients needs an image to blur, shape (N, C, *spatial), got {shapes} with "
                f"{self.baseline}. For vectors alone use IntegratedGradients()."
            )
        return blurs

    def _follow(
        self, scoring: Scoring, start: Tensors, blurs: Sequence[Blur | None], score: Tensor
    ) -> Attribution:
        """Return the integral from a baseline to the inputs, where the score is known."""
        baseline_score, follow = scoring.score(start), self._refine if self.is_adaptive else self._step
        allowed = self.allowed(scoring, score, score - baseline_score)
        maps, passes = follow(scoring, _Focus(scoring.values, start, blurs), allowed)
        return Attribution(scoring.named(maps), score, baseline_score, {"passes": passes})

    def _step(self, scoring: Scoring, focus: _Focus, _: Tensor) -> tuple[Sequence[Tensor], int]:
        """Return maps, and the number of passes, from gradients in the middle of short straight lines."""
        assert self.n_steps is not None
        totals, here = [torch.zeros_like(x) for x in scoring.values], focus.start
        for step in scoring.track(range(1, self.n_steps + 1), self.name):
            there = focus.at([step / self.n_steps] * len(here[0]))
            _, gradients = scoring.gradient([(a + b) / 2 for a, b in zip(here, there, strict=True)])
            for total, a, b, gradient in zip(totals, here, there, gradients, strict=True):
                total += (b - a) * gradient
            here = there
        return totals, self.n_steps

    def _refine(self, scoring: Scoring, focus: _Focus, allowed: Tensor) -> tuple[Sequence[Tensor], int]:
        """Return maps, and the number of passes, refined for each sample until they add up."""
        kept = pieces_kept(2 * sum(x.nbytes for x in scoring.values))  # gradients and points
        least = self.n_steps or 1
        refinements = Refinements(
            refine(CurvedPiece, float(share), least, self.max_steps, scoring.clock, kept=kept)
            for share in allowed
        )
        passes, rounds = 0, scoring.track(itertools.count(), self.name)
        while refinements.running:
            next(rounds)
            columns = refinements.columns
            found = []
            for ways in columns:
                points = focus.at(ways)
                found.append((ways, points, *scoring.gradient(points)))
            passes += len(found)
            for row in refinements.running:
                nodes = [
                    Node(ways[row], float(scores[row]), _row(gradients, row), point=_row(points, row))
                    for ways, points, scores, gradients in found
                ]
                refinements.send(row, nodes)
        return refinements.integrals(), passes


class _Focus(NamedTuple):
    """The path on which images come into focus, and all other inputs take their straight line."""

    inputs: Tensors
    start: Tensors
    blurs: Sequence[Blur | None]

    def at(self, ways: Sequence[float]) -> Tensors:
        """Return the points where each sample has gone a share of its way."""
        rows = [self._row(row, way) for row, way in enumerate(ways)]
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))

    def _row(self, row: int, way: float) -> list[Tensor]:
        ends = [(x[row : row + 1], b[row : row + 1]) for x, b in zip(self.inputs, self.start, strict=True)]
        if way in (0.0, 1.0):
            return [end[0 if way else 1] for end in ends]
        return [
            Blur(blur.sigma * (1 - way) ** 2).draws(x)[0] if blur else torch.lerp(b, x, way)
            for (x, b), blur in zip(ends, self.blurs, strict=True)
        ]


def _row(tensors: Sequence[Tensor], row: int) -> Tensors:
    """Return one sample of each tensor."""
    return tuple(x[row] if len(x) == 1 else x[row].clone() for x in tensors)


@dataclass(frozen=True)
class GuidedIntegratedGradients(PathAttributor):
    """The gradient integrated along a path on which the features with the smallest gradient move first.

    So the path avoids the steep places between baseline and input, whose large gradients of changing sign make the map
    of :class:`IntegratedGradients` noisy. The path depends on the network: the map of a sum of scores is not the sum of
    the maps.

    Args:
        n_steps: how many steps of equal length (sum of absolute changes) the path has, before each of which features
            are chosen anew; None: 50, each of them refined until ``tolerance`` is met. A number alone takes the mean of
            the gradients at both ends of a step; together with ``tolerance``, its steps are refined as well.
        fraction: share of all features that move at a time; 1 moves all that are left, on the straight line.
        baseline: what the input is held against; attributions are averaged over several (``Samples``).
        tolerance: the completeness gap, relative to ``|score - baseline_score|``, of which each step may have its part;
            0.01 if neither it nor ``n_steps`` is given.
        max_steps: how many gradients a sample takes at most; ``facts["passes"]`` counts calls for all of a batch, which
            refine in different places.

    Each sample takes a path of its own. Its features are the values of all of its inputs together, whose changes and
    gradients are compared as they are: bring inputs to a similar scale, or vectors are moved among the first or last.

    The path is that of Algorithm 1, without the bound on its distance from the straight line (anchors). The paper takes
    the gradient at the beginning of each step, just where the features that move were chosen for a small one, and so
    misses part of every change, however short the steps: where a ReLU switches, the path follows the edge. Here each
    step is integrated from end to end, as by :class:`IntegratedGradients`.

    Reference: Kapishnikov et al., "Guided Integrated Gradients: An Adaptive Path Method for Removing Noise", CVPR 2021
    (arXiv:2106.09788).
    """

    n_steps: int | None = None
    fraction: float = 0.25
    baseline: BaselineLike = field(default_factory=Blur)
    tolerance: float | None = None
    max_steps: int = 500

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    cause_of_gap: ClassVar[str] = (
        "raise n_steps or max_steps, or hold against a baseline nearer to the input, such as Blur()"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise InputError(
                f"GuidedIntegratedGradients(fraction={self.fraction}) must be a share of the features in (0, 1], such "
                "as 0.25."
            )
        if self.is_adaptive and (needed := 2 * (self.n_steps or 1) + 1) > self.max_steps:
            raise InputError(
                f"{self} takes {needed} gradients at least, two for each step, and max_steps={self.max_steps} allows "
                "fewer."
            )

    def finer(self) -> Iterator[Attributor]:
        """Yield the method with refined steps, where they are not: more steps would follow the edges of ReLU too."""
        if not self.is_adaptive:
            assert self.n_steps is not None
            yield replace(self, tolerance=0.01, max_steps=max(self.max_steps, 10 * self.n_steps))

    def attribute(self, scoring: Scoring) -> Attribution:
        return average([self._follow(part, start) for part, start in self.in_turn(scoring)])

    def _follow(self, scoring: Scoring, start: Tensors) -> Attribution:
        here, end = _as_rows(start), _as_rows(scoring.values)
        score, gradient = self._slope(scoring, here)
        baseline_score, gap, total = score, torch.zeros_like(score), torch.zeros_like(end)
        change = scoring.score() - score if self.is_adaptive else torch.zeros_like(score)
        allowed = self.allowed(scoring, score + change, change)
        length, steps = (end - here).abs().sum(1), self.n_steps or min(_STEPS, (self.max_steps - 1) // 2)
        clocks = scoring.clock.split(steps)
        passes, taken = 1, [1] * len(here)
        for step in scoring.track(range(1, steps + 1), self.name):
            rest, left = length * (1 - step / steps), steps - step + 1
            rows = zip(here, end, gradient, rest, strict=True)
            there = torch.stack([_advance(*row, self.fraction) for row in rows])
            leg = _Leg(here, there, score, gradient)
            if self.is_adaptive:
                share = torch.maximum((allowed - gap.abs()) / left, allowed / steps) + rounding(score, score)
                spare = [max(self.max_steps - count - 2 * left, 0) // left for count in taken]
                walked = self._refine(scoring, leg, share, spare, clocks[step - 1])
            else:
                walked = self._step(scoring, leg)
            here, score, gradient = there, walked.score, walked.gradient
            total += walked.integral
            gap += walked.integral.sum(1) - (score - leg.score)
            passes += walked.passes
            taken = [a + b for a, b in zip(taken, walked.taken, strict=True)]
            if gap.isnan().any():
                break  # no map will come of it
        maps = scoring.named(_as_inputs(total, scoring.values))
        return Attribution(maps, score, baseline_score, {"passes": passes})

    def _step(self, scoring: Scoring, leg: _Leg) -> _Walked:
        """Take the mean of the gradients at both ends of a leg."""
        score, gradient = self._slope(scoring, leg.end)
        return _Walked(leg.direction * (leg.gradient + gradient) / 2, score, gradient, 1, [1] * len(score))

    def _refine(
        self, scoring: Scoring, leg: _Leg, shares: Tensor, spare: Sequence[int], clock: Clock
    ) -> _Walked:
        """Refine a leg for each sample, which may take so many gradients besides those in its middle and at its end."""
        kept = pieces_kept(leg.begin.nbytes)
        refinements = Refinements(
            refine(StraightPiece, float(share), 1, 3 + more, clock, kept=kept)
            for share, more in zip(shares, spare, strict=True)
        )
        known = {0.0: (leg.score, leg.gradient)}
        passes = 0
        while refinements.running:
            found = []
            for ways in refinements.columns:
                slope = known.get(ways[0]) if len(set(ways)) == 1 else None
                if slope is None:
                    slope = self._slope(scoring, leg.at(ways))
                    passes += 1
                if set(ways) == {1.0}:
                    known[1.0] = slope
                found.append((ways, *slope))
            for row in refinements.running:
                nodes = [
                    Node(
                        ways[row],
                        float(scores[row]),
                        _row((slopes,), row),
                        float((slopes[row] * leg.direction[row]).sum()),
                    )
                    for ways, scores, slopes in found
                ]
                refinements.send(row, nodes)
        (integral,) = refinements.integrals()
        taken = [count - 1 for count in refinements.taken]  # the first is the end of the leg before
        return _Walked(integral * leg.direction, *known[1.0], passes, taken)

    def _slope(self, scoring: Scoring, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and gradients at a point, all features of a sample in one row."""
        score, gradients = scoring.gradient(_as_inputs(rows, scoring.values))
        return score, _as_rows(gradients)


@dataclass(frozen=True, eq=False)
class _Leg:
    """A straight piece of the guided path, with what is known at its beginning; all features of a sample in one row."""

    begin: Tensor
    end: Tensor
    score: Tensor
    gradient: Tensor

    @cached_property
    def direction(self) -> Tensor:
        """Its end minus its beginning."""
        return self.end - self.begin

    def at(self, ways: Sequence[float]) -> Tensor:
        """Return where each sample is after a share of the leg."""
        return torch.lerp(self.begin, self.end, self.begin.new_tensor(ways)[:, None])


class _Walked(NamedTuple):
    """What a leg has given.

    Args:
        integral: of the gradient along it.
        score: at its end.
        gradient: at its end.
        passes: how often the network was asked.
        taken: how many gradients each sample has used.
    """

    integral: Tensor
    score: Tensor
    gradient: Tensor
    passes: int
    taken: list[int]


def _advance(position: Tensor, end: Tensor, gradient: Tensor, rest: Tensor, fraction: float) -> Tensor:
    """Return where a sample is after one step: as far from its end as ``rest``, the sum of absolute differences.

    Shapes: position, end and gradient (features,); rest ().
    """
    away = (end - position).abs()
    size = gradient.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(away == 0, torch.inf)
    order = size.sort().values  # no kthvalue, which is refused where algorithms must be deterministic
    passed = 0
    while (excess := away.sum() - rest) > 0:
        threshold = order[min(passed + int(fraction * (len(order) - 1)), len(order) - 1)]
        chosen = (size <= threshold) & (away > 0)
        reach = (away * chosen).sum()
        if excess < reach:
            return torch.where(chosen, torch.lerp(position, end, excess / reach), position)
        position = torch.where(chosen, end, position)
        away = (end - position).abs()
        passed = int((size <= threshold).sum())
    return position


def _as_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Return all features of a sample in one row, shape (N, features)."""
    return torch.cat([x.flatten(1) for x in tensors], 1)


def _as_inputs(rows: Tensor, inputs: Tensors) -> Tensors:
    """Return rows in the form of the inputs."""
    parts = rows.split([x[0].numel() for x in inputs], 1)
    return tuple(part.reshape(x.shape).to(x) for part, x in zip(parts, inputs, strict=True))
