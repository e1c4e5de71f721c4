"""Shortcuts: does the map, or the network, look outside of the body, or at something that gives the answer away?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from monai_xai.errors import AttributionError, InputError
from monai_xai.forward import guard
from monai_xai.grounding.drafts import CHOICE, Cohort, Draft, measured, said, unavailable
from monai_xai.grounding.evidence import Evidence, mean_of_known, plain_mask
from monai_xai.metrics.base import grown
from monai_xai.metrics.questions import ask
from monai_xai.statistics import cohort_p, holm, interval, shift_null

T10 = "No evidence outside of the body or on a confounder"
_TOP = 0.1  # of the voxels, held against confounders


def judge_shortcuts(
    cohort: Cohort, network: nn.Module, confounders: Mapping[str, Mapping[str, Tensor]]
) -> Draft:
    """T10: how much of the map lies outside of the body, and whether it points at confounders.

    A network sees the edge of the body from both sides. Where all that is too much lies along it, and the score does
    not hang on what lies outside, it is the body's.
    """
    settings = cohort.settings
    outside = {e.id: _share_beyond(e, 0) for e in cohort.cases}
    attributor = cohort.cases[0].explainer.attributor
    counts = attributor.summable or attributor.complete or hasattr(attributor, "baseline")
    on = _on_confounders(cohort, confounders)
    found = [name for name, p in on.items() if p < settings.alpha]
    share = mean_of_known(list(outside.values()))
    rule = (
        f"share outside <= {settings.outside:g}, or so beyond {settings.rim} voxels where the score does not hang on "
        f"it; confounders p >= {settings.alpha:g}"
    )
    test = measured(cohort, "T10", T10, "Q2", outside, threshold=rule, origin=CHOICE)
    if math.isnan(share) and not on:
        why = "The body fills the image, and no confounders were given."
        return unavailable("T10", T10, "Q2", why, supply="a mask of the body (within=...) or confounders")
    sentence = (
        "" if math.isnan(share) else f"{share:.1%} of the evidence lies outside the body{_peak(cohort)}. "
    )
    sentence = (sentence + " ".join(f"On {name}: p = {p:.2g}." for name, p in on.items())).strip()
    too_much = counts and share > settings.outside
    along_the_edge = False
    if too_much:
        along_the_edge, more = _along_the_edge(cohort, network)
        sentence = f"{sentence} {more}".strip()
    if found:
        missed = f"The map points at {', '.join(found)} beyond chance: check for a shortcut. {sentence}"
        return Draft(test, missed=missed, settled="FAIL")
    if too_much and not along_the_edge:
        certain = not test.interval[0] <= settings.outside
        status = "FAIL" if certain and test.n >= min(5, settings.min_cases) else "INCONCLUSIVE"
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


def _along_the_edge(cohort: Cohort, network: nn.Module) -> tuple[bool, str]:
    """Tell whether what lies outside of the body is seen of its edge alone, and say what was found.

    Both is needed: that hardly anything lies farther out, and that the score stays where it is when what lies outside
    is taken away, which needs no map. A cap around a head, say, is on its edge as well, but moves the score.
    """
    settings = cohort.settings
    farther = mean_of_known([_share_beyond(e, settings.rim) for e in cohort.cases])
    moved = cohort.each(lambda e: _moved(e, network), "taking away what lies outside of the body")
    pairs = [(moved[e.id], abs(e.score - e.baseline_score)) for e in cohort.cases]
    known = np.array([pair for pair in pairs if all(map(math.isfinite, pair)) and pair[1]]).reshape(-1, 2)
    told = "" if math.isnan(farther) else f"{farther:.1%} lies more than {settings.rim} voxels from it."
    if not len(known):
        return False, told
    lost = known[:, 1]
    low, high = interval(known[:, 0] / lost, settings.seed, weights=lost)
    within = "" if math.isnan(low) else f" ({low:.1%} to {high:.1%})"
    share = known[:, 0].sum() / lost.sum()
    told += (
        f" Taken away, what lies outside moves the score by {share:.1%}{within} of what the baseline does."
    )
    return farther <= settings.outside and high <= settings.outside, told


def _moved(e: Evidence, network: nn.Module) -> float:
    """Return how far the score moves when the images are made even outside of the body; NaN where that is unknown.

    Even at the median of each channel there, which what lies in one place does not move.
    """
    air = ~e.body
    if not air.any():
        return math.nan
    try:
        with ask(e.explainer, network, e.inputs) as asked, guard("T10", asked.scoring.values):
            values = asked.scoring.values
            on_grid = [x.ndim > 2 and x.shape[2:] == air.shape[2:] for x in values]
            even = [_made_even(x, air) if here else x for x, here in zip(values, on_grid, strict=True)]
            return float((asked.scoring.score(even) - asked.scoring.score()).abs()[0])
    except AttributionError:
        return math.nan


def _made_even(x: Tensor, where: Tensor) -> Tensor:
    """Return an image with the median of each channel there, shape (N, C, *spatial), where (1, 1, *spatial)."""
    where = where.to(x.device)
    medians = x[..., where[0, 0]].median(-1).values
    return torch.where(where, medians[(..., *[None] * (x.ndim - 2))], x)


def _share_beyond(e: Evidence, rim: int) -> float:
    """Return the share of the evidence that lies farther from the body than so many voxels; NaN if no voxel does."""
    values, near = e.located().clamp(min=0), reached(e)
    near = grown(near, [rim] * (near.ndim - 2))
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
            lowest = values[among].topk(max(1, round(_TOP * int(among.sum())))).values[-1]
            top = ((values >= lowest) & (values > 0) & among).double()
            tests.append(shift_null(top, mask, among, inside=share, min_places=cohort.settings.min_places))
        found[name] = cohort_p(tests, seed=cohort.settings.seed, n_draws=cohort.settings.n_draws)[1]
    known = {name: p for name, p in found.items() if not math.isnan(p)}
    return dict(zip(known, holm(list(known.values())), strict=True))
