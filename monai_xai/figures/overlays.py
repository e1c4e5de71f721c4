"""Figures of maps over anatomy: orthogonal planes and a montage."""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from monai_xai.figures.colors import FAINT_INK, INK, LABEL, PREDICTION, blend
from monai_xai.figures.geometry import Plane
from monai_xai.figures.scene import SHARE_BELOW_LIMIT, Box, Scene, is_crowded
from monai_xai.figures.sheet import EDGE, LINE, SMALL, Sheet, format_ticks, letters_in, write_title

GAP = 0.06
NAMES = 0.28
SCALE = 1.15
HEADER = 0.2
FINER = 3
LEAST = 1.5
CASING = [withStroke(linewidth=2.6, foreground="black")]
STYLES: dict[str, dict[str, Any]] = {
    "prediction": {"color": PREDICTION, "linestyle": "solid"},
    "label": {"color": LABEL, "linestyle": (0, (2.5, 1.5))},
}


class Panel(NamedTuple):
    """One picture in a row: what it is called, how and where it cuts, what part of it is kept."""

    name: str
    plane: Plane
    at: int
    box: Box


def draw_planes(scene: Scene) -> Figure:
    """Return orthogonal planes through the strongest attribution and a closer look at it, a row per modality.

    A 2D input has one plane; its modalities stand side by side.

    Args:
        scene: what is shown.
    """
    return _draw_planes_of_volume(scene) if scene.is_volume else _draw_channels_of_image(scene)


def _draw_planes_of_volume(scene: Scene) -> Figure:
    panels = _panels(scene)
    sizes = [_size(scene, panel.plane, panel.box) for panel in panels]
    tall = max(height for height, _ in sizes[:3])
    shapes = [
        _fit(size, tall) if panel.box is scene.detail else size
        for size, panel in zip(sizes, panels, strict=True)
    ]
    rows, wide = len(scene.rows), sum(width for _, width in shapes)
    inch = min(11.0 / wide, max(3.4, 1.7 * rows, min(10.0, 2.4 * rows)) / (rows * tall))
    step = tall * inch + GAP
    sheet, top = _sheet(
        scene, NAMES + wide * inch + GAP * len(panels), HEADER + rows * step, _cross_words(scene)
    )
    left = EDGE + NAMES
    for panel, (height, width) in zip(panels, shapes, strict=True):
        sheet.text(left, top, panel.name, color=FAINT_INK)
        for down, row in enumerate(scene.rows):
            upper = top + HEADER + down * step + (tall - height) * inch / 2
            _draw_panel(sheet.axes(left, upper, width * inch, height * inch), scene, row, panel)
        left += width * inch + GAP
    for down, row in enumerate(scene.rows):
        _write_row_name(sheet, scene, row, top + HEADER + down * step + tall * inch / 2)
    _draw_scale(sheet, scene, top + HEADER, rows * step - GAP)
    return sheet.figure


