"""ROAD: what was taken away is interpolated from what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from monai_xai.baselines.base import Baseline
from monai_xai.errors import AttributionError
from monai_xai.grids import bounding_box


@dataclass(frozen=True)
class Road(Baseline):
    """Noisy linear imputation: voxels that are taken away become the weighted mean of their neighbors.

    Neighbors that are taken away too are unknowns of one sparse linear system. The weights are those of the kernel
    [1, 2, 1] along every axis: 1/6 and 1/12 in 2D; 1/14 (face), 1/28 (edge) and 1/56 (corner) in 3D. Where nothing of
    a channel is left, its mean takes its place. Vectors get zeros.

    Args:
        noise: standard deviation of Gaussian noise on what is imputed, as a share of the standard deviation of the
            channel.
        seed: seed of the noise.

    Reference: Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022
    (arXiv:2202.00449), section 4; there in 2D.
    """

    noise: float = 0.01
    seed: int = 0
    stochastic: ClassVar[bool] = True
    conditional: ClassVar[bool] = True

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what is left where nothing is known: the mean of each channel, and zeros for vectors."""
        if x.ndim == 2:
            return (torch.zeros_like(x),)
        return (x.mean(tuple(range(2, x.ndim)), keepdim=True).expand_as(x),)

    def impute(self, x: Tensor, removed: Tensor, draw: Tensor | None = None) -> Tensor:
        if x.ndim == 2:
            return torch.where(removed, 0, x)
        gone = removed.expand_as(x)
        filled = torch.where(gone, self.draws(x)[0] if draw is None else draw, x)
        precision = torch.promote_types(x.dtype, torch.float32)
        for index in np.ndindex(*x.shape[:2]):
            if gone[index].any() and not gone[index].all():
                near = bounding_box(gone[index], margin=1)  # what is further away has no influence
                known, removed_here = x[index][near].to(precision), gone[index][near]
                filled[index][near] = _impute(known, removed_here, _TOLERANCE[x.dtype]).to(x)
        return filled if self.noise == 0 else torch.where(removed, filled + self._noise(x), x)

    def _noise(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device)
        return noise * self.noise * x.std(tuple(range(2, x.ndim)), keepdim=True, correction=0)


_MOST_ITERATIONS = 5000
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def _impute(values: Tensor, removed: Tensor, tolerance: float) -> Tensor:
    """Return one channel (*spatial) with each removed voxel the weighted mean of its neighbors.

    The system is symmetric and positive definite as long as something is left; solved by conjugate gradients with the
    diagonal as preconditioner, starting from the mean of what is left.
    """
    diagonal = _sum_neighbors(torch.ones_like(values))

    def apply(x: Tensor) -> Tensor:
        return torch.where(removed, diagonal * x - _sum_neighbors(x), 0)

    known = torch.where(removed, 0, values)
    shift = values[
        ~removed
    ].mean()  # what is left is held against its mean, so that the tolerance is of the contrast
    right = torch.where(removed, _sum_neighbors(torch.where(removed, 0, values - shift)), 0)
    found, residual = torch.zeros_like(values), right
    scaled = residual / diagonal
    direction, product = scaled, (residual * scaled).sum()
    limit = tolerance**2 * product
    for _ in range(_MOST_ITERATIONS):
        if product <= limit:
            return torch.where(removed, found + shift, known)
        moved = apply(direction)
        length = product / (direction * moved).sum()
        found = found + length * direction
        residual = residual - length * moved
        scaled = residual / diagonal
        before, product = product, (residual * scaled).sum()
        direction = scaled + product / before * direction
    raise AttributionError(
        f"Road: the system of {int(removed.sum())} removed voxels of {removed.numel()} did not converge."
    )


def _sum_neighbors(x: Tensor) -> Tensor:
    """Return the sum of neighbors with the weights of [1, 2, 1] along every axis, halved; none beyond the edges."""
    total = x
    for axis in range(x.ndim):
        length = x.shape[axis]
        summed = total.clone()
        if length > 1:
            summed.narrow(axis, 1, length - 1).add_(total.narrow(axis, 0, length - 1), alpha=0.5)
            summed.narrow(axis, 0, length - 1).add_(total.narrow(axis, 1, length - 1), alpha=0.5)
        total = summed
    return total - x
