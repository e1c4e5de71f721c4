"""What the procedure takes and gives: cases and settings; tests, verdict, and what a page shows of a case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.files import plain
from monai_xai.tasks import Inputs, Label

Gate = Literal["P", "Q1", "Q2"]
Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "NA", "PROVISIONAL"]
Verdict = Literal[
    "GROUNDED", "FAITHFUL BUT OFF TARGET", "MODEL OK BUT MAP MISLEADING", "ARTIFACT", "INCONCLUSIVE"
]


@dataclass(frozen=True, eq=False)
class GroundingCase:
    """A case whose explanation is judged, a batch of one.

    Args:
        id: the case's name.
        inputs: as an explainer takes them, shape (1, C, *spatial) or (1, F).
        label: ground truth, if the target needs one.
        spacing: size of a voxel in millimeters, one per axis; None takes it from the image, else 1.
        correct: whether the network is right about it; None: not known. The location tests look at cases that are not
            known to be wrong.
    """

    id: str
    inputs: Inputs
    label: Label = None
    spacing: tuple[float, ...] | None = None
    correct: bool | None = None


_SHARES = {
    "met": "a share of the cases",
    "gain": "a share of what is attainable",
    "gain_alone": "a share of the change of the score",
    "attainable": "a share of the change of the score",
    "outside": "a share of the map",
    "top": "a share of the voxels",
    "residual": "a share of the change of the score",
    "collapse": "a share of the change of the score",
    "inside": "a share of the region",
    "until": "a share of the blocks",
}
_COUNTS = ("n_random", "n_shifts", "n_region_shifts", "gain_steps", "outside_cases")


@dataclass(frozen=True, eq=False)
class GroundingSettings:
    """Thresholds and effort of the procedure. What no literature settles is our own choice, and printed as such.

    Args:
        alpha: level of every test, after Holm's correction within a gate.
        min_cases: below this many cases a test that finds nothing is INCONCLUSIVE and not a FAIL, and no verdict is
            GROUNDED.
        unchanged: T2, T3: maps of random weights that are as similar as this are the same picture.
        little: T2: below this, the weights surely matter; that another training gives another map is then no failure,
            but for T5 to decide.
        same_class: T4: likewise for maps of two classes.
        met: P1, P2, P3: smallest share of the cases that must meet a precondition.
        errors: P2: by how many standard errors of the baseline's score the score must differ from it.
        moves: P3: smallest change of the score by random weights, as a share of the score.
        gap: T1: largest median completeness gap (Sundararajan et al. 2017).
        gain: T5: smallest mean gain over the map shifted, as a share (0 to 1) of what Integrated Gradients from the
            imputed image gain, or the map itself if that is more: with many cases the chance that a wrong map brushes
            the right place is significant, too.
        gain_steps: T5: steps of these Integrated Gradients; few are enough for an order.
        gain_alone: T5: what stands for their gain where network or imputer allows none, as a share of the change of
            the score.
        attainable: T5: smallest share of the change of the score, when all is imputed, that some order must gain, lest
            the imputer tells nothing.
        outside: T10: largest mean share of the map outside of the body. In small images a blurred baseline, which moves
            the edge of the body, may leave more than that there, see docs/how_to/ground.rst.
        outside_cases: T10: with fewer cases, more than that is INCONCLUSIVE and no FAIL; ``min_cases`` if that is less.
        top: T10: the highest voxels that are held against confounders, as a share of the body, or of the image for a
            confounder that reaches out of the body.
        residual: T13: largest share of the change of the score that Shapley values may miss.
        collapse: T13: a modality whose share is surely below this is hardly used.
        agreement: T12: smallest ICC(2,1) (Koo & Li 2016: good).
        min_places: T7: below this many places the region fills the body.
        inside: T7: which share of the region must stay inside the body where it is shifted.
        n_random: T2: how many randomized networks.
        block: T5, T6: edge of the blocks that are taken away, in voxels; None: a sixteenth of the longest edge.
        steps: T5: points of a deletion curve.
        until: T5: which share of the body is taken away in the end.
        imputers: what takes the place of what is taken away, by name; "mean" is the mean of the body.
        n_shifts: T5, T6: copies of the map shifted against itself, over which the mean is taken.
        n_orders: T5: random orders of blocks.
        controls: T5: whether edges (Sobel) and intensity are held against the map, too.
        insertion: T5: whether curves of insertion are drawn beside those of deletion.
        n_disturbed: T6: how often the input is disturbed.
        noise: T6, T12: noise of another acquisition, as a share of the standard deviation of each channel.
        n_region_shifts: T9: shifted copies of the region.
        n_draws: T7, T8: draws of a mean over the cohort.
        n_cascade: for how many cases the map is followed while layer after layer is randomized (a curve, no test).
        stop_early: whether no more is done once T2 shows that the map does not depend on the weights.
        seed: of everything that is drawn.
    """

    alpha: float = 0.05
    min_cases: int = 20
    unchanged: float = 0.9
    little: float = 0.8
    same_class: float = 0.9
    met: float = 0.5
    errors: float = 3.0
    moves: float = 1e-5
    gap: float = 0.05
    gain: float = 0.5
    gain_steps: int = 8
    gain_alone: float = 0.4
    attainable: float = 0.05
    outside: float = 0.1
    outside_cases: int = 5
    top: float = 0.1
    residual: float = 0.001
    collapse: float = 0.01
    agreement: float = 0.75
    min_places: int = 100
    inside: float = 0.95
    n_random: int = 3
    block: int | None = None
    steps: int = 25
    until: float = 0.3
    imputers: Mapping[str, BaselineLike | Literal["mean"]] = field(
        default_factory=lambda: {"mean": "mean", "blur": Blur()}
    )
    n_shifts: int = 2
    n_orders: int = 15
    controls: bool = True
    insertion: bool = True
    n_disturbed: int = 30
    noise: float = 0.1
    n_region_shifts: int = 4
    n_draws: int = 9999
    n_cascade: int = 3
    stop_early: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.imputers) < 2:
            raise InputError(
                "GroundingSettings(imputers=...) needs two or more: one of them alone may fool the network. "
                'Such as {"mean": "mean", "blur": Blur()}.'
            )
        for name, given in ((each.name, getattr(self, each.name)) for each in fields(self)):
            if isinstance(given, float) and not math.isfinite(given):
                raise InputError(f"GroundingSettings({name}={given}) must be a finite number.")
            if name in _SHARES and not 0 <= given <= 1:
                raise InputError(f"GroundingSettings({name}={given}) is {_SHARES[name]}, from 0 to 1.")
            if name in _COUNTS and not (isinstance(given, int) and given >= 1):
                raise InputError(f"GroundingSettings({name}={given}) must be a whole number, 1 or more.")
        if not 0 < self.alpha < 1:
            raise InputError(f"GroundingSettings(alpha={self.alpha}) must lie between 0 and 1.")
        if not self.top:
            raise InputError("GroundingSettings(top=0) leaves no voxels to hold against confounders.")

    @classmethod
    def quick(cls, **settings: Any) -> GroundingSettings:
        """Return settings with a tenth of the effort: no reported controls and insertion, fewer networks and steps."""
        few = {"n_random": 1, "steps": 12, "n_shifts": 1, "n_orders": 0, "controls": False, "insertion": False,
               "n_disturbed": 12, "n_region_shifts": 2, "n_draws": 1999, "n_cascade": 1}  # fmt: skip
        return cls(**{**few, **settings})


@dataclass(frozen=True, eq=False)
class GroundingTest:
    """One test of an explanation: what was measured, what chance gives, and what follows.

    Attributes:
        id: name of the test in the procedure, "T5".
        title: what it asks, in a few words.
        gate: "P" (preconditions), "Q1" (does the map describe the model?), "Q2" (is it relevant?).
        value: the figure, a mean or a median over cases as the title says; NaN where undefined.
        interval: 95 % confidence interval of the value; NaN where there is none.
        null: what chance gives, for the plot; empty where there is no null.
        p: one-sided p-value; NaN where there is none.
        p_corrected: the same after Holm's correction within the gate.
        n: number of cases.
        threshold: the rule, as it is printed ("p < 0.05").
        origin: where the rule comes from: "[L] source" for literature, "[E]" for our default.
        status: PASS, FAIL, INCONCLUSIVE, NA, or PROVISIONAL (a pass that something supplied would settle).
        message: what follows, or what to supply.
        per_case: value by case id.
    """

    id: str
    title: str
    gate: Gate
    value: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    null: tuple[float, ...] = ()
    p: float = math.nan
    p_corrected: float = math.nan
    n: int = 0
    threshold: str = ""
    origin: str = "[E]"
    status: Status = "NA"
    message: str = ""
    per_case: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """This test as numbers, text, lists and dicts, ready for JSON (undefined numbers are None)."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True, eq=False)
