"""Baselines that are another image, or leave a part of the input as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from monai_xai.baselines.base import Baseline, Constant
from monai_xai.errors import InputError
from monai_xai.grids import Case, ImageSource, RegionLike, grids_of, image_on_grid, mask_on_grid
from monai_xai.regions import Mask


@dataclass(frozen=True, eq=False)
class GivenImage(Baseline):
    """Another image of the patient, such as one without the lesion: inpainted, or from an earlier visit.

    It must have gone through the same intensity transforms as the input.

    Args:
        image: a tensor that expands to the input, shape (C, *spatial) or (1, C, *spatial); a file, or one for each
            channel; files and the channels of a ``MetaTensor`` are resampled to the grid of the input through both
            affines, linearly, beyond their edges with their outermost values. For several images, give one by input
            name. Vectors get zeros.

    Raises:
        InputError: if it does not overlap the input, or has another number of channels.
    """

    image: ImageSource | Sequence[ImageSource] = field(repr=False)

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim == 2:
            return (torch.zeros_like(x),)
        found = [
            torch.cat([image_on_grid(s, g, "GivenImage") for s in self._sources(x)], 1) for g in grids_of(x)
        ]
        image = torch.cat(found)
        if image.shape[1] not in (1, x.shape[1]):
            raise InputError(
                f"GivenImage has {image.shape[1]} channels, the input of shape {tuple(x.shape)} has {x.shape[1]}: give "
                "one file for each channel, in their order."
            )
        return (image.to(x).expand_as(x),)

    def placed(self, case: Case) -> Baseline | Mapping[str, Baseline]:
        return {name: Constant(self.draws(x)[0] if x.ndim > 2 else 0.0) for name, x in case.inputs.items()}

    def _sources(self, x: Tensor) -> list[ImageSource]:
        """Return one source for each channel."""
        if isinstance(self.image, str | Path):
            return [self.image]
        if not isinstance(self.image, Tensor):
            return list(self.image)
        image = self.image[0] if self.image.ndim == x.ndim and len(self.image) == 1 else self.image
        return [image[i : i + 1] for i in range(len(image))] if image.ndim == x.ndim - 1 else [image]


@dataclass(frozen=True, eq=False)
class Within(Baseline):
    """A baseline inside a region; outside, the input stays as it is and is never taken away.

    Args:
        baseline: what the inside is held against.
        region: a region of the input, the prediction or the label, or a mask as a tensor or file, not 0 inside.
            Vectors, which have no region, lie inside.
    """

    baseline: Baseline
    region: RegionLike

    def __post_init__(self) -> None:
        if not isinstance(self.baseline, Baseline):
            raise InputError(f"Within needs a baseline such as Blur(), got {self.baseline!r}.")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether the baseline inside is."""
        return self.baseline.stochastic

    @property
    def conditional(self) -> bool:  # type: ignore[override]
        """Whether the baseline inside is."""
        return self.baseline.conditional

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        inside = self._inside(x)
        return tuple(torch.where(inside, draw, x) for draw in self.baseline.draws(x))

    def impute(self, x: Tensor, removed: Tensor, draw: Tensor | None = None) -> Tensor:
        return self.baseline.impute(x, removed & self._inside(x), draw)

    def placed(self, case: Case) -> Baseline | Mapping[str, Baseline]:
        inner = self.baseline.placed(case)
        return {
            name: Within(inner[name] if isinstance(inner, Mapping) else inner, Mask(self._inside(x, case)))
            for name, x in case.inputs.items()
        }

    def for_input(self, number: int) -> Baseline:
        return replace(self, baseline=self.baseline.for_input(number))

    def _inside(self, x: Tensor, case: Case | None = None) -> Tensor:
        if x.ndim == 2:
            return torch.ones_like(x, dtype=torch.bool)
        find = mask_on_grid if case is None else case.mask
        return find(self.region, x, "Within")
