"""The lower bounds that setup.cfg declares are the ones that `make test-oldest` installs, and all of them are met."""

from __future__ import annotations

import configparser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def _requirements(lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")]


def _declared() -> list[Requirement]:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    return _requirements(settings["options"]["install_requires"])


def test_lower_bounds_are_the_tested_ones() -> None:
    tested = _requirements((ROOT / "tests" / "constraints-oldest.txt").read_text(encoding="utf-8"))
    assert {r.name: str(r.specifier).replace(">=", "==") for r in _declared()} == {
        r.name: str(r.specifier) for r in tested
    }


@pytest.mark.parametrize("requirement", _declared(), ids=lambda requirement: requirement.name)
def test_requirement_is_met_here(requirement: Requirement) -> None:
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)
