"""Evidence as pictures: a value against chance, its spread over cases, curves with bands; a stamp, and white paper."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from monai_xai.errors import InputError
from monai_xai.figures.colors import FAINT_INK, INK, NEGATIVE, PAPER, POSITIVE
from monai_xai.figures.sheet import EDGE, LINE, SMALL, Sheet, letters_in, rasterize, write_title

PLOT_WIDTH = 3.1
PLOT_HEIGHT = 1.0
CURVES_HEIGHT = 2.4
LEFT = 0.55
AXIS = 0.42
BARS = 40
SHARP = 160
COLORS = (
    tuple(POSITIVE[1]),
    tuple(NEGATIVE[1]),
    (0.55, 0.62, 0.20),
    (0.65, 0.40, 0.75),
    (0.30, 0.62, 0.58),
    (0.55, 0.55, 0.55),
)
STAMP_COLOR = (1.0, 0.15, 0.1)


class Line(NamedTuple):
    """One curve.

    Args:
        x: places, shape (S,).
        y: values, shape (S,); those that are not finite are left out.
        low: lower end of its band, shape (S,); empty where there is none.
        high: upper end.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def draw_null(
    null: Sequence[float], value: float, *, title: str = "", unit: str = "", what: str = "this cohort"
) -> Figure:
    """Return a histogram of what chance gives, with the value that was found as a line.

    Args:
        null: values under the null, shape (K,).
        value: what was found.
        title: what is shown.
        unit: of the values.
        what: the word at the line.

    Raises:
        InputError: if no value of the null is finite.
    """
    drawn = _finite(null)
    if not drawn.size:
        raise InputError("draw_null() needs at least one finite value of the null.")
    sheet, axes, top = _plot(title, PLOT_HEIGHT)
    axes.hist(drawn, bins=_bins(drawn, value).tolist(), color=FAINT_INK)
    _mark(sheet, axes, value, what, top)
    _label(axes, unit, "draws")
    return sheet.figure


def draw_spread(
    values: Sequence[float], value: float, interval: tuple[float, float], *, title: str = "", unit: str = ""
) -> Figure:
    """Return a point per case, with the value of the cohort and its interval.

    Args:
        values: one per case, shape (N,).
        value: of the cohort.
        interval: its confidence interval, NaN where there is none.
        title: what is shown.
        unit: of the values.

    Raises:
        InputError: if no value is finite.
    """
    points = _finite(values)
    if not points.size:
        raise InputError("draw_spread() needs at least one finite value.")
    sheet, axes, top = _plot(title, PLOT_HEIGHT)
    heights = np.random.default_rng(0).uniform(-0.3, 0.3, points.size)
    axes.scatter(points, heights, s=10, color=tuple(NEGATIVE[1]), linewidths=0, alpha=0.8)
    if np.isfinite(interval).all():
        axes.plot(interval, [0, 0], color=INK, linewidth=2)
    axes.set_ylim(-0.6, 0.6)
    _mark(sheet, axes, value, "cohort", top)
    _label(axes, unit, "")
    axes.set_yticks([])
    return sheet.figure


