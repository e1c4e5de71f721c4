"""Sliding windows, exactly: a stitched prediction is one function of the whole volume.

A sliding-window prediction is ``S(p) = sum_w a_w(p) f(x_w)(p) / A(p)`` with windows ``w``, importance weights ``a_w``
and ``A = sum_w a_w``. Two exact routes lead through it within the memory of one window's graph, or of as many small
ones as fill a fixed room (:mod:`monai_xai.joined`):

- :class:`~monai_xai.stitching.StitchedNetwork` is that prediction as a differentiable module: forward as the inferer
  does it, backward window by window with recomputation. It serves every differentiable target.
- :func:`window_scoring` uses that a score linear in the stitched output, ``sum_p m(p) S(p)``, is a sum of window
  scores ``s_w(x_w) = sum_p m(p) a_w(p) / A(p) f(x_w)(p)``. Windows without region are skipped, no stitched forward is
  needed, and methods that work by hooks run window by window and add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Number
from typing import Any

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices, get_valid_patch_size
from monai.inferers import Inferer, SlidingWindowInferer, SlidingWindowInfererAdapt
from monai.utils import PytorchPadMode, ensure_tuple_rep, fall_back_tuple, look_up_option
from torch import Tensor, nn
from torch.nn import functional

from monai_xai.errors import InputError, UnsupportedInfererError
from monai_xai.forward import Padding, Scoring
from monai_xai.targets import Target, pick_head
from monai_xai.terms import ScoreFunction, Tensors, Term, count_not_finite

Place = tuple[slice, ...]


def is_sliding_window(inferer: Inferer | None) -> bool:
    """Tell whether the inferer stitches dense windows as MONAI's ``SlidingWindowInferer`` does.

    Subclasses with a call of their own, such as ``SliceInferer``, do something else and are replayed as a whole.
    """
    exact = SlidingWindowInferer.__call__, SlidingWindowInfererAdapt.__call__
    return isinstance(inferer, SlidingWindowInferer) and type(inferer).__call__ in exact


def everywhere(place: Place) -> Place:
    """Return the index of a place in every sample and channel."""
    return slice(None), slice(None), *place


@dataclass(frozen=True, eq=False)
class Windows(Padding):
    """Where the windows of an inferer lie on one grid, and how they are weighted.

    Args:
        inferer: the sliding-window inferer, all of whose settings are honored.
        spatial: spatial shape of the image.
        dtype: dtype of the image, in which MONAI computes the importance weights.
        device: device of the image.
    """

    inferer: SlidingWindowInferer
    spatial: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if self.inferer.with_coord:
            raise UnsupportedInfererError(
                "SlidingWindowInferer(with_coord=True) hands window coordinates to the network, which have no "
                "attribution. Set with_coord=False."
            )
        for name in ("roi_size", "overlap", "sigma_scale"):
            value = getattr(self.inferer, name)
            if not isinstance(value, Number) and len(value) != len(self.spatial):
                raise InputError(
                    f"SlidingWindowInferer({name}={tuple(value)}) does not fit an image of spatial shape "
                    f"{self.spatial}: it needs {len(self.spatial)} numbers."
                )

    @cached_property
    def size(self) -> tuple[int, ...]:
        """Window size in voxels."""
        return tuple(fall_back_tuple(self.inferer.roi_size, self.spatial))

    @cached_property
    def margins(self) -> tuple[tuple[int, int], ...]:
        """Padding before and after each spatial axis, where the image is smaller than the window."""
        missing = [max(window - length, 0) for window, length in zip(self.size, self.spatial, strict=True)]
        return tuple((m // 2, m - m // 2) for m in missing)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Slices of every window in the padded image, in MONAI's order."""
        padded = self._padded_shape
        overlaps = ensure_tuple_rep(self.inferer.overlap, len(self.spatial))
        if not all(0 <= overlap < 1 for overlap in overlaps):
            raise InputError(f"SlidingWindowInferer(overlap={self.inferer.overlap}) must lie in [0, 1).")
        steps = [
            window if window == length else max(int(window * (1 - overlap)), 1)
            for window, length, overlap in zip(self.size, padded, overlaps, strict=True)
        ]
        return tuple(dense_patch_slices(padded, self.size, steps))

    @cached_property
    def importance(self) -> Tensor:
        """Weights of the voxels of one window, shape (1, 1, *size)."""
        given = self.inferer.roi_weight_map
        if given is None or get_valid_patch_size(self._padded_shape, self.size) != self.size:
            given = compute_importance_map(
                self.size, mode=self.inferer.mode, sigma_scale=self.inferer.sigma_scale, dtype=self.dtype
            )
        weights = torch.as_tensor(given).to(device=self.device, dtype=self.dtype)
        if tuple(weights.shape[-len(self.size) :]) != self.size or weights.numel() != math.prod(self.size):
            raise InputError(
                f"SlidingWindowInferer(roi_weight_map=...) must have the shape of a window, {self.size}, got "
                f"{tuple(weights.shape)}."
            )
        return weights.reshape(1, 1, *self.size)

    @cached_property
    def total_importance(self) -> Tensor:
        """Sum of the importance weights of all windows, shape (1, 1, *padded)."""
        total = torch.zeros((1, 1, *self._padded_shape), dtype=self.dtype, device=self.device)
        for place in self.places:
            total[everywhere(place)] += self.importance
        return total

    def window_device(self, default: torch.device) -> torch.device:
        """Return the device where the network sees windows."""
        return torch.device(self.inferer.sw_device or default)

    def is_image(self, x: Tensor) -> bool:
        """Tell whether an input is cut into windows; a vector goes to every window whole."""
        return x.ndim == len(self.spatial) + 2

    def pad(self, x: Tensor) -> Tensor:
        """Return the image as the inferer pads it; vectors as they are."""
        if not self.is_image(x) or not self._is_padded:
            return x
        return functional.pad(x, self._pad_argument, mode=self._pad_mode, value=self._pad_value)

    def unpad(self, total: Tensor) -> Tensor:
        """Return maps of the padded image as maps of the image: padded copies count for the voxel they copy."""
        if not self.is_image(total) or not self._is_padded:
            return total
        with torch.enable_grad():
            image = total.new_zeros((*total.shape[:2], *self.spatial), requires_grad=True)
            return torch.autograd.grad(self.pad(image), image, total)[0]

    def crop(self, x: Tensor) -> Tensor:
        """Return the part of a padded image that the image occupies."""
        slices = (
            slice(before, before + n) for (before, _), n in zip(self.margins, self.spatial, strict=True)
        )
        return x[everywhere(tuple(slices))]

    def pad_with_zeros(self, x: Tensor) -> Tensor:
        """Return weights of the image as weights of the padded image."""
        return functional.pad(x, self._pad_argument) if self._is_padded else x

    @cached_property
    def axes(self) -> list[Tensor]:
        """For each spatial axis, which voxel of the image every padded voxel copies; -1 for the fill value."""
        return [self._axis_coordinates(axis) for axis in range(len(self.spatial))]

    def _axis_coordinates(self, axis: int) -> Tensor:
        index = torch.arange(self.spatial[axis], dtype=torch.float64, device=self.device)
        if not any(self.margins[axis]):
            return index.long()
        value = -1.0 if self._pad_mode == "constant" else None
        return functional.pad(index[None, None], self.margins[axis], self._pad_mode, value)[0, 0].long()

    @property
    def _is_padded(self) -> bool:
        return any(before + after for before, after in self.margins)

    @property
    def _padded_shape(self) -> tuple[int, ...]:
        return tuple(max(window, length) for window, length in zip(self.size, self.spatial, strict=True))

    @property
    def _pad_argument(self) -> list[int]:
        return [margin for pair in reversed(self.margins) for margin in pair]

    @property
    def _pad_mode(self) -> str:
        return str(look_up_option(self.inferer.padding_mode, PytorchPadMode).value)

    @property
    def _pad_value(self) -> float | None:
        return self.inferer.cval if self._pad_mode == "constant" else None


