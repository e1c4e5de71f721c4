"""From figures of every case to tests: what passes, what fails, and what cannot be told."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from monai_xai.grounding.evidence import Evidence, Maps, Opened, mean_of_known
from monai_xai.grounding.words import Gate, GroundingSettings, GroundingTest, Status
from monai_xai.ranks import Crew
from monai_xai.statistics import holm, interval

_Value = TypeVar("_Value")
_Case = TypeVar("_Case", bound=Opened)
CHOICE = "[E] a choice of ours, no literature"


def percent(share: float) -> str:
    """Return a threshold as it was set, 0.005 as "0.5%"."""
    return f"{100 * share:g}%"


def cited(source: str, limit: float, theirs: float) -> str:
    """Return the origin of a threshold, which is the source's own only where it was left as the source has it."""
    return f"[L] {source}" if limit == theirs else f"[L] {source}: {theirs:g}; {limit:g} is [E]"


@dataclass(frozen=True)
class Draft:
    """A test before the correction for many tests.

    Args:
        test: with its p-value, if there is one.
        found: the sentence if it passes.
        missed: the sentence if it fails, or finds nothing.
        supply: what would make it possible, or stronger.
        settled: a status that no p-value changes.
        may_fail: whether it fails where it does not pass, with cases enough; else that is INCONCLUSIVE.
    """

    test: GroundingTest
    found: str = ""
    missed: str = ""
    supply: str = ""
    settled: Status | None = None
    may_fail: bool = True


@dataclass
class Cohort:
    """What tests are made from.

    Args:
        cases: that could be explained.
        settings: thresholds.
        left_out: why others are not looked at, by id.
        curves: for the page.
        second: maps of the second network as they are judged, by id.
        crew: the processes that share the cases.
    """

    cases: list[Evidence]
    settings: GroundingSettings
    left_out: dict[str, str] = field(default_factory=dict)
    curves: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    second: dict[str, Maps] = field(default_factory=dict)
    crew: Crew = field(default_factory=Crew)

    def each(
        self, work: Callable[[Evidence], _Value], what: str, cases: Sequence[Evidence] | None = None
    ) -> dict[str, _Value]:
        """Return by id what a function of a case, which alters nothing, gives; each is done by one process.

        Args:
            work: asks the network.
            what: is done, for errors.
            cases: which; None: all.
        """
        return self.on_each(self.cases if cases is None else cases, work, what)

    def on_each(
        self, items: Sequence[_Case], work: Callable[[_Case], _Value], what: str
    ) -> dict[str, _Value]:
        """Do :meth:`each` for cases at any stage."""
        ids = [item.id for item in items]
        device = next((x.device for item in items for x in item.inputs.values()), None)
        words = f"{what} of {len(ids)} cases ({hashlib.sha256(repr(ids).encode()).hexdigest()[:12]})"
        return dict(zip(ids, self.crew.each(items, work, words, device=device), strict=True))


def measured(
    cohort: Cohort, test: str, title: str, gate: Gate, values: Mapping[str, float], **known: object
) -> GroundingTest:
    """Return a test with the mean of its values over cases and its interval."""
    given = np.array([value for value in values.values() if not math.isnan(value)])
    for evidence in cohort.cases:
        if evidence.id in values:
            evidence.per_case[test] = values[evidence.id]
    facts = {
        "value": mean_of_known(list(values.values())),
        "interval": interval(given, cohort.settings.seed),
        "n": len(given),
        "per_case": dict(values),
        **known,
    }
    return GroundingTest(test, title, gate, **facts)  # type: ignore[arg-type]


def said(test: GroundingTest, message: str) -> GroundingTest:
    """Return a test with its sentence, whatever its status."""
    return replace(test, message=message)


def unavailable(
    test: str, title: str, gate: Gate, message: str, *, supply: str = "", status: Status = "NA"
) -> Draft:
    """Return a test that could not be done."""
    return Draft(GroundingTest(test, title, gate, message=message), supply=supply, settled=status)


def settle(drafts: Sequence[Draft], settings: GroundingSettings) -> tuple[list[GroundingTest], list[str]]:
    """Correct p-values within each gate and give every test its status; return also what is to be supplied."""
    corrected: dict[int, float] = {}
    for gate in ("P", "Q1", "Q2"):
        chosen = [i for i, d in enumerate(drafts) if d.test.gate == gate and not math.isnan(d.test.p)]
        corrected |= dict(zip(chosen, holm([drafts[i].test.p for i in chosen]), strict=True))
    tests: list[GroundingTest] = []
    missing: list[str] = []
    few: dict[int, list[str]] = {}
    for i, draft in enumerate(drafts):
        test = _settle(draft, corrected.get(i, math.nan), settings)
        tests.append(test)
        if draft.supply and test.status != "PASS" and draft.supply not in missing:
            missing.append(draft.supply)
        if test.status == "INCONCLUSIVE" and not math.isnan(test.p) and test.n < settings.min_cases:
            few.setdefault(test.n, []).append(test.id)
    if few:
        counts = (f"{', '.join(ids)} {'has' if len(ids) == 1 else 'have'} {n}" for n, ids in few.items())
        missing.append(f"at least {settings.min_cases} cases ({'; '.join(counts)})")
    return tests, missing


def _settle(draft: Draft, corrected: float, settings: GroundingSettings) -> GroundingTest:
    test = replace(draft.test, p_corrected=corrected)
    status = draft.settled or _status(test, settings, may_fail=draft.may_fail)
    message = test.message or (draft.found if status == "PASS" else draft.missed)
    if status == "INCONCLUSIVE" and not test.message and not draft.settled:
        message = f"Not decided by {test.n} case{'' if test.n == 1 else 's'} (p = {corrected:.2g})."
        message += f" Not excluded: {draft.missed}" if draft.missed else ""
    return replace(test, status=status, message=message)


def _status(test: GroundingTest, settings: GroundingSettings, *, may_fail: bool) -> Status:
    if math.isnan(test.p):
        return "INCONCLUSIVE"
    if test.p_corrected < settings.alpha:
        return "PASS"
    return "FAIL" if may_fail and test.n >= settings.min_cases else "INCONCLUSIVE"
