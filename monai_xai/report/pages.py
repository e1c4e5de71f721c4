"""The pages of the report: the cohort's, the clinician's for every case, the engineer's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

from monai_xai.cohorts import ModalityCohort
from monai_xai.errors import InputError
from monai_xai.figures import rasterize_on_white
from monai_xai.grounding import GroundedCase, Grounding, GroundingTest
from monai_xai.report.lamps import SYMBOLS, WORDS, Color, Lamp, lamps_of
from monai_xai.report.markup import Html, element, joined, number, picture, span, table
from monai_xai.report.pictures import (
    STAMP,
    curve_groups,
    figure_of_case,
    figure_of_curves,
    figure_of_test,
)
from monai_xai.report.sides import is_wrong, settings_of
from monai_xai.tensorboard import figures_of_cohort, figures_of_modalities

COLORS: dict[str, Color] = {
    "GROUNDED": "green",
    "FAITHFUL BUT OFF TARGET": "red",
    "MODEL OK BUT MAP MISLEADING": "red",
    "ARTIFACT": "red",
    "INCONCLUSIVE": "amber",
    "PASS": "green",
    "FAIL": "red",
    "PROVISIONAL": "amber",
    "NA": "grey",
}
MEANINGS = {
    "GROUNDED": "The map describes the model, and what the model uses lies in the marked finding.",
    "FAITHFUL BUT OFF TARGET": "The map describes the model, but the model uses something else than the marked "
    "finding: possibly a shortcut.",
    "MODEL OK BUT MAP MISLEADING": "The model uses the marked finding, but the map does not show it: look at another "
    "method.",
    "ARTIFACT": "The map does not describe the model. It must not be used to judge a prediction.",
    "INCONCLUSIVE": "The tests that could be done do not settle it.",
}
GATES = {
    "P": "Preconditions: is there anything to explain?",
    "Q1": "Question 1: does the map describe the model?",
    "Q2": "Question 2: is what the model uses clinically relevant?",
}
CAVEAT = joined(
    element("strong", "This tests the explanation, not the correctness of the prediction. "),
    "A good-looking map is no sign of a correct prediction: 35 neurosurgeons graded gliomas with an accuracy of 82.5 % "
    "alone, 87.7 % with the prediction of a network (p = 0.002), and 88.5 % with prediction and heatmap (p = 0.35 "
    "against the prediction alone) (Jin 2024). Raters did not agree on which heatmaps are good: Krippendorff's alpha "
    "0.16, Fleiss' kappa \N{MINUS SIGN}0.017 (Jin 2022). Nothing here is a diagnosis.",
)
_SIDES = (
    "Marked: on the wrong side of the threshold of its test. A single case decides nothing, the cohort does; T7, T11 "
    "and T12 say nothing of a case by itself."
)
_RESULTS = ("left_out", "mean_seconds")  # told with the configuration, and not a part of it
_PLOT_SCALE = 1.6  # pixels of a sharp figure for each of the page


def cohort_page(grounding: Grounding, title: str, modalities: ModalityCohort | None) -> Html:
    """Return the first page: the verdict, the lamps, every test in a line, what to supply, all cases."""
    rows = [_line_of(test) for test in grounding.tests]
    heads = ["test", "status", "value", "95 % interval", "p, corrected", "cases", "what follows"]
    parts = [
        element("h1", title),
        _navigation(grounding),
        _verdict(grounding),
        element("p", *_subject(grounding), class_="faint"),
        _lamps(lamps_of(grounding), None),
        element("h3", "Every test"),
        table(heads, rows, class_="tests") if rows else element("p", "No test was done.", class_="faint"),
        *_places(grounding),
        *_supplies(grounding),
        *_cohort_plots(modalities),
        element("div", CAVEAT, class_="caveat"),
    ]
    return element("section", *parts, id="cohort")


def case_page(grounding: Grounding, index: int, modalities: ModalityCohort | None) -> Html:
    """Return a clinician's page of one case."""
    case = grounding.cases[index]
    parts = [
        element("h2", f"Case {case.id}"),
        _small_verdict(grounding),
        _prediction(grounding, case),
        _map(grounding, case),
        _lamps(lamps_of(grounding), case),
        *_bars(case, modalities),
        *_not_tested(grounding),
        element("div", CAVEAT, class_="caveat"),
    ]
    return element("section", *parts, class_="page", id=f"case-{index}")


def engineer_page(grounding: Grounding) -> Html:
    """Return every test with its null, the curves, the cases, and the configuration with its hash."""
    parts: list[Any] = [element("h2", "For engineers"), _small_verdict(grounding)]
    for gate in dict.fromkeys([*GATES, *(test.gate for test in grounding.tests)]):
        tests = [test for test in grounding.tests if test.gate == gate]
        parts += [element("h3", GATES.get(gate, f"Gate {gate}"))] if tests else []
        parts += [_test(test) for test in tests]
    parts += _curves(grounding)
    parts += [
        element("h3", "Every case, those that fail most first"),
        element("p", _SIDES, class_="faint"),
        _case_table(grounding),
        element("h3", "Configuration"),
        *_configuration(grounding),
    ]
    return element("section", *parts, class_="page", id="engineer")


