"""A small thorax in millimeters, sampled on any grid: CT and PET see the same body, each with voxels of its own.

All lengths are in mm, in world coordinates (RAS: x to the right of the patient, y to the front, z up, origin in the
middle of the chest). Everything is a function of points, so that two grids with nothing in common but the world show
one patient. A *depth* is the distance to a surface, positive inside; `share` turns it into the share of a voxel that
lies inside.

The chest is that of an infant, 12 cm wide, so that it fits into few voxels of the usual size and trains in a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Volume = NDArray[np.float64]
Point = tuple[float, float, float]

# One row per tissue: its density in HU and its uptake in SUV.
TISSUE: Mapping[str, tuple[float, float]] = {
    "air": (-1000.0, 0.0),
    "fat": (-90.0, 0.4),
    "muscle": (45.0, 0.8),
    "bone": (300.0, 1.0),
    "liver": (60.0, 2.2),
    "mediastinum": (40.0, 1.4),
    "lung": (-840.0, 0.4),
}


@dataclass(frozen=True)
class Grid:
    """The voxel grid of one scan.

    Args:
        shape: how many voxels.
        affine: (4, 4), voxels to millimeters (RAS).
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @cached_property
    def points(self) -> Volume:
        """Voxel centers in mm, (3, X, Y, Z)."""
        voxels = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in self.shape), indexing="ij"))
        turned: Volume = np.einsum("ij,jxyz->ixyz", self.affine[:3, :3], voxels)
        return turned + self.affine[:3, 3, None, None, None]

    def blur(self, volume: Volume, sigma_mm: float) -> Volume:
        """Smooth a volume on this grid, (X, Y, Z)."""
        sigma = sigma_mm / np.linalg.norm(self.affine[:3, :3], axis=0)
        blurred: Volume = gaussian_filter(volume, sigma, mode="nearest", truncate=3.0)
        return blurred

    def noise(self, rng: np.random.Generator, sigma_mm: float) -> Volume:
        """Smooth noise, (X, Y, Z), of standard deviation 1."""
        noise = self.blur(rng.standard_normal(self.shape), sigma_mm)
        return noise / noise.std()


def share(depth: Volume, blur_mm: float = 3.0) -> Volume:
    """Share of a voxel inside a surface, from the depth of its center."""
    inside: Volume = np.clip(depth / blur_mm + 0.5, 0.0, 1.0)
    return inside


def ellipsoid(points: Volume, center: Point, axes: Point) -> Volume:
    """Depth below an ellipsoid with these semi-axes, by points (3, ...)."""
    trailing = (slice(None), *(None,) * (points.ndim - 1))
    offset = points - np.array(center)[trailing]
    distance = np.sqrt((offset**2).sum(0)) + 1e-6
    radius = np.sqrt(((offset / np.array(axes)[trailing]) ** 2).sum(0)) + 1e-6 / max(axes)
    depth: Volume = distance / radius - distance
    return depth


class Thorax:
    """The organs of one patient.

    Args:
        rng: where the individual shape comes from.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.stretch = rng.uniform(0.97, 1.03, size=3)
        self.heart_axes = tuple(rng.uniform(0.95, 1.05) * np.array([21.0, 20.0, 21.0]))
        self.waves = rng.normal(scale=1 / 45.0, size=(3, 3, 4))  # 1/mm: by direction of the shift, axis, wave
        self.phases = rng.uniform(0, 2 * np.pi, size=(3, 4))

    def straighten(self, points: Volume) -> Volume:
        """From world coordinates to those of the model chest: no two patients have the same outline."""
        trailing = (slice(None), *(None,) * (points.ndim - 1))
        angles = np.einsum("saw,a...->sw...", self.waves, points)
        angles += self.phases.reshape(3, 4, *(1,) * (points.ndim - 1))
        bend: Volume = 0.6 * np.sin(angles).sum(1)
        return (points + bend) / self.stretch[trailing]

    def body(self, points: Volume) -> Volume:
        """Depth below the skin at straightened points."""
        return ellipsoid(points, (0.0, 0.0, 0.0), (60.0, 46.0, 130.0))

    def heart(self, points: Volume) -> Volume:
        """Depth below the surface of the heart, which lies to the left."""
        return ellipsoid(points, (-8.0, 10.0, -22.0), self.heart_axes)

    def lungs(self, points: Volume) -> Volume:
        """Depth below the pleura."""
        mirrored = np.stack([np.abs(points[0]), *points[1:]])
        both = ellipsoid(mirrored, (29.0, 0.0, 6.0), (21.0, 34.0, 62.0))
        around = np.maximum(self.heart(points), self._liver(points))
        depth: Volume = np.minimum(both, -around - 1.5)
        return depth

    def layers(self, points: Volume) -> list[tuple[str, Volume]]:
        """Tissues from the outside in, each painted over those before it, at straightened points."""
        x, y, z = points
        body, lungs = self.body(points), self.lungs(points)
        spine = ellipsoid(np.stack([x, y, 0 * z]), (0.0, -32.0, 0.0), (8.0, 8.0, 8.0))
        cage = 2.5 - np.abs(body - 7.5)
        ribs = np.minimum(cage, 4.0 * np.sin(2 * np.pi * (z - 0.35 * y) / 22.0))
        return [
            ("fat", share(body)),
            ("muscle", share(body - 4.0)),
            ("bone", share(ribs)),
            ("mediastinum", share(body - 11.0)),
            ("bone", share(spine)),
            ("liver", share(self._liver(points)) * share(body - 8.0)),
            ("lung", share(lungs)),
        ]

    def _liver(self, points: Volume) -> Volume:
        return ellipsoid(points, (26.0, 4.0, -66.0), (34.0, 36.0, 26.0))
