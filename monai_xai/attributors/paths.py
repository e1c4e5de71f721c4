"""Integrated Gradients along curved paths: into focus, or where the gradient is small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, Attributor, BaselineAttributor, average
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.forward import Scoring
from monai_xai.terms import Tensors


@dataclass(frozen=True)
class BlurIntegratedGradients(BaselineAttributor):
    """The gradient integrated while images come into focus, through their Gaussian scale space.

    The path leads through blurred copies of the input, which have no structure that the image does not have; on the
    straight line of :class:`IntegratedGradients`, all scales fade in at once.

    Args:
        n_steps: how many short straight lines the path is made of, one gradient in the middle of each.
        baseline: a ``Blur``, whose sigma is where the path begins; or baselines by input name, with a ``Blur`` for one
            image at least. Inputs with another baseline and vectors, which cannot be blurred, take the straight line
            from their baseline (of vectors under a ``Blur``: zeros).

    Sigma falls with the square of the rest of the way, since small scales hold most of the detail; for images alone the
    integral does not depend on it, with a vector it says how far each has come at the same time. The steps add up to
    the input minus its blurred copy, so ``delta`` is what the gradients miss and nothing else. Each image is blurred in
    voxels, channel by channel. With a small sigma the coarse anatomy belongs to the baseline, as in
    ``IntegratedGradients(baseline=Blur(sigma))``, and is not explained; the authors begin at 50 pixels. A large sigma
    needs more steps.

    Reference: Xu et al., "Attribution in Scale and Space", CVPR 2020 (arXiv:2004.03383).
    """

    n_steps: int = 64
    baseline: BaselineLike = field(default_factory=Blur)

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    by_window: ClassVar[bool] = True
    cause_of_gap: ClassVar[str] = "raise n_steps, or begin at a smaller sigma"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self, self.n_steps)
        baselines = self.baseline.values() if isinstance(self.baseline, Mapping) else [self.baseline]
        if not any(isinstance(baseline, Blur) for baseline in baselines):
            raise InputError(
                f"BlurIntegratedGradients needs a Blur(sigma) to begin at, or a mapping with a Blur for an image, got "
                f"{self.baseline}. IntegratedGradients(baseline=...) takes the straight line from any baseline."
            )

    def remedies(self) -> Iterator[Attributor]:
        yield replace(self, n_steps=4 * self.n_steps)

    def attribute(self, scoring: Scoring) -> Attribution:
        draws = self.draws(scoring)
        blurs = self._blurs(scoring)
        return average([self._follow(scoring, start, blurs) for start in draws])

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

    def _follow(self, scoring: Scoring, start: Tensors, blurs: Sequence[Blur | None]) -> Attribution:
        totals = [torch.zeros_like(x) for x in scoring.values]
        here = start
        for step in scoring.track(range(1, self.n_steps + 1), self.name):
            there = _focus(scoring.values, start, blurs, step / self.n_steps)
            _, gradients = scoring.gradient([(a + b) / 2 for a, b in zip(here, there, strict=True)])
            for total, a, b, gradient in zip(totals, here, there, gradients, strict=True):
                total += (b - a) * gradient
            here = there
        return Attribution(
            scoring.named(totals), scoring.score(), scoring.score(start), {"passes": self.n_steps}
        )


def _focus(inputs: Tensors, start: Tensors, blurs: Sequence[Blur | None], way: float) -> Tensors:
    """Return the point of the path after a share ``way`` of it: inputs blurred so far, or on their straight line."""
    if way == 1.0:
        return inputs
    return tuple(
        Blur(blur.sigma * (1 - way) ** 2).draws(x)[0] if blur else torch.lerp(b, x, way)
        for x, b, blur in zip(inputs, start, blurs, strict=True)
    )


@dataclass(frozen=True)
class GuidedIntegratedGradients(BaselineAttributor):
    """The gradient integrated along a path on which the features with the smallest gradient move first.

    So the path avoids the steep places between baseline and input, whose large gradients of changing sign make the map
    of :class:`IntegratedGradients` noisy. The path depends on the network: the map of a sum of scores is not the sum of
    the maps.

    Args:
        n_steps: how many steps of equal length (sum of absolute changes) the path has.
        fraction: share of all features that move at a time; 1 moves all that are left, on the straight line.
        baseline: what the input is held against; attributions are averaged over several (``Samples``).

    Each sample takes a path of its own. Its features are the values of all of its inputs together, whose changes and
    gradients are compared as they are: bring inputs to a similar scale, or vectors are moved among the first or last.

    The path is that of Algorithm 1, without the bound on its distance from the straight line (anchors). The paper takes
    the gradient at the beginning of each step, just where the features that move were chosen for a small one; here it
    is the mean of both ends, which costs one pass more and leaves a smaller ``delta``.

    Reference: Kapishnikov et al., "Guided Integrated Gradients: An Adaptive Path Method for Removing Noise", CVPR 2021
    (arXiv:2106.09788).
    """

    n_steps: int = 200
    fraction: float = 0.25
    baseline: BaselineLike = field(default_factory=Blur)

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    cause_of_gap: ClassVar[str] = (
        "raise n_steps, or hold against a baseline nearer to the input, such as Blur()"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self, self.n_steps)
        if not 0 < self.fraction <= 1:
            raise InputError(
                f"GuidedIntegratedGradients(fraction={self.fraction}) must be a share of the features in (0, 1], such "
                "as 0.25."
            )

    def attribute(self, scoring: Scoring) -> Attribution:
        return average([self._follow(scoring, start) for start in self.draws(scoring)])

    def _follow(self, scoring: Scoring, start: Tensors) -> Attribution:
        here, end = _as_rows(start), _as_rows(scoring.values)
        length = (end - here).abs().sum(1)
        baseline_score, gradient = self._slope(scoring, here)
        score, total = baseline_score, torch.zeros_like(end)
        for step in scoring.track(range(1, self.n_steps + 1), self.name):
            rest = length * (1 - step / self.n_steps)
            rows = zip(here, end, gradient, rest, strict=True)
            there = torch.stack([_advance(*row, self.fraction) for row in rows])
            score, slope = self._slope(scoring, there)
            total += (there - here) * (gradient + slope) / 2
            here, gradient = there, slope
        maps = scoring.named(_as_inputs(total, scoring.values))
        return Attribution(maps, score, baseline_score, {"passes": self.n_steps + 1})

    def _slope(self, scoring: Scoring, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and gradients at a point, all features of a sample in one row."""
        score, gradients = scoring.gradient(_as_inputs(rows, scoring.values))
        return score, _as_rows(gradients)


def _advance(position: Tensor, end: Tensor, gradient: Tensor, rest: Tensor, fraction: float) -> Tensor:
    """Return where a sample is after one step: as far from its end as ``rest``, the sum of absolute differences.

    Shapes: position, end and gradient (features,); rest ().
    """
    away = (end - position).abs()
    size = gradient.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(away == 0, torch.inf)
    order, passed = (
        size.sort().values,
        0,
    )  # no kthvalue, which is refused where algorithms must be deterministic
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


def _require_steps(attributor: BaselineAttributor, n_steps: int) -> None:
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise InputError(f"{attributor.name}(n_steps={n_steps}) needs a whole number of steps, 1 or more.")
