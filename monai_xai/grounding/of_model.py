"""Preconditions, and the first gate: does the map describe this model?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from monai_xai.grounding.drafts import CHOICE, Cohort, Draft, cited, measured, percent, unavailable
from monai_xai.grounding.evidence import (
    Evidence,
    Maps,
    alike,
    between_patients,
    map_again,
    mean_of_known,
    noised,
    shifted_maps,
)
from monai_xai.grounding.words import GroundingSettings
from monai_xai.metrics.faithfulness import fidelity
from monai_xai.metrics.perturbations import RandomRemoval, usual_imputer
from monai_xai.metrics.randomization import cascading_randomization, random_logit, randomize
from monai_xai.statistics import signed_rank_test

P1, P2, P3 = "A map there is", "A prediction to explain", "Random weights change the prediction"
T1, T2 = "Contributions add up", "The map changes with random weights, and not with another training"
T3, T4 = "The map changes with permuted labels", "Another class has another map"
T6 = "The map predicts effects and survives another acquisition"


def judge_preconditions(cohort: Cohort) -> list[Draft]:
    """P1 and P2; cases that do not meet them are left out of all that follows."""
    flat: dict[str, float] = {}
    unmoved: dict[str, float] = {}
    number = len(cohort.cases) + len(cohort.left_out)
    for evidence in cohort.cases:
        one = torch.cat([m.flatten().cpu() for m in evidence.maps.values()])
        varies = float(one.max() - one.min()) > 1e-12 * float(one.abs().max())
        flat[evidence.id] = float(bool(torch.isfinite(one).all()) and varies)
        change = abs(evidence.score - evidence.baseline_score)
        unmoved[evidence.id] = float(change > cohort.settings.errors * evidence.baseline_error)
    drafts = []
    beyond = f"more than {cohort.settings.errors:g} standard errors from that of the baseline"
    for test, title, values, lack, asked in (
        ("P1", P1, flat, "its map is the same everywhere", "a finite map that varies"),
        ("P2", P2, unmoved, "its prediction equals the baseline prediction", f"a score {beyond}"),
    ):
        cohort.left_out |= {
            name: lack for name, ok in values.items() if not ok and name not in cohort.left_out
        }
        share = sum(values.values()) / max(number, 1)
        ok = share >= cohort.settings.met
        rule = f"{asked}, in {percent(cohort.settings.met)} of the cases"
        facts = measured(cohort, test, title, "P", values, threshold=rule, origin=CHOICE)
        found, missed = (
            f"In {share:.0%} of {number} cases.",
            f"In {share:.0%} of {number} cases only. {_why(cohort)}",
        )
        drafts.append(Draft(facts, found, f"Nothing to explain. {missed}", settled="PASS" if ok else "FAIL"))
    cohort.cases = [e for e in cohort.cases if e.id not in cohort.left_out]
    return drafts


def _why(cohort: Cohort) -> str:
    return "; ".join(f"{name}: {why}" for name, why in list(cohort.left_out.items())[:3])


def judge_completeness(cohort: Cohort) -> Draft:
    """T1: how much the contributions miss."""
    gaps = {e.id: float(e.explanation.gap[0]) for e in cohort.cases if e.explanation.gap is not None}
    if not gaps:
        return unavailable("T1", T1, "Q1", "The method does not promise that its values add up.")
    settings = cohort.settings
    median = float(np.median(list(gaps.values())))
    test = measured(
        cohort, "T1", T1, "Q1", gaps, value=median, threshold=f"median gap <= {settings.gap:g}",
        origin=cited("Sundararajan et al. 2017", settings.gap, 0.05),
    )  # fmt: skip
    sentence = f"Attributions add up to within {median:.1%} of the change of the prediction (median)."
    cure = "Raise n_steps, or choose another baseline."
    return Draft(test, sentence, f"{sentence} {cure}", settled="PASS" if median <= settings.gap else "FAIL")


def judge_randomization(cohort: Cohort, network: nn.Module, second: nn.Module | None) -> tuple[Draft, Draft]:
    """P3 and T2: maps of random weights, held against those of another training."""
    settings = cohort.settings
    moved: dict[str, float] = {e.id: 0.0 for e in cohort.cases}
    sims: dict[str, list[float]] = {e.id: [] for e in cohort.cases}
    for seed in range(settings.seed, settings.seed + settings.n_random):
        with randomize(network, seed):
            found = cohort.each(lambda e: _as_random(e, network, settings.moves), f"random weights {seed}")
        for name, compared in found.items():
            if compared is not None:
                has_moved, similarity = compared
                moved[name] = max(moved[name], float(has_moved))
                sims[name].append(similarity)
    share = mean_of_known(list(moved.values()))
    rule = f"a score that moves by {settings.moves:g} of itself, in {percent(settings.met)} of the cases"
    p3 = Draft(
        measured(cohort, "P3", P3, "P", moved, threshold=rule, origin=CHOICE),
        f"In {share:.0%} of the cases.",
        f"In {share:.0%} of the cases only: the prediction does not depend on the weights.",
        settled="PASS" if share >= settings.met else "FAIL",
    )
    return p3, _compare(cohort, {name: mean_of_known(values) for name, values in sims.items()}, second)


def _as_random(e: Evidence, network: nn.Module, least: float) -> tuple[bool, float] | None:
    """Return whether random weights move the score, and how alike their map is; None where they give none."""
    found = map_again(e, network)
    if found is None:
        return None
    change = abs(float(found.score[0]) - e.score)
    return change > least * abs(e.score), alike(e.maps, e.judged(found))


def _compare(cohort: Cohort, by_chance: dict[str, float], second: nn.Module | None) -> Draft:
    settings = cohort.settings
    level, between = mean_of_known(list(by_chance.values())), mean_of_known(between_patients(cohort.cases))
    rule = (
        f"similarity < {settings.unchanged:g}, and below that to a second network, p < {settings.alpha:g}; provisional "
        f"below {settings.little:g}"
    )
    line = (
        f" Maps of two patients are alike by {between:.2f} (Arun et al. 2021)." if between == between else ""
    )
    if second is not None:
        found = cohort.each(lambda e: _judged_again(e, second), "maps of the second network")
        cohort.second = {name: maps for name, maps in found.items() if maps is not None}
    kept = {e.id: alike(e.maps, cohort.second[e.id]) for e in cohort.cases if e.id in cohort.second}
    p = signed_rank_test([kept[name] - by_chance[name] for name in kept]) if kept else math.nan
    test = measured(
        cohort, "T2", T2, "Q1", by_chance, p=p, threshold=rule,
        origin=f"[L] Adebayo et al. 2018, Arun et al. 2021; {settings.unchanged:g} and {settings.little:g} are [E]",
    )  # fmt: skip
    supply = "a second network, trained independently (another fold or seed): second_network=..."
    if math.isnan(level):
        why = "The randomized networks gave no map to compare with."
        return Draft(test, missed=why, supply=supply, settled="INCONCLUSIVE")
    alone = f"Maps of random weights are alike by r = {level:.2f}."
    if level >= settings.unchanged:
        why = f"Map unchanged (r = {level:.2f}) after destroying the weights: it shows the image, not the model."
        return Draft(test, missed=why, settled="FAIL")
    if second is None:
        why = f"{alone}{line} Supply a second trained network to tell the image's structure from the model."
        return Draft(test, missed=why, supply=supply, settled="PROVISIONAL")
    both = f"{alone[:-1]}, those of a second network by r = {mean_of_known(list(kept.values())):.2f}.{line}"
    return Draft(
        test, both, f"{both} A network that was trained gives no more of the same map than random weights."
    )


def _judged_again(e: Evidence, network: nn.Module, inputs: Maps | None = None) -> Maps | None:
    """Return the maps of another network, or at other inputs, as they are judged; None where there are none."""
    found = map_again(e, network, inputs)
    return None if found is None else {name: values.clone() for name, values in e.judged(found).items()}


def _to(evidence: Evidence, network: nn.Module) -> float:
    found = map_again(evidence, network)
    return math.nan if found is None else alike(evidence.maps, evidence.judged(found))


def judge_permuted_labels(cohort: Cohort, permuted: nn.Module | None) -> Draft:
    """T3: the map of a network that was trained on permuted labels."""
    if permuted is None:
        return unavailable("T3", T3, "Q1", "Not asked: no network that was trained on permuted labels.")
    values = cohort.each(lambda e: _to(e, permuted), "permuted labels")
    return _not_the_same(cohort, "T3", T3, values, cohort.settings.unchanged, "a network trained on permuted labels",
                         f"[L] Adebayo et al. 2018; {cohort.settings.unchanged:g} is [E]")  # fmt: skip


def judge_classes(cohort: Cohort, network: nn.Module) -> Draft:
    """T4: the map of another class."""
    channels = {e.output.shape[1] if e.output.ndim > 1 else 1 for e in cohort.cases}
    if max(channels, default=1) < 3:
        why = "Not asked: of two classes, one has the map of the other with its sign turned."
        return unavailable(
            "T4", T4, "Q1", why if channels == {2} else "Not asked: the network has one output."
        )
    values = cohort.each(lambda e: _to_class(e, network, cohort.settings.seed), "another class")
    if all(map(math.isnan, values.values())):
        return unavailable("T4", T4, "Q1", "The other classes of this target are not known.")
    return _not_the_same(cohort, "T4", T4, values, cohort.settings.same_class, "another class",
                         f"[L] Sixt et al. 2020; {cohort.settings.same_class:g} is [E]")  # fmt: skip


def _to_class(e: Evidence, network: nn.Module, seed: int) -> float:
    asked = replace(e.explainer, target=e.frozen.target)  # whose classes are known
    scores = random_logit(asked, network, e.inputs, label=e.case.label, explanation=e.explanation, seed=seed)
    return float(scores.values[0])


def _not_the_same(
    cohort: Cohort, name: str, title: str, values: Mapping[str, float], limit: float, other: str, origin: str
) -> Draft:
    test = measured(cohort, name, title, "Q1", values, threshold=f"similarity < {limit:g}", origin=origin)
    sentence = f"The map is like that of {other} by r = {test.value:.2f}"
    if math.isnan(test.value):
        return Draft(test, missed=f"There is no map of {other} to compare with.", settled="INCONCLUSIVE")
    passes = test.value < limit
    missed = f"{sentence}: it is the same picture, and no evidence for what it is said to explain."
    return Draft(test, f"{sentence}.", missed, settled="PASS" if passes else "FAIL")


# ---------------------------------------------------------------------------------- fidelity and stability


def judge_stability(cohort: Cohort, network: nn.Module) -> tuple[Draft, dict[str, Maps]]:
    """T6: the map predicts effects better than shifted copies, and noise alters it less than another patient.

    Maps are compared by their values and not by ranks: most voxels carry next to no evidence, the order of these is
    noise inside of the body and the same in all patients outside.
    """
    settings, stable = cohort.settings, {}
    between = between_patients(cohort.cases)
    better = cohort.each(lambda e: _beyond_shifted(e, network, settings), "fidelity")
    rescans = cohort.each(
        lambda e: _judged_again(e, network, noised(e, settings.noise, settings.seed)), "another acquisition"
    )
    again = {name: maps for name, maps in rescans.items() if maps is not None}
    for e, others in zip(cohort.cases, between, strict=True):
        kept = alike(e.maps, again[e.id]) if e.id in again else math.nan
        stable[e.id] = kept - others
        e.per_case["T6 stability"] = kept
    p_values = [signed_rank_test(list(better.values())), signed_rank_test(list(stable.values()))]
    p = math.nan if any(map(math.isnan, p_values)) else max(p_values)
    test = measured(
        cohort, "T6", T6, "Q1", better, p=p, origin="[L] Yeh et al. 2019; comparison by shifts [E]",
        threshold=f"p < {settings.alpha:g}: R2 against the map shifted, and stability against other patients",
    )  # fmt: skip
    kept = mean_of_known([e.per_case["T6 stability"] for e in cohort.cases])
    others = mean_of_known(between)
    facts = (
        f"The map explains {test.value:+.2f} more of the effects (R2) than shifted copies (p = {p_values[0]:.2g}); "
        f"noise of {percent(settings.noise)} leaves it alike by {kept:.2f}, maps of other patients by {others:.2f} "
        f"(p = {p_values[1]:.2g})."
    )
    missed = f"{facts} The map does not predict effects, or noise alters it as much as swapping the patient."
    return Draft(test, facts, missed), again


def _beyond_shifted(e: Evidence, network: nn.Module, settings: GroundingSettings) -> float:
    """Return how much more of the effects the map explains than copies of it that are shifted."""
    shifted = shifted_maps(e, settings.n_shifts, settings.seed)
    return _fidelity(e, network, settings, e.maps) - mean_of_known(
        [_fidelity(e, network, settings, maps) for maps in shifted]
    )


def _fidelity(e: Evidence, network: nn.Module, settings: GroundingSettings, maps: Maps) -> float:
    removal = RandomRemoval(
        features=e.blocks(settings), imputer=usual_imputer(e.explainer.attributor), seed=settings.seed
    )
    found = fidelity(
        e.explainer, network, e.inputs, explanation=maps, perturbation=removal, n_draws=settings.n_disturbed
    )
    return float(found.r2.values[0])


def follow_cascade(cohort: Cohort, network: nn.Module) -> None:
    """Keep the curve of maps while layer after layer is randomized: for the eye, no test."""
    settings = cohort.settings
    by_case = cohort.each(
        lambda e: _cascade(e, network, settings.seed), "the cascade", cohort.cases[: settings.n_cascade]
    )
    found = list(by_case.values())
    if found and len({len(row) for row in found}) == 1:
        rows: Sequence[float] = [
            mean_of_known([float(row[i]) for row in found]) for i in range(len(found[0]))
        ]
        x = tuple(float(i) for i in range(len(rows) + 1))
        cohort.curves["cascade: pearson"] = {"x": x, "y": (1.0, *rows)}


def _cascade(e: Evidence, network: nn.Module, seed: int) -> np.ndarray:
    stages = cascading_randomization(
        e.explainer, network, e.inputs, explanation=e.explanation, kinds=("pearson",), seeds=(seed,)
    )
    return stages.similarity["pearson"][0].cpu().numpy()