def _navigation(grounding: Grounding) -> Html:
    cases = (
        element("a", f"Case {case.id}", href=f"#case-{index}") for index, case in enumerate(grounding.cases)
    )
    return element("nav", *cases, element("a", "For engineers", href="#engineer"))


def _verdict(grounding: Grounding) -> Html:
    meaning = MEANINGS[grounding.verdict]
    parts = [element("strong", grounding.verdict), element("p", meaning), element("p", grounding.sentence)]
    return element("div", *parts, class_=f"verdict {COLORS[grounding.verdict]}")


def _small_verdict(grounding: Grounding) -> Html:
    words = element("span", grounding.verdict, class_=f"chip {COLORS[grounding.verdict]}")
    return element(
        "p", "Verdict on the explanations of this cohort: ", words, " ", MEANINGS[grounding.verdict]
    )


def _subject(grounding: Grounding) -> Iterator[Any]:
    """Say for which target and method, and over how many cases."""
    for name in ("target", "method", "attributor", "network", "inferer"):
        if name in grounding.configuration:
            yield joined(
                f"{name} ", element("code", _words(grounding.configuration[name])), " \N{MIDDLE DOT} "
            )
    yield f"{len(grounding.cases)} cases"


def _line_of(test: GroundingTest) -> list[Any]:
    return [
        f"{test.id} {test.title}",
        _chip(test.status),
        _cell(number(test.value)),
        _cell(span(test.interval)),
        _cell(number(test.p_corrected)),
        _cell(str(test.n)),
        test.message,
    ]


def _cell(words: str, is_bad: bool = False) -> Html:
    return element("td", words, class_="number bad" if is_bad else "number")


def _chip(status: str) -> Html:
    words = {"NA": "not tested"}.get(status, status)
    return element("span", words, class_=f"chip {COLORS.get(status, 'grey')}")


def _lamps(lamps: tuple[Lamp, ...], case: GroundedCase | None) -> Html:
    return element("div", *(_lamp(lamp, case) for lamp in lamps), class_="lamps")


def _lamp(lamp: Lamp, case: GroundedCase | None) -> Html:
    light = element("span", f"{SYMBOLS[lamp.color]} {WORDS[lamp.color]}", class_=f"chip {lamp.color}")
    own = [] if case is None else [words for test in lamp.tests for words in _own_values(test, case)]
    more = element("p", "; ".join(own), class_="faint") if own else ""
    parts = (element("h4", lamp.name), light, element("p", lamp.sentence), more)
    return element("div", *parts, class_=f"lamp {lamp.color}")


def _own_values(test: GroundingTest, case: GroundedCase) -> Iterator[str]:
    """Say what a test and its parts ("T6 stability") found in one case."""
    for name, value in case.values.items():
        if name == test.id:
            yield f"{name}: {number(value)} here, {number(test.value)} in the cohort"
        elif name.startswith(f"{test.id} "):
            yield f"{name}: {number(value)} here"


def _prediction(grounding: Grounding, case: GroundedCase) -> Html:
    change = case.score - case.baseline_score
    unit = grounding.configuration.get("unit", "")
    rows = [
        ["Prediction (the score that is explained)", _cell(number(case.score, 4))],
        ["Baseline prediction (the same without information)", _cell(number(case.baseline_score, 4))],
        ["What is explained: the difference", _cell(number(change, 4))],
    ]
    heads = ["", joined("score", f", {unit}" if unit else "")]
    return joined(element("p", *_subject(grounding), class_="faint"), table(heads, rows))


def _map(grounding: Grounding, case: GroundedCase) -> Html:
    """Return the map of every image of a case, each with a color scale of its own."""
    is_artifact = grounding.verdict == STAMP
    warning = f"{STAMP}: this map does not describe the model. " if is_artifact else ""
    pictures = [
        _picture(grounding, part, f"{warning}Map of case {case.id}, {part.name}")
        for part in (case, *case.further)
    ]
    words = joined(
        element("strong", warning),
        "Red raises the score, blue lowers it, clear does nothing. Dashed: the marked finding",
        "" if case.region is not None else " (none was given)",
        ". Green: the prediction",
        "" if case.prediction is not None else " (the network predicts no outline)",
        ". The cross marks the strongest point.",
        " Each image has a color scale of its own." if case.further else "",
    )
    return element("figure", *pictures, element("figcaption", words), class_="map")


def _picture(grounding: Grounding, case: GroundedCase, words: str) -> Html:
    try:
        figure = figure_of_case(grounding, case)
    except InputError as error:
        return element("p", f"The map is not drawn: {error}", class_="faint")
    return picture(rasterize_on_white(figure, keep_pictures=True), words, _PLOT_SCALE)


