"""The second gate: is what the network uses, and the map shows, the marked finding?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from monai_xai.baselines import Auto, BaselineLike, Blur, Noise
from monai_xai.cohorts import ModalityCohort
from monai_xai.grounding.drafts import CHOICE, Cohort, Draft, cited, measured, percent, said, unavailable
from monai_xai.grounding.evidence import Evidence, Maps, mean_of_known, plain_mask
from monai_xai.grounding.words import GroundingSettings
from monai_xai.metrics.faithfulness import necessity_and_sufficiency
from monai_xai.metrics.localization import (
    average_precision,
    mean_mask_precision,
    modality_specific_importance,
    relevance_mass,
)
from monai_xai.metrics.perturbations import usual_imputer
from monai_xai.modalities import ModalityExplanation, ModalityShapley
from monai_xai.statistics import (
    NullTest,
    Numbers,
    benjamini_hochberg,
    cohort_p,
    exchange_test,
    icc21,
    interval,
    rank_sum_test,
    region_densities,
    shift_null,
    signed_rank_test,
    swap_null,
)

T7, T8 = (
    "In the finding more than at any other place",
    "In this patient's finding more than in those of others",
)
T9 = "The network uses the finding (no map needed)"
T11, T12 = "Maps of right predictions lie better", "Another scan or network tells the same story"
T13 = "The map credits the modalities that the network uses"
REGIONS = "masks of the finding: regions={case id: mask}"
OTHERS = "masks of other patients on the same grid: other_masks=[...]"


def marked(cohort: Cohort) -> list[Evidence]:
    """Return the cases with a region that are not known to be wrong."""
    return [e for e in cohort.cases if e.region is not None and e.case.correct is not False]


def judge_location(cohort: Cohort, others: Sequence[Tensor]) -> list[Draft]:
    """T7 and T8: the map inside the region against the region elsewhere, and against regions of other patients."""
    cases, settings = marked(cohort), cohort.settings
    if not cases:
        why = "No masks of the finding."
        both = (("T7", T7), ("T8", T8))
        return [unavailable(t, name, "Q2", why, supply=REGIONS, status="INCONCLUSIVE") for t, name in both]
    shifted, swapped, rows = {}, {}, []
    pool = [plain_mask(e.region, e.region[0, 0]) for e in cases if e.region is not None]
    pool += [plain_mask(mask, pool[0]) for mask in others]
    for i, e in enumerate(cases):
        values, region, body = e.located()[0, 0], pool[i], e.body[0, 0]
        shifted[e.id] = shift_null(
            values, region, body, inside=settings.inside, min_places=settings.min_places
        )
        rest = [mask for j, mask in enumerate(pool) if j != i and mask.shape == region.shape]
        swapped[e.id] = swap_null(values, region, rest, body)
        rows.append([_density(values, mask, body) for mask in pool])
    usable = [i for i, e in enumerate(cases) if not swapped[e.id].reason]
    columns = [*usable, *range(len(cases), len(pool))]
    by_shift = cohort_p(list(shifted.values()), seed=settings.seed, n_draws=settings.n_draws)
    by_exchange = exchange_test(
        np.array(rows)[np.ix_(usable, columns)], seed=settings.seed, n_draws=settings.n_draws
    )
    first = _location(
        cohort, "T7", T7, shifted, by_shift, "Share of the map in the finding", "mass accuracy of Arras et al. 2022",
        "The map lies in the finding no more than in any other place of the body.", "masks that leave room in the body",
    )  # fmt: skip
    second = _location(
        cohort, "T8", T8, swapped, by_exchange, "Density of the map in the finding, 1 is that of the body",
        "prior of location, Arun et al. 2021",
        "The map is where findings usually are, not where this one is.", OTHERS, extra=_beyond_prior(cases),
    )  # fmt: skip
    larger = max((d.test.p for d in (first, second) if not math.isnan(d.test.p)), default=math.nan)
    if not math.isnan(larger):
        first = _with_message(first, f" The larger p of both nulls is {larger:.2g}.")
    return [first, second]


def _density(values: Tensor, region: Tensor, body: Tensor) -> float:
    return float(region_densities(values, [region], body)[0]) if region.shape == values.shape else math.nan


def _with_message(draft: Draft, more: str) -> Draft:
    return Draft(draft.test, draft.found + more, draft.missed + more, draft.supply, draft.settled)


def _location(
    cohort: Cohort, name: str, title: str, tests: Mapping[str, NullTest], chance: tuple[Numbers, float], what: str,
    source: str, missed: str, supply: str, extra: str = "",
) -> Draft:  # fmt: skip
    settings = cohort.settings
    known = {case: test for case, test in tests.items() if not test.reason}
    means, p = chance
    values = {case: test.value if not test.reason else math.nan for case, test in tests.items()}
    test = measured(
        cohort, name, title, "Q2", values, p=p, null=tuple(means[:2000].tolist()), n=len(known),
        threshold=f"p < {settings.alpha:g}", origin=f"[L] {source}; null [E]",
    )  # fmt: skip
    if not known or not len(means):
        why = f"Not decided: {next(iter(tests.values())).reason or 'there are too few regions'}."
        return Draft(test, missed=why, supply=supply, settled="INCONCLUSIVE")
    corrected = benjamini_hochberg([test.p for test in known.values()])
    alone = sum(p_case < settings.alpha for p_case in corrected)
    undone = f" Not decided in {len(tests) - len(known)} cases." if len(known) < len(tests) else ""
    found = f"{what}: {test.value:.3g}, by chance {float(np.mean(means)):.3g}; beyond chance in {alone} of "
    found += f"{len(known)} cases alone (Benjamini-Hochberg).{undone}{extra}"
    return Draft(test, found, f"{missed} {found}", supply="" if len(known) > 1 else supply)


def _beyond_prior(cases: Sequence[Evidence]) -> str:
    """Say by how much the map detects the finding better than the mean mask of the other patients."""
    if len({e.body.shape for e in cases}) != 1 or len(cases) < 2:
        return ""
    regions = torch.cat([e.region for e in cases if e.region is not None])
    bodies = torch.cat([e.body for e in cases])
    own = average_precision(torch.cat([e.located() for e in cases]), regions, bodies).values
    prior = mean_mask_precision(regions, bodies).values
    gains = (own - prior).numpy()
    gains = gains[~np.isnan(gains)]
    if not len(gains):
        return ""
    low, high = interval(gains)
    between = "" if math.isnan(low) else f" ({low:.2f} to {high:.2f})"
    return f" AUPRC minus that of the mean mask: {gains.mean():+.2f}{between}."


# ---------------------------------------------------------------------------------------------- the network


def judge_necessity(cohort: Cohort, network: nn.Module) -> Draft:
    """T9: removing the finding changes the prediction more than removing as much elsewhere."""
    cases, settings = marked(cohort), cohort.settings
    if not cases:
        return unavailable("T9", T9, "Q2", "No masks of the finding.", supply=REGIONS, status="INCONCLUSIVE")
    found: dict[str, list[float]] = {e.id: [] for e in cases}
    sufficient: list[float] = []
    p_values, reasons = [], []
    usable = []
    for e in cases:
        if why := _does_not_lie(e, settings.inside):
            reasons.append(why)
        else:
            usable.append(e)
    for name in settings.imputers:
        ask = partial(_use, network=network, settings=settings, imputer=name)
        used = cohort.each(ask, f"necessity, {name}", usable)
        column = [value for value, _, _ in used.values()]
        for case, (value, sufficiency, why) in used.items():
            reasons += [why] if why else []
            found[case].append(value)
            sufficient.append(sufficiency)
        p_values.append(signed_rank_test(column))
    known = [p for p in p_values if not math.isnan(p)]
    per_case = {name: mean_of_known(values) for name, values in found.items()}
    p = max(known) if len(known) == len(p_values) else math.nan
    test = measured(
        cohort, "T9", T9, "Q2", per_case, p=p, threshold=f"p < {settings.alpha:g} under every imputer",
        origin=CHOICE,
    )  # fmt: skip
    if math.isnan(p):
        why = f"Not decided: {next(iter(reasons), 'no case has a value')}."
        return Draft(test, missed=why, supply="masks that leave room in the body", settled="INCONCLUSIVE")
    undone = sum(map(math.isnan, per_case.values()))
    facts = (
        f"Removing the finding moves the score by {test.value:.3g} more than removing the same volume elsewhere; the "
        f"finding alone gives back {_percent(mean_of_known(sufficient))} of the score. {_concordance(per_case, cases)}"
        f"{f' Not decided in {undone} of {len(cases)} cases ({reasons[0]}).' if undone else ''}"
    )
    missed = (
        "Removing the finding changes the prediction no more than removing the same volume elsewhere: the model does "
        "not use the marked finding."
    )
    return Draft(test, facts, f"{missed} {facts}")


def _use(
    e: Evidence, network: nn.Module, settings: GroundingSettings, imputer: str
) -> tuple[float, float, str]:
    """Return how necessary a region is beyond others of its size, how sufficient, and why that is undefined."""
    assert e.region is not None
    use = necessity_and_sufficiency(
        e.frozen, e.explainer.inferer, network, e.inputs, e.region, imputer=e.imputer(settings.imputers[imputer]),
        n_shifts=settings.n_region_shifts, within=e.body, call=e.explainer.call, seed=settings.seed,
    )  # fmt: skip
    value = float(use.necessity.values[0])
    if e.is_unsigned and not math.isnan(value):
        value = float(use.drop[0].abs() - use.control_drops[0].abs().nanmean())
    return value, float(use.sufficiency.values[0]), use.necessity.reasons[0]


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{share:.0%}"


def _does_not_lie(e: Evidence, inside: float) -> str:
    """Say why a region does not lie in the body; nothing if it does."""
    assert e.region is not None
    size, kept = int(e.region.sum()), int((e.region & e.body).sum())
    if not size:
        return "the region is empty"
    return "" if kept >= inside * size else f"only {kept / size:.0%} of the region lie inside the body"


def _concordance(per_case: Mapping[str, float], cases: Sequence[Evidence]) -> str:
    """Say whether maps lie in the finding where the network uses it most."""
    pairs = [(per_case[e.id], e.per_case.get("T7", math.nan)) for e in cases]
    known = np.array([pair for pair in pairs if not any(map(math.isnan, pair))])
    if len(known) < 5 or not np.ptp(known, axis=0).all():
        return ""
    rank = float(spearmanr(known[:, 0], known[:, 1]).statistic)
    return f"Over cases, share of the map and effect go together by {rank:+.2f} (rank correlation)."


# ------------------------------------------------------------------------------------------------ reported


def judge_informativeness(cohort: Cohort) -> Draft:
    """T11: whether maps of right predictions lie better in the finding; reported only."""
    groups: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for e in cohort.cases:
        if e.region is not None and e.case.correct is not None:
            groups[e.case.correct][e.id] = _mass(e, e.located())
    p = rank_sum_test(list(groups[True].values()), list(groups[False].values()))
    if math.isnan(p):
        why = "Not asked: it takes masks, and right and wrong predictions (GroundingCase(correct=...))."
        return unavailable("T11", T11, "Q2", why)
    test = measured(
        cohort, "T11", T11, "Q2", groups[True] | groups[False],
        value=mean_of_known(list(groups[True].values())) - mean_of_known(list(groups[False].values())),
        threshold=f"p < {cohort.settings.alpha:g}, reported only", origin="[L] Jin et al. 2023",
    )  # fmt: skip
    missed = f"A good-looking map does not indicate a correct prediction (p = {p:.2g})."
    passes = p < cohort.settings.alpha
    status = "PASS" if passes else "FAIL" if test.n >= cohort.settings.min_cases else "INCONCLUSIVE"
    found = (
        f"Maps of right predictions have {test.value:+.2f} more of themselves in the finding (p = {p:.2g})."
    )
    return Draft(said(test, found if passes else missed), settled=status)  # type: ignore[arg-type]


def _mass(e: Evidence, values: Tensor) -> float:
    return math.nan if e.region is None else float(relevance_mass(values, e.region, e.body).values[0])


def judge_repeatability(cohort: Cohort, again: Mapping[str, Maps]) -> Draft:
    """T12: agreement of the share of the map in the finding over scans and networks."""
    rows = {}
    for e in marked(cohort):
        row = [_mass(e, e.located())]
        if e.id in again:
            row.append(_mass(e, e.on_grid(again[e.id])))
        if e.id in cohort.second:
            row.append(_mass(e, e.on_grid(cohort.second[e.id])))
        rows[e.id] = row
    width = max(map(len, rows.values()), default=0)
    table = [row for row in rows.values() if len(row) == width and not any(map(math.isnan, row))]
    value = icc21(table) if len(table) >= 2 and width >= 2 else math.nan
    if math.isnan(value):
        why = "Not decided: it takes two cases with masks whose maps vary there."
        supply = "" if rows else REGIONS
        return unavailable("T12", T12, "Q2", why, supply=supply, status="INCONCLUSIVE")
    settings = cohort.settings
    draws = [icc21([table[i] for i in chosen]) for chosen in _resampled(len(table), settings.seed)]
    known = [draw for draw in draws if not math.isnan(draw)]
    low, high = (
        np.quantile(known, [0.025, 0.975]).tolist() if len(table) >= 5 and known else (math.nan, math.nan)
    )
    values = {name: row[0] for name, row in rows.items()}
    test = measured(
        cohort, "T12", T12, "Q2", values, value=value, interval=(low, high), n=len(table),
        threshold=f"ICC(2,1) >= {settings.agreement:g}", origin=cited("Koo & Li 2016", settings.agreement, 0.75),
    )  # fmt: skip
    enough = len(table) >= settings.min_cases
    status = ("PASS" if value >= settings.agreement else "FAIL") if enough else "INCONCLUSIVE"
    told = (
        f"Noise{' and a second network' if cohort.second else ''}: ICC = {value:.2f} over {len(table)} cases."
    )
    missed = f"{told} A re-scan or a retrained model would tell another story."
    message = told if value >= settings.agreement else missed
    return Draft(said(test, message), settled=status)  # type: ignore[arg-type]


def _resampled(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, size=(500, n))


# ---------------------------------------------------------------------------------------------- modalities


def judge_modalities(cohort: Cohort, network: nn.Module) -> Draft:
    """T13: what the map gives each modality against its Shapley value under the same baseline."""
    first = cohort.cases[0]
    if sum(x.shape[1] if x.ndim > 2 else 1 for x in first.inputs.values()) < 2:
        return unavailable("T13", T13, "Q2", "Not asked: there is one modality.")
    credited = {e.id: _credited(e) for e in cohort.cases}
    if any(value is None for value in credited.values()):
        why = "Not asked: the method gives one map for all channels."
        return unavailable("T13", T13, "Q2", why)
    found, taus, focus, residuals = ModalityCohort(cohort.settings.collapse, cohort.settings.seed), {}, [], []
    by_case = cohort.each(lambda e: _shapley(e, network, cohort.settings.seed), "modalities")
    for e in cohort.cases:
        explained = by_case[e.id]
        found.add(e.id, explained)
        name = explained.baselines[0]
        values = explained.values[name][0].double().cpu().numpy()
        taus[e.id] = _tau(np.array(credited[e.id]), values, e.is_unsigned)
        change = float((explained.score - explained.baseline_scores[name]).abs()[0])
        residuals.append(float(explained.residual(name).abs()[0]) / change if change else math.nan)
        focus.append(_focus(e, values))
    return _decide_modalities(cohort, found, taus, mean_of_known(residuals), mean_of_known(focus), credited)


def _shapley(e: Evidence, network: nn.Module, seed: int) -> ModalityExplanation:
    """Return what each modality contributes to the score of a case."""
    shapley = ModalityShapley(
        e.frozen, _baselines(e), inferer=e.explainer.inferer, channel_names=e.explainer.channel_names,
        call=e.explainer.call, embeddings=e.explainer.embeddings, progress=False, seed=seed,
    )  # fmt: skip
    explained = shapley(network, e.inputs)
    assert isinstance(explained, ModalityExplanation)
    return explained


def _baselines(e: Evidence) -> dict[str, BaselineLike]:
    """Return what the map of a case was held against, and something else."""
    given = getattr(e.explainer.attributor, "baseline", None)
    chosen = {str(candidate): candidate for candidate in given.candidates} if isinstance(given, Auto) else {}
    own = chosen.get(str(e.explanation.facts.get("baseline"))) or usual_imputer(e.explainer.attributor)
    blurs = any(isinstance(part, Blur) for part in (own.values() if isinstance(own, Mapping) else [own]))
    return {"that of the map": own, "another": Noise() if blurs else Blur()}


def _credited(e: Evidence) -> list[float] | None:
    """Return what the map gives each modality, in the order of its inputs and channels; None if it cannot tell."""
    summable = e.explainer.attributor.summable and not e.explainer.attributor.paints
    row: list[float] = []
    for name, x in e.inputs.items():
        values = e.maps[name]
        if x.ndim > 2 and values.shape[1] != x.shape[1]:
            return None
        values = values if summable else values.clamp(min=0)
        row += values[0].flatten(1).sum(1).tolist() if x.ndim > 2 else [float(values.sum())]
    return row


def _tau(credited: np.ndarray, values: np.ndarray, unsigned: bool) -> float:
    return float(kendalltau(credited, np.abs(values) if unsigned else values).statistic)


def _focus(e: Evidence, values: np.ndarray) -> float:
    """Return MSFI of the first image, where it has several channels and a region."""
    maps = e.maps[e.grid]
    if e.region is None or maps.shape[1] < 2:
        return math.nan
    before = 0
    for name, x in e.inputs.items():
        if name == e.grid:
            break
        before += x.shape[1] if x.ndim > 2 else 1
    importance = torch.from_numpy(values[before : before + maps.shape[1]])[None]
    return float(modality_specific_importance(maps, e.region, importance, e.body).values[0])


def _decide_modalities(
    cohort: Cohort, found: ModalityCohort, taus: Mapping[str, float], residual: float, focus: float,
    credited: Mapping[str, list[float] | None],
) -> Draft:  # fmt: skip
    settings, baseline = cohort.settings, found.baselines[0]
    rows = [row for row in found.rows() if row.baseline == baseline]
    collapsed = [row.modality for row in rows if row.collapsed]
    test = measured(
        cohort, "T13", T13, "Q2", taus, origin="[L] Jin et al. 2022; residual and collapse [E]",
        threshold=f"interval of tau above 0, residual <= {percent(settings.residual)}, no modality below "
        f"{percent(settings.collapse)}",
    )  # fmt: skip
    most = found.modalities[int(np.argmax(np.mean([c for c in credited.values() if c is not None], axis=0)))]
    used = max(rows, key=lambda row: row.mean).modality
    agreement = mean_of_known([float(e.agreement[0]) for e in found.cases.values()])
    facts = f"Kendall's tau of map and Shapley values {test.value:.2f}; between baselines {agreement:.2f}."
    facts += "" if math.isnan(focus) else f" MSFI {focus:.2f}."
    low = test.interval[0]
    if collapsed:
        alone = len(collapsed) == 1
        little = f"less than {percent(settings.collapse)}: the model hardly uses {'it' if alone else 'them'}"
        missed = f"{', '.join(collapsed)} {'contributes' if alone else 'contribute'} {little}. {facts}"
        return Draft(said(test, missed), settled="FAIL")
    if residual > settings.residual:
        return Draft(
            said(test, f"Shapley values miss {residual:.1%} of the change. {facts}"), settled="INCONCLUSIVE"
        )
    if math.isnan(low):
        return Draft(said(test, f"Not decided: too few cases. {facts}"), settled="INCONCLUSIVE")
    if low > 0:
        return Draft(said(test, facts), settled="PASS")
    missed = f"The map credits {most} most, the model relies on {used}. {facts}"
    enough = test.n >= settings.min_cases
    return Draft(said(test, missed), settled="FAIL" if enough else "INCONCLUSIVE")
