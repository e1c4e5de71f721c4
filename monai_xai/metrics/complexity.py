"""How simple is a map to look at? Descriptive only: a simple map need not be a true one."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_xai.metrics.base import (
    EMPTY_BODY,
    NOT_EXPLAINED,
    NOT_FINITE,
    NOTHING,
    Scores,
    as_one_map,
    body_of,
    undefined_where,
)


def gini(maps: Tensor, within: Tensor | None = None) -> Scores:
    """Return the Gini index of the magnitude: 0 for a map that is equal everywhere, ``1 - 1/n`` for a single voxel.

    ``sum_i (2 i - n - 1) |a|_(i) / (n sum |a|)`` over the n voxels in ascending order.

    Args:
        maps: shape (N, C, *spatial), signed; their sum over channels is looked at.
        within: shape (N, 1, *spatial), bool; None: everywhere.

    Returns:
        One value per sample; undefined where the map is zero everywhere or not finite.

    Raises:
        InputError: if shapes do not fit.

    Reference: Chalasani et al., "Concise explanations of neural networks using adversarial training", ICML 2020.

    Example:
        >>> gini(torch.tensor([[[0.0, 0.0, 0.0, -2.0]]])).values
        tensor([0.7500], dtype=torch.float64)
    """
    a, v, n = _magnitudes(maps, within)
    ascending = a.sort(1).values  # what is not looked at is 0 and comes first, so its ranks are taken off
    ranks = torch.arange(1, a.shape[1] + 1, device=a.device) - (a.shape[1] - n)[:, None]
    total = a.sum(1)
    values = ((2 * ranks - n[:, None] - 1) * ascending).sum(1) / (n * total)
    return undefined_where(values.to(a.dtype), *_causes(maps, v, total))


def entropy(maps: Tensor, within: Tensor | None = None) -> Scores:
    """Return the entropy of the shares of the magnitude, in nats: 0 for a single voxel, ``ln n`` for equal ones.

    ``- sum_i p_i ln p_i`` with ``p_i = |a_i| / sum |a|``.

    Args:
        maps: shape (N, C, *spatial), signed; their sum over channels is looked at.
        within: shape (N, 1, *spatial), bool; None: everywhere.

    Returns:
        One value per sample; undefined where the map is zero everywhere or not finite.

    Raises:
        InputError: if shapes do not fit.

    Reference: Bhatt, Weller, Moura, "Evaluating and aggregating feature-based model explanations", IJCAI 2020
    (doi:10.24963/ijcai.2020/417).
    """
    a, v, _ = _magnitudes(maps, within)
    total = a.sum(1)
    values = torch.special.entr(a / total[:, None]).sum(1)
    return undefined_where(values, *_causes(maps, v, total))


def _magnitudes(maps: Tensor, within: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the magnitude within the body and 0 elsewhere, the body, each (N, voxels), and its size (N,)."""
    one = as_one_map(maps)
    v = body_of(within, one).flatten(1)
    return one.flatten(1).abs().masked_fill(~v, 0.0), v, v.sum(1)


def _causes(maps: Tensor, v: Tensor, total: Tensor) -> tuple[tuple[Tensor, str], ...]:
    a = as_one_map(maps).flatten(1)
    return (
        (a.isnan().all(1), NOT_EXPLAINED),
        (~v.any(1), EMPTY_BODY),
        (~(a.isfinite() | ~v).all(1), NOT_FINITE),
        (total <= 0, NOTHING),
    )
