"""A head in millimeters: tissues as soft masks with boundaries that differ from case to case.

All lengths are in mm, in head coordinates (x to the right, y to the front, z up, origin in the middle of the head).
A *depth* is the distance to a surface, positive inside; `share` turns it into the share of a voxel that lies inside.
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

SHAPE = (42, 50, 46)
SPACING_MM = (4.0, 4.1, 4.2)

# One row per tissue: its signal in FLAIR, T1, T1POST and T2.
SIGNAL: Mapping[str, tuple[float, float, float, float]] = {
    "scalp": (68.0, 92.0, 100.0, 66.0),
    "muscle": (34.0, 42.0, 48.0, 26.0),
    "skull": (8.0, 10.0, 10.0, 7.0),
    "fluid": (12.0, 20.0, 21.0, 102.0),
    "grey": (62.0, 56.0, 58.0, 65.0),
    "nuclei": (57.0, 64.0, 66.0, 55.0),
    "white": (50.0, 80.0, 82.0, 47.0),
}
FLUID = np.array(SIGNAL["fluid"])


@dataclass(frozen=True)
class Grid:
    """The voxel grid of one case.

    Args:
        affine: (4, 4), voxels to millimeters (RAS).
    """

    affine: NDArray[np.float64]

    @cached_property
    def points(self) -> Volume:
        """Voxel centers in mm, (3, X, Y, Z)."""
        voxels = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in SHAPE), indexing="ij"))
        turned: Volume = np.einsum("ij,jxyz->ixyz", self.affine[:3, :3], voxels)
        return turned + self.affine[:3, 3, None, None, None]

    def field(self, rng: np.random.Generator, length_mm: float) -> Volume:
        """A smooth random field, (X, Y, Z), mean 0 and standard deviation 1.

        Args:
            rng: where the noise comes from.
            length_mm: standard deviation of the Gaussian that smooths the noise.
        """
        sigma = [length_mm / step for step in SPACING_MM]
        field: Volume = gaussian_filter(rng.standard_normal(SHAPE), sigma, mode="wrap", truncate=3.0)
        return (field - field.mean()) / field.std()


def oblique_affine(rng: np.random.Generator) -> NDArray[np.float64]:
    """Voxels to mm for a head that lies a little askew in an anisotropic grid, stored from left to right."""
    pitch, roll, yaw = rng.uniform(-0.09, 0.09, size=3)
    turn = _rotation(0, pitch) @ _rotation(1, roll) @ _rotation(2, yaw)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.array(SPACING_MM) * (-1.0, 1.0, 1.0))
    middle = (np.array(SHAPE) - 1) / 2
    affine[:3, 3] = rng.uniform(-1.5, 1.5, size=3) - affine[:3, :3] @ middle
    return affine


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    first, second = (other for other in range(3) if other != axis)
    turn = np.eye(3)
    turn[[first, second], [first, second]] = np.cos(angle)
    turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
    return turn


def share(depth: Volume, blur_mm: float = 4.0) -> Volume:
    """Share of a voxel inside a surface, from the depth of its center."""
    inside: Volume = np.clip(depth / blur_mm + 0.5, 0.0, 1.0)
    return inside


def ellipsoid(points: Volume, center: Point, axes: Point) -> Volume:
    """Depth below an ellipsoid with these semi-axes, (X, Y, Z)."""
    offset = points - np.array(center)[:, None, None, None]
    distance = np.sqrt((offset**2).sum(0)) + 1e-6
    radius = np.sqrt(((offset / np.array(axes)[:, None, None, None]) ** 2).sum(0)) + 1e-6 / max(axes)
    depth: Volume = distance / radius - distance
    return depth


@dataclass(frozen=True)
class Head:
    """Tissues of one head. How large its ventricles are is asked for each time.

    Args:
        grid: where its voxels are.
        rng: where its individual shape comes from.
    """

    grid: Grid
    rng: np.random.Generator

    @cached_property
    def points(self) -> Volume:
        """Head coordinates of the voxels, bent so that no two heads have the same outline, (3, X, Y, Z)."""
        bend = np.stack([self.grid.field(self.rng, 24.0) for _ in range(3)])
        return self.grid.points + 2.2 * bend

    @cached_property
    def signal(self) -> Volume:
        """Signal in every sequence of a head without lateral ventricles, (4, X, Y, Z), without bias field and noise."""
        image = np.zeros((4, *SHAPE))
        for tissue, mask in self._layers():
            image += mask * (np.array(SIGNAL[tissue])[:, None, None, None] - image)
        return image

    def ventricles(self, volume_ml: float) -> Volume:
        """Share of every voxel that lies in the lateral ventricles, (X, Y, Z).

        Args:
            volume_ml: their volume, about 10 in a young adult.
        """
        x, y, z = self.points
        width = (volume_ml / 10.7) ** 0.5
        apart = np.abs(x) - 5.0 - 4.0 * width - 0.004 * (y + 4.0) ** 2
        bodies = np.stack([apart, y + 4.0, z - 18.0 + 0.10 * np.abs(y + 4.0)])
        return share(ellipsoid(bodies, (0.0, 0.0, 0.0), (5.0 * width, 34.0, 7.5 * width)))

    def _layers(self) -> list[tuple[str, Volume]]:
        """Tissues from the outside in: each is painted over those before it."""
        x, y, z = points = self.points
        mirrored = np.stack([np.abs(x), y, z])
        skull = ellipsoid(points, (0.0, 0.0, 6.0), (69.0, 88.0, 74.0))
        neck = ellipsoid(points, (0.0, -22.0, -90.0), (48.0, 52.0, 78.0))
        skin = np.maximum(skull, neck)
        cerebrum = ellipsoid(points, (0.0, -1.0, 14.0), (56.0, 74.0, 54.0))
        cerebellum = ellipsoid(points, (0.0, -40.0, -36.0), (44.0, 27.0, 21.0))
        stem = ellipsoid(points, (0.0, -20.0, -42.0), (11.0, 10.0, 42.0))
        eyes = ellipsoid(mirrored, (30.0, 68.0, -22.0), (11.0, 11.0, 11.0))
        thalamus = ellipsoid(mirrored, (11.0, -14.0, 4.0), (8.5, 12.0, 7.0))
        putamen = ellipsoid(mirrored, (26.0, 4.0, 4.0), (5.5, 15.0, 8.0))
        cortex = self._cortex(cerebrum)
        return [
            ("scalp", share(skin)),
            ("muscle", share(skin - 6.0) * share(-18.0 - z)),
            ("fluid", share(eyes)),
            ("skull", share(np.maximum(cerebrum, cerebellum) + 9.5) * share(skin - 4.0)),
            ("fluid", share(np.maximum(np.maximum(cerebrum, cerebellum), stem) + 3.0)),
            ("grey", share(cortex)),
            ("white", share(cortex - 4.0)),
            ("grey", share(cerebellum)),
            ("white", share(np.maximum(cerebellum - 9.0, stem))),
            ("nuclei", share(np.maximum(thalamus, putamen))),
        ]

    def _cortex(self, cerebrum: Volume) -> Volume:
        """Depth below the folded surface of the cortex, sulci and the fissure between the hemispheres counted in."""
        sheet = np.abs(self.grid.field(self.rng, 6.0)) / 0.2
        sulcus = sheet - 2.2 * np.clip(1 - cerebrum / 20, 0, 1) + 0.8 * np.clip(cerebrum - 14, 0, None)
        commissure = ellipsoid(self.points, (0.0, -4.0, 12.0), (40.0, 44.0, 20.0))
        fissure = np.abs(self.points[0]) - 1.6 + 1.5 * np.clip(commissure, 0, None)
        depth: Volume = np.minimum(cerebrum, np.minimum(sulcus, fissure))
        return depth
