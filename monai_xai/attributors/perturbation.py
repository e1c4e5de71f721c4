"""Methods that take pieces of the input away and look at what becomes of the score.

A perturbation changes only the terms that see it: the effect of a piece is the sum of its effects on those, so that
over sliding windows every other window costs nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from typing import ClassVar, NamedTuple

import numpy as np
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

    paints: ClassVar[bool] = True

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
                for piece in scoring.track_within(plan.pieces(term, differs), "pieces"):
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
        seen = [
            see_features(mask[0], term.coordinates(x))
            for mask, x in zip(self.masks, self.inputs, strict=True)
        ]
        for source, (mask, differ) in enumerate(zip(seen, differs, strict=True)):
            numbers = torch.unique(mask.expand(differ.shape)[differ.to(mask.device)])
            for number in numbers[numbers >= 0].tolist():
                yield Piece(number, source, mask == number)

    def paint(self, effects: Tensor) -> Tensors:
        return tuple(
            effects[:, mask[0]].expand_as(x) for mask, x in zip(self.masks, self.inputs, strict=True)
        )


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
        return _BoxPlan(scoring.values, _grids(scoring.inputs, windows, strides))

    def _per_input(
        self, sizes: Sequence[int] | Sequence[Sequence[int]], scoring: Scoring
    ) -> list[tuple[int, ...]]:
        if not isinstance(sizes, Sequence) or not sizes:
            raise InputError(f"Occlusion needs window and stride as (C, *spatial), got {sizes!r}.")
        nested = [sizes] if isinstance(sizes[0], int) else sizes
        if len(nested) != len(scoring.inputs):
            raise InputError(
                f"Occlusion needs one window and stride for each of {list(scoring.inputs)}, got {sizes}."
            )
        return [tuple(size) for size in nested]  # type: ignore[arg-type]


class _Grid(NamedTuple):
    """Boxes on one input.

    Args:
        window: size of a box, (C, *spatial).
        starts: where boxes start, along each axis.
        first: number of the first box.
    """

    window: tuple[int, ...]
    starts: tuple[range, ...]
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        """How many boxes there are along each axis."""
        return tuple(map(len, self.starts))

    @property
    def last(self) -> int:
        """Number of the last box, plus one."""
        return self.first + math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class _BoxPlan(Plan):
    inputs: Tensors
    grids: list[_Grid]

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.grids[-1].last

    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        for source, (grid, x) in enumerate(zip(self.grids, self.inputs, strict=True)):
            differ = differs[source]
            sides = [
                _sides(*axis) for axis in zip(term.coordinates(x), grid.starts, grid.window, strict=True)
            ]
            for box in product(*sides):
                mask = _outer([side.to(differ.device) for _, side in box])
                if (mask & differ).any():
                    number = grid.first + int(np.ravel_multi_index([index for index, _ in box], grid.shape))
                    yield Piece(number, source, mask)

    def paint(self, effects: Tensor) -> Tensors:
        return tuple(
            _paint_boxes(effects[:, grid.first : grid.last], grid, x)
            for grid, x in zip(self.grids, self.inputs, strict=True)
        )


def _sides(axis: Tensor, starts: range, length: int) -> list[tuple[int, Tensor]]:
    """Return the boxes that an axis of a term meets: their index along the axis, and where they are on it."""
    return [
        (index, side)
        for index, start in enumerate(starts)
        if (side := (axis >= start) & (axis < start + length)).any()
    ]


def _paint_boxes(effects: Tensor, grid: _Grid, x: Tensor) -> Tensor:
    """Return the mean effect of the boxes that cover each voxel; zero where there is none."""
    total = effects.reshape(-1, *grid.shape)
    count = torch.ones((1, *grid.shape), dtype=x.dtype, device=x.device)
    for axis, (starts, length) in enumerate(zip(grid.starts, grid.window, strict=True), start=1):
        voxels = torch.arange(x.shape[axis], device=x.device)[:, None]
        begins = torch.tensor(starts, device=x.device)
        covers = ((voxels >= begins) & (voxels < begins + length)).to(x.dtype)
        total, count = (
            torch.tensordot(part, covers, ([axis], [1])).movedim(-1, axis) for part in (total, count)
        )
    return total / count.clamp(min=1)


def _grids(
    inputs: Mapping[str, Tensor], windows: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...]]
) -> list[_Grid]:
    """Return the boxes on every input; the last of an axis may reach over its end."""
    grids: list[_Grid] = []
    for (name, x), window, stride in zip(inputs.items(), windows, strides, strict=True):
        shape = tuple(x.shape[1:])
        fits = len(window) == len(stride) == len(shape) and all(
            1 <= s <= w <= n for s, w, n in zip(stride, window, shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"Occlusion(window={window}, stride={stride}) does not fit the input {name!r} of shape {shape}: it "
                f"needs {len(shape)} numbers (C, *spatial) with 1 <= stride <= window <= shape."
            )
        starts = tuple(range(0, n - w + s, s) for n, w, s in zip(shape, window, stride, strict=True))
        grids.append(_Grid(window, starts, grids[-1].last if grids else 0))
    return grids


def see_features(mask: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """Return what a term sees of feature numbers of one sample; -1 where it sees the fill value of padding.

    Shapes: mask (C or 1, *spatial or 1s); result likewise, expandable to the part.
    """
    seen = mask
    for axis, index in enumerate(axes):
        if mask.shape[axis] > 1:
            seen = seen.index_select(axis, index.clamp(min=0))
    inside = [index >= 0 for index in axes]
    return seen if all(side.all() for side in inside) else torch.where(_outer(inside), seen, -1)


def _outer(sides: Sequence[Tensor]) -> Tensor:
    """Return the box that lies within all of its sides, one boolean vector for each axis."""
    shaped = [
        side.reshape([-1 if i == axis else 1 for i in range(len(sides))]) for axis, side in enumerate(sides)
    ]
    return reduce(torch.logical_and, shaped)


def _replace(inputs: Tensors, baselines: Tensors, piece: Piece) -> Tensors:
    """Return the inputs with the baseline in place of a piece."""
    x, b = inputs[piece.source], baselines[piece.source]
    replaced = torch.where(piece.mask.to(x.device), b, x)
    return (*inputs[: piece.source], replaced, *inputs[piece.source + 1 :])