def plan_windows(inferer: SlidingWindowInferer, inputs: Sequence[Tensor]) -> Windows:
    """Return the windows of an inferer over inputs, whose images must share one grid.

    Raises:
        InputError: if there is no image, or images lie on different grids.
        UnsupportedInfererError: naming a setting that cannot be honored.
    """
    images = [x for x in inputs if x.ndim > 2]
    if not images:
        raise InputError(f"A sliding window needs an image, got inputs {[tuple(x.shape) for x in inputs]}.")
    if len({(x.shape[2:], x.dtype, x.device) for x in images}) > 1:
        raise InputError(
            "Images that go through one sliding window must share grid, dtype and device, got "
            f"{[(tuple(x.shape), str(x.dtype), str(x.device)) for x in images]}. Resample them to one grid first."
        )
    return Windows(inferer, tuple(images[0].shape[2:]), images[0].dtype, images[0].device)


def window_output(output: Any, head: str | int | None, size: Sequence[int]) -> Tensor:
    """Return the dense output of a window, on the grid of the window.

    Raises:
        InputError: if the output is not dense.
        UnsupportedInfererError: if it lies on another grid than the window.
    """
    output = pick_head(output, head)
    if output.ndim != len(size) + 2:
        raise InputError(
            f"A sliding window needs outputs of shape (N, C, *spatial) with {len(size)} spatial axes, the network "
            f"gave {tuple(output.shape)}. Choose a part with head=..., or SimpleInferer() for whole inputs."
        )
    if tuple(output.shape[2:]) != tuple(size):
        raise UnsupportedInfererError(
            f"The network's output {tuple(output.shape[2:])} has another resolution than its window {tuple(size)}, "
            "which cannot be attributed exactly through a sliding window. Interpolate inside the network."
        )
    return output


