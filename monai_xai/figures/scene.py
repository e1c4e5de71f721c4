"""What a picture shows: one input of one case, with the decisions that all of its pictures share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from monai_xai.errors import InputError
from monai_xai.figures.colors import CLEAR_BELOW, blend
from monai_xai.figures.geometry import Geometry, Plane, geometry_of

SHARE_BELOW_LIMIT = 0.98
SAMPLES = 4_000_000
MOST_ROWS = 8
TILT_WORTH_SAYING = 5.0
CROWDED = 0.15
Box = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """One input of one case: maps over anatomy, outlines, and what is to be said about them.

    Every picture of a scene uses the same color limit for all channels, so that modalities can be compared, and the
    same strongest point. Nothing is resampled here: slices are taken when they are drawn.

    Args:
        attribution: signed maps, one per channel of the input, or a single one (layer methods).
        image: what the network saw.
        title: the case and the input, in a few words.
        about: further lines below the title: target, method, score.
        channels: names of the image's channels.
        prediction: the predicted mask; None if there is none.
        label: the true mask; None if there is none.
        affine: voxel to world (RAS, mm), shape (4, 4) or (3, 3); None if not known.
        unit: what a value of the map means, for the color bar.
        spacing: voxel size along each axis in mm, where no affine is known; None: not known.

    Shapes: attribution (C, *spatial) or (1, *spatial), image (C, *spatial), masks (*spatial); 2D or 3D.

    Raises:
        InputError: if the shapes do not fit together.
    """

    attribution: NDArray[Any]
    image: NDArray[Any]
    title: str = ""
    about: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    prediction: NDArray[Any] | None = None
    label: NDArray[Any] | None = None
    affine: NDArray[Any] | None = None
    unit: str = "attribution"
    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        maps, image = self.attribution.shape, self.image.shape
        if len(maps) not in (3, 4) or maps[1:] != image[1:] or maps[0] not in (1, image[0]):
            raise InputError(
                f"A picture needs maps of shape (C, *spatial) or (1, *spatial) over an image (C, *spatial), 2D or 3D; "
                f"got maps {maps} and an image {image}."
            )
        size = self.spacing
        if size is not None and not (len(size) == len(maps) - 1 and all(0 < s < np.inf for s in size)):
            raise InputError(
                f"A picture of {len(maps) - 1} axes needs a positive voxel size for each, got {size}."
            )
        for name in ("prediction", "label"):
            mask = getattr(self, name)
            if mask is not None and mask.shape != maps[1:]:
                raise InputError(f"The outline of the {name} needs shape {maps[1:]}, got {mask.shape}.")

    @property
    def is_volume(self) -> bool:
        """Whether there are slices to go through."""
        return self.attribution.ndim == 4

    @cached_property
    def geometry(self) -> Geometry:
        """How the arrays lie in front of the viewer."""
        return geometry_of(self.affine, self.attribution.ndim - 1, self.spacing)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape in display order."""
        return self._maps.shape[1:]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The channels that are drawn: all, or the eight with the largest sum of absolute attribution."""
        count = len(self.attribution)
        if count <= MOST_ROWS:
            return tuple(range(count))
        sums = [float(np.abs(np.nan_to_num(channel)).sum()) for channel in self.attribution]
        return tuple(sorted(np.argsort(sums)[::-1][:MOST_ROWS].tolist()))

    @cached_property
    def limit(self) -> float:
        """The size at which the color scale ends, the same for all channels; 1 if all is zero.

        The 98th percentile of the absolute values, each weighted by itself: 98 % of all attribution lies in voxels
        below it. A few extreme voxels do not push all others into the transparent middle, as the maximum would let
        them; and a small lesion that carries most of the attribution does not saturate, as it would with a percentile
        that counts voxels. On large volumes it is taken over an evenly strided sample of four million values.
        """
        found = [_sizes(channel) for channel in self.attribution]
        sizes = np.concatenate([values[:: 1 + sum(map(len, found)) // SAMPLES] for values in found])
        if not sizes.size:
            return 1.0
        sizes.sort()
        below = np.cumsum(sizes, dtype=np.float64)
        return float(sizes[np.searchsorted(below, SHARE_BELOW_LIMIT * below[-1])])

    @cached_property
    def largest(self) -> float:
        """The largest finite absolute value; 0 if all is zero."""
        finite = (
            float(np.abs(channel[np.isfinite(channel)]).max(initial=0.0)) for channel in self.attribution
        )
        return max(finite)

    @cached_property
    def strongest(self) -> tuple[int, ...]:
        """The displayed voxel with the strongest attribution, summed over channels as absolute values.

        A Gaussian of one voxel's width goes over the sum first: gradients of strided convolutions scatter single-voxel
        spikes, and one of them should not decide where the reader looks. A lone spike must be sixteen times as strong
        as a plateau to win. Without a peak: the middle of prediction, label or volume.
        """
        if self.has_peak:
            smooth = ndimage.gaussian_filter(self._total, sigma=1.0, mode="constant", truncate=2.0)
            return tuple(int(i) for i in np.unravel_index(int(smooth.argmax()), smooth.shape))
        for mask in self.outlines.values():
            if mask.any():
                voxels = np.argwhere(mask)
                middle = np.square(voxels - voxels.mean(0)).sum(1).argmin()
                return tuple(voxels[middle].tolist())
        return tuple(n // 2 for n in self.shape)

    @cached_property
    def has_peak(self) -> bool:
        """Whether the attribution, summed over channels as absolute values, is larger somewhere than elsewhere."""
        return bool(np.ptp(self._total))

    @cached_property
    def outlines(self) -> dict[str, NDArray[np.bool_]]:
        """The masks that were given, in display order, by name."""
        masks = {"prediction": self.prediction, "label": self.label}
        return {
            name: self.geometry.show(mask).astype(bool) for name, mask in masks.items() if mask is not None
        }

    @cached_property
    def box(self) -> Box:
        """The displayed voxels that are worth paper: everything but an empty margin.

        What counts: an image that differs from its own corner by 2 % of its range, a mask, an attribution that is not
        transparent. An attribution in the air around the head is therefore never cropped away.
        """
        worth = np.zeros(self.shape, bool)
        for image, (low, high) in zip(self._images, self._windows, strict=True):
            worth |= np.abs(image - image[(0,) * image.ndim]) > 0.02 * (high - low)
        for channel in self._maps:
            worth |= np.abs(channel) > CLEAR_BELOW * self.limit
        for mask in self.outlines.values():
            worth |= mask
        return tuple(_extent(worth, axis) for axis in range(worth.ndim))

    @cached_property
    def detail(self) -> Box | None:
        """The displayed voxels around the strongest one that deserve a closer look, a cube in mm.

        A third of the picture's longest side, at least 24 voxels of the finest axis; None if that is most of the
        picture, and for 2D inputs, which are drawn large.
        """
        spacing = self.geometry.spacing
        longest = max(
            (extent.stop - extent.start) * size for extent, size in zip(self.box, spacing, strict=True)
        )
        side = max(longest / 3, 24 * min(spacing))
        if not self.is_volume or side > 0.6 * longest:
            return None
        return tuple(map(_around, self.strongest, self.box, (side / size for size in spacing)))

    @cached_property
    def scrolling(self) -> Plane:
        """The plane to page through: across the coarsest voxel axis, else the first (axial)."""
        spacing = self.geometry.spacing
        coarsest = int(np.argmax(spacing))
        if spacing[coarsest] > 1.5 * sorted(spacing)[-2]:
            return next(plane for plane in self.geometry.planes if plane.cut == coarsest)
        return self.geometry.planes[0]

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """Share of the absolute attribution in each slice of the scrolling plane; zeros if there is none."""
        cut = self.scrolling.cut
        sums = self._total.sum(tuple(a for a in range(len(self.shape)) if a != cut), dtype=np.float64)
        return np.asarray(sums / (sums.sum() or 1.0))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know before believing the picture."""
        return tuple(self._notes())

    def row_name(self, row: int) -> str:
        """Return the name of one map."""
        if len(self.attribution) < len(self.image):
            return f"all channels, over {self._channel(0)}"
        return self._channel(row)

    def slice_name(self, plane: Plane, index: int) -> str:
        """Return where a displayed slice lies, in words; of a tilted one, the place below the strongest point."""
        through = tuple(index if axis == plane.cut else i for axis, i in enumerate(self.strongest))
        return self.geometry.slice_name(plane, through, self.shape)

    def take(self, volume: NDArray[Any], plane: Plane, index: int, box: Box | None = None) -> NDArray[Any]:
        """Return one slice of a displayed volume (*spatial) as rows and columns, cropped to ``box``.

        Args:
            volume: what is cut.
            plane: how it is cut.
            index: where it is cut.
            box: the displayed voxels to keep; None: :attr:`box`.
        """
        extents = self.box if box is None else box
        axes = [axis for axis in range(volume.ndim) if axis != plane.cut]
        flat = volume[tuple(index if axis == plane.cut else extents[axis] for axis in range(volume.ndim))]
        return flat if axes[0] == plane.rows else flat.T

    def picture(self, row: int, plane: Plane, index: int, box: Box | None = None) -> NDArray[np.float32]:
        """Return a slice of one map over its anatomy as RGB, shape (rows, columns, 3), in [0, 1]."""
        return blend(self.grey(row, plane, index, box), self.values(row, plane, index, box), self.limit)

    def grey(self, row: int, plane: Plane, index: int, box: Box | None = None) -> NDArray[np.float32]:
        """Return a slice of the anatomy behind one map, in [0, 0.9]; black where the image is not finite."""
        low, high = self._windows[row]
        flat = self.take(self._images[row], plane, index, box).astype(np.float32)
        flat = np.nan_to_num(flat, nan=low, posinf=low, neginf=low)
        return np.clip((flat - low) / (high - low), 0.0, 1.0) * np.float32(0.9)

    def values(self, row: int, plane: Plane, index: int, box: Box | None = None) -> NDArray[Any]:
        """Return a slice of one map."""
        return self.take(self._maps[row], plane, index, box)

    def _channel(self, index: int) -> str:
        return self.channels[index] if index < len(self.channels) else f"channel {index}"

    @cached_property
    def _maps(self) -> NDArray[Any]:
        return self.geometry.show(self.attribution)

    @cached_property
    def _total(self) -> NDArray[Any]:
        """Return the absolute attribution summed over channels; what is not finite counts as 0."""
        total = np.zeros(self.shape, np.float32)
        for channel in self._maps:
            total += np.abs(np.nan_to_num(channel, posinf=0.0, neginf=0.0))
        return total

    @cached_property
    def _images(self) -> NDArray[Any]:
        return self.geometry.show(self.image)[: len(self.attribution)]

    @cached_property
    def _windows(self) -> list[tuple[float, float]]:
        """Return black and white of each channel: its 0.5th and 99.5th percentile."""
        return [_window(channel) for channel in self._images]

    def _notes(self) -> Iterator[str]:
        broken = int(self.attribution.size - np.isfinite(self.attribution).sum())
        if broken:
            yield f"{broken} of {self.attribution.size} attributions are not finite: left clear."
        if not self.largest:
            yield "The attribution is 0 everywhere, to rounding."
        elif not broken and np.ptp(self.attribution) == 0:
            yield f"The attribution is constant: {float(self.attribution.flat[0]):.3g}."
        if not np.isfinite(self.image).all():
            yield "The image has voxels that are not finite."
        if len(self.rows) < len(self.attribution):
            yield f"The {MOST_ROWS} strongest of {len(self.attribution)} channels."
        if self.affine is not None and self.geometry.affine is None:
            yield "The affine cannot be inverted: axes by number."
        if self.geometry.tilt > TILT_WORTH_SAYING:
            yield f"Planes are those of the scan, tilted by up to {self.geometry.tilt:.0f}° against the body."


