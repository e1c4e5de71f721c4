"""The figures of a grounding report, and its numbers as curves: for the page and for TensorBoard alike."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from monai_xai.figures import (
    Line,
    Scene,
    draw_curves,
    draw_null,
    draw_planes,
    draw_spread,
    stamp,
)
from monai_xai.grounding import GroundedCase, Grounding, GroundingTest

STAMP = "ARTIFACT"
VERDICTS = (
    "ARTIFACT",
    "INCONCLUSIVE",
    "MODEL OK BUT MAP MISLEADING",
    "FAITHFUL BUT OFF TARGET",
    "GROUNDED",
)
_OF_ANOTHER_KIND = ("T11", "T12")  # a difference of groups, a correlation: no mean of what cases have
_AXES = {
    "deletion": ("share of the body taken away", "change of the score"),
    "insertion": ("share of the body put back", "gain of the score"),
    "cascade": ("layers drawn anew", "similarity to the map"),
}


def figures_of_grounding(grounding: Grounding) -> Iterator[tuple[str, Figure]]:
    """Yield name and figure of everything that can be drawn, for dark paper.

    ``test/<id>`` (the value against its null, or the spread over cases), ``curves/<group>``, and ``case/<number>`` (the
    map with outlines, with a stamp if the verdict is ARTIFACT). Names hold no case ids.

    Args:
        grounding: the verdict and what it rests on.
    """
    for test in grounding.tests:
        figure = figure_of_test(test)
        if figure is not None:
            yield f"test/{test.id}", figure
    for group in curve_groups(grounding):
        yield f"curves/{group}", figure_of_curves(grounding, group)
    for index, case in enumerate(grounding.cases):
        yield f"case/{index}", figure_of_case(grounding, case)


def scalars_of_grounding(grounding: Grounding) -> Iterator[tuple[str, float]]:
    """Yield name and value of every curve; what is not defined is left out.

    ``verdict`` counts from 0 (ARTIFACT) by way of INCONCLUSIVE, MODEL OK BUT MAP MISLEADING and FAITHFUL BUT OFF TARGET
    to 4 (GROUNDED). ``<id>/value``, ``<id>/p``, ``<id>/p_corrected``; ``<id>/passed`` is 1, 0, or 0.5 where it is open.

    Args:
        grounding: the verdict and what it rests on.
    """
    yield "verdict", float(VERDICTS.index(grounding.verdict))
    for test in grounding.tests:
        for name in ("value", "p", "p_corrected"):
            if math.isfinite(getattr(test, name)):
                yield f"{test.id}/{name}", float(getattr(test, name))
        if test.status != "NA":
            yield f"{test.id}/passed", {"PASS": 1.0, "FAIL": 0.0}.get(test.status, 0.5)


def figure_of_test(test: GroundingTest) -> Figure | None:
    """Return the value against its null, or the spread over cases where there is no null; None where all are alike."""
    if np.isfinite(test.null).any():
        return draw_null(test.null, test.value, title=f"{test.id}: what chance gives", what="found")
    values = [] if test.id in _OF_ANOTHER_KIND else list(test.per_case.values())
    if len(set(filter(math.isfinite, values))) > 1:
        return draw_spread(values, test.value, test.interval, title=f"{test.id}: a point per case")
    return None


def curve_groups(grounding: Grounding) -> list[str]:
    """Return what stands before the colon in the names of curves, in their order."""
    return list(dict.fromkeys(name.partition(":")[0].strip() for name in grounding.curves))


def figure_of_curves(grounding: Grounding, group: str) -> Figure:
    """Return the curves of one group in one plot."""
    lines = {}
    for name, curve in grounding.curves.items():
        kind, _, own = name.partition(":")
        if kind.strip() == group:
            x, y = _numbers(curve["x"]), _numbers(curve["y"])
            band = (_numbers(curve["low"]), _numbers(curve["high"])) if {"low", "high"} <= set(curve) else ()
            lines[own.strip() or group] = Line(x, y, *band)
    x_name, y_name = next((axes for word, axes in _AXES.items() if word in group), ("", ""))
    return draw_curves(lines, title=group, x_name=x_name, y_name=y_name)


def figure_of_case(grounding: Grounding, case: GroundedCase) -> Figure:
    """Return the map of a case in three planes (2D: one) with the outlines of finding and prediction.

    Raises:
        InputError: if image, map and masks do not fit together.
    """
    figure = draw_planes(scene_of_case(case))
    if grounding.verdict == STAMP:
        stamp(figure, STAMP)
    return figure


def scene_of_case(case: GroundedCase) -> Scene:
    """Return what is to be seen of a case; its name is not in it, so that no pixel tells it.

    Raises:
        InputError: if image, map and masks do not fit together.
    """
    return Scene(
        attribution=np.asarray(case.attribution)[None],
        image=np.asarray(case.image),
        title="Explanation, summed over channels" if len(case.image) > 1 else "Explanation",
        channels=() if len(case.image) > 1 else (case.name,),
        prediction=case.prediction,
        label=case.region,
        spacing=tuple(case.spacing) or None,
        affine=case.affine,
    )


def _numbers(values: object) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]  # type: ignore[attr-defined]
