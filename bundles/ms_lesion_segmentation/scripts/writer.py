"""Saving a mask whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from monai.data import NibabelWriter


class AtomicWriter(NibabelWriter):
    """Write beside the target and move into place, so that a full disk or an interruption leaves no half of a file."""

    def write(self, filename: str | os.PathLike[str], verbose: bool = False, **options: Any) -> None:
        target = Path(filename)
        partial = target.with_name(f".partial-{os.getpid()}-{target.name}")
        try:
            super().write(partial, verbose=verbose, **options)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
