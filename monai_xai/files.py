"""Files that are written whole or not at all, with checksums, and what CSV and JSON need."""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


_PARTIAL = ".partial-"


def write_whole(path: Path, text: str) -> None:
    """Write a whole file of UTF-8 or leave the old one; what is no text is escaped.

    Raises:
        OSError: if it cannot be written.
    """
    with writing_whole(path) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


@contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` to write to, and move it there once it is on the disk.

    What a killed process has left of the same file is removed.

    Raises:
        OSError: if it cannot be written; the old file is left as it was.
    """
    _remove_left(path)
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> int:
    """Remove what killed processes have left in a folder and all below, and return how many files it was."""
    found = [path for path in folder.rglob(f"{_PARTIAL}*") if path.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def keyed_hash(data: bytes, salt: str) -> str:
    """Return the HMAC-SHA256 of data in hexadecimal: who does not know the salt can try out nothing."""
    return hmac.new(salt.encode("utf-8", "surrogatepass"), data, hashlib.sha256).hexdigest()


def _remove_left(path: Path) -> None:
    """Remove temporary files of one target whose process is gone."""
    for file in path.parent.glob(f"{_PARTIAL}*"):
        pid, _, name = file.name.removeprefix(_PARTIAL).partition("-")
        if name == path.name and pid.isdigit() and not _is_alive(int(pid)):
            file.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine is alive; where that cannot be asked without harm, it counts as alive."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # alive, and of somebody else
        return True
    return True
