"""Loading with errors that name the case, a background that is exactly constant, and sequences that go missing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform, RandomizableTransform
from scipy.ndimage import binary_fill_holes

from .phantom import SEQUENCES


class LoadCased(MapTransform):
    """Load the sequences of a case as channels of one image, as :class:`monai.transforms.LoadImaged` does.

    Differences: an unreadable file, or one with voxels that are no numbers, is an error that names case, file and
    cure; and the image goes by the name of its case's folder, which is what files saved later are called after (the
    files of all patients of open_ms_data have the same names).

    Args:
        keys: of files to load.

    Raises:
        RuntimeError: if a file cannot be read.
        ValueError: if an image has voxels that are NaN or infinite.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            image: MetaTensor = torch.cat([_load(Path(file)) for file in data[key]])  # type: ignore[assignment]
            image.meta["filename_or_obj"] = str(Path(data[key][0]).parent)
            loaded[key] = image
        return loaded


def _load(file: Path) -> MetaTensor:
    case = file.parent.name
    load = LoadImaged(keys="file", reader="NibabelReader", ensure_channel_first=True)
    try:
        volume: MetaTensor = load({"file": file})["file"]
    except Exception as error:
        raise RuntimeError(
            f"{case}: cannot read {file} ({_cause(error)}). It may be truncated or damaged: fetch it again, or leave "
            f'this case out: --exclude_cases "{[case]}".'
        ) from error
    bad = int((~torch.isfinite(volume)).sum())
    if bad:
        raise ValueError(
            f"{case}: {bad} voxels of {file} are NaN or infinite. Mend or mask them, or leave this case out: "
            f'--exclude_cases "{[case]}".'
        )
    return volume


def _cause(error: BaseException) -> str:
    """The first cause in a chain of errors: MONAI lists all its readers before it comes to the point."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"


class NormalizeForegroundd(MapTransform):
    """Center every sequence on its median and divide by its spread, both taken inside the head or brain.

    The spread is the range of the central 90 %, in units of a standard deviation, so that bright vessels do not move
    it. What lies outside becomes exactly 0, one constant for all cases and sequences, and the value of a sequence
    that is missing (see :class:`RandDropSequencesd`).

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
            inside = sequence[foreground]
            low, median, high = np.percentile(inside, [5, 50, 95]) if inside.size else (0, 0, 0)
            if not high > low:
                raise ValueError(
                    f"{Path(image.meta.get('filename_or_obj', 'image')).name}: its {SEQUENCES[channel]} is (nearly) "
                    "constant and cannot be normalized. Fetch the file again, or leave this case out with "
                    "--exclude_cases."
                )
            scaled = (inside - median) * (3.29 / (high - low))
            result[channel][foreground] = np.clip(scaled, -self.limit, self.limit)
        return MetaTensor(
            torch.from_numpy(result), meta=image.meta, applied_operations=image.applied_operations
        )


def _foreground(values: np.ndarray, threshold: float) -> np.ndarray:
    """Voxels of the head or brain, (X, Y, Z), bool."""
    bright = np.percentile(values.reshape(len(values), -1), 99, axis=1)
    relative = values / np.maximum(bright, 1e-6)[:, None, None, None]
    filled: np.ndarray = binary_fill_holes(relative.max(0) > threshold)
    return filled


class RandDropSequencesd(RandomizableTransform, MapTransform):
    """Let sequences go missing: whole channels become 0.

    A network that is trained so knows what to say when it does not see a sequence: what it would expect from the
    others. Then 0 is a baseline that means *missing*, and no input that it has never met.

    Args:
        keys: of images, each (C, X, Y, Z).
        prob: how often an image is touched at all; half of its channels go then, at random, now and then all or none.
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.5) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        dropped = dict(data)
        self.randomize(None)
        for key in self.key_iterator(dropped):
            image = dropped[key]
            keep = self.R.rand(len(image)) < 0.5
            if self._do_transform:
                dropped[key] = image * torch.from_numpy(keep).to(image)[:, None, None, None]
        return dropped