def _draw_channels_of_image(scene: Scene) -> Figure:
    (plane,) = scene.geometry.planes
    panel = Panel("", plane, 0, scene.box)
    columns = min(len(scene.rows), 4)
    rows = -(-len(scene.rows) // columns)
    tall, wide = _size(scene, plane, scene.box)
    inch = min(11.0 / (columns * wide), 3.6 / tall)
    body = max(LEAST, rows * (HEADER + tall * inch))
    sheet, top = _sheet(scene, columns * (wide * inch + GAP), body, _cross_words(scene))
    for number, row in enumerate(scene.rows):
        down, right = divmod(number, columns)
        left, upper = EDGE + right * (wide * inch + GAP), top + down * (HEADER + tall * inch)
        sheet.text(left, upper, scene.row_name(row), weight="bold")
        _draw_panel(sheet.axes(left, upper + HEADER, wide * inch, tall * inch), scene, row, panel)
    _draw_scale(sheet, scene, top + HEADER, body - HEADER)
    return sheet.figure


def _panels(scene: Scene) -> list[Panel]:
    """Return the planes through the strongest point and, where it helps, a closer look at the first of them."""
    places = [(plane, scene.strongest[plane.cut or 0]) for plane in scene.geometry.planes]
    panels = [
        Panel(f"{plane.name}, {scene.slice_name(plane, at)}", plane, at, scene.box) for plane, at in places
    ]
    if scene.detail is None:
        return panels
    plane = scene.scrolling
    side = max(_size(scene, plane, scene.detail))
    unit = "voxels" if scene.geometry.affine is None and scene.spacing is None else "mm"
    name = f"{plane.name}, {side:.0f} {unit} around the cross"
    return [*panels, Panel(name, plane, scene.strongest[plane.cut or 0], scene.detail)]


def _fit(size: tuple[float, float], tall: float) -> tuple[float, float]:
    """Return a height and width of the same shape that fits into a square."""
    factor = tall / max(size)
    return size[0] * factor, size[1] * factor


def draw_montage(scene: Scene, slices: int = 8) -> Figure:
    """Return slices of the scrolling plane, evenly over the part of the volume that carries the attribution.

    Several modalities stand in rows below each other; a single one is wrapped. The strongest slice is always among
    them. :func:`monai.visualize.matshow3d` is not used: it draws scalars, without outlines, voxel sizes, or colors
    over anatomy.

    Args:
        scene: what is shown, 3D.
        slices: how many.
    """
    plane, picks = scene.scrolling, pick_slices(scene, slices)
    wraps = len(scene.rows) == 1
    columns = int(np.ceil(np.sqrt(2 * len(picks)))) if wraps else len(picks)
    rows = -(-len(picks) // columns) if wraps else len(scene.rows)
    names = 0.0 if wraps else NAMES
    tall, wide = _size(scene, plane, scene.box)
    inch = min(12.5 / (columns * wide), 10.0 / (rows * tall), 2.6 / tall)
    height, width = tall * inch, wide * inch
    step = height + GAP + (HEADER if wraps else 0.0)
    body = rows * step + (0.0 if wraps else HEADER)
    words = (
        f"{plane.name}: {len(picks)} slices hold {scene.shares[picks].sum():.0%} of the absolute attribution"
    )
    sheet, top = _sheet(scene, names + columns * (width + GAP), body, words)
    for number, (row, index) in enumerate((row, index) for row in scene.rows for index in picks):
        down, right = divmod(number, columns)
        left, upper = EDGE + names + right * (width + GAP), top + down * step
        if wraps or down == 0:
            _write_slice_name(sheet, scene, index, left, upper)
        if not wraps and right == 0:
            _write_row_name(sheet, scene, row, upper + HEADER + height / 2)
        axes = sheet.axes(left, upper + HEADER, width, height)
        _draw_slice(axes, scene, row, Panel("", plane, index, scene.box))
        if number == 0:
            _draw_letters(axes, plane)
    _draw_scale(sheet, scene, top + HEADER, body - HEADER - GAP)
    return sheet.figure


def _write_slice_name(sheet: Sheet, scene: Scene, index: int, left: float, top: float) -> None:
    words = f"{scene.slice_name(scene.scrolling, index)}  {scene.shares[index]:.1%}"
    is_strongest = index == scene.strongest[scene.scrolling.cut or 0]
    sheet.text(
        left,
        top,
        words,
        color=INK if is_strongest else FAINT_INK,
        weight="bold" if is_strongest else "normal",
    )


def pick_slices(scene: Scene, count: int) -> list[int]:
    """Return slices of the scrolling plane, from feet to head: evenly where 98 % of the attribution lies.

    The strongest slice takes the place of its nearest neighbor. Without attribution: evenly over the picture.
    """
    cut = scene.scrolling.cut or 0
    below = np.cumsum(scene.shares)
    inside = np.flatnonzero((below >= 0.01) & (below - scene.shares <= 0.99)) if scene.shares.any() else None
    first, last = (
        (scene.box[cut].start, scene.box[cut].stop - 1) if inside is None else (inside[0], inside[-1])
    )
    picks = np.unique(np.linspace(first, last, min(count, last - first + 1)).round().astype(int))
    if scene.shares.any():
        picks[np.abs(picks - scene.strongest[cut]).argmin()] = scene.strongest[cut]
    return sorted(picks.tolist(), reverse=scene.geometry.affine is not None)


def _sheet(scene: Scene, body_width: float, body_height: float, said: str) -> tuple[Sheet, float]:
    """Return a sheet with title above and legend below a body of the given size, and where the body begins."""
    width = max(6.4, EDGE + body_width + SCALE)
    notes = (said, *([scale_words(scene)] if scene.largest else []), *scene.notes)
    below = [line for note in notes for line in textwrap.wrap(note, letters_in(width))]
    height = body_height + 0.08 + LINE * (1.3 + len(below)) + EDGE
    sheet, top = write_title(width, height, scene.title, scene.about)
    _draw_legend(sheet, scene, top + body_height + 0.08)
    for number, line in enumerate(below):
        sheet.text(EDGE, top + body_height + 0.08 + LINE * (1.3 + number), line, color=FAINT_INK)
    return sheet, top


def scale_words(scene: Scene) -> str:
    """Return where the color scale ends, and why there."""
    return (
        f"color scale ends at ±{scene.limit:.2g}: {SHARE_BELOW_LIMIT:.0%} of the absolute attribution lies in voxels "
        f"below it, the largest is {scene.largest:.2g}"
    )


def _cross_words(scene: Scene) -> str:
    voxel = scene.geometry.voxel(scene.strongest, scene.shape)
    what = "strongest attribution" if scene.has_peak else "no attribution stands out, this is a middle"
    return f"cross: {what}, {scene.geometry.describe(voxel)}"


def _write_row_name(sheet: Sheet, scene: Scene, row: int, middle: float) -> None:
    sheet.text(EDGE, middle, scene.row_name(row), va="center", rotation=90, weight="bold", size=9)


def _size(scene: Scene, plane: Plane, box: Box) -> tuple[float, float]:
    """Return height and width of a cropped plane in mm."""
    spans = [
        (extent.stop - extent.start) * size for extent, size in zip(box, scene.geometry.spacing, strict=True)
    ]
    return spans[plane.rows], spans[plane.columns]


def _draw_panel(axes: Axes, scene: Scene, row: int, panel: Panel) -> None:
    _draw_slice(axes, scene, row, panel)
    _draw_letters(axes, panel.plane)
    _draw_cross(axes, scene, panel)


def _draw_slice(axes: Axes, scene: Scene, row: int, panel: Panel) -> None:
    axes.imshow(scene.picture(row, *panel[1:]), aspect="auto")
    for name, mask in scene.outlines.items():
        _draw_outline(axes, scene.take(mask, *panel[1:]), STYLES[name], width=0.9)


def _draw_outline(axes: Axes, mask: NDArray[np.bool_], style: dict[str, Any], width: float) -> None:
    """Outline a mask along the edges of its voxels, also at the edge of the picture; a crowd of outlines faintly."""
    if not mask.any():
        return
    rows, columns = mask.shape
    fine = np.pad(mask.repeat(FINER, 0).repeat(FINER, 1).astype(np.float32), 1)
    y, x = ((np.arange(-1, size * FINER + 1) + 0.5) / FINER - 0.5 for size in (rows, columns))
    contour = axes.contour(x, y, fine, levels=[0.5])
    contour.set(edgecolor=style["color"], linestyle=style["linestyle"], facecolor="none")
    if is_crowded(mask):
        contour.set(linewidth=0.4 * width, alpha=0.5)
    else:
        contour.set(linewidth=width, path_effects=[withStroke(linewidth=2 * width, foreground="black")])
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)


def _draw_letters(axes: Axes, plane: Plane) -> None:
    left, right, top, bottom = plane.letters
    for words, x, y, ha, va in (
        (left, 0.015, 0.5, "left", "center"),
        (right, 0.985, 0.5, "right", "center"),
        (top, 0.5, 0.985, "center", "top"),
        (bottom, 0.5, 0.015, "center", "bottom"),
    ):
        letter = axes.text(
            x, y, words, transform=axes.transAxes, ha=ha, va=va, size=SMALL, color=INK, path_effects=CASING
        )
        letter.set_snap(False)  # snapped to pixels, an L can lose its foot and read as I


def _draw_cross(axes: Axes, scene: Scene, panel: Panel) -> None:
    """Draw a thin cross with a gap in the middle, so that it does not hide what it points at."""
    axis_y, axis_x = panel.plane.rows, panel.plane.columns
    y, x = (
        scene.strongest[axis_y] - panel.box[axis_y].start,
        scene.strongest[axis_x] - panel.box[axis_x].start,
    )
    rows, columns = (panel.box[axis].stop - panel.box[axis].start for axis in (axis_y, axis_x))
    gap = (0.35 if panel.box is scene.detail else 0.06) * max(rows, columns)
    style: dict[str, Any] = {"colors": "white", "linewidth": 0.6, "alpha": 0.55}
    axes.hlines([y, y], [-0.5, x + gap], [x - gap, columns - 0.5], **style)
    axes.vlines([x, x], [-0.5, y + gap], [y - gap, rows - 0.5], **style)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)


