"""Reads the datalist of a data set, and refuses broken cases before any hour is spent on them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from .phantom import DATALIST_FILE, TRUTH_FILE

SCANS: Mapping[str, str] = {"image": "CT", "pet": "PET"}  # by key in the datalist
CLASSES = ("benign", "malignant")
SECTIONS = ("training", "testing")
LAYOUT = (
    '{"training": [{"case_id": "case01", "image": "case01/ct.nii.gz", "pet": "case01/pet.nii.gz", "label": 0}, ...], '
    '"testing": [...]}'
)
LEAVE_OUT = f"or take the case out of {DATALIST_FILE}"


def is_phantom(dataset_dir: str | os.PathLike[str]) -> bool:
    """Whether the folder holds phantoms, and not real scans."""
    return (Path(dataset_dir).expanduser() / TRUTH_FILE).is_file()


def training_cases(dataset_dir: str | os.PathLike[str], *, with_label: bool = True) -> list[dict[str, Any]]:
    """The cases to train on: those under "training" in the datalist.

    Args:
        dataset_dir: folder with a `datalist.json`, to which its paths are relative.
        with_label: whether labels are required, of both classes; without, they come along where there are some.

    Returns:
        One dictionary per case: `case_id`, `image` (file of the CT), `pet` (file of the PET), `label` (0 or 1), and
        `center_mm`, the point of the world around which both scans are cropped: that of the datalist, else the
        middle of the CT.

    Raises:
        FileNotFoundError: if the datalist or a scan is not there.
        ValueError: if the datalist is no such list; if a scan is unreadable, has no place in space, or does not show
            what the other scan shows; if a label is missing or no class; or if there is one class only.
    """
    cases = _described(Path(dataset_dir).expanduser(), "training", with_label=with_label)
    if with_label:
        _require_both_classes(cases)
    return cases


def held_out_cases(dataset_dir: str | os.PathLike[str], *, with_label: bool = True) -> list[dict[str, Any]]:
    """The cases to test on: those under "testing" in the datalist, see :func:`training_cases`.

    Args:
        dataset_dir: folder with a `datalist.json`.
        with_label: whether a label is required; without, it comes along where there is one.
    """
    return _described(Path(dataset_dir).expanduser(), "testing", with_label=with_label)


def other_cases(dataset_dir: str | os.PathLike[str], n: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Training cases to hold a case against, drawn at random, but as many of one class as of the other.

    Otherwise what a scan adds would depend on which class happened to be drawn more often. Cases without a label are
    taken too.

    Args:
        dataset_dir: folder with a `datalist.json`.
        n: how many, if there are so many.
        seed: of the draw.
    """
    cases = training_cases(dataset_dir, with_label=False)
    drawn = [cases[i] for i in np.random.default_rng(seed).permutation(len(cases))]
    by_class = [
        [case for case in drawn if case.get("label") == label] for label in (*range(len(CLASSES)), None)
    ]
    in_turn = [case for turn in zip_longest(*by_class) for case in turn if case is not None]
    return in_turn[:n]


def _described(root: Path, section: str, *, with_label: bool) -> list[dict[str, Any]]:
    datalist = _read(root)
    names = [_name(entry, section, i) for section in SECTIONS for i, entry in enumerate(datalist[section])]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{', '.join(twice)}: more than one case in {DATALIST_FILE} has this case_id. Give every case a name of "
            "its own; a patient in training must not come back in testing."
        )
    if not datalist[section]:
        raise ValueError(f'{root / DATALIST_FILE} has no case under "{section}". Expected {LAYOUT}.')
    return [_describe(root, entry, with_label=with_label) for entry in datalist[section]]


def _read(root: Path) -> dict[str, list[Any]]:
    path = root / DATALIST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset_dir={root} holds no {DATALIST_FILE}. Write one, {LAYOUT}, as described in docs/README.md of this "
            "bundle, or leave dataset_dir out to run on the phantom."
        )
    try:
        datalist = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Expected {LAYOUT}.") from error
    sections = {name: datalist.get(name, []) for name in SECTIONS} if isinstance(datalist, dict) else {}
    if not sections or not all(isinstance(entries, list) for entries in sections.values()):
        raise ValueError(f"{path} is no list of cases for training and testing. Expected {LAYOUT}.")
    return sections


def _name(entry: Any, section: str, index: int) -> str:
    name = entry.get("case_id") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"Case {index} under {section!r} in {DATALIST_FILE} has case_id={name!r}: expected a name of letters, "
            "digits, _ and -, because files are called after it."
        )
    return name


