"""Finds the cases of a data set, splits them, and refuses broken ones before any hour is spent on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from .biomarkers import read_biomarker
from .phantom import DESCRIPTION_FILE, SEQUENCES, TABLE_FILE

REPOSITORY = "https://github.com/muschellij2/open_ms_data"
REAL_FOLDER = Path("cross_sectional", "MNI")
REAL_TABLE = Path("cross_sectional", "patient_info.csv")
REAL_IMAGE = "{}_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz"
HELD_OUT_EVERY = 5

Names = str | Sequence[str] | None


def is_phantom(dataset_dir: str | os.PathLike[str]) -> bool:
    """Whether the folder holds phantoms; otherwise it should be a clone of open_ms_data."""
    return (Path(dataset_dir).expanduser() / DESCRIPTION_FILE).is_file()


@dataclass(frozen=True)
class Cases:
    """The cases of a data set, split into those to train on and those to test on.

    Args:
        dataset_dir: folder of phantoms, or a clone of open_ms_data.
        biomarker: what is predicted, a column of its table.
        train_cases: names of cases to train on, such as ``patient19``; else all that are not tested on.
        test_cases: names of cases to test on; else every fifth one (01, 06, 11, ...) that is not trained on.
        exclude_cases: names of cases to leave out altogether.
    """

    dataset_dir: str | os.PathLike[str]
    biomarker: str = "age"
    train_cases: Names = None
    test_cases: Names = None
    exclude_cases: Names = None

    def training(self) -> list[dict[str, Any]]:
        """The cases to train on.

        Returns:
            One dictionary per case: `image` (a file per sequence), `label` (the biomarker), `case_id` (its name).

        Raises:
            FileNotFoundError: if the folder is not such a data set, or a file is missing.
            ValueError: if a name is unknown, a case is in two lists, nothing is left to train on, a file is broken
                or on another grid, or the biomarker of a case is missing.
        """
        return self._describe(self._split()[0], "train", required=True)

    def held_out(self, *, with_label: bool = True) -> list[dict[str, Any]]:
        """The cases to test on, see :meth:`training`.

        Args:
            with_label: whether every case must have its biomarker; without, it comes along where there is one.
        """
        return self._describe(self._split()[1], "test", required=with_label)

    def _describe(self, names: list[str], purpose: str, *, required: bool) -> list[dict[str, Any]]:
        if not names:
            raise ValueError(
                f"No case of {self.dataset_dir} is left to {purpose} on. Name some with --{purpose}_cases."
            )
        table = self._root / (TABLE_FILE if is_phantom(self._root) else REAL_TABLE)
        values = read_biomarker(table, self.biomarker, names, required=required)
        folders = self._folders()
        return [
            {
                "case_id": name,
                "image": _files(folders[name]),
                **({"label": [values[name]]} if name in values else {}),
            }
            for name in names
        ]

    @property
    def _root(self) -> Path:
        return Path(self.dataset_dir).expanduser()

    def _folders(self) -> dict[str, Path]:
        """Case folders by name, in order."""
        root = self._root
        where, pattern = (root, "phantom*") if is_phantom(root) else (root / REAL_FOLDER, "patient*")
        folders = {folder.name: folder for folder in sorted(where.glob(pattern)) if folder.is_dir()}
        if not folders:
            found = (
                sorted(child.name for child in root.iterdir())[:5] if root.is_dir() else ["no such folder"]
            )
            raise FileNotFoundError(
                f"dataset_dir={root} holds no case: expected {REAL_FOLDER.as_posix()}/patientNN as in open_ms_data, "
                f"found: {', '.join(found) or 'an empty folder'}. Clone {REPOSITORY} and give its top folder, or "
                "leave dataset_dir out to run on the phantom."
            )
        return folders

    def _split(self) -> tuple[list[str], list[str]]:
        folders = self._folders()
        train, test, excluded = (
            _known(folders, names) for names in (self.train_cases, self.test_cases, self.exclude_cases)
        )
        both = sorted(set(train or ()) & set(test or ()))
        if both:
            raise ValueError(f"{', '.join(both)} must not be both in train_cases and in test_cases.")
        left = [name for name in folders if name not in (excluded or ())]
        if test is None:
            test = [name for name in left if _is_held_out(name) and name not in (train or ())]
        if train is None:
            train = [name for name in left if name not in test]
        if gone := sorted(set(excluded or ()) & {*train, *test}):
            raise ValueError(f"{', '.join(gone)} must not be both in exclude_cases and in another list.")
        return train, test


def _known(folders: dict[str, Path], names: Names) -> list[str] | None:
    if names is None:
        return None
    chosen = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in chosen if name not in folders]
    if unknown:
        raise ValueError(f"There is no case {', '.join(unknown)}; the data set has {', '.join(folders)}.")
    return chosen


def _is_held_out(name: str) -> bool:
    number = int("".join(filter(str.isdigit, name)) or 0)
    return number % HELD_OUT_EVERY == 1


def _files(folder: Path) -> list[str]:
    """The files of a case, by sequence. Looks at the headers: all there, NIfTI, and on one grid."""
    name = REAL_IMAGE if folder.name.startswith("patient") else "{}.nii.gz"
    files = {sequence: folder / name.format(sequence) for sequence in SEQUENCES}
    grids = {sequence: _grid(folder.name, sequence, file) for sequence, file in files.items()}
    expected = grids[SEQUENCES[0]]
    for sequence, grid in grids.items():
        if grid != expected:
            raise ValueError(
                f"{folder.name}: its {sequence} lies on another voxel grid than its {SEQUENCES[0]}: shape {grid[0]} "
                f"against {expected[0]}. Register and resample the sequences to one grid first."
            )
    return [str(file) for file in files.values()]


def _grid(case: str, sequence: str, path: Path) -> tuple[tuple[int, ...], list[list[float]]]:
    """Shape and affine of a file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{case}: its {sequence} is missing, expected in {path}. Complete the folder (a git checkout of it, or a "
            f'new clone), or leave this case out: --exclude_cases "{[case]}".'
        )
    try:
        header = nibabel.load(path)
        shape, affine = header.shape, header.affine
    except Exception as error:
        raise ValueError(
            f"{case}: its {sequence} is no readable NIfTI file: {path} ({error}). Fetch the file again, or leave this "
            f'case out: --exclude_cases "{[case]}".'
        ) from error
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(
            f"{case}: the affine of its {sequence} is singular, so voxels have no place in space: {path}. Mend the "
            "header from the original scan."
        )
    return shape, np.round(affine, 3).tolist()