def _bars(case: GroundedCase, modalities: ModalityCohort | None) -> Iterator[Html]:
    """Yield what each modality contributes, with the error of what was drawn, and the largest interaction."""
    yield element("h3", "Modalities")
    if modalities is None or case.id not in modalities.cases:
        yield element("p", "Not computed: what each modality contributes as a whole.", class_="faint")
        return
    for name, figure in figures_of_modalities(modalities.cases[case.id], "Contribution of each modality"):
        if name.endswith("waterfall"):
            yield _plot(
                figure, f"Contribution of each modality, {name}", "From the baseline to the prediction."
            )


def _cohort_plots(modalities: ModalityCohort | None) -> Iterator[Html]:
    if modalities is not None and modalities.cases:
        yield element("h3", "Modalities over the cohort")
        for name, figure in figures_of_cohort(modalities, "Modalities"):
            yield _plot(figure, f"Modalities, {name}", "")


def _not_tested(grounding: Grounding) -> Iterator[Html]:
    yield element("h3", "What was not tested")
    rows = [
        element("li", f"{test.id} {test.title}: ", _chip(test.status), " ", test.message)
        for test in grounding.tests
        if test.status in ("NA", "INCONCLUSIVE")
    ]
    yield element("ul", *rows) if rows else element("p", "Every test of the procedure was done.")


def _places(grounding: Grounding) -> Iterator[Html]:
    if grounding.places:
        yield element("h3", "Where the evidence lies")
        rows = [[name, _cell(f"{share:.1%}")] for name, share in grounding.places.items()]
        yield table(["place", "share of the evidence, mean over cases"], rows)


def _supplies(grounding: Grounding) -> Iterator[Html]:
    if grounding.missing:
        yield element("h3", "What to supply so that the open tests can be done")
        yield element("ul", *(element("li", words) for words in grounding.missing))


def _test(test: GroundingTest) -> Html:
    head = element("h4", f"{test.id} {test.title} ", _chip(test.status))
    if not test.n:
        return element("div", head, element("p", test.message), class_="test")
    facts = [
        ("value", number(test.value, 4)),
        ("95 % interval", span(test.interval)),
        ("p", number(test.p)),
        ("p after Holm", number(test.p_corrected)),
        ("cases", str(test.n)),
        ("threshold", f"{test.threshold or 'none: reported only'} {test.origin}"),
        ("null", f"{len(test.null)} values" if test.null else "none"),
    ]
    lines = [part for name, words in facts for part in (element("dt", name), element("dd", words))]
    figure = figure_of_test(test)
    plot = "" if figure is None else _plot(figure, f"{test.id}: the value and what chance gives", "")
    return element(
        "div", head, element("div", element("dl", *lines), element("p", test.message)), plot, class_="test"
    )


def _plot(figure: Any, words: str, caption: str) -> Html:
    inner = [picture(rasterize_on_white(figure), words, _PLOT_SCALE)]
    return element("figure", *inner, *([element("figcaption", caption)] if caption else []))


def _curves(grounding: Grounding) -> list[Any]:
    plots = [
        _plot(figure_of_curves(grounding, group), f"Curves: {group}", "") for group in curve_groups(grounding)
    ]
    words = "Means over cases."
    if any("low" in curve for curve in grounding.curves.values()):
        words += " Bands: 95 % bootstrap intervals of the mean, point by point."
    about = element("p", words, class_="faint")
    return [element("h3", "Curves"), about, element("div", *plots, class_="plots")] if plots else []


def _case_table(grounding: Grounding) -> Html:
    tests = [test for test in grounding.tests if test.per_case]
    settings = settings_of(grounding.configuration)
    cases = {case.id: case for case in grounding.cases}
    names = list(dict.fromkeys([*cases, *(name for test in tests for name in test.per_case)]))
    wrong = {(name, test.id): is_wrong(test, name, settings) for name in names for test in tests}
    names.sort(key=lambda name: -sum(wrong[name, test.id] for test in tests))
    rows = []
    for name in names:
        case = cases.get(name)
        scores = (case.score, case.baseline_score) if case else (math.nan, math.nan)
        found = [_cell(number(test.per_case.get(name, math.nan)), wrong[name, test.id]) for test in tests]
        against = ", ".join(test.id for test in tests if wrong[name, test.id])
        rows.append([name, *(_cell(number(score)) for score in scores), *found, against])
    heads = ["case", "score", "baseline", *(test.id for test in tests), "against it"]
    return table(heads, rows)


def _configuration(grounding: Grounding) -> Iterator[Html]:
    settings = grounding.as_dict()["configuration"]
    chosen = {name: settings[name] for name in settings if name not in _RESULTS}
    text = json.dumps(chosen, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    yield element(
        "p",
        f"SHA-256 of the configuration (JSON, keys sorted, without {' and '.join(_RESULTS)}): ",
        element("code", digest),
    )
    yield table(["setting", "value"], [[name, element("code", _words(settings[name]))] for name in settings])


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