def draw_curves(lines: Mapping[str, Line], *, title: str = "", x_name: str = "", y_name: str = "") -> Figure:
    """Return curves in one plot, each with its band if it has one; names stand below.

    Args:
        lines: curves by name.
        title: what is shown.
        x_name: of the horizontal axis.
        y_name: of the vertical axis.

    Raises:
        InputError: if there is no curve.
    """
    if not lines:
        raise InputError("draw_curves() needs at least one curve.")
    names = [f"- {name}" for name in lines]
    sheet, axes, top = _plot(title, CURVES_HEIGHT, len(names), 4.6)
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        style = ("solid", "dashed", "dotted")[number // len(COLORS) % 3]
        look: dict[str, Any] = {"color": color, "linestyle": style, "linewidth": 1.3 if number else 2.2}
        axes.plot(line.x, line.y, marker=".", markersize=3, **look)
        if len(line.low) and len(line.high):
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.25, linewidth=0)
        beside = top + CURVES_HEIGHT + AXIS + LINE * number
        sheet.text(LEFT, beside, "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 2, color=color)
        sheet.text(LEFT + 0.35, beside, textwrap.shorten(name, 70, placeholder="…"))
    _label(axes, x_name, y_name)
    return sheet.figure


def stamp(figure: Figure, words: str) -> None:
    """Burn words across every picture of a figure that shows a map; scales and legends are left alone.

    Args:
        figure: of :func:`~monai_xai.figures.draw_planes` or :func:`~monai_xai.figures.draw_montage`.
        words: a few, in capitals.
    """
    canvas = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        width, height = np.array(axes.get_position().bounds[2:]) * canvas / figure.dpi
        if not axes.images or width < 0.3:  # narrower: a color bar
            continue
        angle = float(np.degrees(np.arctan2(height, width))) * 0.8
        length = float(np.hypot(width, height)) * 0.75
        axes.text(
            0.5, 0.5, words, transform=axes.transAxes, rotation=angle, rotation_mode="anchor", ha="center", va="center",
            size=max(7.0, min(30.0, 72 * length / (0.7 * len(words)))), color=STAMP_COLOR, weight="bold", alpha=0.9,
            clip_on=True, parse_math=False, path_effects=[withStroke(linewidth=2.5, foreground="black")],
        )  # fmt: skip


def rasterize_on_white(figure: Figure, *, keep_pictures: bool = False) -> NDArray[np.uint8]:
    """Return a figure for white paper as RGB pixels, shape (height, width, 3), sharp enough for print.

    Lightness is turned around, hue and strength of colors stay.

    Args:
        figure: drawn for the dark.
        keep_pictures: whether what is inside of axes stays as it is: anatomy is never turned into its negative.
    """
    figure.set_dpi(SHARP)
    with _any_letter():
        pixels = rasterize(figure)
    turned = _turn(pixels)
    if keep_pictures:
        height, width = pixels.shape[:2]
        for axes in (axes for axes in figure.axes if axes.images):  # others are words and legends
            left, bottom, wide, tall = axes.get_position().bounds
            rows = slice(max(0, round((1 - bottom - tall) * height)), round((1 - bottom) * height))
            columns = slice(max(0, round(left * width)), round((left + wide) * width))
            turned[rows, columns] = pixels[rows, columns]
    return turned


@contextmanager
def _any_letter() -> Iterator[None]:
    """Draw letters that the font does not have as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _turn(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels with the lightness (of HSL) turned around and the paper white."""
    values = pixels.astype(np.float32) / 255.0
    turned = values + 1.0 - values.max(-1, keepdims=True) - values.min(-1, keepdims=True)
    white = 1.0 - max(PAPER)
    return np.round(255 * np.clip(turned / white, 0.0, 1.0)).astype(np.uint8)


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64).ravel()
    return found[np.isfinite(found)]


def _bins(null: NDArray[np.float64], value: float) -> NDArray[np.float64]:
    """Return edges of bars over the null, of equal width; a constant null gets one bar that can be seen."""
    low, high = float(null.min()), float(null.max())
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        reach = abs(value - low) if np.isfinite(value) and value != low else max(abs(low), 1.0)
        return np.array([low - 0.02 * reach, low + 0.02 * reach])
    return np.linspace(low, high, min(BARS, max(5, int(np.sqrt(null.size)))) + 1)


def _plot(title: str, height: float, lines: int = 0, width: float = PLOT_WIDTH) -> tuple[Sheet, Axes, float]:
    """Return a sheet with bare axes, and where they begin; ``lines`` of text fit below."""
    below = 0.18 + height + AXIS + LINE * lines + EDGE
    whole = LEFT + width + 0.25
    short = textwrap.shorten(title, letters_in(whole) - 12, placeholder="…")
    sheet, top = write_title(whole, below, short, ())
    top += 0.18
    axes = sheet.axes(LEFT, top, width, height)
    axes.patch.set_visible(False)
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(FAINT_INK)
    return sheet, axes, top


def _mark(sheet: Sheet, axes: Axes, value: float, what: str, top: float) -> None:
    """Draw the value as a line with its number above it."""
    if not np.isfinite(value):
        sheet.text(LEFT, top - 0.17, f"{what}: n/a", color=FAINT_INK)
        return
    axes.axvline(value, color=tuple(POSITIVE[1]), linewidth=2)
    axes.margins(x=0.06)
    axes.autoscale_view()
    low, high = axes.get_xlim()
    place = LEFT + PLOT_WIDTH * (value - low) / ((high - low) or 1.0)
    side = "left" if value < (low + high) / 2 else "right"
    sheet.text(place, top - 0.17, f"{what}: {value:.3g}", color=tuple(POSITIVE[1]), ha=side)


def _label(axes: Axes, x_name: str, y_name: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(length=2, color=FAINT_INK, labelcolor=INK, labelsize=SMALL)
    style: dict[str, Any] = {"size": SMALL, "color": FAINT_INK, "parse_math": False}
    axes.set_xlabel(x_name, labelpad=2, **style)
    axes.set_ylabel(y_name, labelpad=2, **style)
