"""The procedure: tests in order of cost, and the verdict."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import Tensor, nn

from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.grids import affine_of
from monai_xai.grounding import of_deletion, of_finding, of_model, of_shortcuts
from monai_xai.grounding.drafts import Cohort, Draft, settle, unavailable
from monai_xai.grounding.evidence import Evidence, Opened, mean_of_known, open_case, signed_maps
from monai_xai.grounding.places import name_places, shares_of_places
from monai_xai.grounding.together import together
from monai_xai.grounding.words import (
    GroundedCase,
    Grounding,
    GroundingCase,
    GroundingSettings,
    GroundingTest,
    Verdict,
)
from monai_xai.metrics.base import as_one_map, real
from monai_xai.networks import unwrap

Masks = Mapping[str, Tensor]
TITLES = {
    "T1": of_model.T1, "T2": of_model.T2, "T3": of_model.T3, "T4": of_model.T4, "T5": of_deletion.T5,
    "T6": of_model.T6, "T7": of_finding.T7, "T8": of_finding.T8, "T9": of_finding.T9, "T10": of_shortcuts.T10,
    "T11": of_finding.T11, "T12": of_finding.T12, "T13": of_finding.T13,
}  # fmt: skip
ORDER = ("P1", "P2", "P3", *TITLES)


def ground(
    explainer: Explainer,
    network: nn.Module,
    cases: Sequence[GroundingCase],
    *,
    regions: Masks | None = None,
    within: Masks | None = None,
    second_network: nn.Module | None = None,
    permuted_network: nn.Module | None = None,
    confounders: Mapping[str, Masks] | None = None,
    other_masks: Sequence[Tensor] = (),
    structures: Masks | None = None,
    structure_names: Mapping[int, str] | None = None,
    settings: GroundingSettings | None = None,
    spread: bool = False,
) -> Grounding:
    """Judge the explanations of a network over a cohort: do they describe this network, and is that the finding?

    The two questions are never merged. The first (Q1: T1 to T6) needs no masks; the second (Q2: T7 to T13) holds map
    and network against the marked findings. Tests go in order of cost, and stop where random weights give the same map.

    Args:
        explainer: of one target. A map of any origin is judged by an attributor of one's own that returns it.
        network: the network; not changed in any way.
        cases: batches of one.
        regions: masks of the finding by case id, shape (*spatial) or (1, 1, *spatial), on the grid of the first image.
        within: masks of the body (organ) likewise; a case without one takes what is not background.
        second_network: trained independently for the same task (another fold or seed).
        permuted_network: trained on permuted labels.
        confounders: masks of possible shortcuts by name and case id.
        other_masks: masks of the finding in further patients, aligned and on the same grid.
        structures: label maps of known structures (an atlas, a marker of the scanner) by case id, integers from 0 (no
            structure), so that evidence beyond the finding is told by name. No test looks at them.
        structure_names: names of their labels; None takes numbers.
        settings: thresholds and effort.
        spread: where there are several processes, whether they share the cases, each every n-th. All must call with the
            same cases, and all get the same result.

    Returns:
        The verdict with every test. What could not be tested is never a pass: GROUNDED needs a second network, masks,
        and ``settings.min_cases`` cases.

    Raises:
        InputError: naming the case whose image, masks or batch size do not fit, and ids that are unknown or twice.
        OtherProcessError: if cases are shared, and another process failed.
        OutOfStepError: if cases are shared, and another process has others.

    Reference: Jin et al., "Guidelines and Evaluation of Clinical Explainable AI in Medical Image Analysis", Medical
    Image Analysis 2023 (truthfulness before plausibility); for single tests see their ``origin``.
    """
    settings = settings or GroundingSettings()
    cases = list(cases)
    networks = (network, second_network, permuted_network)
    with together("grounding", cases, networks, len(cases), spread=spread) as crew:
        _check_ids(cases, regions=regions, within=within, structures=structures, **(confounders or {}))
        cohort = Cohort([], settings, crew=crew)
        _gather(cohort, explainer, network, cases, regions or {}, within or {})
        everyone = list(cohort.cases)
        drafts = of_model.judge_preconditions(cohort)
        if cohort.cases and all(d.settled == "PASS" for d in drafts):
            drafts += _judge_model(cohort, network, second_network, permuted_network)
            if not _stopped(drafts, settings):
                drafts += _judge_finding(cohort, network, confounders or {}, other_masks)
                drafts += _judge_costly(cohort, network)
    drafts += _not_run(drafts)
    tests, missing = settle(sorted(drafts, key=lambda d: ORDER.index(d.test.id)), settings)
    tests = _resolve(tests, settings)
    places = shares_of_places(cohort.cases, structures, structure_names)
    where = name_places(cohort.cases, places)
    verdict, sentence, more = decide(tests, len(cohort.cases), settings, where)
    return Grounding(
        verdict,
        sentence,
        tuple(tests),
        tuple(dict.fromkeys([*more, *missing])),
        tuple(_shown(e) for e in everyone),
        cohort.curves,
        _configuration(explainer, network, cases, cohort, everyone),
        places,
    )


def _check_ids(cases: Sequence[GroundingCase], **masks: Masks | None) -> None:
    names = [case.id for case in cases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"Cases need ids of their own, {sorted(twice)} occur more than once.")
    for kind, given in masks.items():
        if unknown := set(given or {}) - set(names):
            raise InputError(
                f"{kind} has masks for {sorted(unknown)[:5]}, which are no cases: {names[:5]}, ..."
            )


def _gather(
    cohort: Cohort,
    explainer: Explainer,
    network: nn.Module,
    cases: Sequence[GroundingCase],
    regions: Masks,
    within: Masks,
) -> None:
    """Explain the cases, and say of those that cannot be why."""
    opened: dict[str, Opened] = {}
    refused: dict[str, str] = {}
    for case in cases:
        found = open_case(explainer, network, case, regions.get(case.id), within.get(case.id))
        if isinstance(found, str):
            refused[case.id] = found
        else:
            opened[case.id] = found
    left_out: dict[str, str] = {}
    # Memory may hold a case in one process and not in another.
    for others in cohort.crew.tell("what cannot be asked about", refused):
        left_out = {**others, **left_out}
    asked = [one for name, one in opened.items() if name not in left_out]
    explained = cohort.on_each(asked, lambda one: one.explained(network), "explaining")
    for case in cases:
        given = left_out[case.id] if case.id in left_out else explained[case.id]
        if isinstance(given, str):
            cohort.left_out[case.id] = given
        else:
            cohort.cases.append(opened[case.id].with_map(given))


def _judge_model(
    cohort: Cohort, network: nn.Module, second: nn.Module | None, permuted: nn.Module | None
) -> list[Draft]:
    """P3 and T1 to T4."""
    p3, t2 = of_model.judge_randomization(cohort, network, second)
    drafts = [p3, of_model.judge_completeness(cohort), t2]
    if _stopped(drafts, cohort.settings):
        return drafts
    return [
        *drafts,
        of_model.judge_permuted_labels(cohort, permuted),
        of_model.judge_classes(cohort, network),
    ]


def _stopped(drafts: Sequence[Draft], settings: GroundingSettings) -> bool:
    bad = [d for d in drafts if d.settled == "FAIL" and d.test.id in ("P3", "T2")]
    return any(d.test.id == "P3" or settings.stop_early for d in bad)


def _judge_finding(
    cohort: Cohort, network: nn.Module, confounders: Mapping[str, Masks], others: Sequence[Tensor]
) -> list[Draft]:
    """T7 to T11: few or no calls of the network."""
    return [
        *of_finding.judge_location(cohort, others),
        of_shortcuts.judge_shortcuts(cohort, network, confounders),
        of_finding.judge_informativeness(cohort),
        of_finding.judge_necessity(cohort, network),
    ]


def _judge_costly(cohort: Cohort, network: nn.Module) -> list[Draft]:
    """T5, T6, T12 and T13."""
    of_model.follow_cascade(cohort, network)
    t6, again = of_model.judge_stability(cohort, network)
    return [
        of_deletion.judge_deletion(cohort, network),
        t6,
        of_finding.judge_repeatability(cohort, again),
        of_finding.judge_modalities(cohort, network),
    ]


def _not_run(drafts: Sequence[Draft]) -> list[Draft]:
    """Return the tests that were not come to."""
    done = {d.test.id for d in drafts}
    why = "Not done: "
    why += "the map does not depend on the weights." if "T2" in done else "a precondition is not met."
    titles = {"P3": of_model.P3, **TITLES}
    return [
        unavailable(name, title, "P" if name == "P3" else "Q1" if int(name[1:]) < 7 else "Q2", why)
        for name, title in titles.items()
        if name not in done
    ]


def _resolve(tests: Sequence[GroundingTest], settings: GroundingSettings) -> list[GroundingTest]:
    """Let deletion decide where random weights give quite another map, and so does another training.

    A provisional T2 is taken back where deletion does not support it.
    """
    status = {test.id: test.status for test in tests}

    def resolved(test: GroundingTest) -> GroundingTest:
        if test.id != "T2":
            return test
        if test.status == "FAIL" and test.value < settings.little:
            test = replace(test, status="PROVISIONAL", message=f"{test.message} But the weights matter.")
        taken_back = test.status == "PROVISIONAL" and status["T5"] != "PASS"
        return replace(test, status="INCONCLUSIVE") if taken_back else test

    return [resolved(test) for test in tests]


def decide(
    tests: Sequence[GroundingTest], n: int, settings: GroundingSettings, where: str = ""
) -> tuple[Verdict, str, list[str]]:
    """Return the verdict, its sentence, and what it would take for more.

    Args:
        tests: all of them, with their status.
        n: number of cases.
        settings: with the number of cases that a verdict takes.
        where: sentence on where evidence lies beyond the findings.
    """
    of = {test.id: test for test in tests}
    status = {name: test.status for name, test in of.items()}
    if bad := [test for test in tests if test.gate == "P" and test.status == "FAIL"]:
        return (
            "INCONCLUSIVE",
            f"There is nothing to judge: {bad[0].message}",
            ["cases whose prediction differs from that at the baseline"],
        )
    if bad := [of[name] for name in ("T2", "T5") if status[name] == "FAIL"]:
        return "ARTIFACT", f"The map does not describe this model. {bad[0].message}", []
    weak = _weak(tests)
    if status["T2"] not in ("PASS", "PROVISIONAL") or status["T5"] != "PASS":
        open_ = [name for name in ("T2", "T5") if status[name] != "PASS"]
        return "INCONCLUSIVE", f"Whether the map describes this model is open ({', '.join(open_)}).{weak}", []
    if bad := [of[name] for name in ("T9", "T10") if status[name] == "FAIL"]:
        reason = " ".join(test.message for test in bad)
        sentence = f"The map describes the model, but the model looks elsewhere: possible shortcut. {reason}"
        return "FAITHFUL BUT OFF TARGET", f"{sentence}{where}{weak}", []
    if status["T9"] == "PASS" and (bad := [of[name] for name in ("T7", "T8") if status[name] == "FAIL"]):
        return (
            "MODEL OK BUT MAP MISLEADING",
            (f"The model uses the finding, but the map does not show it. {bad[0].message}{weak}"),
            [],
        )
    needed = {name: status[name] for name in ("T2", "T7", "T8", "T9", "T10")}
    left = [name for name, s in needed.items() if s != "PASS" and not (name == "T10" and s == "NA")]
    supply = [] if n >= settings.min_cases else [f"at least {settings.min_cases} cases, there are {n}"]
    if not left and not supply:
        untested = "" if status["T10"] == "PASS" else " Shortcuts were not tested (T10)."
        return (
            "GROUNDED",
            (
                "The map describes the model, the model uses the marked finding, and the map shows it beyond chance."
                f"{untested}{weak}"
            ),
            [],
        )
    parts = [f"open: {', '.join(left)}"] * bool(left) + supply
    return (
        "INCONCLUSIVE",
        f"Nothing speaks against it, but not all was shown ({'; '.join(parts)}).{weak}",
        supply,
    )


def _weak(tests: Sequence[GroundingTest]) -> str:
    failed = [test.id for test in tests if test.id in ("T1", "T3", "T4", "T6") and test.status == "FAIL"]
    return f" Weak: {', '.join(failed)} failed." if failed else ""


def _shown(e: Evidence) -> GroundedCase:
    others = [name for name, x in e.inputs.items() if name != e.grid and x.ndim > 2 and e.maps[name].ndim > 2]
    return replace(_image(e, e.grid), id=e.id, further=tuple(_image(e, name) for name in others))


def _image(e: Evidence, name: str) -> GroundedCase:
    """Return one image of a case with its map, summed over channels, and the masks on its grid."""
    image, maps = e.inputs[name], signed_maps(e.explanation)
    values = e.on_grid(maps) if name == e.grid else as_one_map(maps[name]).cpu()
    fits = image.shape[2:] == e.body.shape[2:]
    return GroundedCase(
        "",
        real(image)[0].cpu().numpy(),
        values[0, 0].numpy(),
        None if e.region is None or not fits else e.region[0, 0].numpy(),
        None if e.prediction is None or not fits else e.prediction.numpy(),
        e.spacing_of(name),
        e.score,
        e.baseline_score,
        dict(e.per_case),
        affine_of(image),
        name,
    )


def _configuration(
    explainer: Explainer,
    network: nn.Module,
    cases: Sequence[GroundingCase],
    cohort: Cohort,
    everyone: Sequence[Evidence],
) -> dict[str, Any]:
    """Return everything that the result depends on."""
    settings = cohort.settings
    told = {item.name: getattr(settings, item.name) for item in fields(settings)}
    told["imputers"] = {name: str(given) for name, given in settings.imputers.items()}
    return {
        "method": str(explainer.attributor),
        "target": str(explainer.target),
        "unit": everyone[0].explanation.unit if everyone else "",
        "inferer": type(explainer.inferer).__name__ if explainer.inferer is not None else "none",
        "network": type(unwrap(network)).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "n_cases": len(cases),
        "left_out": dict(cohort.left_out),
        "mean_seconds": mean_of_known([e.explanation.seconds for e in everyone]),
        "settings": told,
        "seed": settings.seed,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            **{name: _version(name) for name in ("monai_xai", "torch", "monai", "captum", "scipy")},
        },
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
