"""How alike two maps are: on absolute values, pooled by two, over the whole image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from monai_xai.errors import InputError
from monai_xai.metrics.base import CONSTANT, NOT_FINITE, Scores, real, undefined_where

SimilarityKind = Literal["pearson", "spearman", "ssim", "dice"]
KINDS: tuple[SimilarityKind, ...] = ("pearson", "spearman", "ssim", "dice")
_TOP = 0.05
_POOLING = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def similarity(a: Tensor, b: Tensor, kind: SimilarityKind = "pearson") -> Scores:
    """Return how alike two maps of the same images are.

    Both are taken as absolute values and, where they are images, pooled by two along every spatial axis first, so that
    signs and checkerboards of single voxels do not hide that the picture is the same.

    Args:
        a: maps, shape (N, C, *spatial) with up to three spatial axes, or (N, F).
        b: maps likewise.
        kind: "pearson" and "spearman" are correlations over channels and voxels, in [-1, 1]. "ssim" is the structural
            similarity in n-D, of maps divided by their maximum, window 7 (or what fits), mean over channels. "dice" is
            the overlap of the 5 % of voxels with the largest values, in [0, 1].

    Returns:
        Undefined where a map is constant or not finite.

    Raises:
        InputError: if the shapes differ or the kind is unknown.

    Reference: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (arXiv:1810.03292); Wang et al., "Image
    Quality Assessment: From Error Visibility to Structural Similarity", TIP 2004 (doi:10.1109/TIP.2003.819861).
    """
    if kind not in KINDS:
        raise InputError(f"similarity(kind={kind!r}): choose one of {', '.join(KINDS)}.")
    if a.shape != b.shape or a.ndim < 2 or a.ndim > 5:
        raise InputError(
            f"Maps to compare must have one shape (N, C, *spatial) or (N, F), got {tuple(a.shape)}, {tuple(b.shape)}."
        )
    x, y = (_pooled(real(maps).abs()) for maps in (a, b))
    finite = torch.isfinite(x).flatten(1).all(1) & torch.isfinite(y).flatten(1).all(1)
    x, y = (torch.where(_like(finite, maps), maps, 0) for maps in (x, y))
    constant = _is_constant(x) | _is_constant(y)
    measure = {"pearson": _pearson, "spearman": _spearman, "ssim": _ssim, "dice": _dice}[kind]
    return undefined_where(measure(x, y), (~finite, NOT_FINITE), (constant, CONSTANT))


def mean_similarity(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], kind: SimilarityKind = "pearson"
) -> Scores:
    """Return the mean similarity over the images among named maps; over vectors, if there is no image.

    Inputs whose maps are constant in a sample do not count there.
    """
    images = [name for name, maps in a.items() if maps.ndim > 2] or list(a)
    found = [similarity(a[name], b[name], kind) for name in images]
    values = torch.stack([scores.values for scores in found]).nanmean(0)
    return Scores(
        values, tuple(next(filter(None, row), "") for row in zip(*(s.reasons for s in found), strict=True))
    )


def _pooled(maps: Tensor) -> Tensor:
    if maps.ndim == 2:
        return maps
    size = [min(2, length) for length in maps.shape[2:]]
    return _POOLING[len(size)](maps, size, ceil_mode=True, count_include_pad=False)


def _like(samples: Tensor, maps: Tensor) -> Tensor:
    return samples.reshape(-1, *[1] * (maps.ndim - 1))


def _is_constant(maps: Tensor) -> Tensor:
    values = maps.flatten(1)
    return values.amax(1) - values.amin(1) <= 8 * torch.finfo(maps.dtype).eps * values.amax(1)


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (x, y))
    return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).clamp(-1, 1)


def _spearman(x: Tensor, y: Tensor) -> Tensor:
    return _pearson(*(torch.stack([_ranks(row) for row in maps.flatten(1)]) for maps in (x, y)))


def _ranks(values: Tensor) -> Tensor:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).to(values.dtype)[place]


def _dice(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.flatten(1), y.flatten(1)
    count = max(1, round(_TOP * x.shape[1]))
    tops = [torch.zeros_like(v, dtype=torch.bool).scatter_(1, v.topk(count, 1).indices, True) for v in (x, y)]
    return (tops[0] & tops[1]).sum(1).to(x.dtype) / count


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity with a uniform window, over places where it lies inside."""
    if x.ndim == 2:
        x, y = x[:, None], y[:, None]
    x, y = (maps / _like(maps.flatten(1).amax(1), maps) for maps in (x, y))
    window = [min(7, length - (length + 1) % 2) for length in x.shape[2:]]
    pool = _POOLING[x.ndim - 2]

    def mean(maps: Tensor) -> Tensor:
        return pool(maps, window, 1)

    number = math.prod(window)
    unbiased = number / max(number - 1, 1)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = (unbiased * (mean(p * q) - mean(p) * mean(q)) for p, q in ((x, x), (y, y), (x, y)))
    c1, c2 = 0.01**2, 0.03**2
    found = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return found.flatten(1).mean(1)
