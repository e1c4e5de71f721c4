"""Extremal perturbations: smooth masks of a given area that keep or take as much of the score as they can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from monai_xai.attributors.base import Attribution, BaselineAttributor, average
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.explanation import rounding
from monai_xai.forward import Scoring
from monai_xai.terms import Tensors

TEMPERATURE = 1 / 20
"""Of the soft maximum over seeds; the smaller, the closer to the maximum."""

REACH = 1.5
"""A seed counts for voxels up to this many sigmas away, where next to nothing is left of its kernel."""

# Gradient steps with momentum and dampening and a growing weight of the area, as in the reference code. The
# first weight is so small that the score alone moves a mask, the last is where the reference code begins.
# Seeds start half-way: with all at one, a mask is largest along the borders of the image, which would rank
# first before the score says a word. Steps are longer where they are fewer, or the gradient is spread over
# more seeds.
_START = 0.5
_MOMENTUM = 0.9
_RATE = 1.0
_FIRST_WEIGHT = 1.0
_LAST_WEIGHT = 300.0

_CHUNK = 2**22  # how many products of seeds and kernel are in memory at once


@dataclass(frozen=True)
class ExtremalPerturbation(BaselineAttributor):
    r"""The smooth mask of a given area that keeps as much of the score as it can, summed over some areas.

    Args:
        areas: shares of an image that masks may take, each in (0, 1); one optimization for each.
        step: spacing of the seeds that a mask grows from, in voxels.
        sigma: how wide a seed grows, in voxels: it is 1 up to half of it. At least ``step``; the paper takes
            21 with a step of 7 on images of 224 x 224.
        baseline: what takes the place of what is masked away; maps are averaged over several (``Samples``).
        variant: "preserve" keeps what is inside the mask and maximizes the score; "delete" keeps what is
            outside and minimizes it.
        n_steps: gradient steps for each area; the paper takes 800.
        seed: seed of the order in which voxels of equal mask value are ranked. Where the score does not say
            which voxels a mask should take, it decides.

    A mask :math:`m` is the soft maximum of seeds :math:`\bar m_i` in [0, 1] under a radial kernel, and its
    seeds are found by gradient steps on

    .. math::

       \frac{\Phi(m \odot x + (1 - m) \odot b)}{|\Phi(x) - \Phi(b)|}
       - \lambda_t \frac{1}{|\Omega|} \lVert \operatorname{vecsort}(m) - r_a \rVert^2

    with :math:`r_a` zeros and then a share :math:`a` of ones, and :math:`\lambda_t` growing from 1 to 300;
    for "delete", the score is subtracted and :math:`m` and :math:`1 - m` change places. Other than in the
    paper's code, the score is divided by its change, which spares choosing :math:`\lambda` for each unit of a
    score; masks start half-way between image and baseline; images are not flipped, and maps not smoothed
    afterwards.

    An image has one mask for all of its channels; several images have one mask each, and each keeps to the
    area. Vectors and tokens stay as they are and get zeros. A sample's masks do not depend on its neighbors
    in a batch.

    The map is the sum of the masks over ``areas``, as in the paper, in [0, number of areas]: large where a
    voxel is taken even when little may be. For one mask, ask for one area. For each area a, ``facts`` holds
    the mean of the mask (``area_a``) and the score with it (``score_a``), averaged over the batch, and
    ``area_gap`` how far the worst mask is from its area.

    Shapes: maps (N, 1, *spatial) for images, zeros like the input for all others.

    Cost: for each area ``n_steps`` forward-backward passes and a forward pass; through sliding windows, of
    each window. Growing a mask of 96³ voxels takes seconds a step on one processor core, so that volumes want
    a GPU.

    Limits: a mask is a local optimum, and other masks may do as well. Its values are no contributions and do
    not add up to anything. What it shows depends on ``baseline``. An area smaller than what one seed grows
    to, about a ball of diameter ``sigma``, cannot be met: look at ``area_gap``.

    Reference: Fong, Patrick & Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth
    Masks", ICCV 2019 (arXiv:1910.08485), smooth masks as in equations 8 and 9.
    """

    areas: Sequence[float] | float = (0.05, 0.1, 0.2)
    step: int = 4
    sigma: float = 8.0
    baseline: BaselineLike = field(default_factory=Blur)
    variant: Literal["preserve", "delete"] = "preserve"
    n_steps: int = 300
    seed: int = 0

    linear: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        areas = (self.areas,) if isinstance(self.areas, int | float) else tuple(self.areas)
        object.__setattr__(self, "areas", areas)
        if not areas or not all(isinstance(area, float) and 0 < area < 1 for area in areas):
            raise InputError(
                f"ExtremalPerturbation(areas={areas}) needs one share of the image or several, each between 0 "
                "and 1, such as areas=(0.05, 0.1, 0.2)."
            )
        if self.step < 1 or self.step != int(self.step) or self.sigma < self.step:
            raise InputError(
                f"ExtremalPerturbation(step={self.step}, sigma={self.sigma}) needs a whole number of voxels "
                "as step, and sigma at least as large: seeds would not reach all voxels. Take step=4, sigma=8."
            )
        if self.n_steps < 1:
            raise InputError(
                f"ExtremalPerturbation(n_steps={self.n_steps}) needs at least one step; 300 are usual."
            )
        if self.variant not in ("preserve", "delete"):
            raise InputError(
                f"ExtremalPerturbation(variant={self.variant!r}): choose 'preserve' or 'delete'."
            )

    def attribute(self, scoring: Scoring) -> Attribution:
        images = self._images(scoring)
        score = scoring.score()
        parts = [self._explain(_Game(scoring, images, start, score, self)) for start in self.draws(scoring)]
        facts = {name: sum(float(p.facts[name]) for p in parts) / len(parts) for name in parts[0].facts}
        facts["area_gap"] = max(float(part.facts["area_gap"]) for part in parts)
        passes = len(parts) * len(self._areas) * (self.n_steps + 1)
        mean = average(parts)
        return replace(mean, facts={**mean.facts, **facts, "passes": passes})

    @property
    def _areas(self) -> tuple[float, ...]:
        assert isinstance(self.areas, tuple)
        return self.areas

    def _images(self, scoring: Scoring) -> list[int]:
        """Return which inputs are masked."""
        images = [
            i
            for i, (name, x) in enumerate(scoring.inputs.items())
            if x.ndim > 2 and name not in scoring.embedded
        ]
        if not images:
            shapes = {name: tuple(x.shape) for name, x in scoring.inputs.items()}
            raise InputError(
                f"ExtremalPerturbation masks images, shape (N, C, *spatial), but the inputs are {shapes}. "
                "For vectors and tokens use FeatureAblation or ShapleyValues."
            )
        return images

    def _explain(self, game: _Game) -> Attribution:
        """Return the sum of the masks over all areas."""
        totals: list[Tensor] = []
        facts: dict[str, float] = {}
        gaps = []
        for area in self._areas:
            masks = self._search(game, area)
            reached = torch.stack([mask.flatten(1).mean(1) for mask in masks])
            facts[f"area_{area:g}"] = float(reached.mean())
            facts[f"score_{area:g}"] = float(game.scoring.score(game.perturb(masks)).mean())
            gaps.append(float((reached - area).abs().max()))
            totals = [t + m for t, m in zip(totals, masks, strict=True)] if totals else masks
        maps = [torch.zeros_like(x) for x in game.scoring.values]
        for i, total in zip(game.images, totals, strict=True):
            maps[i] = total[:, None].to(maps[i])
        return Attribution(
            game.scoring.named(maps), game.score, game.baseline_score, {**facts, "area_gap": max(gaps)}
        )

    def _search(self, game: _Game, area: float) -> list[Tensor]:
        """Return the masks of one area, shape (N, *spatial) for each image."""
        beds, orders = game.beds, game.orders
        seeds = [bed.sow(game.scoring.values[i]) for bed, i in zip(beds, game.images, strict=True)]
        steps = [
            {"params": [seed], "lr": _RATE / self.n_steps * bed.count}
            for seed, bed in zip(seeds, beds, strict=True)
        ]
        optimizer = torch.optim.SGD(steps, momentum=_MOMENTUM, dampening=_MOMENTUM, maximize=True)
        for t in game.scoring.track(range(self.n_steps), f"{self.name} (area {area:g})"):
            weight = _FIRST_WEIGHT * (_LAST_WEIGHT / _FIRST_WEIGHT) ** (t / self.n_steps)
            grown = [bed.grow(seed) for bed, seed in zip(beds, seeds, strict=True)]
            masks = [mask.detach() for mask in grown]
            gains = game.gradient(masks)
            for i, (mask, gain) in enumerate(zip(masks, gains, strict=True)):
                # |vecsort(m) - r|² is the distance to the nearest mask of zeros and ones with this area.
                area_gradient = 2 * (mask - nearest(mask, area, orders[i])) / mask[0].numel()
                (seeds[i].grad,) = torch.autograd.grad(grown[i], seeds[i], gain - weight * area_gradient)
            optimizer.step()
            for seed in seeds:
                seed.detach().clamp_(0, 1)
        with torch.no_grad():
            return [bed.grow(seed) for bed, seed in zip(beds, seeds, strict=True)]


class _Game:
    """What is won with masks on some of the inputs, for one baseline.

    Args:
        scoring: the score.
        images: which inputs are masked.
        start: the baseline.
        score: at the inputs.
        method: whose options count.
    """

    def __init__(
        self,
        scoring: Scoring,
        images: Sequence[int],
        start: Tensors,
        score: Tensor,
        method: ExtremalPerturbation,
    ) -> None:
        self.scoring, self.images, self.score = scoring, images, score
        self.baseline_score = scoring.score(start)
        self.beds = [SeedBed(tuple(scoring.values[i].shape[2:]), method.step, method.sigma) for i in images]
        generator = torch.Generator().manual_seed(method.seed)
        self.orders = [
            torch.randperm(math.prod(bed.spatial), generator=generator).to(scoring.values[i].device)
            for bed, i in zip(self.beds, images, strict=True)
        ]
        keeps = method.variant == "preserve"
        self._inside, self._outside = (scoring.values, start) if keeps else (start, scoring.values)
        change = (score - self.baseline_score).abs()
        has_change = change > rounding(score, self.baseline_score)
        self._unit = torch.where(has_change, change, 1.0) * (1 if keeps else -1)

    def perturb(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs under masks of the images, each of shape (N, *spatial)."""
        points = list(self.scoring.values)
        for i, mask in zip(self.images, masks, strict=True):
            inside, outside = self._inside[i], self._outside[i]
            points[i] = outside + mask[:, None].to(outside) * (inside - outside)
        return points

    def gradient(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return how the gain, in units of the score's change, grows with each voxel of each mask."""
        _, gradients = self.scoring.gradient(self.perturb(masks))
        return [
            ((self._inside[i] - self._outside[i]) * gradients[i]).sum(1).to(mask)
            / self._unit.to(mask).reshape(-1, *(1,) * (mask.ndim - 1))
            for i, mask in zip(self.images, masks, strict=True)
        ]


def nearest(mask: Tensor, area: float, order: Tensor) -> Tensor:
    """Return the mask of zeros and ones with this area that is nearest to each mask: its largest voxels.

    Args:
        mask: shape (N, *spatial).
        area: share of the voxels that are one.
        order: permutation of the voxels that says which of equal voxels come last.
    """
    flat = mask.flatten(1)
    ones = max(1, round(area * flat.shape[1]))
    largest = order[flat[:, order].argsort(dim=1, stable=True)[:, -ones:]]
    return torch.zeros_like(flat).scatter_(1, largest, 1.0).reshape(mask.shape)


@dataclass(frozen=True, eq=False)
class SeedBed:
    r"""Where the seeds of a mask lie, and how they grow to it: a smooth max-convolution with a radial kernel.

    Seeds :math:`\bar m_i` lie at the centers :math:`u_i` of cells of ``step`` voxels along each axis, and

    .. math::

       m(u) = \operatorname{smax}_{i:\, |u - u_i| \le 1.5 \sigma} k(u - u_i) \, \bar m_i, \qquad
       \operatorname{smax}_i f_i = \frac{\sum_i f_i e^{f_i / T}}{\sum_i e^{f_i / T}}, \qquad
       k(u) = e^{-2 \max(0, |u| / \sigma - 1/2)^2}

    Args:
        spatial: shape of the mask.
        step: spacing of the seeds.
        sigma: width of the kernel.
    """

    spatial: tuple[int, ...]
    step: int
    sigma: float

    @property
    def cells(self) -> tuple[int, ...]:
        """How many seeds there are along each axis."""
        return tuple(-(-n // self.step) for n in self.spatial)

    @property
    def count(self) -> int:
        """How many seeds there are."""
        return math.prod(self.cells)

    @property
    def margins(self) -> tuple[int, ...]:
        """How many voxels the cells begin before the mask, along each axis."""
        return tuple((c * self.step - n) // 2 for c, n in zip(self.cells, self.spatial, strict=True))

    def sow(self, x: Tensor) -> Tensor:
        """Return the first seeds for a batch of images, shape (N, *cells), in single precision or better."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (len(x), *self.cells)
        return torch.full(shape, _START, dtype=dtype, device=x.device, requires_grad=True)

    def grow(self, seeds: Tensor) -> Tensor:
        """Return the mask of seeds, shape (N, *cells) to (N, *spatial)."""
        kernel, there = self._kernel.to(seeds), self._there.to(seeds.device)
        near = self._neighbors(seeds)
        size = max(1, _CHUNK // (len(seeds) * kernel.numel()))
        chunks = [
            checkpoint(_soft_maximum, part, kernel, seen, use_reentrant=False, preserve_rng_state=False)
            for part, seen in zip(near.split(size, 1), there.split(size), strict=True)
        ]
        return self._assemble(torch.cat(chunks, 1))

    @property
    def _reach(self) -> int:
        """How many cells away a seed may be that reaches a voxel."""
        return int((REACH * self.sigma + (self.step - 1) / 2) // self.step)

    @cached_property
    def _cube(self) -> Tensor:
        """The kernel at each voxel of a cell for all seeds in the cube around it; zero out of reach."""
        dims = len(self.spatial)
        voxels = torch.arange(self.step, dtype=torch.float64) - (self.step - 1) / 2
        seeds = torch.arange(-self._reach, self._reach + 1) * self.step
        squares = torch.zeros((1, 1), dtype=torch.float64)
        for _ in range(dims):
            axis = (voxels[:, None] - seeds).square()
            squares = (squares[:, None, :, None] + axis[:, None]).reshape(
                len(squares) * len(voxels), squares.shape[1] * len(seeds)
            )
        distance = squares.sqrt() / self.sigma
        return torch.where(distance <= REACH, torch.exp(-2 * (distance - 0.5).clamp(min=0).square()), 0.0)

    @cached_property
    def _near(self) -> Tensor:
        """Which seeds of the cube reach any voxel of the cell: its neighbors."""
        return self._cube.any(0).nonzero()[:, 0]

    @cached_property
    def _kernel(self) -> Tensor:
        """The kernel at each voxel of a cell for its neighbors."""
        return self._cube[:, self._near]

    @cached_property
    def _there(self) -> Tensor:
        """Which neighbors each cell has, shape (number of cells, number of neighbors)."""
        return self._neighbors(torch.ones((1, *self.cells)))[0] > 0

    def _neighbors(self, seeds: Tensor) -> Tensor:
        """Return the neighbors of each cell, shape (N, cells, neighbors); zero beyond the bed."""
        dims = len(self.spatial)
        around = functional.pad(seeds, [self._reach] * 2 * dims)
        for axis in range(1, dims + 1):
            around = around.unfold(axis, 2 * self._reach + 1, 1)
        return around.reshape(len(seeds), self.count, -1)[..., self._near.to(seeds.device)]

    def _assemble(self, values: Tensor) -> Tensor:
        """Put voxels in their places, shape (N, number of cells, voxels of a cell) to (N, *spatial)."""
        dims = len(self.spatial)
        shaped = values.reshape(-1, *self.cells, *(self.step,) * dims)
        axes = [0, *(axis for i in range(1, dims + 1) for axis in (i, i + dims))]
        whole = shaped.permute(axes).reshape(-1, *(c * self.step for c in self.cells))
        for axis, (margin, length) in enumerate(zip(self.margins, self.spatial, strict=True), start=1):
            whole = whole.narrow(axis, margin, length)
        return whole


def _soft_maximum(near: Tensor, kernel: Tensor, there: Tensor) -> Tensor:
    """Return the soft maximum over the seeds that reach each voxel.

    Shapes: near (N, cells, neighbors); kernel (voxels, neighbors); there (cells, neighbors); result
    (N, cells, voxels).
    """
    products = near[:, :, None] * kernel
    reached = there[:, None] & (kernel > 0)
    return (products * (products / TEMPERATURE).masked_fill(~reached, -math.inf).softmax(-1)).sum(-1)
