"""Features: the pieces of an input that perturbation methods take away together."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.grids import Case
from monai_xai.spelling import Spelled


@dataclass(frozen=True)
class Features(Spelled, ABC):
    """A partition of each input into features, given by an integer mask."""

    @abstractmethod
    def mask(self, x: Tensor, name: str) -> Tensor:
        """Return feature numbers of one input, shape (1, C or 1, *spatial) or (1, F), expandable to the input."""

    def placed(self, case: Case) -> Features:
        """Return the features as they lie on a case; an explainer asks for it before it attributes.

        Here, features that need no more than the shape of an input are what they are.
        """
        return self

    def feature_name(self, number: int) -> str:
        """Return what a feature is called, by its number in :meth:`mask`."""
        return f"feature {number}"


@dataclass(frozen=True)
class CaseFeatures(Features):
    """Features that differ from case to case: their masks need the case's values, its place in space or its regions.

    Each entry of a vector is one feature. The samples of a batch share one partition; where they would need several
    (other anatomy, other affine), that is an error, and they are to be explained one at a time.

    ``of_values`` tells whether the values of an input or of the prediction decide, and not its grid alone.

    Args:
        keeps_background: whether what belongs to no piece is never taken away; else it is one feature more.
    """

    keeps_background: bool = field(default=False, kw_only=True)
    of_values: ClassVar[bool] = False

    def mask(self, x: Tensor, name: str) -> Tensor:
        return Channels().mask(x, name) if x.ndim == 2 else self.numbers(x, name, None)

    def placed(self, case: Case) -> Features:
        masks = {name: self.numbers(x, name, case) for name, x in case.inputs.items() if x.ndim > 2}
        return PlacedFeatures(self, masks, self.keeps_background)

    @abstractmethod
    def numbers(self, x: Tensor, name: str, case: Case | None) -> Tensor:
        """Return feature numbers of one image; 0 is the background.

        Args:
            x: shape (N, C, *spatial), a ``MetaTensor`` where it has a place in space.
            name: of the input.
            case: the case, if there is more to know about it than this image.

        Shapes: result (1, 1, *spatial).
        """

    def _shared(self, samples: Tensor, name: str) -> Tensor:
        """Return the one mask of all samples, shape (1, 1, *spatial), from one for each."""
        if not (samples == samples[:1]).all():
            raise InputError(
                f"{self} lies differently in the {len(samples)} samples of the input {name!r}, and a batch has one "
                "partition: explain one sample at a time."
            )
        return samples[:1]


@dataclass(frozen=True, eq=False)
class PlacedFeatures(Features):
    """Features as they lie on a case.

    Args:
        source: the features that were laid out.
        masks: feature numbers by input name, shape (1, 1, *spatial); inputs without one have a feature per channel.
        keeps_background: whether feature 0 is never taken away.
    """

    source: Features
    masks: Mapping[str, Tensor] = field(repr=False)
    keeps_background: bool = field(default=False, repr=False)

    def mask(self, x: Tensor, name: str) -> Tensor:
        return self.masks[name].to(x.device) if name in self.masks else Channels().mask(x, name)

    def feature_name(self, number: int) -> str:
        return self.source.feature_name(number)


@dataclass(frozen=True)
class Channels(Features):
    """Each channel (a modality of a multi-sequence image) or each entry of a vector is one feature."""

    def mask(self, x: Tensor, name: str) -> Tensor:
        return torch.arange(x.shape[1], device=x.device).reshape(1, -1, *[1] * (x.ndim - 2))


@dataclass(frozen=True)
class Blocks(Features):
    """Blocks of voxels, through all channels; each entry of a vector is one feature.

    Args:
        size: edge length in voxels, one number or one per axis. The last block of an axis may be smaller.
        per_channel: whether the blocks of different channels are different features.
    """

    size: int | Sequence[int] = 16
    per_channel: bool = False

    def mask(self, x: Tensor, name: str) -> Tensor:
        if x.ndim == 2:
            return Channels().mask(x, name)
        spatial = x.shape[2:]
        sizes = [self.size] * len(spatial) if isinstance(self.size, int) else list(self.size)
        if len(sizes) != len(spatial) or min(sizes) < 1:
            raise InputError(
                f"{self} does not fit the input {name!r} of spatial shape {tuple(spatial)}: it needs one size of at "
                "least 1 voxel for each axis."
            )
        if all(size > length for size, length in zip(sizes, spatial, strict=True)):
            raise InputError(
                f"{self} is larger than the input {name!r} of spatial shape {tuple(spatial)}: the whole image would "
                "be a single feature. Take smaller blocks."
            )
        blocks = torch.zeros((1, 1, *spatial), dtype=torch.long, device=x.device)
        for axis, (size, length) in enumerate(zip(sizes, spatial, strict=True)):
            index = torch.arange(length, device=x.device) // size
            shape = [-1 if i == axis + 2 else 1 for i in range(x.ndim)]
            blocks = blocks * (int(index[-1]) + 1) + index.reshape(shape)
        return blocks + Channels().mask(x, name) * (blocks.max() + 1) if self.per_channel else blocks


@dataclass(frozen=True, eq=False)
class FeatureMask(Features):
    """Given feature numbers, such as an atlas or supervoxels; they need not be contiguous.

    Args:
        numbers: integer tensor that expands to the input, or one tensor by input name. Equal numbers in two inputs
            are two features.
    """

    numbers: Tensor | Mapping[str, Tensor] = field(repr=False)

    def mask(self, x: Tensor, name: str) -> Tensor:
        numbers = self.numbers.get(name) if isinstance(self.numbers, Mapping) else self.numbers
        if numbers is None:
            raise InputError(f"FeatureMask has no mask for the input {name!r}.")
        try:
            torch.broadcast_to(numbers, (1, *x.shape[1:]))
        except RuntimeError as error:
            raise InputError(
                f"FeatureMask of shape {tuple(numbers.shape)} does not expand to {(1, *x.shape[1:])}, the shape of one "
                f"sample of the input {name!r}."
            ) from error
        if numbers.is_complex() or (numbers.is_floating_point() and (numbers != numbers.round()).any()):
            raise InputError(
                f"FeatureMask for the input {name!r} must hold whole numbers. Labels that were resampled must be "
                "resampled with nearest neighbor."
            )
        if numbers.numel() and numbers.amin() < 0:
            raise InputError(
                f"FeatureMask for the input {name!r} must hold numbers from 0, got {int(numbers.amin())}."
            )
        return numbers.to(device=x.device, dtype=torch.long)


FeaturesLike = Features | Tensor | Mapping[str, Tensor]


def as_features(value: FeaturesLike) -> Features:
    """Coerce a tensor or a mapping of tensors into :class:`FeatureMask`."""
    if not isinstance(value, Features | Tensor | Mapping):
        raise InputError(
            f"Features such as Channels(), Blocks(16) or an integer mask are needed, got {value!r}."
        )
    return value if isinstance(value, Features) else FeatureMask(value)


def feature_masks(features: Features, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], int]:
    """Return feature numbers for all inputs, contiguous and unique over the inputs, and how many there are.

    Shapes: each mask (1, C or 1, *spatial) or (1, F), expandable to its input.
    """
    masks, count = [], 0
    for name, x in inputs.items():
        mask = features.mask(x, name)
        values, dense = torch.unique(mask, return_inverse=True)
        masks.append((dense + count).reshape([1] * (x.ndim - mask.ndim) + list(mask.shape)))
        count += len(values)
    return masks, count


def crossed(coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pieces into which fine features cut coarse ones, numbered from 0, and which coarse one each is in.

    Args:
        coarse: feature numbers from 0.
        fine: feature numbers from 0, of a shape that broadcasts with it.
    """
    width = int(fine.max()) + 1
    pairs = coarse * width + fine
    numbers, pieces = torch.unique(pairs, return_inverse=True)
    return pieces.reshape(pairs.shape), numbers // width


def channel_names(source: str | Path) -> dict[str, tuple[str, ...]]:
    """Read the modality names of a bundle's inputs from ``channel_def`` in its metadata.

    Args:
        source: the bundle's root folder, or its ``metadata.json``.

    Returns:
        Names by input, such as ``{"image": ("FLAIR", "T1", "T1POST", "T2")}``; empty if there is no metadata.

    Raises:
        InputError: if the file is no JSON, or ``channel_def`` does not go by channel numbers.
    """
    path = Path(source)
    path = path / "configs" / "metadata.json" if path.is_dir() else path
    if not path.is_file():
        return {}
    try:
        inputs = json.loads(path.read_text()).get("network_data_format", {}).get("inputs", {})
        definitions = {name: entry.get("channel_def") or {} for name, entry in inputs.items()}
        return {
            name: tuple(str(definition[key]) for key in sorted(definition, key=int))
            for name, definition in definitions.items()
            if definition
        }
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{path} does not name the channels: {error}. Expected "
            'network_data_format.inputs.<name>.channel_def = {"0": "FLAIR", "1": "T1", ...}.'
        ) from error
