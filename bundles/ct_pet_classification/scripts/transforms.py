"""Loading with errors that name the case, one world-space crop for two grids, and scans that go missing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Crop, InvertibleTransform, LoadImaged, MapTransform, Pad, RandomizableTransform

from .cases import LEAVE_OUT, SCANS

LOWEST_SUV = -5.0  # reconstructions undershoot a little; a CT goes far below
HIGHEST_SUV = 100.0  # of the 99th percentile: more is activity in Bq/ml or counts


class LoadCased(MapTransform):
    """Load the CT under `image` and the PET under `pet`, as :class:`monai.transforms.LoadImaged` does.

    Differences: an unreadable file, or one whose voxels are no numbers, no HU or no SUV, is an error that names case,
    file and cure; and a scan goes by the `case_id` of its case, which is what files saved later are called after.

    Args:
        keys: `image` and `pet`.

    Raises:
        RuntimeError: if a file cannot be read.
        ValueError: if voxels are NaN or infinite, or not in the units of the scan (CT and PET swapped).
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = _load(data["case_id"], SCANS[str(key)], Path(data[key]))
        return loaded


def _load(case: str, scan: str, file: Path) -> MetaTensor:
    load = LoadImaged(keys="file", reader="NibabelReader", ensure_channel_first=True)
    try:
        volume: MetaTensor = load({"file": file})["file"]
    except Exception as error:
        raise RuntimeError(
            f"{case}: cannot read its {scan}, {file} ({_cause(error)}). It may be truncated or damaged: convert or "
            f"fetch it again, {LEAVE_OUT}."
        ) from error
    bad = int((~torch.isfinite(volume)).sum())
    if bad:
        raise ValueError(
            f"{case}: {bad} voxels of its {scan}, {file}, are NaN or infinite. Mend or mask them, {LEAVE_OUT}."
        )
    values = volume.as_tensor()
    unlikely = _why_no_ct(values) if scan == "CT" else _why_no_pet(values)
    if unlikely:
        raise ValueError(f"{case}: {file} does not look like a {scan}: {unlikely}")
    volume.meta["filename_or_obj"] = case
    return volume


def _why_no_ct(values: torch.Tensor) -> str | None:
    lowest = float(values.min())
    if lowest < 0:
        return None
    return (
        f"its lowest voxel is {lowest:g}, but air has about -1000 HU. Are CT and PET swapped in the datalist? "
        "Otherwise convert it to HU (rescale slope and intercept)."
    )


def _why_no_pet(values: torch.Tensor) -> str | None:
    lowest, high = float(values.min()), float(np.percentile(values.numpy(), 99))
    if lowest < LOWEST_SUV:
        return (
            f"its lowest voxel is {lowest:g}, but uptake is not negative. Are CT and PET swapped in the datalist? "
            "Otherwise convert it to SUV."
        )
    if high > HIGHEST_SUV:
        return (
            f"1 % of its voxels exceed {high:g}, far above any SUV; it is in Bq/ml or counts. Divide it by the "
            "injected dose per body weight, decay-corrected."
        )
    return None


def _cause(error: BaseException) -> str:
    """The first cause in a chain of errors: MONAI lists all its readers before it comes to the point."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"


class CropAroundd(MapTransform, InvertibleTransform):
    """Crop or pad every scan to a size of its own, all around one point of the world.

    Scans on different grids so stay aligned: the middle of each result is the voxel nearest to that point. What lies
    outside of a scan becomes 0. Can be inverted, scan by scan.

    Args:
        keys: of scans, each (C, X, Y, Z).
        sizes: the size of each, in voxels.
        center_key: of the point, in mm (RAS).
        allow_missing_keys: whether a case may lack some of the scans.
    """

    def __init__(
        self,
        keys: KeysCollection,
        sizes: Sequence[Sequence[int]],
        center_key: str = "center_mm",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.sizes = [tuple(size) for size in sizes]
        self.center_key = center_key
        self.pad = Pad()
        self.crop = Crop()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        cropped = dict(data)
        for key, size in self.key_iterator(cropped, self.sizes):
            image = cropped[key]
            starts = _starts(image.affine, data[self.center_key], size)
            low = [max(0, -start) for start in starts]
            high = [
                max(0, start + n - have) for start, n, have in zip(starts, size, image.shape[1:], strict=True)
            ]
            padded = self.pad(image, to_pad=[(0, 0), *zip(low, high, strict=True)])
            first = [max(0, start) for start in starts]
            cropped[key] = self.crop(padded, [slice(f, f + n) for f, n in zip(first, size, strict=True)])
        return cropped

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        whole = dict(data)
        for key in self.key_iterator(whole):
            whole[key] = self.pad.inverse(self.crop.inverse(whole[key]))
        return whole


def _starts(affine: torch.Tensor, center: Any, size: Sequence[int]) -> list[int]:
    """Index of the first voxel of the crop on every axis; negative where padding is needed."""
    point = np.linalg.inv(np.asarray(affine, dtype=np.float64)) @ np.array([*np.asarray(center, float), 1.0])
    return [round(float(middle - (n - 1) / 2)) for middle, n in zip(point[:3], size, strict=True)]


class RandDropScansd(RandomizableTransform, MapTransform):
    """Let scans go missing: one of them, or all, become 0.

    A network that is trained so knows what to say when it does not see a scan: what it would expect from the others.
    Then 0 is a baseline that means *missing*, and no input that it has never met.

    Args:
        keys: of scans.
        prob: how often something goes missing; each scan, and all of them together, are then equally likely to.
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.2) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    def randomize(self, data: Any = None) -> None:
        super().randomize(data)
        self._which = int(self.R.randint(len(self.keys) + 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        dropped = dict(data)
        self.randomize()
        for index, key in enumerate(self.key_iterator(dropped)):
            if self._do_transform and self._which in (index, len(self.keys)):
                dropped[key] = dropped[key] * 0
        return dropped
