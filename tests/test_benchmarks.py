"""What the benchmarks found is kept, and the page of it is true to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.__main__ import BENCHMARKS
from benchmarks.results import PAGE, RESULTS, Table, as_markdown, as_page, keep


def test_the_page_says_what_was_kept() -> None:
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(kept) <= set(BENCHMARKS)
    assert as_page(kept) == PAGE.read_text(encoding="utf-8")


def test_what_a_benchmark_finds_is_kept_beside_what_others_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(results, "PAGE", tmp_path / "page.md")
    keep(
        "one", "About one.", [Table(["what", "how much"], [("this", 0.12345), ("that", None)]), "A sentence."]
    )
    keep("two_of_them", "About two.", [])
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert kept["one"]["found"][0]["rows"][0] == ["this", 0.12345]
    assert "torch" in kept["one"]["versions"]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (
        "## One\n\nAbout one.\n\n| what | how much |\n| --- | --- |\n| this | 0.123 |\n| that |  |\n" in page
    )
    assert "## Two of them" in page


def test_numbers_are_shown_with_three_digits() -> None:
    shown = as_markdown(Table(["x"], [(12345.6,), (0.000123456,), (7,), ("2e-7",)]))
    assert shown.splitlines()[2:] == ["| 12346 |", "| 0.000123 |", "| 7 |", "| 2e-7 |"]


def test_an_unknown_benchmark_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks", "windos"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PAGE.parents[1])
    assert refused.returncode == 2
    assert "no benchmark windos; there are windows, growth" in refused.stderr
