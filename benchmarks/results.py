"""What benchmarks find: kept as JSON, with the machine and the versions it was found on, and written as a page."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from monai_xai.files import as_json, write_whole

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

_PACKAGES = ("torch", "monai", "captum", "numpy")
_HEAD = """\
# Benchmarks

Written by `python -m benchmarks` (all of them), or `python -m benchmarks windows regions` (some), from
`benchmarks/results.json`. Ratios are of runs side by side; seconds differ from machine to machine and from day to day.
"""

Cell = float | int | str | None


class Table(NamedTuple):
    """Figures in rows.

    Args:
        columns: their names, with units.
        rows: None where there is nothing to say.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


Block = Table | str
"""A table, or a sentence."""


def keep(name: str, about: str, blocks: Iterable[Block]) -> None:
    """Keep what a benchmark found, and write the page anew.

    Args:
        name: of the benchmark.
        about: what was measured, in a sentence.
        blocks: what came out.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = [block._asdict() if isinstance(block, Table) else block for block in blocks]
    results[name] = {"about": about, "date": str(date.today()), **_here(), "found": found}
    kept = as_json(results)
    write_whole(RESULTS, kept)
    write_whole(PAGE, as_page(json.loads(kept)))


def as_page(results: Mapping[str, Any]) -> str:
    """Return the page of all results, in Markdown."""
    parts = [_HEAD]
    for name, result in results.items():
        versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
        parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n{result['about']}\n")
        parts += [
            as_markdown(block if isinstance(block, str) else Table(**block)) for block in result["found"]
        ]
        parts.append(f"*{result['date']}, {result['machine']}, {versions}*\n")
    return "\n".join(parts)


def as_markdown(block: Block) -> str:
    """Return a table or a sentence in Markdown."""
    if isinstance(block, str):
        return block + "\n"
    lines = [
        block.columns,
        ["---"] * len(block.columns),
        *([_shown(cell) for cell in row] for row in block.rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"


def _here() -> dict[str, Any]:
    """Return the machine and the versions that figures depend on."""
    with Path("/proc/cpuinfo").open() as file:
        cpu = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine()
        )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    threads = os.environ.get("OMP_NUM_THREADS")
    machine = f"{cpu}, {os.cpu_count()} cores{f' ({threads} thread)' if threads else ''}, {gib:.0f} GiB"
    return {
        "machine": machine,
        "versions": {"Python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
    }
