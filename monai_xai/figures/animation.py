"""A scene animated through its slices, as indexed pictures that a color GIF holds without loss."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from monai_xai.figures.colors import CLEAR_BELOW, LABEL, PREDICTION, blend
from monai_xai.figures.scene import Scene, is_crowded
from monai_xai.figures.sheet import format_ticks

# A GIF has 256 colors. They are laid out by hand, so that nothing is dithered and sign and size survive: a ramp of
# greys, then each step of the color scale over a coarser ramp of greys, then the two outlines.
GREYS = 48
COARSE_GREYS = 8
STEPS = 11
PREDICTION_INDEX = GREYS + 2 * STEPS * COARSE_GREYS
LABEL_INDEX = PREDICTION_INDEX + 1
PAPER_INDEX = 3

TITLE = 34
CAPTION = 15
GAP = 4
SCALE = 66
PROFILE = 22
LEAST_SCALE = 60


@dataclass(frozen=True, eq=False)
class Animation:
    """Frames that share one palette.

    Shapes: frames (T, height, width), indices; palette (256, 3), RGB.
    """

    frames: NDArray[np.uint8]
    palette: NDArray[np.uint8]

    def encode(self, milliseconds: int = 150) -> bytes:
        """Return an endless GIF; each frame stays for the given time."""
        pictures = []
        for frame in self.frames:
            picture = Image.fromarray(frame)
            picture.putpalette(self.palette.tobytes())
            pictures.append(picture)
        file = BytesIO()
        first, *rest = pictures
        first.save(
            file, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0, optimize=False
        )
        return file.getvalue()


def animate(scene: Scene, frames: int = 32, side: int = 448) -> Animation:
    """Return a walk through the scrolling plane, from feet to head: all modalities side by side.

    It begins at the strongest point, so that a preview of the first frame shows it, and wraps around at the head.
    A strip at the bottom shows how much absolute attribution each slice carries, and where the frame is.

    Args:
        scene: what is shown, 3D.
        frames: the most frames; slices between are skipped evenly, but not the strongest.
        side: the most pixels along the longer side of the pictures; larger slices are averaged down.
    """
    layout = _layout(scene, side)
    empty = _empty_frame(scene, layout)
    walk = _walk(scene, frames)
    return Animation(np.stack([_frame(scene, layout, empty, int(index)) for index in walk]), _palette())


def _slices(scene: Scene) -> NDArray[np.int_]:
    """Return the indices of all slices from feet to head, shape (S,)."""
    extent = scene.box[scene.scrolling.cut or 0]
    slices = np.arange(extent.start, extent.stop)
    return slices if scene.geometry.affine is None else slices[::-1]


def _walk(scene: Scene, frames: int) -> NDArray[np.int_]:
    """Return the indices of the slices that are shown, in the order of the frames."""
    slices = _slices(scene)
    strongest = np.abs(slices - scene.strongest[scene.scrolling.cut or 0]).argmin()
    stops = np.linspace(0, len(slices) - 1, min(frames, len(slices))).round().astype(int)
    first = np.abs(stops - strongest).argmin()
    stops[first] = strongest
    return slices[np.roll(stops, -first)]


@dataclass(frozen=True)
class Layout:
    """Where things are on a frame, in pixels."""

    columns: int
    rows: int
    height: int
    width: int

    @property
    def body(self) -> int:
        """Width of the pictures together."""
        return max(200, self.columns * (self.width + GAP))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a frame."""
        pictures = max(CAPTION + LEAST_SCALE + 20, self.rows * (CAPTION + self.height + GAP))
        return TITLE + pictures + PROFILE + 2 * GAP, GAP + self.body + SCALE

    def corner(self, number: int) -> tuple[int, int]:
        """Return top and left of a picture."""
        down, right = divmod(number, self.columns)
        return TITLE + CAPTION + down * (CAPTION + self.height + GAP), GAP + right * (self.width + GAP)


