"""Shortcuts: does the map, or the network, look outside of the body, or at something that gives the answer away?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from monai_xai.errors import AttributionError, EmptyRegionError, InputError
from monai_xai.forward import guard
from monai_xai.grounding.drafts import CHOICE, Cohort, Draft, measured, percent, said, unavailable
from monai_xai.grounding.evidence import Evidence, mean_of_known, plain_mask
from monai_xai.metrics.base import grown
from monai_xai.metrics.questions import ask
from monai_xai.statistics import cohort_p, holm, interval, shift_null

T10 = "No evidence outside of the body or on a confounder"


def judge_shortcuts(
    cohort: Cohort, network: nn.Module, confounders: Mapping[str, Mapping[str, Tensor]]
) -> Draft:
    """T10: how much of the map lies outside of the body, and whether it points at confounders.

    Where too much lies outside, the network is asked as well. What it says can only speak against it: a score that
    stays where it is shows no more than that the finding says the same.
    """
    settings = cohort.settings
    outside = {e.id: _outside(e) for e in cohort.cases}
    attributor = cohort.cases[0].explainer.attributor
    counts = attributor.summable or attributor.complete or hasattr(attributor, "baseline")
    on = _on_confounders(cohort, confounders)
    found = [name for name, p in on.items() if p < settings.alpha]
    share = mean_of_known(list(outside.values()))
    few = min(settings.outside_cases, settings.min_cases)
    test = measured(
        cohort, "T10", T10, "Q2", outside, origin=CHOICE,
        threshold=f"share outside <= {percent(settings.outside)} (FAIL where its interval lies above, from {few} cases "
        f"on); confounders p >= {settings.alpha:g} (the highest {percent(settings.top)} of the voxels)",
    )  # fmt: skip
    if math.isnan(share) and not on:
        full = all(reached(e).all() for e in cohort.cases)
        grid = cohort.cases[0].grid
        why = "The body fills the image" if full else f"Nothing on the grid of {grid!r} speaks for the score"
        rest = "confounders leave no other place to compare" if confounders else "there are no confounders"
        why = f"{why}, and {rest}."
        return unavailable("T10", T10, "Q2", why, supply="a mask of the body (within=...) or confounders")
    sentence = (
        "" if math.isnan(share) else f"{share:.1%} of the evidence lies outside the body{_peak(cohort)}. "
    )
    sentence = (sentence + " ".join(f"On {name}: p = {p:.2g}." for name, p in on.items())).strip()
    too_much = counts and share > settings.outside
    if too_much:
        sentence += _what_hangs_on_it(cohort, network)
    certain = not test.interval[0] <= settings.outside
    if found:
        missed = f"The map points at {', '.join(found)} beyond chance: check for a shortcut. {sentence}"
        return Draft(test, missed=missed, settled="FAIL")
    if too_much:
        status = "FAIL" if certain and test.n >= few else "INCONCLUSIVE"
        missed = f"{sentence} Check for a shortcut."
        return Draft(said(test, missed), missed=missed, settled=status)  # type: ignore[arg-type]
    if not counts and not on:
        why = f"Reported only, since gradients are not zero in air. {sentence}"
        return Draft(
            said(test, why),
            settled="NA",
            supply="masks of possible confounders: confounders={name: {id: mask}}",
        )
    return Draft(test, sentence, settled="PASS")


def _what_hangs_on_it(cohort: Cohort, network: nn.Module) -> str:
    """Say how far the score moves when what lies outside of the body is taken away, if it surely does."""
    moved = cohort.each(lambda e: _moved(e, network), "taking away what lies outside of the body")
    pairs = [(moved[e.id], abs(e.score - e.baseline_score)) for e in cohort.cases]
    known = np.array([pair for pair in pairs if all(map(math.isfinite, pair)) and pair[1]]).reshape(-1, 2)
    if not len(known):
        return ""
    lost = known[:, 1]
    low, high = interval(known[:, 0] / lost, cohort.settings.seed, weights=lost)
    if not low > cohort.settings.outside:
        return ""
    share = known[:, 0].sum() / lost.sum()
    return (
        f" The network looks there: with the outside made even, the score moves by {share:.0%} ({low:.0%} to "
        f"{high:.0%}) of what it loses at the baseline."
    )


def _moved(e: Evidence, network: nn.Module) -> float:
    """Return how far the score moves when the images are made even outside of the body; NaN where that is unknown.

    Even at the median of each channel there, which is that of the air as long as it is most of what lies outside.
    """
    air = ~e.body
    if not air.any():
        return math.nan
    try:
        with ask(e.explainer, network, e.inputs) as asked, guard("T10", asked.scoring.values):
            even = [
                _made_even(x, air)
                if x.ndim > 2 and x.shape[2:] == air.shape[2:] and name not in asked.scoring.embedded
                else x
                for name, x in asked.scoring.inputs.items()
            ]
            return float((asked.scoring.score(even) - asked.scoring.score()).abs()[0])
    except (EmptyRegionError, AttributionError):
        return math.nan


def _made_even(x: Tensor, where: Tensor) -> Tensor:
    """Return an image with the median of each channel there, shape (N, C, *spatial), where (1, 1, *spatial)."""
    where = where.to(x.device)
    medians = x[..., where[0, 0]].median(-1).values
    return torch.where(where, medians[(..., *[None] * (x.ndim - 2))], x)


def _outside(e: Evidence) -> float:
    values, near = e.located().clamp(min=0), reached(e)
    total = float(values.sum())
    return float(values[~near].sum()) / total if total and not near.all() else math.nan


def reached(e: Evidence) -> Tensor:
    """Return the body with all voxels that share a feature or window with it: a painted map is no finer than these."""
    attributor, body = e.explainer.attributor, e.body
    window = getattr(attributor, "window", None)
    if isinstance(window, Sequence) and window and isinstance(window[0], Sequence):  # one for each input
        window = window[list(e.inputs).index(e.grid)]
    if isinstance(window, Sequence) and len(window) == body.ndim - 1:
        body = grown(body, [int(size) - 1 for size in window[1:]])
    features = e.explanation.features  # as they lie on this case
    if attributor.paints and features is not None:
        numbers = features.mask(e.inputs[e.grid], e.grid).cpu().expand(1, -1, *body.shape[2:])
        body = torch.isin(numbers, numbers[body.expand_as(numbers)].unique()).any(1, keepdim=True)
    return body


def _peak(cohort: Cohort) -> str:
    """Say where the evidence outside of the body is highest, on average."""
    parts = [(e.located().clamp(min=0) * ~reached(e))[0, 0] for e in cohort.cases]
    if len({part.shape for part in parts}) != 1 or not any(part.any() for part in parts):
        return ""
    total = torch.stack([part / part.sum().clamp(min=1e-300) for part in parts]).mean(0)
    place = np.unravel_index(int(total.argmax()), total.shape)
    return f", most of it around voxel {tuple(int(i) for i in place)}"


def _on_confounders(cohort: Cohort, confounders: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Return for each confounder the p-value of the highest voxels covering it more than any other place.

    A confounder in the body is held against places in the body: in the air, where maps hold nothing, anything wins.
    """
    found = {}
    for name, masks in confounders.items():
        tests = []
        for e in cohort.cases:
            if e.id not in masks:
                continue
            values = e.located()[0, 0]
            mask = plain_mask(masks[e.id], values)
            if mask.shape != values.shape:
                raise InputError(
                    f"Case {e.id}: the mask of {name!r} has shape {tuple(mask.shape)}, the image {tuple(values.shape)}."
                )
            body, share = e.body[0, 0], cohort.settings.inside
            is_inside = int((mask & body).sum()) >= share * int(mask.sum())
            among = body if is_inside else torch.ones_like(body)
            lowest = values[among].topk(max(1, round(cohort.settings.top * int(among.sum())))).values[-1]
            top = ((values >= lowest) & (values > 0) & among).double()
            tests.append(shift_null(top, mask, among, inside=share, min_places=cohort.settings.min_places))
        found[name] = cohort_p(tests, seed=cohort.settings.seed, n_draws=cohort.settings.n_draws)[1]
    known = {name: p for name, p in found.items() if not math.isnan(p)}
    return dict(zip(known, holm(list(known.values())), strict=True))
