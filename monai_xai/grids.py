"""Grids: where the voxels of an input lie, and images and label maps of other grids brought onto them.

Positions are in millimeters in the patient's or a template's space, RAS as in NIfTI; an affine takes voxels there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys, SpaceKeys
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from monai_xai.errors import EmptyRegionError, InputError
from monai_xai.regions import Needs, Region

ImageSource = Tensor | str | Path
"""An image or label map: a tensor on the grid of the input, a ``MetaTensor`` anywhere, or a file that nibabel reads."""

RegionLike = Region | ImageSource
"""Voxels of an input: a region, or a mask (not 0 inside) as a tensor or file."""


class Grid(NamedTuple):
    """The grid of one sample.

    Args:
        shape: of the spatial axes.
        spacing: size of a voxel along each, in mm; None if nothing is known.
        affine: voxel to space (RAS, mm), shape (D + 1, D + 1); None where the place in space is not known.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    affine: NDArray[np.float64] | None = None

    @property
    def voxel_volume(self) -> float | None:
        """Volume of a voxel in mm³, in 2D its area in mm²; None if it is not known."""
        return None if self.spacing is None else float(np.prod(self.spacing))


def grids_of(x: Tensor) -> list[Grid]:
    """Return the grid of each sample of an image, shape (N, C, *spatial)."""
    shape = tuple(x.shape[2:])
    if not isinstance(x, MetaTensor):
        return [Grid(shape)] * x.shape[0]
    affines = x.affine.reshape(-1, *x.affine.shape[-2:])
    return [_grid(x, shape, affines[i % len(affines)], i) for i in range(x.shape[0])]


def _grid(x: MetaTensor, shape: tuple[int, ...], affine: Tensor, sample: int) -> Grid:
    matrix = _of_axes(_matrix(affine), len(shape))
    spacing = tuple(np.linalg.norm(matrix[:-1, :-1], axis=0).tolist())
    one = x[sample : sample + 1] if x.is_batch else x
    assert isinstance(one, MetaTensor)
    known = _known(one, _matrix(affine))
    return Grid(shape, spacing, None if known is None else _of_axes(known, len(shape)))


def affine_of(image: Tensor) -> NDArray[np.float64] | None:
    """Return the affine of an image (voxel to RAS, mm); None where nothing is known about its place in space.

    An image that began with the identity, which is what MONAI gives to arrays without a header, does not lie in any
    known direction, whatever flips and crops have made of it since; letters for right and left would be made up.
    """
    return _known(image, _matrix(image.affine)) if isinstance(image, MetaTensor) else None


def _known(image: MetaTensor, affine: NDArray[np.float64]) -> NDArray[np.float64] | None:
    if MetaKeys.ORIGINAL_AFFINE in image.meta:
        origin = _matrix(image.meta[MetaKeys.ORIGINAL_AFFINE])
        is_known = not np.array_equal(origin, np.eye(len(origin)))
    else:
        operations = image.applied_operations[0] if image.is_batch else image.applied_operations
        turns = not np.array_equal(affine[:-1, :-1], np.eye(len(affine) - 1))
        is_known = turns or (bool(affine[:-1, -1].any()) and not operations)
    if not is_known:
        return None
    space = image.meta.get(MetaKeys.SPACE, SpaceKeys.RAS)
    space = space if isinstance(space, str) else space[0]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine if space == SpaceKeys.LPS and len(affine) == 4 else affine


def _matrix(affine: Any) -> NDArray[np.float64]:
    matrix = torch.as_tensor(affine).detach().cpu().double().numpy()
    return matrix[0] if matrix.ndim == 3 else matrix


def _of_axes(affine: NDArray[np.float64], dims: int) -> NDArray[np.float64]:
    """Return the affine of the first axes."""
    kept = [*range(dims), -1]
    return affine[np.ix_(kept, kept)]


def bounding_box(mask: Tensor, margin: int = 0) -> tuple[slice, ...]:
    """Return the smallest box around a mask (*spatial) that is not empty, with a margin as far as the grid reaches."""
    places = mask.nonzero()
    low, high = places.amin(0).tolist(), places.amax(0).tolist()
    return tuple(slice(max(a - margin, 0), b + 1 + margin) for a, b in zip(low, high, strict=True))


