"""Files of text that are written whole or not at all, and what CSV and JSON need."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV; a column that a row lacks is left empty in it."""
    rows = list(rows)
    text = StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(value: Any) -> str:
    """Return a value as JSON, see :func:`plain`."""
    return json.dumps(plain(value), indent=1)


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: NaN and infinity are None, arrays lists, and what is left is written out."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


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
