"""Modalities as pictures: a waterfall from baseline to prediction, interactions, and their spread over a cohort."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from monai_xai.errors import InputError
from monai_xai.figures.colors import BAR_NEGATIVE, BAR_POSITIVE, FAINT_INK, INK, NEGATIVE, PAPER, POSITIVE
from monai_xai.figures.sheet import EDGE, LINE, SMALL, Sheet, format_ticks, letters_in, signed, write_title

ROW = 0.3
PLOT = 4.2
NUMBERS = 1.5
AXIS = 0.46
CELL = 0.62

_DIVERGING = LinearSegmentedColormap.from_list(
    "interactions", [tuple(NEGATIVE[1]), (0.16, 0.16, 0.18), tuple(POSITIVE[1])]
)


class Step(NamedTuple):
    """One bar of a waterfall.

    Args:
        label: the modality or variable, with its raw value, unit and reference range.
        value: signed, in units of the score.
        error: standard error of the value; 0 where it is exact.
        is_part: whether it is a part of the modality above, and drawn fainter below it.
    """

    label: str
    value: float
    error: float = 0.0
    is_part: bool = False


def draw_waterfall(
    steps: Sequence[Step],
    start: float,
    end: float,
    *,
    title: str = "",
    about: Sequence[str] = (),
    notes: Sequence[str] = (),
    unit: str = "score",
) -> Figure:
    """Return the way from the baseline score to the score, a bar for each modality.

    Parts of a modality stand below it and begin where it begins.

    Args:
        steps: modalities in the order of their inputs, each followed by its parts.
        start: score with all modalities at their baseline.
        end: score of the case.
        title: the case and what is shown.
        about: lines below the title.
        notes: lines below the bars.
        unit: of the score.

    Raises:
        InputError: if there is nothing to draw.
    """
    if not steps:
        raise InputError("draw_waterfall() needs at least one step.")
    sheet, top, margin = _open([step.label for step in steps], len(steps) + 2, title, about, notes, ROW)
    axes = sheet.axes(EDGE + margin, top, PLOT, ROW * (len(steps) + 2))
    positions = _positions(steps, start)
    ends = [
        right + sign * step.error
        for step, (_, right) in zip(steps, positions, strict=True)
        for sign in (-1, 1)
    ]
    reached = [start, end, *ends, *(left for left, _ in positions)]
    low, high = min(reached), max(reached)
    room = 0.06 * (high - low) or 1.0
    for row, (step, (left, right)) in enumerate(zip(steps, positions, strict=True), start=1):
        color = BAR_POSITIVE if step.value > 0 else BAR_NEGATIVE
        axes.barh(row, right - left, left=left, height=0.4 if step.is_part else 0.66, color=color)
        if step.error:
            axes.errorbar(right, row, xerr=step.error, color=INK, elinewidth=1, capsize=2)
        if not step.is_part:
            axes.plot([right, right], [row, row + 1], color=FAINT_INK, linewidth=0.6, linestyle=":")
        words = signed(step.value) + (f" ± {step.error:.1g}" if step.error else "")
        sheet.text(
            EDGE + margin + PLOT + 0.12,
            top + ROW * (row + 0.5),
            words,
            va="center",
            size=SMALL + (not step.is_part),
        )
    for row, value, word in ((0, start, "baseline"), (len(steps) + 1, end, "this case")):
        axes.plot([value, value], [row - 0.36, row + 0.36], color=INK, linewidth=2)
        sheet.text(
            EDGE + margin + PLOT + 0.12, top + ROW * (row + 0.5), f"{value:.4g}", va="center", weight="bold"
        )
        sheet.text(
            EDGE + margin - 0.08, top + ROW * (row + 0.5), word, va="center", ha="right", weight="bold"
        )
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(len(steps) + 1.5, -0.5)
    for row, step in enumerate(steps, start=1):
        style = {"color": FAINT_INK} if step.is_part else {"size": SMALL + 1}
        label = textwrap.shorten(step.label, 58, placeholder="…")
        sheet.text(EDGE + margin - 0.08, top + ROW * (row + 0.5), label, va="center", ha="right", **style)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", length=2, color=INK, labelcolor=INK, labelsize=SMALL)
    axes.set_xlabel(unit, size=SMALL, color=FAINT_INK, labelpad=2)
    return sheet.figure


def draw_interactions(
    values: NDArray[Any],
    interactions: NDArray[Any],
    names: Sequence[str],
    *,
    title: str = "",
    about: Sequence[str] = (),
    note: str = "diagonal: Shapley value; beside: interaction, red where two together raise the score by more than "
    "each alone, blue where by less",
) -> Figure:
    """Return a heat map: what each modality contributes on the diagonal, what pairs do together beside it.

    Args:
        values: Shapley values, shape (M,).
        interactions: Shapley interaction index, shape (M, M).
        names: of the modalities.
        title: the case and what is shown.
        about: lines below the title.
        note: what the colors mean.
    """
    count = len(names)
    table = interactions + np.diag(values)
    limit = float(np.abs(table).max()) or 1.0
    margin = 0.3 + 0.075 * max(map(len, names))
    below = CELL * count + 0.3 + 2 * LINE + EDGE
    width = max(6.4, 2 * EDGE + margin + CELL * count)
    sheet, top = write_title(width, below, title, about)
    axes = sheet.axes(EDGE + margin, top, CELL * count, CELL * count)
    axes.imshow(table, cmap=_DIVERGING, vmin=-limit, vmax=limit)
    for i in range(count):
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=PAPER, linewidth=2))
        middle = top + CELL * (i + 0.5)
        name = textwrap.shorten(names[i], 28, placeholder="…")
        sheet.text(EDGE + margin - 0.08, middle, name, va="center", ha="right", size=SMALL + 1)
        sheet.text(
            EDGE + margin + CELL * (i + 0.5),
            top + CELL * count + 0.06,
            textwrap.shorten(name, 10, placeholder="…"),
            ha="center",
        )
        for j in range(count):
            style = {"weight": "bold"} if i == j else {}
            sheet.text(
                EDGE + margin + CELL * (j + 0.5),
                middle,
                signed(table[i, j], 2),
                va="center",
                ha="center",
                **style,
            )
    for number, line in enumerate(textwrap.wrap(note, letters_in(width))):
        sheet.text(EDGE, top + CELL * count + 0.3 + LINE * number, line, color=FAINT_INK)
    return sheet.figure


def draw_cohort(
    values: NDArray[Any],
    names: Sequence[str],
    intervals: NDArray[Any],
    *,
    title: str = "",
    about: Sequence[str] = (),
    notes: Sequence[str] = (),
    unit: str = "contribution to the score",
) -> Figure:
    """Return a beeswarm: a point per case, with mean and confidence interval of each modality.

    Args:
        values: shape (cases, M).
        names: of the modalities.
        intervals: lower and upper end of the confidence interval of the mean, shape (M, 2); NaN where there is none.
        title: what is shown.
        about: lines below the title.
        notes: lines below the plot.
        unit: of the values.
    """
    height = 0.5
    said = [_mean_words(float(values[:, m].mean()), *intervals[m]) for m in range(len(names))]
    room = 0.12 + 0.072 * max(map(len, said), default=0)
    sheet, top, margin = _open(names, len(names), title, about, notes, height, max(NUMBERS, room))
    axes = sheet.axes(EDGE + margin, top, PLOT, height * len(names))
    axes.axvline(0, color=FAINT_INK, linewidth=0.8)
    limit = 1.08 * float(np.abs(values).max(initial=0.0)) or 1.0
    for m, name in enumerate(names):
        column = values[:, m]
        colors = [POSITIVE[1] if value > 0 else NEGATIVE[1] for value in column]
        axes.scatter(column, m + _swarm(column, limit), s=9, c=colors, linewidths=0, alpha=0.9)
        mean, (low, high) = float(column.mean()), intervals[m]
        if np.isfinite([low, high]).all():
            axes.plot([low, high], [m, m], color=INK, linewidth=1.6)
        axes.plot([mean, mean], [m - 0.22, m + 0.22], color=INK, linewidth=1.6)
        middle = top + height * (m + 0.5)
        label = textwrap.shorten(name, 58, placeholder="…")
        sheet.text(EDGE + margin - 0.08, middle, label, va="center", ha="right", size=SMALL + 1)
        sheet.text(EDGE + margin + PLOT + 0.12, middle, said[m], va="center")
    axes.set_xlim(-limit, limit)
    axes.set_ylim(len(names) - 0.5, -0.5)
    ticks = limit / 1.08 * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    numbers, factor = format_ticks(ticks)
    axes.set_xticks(ticks, numbers, size=SMALL, color=INK)
    axes.tick_params(length=2, color=INK)
    axes.set_xlabel(f"{unit}{factor}", size=SMALL, color=FAINT_INK, labelpad=2)
    return sheet.figure


def _mean_words(mean: float, low: float, high: float) -> str:
    return signed(mean) + (
        f"  [{signed(low, 2)}, {signed(high, 2)}]" if np.isfinite([low, high]).all() else ""
    )


def _open(
    labels: Sequence[str],
    rows: int,
    title: str,
    about: Sequence[str],
    notes: Sequence[str],
    height: float,
    numbers: float = NUMBERS,
) -> tuple[Sheet, float, float]:
    """Return a sheet with title and notes for rows with labels, where the rows begin, and the width of labels.

    ``numbers`` is the width of what stands to the right of the rows.
    """
    margin = 0.3 + 0.068 * min(58, max((len(label) for label in labels), default=0))
    margin = max(margin, 1.0)
    width = max(6.4, EDGE + margin + PLOT + numbers + EDGE)
    lines = [line for text in notes for line in textwrap.wrap(text, letters_in(width))]
    sheet, top = write_title(width, height * rows + AXIS + LINE * len(lines) + EDGE, title, about)
    for number, line in enumerate(lines):
        sheet.text(EDGE, top + height * rows + AXIS + LINE * number, line, color=FAINT_INK)
    return sheet, top, margin


def _positions(steps: Sequence[Step], start: float) -> list[tuple[float, float]]:
    """Return where each bar begins and ends; parts begin where their modality begins."""
    found, at, inner = [], start, start
    for step in steps:
        if step.is_part:
            found.append((inner, inner + step.value))
            inner += step.value
        else:
            found.append((at, at + step.value))
            inner, at = at, at + step.value
    return found


def _swarm(column: NDArray[Any], limit: float) -> NDArray[Any]:
    """Return how far points are moved off their line so that they do not cover each other."""
    order = np.argsort(column, kind="stable")
    bins = np.floor(column / limit * 30).astype(int)
    moved = np.zeros(len(column))
    seen: dict[int, int] = {}
    for i in order:
        turn = seen.get(bins[i], 0)
        seen[bins[i]] = turn + 1
        moved[i] = (1 if turn % 2 else -1) * ((turn + 1) // 2) * 0.07
    return np.clip(moved, -0.4, 0.4)
