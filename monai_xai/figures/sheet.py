"""The paper that figures are drawn on: sizes in inches, a title, numbers, pixels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from monai_xai.figures.colors import FAINT_INK, INK, PAPER

DPI = 100
EDGE = 0.12
LINE = 0.17
SMALL = 8
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Sheet:
    """A figure on which things are placed in inches from the top left corner."""

    figure: Figure
    width: float
    height: float

    @classmethod
    def of(cls, width: float, height: float) -> Sheet:
        """Return an empty sheet; it belongs to no global state and is freed like any object."""
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
        FigureCanvasAgg(figure)
        return cls(figure, width, height)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return bare axes of the given size."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box, facecolor="black")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def text(self, left: float, top: float, words: str, **style: Any) -> None:
        """Write a line; ``top`` is its upper edge unless ``va`` says otherwise."""
        plain: dict[str, Any] = {"size": SMALL, "color": INK, "va": "top", "parse_math": False}
        drawable = words.encode(
            "utf-8", "replace"
        ).decode()  # halves of letters, as broken file names have them
        self.figure.text(left / self.width, 1 - top / self.height, drawable, **(plain | style))


def write_title(width: float, below: float, title: str, about: Sequence[str]) -> tuple[Sheet, float]:
    """Return a sheet with a title and the lines about it.

    Args:
        width: of the sheet, in inches.
        below: what is needed below the title, in inches.
        title: one line.
        about: lines that are broken where the sheet ends.

    Returns:
        the sheet, and where the title ends.
    """
    lines = [
        line for text in about for line in textwrap.wrap(text, letters_in(width), subsequent_indent="    ")
    ]
    top = EDGE + 0.24 + LINE * len(lines) + 0.08
    sheet = Sheet.of(width, top + below)
    sheet.text(EDGE, EDGE, title, size=11, weight="bold")
    for number, line in enumerate(lines):
        sheet.text(EDGE, EDGE + 0.24 + LINE * number, line, color=FAINT_INK)
    return sheet, top


def letters_in(inches: float) -> int:
    """Return how many small letters fit."""
    return max(8, int(inches * DPI / 6.2))


def signed(value: float, digits: int = 3) -> str:
    """Return a number with its sign; 0 has none."""
    return f"{value:+.{digits}g}" if value else "0"


def format_ticks(ticks: NDArray[np.float64]) -> tuple[list[str], str]:
    """Return signed numbers of two digits and, for the name of the axis, the power of ten that was taken out."""
    largest = float(np.abs(ticks).max())
    power = int(np.floor(np.log10(largest))) if largest else 0
    power = 0 if -2 <= power <= 2 else power
    factor = f", in 10{str(power).translate(SUPERSCRIPTS)}" if power else ""
    return [signed(tick / 10.0**power, 2) for tick in ticks], factor


def rasterize(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as RGB pixels, shape (height, width, 3)."""
    canvas = figure.canvas
    if not isinstance(canvas, FigureCanvasAgg):
        canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return RGB pixels (height, width, 3) as a PNG.

    Six bits per channel are kept: the noise of a scan below that cannot be seen and makes up a third of the file.
    """
    kept = (pixels & 0xFC) | (pixels >> 6)
    file = BytesIO()
    Image.fromarray(kept).save(file, "PNG")
    return file.getvalue()
