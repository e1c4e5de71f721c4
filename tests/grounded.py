"""Groundings made by hand, for tests of the report and of what TensorBoard shows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from monai_xai.grounding import GroundedCase, Grounding, GroundingTest

GATES = {
    "P1": "P",
    "T1": "Q1",
    "T2": "Q1",
    "T5": "Q1",
    "T6": "Q1",
    "T7": "Q2",
    "T8": "Q2",
    "T9": "Q2",
    "T12": "Q2",
}
CASES = ("patient26", "patient07")


def grounding(
    verdict: Any = "GROUNDED", *, cases: tuple[Any, ...] = CASES, dimensions: int = 2, **changes: Any
) -> Grounding:
    """Return results in which all tests pass but T8, which is open, and T12, which was not done.

    Cases are names, or made already.
    """
    made = [a_case(case, dimensions, i) if isinstance(case, str) else case for i, case in enumerate(cases)]
    names = tuple(case.id for case in made)
    values: dict[str, Any] = {
        "verdict": verdict,
        "sentence": "Every test that was done passed.",
        "tests": tuple(a_test(name, names) for name in GATES),
        "missing": ("Masks of at least 20 patients, for T8.",),
        "cases": tuple(made),
        "curves": {
            "deletion: map": {"x": (0.0, 0.5, 1.0), "y": (1.0, 0.2, 0.0)},
            "deletion: map shifted": {"x": (0.0, 0.5, 1.0), "y": (1.0, 0.8, 0.0)},
            "deletion: random": {
                "x": (0.0, 0.5, 1.0), "y": (1.0, 0.6, 0.0), "low": (1.0, 0.5, 0.0), "high": (1.0, 0.7, 0.0),
            },
            "cascade: pearson": {"x": (0, 1, 2), "y": (1.0, 0.5, math.nan)},
        },
        "configuration": {
            "target": "ClassScore(class_index=1)", "method": "IntegratedGradients(n_steps=32)", "seed": 0,
            "thresholds": {"T2": 0.9}, "versions": {"torch": "2.13.0", "monai_xai": "0.1.0"},
        },
    }  # fmt: skip
    return Grounding(**(values | changes))


def a_test(name: str, cases: tuple[str, ...], **changes: Any) -> GroundingTest:
    """Return a test that passed; T8 is open and T12 not done."""
    rng = np.random.default_rng(len(name))
    per_case = {case: float(value) for case, value in zip(cases, rng.normal(1, 0.3, len(cases)), strict=True)}
    status = {"T8": "INCONCLUSIVE", "T12": "NA"}.get(name, "PASS")
    values: dict[str, Any] = {
        "id": name,
        "title": f"Title of {name}",
        "gate": GATES.get(name, "Q1"),
        "value": float(np.mean(list(per_case.values()))) if per_case else math.nan,
        "interval": (0.7, 1.3),
        "null": tuple(rng.normal(0, 0.3, 400)) if name in ("T7", "T8") else (),
        "p": 0.0123,
        "p_corrected": 0.0246,
        "n": len(cases),
        "threshold": "p < 0.05",
        "origin": "[E]",
        "status": status,
        "message": f"Message of {name}",
        "per_case": per_case,
    }
    if status == "NA":
        values |= {
            "value": math.nan, "interval": (math.nan, math.nan), "p": math.nan, "p_corrected": math.nan,
            "per_case": {}, "n": 0,
        }  # fmt: skip
    return GroundingTest(**(values | changes))


def a_case(name: str, dimensions: int = 2, number: int = 0, **changes: Any) -> GroundedCase:
    """Return a case whose map lies in the marked finding."""
    shape = (32, 40) if dimensions == 2 else (24, 28, 10)
    rng = np.random.default_rng(number)
    region = np.zeros(shape, bool)
    region[tuple(slice(n // 3, n // 2) for n in shape)] = True
    noise = rng.normal(0, 0.1, shape)
    values: dict[str, Any] = {
        "id": name,
        "image": (noise + region)[None].astype(np.float32),
        "attribution": noise * 0.5 + region,
        "region": region,
        "prediction": np.roll(region, 1, 0),
        "spacing": (1.0, 1.0) if dimensions == 2 else (1.0, 1.0, 3.0),
        "score": 3.25 + number,
        "baseline_score": -1.5,
        "values": {"T2": 0.21, "T5": 0.4, "T7": 0.61},
    }
    return GroundedCase(**(values | changes))