class _Image(NamedTuple):
    """Values on a grid of their own.

    Args:
        values: shape (*spatial).
        affine: of the grid; None for values on the grid of the input.
    """

    values: NDArray[Any]
    affine: NDArray[np.float64] | None


def label_map(source: ImageSource, grid: Grid, owner: str, to_source: Tensor | None = None) -> Tensor:
    """Return a label map on a grid, nearest neighbor; 0 where it does not reach.

    Args:
        source: whole numbers from 0.
        grid: of one sample.
        owner: who asks, for errors.
        to_source: affine from the space of the grid to that of the source (mm), shape (D + 1, D + 1); None: they are
            one space.

    Shapes: result (1, 1, *spatial), int64.

    Raises:
        InputError: if it holds anything else than labels, or has no known place and another shape than the grid.
    """
    image = _read(source, grid, owner)
    values = image.values
    if not np.isfinite(values).all() or (values != np.round(values)).any() or (values < 0).any():
        raise InputError(
            f"{owner} needs a label map of whole numbers from 0, got values such as {_odd(values)}. Labels that were "
            "resampled must be resampled with nearest neighbor."
        )
    labels = values.astype(np.int64)
    placed = _resampled(_Image(labels, image.affine), grid, owner, to_source, order=0, mode="grid-constant")
    return torch.from_numpy(placed)[None, None]


def _odd(values: NDArray[Any]) -> str:
    odd = ~np.isfinite(values) | (values != np.round(values)) | (values < 0)
    return str(values[odd].ravel()[:3].tolist())


def image_on_grid(source: ImageSource, grid: Grid, owner: str) -> Tensor:
    """Return one channel of an image on a grid, by linear interpolation; beyond its edges, their values.

    Shapes: result (1, 1, *spatial), float64.

    Raises:
        InputError: if it is not finite, does not meet the grid, or has no known place and another shape.
    """
    image = _read(source, grid, owner)
    if not np.isfinite(image.values).all():
        raise InputError(f"{owner} needs a finite image, got NaN or infinite values.")
    ones = _Image(np.ones(image.values.shape, dtype=np.uint8), image.affine)
    if not _resampled(ones, grid, owner, None, order=0, mode="grid-constant").any():
        raise InputError(f"{owner}: the image does not overlap the input in space. {_places(image, grid)}")
    values = _Image(image.values.astype(np.float64), image.affine)
    return torch.from_numpy(_resampled(values, grid, owner, None, order=1, mode="nearest"))[None, None]


def _resampled(
    image: _Image, grid: Grid, owner: str, to_source: Tensor | None, *, order: int, mode: str
) -> NDArray[Any]:
    if image.affine is None or _is_same(image, grid, to_source):
        return image.values.copy()
    if grid.affine is None:
        raise InputError(
            f"{owner}: the place of the input in space is not known (no MetaTensor, or one of the identity as affine, "
            "which MONAI gives to arrays without a header), so that nothing can be resampled to it. Load it with "
            "LoadImage, or give a plain tensor on its grid."
        )
    world = np.eye(len(grid.affine)) if to_source is None else _matrix(to_source)
    if world.shape != grid.affine.shape:
        raise InputError(f"{owner} needs an affine of shape {grid.affine.shape}, got {world.shape}.")
    matrix = np.linalg.inv(image.affine) @ world @ grid.affine
    placed: NDArray[Any] = ndimage.affine_transform(
        image.values, matrix[:-1, :-1], matrix[:-1, -1], output_shape=grid.shape, order=order, mode=mode
    )
    return placed


def _is_same(image: _Image, grid: Grid, to_source: Tensor | None) -> bool:
    return (
        to_source is None
        and grid.affine is not None
        and image.affine is not None
        and image.values.shape == grid.shape
        and np.allclose(image.affine, grid.affine, rtol=0, atol=1e-4)
    )


def places_text(source: ImageSource, grid: Grid, owner: str) -> str:
    """Say where a source and a grid lie in space, for errors."""
    return _places(_read(source, grid, owner), grid)


def _places(image: _Image, grid: Grid) -> str:
    if image.affine is None or grid.affine is None:
        return ""
    return (
        f"It lies in {_extent(image.affine, image.values.shape)} mm, the input in "
        f"{_extent(grid.affine, grid.shape)} mm (RAS)."
    )


