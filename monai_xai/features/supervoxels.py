"""Supervoxels: pieces of an image of about one size that follow its edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import slic
from torch import Tensor
from torch.nn.functional import interpolate

from monai_xai.errors import InputError
from monai_xai.features.base import CaseFeatures
from monai_xai.grids import Case, RegionLike, bounding_box, grids_of, mask_on_grid

MOST_CUBES = 4
"""An anisotropic image is resampled to at most this many cubes for each of its voxels."""


@dataclass(frozen=True, eq=False)
class Supervoxels(CaseFeatures):
    """Supervoxels (SLIC) of each image input, in 2D superpixels; each entry of a vector is one feature.

    All channels of an input are clustered together, each scaled by its 1st and 99th percentile. Supervoxels are round
    in millimeters, not in voxels: an anisotropic image is resampled to cubes before, and the labels back to its own
    grid, since SLIC of scikit-image sets its seeds on a grid of voxels whatever spacing it is told (of a noisy image in
    slices of 5 mm, 7 supervoxels of 200 were left).

    Args:
        n_segments: about how many, within the region that is divided.
        compactness: how much nearness counts against likeness; larger is rounder, 0.01 follows edges, 1 is a grid.
        spacing: size of a voxel along each axis in mm; None takes it from the affine of a ``MetaTensor``, and takes
            voxels of any other tensor as cubes.
        within: what is divided; what lies outside is one feature, the background. "foreground" leaves out the voxels
            that have in all channels the value of the image's first voxel and are connected to it (air, a masked
            background), as long as they are more than one supervoxel's worth; None divides everything; also a region,
            a mask or its file.

    Raises:
        InputError: if there are more segments than voxels, or the image is not finite.

    Reference: Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", TPAMI 2012
    (doi:10.1109/TPAMI.2012.120); seeds within a mask as in Irving, "maskSLIC" (arXiv:1606.09518).
    """

    n_segments: int = 200
    compactness: float = 0.1
    spacing: Sequence[float] | None = None
    within: RegionLike | Literal["foreground"] | None = field(default="foreground")

    of_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.n_segments, bool) or not isinstance(self.n_segments, int) or self.n_segments < 1:
            raise InputError(f"Supervoxels(n_segments={self.n_segments!r}) must be a whole number from 1.")
        if not 0 < self.compactness < math.inf:
            raise InputError(f"Supervoxels(compactness={self.compactness}) must be positive.")

    def feature_name(self, number: int) -> str:
        return f"supervoxel {number}" if number else "background"

    def numbers(self, x: Tensor, name: str, case: Case | None) -> Tensor:
        dims = x.ndim - 2
        if dims not in (2, 3):
            raise InputError(
                f"Supervoxels need 2 or 3 spatial axes, the input {name!r} has shape {tuple(x.shape)}."
            )
        if x.shape[0] != 1:
            raise InputError(
                f"Supervoxels follow the image, and a batch has one partition; the input {name!r} has {x.shape[0]} "
                "samples: explain one sample at a time."
            )
        plain = (x.as_tensor() if isinstance(x, MetaTensor) else x).detach().float().cpu()
        if not torch.isfinite(plain).all():
            raise InputError(
                f"Supervoxels need a finite image, the input {name!r} has NaN or infinite values."
            )
        inside = self._inside(x, plain, case)
        if (count := int(inside.sum())) < self.n_segments:
            raise InputError(
                f"Supervoxels(n_segments={self.n_segments}) are more than the {count} voxels of the input {name!r} "
                "that they divide."
            )
        box = (slice(None), slice(None), *bounding_box(inside[0, 0]))
        labels = torch.zeros(inside.shape, dtype=torch.long)
        labels[box] = torch.from_numpy(
            self._divide(_scaled(plain[box], inside[box]), inside[box], self._spacing(x, dims))
        )
        return labels.to(x.device)

    def _spacing(self, x: Tensor, dims: int) -> tuple[float, ...]:
        spacing = grids_of(x)[0].spacing if self.spacing is None else tuple(self.spacing)
        if spacing is None:
            return (1.0,) * dims
        if len(spacing) != dims or not all(0 < size < math.inf for size in spacing):
            raise InputError(
                f"Supervoxels(spacing={spacing}) must be {dims} positive sizes of a voxel in mm."
            )
        return spacing

    def _inside(self, x: Tensor, plain: Tensor, case: Case | None) -> Tensor:
        """Return what is divided, shape (1, 1, *spatial), bool."""
        if self.within is None:
            return torch.ones_like(plain[:, :1], dtype=torch.bool)
        if isinstance(self.within, str) and self.within == "foreground":
            return _foreground(plain, max(plain[0, 0].numel() / self.n_segments, 1))
        find = mask_on_grid if case is None else case.mask
        return find(self.within, x, "Supervoxels(within=...)").cpu()

    def _divide(self, image: Tensor, inside: Tensor, spacing: Sequence[float]) -> NDArray[np.int64]:
        """Return labels of shape (*spatial), 0 outside."""
        size = _cubes(image.shape[2:], spacing)
        mode = "bilinear" if image.ndim == 4 else "trilinear"
        cubes = interpolate(image, size, mode=mode) if size != tuple(image.shape[2:]) else image
        within = interpolate(inside.to(torch.uint8), size, mode="nearest-exact")[0, 0].numpy() > 0
        whole = bool(inside.all())
        labels = slic(
            np.moveaxis(cubes[0].numpy(), 0, -1),
            n_segments=self.n_segments,
            compactness=self.compactness * math.sqrt(image.shape[1]),
            mask=None if whole else within,
            start_label=1,
            convert2lab=False,  # three channels are three sequences, not RGB
            channel_axis=-1,
        )
        found = torch.from_numpy(labels.astype(np.float32))[None, None]
        back = interpolate(found, image.shape[2:], mode="nearest-exact")[0, 0].numpy().astype(np.int64)
        return _filled(back, inside[0, 0].numpy(), spacing)


def _scaled(image: Tensor, inside: Tensor) -> Tensor:
    """Return an image with the 1st and 99th percentile of each channel within a mask at 0 and 1, clipped."""
    channels = []
    for channel in image[0]:
        low, high = np.percentile(channel[inside[0, 0]].numpy(), (1, 99)).tolist()
        scaled = (channel - low) / (high - low) if high > low else torch.zeros_like(channel)
        channels.append(scaled.clamp(0, 1))
    return torch.stack(channels)[None]


def _foreground(image: Tensor, least: float) -> Tensor:
    """Return all but the voxels around the first one that are equal to it, if they are more than ``least``."""
    corner = image[0].flatten(1)[:, 0].reshape(-1, *[1] * (image.ndim - 2))
    labels, _ = ndimage.label((image[0] == corner).all(0).numpy())
    background = torch.from_numpy(labels == labels.flat[0])[None, None]
    is_one = least < int(background.sum()) < background.numel()
    return ~background if is_one else torch.ones_like(background)


def _cubes(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the shape of a grid of cubes over an image, as fine as its finest axis, but for too many of them."""
    if max(spacing) < 1.01 * min(spacing):
        return tuple(shape)
    lengths = [n * size for n, size in zip(shape, spacing, strict=True)]
    edge = max(min(spacing), (math.prod(spacing) / MOST_CUBES) ** (1 / len(shape)))
    return tuple(max(1, round(length / edge)) for length in lengths)


def _filled(labels: NDArray[Any], inside: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.int64]:
    """Return labels with 0 outside, and inside the nearest one where there is none."""
    missing = inside & (labels == 0)
    if missing.any():
        nearest = ndimage.distance_transform_edt(
            labels == 0, sampling=spacing, return_distances=False, return_indices=True
        )
        labels = np.where(missing, labels[tuple(nearest)], labels)
    return np.where(inside, labels, 0)
