"""Baselines: what an input is held against, and what takes the place of its parts.

A baseline is an *absence*: the completeness of Integrated Gradients or DeepLift says how the score at the input differs
from the score at the baseline. A constant image is a poor absence for networks with instance or group normalization,
which map every constant image to the same features; the default is therefore a blurred copy of the input.
"""

from monai_xai.baselines.base import (
    Auto,
    Baseline,
    BaselineLike,
    Blur,
    ChannelMinimum,
    Constant,
    Mean,
    Noise,
    Samples,
    as_baseline,
    draw_baselines,
)
from monai_xai.baselines.images import GivenImage, Within
from monai_xai.baselines.road import Road

__all__ = [
    "Auto",
    "Baseline",
    "BaselineLike",
    "Blur",
    "ChannelMinimum",
    "Constant",
    "GivenImage",
    "Mean",
    "Noise",
    "Road",
    "Samples",
    "Within",
    "as_baseline",
    "draw_baselines",
]
