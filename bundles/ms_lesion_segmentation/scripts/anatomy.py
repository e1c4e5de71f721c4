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

SHAPE = (64, 72, 60)
SPACING_MM = (2.6, 2.8, 3.1)

# One row per tissue: its signal in FLAIR, T1, T1POST and T2.
SIGNAL: Mapping[str, tuple[float, float, float, float]] = {
    "scalp": (68.0, 92.0, 100.0, 66.0),
    "muscle": (34.0, 42.0, 48.0, 26.0),
    "skull": (8.0, 10.0, 10.0, 7.0),
    "fluid": (12.0, 20.0, 21.0, 102.0),
    "grey": (62.0, 56.0, 58.0, 65.0),
    "nuclei": (57.0, 64.0, 66.0, 55.0),
    "white": (50.0, 80.0, 82.0, 47.0),
    "rim": (66.0, 70.0, 72.0, 60.0),
    "marker": (130.0, 130.0, 130.0, 130.0),
}


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


def share(depth: Volume, blur_mm: float = 2.8) -> Volume:
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
    """Depths and tissues of one head.

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
    def skin(self) -> Volume:
        """Depth below the skin."""
        skull = ellipsoid(self.points, (0.0, 0.0, 6.0), (69.0, 88.0, 74.0))
        neck = ellipsoid(self.points, (0.0, -22.0, -90.0), (48.0, 52.0, 78.0))
        depth: Volume = np.maximum(skull, neck)
        return depth

    @cached_property
    def cerebrum(self) -> Volume:
        """Depth below the hull of the cerebrum."""
        return ellipsoid(self.points, (0.0, -1.0, 14.0), (56.0, 74.0, 54.0))

    @cached_property
    def cerebellum(self) -> Volume:
        """Depth below the hull of the cerebellum."""
        return ellipsoid(self.points, (0.0, -40.0, -36.0), (44.0, 27.0, 21.0))

    @cached_property
    def ventricles(self) -> Volume:
        """Depth below the walls of the lateral ventricles."""
        x, y, z = self.points
        width = self.rng.uniform(1.0, 1.7)
        apart = np.abs(x) - 9.0 - 0.004 * (y + 4.0) ** 2
        bodies = np.stack([apart, y + 4.0, z - 18.0 + 0.10 * np.abs(y + 4.0)])
        return ellipsoid(bodies, (0.0, 0.0, 0.0), (5.0 * width, 34.0, 7.5 * width))

    @cached_property
    def cortex(self) -> Volume:
        """Depth below the surface of the folded cortex, sulci and the fissure between the hemispheres counted in."""
        hull = self.cerebrum
        sheet = np.abs(self.grid.field(self.rng, 4.4)) / 0.27
        sulcus = sheet - 1.9 * np.clip(1 - hull / 20, 0, 1) + 0.8 * np.clip(hull - 14, 0, None)
        commissure = ellipsoid(self.points, (0.0, -4.0, 12.0), (40.0, 44.0, 20.0))
        fissure = np.abs(self.points[0]) - 1.6 + 1.5 * np.clip(commissure, 0, None)
        depth: Volume = np.minimum(hull, np.minimum(sulcus, fissure))
        return depth

    @cached_property
    def white_matter(self) -> Volume:
        """Share of white matter of the cerebrum where lesions may lie, (X, Y, Z)."""
        inside: Volume = share(self.cortex - 3.2) * share(-self.ventricles - 1.0) * (1 - self._nuclei)
        return inside

    @cached_property
    def _nuclei(self) -> Volume:
        x, y, z = self.points
        mirrored = np.stack([np.abs(x), y, z])
        thalamus = ellipsoid(mirrored, (11.0, -14.0, 6.0), (8.5, 12.0, 8.0))
        putamen = ellipsoid(mirrored, (26.0, 4.0, 6.0), (5.5, 15.0, 9.0))
        return share(np.maximum(thalamus, putamen))

    def signal(self) -> Volume:
        """Signal of the healthy head in every sequence, (4, X, Y, Z), without bias field and noise."""
        image = np.zeros((4, *SHAPE))
        for tissue, mask in self._layers():
            image += mask * (np.array(SIGNAL[tissue])[:, None, None, None] - image)
        return image

    def _layers(self) -> list[tuple[str, Volume]]:
        """Tissues from the outside in: each is painted over those before it."""
        x, y, z = self.points
        eyes = ellipsoid(np.stack([np.abs(x), y, z]), (30.0, 68.0, -22.0), (11.0, 11.0, 11.0))
        stem = ellipsoid(self.points, (0.0, -20.0, -42.0), (11.0, 10.0, 42.0))
        third = ellipsoid(self.points, (0.0, -10.0, 4.0), (2.2, 13.0, 9.0))
        folia = np.abs(self.grid.field(self.rng, 3.0)) / 0.4
        brain = np.maximum(np.maximum(self.cerebrum, self.cerebellum), stem)
        return [
            ("scalp", share(self.skin)),
            ("muscle", share(self.skin - 6.0) * share(-18.0 - z)),
            ("fluid", share(eyes)),
            ("skull", share(np.maximum(self.cerebrum, self.cerebellum) + 9.5) * share(self.skin - 4.0)),
            ("fluid", share(brain + 3.0)),
            ("grey", share(self.cortex)),
            ("white", share(self.cortex - 3.2)),
            ("grey", share(self.cerebellum)),
            ("white", share(np.minimum(self.cerebellum - 4.0, folia - 1.5))),
            ("white", share(stem)),
            ("nuclei", self._nuclei),
            ("rim", share(self.ventricles + 1.6)),
            ("fluid", share(np.maximum(self.ventricles, third))),
        ]
