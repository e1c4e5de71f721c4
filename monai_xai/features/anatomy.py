"""Features that are anatomical structures or lesions."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from monai_xai.errors import EmptyRegionError, InputError
from monai_xai.features.base import CaseFeatures
from monai_xai.grids import Case, ImageSource, RegionLike, grids_of, label_map, mask_on_grid, places_text
from monai_xai.regions import Predicted, components_of

NamesLike = Mapping[int, str] | str | Path


@dataclass(frozen=True, eq=False)
class Atlas(CaseFeatures):
    """The structures of a label map; each entry of a vector is one feature.

    A map from a file or in a ``MetaTensor`` is resampled to the grid of the input through both affines, nearest
    neighbor: one in the patient's own space (a segmentation), or one in the space of a template to which the input was
    registered (an atlas in MNI space).

    Args:
        labels: whole numbers from 0, shape (*spatial) or (1, *spatial), or such a file; or one by input name.
        names: names of structures by number, or a table with them, see :func:`read_names`.
        background: the number of what is no structure.
        to_atlas: affine from the space of the input to that of the atlas (mm, RAS), shape (D + 1, D + 1), such as the
            result of a registration; None: they are one space.

    Raises:
        InputError: if the map does not overlap an input, or holds no labels.
    """

    labels: ImageSource | Mapping[str, ImageSource] = field(repr=False)
    names: NamesLike | None = field(default=None, repr=False)
    background: int = 0
    to_atlas: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.names, Mapping | None):
            object.__setattr__(self, "names", read_names(self.names))

    def feature_name(self, number: int) -> str:
        number = self.background if number == 0 else 0 if number == self.background else number
        names = self.names if isinstance(self.names, Mapping) else {}
        return names.get(number, "background" if number == self.background else f"structure {number}")

    def numbers(self, x: Tensor, name: str, case: Case | None) -> Tensor:
        source = self.labels.get(name) if isinstance(self.labels, Mapping) else self.labels
        if source is None:
            raise InputError(f"Atlas has no labels for the input {name!r}.")
        grids, owner = grids_of(x), f"Atlas for the input {name!r}"
        found = self._shared(torch.cat([label_map(source, g, owner, self.to_atlas) for g in grids]), name)
        if not (found != self.background).any():
            raise InputError(
                f"{owner} holds no structure on its grid: the label map is empty, or does not overlap the image. "
                f"{places_text(source, grids[0], owner)}".strip()
            )
        swapped = torch.where(found == 0, self.background, found)
        return torch.where(found == self.background, 0, swapped).to(x.device)


@dataclass(frozen=True, eq=False)
class Components(CaseFeatures):
    """Each connected component of a region (each lesion) is a feature, and the rest one; entries of vectors are too.

    Args:
        of: the region that is taken apart: of the prediction (of the explained channel), of the label, or a mask as a
            tensor or file; not 0 inside.
        min_voxels: smaller components belong to the rest.

    Components are numbered by size, ``lesion 0`` the largest, as :class:`~monai_xai.Component` counts them; voxels that
    touch at a face, edge or corner belong together.

    Raises:
        EmptyRegionError: if there is no component.
    """

    of: RegionLike = field(default_factory=Predicted)
    min_voxels: int = 1

    of_values: ClassVar[bool] = True

    def feature_name(self, number: int) -> str:
        return f"lesion {number - 1}" if number else "rest"

    def numbers(self, x: Tensor, name: str, case: Case | None) -> Tensor:
        find = mask_on_grid if case is None else case.mask
        found = find(self.of, x, f"Components for the input {name!r}")
        return self._shared(torch.stack([self._numbered(sample, name) for sample in found]), name)

    def _numbered(self, mask: Tensor, name: str) -> Tensor:
        """Return the numbers of one sample, shape (1, *spatial)."""
        labels, order = components_of(mask[0], self.min_voxels)
        if not order:
            raise EmptyRegionError(
                f"{self} has no component of at least {self.min_voxels} voxels in the input {name!r}."
            )
        numbers = np.zeros(labels.max() + 1, dtype=np.int64)
        numbers[order] = np.arange(1, len(order) + 1)
        return torch.from_numpy(numbers[labels])[None].to(mask.device)


def read_names(source: str | Path) -> dict[int, str]:
    """Read names of structures by number.

    Args:
        source: a CSV or TSV file with a header, among whose columns are a number (``index``, ``label``, ``value``,
            ``number`` or ``id``) and a name (``name``, ``structure``, ``region`` or ``label``); a JSON file of one
            object, numbers to names or names to numbers; or a lookup table as of FreeSurfer
            (``FreeSurferColorLUT.txt``) or ITK-SNAP, a number and a name in each line.

    Raises:
        InputError: if the file cannot be read, or has no numbers and names.
    """
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _READERS.get(path.suffix.lower(), _read_lookup)(text)
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"The names of structures in {path} cannot be read: {error}") from error
    if not names:
        raise InputError(f"{path} names no structures.")
    return names


_NUMBERS = ("index", "value", "number", "id", "label")
_NAMES = ("name", "structure", "region", "label")


def _read_table(text: str, delimiter: str) -> dict[int, str]:
    rows = csv.DictReader(text.splitlines(), delimiter=delimiter)
    columns = {column.strip().lower(): column for column in rows.fieldnames or ()}
    number = next((columns[key] for key in _NUMBERS if key in columns), None)
    name = next((columns[key] for key in _NAMES if key in columns and columns[key] != number), None)
    if number is None or name is None:
        raise ValueError(
            f"expected a column of {', '.join(_NUMBERS)} and one of {', '.join(_NAMES)}, got {list(columns)}"
        )
    return {int(row[number]): row[name].strip() for row in rows}


def _read_object(text: str) -> dict[int, str]:
    return {
        (value if isinstance(value, int) else int(key)): (key if isinstance(value, int) else str(value))
        for key, value in json.loads(text).items()
    }


def _read_lookup(text: str) -> dict[int, str]:
    """Read lines of a number, a name (in quotes, or without blanks) and colors, in either order."""
    names = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        quoted = re.search(r'"([^"]*)"', line)
        number, *rest = line.split()
        names[int(number)] = quoted[1] if quoted else rest[0]
    return names


_READERS = {
    ".csv": lambda text: _read_table(text, ","),
    ".tsv": lambda text: _read_table(text, "\t"),
    ".json": _read_object,
}
