"""Shortcuts: does the map, or the network, look outside of the body, or at something that gives the answer away?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from monai_xai.baselines import Blur
from monai_xai.errors import AttributionError, InputError
from monai_xai.grounding.drafts import CHOICE, Cohort, Draft, measured, said, unavailable
from monai_xai.grounding.evidence import Evidence, mean_of_known, plain_mask, signed_maps
from monai_xai.grounding.words import GroundingTest, Status
from monai_xai.metrics.base import grown
from monai_xai.metrics.questions import ask
from monai_xai.statistics import cohort_p, holm, interval, shift_null

T10 = "No evidence outside of the body or on a confounder"
_TOP = 0.1  # of the voxels, held against confounders
_EXCHANGES = 4  # other cases, whose outside takes the place of that of a case


def judge_shortcuts(
    cohort: Cohort, network: nn.Module, confounders: Mapping[str, Mapping[str, Tensor]]
) -> Draft:
    """T10: how much of the map lies outside of the body, and whether it points at confounders.

    Where too much lies outside, the network is asked whether it looks there.
    """
    settings = cohort.settings
    evidence = {e.id: _evidence(e) for e in cohort.cases}
    attributor = cohort.cases[0].explainer.attributor
    counts = attributor.summable or attributor.complete or hasattr(attributor, "baseline")
    on = _on_confounders(cohort, confounders)
    found = [name for name, p in on.items() if p < settings.alpha]
    shares = {name: there / all_ if all_ else math.nan for name, (there, all_) in evidence.items()}
    share, within = _pooled(list(evidence.values()), settings.seed)
    test = measured(
        cohort, "T10", T10, "Q2", shares, value=share, interval=within, threshold=f"share outside <= "
        f"{settings.outside:g}, or what lies there moves the score by no more; confounders p >= {settings.alpha:g}",
        origin=CHOICE,
    )  # fmt: skip
    if math.isnan(share) and not on:
        why = "The body fills the image, and no confounders were given."
        return unavailable("T10", T10, "Q2", why, supply="a mask of the body (within=...) or confounders")
    sentence = (
        "" if math.isnan(share) else f"{share:.1%} of the evidence lies outside the body{_peak(cohort)}. "
    )
    sentence = (sentence + " ".join(f"On {name}: p = {p:.2g}." for name, p in on.items())).strip()
    if found:
        missed = f"The map points at {', '.join(found)} beyond chance: check for a shortcut. {sentence}"
        return Draft(test, missed=missed, settled="FAIL")
    if counts and share > settings.outside:
        return _weigh_outside(cohort, network, test, sentence)
    if not counts and not on:
        why = f"Reported only, since gradients are not zero in air. {sentence}"
        return Draft(
            said(test, why),
            settled="NA",
            supply="masks of possible confounders: confounders={name: {id: mask}}",
        )
    return Draft(test, sentence, settled="PASS")


# --------------------------------------------------------------------------------------------- the network


def _weigh_outside(cohort: Cohort, network: nn.Module, test: GroundingTest, sentence: str) -> Draft:
    """Return T10 of a map that has too much outside of the body: the network looks there, or the map overstates it."""
    settings = cohort.settings
    neighbors = {e.id: _neighbors(cohort.cases, number) for number, e in enumerate(cohort.cases)}
    moved = cohort.each(lambda e: _moved(e, network, neighbors[e.id]), "what lies outside of the body")
    lost = mean_of_known([abs(e.score - e.baseline_score) for e in cohort.cases])
    shares = np.array([value / lost for value in moved.values() if lost and not math.isnan(value)])
    low, high = interval(shares, settings.seed)
    if len(shares):
        sentence += f" What lies there, when changed, moves the score by {shares.mean():.1%}"
        sentence += "" if math.isnan(low) else f" ({low:.1%} to {high:.1%})"
        sentence += " of what it loses at the baseline."
    certain = not test.interval[0] <= settings.outside
    if not high <= settings.outside:
        status: Status = "FAIL" if certain and test.n >= min(5, settings.min_cases) else "INCONCLUSIVE"
        advice = "Check for a shortcut."
    elif (net := _net(cohort.cases)) <= settings.outside:
        status = "PASS"
        advice = f"The network hardly looks there, and what speaks for and against the score there leaves {net:.1%}."
    else:
        status = "INCONCLUSIVE" if certain else "PASS"
        advice = "The network hardly looks there: the map overstates it."
    return Draft(said(test, f"{sentence} {advice}"), settled=status)


def _neighbors(cases: Sequence[Evidence], number: int) -> list[Evidence]:
    """Return the next cases with images of the same shapes."""

    def shapes(e: Evidence) -> list[torch.Size]:
        return [x.shape for x in e.inputs.values()]

    following = [cases[(number + step) % len(cases)] for step in range(1, len(cases))]
    return [e for e in following if shapes(e) == shapes(cases[number])][:_EXCHANGES]


def _moved(e: Evidence, network: nn.Module, neighbors: Sequence[Evidence]) -> float:
    """Return how far the score moves when what lies outside of the body is changed, which needs no map.

    It is made even, as most of it is, which takes away what lies in one place: beside the body as it is, and beside a
    blurred one, since a finding may outvote a shortcut that says the same. And it is exchanged for that of other cases,
    which also changes what it is like as a whole. The largest of the three counts; NaN where a score cannot be had.
    """
    air = ~e.body
    if not air.any():
        return math.nan
    try:
        with ask(e.explainer, network, e.inputs) as asked:
            inputs = dict(asked.scoring.inputs)
            own = {name: x for name, x in inputs.items() if x.ndim > 2 and x.shape[2:] == air.shape[2:]}

            def score(images: Mapping[str, Tensor]) -> float:
                return float(asked.scoring.score(tuple({**inputs, **images}.values()))[0])

            even = {name: _median(x, air) for name, x in own.items()}
            blurred = _put(own, {name: Blur().draws(x)[0] for name, x in own.items()}, e.body)
            clean = score(own)
            moves = [
                score(_put(own, even, air)) - clean,
                score(_put(blurred, even, air)) - score(blurred),
            ]
            exchanged = [score(_put(own, other.inputs, air & ~other.body)) - clean for other in neighbors]
    except AttributionError:
        return math.nan
    return max(*map(abs, moves), float(np.mean(np.abs(exchanged or [0.0]))))


def _put(images: Mapping[str, Tensor], given: Mapping[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """Return images with other values there."""
    return {name: torch.where(where.to(x.device), given[name].to(x), x) for name, x in images.items()}


def _median(x: Tensor, where: Tensor) -> Tensor:
    """Return the median of each channel there, which few voxels do not move, as an image."""
    medians = x[..., where[0, 0].to(x.device)].median(-1).values
    return medians[(..., *[None] * (x.ndim - 2))].expand_as(x)


# ------------------------------------------------------------------------------------------------- the map


def _evidence(e: Evidence) -> tuple[float, float]:
    """Return how much speaks for the score outside of the body, and in all; nothing where there is no outside."""
    values, near = e.located().clamp(min=0), reached(e)
    return (0.0, 0.0) if near.all() else (float(values[~near].sum()), float(values.sum()))


def _pooled(evidence: Sequence[tuple[float, float]], seed: int) -> tuple[float, tuple[float, float]]:
    """Return the share of all evidence that lies outside, and its interval: a case with little says little."""
    there, total = np.array([pair for pair in evidence if pair[1]]).reshape(-1, 2).T
    if not len(total):
        return math.nan, (math.nan, math.nan)
    return float(there.sum() / total.sum()), interval(there / total, seed, weights=total)


def _net(cases: Sequence[Evidence]) -> float:
    """Return how much the map leaves outside of the body, as a share of all, where it cancels out in a case."""
    signed = [(e.on_grid(signed_maps(e.explanation)), ~reached(e)) for e in cases]
    there = sum(abs(float(values[air].sum())) for values, air in signed)
    total = sum(abs(float(values.sum())) for values, _ in signed)
    return there / total if total else math.inf


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
