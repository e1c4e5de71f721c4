"""On which side of a test a single case lies: no verdict, only what puts the most doubtful cases first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from monai_xai.grounding import GroundingSettings, GroundingTest

# By test: whether a value is on the wrong side. Of T7, T11 and T12 a case's own value says nothing without its null.
_WRONG: dict[str, Callable[[float, GroundingSettings], bool]] = {
    "P1": lambda value, _: value < 1,
    "P2": lambda value, _: value < 1,
    "P3": lambda value, _: value < 1,
    "T1": lambda value, settings: value > settings.gap,
    "T2": lambda value, settings: value >= settings.unchanged,
    "T3": lambda value, settings: value >= settings.unchanged,
    "T4": lambda value, settings: value >= settings.same_class,
    "T5": lambda value, settings: value < settings.gain,
    "T6": lambda value, _: value <= 0,
    "T8": lambda value, _: value <= 1,
    "T9": lambda value, _: value <= 0,
    "T10": lambda value, settings: value > settings.outside,
    "T13": lambda value, _: value <= 0,
}


def settings_of(configuration: Mapping[str, Any]) -> GroundingSettings:
    """Return the thresholds that a result was made with; ours where it does not tell."""
    told = configuration.get("settings")
    known = {
        name: float(told[name])
        for name in ("gap", "unchanged", "same_class", "gain", "outside")
        if isinstance(told, Mapping) and isinstance(told.get(name), int | float)
    }
    return GroundingSettings(**known)  # type: ignore[arg-type]


def is_wrong(test: GroundingTest, case: str, settings: GroundingSettings) -> bool:
    """Whether a case by itself lies on the wrong side of a test; False where nothing can be said."""
    value = test.per_case.get(case, math.nan)
    if test.status == "NA" or not math.isfinite(value) or test.id not in _WRONG:
        return False
    return _WRONG[test.id](value, settings)
