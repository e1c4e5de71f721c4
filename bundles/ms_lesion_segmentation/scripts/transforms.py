"""Loading with errors that name the case, and normalization that leaves the background exactly constant."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform
from scipy.ndimage import binary_fill_holes


class LoadCased(MapTransform):
    """Load the sequences of a case as channels of one image, as :class:`monai.transforms.LoadImaged` does.

    Differences: an unreadable file, or one with voxels that are no numbers, is an error that names case, file and
    cure; and the image goes by the name of its case's folder, which is what files saved later are called after (the
    files of all patients of open_ms_data have the same names).

    Args:
        keys: of files to load.
        allow_missing_keys: whether a case may lack some of them.

    Raises:
        RuntimeError: if a file cannot be read.
        ValueError: if an image has voxels that are NaN or infinite.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = self._load(data, key)
        return loaded

    def _load(self, data: Mapping[Hashable, Any], key: Hashable) -> MetaTensor:
        files = [data[key]] if isinstance(data[key], str) else list(data[key])
        folder = Path(files[0]).parent
        load = LoadImaged(keys="file", reader="NibabelReader", ensure_channel_first=True)
        volumes = []
        for file in files:
            try:
                volume = load({"file": file})["file"]
            except Exception as error:
                raise RuntimeError(
                    f"{folder.name}: cannot read {file} ({_cause(error)}). It may be truncated or damaged: fetch it "
                    "again, or leave this case out with --train_cases and --test_cases."
                ) from error
            bad = int((~torch.isfinite(volume)).sum())
            if bad:
                raise ValueError(
                    f"{folder.name}: {bad} voxels of {file} are NaN or infinite. Mend or mask them, or leave this "
                    "case out with --train_cases and --test_cases."
                )
            volumes.append(volume)
        image: MetaTensor = torch.cat(volumes)  # type: ignore[assignment]
        image.meta["filename_or_obj"] = str(folder)
        return image


def _cause(error: BaseException) -> str:
    """The first cause in a chain of errors: MONAI lists all its readers before it comes to the point."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"


class NormalizeForegroundd(MapTransform):
    """Center every sequence on its median and divide by its spread, both taken inside the head or brain.

    The spread is the range of the central 90 %, in units of a standard deviation, so that bright vessels do
    not move it. What lies outside becomes exactly 0: a background that is one constant for all cases and
    sequences, and
    the same 0 that sliding windows pad with. It stays 0 under the scalings of the intensity augmentation.

    Args:
        keys: of images to normalize, each (C, X, Y, Z).
        threshold: a voxel is foreground if it exceeds this share of the brightest 1 % in at least one sequence;
            holes are filled, so that ventricles and bone belong to the head.
        limit: normalized values are clipped to [-limit, limit].

    Raises:
        ValueError: if a sequence is constant, naming it.
    """

    def __init__(self, keys: KeysCollection, threshold: float = 0.12, limit: float = 6.0) -> None:
        super().__init__(keys)
        self.threshold = threshold
        self.limit = limit

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        normalized = dict(data)
        for key in self.key_iterator(normalized):
            normalized[key] = self._normalize(normalized[key])
        return normalized

    def _normalize(self, image: MetaTensor) -> MetaTensor:
        values = image.as_tensor().numpy().astype(np.float32)
        foreground = _foreground(values, self.threshold)
        result = np.zeros_like(values)
        for channel, sequence in enumerate(values):
            low, median, high = (
                np.percentile(sequence[foreground], [5, 50, 95]) if foreground.any() else (0, 0, 0)
            )
            if not high > low:
                name = image.meta.get("filename_or_obj", "image")
                raise ValueError(f"{name}: channel {channel} is (nearly) constant and cannot be normalized.")
            scaled = (sequence - median) * (3.29 / (high - low))
            result[channel][foreground] = np.clip(scaled, -self.limit, self.limit)[foreground]
        return MetaTensor(
            torch.from_numpy(result), meta=image.meta, applied_operations=image.applied_operations
        )


def _foreground(values: np.ndarray, threshold: float) -> np.ndarray:
    """Voxels of the head or brain, (X, Y, Z), bool."""
    bright = np.percentile(values.reshape(len(values), -1), 99, axis=1)
    relative = values / np.maximum(bright, 1e-6)[:, None, None, None]
    filled: np.ndarray = binary_fill_holes(relative.max(0) > threshold)
    return filled
