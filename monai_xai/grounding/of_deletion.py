"""T5, of the first gate: does the score fall when what the map highlights is taken away?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import nn

from monai_xai.attributors import IntegratedGradients
from monai_xai.baselines import BaselineLike
from monai_xai.errors import AttributionError, InputError, UnsupportedNetworkError
from monai_xai.grounding.drafts import Cohort, Draft, measured, percent
from monai_xai.grounding.evidence import (
    Evidence,
    Maps,
    edges,
    intensity,
    mean_of_known,
    noise,
    shifted_maps,
)
from monai_xai.grounding.words import GroundingSettings
from monai_xai.metrics.faithfulness import deletion_curve, insertion_curve
from monai_xai.metrics.questions import explain_again
from monai_xai.statistics import interval, signed_rank_test

T5 = "Removing what is highlighted matters"
_FEWEST_FOR_BANDS = 5
_BEST = "Integrated Gradients against the imputed image"
_ROUNDING = 1e-9  # of the change of the score: less is no gain
_CURE = (
    "Imputers ask what differs from the mean of the body, or from its surroundings: a map against quite another "
    "baseline answers another question. Choose a baseline like them, or imputers like it."
)

Changes = Mapping[str, np.ndarray]
"""How far the score has fallen along the deletion curve (or risen along insertion), shape (steps,), by the order."""


@dataclass(frozen=True)
class _Followed:
    """The curves of one case under one imputer.

    Args:
        deleted: by order.
        inserted: likewise; empty if not asked for.
        whole: how far the score moves when all is imputed.
    """

    deleted: Changes
    inserted: Changes
    whole: float

    @property
    def areas(self) -> dict[str, float]:
        """Mean falls along the deletion curves."""
        return {order: float(falls.mean()) for order, falls in self.deleted.items()}


class _Gain(NamedTuple):
    """What the map, and the order to beat, take more than the map shifted, and how far the score can move."""

    own: float
    best: float
    whole: float

    @classmethod
    def of(cls, case: _Followed, alone: float) -> _Gain:
        """Where there is no order to beat, this share of the change of the score stands for its gain."""
        areas = case.areas
        shifted = areas["map shifted"]
        best = areas[_BEST] - shifted if _BEST in areas else alone * case.whole
        return cls(areas["map"] - shifted, best, case.whole)


@dataclass(frozen=True)
class _Under:
    """What became of the cases under one imputer.

    Args:
        name: of the imputer.
        gains: of every case, shape (cases, 3), see :class:`_Gain`; NaN where a score was not finite.
        least: which share of the change of the score an order must be able to gain.
    """

    name: str
    gains: np.ndarray
    least: float

    @cached_property
    def means(self) -> _Gain:
        """Over the cases of which all is known; NaN if there are none."""
        known = self.gains[~np.isnan(self.gains).any(1)]
        return _Gain(*known.mean(0)) if len(known) else _Gain(math.nan, math.nan, math.nan)

    @property
    def attainable(self) -> float:
        """The mean gain of the map, or of the order to beat if that is larger."""
        return max(self.means.own, self.means.best)

    @property
    def tells(self) -> bool:
        """Whether any order takes much more than another."""
        return self.attainable > max(self.least, _ROUNDING) * self.means.whole > 0

    @property
    def p(self) -> float:
        return signed_rank_test(self.gains[:, 0].tolist())

    @property
    def words(self) -> str:
        share = f"{self.means.own / self.attainable:.0%}" if self.tells else "nothing to tell"
        return f"{share} imputed by {self.name}"


def judge_deletion(cohort: Cohort, network: nn.Module) -> Draft:
    """T5: the map takes more from the score than copies of itself that lie elsewhere, under every imputer.

    How much more is held against what is attainable, so that evidence that is spread over much of the body, or that
    the network has more than enough of, is not taken for none. Insertion is drawn beside it, and decides nothing.
    """
    settings = cohort.settings
    followed = cohort.each(lambda e: _by_imputer(e, network, settings), "deletion")
    under, said = [], []
    for name in settings.imputers:
        found = [case[name] for case in followed.values()]
        under.append(_Under(name, _gains(found, settings), settings.attainable))
        said.append(_against_controls(name, [case.areas for case in found]))
        _draw(cohort, name, found)
    telling = [each for each in under if each.tells]
    kept, short = _kept(telling, settings.gain) if telling else (np.full((2, len(followed)), math.nan))
    test = measured(
        cohort, "T5", T5, "Q1", dict(zip(followed, kept.tolist(), strict=True)),
        p=max((each.p for each in telling), key=lambda p: math.inf if math.isnan(p) else p, default=math.nan),
        origin="[L] Samek et al. 2017; control by shifts [E]; its size, against Sundararajan et al. 2017 [E]",
        threshold=f"under every imputer that tells something: p < {settings.alpha:g} against the map shifted, and "
        f"{percent(settings.gain)} or more of what {_BEST} ({settings.gain_steps} steps) gain; where there are none, "
        f"{percent(settings.gain_alone)} of the change of the score stand for that; an imputer tells something where "
        f"some order gains {percent(settings.attainable)} of this change",
    )  # fmt: skip
    facts = (
        f"Of the gain over the map shifted that is attainable (by {_BEST}, or by itself if that is more), the map has "
        f"{', '.join(each.words for each in under)}. {' '.join(said)}"
    )
    if len(telling) < 2:
        missed = f"{facts} Where no order takes much more than another, deletion tells nothing; two imputers must tell."
        return Draft(test, missed=missed, settled="INCONCLUSIVE")
    may_fail = interval(short[~np.isnan(short)], settings.seed)[1] < 0 and test.n >= settings.min_cases
    if test.p < settings.alpha and test.value < settings.gain:
        little = f"{facts} At least {percent(settings.gain)} is asked. {_CURE}"
        return Draft(test, missed=little, settled="FAIL" if may_fail else "INCONCLUSIVE")
    missed = (
        "Removing highlighted tissue changes the prediction no more than removing a shifted copy of the map."
    )
    passed = f"Removing it takes more than removing the map shifted. {facts}"
    return Draft(test, passed, f"{missed} {facts}", may_fail=may_fail)


def _gains(found: Sequence[_Followed], settings: GroundingSettings) -> np.ndarray:
    return np.array([_Gain.of(case, settings.gain_alone) for case in found])


def _kept(telling: Sequence[_Under], asked: float) -> np.ndarray:
    """Return which share of what is attainable the map has, and by how much it beats what is asked, by case."""
    own = [each.gains[:, 0] / each.attainable for each in telling]
    over = [(each.gains[:, 0] - asked * each.gains[:, :2].max(1)) / each.attainable for each in telling]
    return np.stack([np.mean(own, axis=0), np.mean(over, axis=0)])


def _orders(e: Evidence, settings: GroundingSettings) -> list[tuple[str, Maps]]:
    """Return the map and its controls, by what they are; several of a kind are averaged."""
    orders: list[tuple[str, Maps]] = [("map", e.maps)]
    orders += [("map shifted", maps) for maps in shifted_maps(e, settings.n_shifts, settings.seed)]
    orders += [("Sobel", edges(e)), ("intensity", intensity(e))] if settings.controls else []
    return orders + [("random", noise(e, settings.seed + 1 + i)) for i in range(settings.n_orders)]


def _by_imputer(e: Evidence, network: nn.Module, settings: GroundingSettings) -> dict[str, _Followed]:
    """Return curves by the name of the imputer."""
    orders, found = _orders(e, settings), {}
    for name, given in settings.imputers.items():
        imputer = e.imputer(given)
        best = _order_to_beat(e, network, imputer, settings.gain_steps)
        asked = [*orders, (_BEST, best)] if best else orders
        deleted, whole = _follow(e, network, settings, imputer, asked)
        inserted = (
            _follow(e, network, settings, imputer, orders, inserts=True)[0] if settings.insertion else {}
        )
        found[name] = _Followed(deleted, inserted, whole)
    return found


def _order_to_beat(e: Evidence, network: nn.Module, imputer: BaselineLike, steps: int) -> Maps | None:
    """Return Integrated Gradients from the imputed image: what these removals take, found in another way.

    None where the network, or the imputer, does not allow it. Takes as many passes forth and back as it has steps.
    """
    method = IntegratedGradients(n_steps=steps, baseline=imputer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gradients that were not asked for
            found = explain_again(replace(e.explainer, attributor=method), network, e.inputs)
    except (AttributionError, InputError, UnsupportedNetworkError):
        return None
    return e.judged(found)


def _follow(
    e: Evidence,
    network: nn.Module,
    settings: GroundingSettings,
    imputer: BaselineLike,
    orders: Sequence[tuple[str, Maps]],
    *,
    inserts: bool = False,
) -> tuple[Changes, float]:
    """Return how far the score falls as features go, or rises as they come back, and how far it moves in all."""
    changes: dict[str, list[np.ndarray]] = {}
    follow = insertion_curve if inserts else deletion_curve
    for name, maps in orders:
        curve = follow(
            e.explainer, network, e.inputs, explanation=maps, features=e.blocks(settings),
            imputer=imputer, steps=settings.steps, until=e.until(settings), seed=settings.seed,
        )  # fmt: skip
        change = (curve.raw - curve.emptied[:, None] if inserts else curve.clean[:, None] - curve.raw)[0]
        change = (change.abs() if e.is_unsigned else change).double()
        changes.setdefault(name, []).append(change.cpu().numpy())
    whole = float((curve.clean.to(curve.emptied) - curve.emptied).abs()[0])
    return {name: np.mean(found, axis=0) for name, found in changes.items()}, whole


def _draw(cohort: Cohort, imputer: str, found: Sequence[_Followed]) -> None:
    """Keep the curves of the page."""
    lost = [{order: -falls for order, falls in case.deleted.items()} for case in found]
    cohort.curves |= _mean_curves(f"deletion, imputed by {imputer}", lost, cohort.settings)
    if cohort.settings.insertion:
        gained = [case.inserted for case in found]
        cohort.curves |= _mean_curves(f"insertion, imputed by {imputer}", gained, cohort.settings)


def _mean_curves(
    group: str, cases: Sequence[Changes], settings: GroundingSettings
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Return the curves of the page: means over cases, from 5 cases on with 95 % bootstrap bands."""
    x = tuple(np.linspace(0, settings.until, settings.steps).tolist())
    curves = {}
    for name in cases[0]:
        rows = np.stack([case[name] for case in cases if name in case])
        curves[f"{group}: {name}"] = {"x": x, "y": tuple(rows.mean(0).tolist()), **_band(rows, settings.seed)}
    return curves


def _band(rows: np.ndarray, seed: int) -> dict[str, tuple[float, ...]]:
    """Return the 95 % percentile bootstrap interval of a mean over cases, point by point, rows of shape (cases, S)."""
    if len(rows) < _FEWEST_FOR_BANDS:
        return {}
    chosen = np.random.default_rng(seed).integers(0, len(rows), size=(1000, len(rows)))
    low, high = np.quantile(rows[chosen].mean(1), [0.025, 0.975], axis=0)
    return {"low": tuple(low.tolist()), "high": tuple(high.tolist())}


def _against_controls(imputer: str, areas: Sequence[Mapping[str, float]]) -> str:
    """Say in how many cases the map takes more than each control."""
    controls = [name for name in next(iter(areas), {}) if name not in ("map", _BEST)]
    parts = []
    for name in controls:
        won = mean_of_known([float(found["map"] > found[name]) for found in areas])
        parts.append(f"{name} {won:.0%}")
    return f"Cases in which the map takes more, imputed by {imputer}: {', '.join(parts)}."