def _layout(scene: Scene, side: int) -> Layout:
    plane, spacing = scene.scrolling, scene.geometry.spacing
    spans = [(extent.stop - extent.start) * size for extent, size in zip(scene.box, spacing, strict=True)]
    tall, wide = spans[plane.rows], spans[plane.columns]
    count = len(scene.rows)
    columns = count if count < 4 else -(-count // 2)
    rows = -(-count // columns)
    scale = min(side / (columns * wide), side / (rows * tall))
    if scale * min(spacing) > 1:
        scale = np.floor(scale * min(spacing)) / min(spacing)
    return Layout(columns, rows, max(1, round(tall * scale)), max(1, round(wide * scale)))


def _frame(scene: Scene, layout: Layout, empty: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
    frame = empty.copy()
    for number, row in enumerate(scene.rows):
        top, left = layout.corner(number)
        frame[top : top + layout.height, left : left + layout.width] = _picture(scene, layout, row, index)
    share = f"{scene.shares[index]:.1%} of the attribution"
    _write(frame, f"{scene.scrolling.name}, {scene.slice_name(scene.scrolling, index)}: {share}", GAP, 18)
    _draw_profile(frame, scene, layout, index)
    return frame


def _picture(scene: Scene, layout: Layout, row: int, index: int) -> NDArray[np.uint8]:
    """Return one slice of one map with its outlines as indices, shape (height, width)."""
    plane = scene.scrolling
    grey = _resize(scene.grey(row, plane, index), layout)
    values = _resize(np.nan_to_num(scene.values(row, plane, index), posinf=0.0, neginf=0.0), layout)
    picture = _to_indices(grey, values / scene.limit)
    diagonal = np.add.outer(np.arange(layout.height), np.arange(layout.width))
    for name, color, dashes in (("prediction", PREDICTION_INDEX, 6), ("label", LABEL_INDEX, 3)):
        if name in scene.outlines:
            mask = _resize(scene.take(scene.outlines[name], plane, index), layout) >= 0.5
            where = diagonal % 6 < (1 if is_crowded(mask) else dashes)
            picture[mask & ~ndimage.binary_erosion(mask) & where] = color
    return picture


def _resize(flat: NDArray[Any], layout: Layout) -> NDArray[np.float32]:
    """Average down, or repeat voxels."""
    picture = Image.fromarray(np.ascontiguousarray(flat, np.float32))
    return np.asarray(picture.resize((layout.width, layout.height), Image.Resampling.BOX))


def _to_indices(grey: NDArray[np.float32], ratio: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the palette's index of signed values (as a share of the limit) over greys in [0, 1]."""
    size = np.clip((np.abs(ratio) - CLEAR_BELOW) / (1.0 - CLEAR_BELOW), 0.0, 1.0)
    step = np.ceil(size * STEPS).astype(int)
    side = np.where(ratio > 0, 0, STEPS)
    coarse = np.round(grey * (COARSE_GREYS - 1)).astype(int)
    colored = GREYS + (side + step - 1) * COARSE_GREYS + coarse
    return np.where(step == 0, np.round(grey * (GREYS - 1)), colored).astype(np.uint8)


def _palette() -> NDArray[np.uint8]:
    """Return the colors that :func:`_to_indices` points at."""
    colors = np.zeros((256, 3))
    colors[:GREYS] = np.linspace(0.0, 1.0, GREYS)[:, None]
    sizes = CLEAR_BELOW + (np.arange(STEPS) + 0.5) / STEPS * (1.0 - CLEAR_BELOW)
    ratios, greys = np.meshgrid([*sizes, *-sizes], np.linspace(0.0, 1.0, COARSE_GREYS), indexing="ij")
    colors[GREYS:PREDICTION_INDEX] = blend(greys.ravel(), ratios.ravel(), 1.0)
    colors[PREDICTION_INDEX], colors[LABEL_INDEX] = PREDICTION, LABEL
    return np.round(colors * 255).astype(np.uint8)


def _empty_frame(scene: Scene, layout: Layout) -> NDArray[np.uint8]:
    """Return what stands still: title, names of modalities, color bar."""
    frame = np.full(layout.shape, PAPER_INDEX, np.uint8)
    _write(frame, scene.title, GAP, 2, bold=True)
    for number, row in enumerate(scene.rows):
        top, left = layout.corner(number)
        _write(frame, f"{scene.row_name(row)}{_sides(scene)}", left, top - CAPTION)
    if scene.largest:
        _draw_scale(frame, scene, layout)
    return frame


def _draw_scale(frame: NDArray[np.uint8], scene: Scene, layout: Layout) -> None:
    top, _ = layout.corner(0)
    bottom, left = top + max(layout.height, LEAST_SCALE), GAP + layout.body + 6
    steps = np.linspace(1.0, -1.0, bottom - top, dtype=np.float32)[:, None].repeat(10, 1)
    frame[top:bottom, left : left + 10] = _to_indices(np.full_like(steps, 0.35), steps)
    ticks, factor = format_ticks(np.array([scene.limit, 0.0, -scene.limit]))
    for tick, place in zip(ticks, (top, (top + bottom) // 2 - 7, bottom - 14), strict=True):
        _write(frame, tick, left + 14, place)
    _write(frame, factor.removeprefix(", "), left - 2, bottom + 2)


def _sides(scene: Scene) -> str:
    """Return which side of the patient is at the left of a picture; nothing if it is not known."""
    left, right, *_ = scene.scrolling.letters
    return f"  {left}|{right}" if right else ""


def _draw_profile(frame: NDArray[np.uint8], scene: Scene, layout: Layout, index: int) -> None:
    """Draw the share of every slice as a strip, the present one bright."""
    bottom, width = frame.shape[0] - GAP, layout.body - GAP
    largest = scene.shares.max() or 1.0
    slices = _slices(scene)
    edges = GAP + np.linspace(0, width, len(slices) + 1).round().astype(int)
    for place, slice_index in enumerate(slices):
        tall = 1 + round((PROFILE - 1) * scene.shares[slice_index] / largest)
        is_here = slice_index == index
        top = bottom - (PROFILE if is_here else tall)
        frame[top:bottom, edges[place] : max(edges[place + 1], edges[place] + 1)] = (
            GREYS - 3 if is_here else GREYS // 3
        )


def _write(frame: NDArray[np.uint8], words: str, left: int, top: int, bold: bool = False) -> None:
    """Write on a frame, in greys of its palette."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    canvas = Image.new("L", (frame.shape[1], 18))
    ImageDraw.Draw(canvas).text((left, 0), words, fill=235, font=ImageFont.truetype(path, 11))
    ink = np.asarray(canvas)[: frame.shape[0] - top]
    target = frame[top : top + len(ink)]
    target[ink > 0] = np.maximum(ink[ink > 0] // 5, PAPER_INDEX)
