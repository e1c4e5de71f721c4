"""The biomarker of every patient, from a table; refused by name where it is missing or no number."""

from __future__ import annotations

import csv
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Biomarker:
    """What a network that predicts a biomarker has to know of it.

    Args:
        unit: as it is written behind a value.
        center: a typical value, in this unit; what an untrained network is near to.
        spread: a typical deviation from it, in this unit.
    """

    unit: str
    center: float
    spread: float


KNOWN: Mapping[str, Biomarker] = {
    "age": Biomarker("years", 45.0, 15.0),
    "edss": Biomarker("EDSS points", 3.0, 2.0),
}


def typical(name: str) -> Biomarker:
    """Unit and typical values of the biomarker in a column; of a column that is not known, 0 ± 1 in no unit."""
    return KNOWN.get(name, Biomarker("", 0.0, 1.0))


def read_biomarker(
    table: str | os.PathLike[str], column: str, cases: Iterable[str], *, required: bool = True
) -> dict[str, float]:
    """The biomarker of these cases.

    Args:
        table: a CSV file with a column `patient_id` that counts as the names of the cases do (19 for patient19).
        column: the biomarker.
        cases: names of cases.
        required: whether every case must have a value; without, those that have none are left out.

    Returns:
        Values by name of the case.

    Raises:
        FileNotFoundError: if values are required and the table is missing.
        ValueError: if the table lacks the column, or if values are required and those of some cases are missing or
            no numbers: all of these cases are named.
    """
    path = Path(table)
    if not path.is_file():
        if not required:
            return {}
        raise FileNotFoundError(
            f"The table of the patients is missing, expected in {path}. Complete the data set (a git checkout of the "
            "file, or a new clone)."
        )
    rows = _read(path, column)
    values: dict[str, float] = {}
    problems: dict[str, str] = {}
    for case in cases:
        number = int("".join(filter(str.isdigit, case)) or -1)
        try:
            values[case] = _number(rows.get(number))
        except ValueError as error:
            problems[case] = str(error)
    if problems and required:
        raise ValueError(
            f"Column {column!r} of {path} gives no value to train or test on for "
            + ", ".join(f"{case} ({problem})" for case, problem in problems.items())
            + ". Complete the table, or leave these cases out: --exclude_cases "
            + f'"{list(problems)}".'
        )
    return values


def _read(path: Path, column: str) -> dict[int, str]:
    """What stands in the column, by the number of the patient."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        for wanted in ("patient_id", column):
            _require_column(path, columns, wanted)
        rows: dict[int, str] = {}
        for row in reader:
            number = _patient_number(path, reader.line_num, row["patient_id"])
            if number in rows:
                raise ValueError(
                    f"{path}, line {reader.line_num}: patient {number} is there twice. Remove one line."
                )
            rows[number] = (row[column] or "").strip()
    return rows


def _require_column(path: Path, columns: list[str], wanted: str) -> None:
    if wanted in columns:
        return
    by_lower_case = {name.lower(): name for name in columns}
    near = difflib.get_close_matches(wanted.lower(), by_lower_case, n=2, cutoff=0.5)
    guess = f"Did you mean {' or '.join(repr(by_lower_case[name]) for name in near)}? " if near else ""
    cure = "Rename it in the table" if wanted == "patient_id" else "Name a column of numbers with --biomarker"
    raise ValueError(
        f"{path} has no column {wanted!r}; it has {', '.join(columns) or 'none'}. {guess}{cure}."
    )


def _patient_number(path: Path, line: int, text: str | None) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(
            f"{path}, line {line}: patient_id is {text!r}, expected a whole number such as 19 for patient19. Mend the "
            "line."
        ) from None


def _number(text: str | None) -> float:
    if text is None:
        raise ValueError("not in the table")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number" if text else "empty") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not finite")
    return value
