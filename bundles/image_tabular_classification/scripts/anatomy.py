"""A frontal chest radiograph in two dimensions: shapes with soft edges, which differ from patient to patient.

Coordinates run from -1 to 1: x to the right of the picture, which is the patient's left, and y down. A *depth* is the
distance to an outline, positive inside; `share` turns it into the share of a pixel that lies inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Picture = NDArray[np.float64]

SIZE = 64
PIXEL = 2 / SIZE
LETTER = ("#....", "#....", "#....", "#....", "#....", "#....", "#####")  # L, for the patient's left

_axis = (np.arange(SIZE) + 0.5) * PIXEL - 1
Y, X = np.meshgrid(_axis, _axis, indexing="ij")


def share(depth: Picture, edge: float = PIXEL) -> Picture:
    """Share of every pixel that lies inside an outline."""
    inside: Picture = 1 / (1 + np.exp(-np.clip(4 * depth / edge, -50, 50)))
    return inside


def field(rng: np.random.Generator, smoothness: float) -> Picture:
    """A random picture of mean 0 and standard deviation 1 that changes over this many pixels."""
    noise = gaussian_filter(rng.normal(size=(SIZE, SIZE)), smoothness, mode="wrap")
    smooth: Picture = (noise - noise.mean()) / noise.std()
    return smooth


@dataclass(frozen=True, eq=False)
class Ellipse:
    """An ellipse.

    Args:
        x: of its center.
        y: of its center.
        width: half of it.
        height: half of it.
        tilt: in radians.
    """

    x: float
    y: float
    width: float
    height: float
    tilt: float = 0.0

    @property
    def depth(self) -> Picture:
        """Distance to the outline, roughly, positive inside."""
        along = np.cos(self.tilt) * (X - self.x) + np.sin(self.tilt) * (Y - self.y)
        across = np.cos(self.tilt) * (Y - self.y) - np.sin(self.tilt) * (X - self.x)
        depth: Picture = (1 - np.hypot(along / self.width, across / self.height)) * min(
            self.width, self.height
        )
        return depth


class Chest:
    """The chest of a patient, as bright as it absorbs.

    Args:
        rng: what the patient is drawn with.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        def vary(value: float, by: float) -> float:
            return float(value + rng.uniform(-by, by))

        self.torso = Ellipse(vary(0, 0.03), 0.5, vary(0.9, 0.05), vary(1.35, 0.08))
        self.shoulders = Ellipse(0, vary(-0.3, 0.04), vary(0.98, 0.04), vary(0.42, 0.03))
        top, bottom = vary(-0.68, 0.05), vary(0.52, 0.08)
        self.lungs = [
            Ellipse(
                vary(side * 0.42, 0.03),
                (top + bottom) / 2,
                vary(0.3, 0.03),
                (bottom - top) / 2,
                vary(-side * 0.1, 0.05),
            )
            for side in (-1, 1)
        ]
        self.heart = Ellipse(
            vary(0.14, 0.04), vary(0.25, 0.05), vary(0.3, 0.05), vary(0.3, 0.04), vary(0.6, 0.2)
        )
        self.spine = vary(0, 0.02)
        self.rib_phase, self.rib_distance, self.rib_curve = vary(0, 0.1), vary(0.2, 0.02), vary(0.55, 0.15)
        self.clavicle_y = vary(-0.66, 0.04)

    @cached_property
    def lung(self) -> Picture:
        """Share of every pixel that is lung and not covered by the heart."""
        both: Picture = np.maximum(*(share(lung.depth, 0.08) for lung in self.lungs))
        return both * (1 - share(self.heart.depth, 0.08))

    @property
    def picture(self) -> Picture:
        """What the film shows without noise, about 0 (air) to 1."""
        neck = np.minimum(0.24 - np.abs(X - self.spine), -0.3 - Y)
        body = share(np.maximum.reduce([self.torso.depth, self.shoulders.depth, neck]), 0.08)
        tissue = 0.62 - 0.38 * self.lung + 0.1 * share(self.heart.depth, 0.08)
        spine = 0.12 * share(0.1 - np.abs(X - self.spine)) * (1 + 0.25 * np.cos(2 * np.pi * Y / 0.16))
        cage = share(0.78 - np.abs(X)) * share(0.62 - np.abs(Y + 0.1), 0.2)
        wave = (Y + self.rib_phase + self.rib_curve * (np.abs(X) - 0.4) ** 2) / self.rib_distance
        ribs = 0.07 * cage * share(np.cos(2 * np.pi * wave) - 0.35, 0.8)
        slope = np.abs(Y - self.clavicle_y + 0.2 * (np.abs(X) - 0.35))
        clavicles = 0.1 * share(0.035 - slope) * share(0.66 - np.abs(X)) * share(np.abs(X) - 0.1)
        film: Picture = 0.04 + body * (tissue + spine + ribs + clavicles)
        return film


@dataclass(frozen=True, eq=False)
class Opacity:
    """A consolidation in a lung.

    Args:
        row: of its center, in pixels.
        column: of its center.
        radius: in pixels.
        outline: how uneven it is, of the size of the picture.
    """

    row: int
    column: int
    radius: float
    outline: Picture

    @classmethod
    def draw(cls, rng: np.random.Generator, chest: Chest) -> Opacity:
        """Draw one anywhere in the lungs."""
        weight = (chest.lung > 0.97).ravel().astype(float)
        row, column = divmod(int(rng.choice(weight.size, p=weight / weight.sum())), SIZE)
        return cls(row, column, float(rng.uniform(6.0, 9.0)), field(rng, 2.5))

    def paint(self, chest: Chest) -> Picture:
        """Share of every pixel that is opacity, in the lungs only."""
        rows, columns = np.mgrid[:SIZE, :SIZE]
        depth = self.radius * (1 + 0.2 * self.outline) - np.hypot(rows - self.row, columns - self.column)
        painted: Picture = share(depth, 3.0) * chest.lung
        return painted


def letter(rng: np.random.Generator) -> NDArray[np.bool_]:
    """A side marker in the upper corner at the patient's left, outside of the body."""
    glyph = np.array([[dot == "#" for dot in line] for line in LETTER])
    row, column = int(rng.integers(2, 5)), int(rng.integers(SIZE - 10, SIZE - 7))
    picture = np.zeros((SIZE, SIZE), dtype=bool)
    picture[row : row + glyph.shape[0], column : column + glyph.shape[1]] = glyph
    return picture
