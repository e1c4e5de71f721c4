"""Regions: the voxels of a dense output that a target speaks about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from monai_xai.errors import EmptyRegionError, InputError
from monai_xai.spelling import Spelled


class Needs(IntEnum):
    """How much of the clean prediction a target or region looks at. What is not looked at is not computed."""

    NOTHING = 0
    """At most its batch size."""
    GRID = 1
    """Also where its voxels lie."""
    SHAPE = 2
    """Also how many channels it has."""
    VALUES = 3
    """All of it."""


@dataclass(frozen=True)
class Region(Spelled, ABC):
    """The voxels of interest, chosen once from the clean prediction and frozen from then on.

    ``needs`` tells how much of the prediction :meth:`mask` looks at.
    """

    needs: ClassVar[Needs] = Needs.VALUES

    @abstractmethod
    def mask(self, output: Tensor, label: Tensor | None, channel: int) -> Tensor:
        """Return the voxels of the region.

        Args:
            output: the clean prediction, shape (N, C, *spatial); true as far as ``needs`` says.
            label: ground truth, shape (N, 1, *spatial) with class indices or (N, C, *spatial) one-hot.
            channel: the output channel that the target speaks about.

        Shapes: result (N, 1, *spatial), bool.
        """

    @property
    def is_several(self) -> bool:
        """Whether it stands for as many regions as :meth:`each` finds."""
        return False

    def each(self, output: Tensor, label: Tensor | None, channel: int) -> dict[str, Region]:
        """Return the regions that this one stands for, by name; empty for a region that stands for itself."""
        return {}


@dataclass(frozen=True)
class Predicted(Region):
    """The predicted mask of the explained channel.

    Args:
        threshold: None takes the voxels where the channel is the arg-max (for an output of one channel: where it is
            above 0, which is probability 0.5 for a logit). A number takes the voxels where the channel is above it,
            in the unit of the output: for a multi-label network such as BraTS, ``threshold=0.0`` on logits. "otsu"
            takes the one that parts each sample's values of the channel best in two (Otsu 1979).
    """

    threshold: float | Literal["otsu"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.threshold, str) and self.threshold != "otsu":
            raise InputError(f"Predicted(threshold={self.threshold!r}) must be a number, 'otsu' or None.")

    def mask(self, output: Tensor, label: Tensor | None, channel: int) -> Tensor:
        if isinstance(self.threshold, str):
            values = output[:, channel : channel + 1]
            return torch.stack([sample > _otsu(sample) for sample in values])
        if self.threshold is None and output.shape[1] > 1:
            return output.argmax(1, keepdim=True) == channel
        return output[:, channel : channel + 1] > (self.threshold or 0.0)


@dataclass(frozen=True)
class Labeled(Region):
    """The ground-truth mask.

    Args:
        value: the label value that marks the region; None takes the explained channel's index (for an output of one
            channel: everything above 0). A one-hot label is indexed by it.
    """

    value: int | None = None
    needs: ClassVar[Needs] = Needs.SHAPE

    def mask(self, output: Tensor, label: Tensor | None, channel: int) -> Tensor:
        if label is None:
            raise InputError(
                "Labeled() needs a label: call the explainer with label=..., or use Predicted()."
            )
        if label.shape[2:] != output.shape[2:] or label.shape[0] != output.shape[0]:
            raise InputError(
                f"Labeled() needs a label of shape (N, 1, *spatial) on the grid of the output "
                f"{tuple(output.shape)}, got {tuple(label.shape)}."
            )
        value = channel if self.value is None else self.value
        if self.value is None and output.shape[1] == 1 < label.shape[1]:
            raise InputError(
                f"Labeled() cannot tell which channel of the one-hot label {tuple(label.shape)} belongs to an output "
                "of one channel. Say it: Labeled(value=1)."
            )
        if label.shape[1] > 1:
            if value >= label.shape[1]:
                raise InputError(
                    f"Labeled(value={value}) is out of range for a one-hot label of shape {tuple(label.shape)}."
                )
            return label[:, value : value + 1] > 0.5
        if output.shape[1] == 1 and self.value is None:
            return label > 0.5
        return label == value


@dataclass(frozen=True)
class Component(Region):
    """One connected component (a lesion) of another region, counted from the largest.

    Args:
        k: which component, 0 for the largest. None stands for every component: the explainer then returns one
            explanation per lesion, named ``component0``, ``component1``, … (batch size 1).
        of: the region that is taken apart.
        min_voxels: smaller components are left out.

    Voxels that touch at a face, edge or corner belong together.
    """

    k: int | None = 0
    of: Region = field(default_factory=Predicted)
    min_voxels: int = 1

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """What the region that is taken apart looks at."""
        return self.of.needs

    @property
    def is_several(self) -> bool:
        return self.k is None

    def mask(self, output: Tensor, label: Tensor | None, channel: int) -> Tensor:
        if self.k is None:
            raise InputError(
                "Component(k=None) stands for several regions; give one of them, or call the explainer."
            )
        whole = self.of.mask(output, label, channel)
        return torch.stack([self._component(sample[0], self.k, i) for i, sample in enumerate(whole)])[:, None]

    def each(self, output: Tensor, label: Tensor | None, channel: int) -> dict[str, Region]:
        if self.k is not None:
            return {}
        if output.shape[0] != 1:
            raise InputError(
                f"Component(k=None) explains every lesion of one case, got a batch of {output.shape[0]}."
            )
        count = len(components_of(self.of.mask(output, label, channel)[0, 0], self.min_voxels)[1])
        if count == 0:
            raise EmptyRegionError(
                f"{self} is empty in sample 0: no component of at least {self.min_voxels} voxels."
            )
        return {f"component{k}": replace(self, k=k) for k in range(count)}

    def _component(self, mask: Tensor, k: int, sample: int) -> Tensor:
        labels, order = components_of(mask, self.min_voxels)
        if k >= len(order):
            raise EmptyRegionError(
                f"Component(k={k}) does not exist in sample {sample}: {self.of} has {len(order)} components "
                f"of at least {self.min_voxels} voxels."
            )
        return torch.from_numpy(labels == order[k]).to(mask.device)


def components_of(mask: Tensor, min_voxels: int = 1) -> tuple[np.ndarray, list[int]]:
    """Label the connected components of one mask (*spatial) and list their labels from the largest."""
    array = mask.cpu().numpy()
    labels, _ = ndimage.label(array, structure=np.ones((3,) * array.ndim))
    sizes = np.bincount(labels.ravel())
    order = [int(i) for i in np.argsort(-sizes[1:], kind="stable") + 1 if sizes[i] >= min_voxels]
    return labels, order


@dataclass(frozen=True)
class Box(Region):
    """A box in voxels, the same in every sample; ``end`` is exclusive, as in slices."""

    start: Sequence[int]
    end: Sequence[int]
    needs: ClassVar[Needs] = Needs.GRID

    def __post_init__(self) -> None:
        if not (isinstance(self.start, Iterable) and isinstance(self.end, Iterable)):
            raise InputError(f"{self} needs a number for each axis, such as Box((0, 0, 0), (64, 64, 64)).")

    def mask(self, output: Tensor, label: Tensor | None, channel: int) -> Tensor:
        spatial = output.shape[2:]
        corners = list(zip(self.start, self.end, strict=False))
        inside = len(self.start) == len(self.end) == len(spatial) and all(
            0 <= start < end <= size for (start, end), size in zip(corners, spatial, strict=True)
        )
        if not inside:
            raise InputError(f"{self} does not lie within an output of spatial shape {tuple(spatial)}.")
        mask = torch.zeros((output.shape[0], 1, *spatial), dtype=torch.bool, device=output.device)
        mask[(slice(None), slice(None), *(slice(start, end) for start, end in corners))] = True
        return mask


@dataclass(frozen=True)
class Voxel(Region):
    """A single voxel, the same in every sample."""

    index: Sequence[int]
    needs: ClassVar[Needs] = Needs.GRID

    def __post_init__(self) -> None:
        if not isinstance(self.index, Iterable):
            raise InputError(f"{self} needs a number for each axis, such as Voxel((32, 32, 32)).")

    def mask(self, output: Tensor, label: Tensor | None, channel: int) -> Tensor:
        spatial = output.shape[2:]
        if len(self.index) != len(spatial) or not all(
            0 <= i < n for i, n in zip(self.index, spatial, strict=True)
        ):
            raise InputError(f"{self} does not lie within an output of spatial shape {tuple(spatial)}.")
        return Box(tuple(self.index), tuple(i + 1 for i in self.index)).mask(output, label, channel)


@dataclass(frozen=True, eq=False)
class Mask(Region):
    """A given mask.

    Args:
        voxels: non-zero where the region is; shape (*spatial), (1, *spatial) or (N, 1, *spatial).
    """

    voxels: Tensor = field(repr=False)
    needs: ClassVar[Needs] = Needs.GRID

    def mask(self, output: Tensor, label: Tensor | None, channel: int) -> Tensor:
        shape = (output.shape[0], 1, *output.shape[2:])
        voxels = torch.as_tensor(self.voxels).to(output.device) != 0
        try:
            return voxels.expand(shape)
        except RuntimeError as error:
            raise InputError(
                f"Mask needs voxels that expand to {shape}, got shape {tuple(voxels.shape)}."
            ) from error


def _otsu(values: Tensor) -> float:
    """Return the threshold between two groups of values; of equal values, these."""
    return float(threshold_otsu(values.detach().cpu().double().numpy().ravel()))  # type: ignore[no-untyped-call]
