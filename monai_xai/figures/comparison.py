"""Methods side by side: a row per method, with a mark for its value, its interval, and a point per case."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monai_xai.errors import InputError
from monai_xai.figures.colors import FAINT_INK, INK, NEGATIVE, POSITIVE
from monai_xai.figures.sheet import EDGE, SMALL, letters_in, write_title

ROW = 0.27
PLOT = 3.6
NUMBERS = 1.9
AXIS = 0.46
MOST_LETTERS = 34


class Entry(NamedTuple):
    """One row.

    Args:
        label: name of the method.
        value: what is marked; NaN where there is none.
        low: lower end of its interval; NaN where there is none.
        high: upper end.
        points: one value per case; empty where there are none.
        note: words behind the number.
    """

    label: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    points: Sequence[float] = ()
    note: str = ""


def draw_methods(
    entries: Sequence[Entry], *, title: str = "", about: Sequence[str] = (), unit: str = "", best: int = -1
) -> Figure:
    """Return rows of values with intervals, in the order given.

    Args:
        entries: a row each.
        title: what is shown.
        about: lines below the title.
        unit: of the values.
        best: index of the row that is highlighted.

    Raises:
        InputError: if there is no row.
    """
    if not entries:
        raise InputError("draw_methods() needs at least one entry.")
    labels = [textwrap.shorten(entry.label, MOST_LETTERS, placeholder="…") for entry in entries]
    margin = 0.2 + 0.075 * max(map(len, labels))
    height = ROW * len(entries)
    width = 2 * EDGE + margin + PLOT + NUMBERS
    short = textwrap.shorten(title, letters_in(width) - 16, placeholder="…")
    sheet, top = write_title(width, height + AXIS + EDGE, short, about)
    axes = sheet.axes(EDGE + margin, top, PLOT, height)
    axes.patch.set_visible(False)
    for row, (label, entry) in enumerate(zip(labels, entries, strict=True)):
        middle = top + ROW * (row + 0.5)
        color = tuple(POSITIVE[1]) if row == best else tuple(NEGATIVE[1])
        weight = "bold" if row == best else "normal"
        points = np.asarray(entry.points, dtype=np.float64)
        points = points[np.isfinite(points)]
        axes.axhline(row, color=FAINT_INK, linewidth=0.3, alpha=0.5)
        axes.plot(points, np.full(len(points), row), ".", color=FAINT_INK, markersize=4)
        if np.isfinite([entry.low, entry.high]).all():
            axes.plot([entry.low, entry.high], [row, row], color=color, linewidth=2)
        if np.isfinite(entry.value):
            axes.plot(entry.value, row, "o", color=color, markersize=6)
        sheet.text(EDGE + margin - 0.08, middle, label, va="center", ha="right", weight=weight)
        number = f"{entry.value:.3g}" if np.isfinite(entry.value) else "n/a"
        words = f"{number} {entry.note}".strip()
        sheet.text(EDGE + margin + PLOT + 0.12, middle, words, va="center", weight=weight)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.margins(x=0.05)
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(FAINT_INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", length=2, color=FAINT_INK, labelcolor=INK, labelsize=SMALL)
    style: dict[str, Any] = {"size": SMALL, "color": FAINT_INK, "labelpad": 2, "parse_math": False}
    axes.set_xlabel(unit, **style)
    return sheet.figure
