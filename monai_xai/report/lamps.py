"""Four lamps that a clinician reads, each with a sentence: what the tests of a cohort say about its explanations."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from monai_xai.grounding import Grounding, GroundingTest

Color = Literal["green", "amber", "red", "grey"]
SYMBOLS: dict[Color, str] = {
    "green": "\N{CHECK MARK}",
    "amber": "?",
    "red": "\N{BALLOT X}",
    "grey": "\N{EN DASH}",
}
WORDS: dict[Color, str] = {"green": "yes", "amber": "open", "red": "no", "grey": "not tested"}


class Asked(NamedTuple):
    """What a lamp asks.

    Args:
        name: of the lamp.
        tests: ids of the tests that must pass.
        further: ids of tests that keep the lamp from green where they fail.
        yes: the sentence if they pass.
        no: the sentence if one fails.
        untested: the sentence if none was done.
    """

    name: str
    tests: tuple[str, ...]
    further: tuple[str, ...]
    yes: str
    no: str
    untested: str


class Lamp(NamedTuple):
    """One lamp: its name, color and sentence, and the tests behind it."""

    name: str
    color: Color
    sentence: str
    tests: tuple[GroundingTest, ...]


QUESTIONS = (
    Asked(
        "Model-dependent",
        ("T2",),
        ("T3", "T4"),
        "The map changes when what the model has learned is destroyed: it shows the model, not only the image.",
        "The map hardly changes when what the model has learned is destroyed: it shows the image, not the model.",
        "Nobody has looked whether the map depends on what the model has learned.",
    ),
    Asked(
        "Removing it matters",
        ("T5",),
        (),
        "Removing the highlighted tissue changes the prediction more than removing as much elsewhere.",
        "Removing the highlighted tissue changes the prediction no more than removing as much elsewhere.",
        "Nobody has looked whether the prediction changes when the highlighted tissue is removed.",
    ),
    Asked(
        "In the lesion beyond chance",
        ("T7", "T8"),
        (),
        "The map lies in the marked finding more than a map placed by chance, or where findings usually are, would.",
        "The map lies in the marked finding no more than chance, or where findings usually are, would give.",
        "Nobody has looked whether the map lies in the marked finding: this needs outlines of the findings.",
    ),
    Asked(
        "Stable",
        ("T6",),
        ("T12",),
        "A change as small as that between two scans leaves the map much as it was.",
        "A change as small as that between two scans, or a retrained model, gives another map.",
        "Nobody has looked whether a second scan or a retrained model would give the same map.",
    ),
)


def lamps_of(grounding: Grounding) -> tuple[Lamp, ...]:
    """Return the four lamps in their order."""
    return tuple(_lamp(question, grounding) for question in QUESTIONS)


def belongs(test: GroundingTest, ids: tuple[str, ...]) -> bool:
    """Whether a test is one of those named; parts such as "T6b" or "T5 insertion" belong to theirs."""
    found = re.match(r"[A-Z]+\d+", test.id)
    return (found[0] if found else test.id) in ids


def _lamp(question: Asked, grounding: Grounding) -> Lamp:
    needed = [test for test in grounding.tests if belongs(test, question.tests)]
    further = [
        test
        for test in grounding.tests
        if belongs(test, question.further) and test.status in ("PASS", "FAIL")
    ]
    tests = (*needed, *further)
    color = _color(question, needed, further)
    sentence = {"green": question.yes, "red": question.no, "grey": question.untested}.get(color)
    return Lamp(question.name, color, sentence or _open(tests), tests)


def _color(question: Asked, needed: list[GroundingTest], further: list[GroundingTest]) -> Color:
    status = {test.status for test in needed}
    if "FAIL" in status:
        return "red"
    if all(test.status == "NA" or not test.n for test in needed):
        return "grey"
    found = {name for name in question.tests if any(belongs(test, (name,)) for test in needed)}
    is_whole = found == set(question.tests) and status == {"PASS"}
    return "green" if is_whole and all(test.status == "PASS" for test in further) else "amber"


def _open(tests: tuple[GroundingTest, ...]) -> str:
    """Say what keeps a lamp from turning green."""
    words = {
        "FAIL": "failed",
        "PROVISIONAL": "passed for now",
        "INCONCLUSIVE": "could not decide",
        "NA": "was not done",
    }
    parts = [f"{test.id} ({test.title}) {words[test.status]}" for test in tests if test.status in words]
    passed = [test.id for test in tests if test.status == "PASS"]
    parts += [f"{' and '.join(passed)} passed"] if passed else []
    return f"Not settled: {'; '.join(parts) or 'some of its tests are absent'}."
