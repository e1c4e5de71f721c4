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
from scipy.ndimage import find_objects
from torch import Tensor

from monai_xai.attributors.base import Attribution, BaselineAttributor, average
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.features import Channels, FeaturesLike, as_features, feature_masks
from monai_xai.forward import Scoring, Tensors, Term, guard
from monai_xai.perturbed import PerturbedScores, Trial


class Piece(NamedTuple):
    """A piece of one input, as one term sees it.

    Args:
        number: which piece.
        source: which input it lies in.
        box: the box of one sample of the part that it lies in.
        mask: where it is in the box, expandable to it; None if it fills the box.
    """

    number: int
    source: int
    box: tuple[slice, ...]
    mask: Tensor | None = None


class Plan(ABC):
    """The pieces of the inputs that are taken away, one after the other."""

    count: int

    @abstractmethod
    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        """Return the pieces that a term sees and that differ from the baseline in it.

        Args:
            term: the term.
            differs: for each input where its part differs from the baseline, shape of one sample, in main memory.
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
        first, scores = scoring.values[0], PerturbedScores(scoring.memory_gib)
        effects = torch.zeros((first.shape[0], plan.count), dtype=first.dtype, device=first.device)
        clean: list[Tensor] = []
        with guard(self.name, scoring.values):
            for (term, piece), score in scores(self._trials(scoring, baseline, plan)):
                if piece is None:
                    clean.append(score)
                else:
                    effects[term.samples, piece] += (clean[-1] - score).to(effects)
        maps = dict(zip(scoring.inputs, plan.paint(effects), strict=True))
        facts = {"pieces": plan.count, "passes": (scores.evaluations - len(clean)) / max(len(clean), 1)}
        return Attribution(maps, scoring.sum_scores(clean), scoring.score(baseline), facts)

    def _trials(
        self, scoring: Scoring, baseline: Tensors, plan: Plan
    ) -> Iterator[Trial[tuple[Term, int | None]]]:
        """Yield each term as it is, and then without each of the pieces that matter to it."""
        for term, (inputs, start) in scoring.parts(self.name, scoring.values, baseline):
            near = term.near(inputs)
            yield Trial((term, None), near, inputs)
            differs = [(x != b).any(0).cpu() for x, b in zip(inputs, start, strict=True)]
            for piece in scoring.track_within(plan.pieces(term, differs), "pieces"):
                yield Trial((term, piece.number), near, _replace(inputs, start, piece))


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
        for source, (mask, x, differ) in enumerate(zip(self.masks, self.inputs, differs, strict=True)):
            seen = see_features(mask[0], term.coordinates(x)).cpu()
            numbers = torch.unique(seen.expand(differ.shape)[differ])
            numbers = numbers[numbers >= 0]
            for number, box in zip(numbers.tolist(), _boxes_around(seen, numbers), strict=True):
                inside = seen[box] == number
                yield Piece(number, source, box, None if inside.all() else inside)

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
            axes = zip(term.coordinates(x), grid.starts, grid.window, strict=True)
            for sides in product(*(_sides(axis.cpu(), starts, length) for axis, starts, length in axes)):
                box = tuple(side.extent for side in sides)
                mask = None if all(side.is_filled for side in sides) else _outer([s.inside for s in sides])
                differ = differs[source][box]
                if (differ if mask is None else mask & differ).any():
                    number = grid.first + int(np.ravel_multi_index([s.number for s in sides], grid.shape))
                    yield Piece(number, source, box, mask)

    def paint(self, effects: Tensor) -> Tensors:
        return tuple(
            _paint_boxes(effects[:, grid.first : grid.last], grid, x)
            for grid, x in zip(self.grids, self.inputs, strict=True)
        )


def _boxes_around(labels: Tensor, numbers: Tensor) -> list[tuple[slice, ...]]:
    """Return the smallest box around each of some labels, ascending; whole axes where labels are to be expanded."""
    if not len(numbers):
        return []
    lowest = int(numbers[0])
    found = find_objects((labels - lowest + 1).numpy(), int(numbers[-1]) - lowest + 1)
    return [
        tuple(slice(None) if n == 1 else side for side, n in zip(found[number], labels.shape, strict=True))
        for number in (numbers - lowest).tolist()
    ]


class _Side(NamedTuple):
    """A box as one axis of a term sees it.

    Args:
        number: of the box along the axis.
        extent: from the first to the last place on the axis that lies in the box.
        inside: which places of the extent do: not all where padding repeats the image.
    """

    number: int
    extent: slice
    inside: Tensor

    @property
    def is_filled(self) -> bool:
        """Whether all places of the extent lie in the box."""
        return bool(self.inside.all())


def _sides(axis: Tensor, starts: range, length: int) -> Iterator[_Side]:
    """Yield the boxes that an axis of a term meets."""
    for number, start in enumerate(starts):
        inside = (axis >= start) & (axis < start + length)
        if inside.any():
            places = inside.nonzero()
            extent = slice(int(places[0]), int(places[-1]) + 1)
            yield _Side(number, extent, inside[extent])


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
    replaced, place = x.clone(), (slice(None), *piece.box)
    replaced[place] = (
        b[place] if piece.mask is None else torch.where(piece.mask.to(x.device), b[place], x[place])
    )
    return (*inputs[: piece.source], replaced, *inputs[piece.source + 1 :])
