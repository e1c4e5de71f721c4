"""Reads the table of a data set, splits it by patient, and refuses broken rows before any hour is spent on them."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .phantom import IMAGE_FOLDER, TABLE_FILE, TRUTH_FILE
from .schema import ClinicalSchema, suggest

CLASSES = ("no pneumonia", "pneumonia")
HELD_OUT_EVERY = 5
SHOWN = 5  # of the problems of one kind
LEAVE_OUT = "or leave the case out with --exclude_cases"


def is_phantom(dataset_dir: str | os.PathLike[str]) -> bool:
    """Whether the folder holds phantoms, and not real radiographs."""
    return (Path(dataset_dir).expanduser() / TRUTH_FILE).is_file()


def training_cases(
    dataset_dir: str | os.PathLike[str],
    schema: ClinicalSchema,
    test: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    with_label: bool = True,
) -> list[dict[str, Any]]:
    """The cases to train on: all films of all patients that are not held out.

    Args:
        dataset_dir: folder with `metadata.csv` and `images/`.
        schema: what the columns of the table mean.
        test: patients that are held out; None for every fifth one, in the order of their names.
        exclude: names of cases that are not used at all.
        with_label: whether labels are required, of both classes; without, they come along where there are some.

    Returns:
        One dictionary per film: `case_id` (its file name without the ending), `image` (the file), `clinical` (a
        vector), `label` (0 or 1).

    Raises:
        FileNotFoundError: if the table or an image is not there.
        ValueError: if the table lacks a column; if rows do not fit the schema, have no label, or have the name of
            another; if an image is unreadable; if a name is unknown; or if nothing or one class only is left.
    """
    rows = _checked_rows(Path(dataset_dir).expanduser(), schema, exclude)
    held_out = _held_out_patients(rows, test)
    kept = [row for row in rows if row.patient not in held_out]
    if with_label:
        _require_labels(kept, schema)
        _require_both_classes(kept, dataset_dir)
    return [row.case() for row in kept]


def held_out_cases(
    dataset_dir: str | os.PathLike[str],
    schema: ClinicalSchema,
    test: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    with_label: bool = True,
) -> list[dict[str, Any]]:
    """The cases to test on: all films of the patients that are held out, see :func:`training_cases`.

    Args:
        dataset_dir: folder with `metadata.csv` and `images/`.
        schema: what the columns of the table mean.
        test: patients that are held out; None for every fifth one.
        exclude: names of cases that are not used at all.
        with_label: whether a label is required; without, it comes along where there is one.
    """
    rows = _checked_rows(Path(dataset_dir).expanduser(), schema, exclude)
    held_out = _held_out_patients(rows, test)
    kept = [row for row in rows if row.patient in held_out]
    if with_label:
        _require_labels(kept, schema)
    return [row.case() for row in kept]


@dataclass(frozen=True)
class _Row:
    """One line of the table. `facts` are its cells by column; the rest is what was made of them."""

    line: int
    facts: Mapping[str, str]
    name: str
    patient: str
    image: Path
    label: int | None = None
    clinical: Any = None

    def __str__(self) -> str:
        return f"line {self.line} ({self.name})"

    def case(self) -> dict[str, Any]:
        case = {"case_id": self.name, "image": str(self.image), "clinical": self.clinical}
        return case if self.label is None else {**case, "label": self.label}


def _checked_rows(root: Path, schema: ClinicalSchema, exclude: str | Sequence[str] | None) -> list[_Row]:
    path = root / TABLE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset_dir={root} holds no {TABLE_FILE}. Put one there, a row per image, with the images in "
            f"{IMAGE_FOLDER}/, as described in docs/README.md of this bundle, or leave dataset_dir out to run on the "
            "phantom."
        )
    rows = _without(list(_read(path, schema)), exclude)
    if not rows:
        raise ValueError(f"{path} has no row to use. Mend it, or loosen `only` in {schema.file}.")
    _refuse(path, _each(rows, _name_problem))
    _refuse(path, _twins(rows))
    _refuse(path, _each(rows, lambda row: _unit_problem(row, schema)))
    encoded: list[_Row] = []
    _refuse(path, _each(rows, lambda row: encoded.append(_encode(row, schema))))
    _refuse(path, _each(rows, _missing_file), FileNotFoundError)
    _refuse(path, _each(rows, _unreadable_file))
    return encoded


def _read(path: Path, schema: ClinicalSchema) -> Iterator[_Row]:
    """The rows that the schema uses."""
    layout = schema.table
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", restkey="")
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _require_columns(path, reader.fieldnames, schema)
            for cells in reader:
                if isinstance(cells.get(""), list) and any(cells[""]):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: has more cells than the table has columns. Put cells that "
                        "contain a comma into double quotes."
                    )
                facts = {name: cell.strip() for name, cell in cells.items() if name}
                if layout.uses(facts):
                    image = path.parent / IMAGE_FOLDER / facts[layout.image]
                    yield _Row(reader.line_num, facts, image.stem, facts[layout.patient], image)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}). Save it again as CSV in UTF-8.") from error


def _require_columns(path: Path, found: Sequence[str], schema: ClinicalSchema) -> None:
    layout = schema.table
    wanted = {
        layout.image: "`table: image`",
        layout.patient: "`table: patient`",
        layout.label: "`table: label`",
    }
    wanted |= {column: f"`table: only: {column}`" for column in layout.only}
    wanted |= {
        variable.column: f"`column` of the variable {variable.name!r}" for variable in schema.variables
    }
    missing = [
        f"{column!r}{suggest(column, found)}, set by {where}"
        for column, where in wanted.items()
        if column not in found
    ]
    if missing:
        raise ValueError(
            f"{path} has no column {'; nor '.join(missing)}. It has {', '.join(filter(None, found)) or 'none'}. Rename "
            f"the column, or change the schema, {schema.file}. A variable that was never recorded has to be taken out "
            "of the schema, and the network trained again."
        )


def _without(rows: list[_Row], exclude: str | Sequence[str] | None) -> list[_Row]:
    excluded = _names(exclude) or []
    unknown = [name for name in excluded if name not in {row.name for row in rows}]
    if unknown:
        known = suggest(unknown[0], [row.name for row in rows])
        raise ValueError(f"exclude_cases: there is no case {', '.join(unknown)}{known}.")
    return [row for row in rows if row.name not in excluded]


def _names(given: str | int | Sequence[str | int] | None) -> list[str] | None:
    if given is None:
        return None
    return [str(name) for name in ([given] if isinstance(given, str | int) else given)]


def _held_out_patients(rows: Sequence[_Row], test: str | Sequence[str] | None) -> set[str]:
    patients = sorted({row.patient for row in rows})
    chosen = _names(test)
    if chosen is None:
        return set(patients[::HELD_OUT_EVERY])
    unknown = [name for name in chosen if name not in patients]
    if unknown or not chosen:
        what = (
            f"there is no patient {', '.join(unknown)}{suggest(unknown[0], patients)}"
            if unknown
            else "names no patient"
        )
        raise ValueError(
            f"test_patients: {what}. Name some of the column of patients, or none for every fifth one."
        )
    return set(chosen)


def _each(rows: Sequence[_Row], check: Callable[[_Row], str | None]) -> list[str]:
    """What a check finds wrong, row by row: what it returns, or raises as a ValueError."""
    problems = []
    for row in rows:
        try:
            problem = check(row)
        except ValueError as error:
            problem = str(error)
        if problem:
            problems.append(f"{row}: {problem}")
    return problems


def _refuse(path: Path, problems: Sequence[str], error: type[Exception] = ValueError) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more rows like these."] if len(problems) > SHOWN else []
        raise error("\n  ".join([f"{path}:", *problems[:SHOWN], *more]))


def _name_problem(row: _Row) -> str | None:
    if not row.image.suffix:
        return "has no file name with an ending, such as film.png. Name its image."
    return (
        None
        if row.patient
        else "has no patient. Fill it in: films of one patient must not be on both sides of the split."
    )


def _twins(rows: Sequence[_Row]) -> list[str]:
    """Rows that have the name of an earlier one."""
    first: dict[str, _Row] = {}
    problems = []
    for row in rows:
        earlier = first.setdefault(row.name, row)
        if earlier is not row:
            problems.append(
                f"{row}: line {earlier.line} has this name already. Keep one row per image, and give files names that "
                "differ in more than their ending."
            )
    return problems


def _unit_problem(row: _Row, schema: ClinicalSchema) -> str | None:
    for variable in schema.variables:
        for column in dict.fromkeys((f"{variable.column}_unit", f"{variable.name}_unit")):
            unit = row.facts.get(column, "")
            if unit and unit != variable.unit:
                return (
                    f"column {column!r}: {variable.column!r} is in {unit!r}, the schema says {variable.unit!r}. "
                    "Convert the values and their unit, or change unit, center, scale and ranges in the "
                    "schema and train again."
                )
    return None


def _encode(row: _Row, schema: ClinicalSchema) -> _Row:
    try:
        label = schema.table.read_label(row.facts[schema.table.label])
    except ValueError as error:
        raise ValueError(f"column {schema.table.label!r}: {error}") from error
    return _Row(row.line, row.facts, row.name, row.patient, row.image, label, schema.encode(row.facts))


def _require_labels(rows: Sequence[_Row], schema: ClinicalSchema) -> None:
    missing = [str(row) for row in rows if row.label is None]
    if missing:
        raise ValueError(
            f"{TABLE_FILE}, column {schema.table.label!r}: has no label in {', '.join(missing[:SHOWN])}"
            f"{f' and {len(missing) - SHOWN} more rows' if len(missing) > SHOWN else ''}. Fill it in, {LEAVE_OUT}; "
            "only configs/inference.yaml does without."
        )


def _require_both_classes(rows: Sequence[_Row], dataset_dir: str | os.PathLike[str]) -> None:
    found = {row.label for row in rows}
    if len(found) < 2:
        only = f", all of them {CLASSES[int(found.pop() or 0)]}" if found else ""
        raise ValueError(
            f"{len(rows)} cases of {dataset_dir} are left to train on{only}: nothing can be learned from them. Hold "
            "out fewer with --test_patients, or add cases."
        )


def _missing_file(row: _Row) -> str | None:
    return (
        None
        if row.image.is_file()
        else f"there is no image {row.image}. Put it there, correct its name, {LEAVE_OUT}."
    )


def _unreadable_file(row: _Row) -> str | None:
    """Looks at the header only."""
    try:
        with Image.open(row.image):
            return None
    except OSError as error:
        return f"{row.image} is no readable image ({error}). Fetch or convert it again (PNG or JPEG), {LEAVE_OUT}."