def _sizes(channel: NDArray[Any]) -> NDArray[Any]:
    """Return the absolute values that are finite and not zero, shape (K,)."""
    sizes = np.abs(channel)
    return sizes[np.isfinite(sizes) & (sizes > 0)]


def is_crowded(mask: NDArray[np.bool_]) -> bool:
    """Whether the outline of a mask (rows, columns) would cover the picture, as that of an untrained network does."""
    edge = mask & ~ndimage.binary_erosion(mask)
    return bool(edge.mean() > CROWDED)


def _extent(worth: NDArray[np.bool_], axis: int) -> slice:
    """Return where a mask has anything along an axis, with a margin of two voxels; all of it for an empty mask."""
    found = np.flatnonzero(worth.any(tuple(other for other in range(worth.ndim) if other != axis)))
    if not found.size:
        return slice(0, worth.shape[axis])
    return slice(max(0, int(found[0]) - 2), min(worth.shape[axis], int(found[-1]) + 3))


def _around(center: int, extent: slice, side: float) -> slice:
    """Return ``side`` voxels around a center, shifted to lie within an extent."""
    count = min(extent.stop - extent.start, max(1, round(side)))
    start = min(max(extent.start, center - count // 2), extent.stop - count)
    return slice(start, start + count)


def _window(channel: NDArray[Any]) -> tuple[float, float]:
    sample = channel.reshape(-1)[:: max(1, channel.size // SAMPLES) | 1]
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
    if high <= low:
        low, high = float(sample.min()), float(sample.max())
    return (low, high) if high > low else (low, low + 1.0)
