"""Pictures of attributions: arrays in, figures or pixels out; nothing global is touched."""

from __future__ import annotations

from monai_xai.figures.animation import Animation, animate
from monai_xai.figures.bars import draw_bars
from monai_xai.figures.comparison import Entry, draw_methods
from monai_xai.figures.evidence import Line, draw_curves, draw_null, draw_spread, rasterize_on_white, stamp
from monai_xai.figures.modalities import Step, draw_cohort, draw_interactions, draw_waterfall
from monai_xai.figures.overlays import draw_montage, draw_planes
from monai_xai.figures.scene import Scene
from monai_xai.figures.sheet import encode_png, rasterize

__all__ = [
    "Animation",
    "Entry",
    "Line",
    "Scene",
    "Step",
    "animate",
    "draw_bars",
    "draw_cohort",
    "draw_curves",
    "draw_interactions",
    "draw_methods",
    "draw_montage",
    "draw_null",
    "draw_planes",
    "draw_spread",
    "draw_waterfall",
    "encode_png",
    "rasterize",
    "rasterize_on_white",
    "stamp",
]
