"""Files of text that are written whole or not at all, and what CSV and JSON need."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV; a column that a row lacks is left empty in it."""
    rows = list(rows)
    text = StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def without_nan(value: Any) -> Any:
    """Return a value in which NaN, which JSON does not know, is None."""
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Write a whole file or leave the old one.

    Raises:
        OSError: if it cannot be written.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
