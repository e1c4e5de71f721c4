"""What each feature is worth, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.explanation import Explanation
from monai_xai.features import CaseFeatures, Features
from monai_xai.grids import Grid, grids_of


class FeatureImportance(NamedTuple):
    """What one feature is worth in one sample.

    Args:
        sample: index of the sample.
        input: name of the input.
        feature: name of the feature.
        value: what it is worth, signed, in the unit of the map.
        kind: "value": the one that the method gave it; "sum": of the contributions on its voxels; "mean": of values
            that are neither.
        voxels: its size, or how many entries of the input it has where channels are told apart.
        volume_mm3: its volume (in 2D its area in mm²); None where the size of a voxel is not known, or for vectors.
        share: its magnitude over the sum of the magnitudes of all features of this sample and input; NaN if all are 0.
    """

    sample: int
    input: str
    feature: str
    value: float
    kind: Literal["value", "sum", "mean"]
    voxels: int
    volume_mm3: float | None
    share: float


def feature_table(
    explanation: Explanation, features: Features | None = None, name: str | None = None
) -> list[FeatureImportance]:
    """Return a row for each sample, input and feature, from the largest magnitude to the smallest.

    Args:
        explanation: of any method that gives maps of the inputs.
        features: over which features; None takes those of the method itself. Others, such as an
            :class:`~monai_xai.Atlas`, tell of any map where its attribution lies.
        name: of one input; None takes all.

    Raises:
        InputError: if there are no features, or they follow from more than the grid of the input; then only the
            explanation that was made with them knows them.
    """
    features = explanation.features if features is None else features
    if features is None:
        raise InputError(
            f"{explanation.method} has no features: say over which the table is, such as Atlas(...)."
        )
    if isinstance(features, CaseFeatures) and features.of_values:
        raise InputError(
            f"{features} follow from the image or the prediction, which an explanation does not hold. Give them to "
            "the method, FeatureAblation(features=...), and leave them out here."
        )
    names = list(explanation.attributions) if name is None else [name]
    if missing := set(names) - set(explanation.attributions):
        raise InputError(
            f"There is no map of {sorted(missing)}; there are {sorted(explanation.attributions)}."
        )
    return [row for name in names for row in _rows(explanation, features, name)]


def _rows(explanation: Explanation, features: Features, name: str) -> Iterator[FeatureImportance]:
    given = explanation.attributions[name]
    mask = features.mask(given, name)
    mask = mask.reshape([1] * (given.ndim - mask.ndim) + list(mask.shape))
    values = given.as_tensor() if isinstance(given, MetaTensor) else given
    grids = grids_of(given) if given.ndim > 2 else [Grid(())] * len(given)
    numbers, place = torch.unique(mask.expand(1, *mask.shape[1:2], *values.shape[2:]), return_inverse=True)
    for sample, (own, grid) in enumerate(zip(values.detach().double(), grids, strict=True)):
        worth = _worth(own, place[0], len(numbers), explanation.summable)
        total = sum(abs(value) for value, _, _ in worth)
        order = sorted(range(len(numbers)), key=lambda i: -abs(worth[i][0]))
        for i in order:
            value, kind, voxels = worth[i]
            volume = None if grid.voxel_volume is None else voxels * grid.voxel_volume
            share = abs(value) / total if total else float("nan")
            feature = features.feature_name(int(numbers[i]))
            yield FeatureImportance(sample, name, feature, value, kind, voxels, volume, share)


def _worth(
    values: Tensor, place: Tensor, count: int, summable: bool
) -> list[tuple[float, Literal["value", "sum", "mean"], int]]:
    """Return value, kind and size of each feature in one sample.

    Shapes: values (C, *spatial) or (F,); place (C or 1, *spatial) or (F,).
    """
    index, flat = place.expand_as(values).flatten(), values.flatten()
    sums = flat.new_zeros(count).index_add_(0, index, flat)
    entries = torch.bincount(index, minlength=count)
    low = flat.new_zeros(count).scatter_reduce(0, index, flat, "amin", include_self=False)
    high = flat.new_zeros(count).scatter_reduce(0, index, flat, "amax", include_self=False)
    sizes = torch.bincount(place.flatten(), minlength=count).tolist()
    if summable:
        return [(value, "sum", size) for value, size in zip(sums.tolist(), sizes, strict=True)]
    means = torch.where(low == high, low, sums / entries).tolist()
    kinds: list[Literal["value", "mean"]] = ["value" if same else "mean" for same in (low == high).tolist()]
    return list(zip(means, kinds, sizes, strict=True))
