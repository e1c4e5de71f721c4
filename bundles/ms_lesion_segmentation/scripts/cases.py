"""Finds the cases of a data set, splits them, and refuses broken ones before any hour is spent on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from .phantom import DESCRIPTION_FILE, SEQUENCES

REPOSITORY = "https://github.com/muschellij2/open_ms_data"
REAL_FOLDER = Path("cross_sectional", "MNI")
REAL_IMAGE = "{}_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz"
REAL_LABEL = "GOLD_STANDARD_N4_noneck_reduced_winsor_regtoFLAIR_regtoMNI.nii.gz"
HELD_OUT_EVERY = 5


def is_phantom(dataset_dir: str | os.PathLike[str]) -> bool:
    """Whether the folder holds phantoms; otherwise it should be a clone of open_ms_data."""
    return (Path(dataset_dir).expanduser() / DESCRIPTION_FILE).is_file()


def training_cases(
    dataset_dir: str | os.PathLike[str],
    train: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The cases to train on: those named in `train`, else all that are not tested on.

    Args:
        dataset_dir: folder of phantoms, or a clone of open_ms_data.
        train: names of cases, such as ``patient19``.
        test: names of cases that are kept for the test.

    Returns:
        One dictionary per case: `image` (a file per sequence), `label` (a file), `case_id` (its name).

    Raises:
        FileNotFoundError: if the folder is not such a data set, or a file of a case is missing.
        ValueError: if a name is unknown, a case is in both lists, or nothing is left to train on.
    """
    folders = _case_folders(Path(dataset_dir).expanduser())
    train_names, _ = _split(folders, train, test)
    if not train_names:
        raise ValueError(f"No case of {dataset_dir} is left to train on. Name some with --train_cases.")
    return [_describe(folders[name], with_label=True) for name in train_names]


def held_out_cases(
    dataset_dir: str | os.PathLike[str],
    test: str | Sequence[str] | None = None,
    train: str | Sequence[str] | None = None,
    *,
    with_label: bool = True,
) -> list[dict[str, Any]]:
    """The cases to test on: those named in `test`, else every fifth one (01, 06, 11, ...) that is not trained on.

    Args:
        dataset_dir: folder of phantoms, or a clone of open_ms_data.
        test: names of cases, such as ``patient26``.
        train: names of cases that are trained on.
        with_label: whether a label is required; without, it comes along where there is one.

    Returns:
        One dictionary per case, see :func:`training_cases`.

    Raises:
        FileNotFoundError: if the folder is not such a data set, or a file of a case is missing.
        ValueError: if a name is unknown, a case is in both lists, or nothing is left to test on.
    """
    folders = _case_folders(Path(dataset_dir).expanduser())
    _, test_names = _split(folders, train, test)
    if not test_names:
        raise ValueError(f"No case of {dataset_dir} is left to test on. Name some with --test_cases.")
    return [_describe(folders[name], with_label=with_label) for name in test_names]


def _case_folders(root: Path) -> dict[str, Path]:
    """Case folders by name, in order."""
    where = root if is_phantom(root) else root / REAL_FOLDER
    pattern = "phantom*" if is_phantom(root) else "patient*"
    folders = {folder.name: folder for folder in sorted(where.glob(pattern)) if folder.is_dir()}
    if not folders:
        found = (
            ", ".join(sorted(child.name for child in root.iterdir())[:5])
            if root.is_dir()
            else "no such folder"
        )
        raise FileNotFoundError(
            f"dataset_dir={root} holds no case: expected {REAL_FOLDER.as_posix()}/patientNN as in open_ms_data, found: "
            f"{found or 'an empty folder'}. Clone {REPOSITORY} and give its top folder, or leave dataset_dir out to "
            "run on the phantom."
        )
    return folders


def _split(
    folders: dict[str, Path], train: str | Sequence[str] | None, test: str | Sequence[str] | None
) -> tuple[list[str], list[str]]:
    train_names, test_names = _named(folders, train), _named(folders, test)
    both = sorted(set(train_names or ()) & set(test_names or ()))
    if both:
        raise ValueError(f"{', '.join(both)} must not be both in train_cases and in test_cases.")
    if test_names is None:
        test_names = [name for name in folders if _is_held_out(name) and name not in (train_names or ())]
    if train_names is None:
        train_names = [name for name in folders if name not in test_names]
    return train_names, test_names


def _named(folders: dict[str, Path], names: str | Sequence[str] | None) -> list[str] | None:
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


def _describe(folder: Path, *, with_label: bool) -> dict[str, Any]:
    real = folder.name.startswith("patient")
    images = {name: folder / (REAL_IMAGE if real else "{}.nii.gz").format(name) for name in SEQUENCES}
    label = folder / (REAL_LABEL if real else "lesion.nii.gz")
    files = {**images, **({"label": label} if with_label or label.is_file() else {})}
    _check_files(folder.name, files)
    case: dict[str, Any] = {"case_id": folder.name, "image": [str(path) for path in images.values()]}
    return {**case, "label": str(label)} if "label" in files else case


def _check_files(case: str, files: dict[str, Path]) -> None:
    """Look at the headers only: whether all files are there, are NIfTI, and share one grid."""
    grids = {}
    for what, path in files.items():
        if not path.is_file():
            raise FileNotFoundError(
                f"{case}: its {what} is missing, expected in {path}. Complete the folder (a git checkout of it, or a "
                "new clone), or leave this case out with --train_cases and --test_cases."
            )
        try:
            header = nibabel.load(path)
            grids[what] = (header.shape, np.round(header.affine, 3).tolist())
        except Exception as error:
            raise ValueError(
                f"{case}: its {what} is no readable NIfTI file: {path} ({error}). Fetch the file again."
            ) from error
        if abs(np.linalg.det(header.affine[:3, :3])) < 1e-9:
            raise ValueError(
                f"{case}: the affine of its {what} is singular, so voxels have no place in space: {path}. Mend the "
                "header from the original scan."
            )
    reference = grids[SEQUENCES[0]]
    for what, grid in grids.items():
        if grid != reference:
            raise ValueError(
                f"{case}: its {what} lies on another voxel grid than its {SEQUENCES[0]}: shape {grid[0]} against "
                f"{reference[0]}. Register and resample the sequences to one grid first."
            )