@dataclass(frozen=True, eq=False)
class WindowTerm(Term):
    """The score of one window of one sample.

    Args:
        windows: the geometry.
        function: ``(*inputs, weights)`` to (1,).
        place: slices of the window in the padded image.
        sample: row of the batch.
        weights: region weights divided by the total importance, shape (N, C or 1, *padded).
    """

    windows: Windows
    function: nn.Module
    place: Place
    sample: int
    weights: Tensor

    @property
    def samples(self) -> slice:  # type: ignore[override]
        """The row of the batch."""
        return slice(self.sample, self.sample + 1)

    def selection(self) -> Tensors:
        weights = self.weights[(self.samples, slice(None), *self.place)] * self.windows.importance
        return (weights.to(self._device),)

    def cut(self, inputs: Sequence[Tensor]) -> Tensors:
        return tuple(x[self.index(x)].to(self._device) for x in inputs)

    def add(self, totals: Sequence[Tensor], maps: Sequence[Tensor]) -> None:
        for total, part in zip(totals, maps, strict=True):
            total[self.index(total)] += part.to(total)

    def blending(self) -> Tensor:
        return self.windows.importance / self.windows.total_importance[everywhere(self.place)]

    def coordinates(self, x: Tensor) -> list[Tensor]:
        channels = torch.arange(x.shape[1], device=x.device)
        if not self.windows.is_image(x):
            return [channels]
        return [channels, *(axis[place] for axis, place in zip(self.windows.axes, self.place, strict=True))]

    @property
    def _device(self) -> torch.device:
        return self.windows.window_device(self.weights.device)

    def index(self, x: Tensor) -> Place:
        """Return where the window lies in a (padded) whole input."""
        return (self.samples, slice(None), *self.place) if self.windows.is_image(x) else (self.samples,)


def window_terms(
    windows: Windows, function: nn.Module, weights: Tensor, inputs: Sequence[Tensor]
) -> list[WindowTerm]:
    """Return a term for every window of every sample in which some weight is not zero."""
    touched = (weights != 0).any(1)
    return [
        WindowTerm(windows, function, place, sample, weights)
        for sample in range(inputs[0].shape[0])
        for place in _meeting(windows.places, _bounds(touched[sample]))
        if touched[(slice(sample, sample + 1), *place)].any()
    ]


def _bounds(touched: Tensor) -> list[tuple[int, int]]:
    """Return the first and the last touched voxel along each axis; none along the others if there is none."""
    bounds = []
    for axis in range(touched.ndim):
        others = [other for other in range(touched.ndim) if other != axis]
        along = (touched.any(others) if others else touched).nonzero()
        bounds.append((int(along[0]), int(along[-1])) if len(along) else (0, -1))
    return bounds


def _meeting(places: Iterable[Place], bounds: Sequence[tuple[int, int]]) -> list[Place]:
    """Return the places that meet a box; a look at the box spares one at the voxels of each."""
    return [
        place
        for place in places
        if all(
            side.start <= last and first < side.stop
            for side, (first, last) in zip(place, bounds, strict=True)
        )
    ]


def share_among_windows(windows: Windows, weights: Tensor) -> Tensor:
    """Return weights of the image divided by the total importance, on the padded image.

    Raises:
        InputError: if a weighted voxel has no importance in any window, so that its prediction is undefined.
    """
    padded, total = windows.pad_with_zeros(weights), windows.total_importance
    shared = padded / total
    if count_not_finite(shared):
        if ((padded != 0) & (total == 0)).any():
            raise InputError(
                "The region has voxels with zero importance in every window: see the roi_weight_map."
            )
        shared = torch.where(padded != 0, shared, 0)
    return shared


def output_channels(
    network: nn.Module, inferer: SlidingWindowInferer, head: str | int | None, inputs: Tensors
) -> int:
    """Return how many channels the network gives, from one window of one sample."""
    windows = plan_windows(inferer, inputs)
    first = WindowTerm(windows, network, windows.places[0], 0, torch.zeros_like(windows.total_importance))
    part = first.cut([windows.pad(x) for x in inputs])
    with torch.no_grad():
        return window_output(network(*(x.clone() for x in part)), head, windows.size).shape[1]


def window_scoring(
    network: nn.Module,
    inferer: SlidingWindowInferer,
    target: Target,
    selection: Tensor,
    *,
    inputs: Mapping[str, Tensor],
) -> Scoring:
    """Return a linear target's score through a sliding window, as a sum over the windows that meet the region.

    Args:
        network: sees windows of every image, and every vector whole.
        inferer: the sliding-window inferer.
        target: a linear target.
        selection: its weights, shape (N, 1, *spatial).
        inputs: plain tensors by name, in call order.
    """
    values = tuple(inputs.values())
    windows = plan_windows(inferer, values)
    weights = share_among_windows(windows, selection.to(device=windows.device, dtype=windows.dtype))
    terms = window_terms(windows, ScoreFunction(network, target, len(values)), weights, values)
    return Scoring(inputs, terms, padding=windows)
