"""Loading with errors that name the case."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from PIL import Image


class LoadRadiographd(MapTransform):
    """Load a picture of any kind that Pillow reads as one channel, (1, rows, columns), rows from top to bottom.

    :class:`monai.transforms.LoadImaged` keeps the channels of a color picture and swaps rows and columns.

    Args:
        keys: of files to load.

    Raises:
        RuntimeError: if a file cannot be read, naming the case.
        ValueError: if a picture is constant, or has pixels that are no numbers.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = _load(Path(loaded[key]))
        return loaded


def _load(file: Path) -> MetaTensor:
    try:
        with Image.open(file) as picture:
            values = _gray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise RuntimeError(
            f"{file.stem}: cannot read {file} ({error}). It may be truncated or damaged: fetch it again, or leave this "
            "case out with --exclude_cases."
        ) from error
    if not np.isfinite(values).all() or values.min() == values.max():
        raise ValueError(
            f"{file.stem}: {file} is one constant gray, or holds pixels that are no numbers. Fetch or convert it "
            "again, or leave this case out with --exclude_cases."
        )
    return MetaTensor(torch.from_numpy(values[None]), meta={"filename_or_obj": str(file)})


def _gray(picture: Image.Image) -> np.ndarray:
    """Color and palette pictures as 8 bits of gray, all others with the depth that they have."""
    has_depth = picture.mode in ("L", "I", "F") or picture.mode.startswith("I;16")
    return np.asarray(picture if has_depth else picture.convert("L")).astype(np.float32)