def _extent(affine: NDArray[np.float64], shape: Sequence[int]) -> str:
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(len(shape), -1)
    points = affine[:-1, :-1] @ corners + affine[:-1, -1:]
    return " x ".join(
        f"[{low:.0f}, {high:.0f}]" for low, high in zip(points.min(1), points.max(1), strict=True)
    )


def _read(source: ImageSource, grid: Grid, owner: str) -> _Image:
    dims = len(grid.shape)
    if isinstance(source, Tensor):
        affine = affine_of(source)
        plain = source.as_tensor() if isinstance(source, MetaTensor) else source
        values = plain.detach().cpu().numpy()
    else:
        values, affine = _read_file(Path(source), owner)
    lead = values.ndim - dims
    if lead < 0 or any(length != 1 for length in values.shape[:lead]):
        trailing = values.shape[dims:]
        if lead > 0 and all(
            length == 1 for length in trailing
        ):  # NIfTI keeps further axes of length 1 at the end
            values, lead = values.reshape(values.shape[:dims]), 0
        else:
            raise InputError(
                f"{owner} needs one image of {dims} spatial axes, got shape {tuple(values.shape)}."
            )
    values = values.reshape(values.shape[lead:])
    if affine is not None:
        return _Image(values, _of_axes(affine, dims))
    if values.shape != grid.shape:
        raise InputError(
            f"{owner} of shape {tuple(values.shape)} is not on the grid of the input, {grid.shape}, and its place in "
            "space is not known. Give a file or a MetaTensor, which are resampled, or a tensor on that grid."
        )
    return _Image(values, None)


def _read_file(path: Path, owner: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    try:
        image = nibabel.load(path)
    except (OSError, ImageFileError) as error:
        raise InputError(f"{owner} cannot read {path}: {error}") from error
    affine = getattr(image, "affine", None)
    if affine is None:
        raise InputError(f"{owner} cannot use {path}: the file says nothing about its place in space.")
    return np.asanyarray(image.dataobj), np.asarray(affine, dtype=np.float64)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Case:
    """A batch as it was given, for what has to be laid out on it: supervoxels, atlases, images from files.

    Args:
        inputs: by name; ``MetaTensor`` where they have a place in space.
        select: returns the voxels of a region of the prediction or the label, shape (N, 1, *spatial), bool.
    """

    inputs: Mapping[str, Tensor]
    select: Callable[[Region], Tensor]

    def mask(self, region: RegionLike, x: Tensor, owner: str) -> Tensor:
        """Return the voxels of a region on the grid of one of the inputs.

        Shapes: x (N, C, *spatial); result (N, 1, *spatial), bool.

        Raises:
            InputError: if it is on another grid.
            EmptyRegionError: naming the sample without any.
        """
        return _on_grid(region, x, owner, self.select)


def mask_on_grid(region: RegionLike, x: Tensor, owner: str) -> Tensor:
    """Return the voxels of a region that needs no prediction; see :meth:`Case.mask`."""
    return _on_grid(region, x, owner, None)


def _on_grid(region: RegionLike, x: Tensor, owner: str, select: Callable[[Region], Tensor] | None) -> Tensor:
    if not isinstance(region, Region):
        masks = [label_map(region, grid, owner) for grid in grids_of(x)]
        found = torch.cat(masks).to(x.device) != 0
    elif region.needs <= Needs.GRID:
        found = region.mask(x, None, 0)
    elif select is None:
        raise InputError(
            f"{owner}: {region} is known to an explainer only, which has the prediction and the label. Here, give a "
            "mask: a tensor or a file."
        )
    else:
        found = select(region)
    if found.shape[2:] != x.shape[2:]:
        raise InputError(
            f"{owner}: {region} is on a grid of shape {tuple(found.shape[2:])}, the input has {tuple(x.shape[2:])}."
        )
    empty = (~found.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise EmptyRegionError(f"{owner}: the region {_spell(region)} is empty in sample {empty[0]}.")
    return found


def _spell(region: RegionLike) -> str:
    return f"of shape {tuple(region.shape)}" if isinstance(region, Tensor) else str(region)
