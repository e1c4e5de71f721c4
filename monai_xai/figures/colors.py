"""Colors of signed maps over grey anatomy: hue for the sign, strength for the size, clear around zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Red and blue can be told apart with every common color vision deficiency. Both get brighter toward the limit: a scale
# with dark ends (RdBu) would hide its strongest values in front of black air.
POSITIVE = np.array([[0.90, 0.10, 0.15], [1.00, 0.22, 0.08], [1.00, 0.60, 0.10]])
NEGATIVE = np.array([[0.15, 0.25, 0.90], [0.08, 0.40, 1.00], [0.20, 0.78, 1.00]])
CLEAR_BELOW = 0.05
OPAQUE_FROM = 0.5
OPACITY = 0.85

PREDICTION = (0.5, 1.0, 0.25)
LABEL = (1.0, 1.0, 1.0)
PAPER = (0.07, 0.07, 0.08)
INK = (0.92, 0.92, 0.92)
FAINT_INK = (0.65, 0.65, 0.65)
BAR_POSITIVE = (0.79, 0.18, 0.15)
BAR_NEGATIVE = (0.13, 0.35, 0.76)


def overlay_colors(values: NDArray[Any], limit: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return color and opacity of signed values.

    Values up to 5 % of the limit are fully transparent, so that anatomy stays visible; opacity then grows with the
    size and stays below 1, so that edges of the anatomy shine through the strongest values.

    Args:
        values: any shape S; values that are not finite are transparent.
        limit: the size at which the scale ends, positive.

    Shapes: colors (S, 3), opacities S, both in [0, 1].
    """
    ratio = np.clip(np.nan_to_num(np.asarray(values, np.float32), posinf=0.0, neginf=0.0) / limit, -1.0, 1.0)
    size = np.abs(ratio)
    stops = np.linspace(0.0, 1.0, len(POSITIVE))
    colors = np.stack(
        [
            np.where(
                ratio >= 0, np.interp(size, stops, POSITIVE[:, i]), np.interp(size, stops, NEGATIVE[:, i])
            )
            for i in range(3)
        ],
        axis=-1,
    )
    opacity = OPACITY * np.clip((size - CLEAR_BELOW) / (OPAQUE_FROM - CLEAR_BELOW), 0.0, 1.0)
    return colors.astype(np.float32), opacity.astype(np.float32)


def blend(grey: NDArray[Any], values: NDArray[Any], limit: float) -> NDArray[np.float32]:
    """Return signed values over a grey picture as RGB.

    Args:
        grey: shape S, in [0, 1].
        values: shape S.
        limit: the size at which the color scale ends.

    Shapes: result (S, 3), in [0, 1].
    """
    colors, opacity = overlay_colors(values, limit)
    return grey[..., None] * (1.0 - opacity[..., None]) + colors * opacity[..., None]
