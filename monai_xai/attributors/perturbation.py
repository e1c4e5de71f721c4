"""Methods that take pieces of the input away and look at what becomes of the score.

A perturbation changes only the terms that see it: the effect of a piece is the sum of its effects on those, so that
over sliding windows every other window costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, BaselineAttributor, average
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.features import Channels, FeaturesLike, as_features, feature_masks
from monai_xai.forward import Scoring, Tensors, Term, guard


class Piece(NamedTuple):
    """A piece of one input, as one term sees it.

    Args:
        number: which piece.
        source: which input it lies in.
        mask: where it is, expandable to one sample of the part.
    """

    number: int
    source: int
    mask: Tensor


class Plan(ABC):
    """The pieces of the inputs that are taken away, one after the other."""

    count: int

    @abstractmethod
    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        """Return the pieces that a term sees and that differ from the baseline in it.

        Args:
            term: the term.
            differs: for each input where its part differs from the baseline, shape of one sample.
        """

    @abstractmethod
    def paint(self, effects: Tensor) -> Tensors:
        """Return maps of every input from the effects of the pieces, shape (N, count)."""


class PerturbationAttributor(BaselineAttributor):
    """A method that attributes to each piece how much the score falls when the baseline takes its place."""

    @abstractmethod
    def plan(self, scoring: Scoring) -> Plan:
        """Return the pieces."""

    def attribute(self, scoring: Scoring) -> Attribution:
        plan = self.plan(scoring)
        return average([self._perturb(scoring, baseline, plan) for baseline in self.draws(scoring)])

    def _perturb(self, scoring: Scoring, baseline: Tensors, plan: Plan) -> Attribution:
        first = scoring.values[0]
        effects = torch.zeros((first.shape[0], plan.count), dtype=first.dtype, device=first.device)
        scores, passes = [], 0
        for term, (inputs, start) in scoring.parts(self.name, scoring.values, baseline):
            with guard(self.name, inputs):
                scores.append(term(inputs))
                differs = [(x != b).any(0) for x, b in zip(inputs, start, strict=True)]
                for piece in plan.pieces(term, differs):
                    effect = scores[-1] - term(_replace(inputs, start, piece))
                    effects[term.samples, piece.number] += effect.to(effects)
                    passes += 1
        maps = dict(zip(scoring.inputs, plan.paint(effects), strict=True))
        facts = {"pieces": plan.count, "passes": passes / max(len(scoring.terms), 1)}
        return Attribution(maps, scoring.sum_scores(scores), scoring.score(baseline), facts)


@dataclass(frozen=True)
class FeatureAblation(PerturbationAttributor):
    """How much the score falls when a feature is replaced by the baseline, painted on all voxels of the feature.

    Args:
        features: ``Channels()``, ``Blocks(size)``, or integer masks; one tensor or one by input name.
        baseline: what takes a feature's place.

    The values of one feature repeat on its voxels and must not be added up.

    Reference: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv:1311.2901);
    values equal ``captum.attr.FeatureAblation``.
    """

    features: FeaturesLike = field(default_factory=Channels)
    baseline: BaselineLike = field(default_factory=Blur)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "features", as_features(self.features))

    def plan(self, scoring: Scoring) -> Plan:
        return _FeaturePlan(scoring.values, *feature_masks(as_features(self.features), scoring.inputs))


@dataclass(frozen=True, eq=False)
class _FeaturePlan(Plan):
    inputs: Tensors
    masks: list[Tensor]
    count: int

    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        seen = [_see(mask[0], term.coordinates(x)) for mask, x in zip(self.masks, self.inputs, strict=True)]
        numbers = [
            torch.unique(mask[differ.to(mask.device)]) for mask, differ in zip(seen, differs, strict=True)
        ]
        for index, own in enumerate(numbers):
            for number in own[own >= 0].tolist():
                yield Piece(number, index, seen[index] == number)

    def paint(self, effects: Tensor) -> Tensors:
        return tuple(effects[:, mask[0]] for mask in self.masks)


@dataclass(frozen=True)
class Occlusion(PerturbationAttributor):
    """How much the score falls when a box is replaced by the baseline; where boxes overlap, their mean.

    Args:
        window: size of the box, (C, *spatial) for images. For several inputs, a tuple of such sizes in call order.
        stride: steps between boxes, likewise; None puts them side by side.
        baseline: what takes the box's place.

    Reference: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv:1311.2901);
    values equal ``captum.attr.Occlusion``.
    """

    window: Sequence[int] | Sequence[Sequence[int]] = (1, 16, 16, 16)
    stride: Sequence[int] | Sequence[Sequence[int]] | None = None
    baseline: BaselineLike = field(default_factory=Blur)

    def plan(self, scoring: Scoring) -> Plan:
        windows = self._per_input(self.window, scoring)
        strides = windows if self.stride is None else self._per_input(self.stride, scoring)
        inputs = scoring.inputs.items()
        return _BoxPlan(
            scoring.values,
            [_grid(x, w, s, name) for (name, x), w, s in zip(inputs, windows, strides, strict=True)],
        )

    def _per_input(
        self, sizes: Sequence[int] | Sequence[Sequence[int]], scoring: Scoring
    ) -> list[tuple[int, ...]]:
        nested = [sizes] if isinstance(sizes[0], int) else sizes
        if len(nested) != len(scoring.inputs):
            raise InputError(
                f"Occlusion needs one window and stride for each of {list(scoring.inputs)}, got {sizes}."
            )
        return [tuple(size) for size in nested]  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class _BoxPlan(Plan):
    inputs: Tensors
    grids: list[_Grid]

    @property
    def count(self) -> int:  # type: ignore[override]
        return sum(len(grid.corners) for grid in self.grids)

    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        first = 0
        for index, (grid, x) in enumerate(zip(self.grids, self.inputs, strict=True)):
            axes = term.coordinates(x)
            for number, corner in enumerate(grid.corners, start=first):
                mask = _outer(
                    [(a >= c) & (a < c + w) for a, c, w in zip(axes, corner, grid.window, strict=True)]
                )
                if mask is not None and (mask.to(differs[index].device) & differs[index]).any():
                    yield Piece(number, index, mask)
            first += len(grid.corners)

    def paint(self, effects: Tensor) -> Tensors:
        maps, first = [], 0
        for grid, x in zip(self.grids, self.inputs, strict=True):
            total, count = torch.zeros_like(x), torch.zeros_like(x[:1])
            for number, corner in enumerate(grid.corners, start=first):
                box = (slice(None), *(slice(c, c + w) for c, w in zip(corner, grid.window, strict=True)))
                total[box] += effects[:, number].reshape(-1, *[1] * (x.ndim - 1))
                count[box] += 1
            first += len(grid.corners)
            maps.append(total / count.clamp(min=1))
        return tuple(maps)


class _Grid(NamedTuple):
    window: tuple[int, ...]
    corners: list[tuple[int, ...]]


def _grid(x: Tensor, window: tuple[int, ...], stride: tuple[int, ...], name: str) -> _Grid:
    """Return the boxes on one input; the last of an axis may reach over its end."""
    shape = tuple(x.shape[1:])
    fits = len(window) == len(stride) == len(shape) and all(
        1 <= s <= w <= n for s, w, n in zip(stride, window, shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"Occlusion(window={window}, stride={stride}) does not fit the input {name!r} of shape {shape}: it needs "
            f"{len(shape)} numbers (C, *spatial) with 1 <= stride <= window <= shape."
        )
    starts = [
        [i * s for i in range(-(-(n - w) // s) + 1)] for n, w, s in zip(shape, window, stride, strict=True)
    ]
    return _Grid(window, list(product(*starts)))


def _see(mask: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """Return what a term sees of feature numbers of one sample; -1 where it sees the fill value of padding."""
    seen = mask
    for axis, index in enumerate(axes):
        seen = seen.index_select(axis, index.clamp(min=0))
    inside = _outer([index >= 0 for index in axes])
    return torch.full_like(seen, -1) if inside is None else torch.where(inside, seen, -1)


def _outer(sides: Sequence[Tensor]) -> Tensor | None:
    """Return the box that lies within all of its sides, one boolean vector for each axis; None if it is empty."""
    if not all(side.any() for side in sides):
        return None
    shaped = [
        side.reshape([-1 if i == axis else 1 for i in range(len(sides))]) for axis, side in enumerate(sides)
    ]
    return reduce(torch.logical_and, shaped)


def _replace(inputs: Tensors, baselines: Tensors, piece: Piece) -> Tensors:
    """Return the inputs with the baseline in place of a piece."""
    x, b = inputs[piece.source], baselines[piece.source]
    replaced = torch.where(piece.mask.to(x.device), b, x)
    return (*inputs[: piece.source], replaced, *inputs[piece.source + 1 :])
