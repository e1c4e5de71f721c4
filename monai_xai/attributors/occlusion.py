"""Occlusion: boxes that are replaced by a baseline, all of a grid or the strongest from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, average
from monai_xai.attributors.perturbation import (
    Effects,
    PaintedPlan,
    PerturbationAttributor,
    Piece,
    Plan,
    outer,
)
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.forward import Scoring
from monai_xai.terms import Tensors, Term


@dataclass(frozen=True)
class Occlusion(PerturbationAttributor):
    """How much the score falls when a box is replaced by the baseline; where boxes overlap, their mean.

    Args:
        window: size of the box, (C, *spatial) for images. For several inputs, a tuple of such sizes in call order.
        stride: steps between boxes, likewise; None puts them side by side.
        baseline: what takes the box's place.
        top_k: if given, only the ``top_k`` strongest boxes are looked for, from coarse to fine: boxes four times as
            wide are halved wherever a part of them may be among the strongest, taking it that no part of a box has
            more effect than the box. What is not divided shares its effect among the boxes in it. ``facts`` say how
            many boxes were tried, of how many, and the largest effect of a box that was not divided.

    Reference: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv:1311.2901);
    values equal ``captum.attr.Occlusion``.
    """

    window: Sequence[int] | Sequence[Sequence[int]] = (1, 16, 16, 16)
    stride: Sequence[int] | Sequence[Sequence[int]] | None = None
    baseline: BaselineLike = field(default_factory=Blur)
    top_k: int | None = None

    by_window: ClassVar[bool] = True

    @property
    def spreads(self) -> bool:
        return self.top_k is None  # what is divided is decided from all windows

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and (self.top_k < 1 or self.stride is not None):
            raise InputError(
                f"Occlusion(top_k={self.top_k}, stride={self.stride}): from coarse to fine it looks for 1 or more "
                "boxes, which lie side by side (stride=None)."
            )

    def attribute(self, scoring: Scoring) -> Attribution:
        if self.top_k is None:
            return super().attribute(scoring)
        windows = self._per_input(self.window, scoring)
        fine = _grids(scoring.inputs, windows, windows)
        return average([self._search(scoring, start, fine, self.top_k) for start in self.draws(scoring)])

    def _search(self, scoring: Scoring, baseline: Tensors, fine: list[_Grid], top_k: int) -> Attribution:
        search = _Search(self.effects(scoring, baseline), scoring.values, fine)
        search.run(top_k)
        total = sum(math.prod(grid.shape) for grid in fine)
        facts = {
            "pieces": len(search.tried),
            "pieces_of_full_grid": total,
            "largest_not_divided": search.missed,
        }
        return search.effects.attribution(search.paint(scoring.inputs), facts)

    def plan(self, scoring: Scoring) -> PaintedPlan:
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
class _BoxPlan(PaintedPlan):
    inputs: Tensors
    grids: list[_Grid]

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.grids[-1].last

    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        for source, (grid, x) in enumerate(zip(self.grids, self.inputs, strict=True)):
            axes = zip(term.coordinates(x), grid.starts, grid.window, strict=True)
            for sides in product(*(_sides(axis.cpu(), starts, length) for axis, starts, length in axes)):
                number = grid.first + int(np.ravel_multi_index([side.number for side in sides], grid.shape))
                yield from _piece(number, source, sides, differs[source])

    def paint(self, effects: Tensor) -> Tensors:
        return tuple(
            _paint_boxes(effects[:, grid.first : grid.last], grid, x)
            for grid, x in zip(self.grids, self.inputs, strict=True)
        )


class _Box(NamedTuple):
    """A box of a search from coarse to fine.

    Args:
        source: which input it lies in.
        starts: where it starts along each axis, in voxels.
        size: along each axis, in voxels; it may reach over the end of the input.
    """

    source: int
    starts: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        """The index of the box in every sample."""
        return (slice(None), *(slice(a, a + n) for a, n in zip(self.starts, self.size, strict=True)))

    def halves(self, finest: Sequence[int], shape: Sequence[int]) -> list[_Box]:
        """Return the boxes of half the width within it, down to the finest, that lie in an input of a shape."""
        size = tuple(max(n // 2, m) for n, m in zip(self.size, finest, strict=True))
        axes = [
            range(a, min(a + n, length), part)
            for a, n, part, length in zip(self.starts, self.size, size, shape, strict=True)
        ]
        return [_Box(self.source, starts, size) for starts in product(*axes)]


@dataclass(frozen=True, eq=False)
class _BoxList(Plan):
    inputs: Tensors
    boxes: Sequence[_Box]

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.boxes)

    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        axes = [[axis.cpu() for axis in term.coordinates(x)] for x in self.inputs]
        for number, box in enumerate(self.boxes):
            along = zip(axes[box.source], box.starts, box.size, strict=True)
            sides = [side for axis, start, n in along for side in _sides(axis, range(start, start + 1), n)]
            if len(sides) == len(box.starts):
                yield from _piece(number, box.source, sides, differs[box.source])


_LEVELS = 2
"""How often boxes are doubled in width before a search from coarse to fine."""


class _Search:
    """Looks for the strongest boxes from coarse to fine.

    Args:
        effects: what boxes do to the score.
        inputs: whole inputs.
        fine: the boxes that are looked for, on every input.
    """

    def __init__(self, effects: Effects, inputs: Tensors, fine: Sequence[_Grid]) -> None:
        self.effects = effects
        self._inputs = inputs
        self._finest = [grid.window for grid in fine]
        self.tried: dict[_Box, Tensor] = {}
        self._divided: set[_Box] = set()

    def run(self, top_k: int) -> None:
        """Divide until no box that was not divided has more effect than the ``top_k`` strongest of the finest."""
        self._try([box for source in range(len(self._inputs)) for box in self._coarse(source)])
        while boxes := self._promising(top_k):
            self._divided |= set(boxes)
            halves = (
                box.halves(self._finest[box.source], self._inputs[box.source].shape[1:]) for box in boxes
            )
            self._try([half for part in halves for half in part])

    def _coarse(self, source: int) -> list[_Box]:
        shape, finest = self._inputs[source].shape[1:], self._finest[source]
        size = tuple(
            n if axis == 0 else n * 2**_LEVELS  # channels, and the entries of vectors, are not joined
            for axis, n in enumerate(finest)
        )
        axes = [range(0, length, n) for length, n in zip(shape, size, strict=True)]
        return [_Box(source, starts, size) for starts in product(*axes)]

    def _try(self, boxes: Sequence[_Box]) -> None:
        self.tried |= dict(zip(boxes, self.effects.of(_BoxList(self._inputs, boxes)).T, strict=True))

    def _promising(self, top_k: int) -> list[_Box]:
        """Return the quarter with most effect of the boxes whose parts may be among the strongest."""
        finest = [effect.abs() for box, effect in self.tried.items() if self._is_finest(box)]
        least = torch.stack(finest).topk(top_k, 0).values[-1] if len(finest) >= top_k else None
        excess = {
            box: float((effect.abs() if least is None else effect.abs() - least).max())
            for box, effect in self._whole()
        }
        found = sorted((box for box, more in excess.items() if more > 0), key=lambda box: -excess[box])
        return found[: math.ceil(len(found) / 4)]

    def _whole(self) -> Iterator[tuple[_Box, Tensor]]:
        """Iterate over the boxes that could be divided and were not, with their effects (N,)."""
        for box, effect in self.tried.items():
            if not self._is_finest(box) and box not in self._divided:
                yield box, effect

    @property
    def missed(self) -> float:
        """The largest effect of a box that was not divided."""
        return max((float(effect.abs().max()) for _, effect in self._whole()), default=0.0)

    def paint(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return maps with the effects of the finest boxes, and shares of those that were not divided."""
        maps = {name: torch.zeros_like(x) for name, x in inputs.items()}
        values = list(maps.values())
        for box, effect in self.tried.items():
            if box not in self._divided:
                shape, finest = values[box.source].shape[1:], self._finest[box.source]
                share = effect / math.prod(
                    math.ceil(min(n, length - a) / m)
                    for a, n, length, m in zip(box.starts, box.size, shape, finest, strict=True)
                )
                values[box.source][box.place] = share.reshape(-1, *[1] * len(shape))
        return maps

    def _is_finest(self, box: _Box) -> bool:
        return box.size == self._finest[box.source]


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


def _piece(number: int, source: int, sides: Sequence[_Side], differs: Tensor) -> Iterator[Piece]:
    """Yield the piece within some sides, if the input differs from the baseline there."""
    box = tuple(side.extent for side in sides)
    mask = None if all(side.is_filled for side in sides) else outer([side.inside for side in sides])
    if (differs[box] if mask is None else mask & differs[box]).any():
        yield Piece(number, source, box, mask)


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
