"""How a volume lies in front of the viewer: planes, letters, millimeters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

LETTERS = (("R", "L"), ("A", "P"), ("S", "I"))
WORLD_PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}


class Plane(NamedTuple):
    """One way to cut, in axes of the displayed volume.

    Args:
        name: what a reader calls it, such as ``"axial"``.
        cut: the axis that is held fixed; None where there is nothing to cut (2D).
        rows: the axis that runs down the picture.
        columns: the axis that runs to the right.
        letters: what stands at the left, right, top and bottom edge.
    """

    name: str
    cut: int | None
    rows: int
    columns: int
    letters: tuple[str, str, str, str]


@dataclass(frozen=True, eq=False)
class Geometry:
    """How the axes of an array become axes of the display.

    With an affine, display axes run to the patient's left, back and feet (in this order), so that every plane appears
    the radiological way: patient's right on the left of the picture, nose up in axial and to the left in sagittal
    planes. Without an affine the array is shown as it lies and axes are called by number.

    Args:
        order: the array axis that becomes each display axis.
        flips: whether it is reversed.
        spacing: voxel size along each display axis, in mm; 1 where it is not known.
        planes: the planes through the volume, the most familiar first.
        affine: voxel to world (RAS, mm), one column per array axis and one for the offset; None if not known.
        tilt: the largest angle between an axis of the array and the axis of the body that it is called by, in degrees.
    """

    order: tuple[int, ...]
    flips: tuple[bool, ...]
    spacing: tuple[float, ...]
    planes: tuple[Plane, ...]
    affine: NDArray[np.float64] | None
    tilt: float = 0.0

    def show(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array (..., *spatial) with its last axes in display order."""
        first = array.ndim - len(self.order)
        turned = array.transpose(*range(first), *(first + axis for axis in self.order))
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        return turned[(slice(None),) * first + steps]

    def voxel(self, index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the array's index of a displayed voxel; ``shape`` is the displayed one."""
        voxel = [0] * len(index)
        for axis, flip, i, size in zip(self.order, self.flips, index, shape, strict=True):
            voxel[axis] = size - 1 - i if flip else i
        return tuple(voxel)

    def millimeters(self, voxel: tuple[int, ...]) -> tuple[float, ...] | None:
        """Return the world position (RAS, mm) of an index of the array; None without an affine."""
        if self.affine is None:
            return None
        return tuple(float(x) for x in self.affine @ (*voxel, 1.0))

    def describe(self, voxel: tuple[int, ...]) -> str:
        """Return an index of the array in words: ``voxel (8, 3, 1), L 21.0 A 4.5 S 33.0 mm``."""
        position = self.millimeters(voxel)
        where = "" if position is None else f", {' '.join(map(_side, position, LETTERS))} mm"
        return f"voxel ({', '.join(map(str, voxel))}){where}"

    def slice_name(self, plane: Plane, index: tuple[int, ...], shape: tuple[int, ...]) -> str:
        """Return where a cut through a displayed voxel lies: ``S 33 mm``, or ``slice 12`` of the array.

        Args:
            plane: how the volume is cut.
            index: a displayed voxel on the cut.
            shape: the displayed shape.
        """
        if plane.cut is None:
            return ""
        voxel = self.voxel(index, shape)
        position = self.millimeters(voxel)
        if position is None:
            return f"slice {voxel[self.order[plane.cut]]}"
        return f"{_side(position[plane.cut], LETTERS[plane.cut], digits=0)} mm"


def _side(value: float, letters: tuple[str, str], digits: int = 1) -> str:
    return f"{letters[0] if value >= 0 else letters[1]} {abs(value):.{digits}f}"


def geometry_of(
    affine: NDArray[Any] | None, dimensions: int, spacing: Sequence[float] | None = None
) -> Geometry:
    """Return how an array of 2 or 3 spatial dimensions is shown.

    Args:
        affine: voxel to world (RAS, mm), shape (4, 4), or (3, 3) for 2D; None, not finite or singular: not known.
        dimensions: number of spatial dimensions.
        spacing: voxel size along each axis in mm, where that is all that is known; None: 1.
    """
    columns = None if affine is None else np.asarray(affine, dtype=float)[:, [*range(dimensions), -1]]
    if columns is None or not _is_invertible(columns[:-1, :-1]):
        return _unnamed(dimensions, spacing)
    orientation = io_orientation(columns)
    worlds = [int(world) for world, _ in orientation]
    order = tuple(int(axis) for axis in np.argsort(worlds))
    sizes = np.linalg.norm(columns[:-1, :-1], axis=0)
    along = np.abs(columns[worlds, range(dimensions)]) / sizes
    return Geometry(
        order=order,
        flips=tuple(bool(orientation[axis, 1] > 0) for axis in order),
        spacing=tuple(float(sizes[axis]) for axis in order),
        planes=_named_planes(sorted(worlds)),
        affine=columns[:-1],
        tilt=float(np.degrees(np.arccos(min(1.0, along.min())))),
    )


def _is_invertible(linear: NDArray[Any]) -> bool:
    return bool(np.isfinite(linear).all() and np.linalg.matrix_rank(linear) == linear.shape[1])


def _named_planes(worlds: list[int]) -> tuple[Plane, ...]:
    """Return axial, coronal, sagittal; for 2D the one plane that the two world axes span."""
    if len(worlds) == 2:
        (missing,) = {0, 1, 2} - set(worlds)
        return (Plane(WORLD_PLANES[missing], None, 1, 0, (*LETTERS[worlds[0]], *LETTERS[worlds[1]])),)
    return tuple(
        Plane(WORLD_PLANES[cut], cut, rows, columns, (*LETTERS[columns], *LETTERS[rows]))
        for cut, rows, columns in ((2, 1, 0), (1, 2, 0), (0, 2, 1))
    )


def _unnamed(dimensions: int, spacing: Sequence[float] | None) -> Geometry:
    """Return the array as it lies: earlier axes run down, later axes to the right, as in MONAI's own plots."""
    pairs = [(None, 0, 1)] if dimensions == 2 else [(2, 0, 1), (1, 0, 2), (0, 1, 2)]
    return Geometry(
        order=tuple(range(dimensions)),
        flips=(False,) * dimensions,
        spacing=(1.0,) * dimensions if spacing is None else tuple(map(float, spacing)),
        planes=tuple(
            Plane(
                f"axis {cut}",
                cut,
                rows,
                columns,
                (f"{rows}\N{DOWNWARDS ARROW}", "", f"{columns}\N{RIGHTWARDS ARROW}", ""),
            )
            for cut, rows, columns in pairs
        ),
        affine=None,
    )
