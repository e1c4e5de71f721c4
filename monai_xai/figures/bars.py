"""Signed bar charts: the share of each modality, the contribution of each feature of a vector."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from monai_xai.errors import InputError
from monai_xai.explanation import ROUNDING_SHARE
from monai_xai.figures.colors import FAINT_INK, INK, NEGATIVE, POSITIVE
from monai_xai.figures.sheet import EDGE, LINE, SMALL, format_ticks, letters_in, signed, write_title

MOST_BARS = 30
BAR = 0.26
PLOT = 3.6
NUMBERS = 1.5
AXIS = 0.46


def draw_bars(
    values: NDArray[Any],
    names: Sequence[str],
    *,
    title: str = "",
    about: Sequence[str] = (),
    notes: Sequence[str] = (),
    unit: str = "contribution to the score",
    shares: bool = True,
) -> Figure:
    """Return a horizontal bar per value, to the right where it raises the score and to the left where it lowers it.

    Bars keep their order, so that they stand still when the reader moves through the epochs. Of more than thirty, the
    largest thirty are drawn and the sum of the others is named.

    Args:
        values: signed values, shape (K,).
        names: what each stands for.
        title: the case and what is shown, in a few words.
        about: lines below the title: target, method, score.
        notes: lines below the bars.
        unit: what a value means.
        shares: whether percentages of the sum of absolute values stand beside; only for values that may be added up.

    Raises:
        InputError: if there is nothing to draw, or not as many names as values.
    """
    if not len(names) or values.shape != (len(names),):
        found = f"{values.shape} and {len(names)} names"
        raise InputError(f"draw_bars() needs values and a name for each, got values of shape {found}.")
    kept = _largest(values)
    said = [*_left_out(values, kept, shares), *notes]
    shown, labels = values[kept], [textwrap.shorten(names[i], 28, placeholder="…") for i in kept]
    margin = 0.3 + 0.075 * max((len(label) for label in labels), default=0)
    width = max(6.4, EDGE + margin + PLOT + NUMBERS + EDGE)
    lines = [line for text in said for line in textwrap.wrap(text, letters_in(width))]
    below = AXIS + LINE * len(lines) + EDGE
    sheet, top = write_title(width, BAR * len(kept) + below, title, about)
    axes = sheet.axes(EDGE + margin, top, PLOT, BAR * len(kept))
    largest = float(np.abs(shown[np.isfinite(shown)]).max(initial=0.0)) or 1.0
    finite = np.nan_to_num(shown, nan=0.0, posinf=0.0, neginf=0.0)
    places = np.arange(len(kept))
    axes.barh(
        places, finite, height=0.7, color=[POSITIVE[1] if value > 0 else NEGATIVE[1] for value in finite]
    )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(-1.05 * largest, 1.05 * largest)
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.set_yticks(places, labels, size=SMALL + 1, color=INK)
    ticks = largest * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    numbers, factor = format_ticks(ticks)
    axes.set_xticks(ticks, numbers, size=SMALL, color=INK)
    axes.tick_params(length=2, color=INK)
    axes.set_xlabel(f"{unit}{factor}", size=SMALL, color=FAINT_INK, labelpad=2)
    total = np.abs(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)).sum()
    for place, value in enumerate(shown):
        words = _number_words(value, total if shares else 0.0)
        middle = top + BAR * (place + 0.5)
        sheet.text(EDGE + margin + PLOT + 0.12, middle, words, va="center", size=SMALL + 1)
    for number, line in enumerate(lines):
        sheet.text(EDGE, top + BAR * len(kept) + AXIS + LINE * number, line, color=FAINT_INK)
    return sheet.figure


def _largest(values: NDArray[Any]) -> NDArray[np.intp]:
    """Return the places of the largest values, in the order in which they stand."""
    sizes = np.abs(np.nan_to_num(values, nan=np.inf))
    return np.sort(np.argsort(-sizes, kind="stable")[:MOST_BARS])


def _left_out(values: NDArray[Any], kept: NDArray[np.intp], shares: bool) -> list[str]:
    others = np.delete(values, kept)
    if not others.size:
        return []
    total = f" with a sum of {signed(others.sum())}" if shares else ""
    return [f"The {len(kept)} largest of {len(values)}; {len(others)} others{total} are not drawn."]


def _number_words(value: float, total: float) -> str:
    if not np.isfinite(value):
        return "not finite"
    is_rounding = abs(value) <= ROUNDING_SHARE * total
    return signed(0.0 if is_rounding else value) + (f"  ({abs(value) / total:.0%})" if total else "")