def _require_both_classes(cases: Sequence[Mapping[str, Any]]) -> None:
    found = {case["label"] for case in cases}
    if len(found) < 2:
        raise ValueError(
            f'All {len(cases)} cases under "training" are {CLASSES[found.pop()]}. Add some of the other class to '
            f"{DATALIST_FILE}: nothing can be learned from one."
        )


def _describe(root: Path, entry: dict[str, Any], *, with_label: bool) -> dict[str, Any]:
    name = entry["case_id"]
    paths = {key: _path(root, entry, key) for key in SCANS}
    fields = {key: _field_of_view(name, key, path) for key, path in paths.items()}
    case: dict[str, Any] = {"case_id": name, **{key: str(path) for key, path in paths.items()}}
    case["center_mm"] = _center(entry, fields)
    if with_label or entry.get("label") is not None:
        case["label"] = _label(entry)
    return case


def _label(entry: dict[str, Any]) -> int:
    label = entry.get("label")
    if type(label) is not int or label not in range(len(CLASSES)):
        found = "no label" if label is None else f"label={label!r}"
        meaning = " or ".join(f"{value} ({word})" for value, word in enumerate(CLASSES))
        raise ValueError(
            f"{entry['case_id']}: has {found} in {DATALIST_FILE}, must be {meaning}. Mend it, {LEAVE_OUT}."
        )
    return label


def _path(root: Path, entry: dict[str, Any], key: str) -> Path:
    name, scan = entry["case_id"], SCANS[key]
    given = entry.get(key)
    if not isinstance(given, str) or not given:
        raise ValueError(
            f'{name}: has no {scan} ("{key}" is {given!r} in {DATALIST_FILE}). The network needs both scans of a '
            f"patient: name the file, {LEAVE_OUT}."
        )
    path = root / Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: its {scan} is missing, expected in {path}. Put the file there or mend its path, {LEAVE_OUT}."
        )
    return path


def _field_of_view(name: str, key: str, path: Path) -> NDArray[np.float64]:
    """The box of a scan in world space: (2, 3), lower and upper corner in mm. Reads the header only."""
    scan = SCANS[key]
    try:
        header = nibabel.load(path)
        shape, affine = header.shape, header.affine
    except Exception as error:
        raise ValueError(
            f"{name}: its {scan} is no readable NIfTI file: {path} ({error}). Convert or fetch it again, {LEAVE_OUT}."
        ) from error
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise ValueError(
            f"{name}: its {scan} has shape {shape}, expected three axes: {path}. Choose one volume of the series."
        )
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(
            f"{name}: the affine of its {scan} is singular, so voxels have no place in space: {path}. Convert it again "
            "from the original scan."
        )
    corners = np.array(list(product(*((-0.5, size - 0.5) for size in shape[:3]))))
    world = corners @ affine[:3, :3].T + affine[:3, 3]
    box: NDArray[np.float64] = np.stack([world.min(0), world.max(0)])
    return box


def _center(entry: dict[str, Any], fields: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float32]:
    """The middle of the crop in mm, which both scans must show."""
    name = entry["case_id"]
    lower = np.max([field[0] for field in fields.values()], axis=0)
    upper = np.min([field[1] for field in fields.values()], axis=0)
    where = " and ".join(f"{SCANS[key]} covers {_ranges(field)}" for key, field in fields.items())
    if (lower >= upper).any():
        raise ValueError(
            f"{name}: CT and PET have no place in common ({where}). Are they of one patient and one session? Register "
            f"them to one space, {LEAVE_OUT}."
        )
    given = entry.get("center_mm")
    try:
        center = fields["image"].mean(0) if given is None else np.array(given, dtype=np.float64).reshape(3)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: center_mm={given!r} in {DATALIST_FILE} must be three numbers, in mm (RAS)."
        ) from error
    if not ((center > lower) & (center < upper)).all():
        what = "the middle of its CT" if given is None else "its center_mm"
        raise ValueError(
            f"{name}: {what}, {_point(center)}, is not in both scans ({where}). Both are cropped around this point: "
            f'put a point near the lesion into {DATALIST_FILE}, "center_mm": [x, y, z] in mm (RAS).'
        )
    return center.astype(np.float32)


def _ranges(field: NDArray[np.float64]) -> str:
    parts = zip("xyz", *field.round().astype(int).tolist(), strict=True)
    return ", ".join(f"{axis} {low} to {high}" for axis, low, high in parts) + " mm"


def _point(point: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.0f}" for value in point) + ") mm"