def _draw_legend(sheet: Sheet, scene: Scene, top: float) -> None:
    left = EDGE
    for name, style in (
        STYLES.items() if scene.outlines else ()
    ):  # of a classification there is nothing to outline
        words = _outline_words(scene, name)
        axes = sheet.axes(left, top, 0.35, LINE)
        axes.patch.set_visible(False)
        if name in scene.outlines:
            axes.add_line(Line2D([0, 1], [0.5, 0.5], linewidth=1.4, **style))
            left += 0.42
        sheet.text(left, top + LINE / 2, words, va="center")
        left += 0.075 * len(words) + 0.25


def _outline_words(scene: Scene, name: str) -> str:
    if name not in scene.outlines:
        return f"no {name} given"
    return name if scene.outlines[name].any() else f"{name} (empty)"


def _draw_scale(sheet: Sheet, scene: Scene, top: float, height: float) -> None:
    """Draw the color bar as the colors really appear: over middle grey, clear around zero."""
    if not scene.largest:
        return
    height = min(height, 4.0)
    axes = sheet.axes(sheet.width - SCALE + 0.12, top, 0.16, height)
    steps = np.linspace(scene.limit, -scene.limit, 256)[:, None]
    bar = blend(np.full(steps.shape, 0.35), steps, scene.limit)
    axes.imshow(bar, aspect="auto", extent=(0, 1, -scene.limit, scene.limit))
    axes.yaxis.tick_right()
    ticks = scene.limit * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    names, factor = format_ticks(ticks)
    axes.set_yticks(ticks, names, size=SMALL, color=INK)
    axes.tick_params(length=2, color=INK)
    words = "\n".join(textwrap.wrap(f"{scene.unit}{factor}", letters_in(height)))
    axes.text(4.6, 0, words, rotation=90, ha="left", va="center", size=SMALL, color=FAINT_INK)
