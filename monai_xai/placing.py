"""Words that need more than numbers on a grid, laid out on a case: before anything is scored, all of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from monai_xai.baselines import Baseline, Within
from monai_xai.features import Features, PlacedFeatures
from monai_xai.grids import Case
from monai_xai.regions import Mask
from monai_xai.spelling import Spelled

T = TypeVar("T")


def place(owner: T, case: Case) -> T:
    """Return a method, a perturbation, features or baselines with all features and baselines in it laid out on a case.

    What needs no case comes back as the object it is. A baseline that does becomes one for each input. Where features
    keep their background, the baselines beside them leave the inputs as they are there.
    """
    return _place(owner, case)


def _place(owner: Any, case: Case) -> Any:
    if isinstance(owner, Features):
        return owner.placed(case)
    if isinstance(owner, Baseline):
        return owner.placed(case)
    if isinstance(owner, Mapping) and owner and all(isinstance(part, Baseline) for part in owner.values()):
        placed = {name: _place_one(part, name, case) for name, part in owner.items()}
        return placed if any(placed[name] is not owner[name] for name in owner) else owner
    if not isinstance(owner, Spelled) or not is_dataclass(owner):
        return owner
    values = {f.name: getattr(owner, f.name) for f in fields(owner) if f.init}
    changed = {name: _place(value, case) for name, value in values.items()}
    changed = {name: value for name, value in changed.items() if value is not values[name]}
    return _keeping_background(replace(owner, **changed), case) if changed else owner


def _place_one(baseline: Baseline, name: str, case: Case) -> Baseline:
    if name not in case.inputs:
        return baseline  # refused where baselines are drawn, with all names
    placed = baseline.placed(Case({name: case.inputs[name]}, case.select))
    return placed[name] if isinstance(placed, Mapping) else placed


def _keeping_background(owner: Any, case: Case) -> Any:
    features = getattr(owner, "features", None)
    if not isinstance(features, PlacedFeatures) or not features.keeps_background:
        return owner
    field = "baseline" if hasattr(owner, "baseline") else "imputer"
    baseline = getattr(owner, field)
    own = baseline if isinstance(baseline, Mapping) else dict.fromkeys(case.inputs, baseline)
    kept = {
        name: Within(part, Mask(features.masks[name] != 0)) if name in features.masks else part
        for name, part in own.items()
    }
    return replace(owner, **{field: kept})
