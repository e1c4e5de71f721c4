"""Loading with errors that name the case, and inputs that go missing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
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


class RandDropInputsd(RandomizableTransform, MapTransform):
    """Let inputs go missing: one of them, or all, become 0.

    A network that is trained so knows what to say when it does not see an input: what it would expect from the others.
    Then a black film and a record of which nothing is known, not even a level, are baselines that mean *missing*.

    Args:
        keys: of inputs.
        prob: how often something goes missing; each input, and all of them together, are then equally likely to.
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
