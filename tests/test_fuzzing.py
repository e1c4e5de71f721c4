"""Broken and hostile inputs end in a right result or in an error that says what is wrong, as a short benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fuzzing import SCANS, fuzz

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_broken_input_is_explained_rightly_or_refused_by_name(tmp_path: Path) -> None:
    found = fuzz(tmp_path, rounds=2, seed=7)
    wrong = [outcome for outcome in found if outcome.verdict not in ("right", "named")]
    assert not wrong, "\n".join(map(str, wrong))
    assert {outcome.kind for outcome in found} == {*SCANS, "names", "settings", "manifest"}
    assert {outcome.verdict for outcome in found} == {"right", "named"}