class GroundedCase:
    """What a page shows of one case.

    Attributes:
        id: the case's name.
        image: the first image that was explained, (C, *spatial).
        attribution: its map with signs, summed over channels, (*spatial).
        region: the marked finding, bool (*spatial); None if none was given.
        prediction: the predicted mask, bool (*spatial); None for networks that predict no mask.
        spacing: size of a voxel in millimeters, one per axis.
        score: what was explained.
        baseline_score: the score at the attributor's baseline; NaN if it has none.
        values: this case's value by id of the test.
        affine: voxels of the image to millimeters (RAS), shape (4, 4) or (3, 3); None where nothing is known.
        name: of the image among the inputs.
        further: the other images, such as a PET beside a CT, with their maps; masks only where they lie on the grid of
            the first one. These have no id.
    """

    id: str
    image: np.ndarray
    attribution: np.ndarray
    region: np.ndarray | None
    prediction: np.ndarray | None
    spacing: tuple[float, ...]
    score: float
    baseline_score: float
    values: Mapping[str, float]
    affine: np.ndarray | None = None
    name: str = "image"
    further: tuple[GroundedCase, ...] = ()


@dataclass(frozen=True, eq=False)
class Grounding:
    """A verdict on the explanations of one network over a cohort, and everything that it rests on.

    Attributes:
        verdict: GROUNDED, FAITHFUL BUT OFF TARGET, MODEL OK BUT MAP MISLEADING, ARTIFACT or INCONCLUSIVE.
        sentence: the verdict in one sentence, with its reason.
        tests: every test in the order of the procedure, also those that could not be done.
        missing: what to supply so that the open tests can be done.
        cases: what a page shows of each case.
        curves: by name ("deletion, imputed by blur: map", "insertion, imputed by blur: map shifted",
            "cascade: pearson", ...) a mapping of "x" and "y" to lists of equal length, means over cases; from 5 cases
            on with "low" and "high", 95 % bootstrap bands.
        configuration: thresholds, seeds, versions, method, target.
        places: which share of the evidence (the positive map, of a regression its magnitude) lies where, the mean over
            cases: in the finding, in named structures, in the body elsewhere, outside of it.
    """

    verdict: Verdict
    sentence: str
    tests: tuple[GroundingTest, ...]
    missing: tuple[str, ...] = ()
    cases: tuple[GroundedCase, ...] = ()
    curves: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, float] = field(default_factory=dict)

    def test(self, name: str) -> GroundingTest:
        """The test of this id ("T5").

        Raises:
            KeyError: if there is no such test.
        """
        for test in self.tests:
            if test.id == name:
                return test
        raise KeyError(f"no test {name!r}; there are {[test.id for test in self.tests]}")

    def as_dict(self) -> dict[str, Any]:
        """Verdict, tests, curves and configuration, ready for JSON (images are left out)."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "tests": [test.as_dict() for test in self.tests],
            "missing": list(self.missing),
            "cases": [
                {
                    "id": case.id,
                    "spacing": plain(case.spacing),
                    "score": plain(case.score),
                    "baseline_score": plain(case.baseline_score),
                    "values": plain(case.values),
                }
                for case in self.cases
            ],
            "curves": plain(self.curves),
            "configuration": plain(self.configuration),
            "places": plain(self.places),
        }
