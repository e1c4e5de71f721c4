"""Metrics of maps and masks that gather their values over an epoch, as MONAI's own metrics do.

Each is a :class:`monai.metrics.CumulativeIterationMetric` around one function of this package, and goes into
:class:`monai.handlers.IgniteMetricHandler` with :class:`MapsAndRegions` as output transform::

    IgniteMetricHandler(RelevanceMass(), output_transform=MapsAndRegions(label=1))
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric
from monai.utils import string_list_all_gather
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.metrics.base import Scores
from monai_xai.metrics.complexity import entropy, gini
from monai_xai.metrics.localization import (
    Part,
    average_precision,
    enrichment,
    lesion_hit_rate,
    overlap,
    pointing_game,
    rank_accuracy,
    relevance_mass,
    shares,
)


class MapMetric(CumulativeIterationMetric):
    """A metric of maps and masks that gathers one value per sample.

    It is called with maps (N, C, *spatial), and a region (N, 1, *spatial) whose optional second channel is the mask to
    look within; or with lists of both without the batch axis, as they are after decollation. ``aggregate`` gives the
    mean over samples that have a value, NaN if none has; ``get_buffer`` all values, shape (samples, 1).
    """

    @abstractmethod
    def scores(self, maps: Tensor, region: Tensor | None, within: Tensor | None) -> Scores:
        """Return the scores of a batch.

        Args:
            maps: shape (N, C, *spatial).
            region: shape (N, 1, *spatial), or None.
            within: shape (N, 1, *spatial), or None.
        """

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self._reasons: list[str] = []

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        """Add the values of a batch and return them, shape (N, 1)."""
        nothing = isinstance(y_pred, list | tuple) and not y_pred
        return torch.empty(0, 1) if nothing else super().__call__(y_pred, y, **kwargs)

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        if y is not None and y.shape[1] not in (1, 2):
            raise InputError(
                f"{self} needs the region in one channel, and in a second one the mask to look within if there is "
                f"one, got shape {tuple(y.shape)}. Choose a class with MapsAndRegions(label=1)."
            )
        within = y[:, 1:] if y is not None and y.shape[1] == 2 else None
        found = self.scores(y_pred, None if y is None else y[:, :1], within)
        self._reasons += found.reasons
        return found.values[:, None].cpu().double()  # samples of one buffer are on one device

    def aggregate(self) -> Tensor:
        """Return the mean over all samples that have a value; NaN if none has."""
        values = self.get_buffer()  # type: ignore[no-untyped-call]
        return torch.tensor(nan, dtype=torch.float64) if values is None else values.nanmean()

    def not_available(self) -> dict[str, int]:
        """Return how many samples have no value, by reason, over all processes."""
        return dict(Counter(reason for reason in string_list_all_gather(self._reasons) if reason))


class _LocalizationMetric(MapMetric):
    """A metric that needs a region."""

    def scores(self, maps: Tensor, region: Tensor | None, within: Tensor | None) -> Scores:
        if region is None:
            raise InputError(f"{self} needs the region that maps are compared with, y; got None.")
        return self.compare(maps, region, within)

    @abstractmethod
    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        """Return the scores of a batch."""


class RelevanceMass(_LocalizationMetric):
    """Mean of :func:`~monai_xai.metrics.relevance_mass`.

    Args:
        part: "positive", "negative" or "absolute".
    """

    def __init__(self, part: Part = "positive") -> None:
        super().__init__()
        self.part = part

    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        return relevance_mass(maps, region, within, part=self.part)


class Enrichment(_LocalizationMetric):
    """Mean of :func:`~monai_xai.metrics.enrichment`.

    Args:
        part: "positive", "negative" or "absolute".
        k: count of the highest voxels to look at in place of the mass.
    """

    def __init__(self, part: Part = "positive", k: int | None = None) -> None:
        super().__init__()
        self.part, self.k = part, k

    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        return enrichment(maps, region, within, part=self.part, k=self.k)


class RankAccuracy(_LocalizationMetric):
    """Mean of :func:`~monai_xai.metrics.rank_accuracy`.

    Args:
        k: count of the highest voxels; None: as many as the region has.
    """

    def __init__(self, k: int | None = None) -> None:
        super().__init__()
        self.k = k

    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        return rank_accuracy(maps, region, within, k=self.k)


class LocalizationPrecision(_LocalizationMetric):
    """Mean of :func:`~monai_xai.metrics.average_precision`."""

    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        return average_precision(maps, region, within)


class _HitMetric(_LocalizationMetric):
    """A metric of highest points that may miss the region by a distance."""

    def __init__(self, tolerance_mm: float = 0.0, spacing: Sequence[float] | None = None) -> None:
        super().__init__()
        self.tolerance_mm, self.spacing = tolerance_mm, spacing


class PointingGame(_HitMetric):
    """Mean of :func:`~monai_xai.metrics.pointing_game`.

    Args:
        tolerance_mm: distance that is still a hit, in millimeters.
        spacing: size of a voxel in millimeters; None takes it from the affine of the maps.
    """

    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        return pointing_game(maps, region, within, tolerance_mm=self.tolerance_mm, spacing=self.spacing)


class LesionHitRate(_HitMetric):
    """Mean of :func:`~monai_xai.metrics.lesion_hit_rate`.

    Args:
        tolerance_mm: distance that is still a hit, in millimeters.
        spacing: size of a voxel in millimeters; None takes it from the affine of the maps.
    """

    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        return lesion_hit_rate(maps, region, within, tolerance_mm=self.tolerance_mm, spacing=self.spacing)


class RegionOverlap(_LocalizationMetric):
    """Mean of :func:`~monai_xai.metrics.overlap`.

    Args:
        threshold: share of the highest value; None takes Otsu's threshold of each map.
    """

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__()
        self.threshold = threshold

    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        return overlap(maps, region, within, threshold=self.threshold)


class ZoneShare(_LocalizationMetric):
    """Mean of one of the :func:`~monai_xai.metrics.shares`.

    Args:
        zone: "inside" the region, in the "ring" around it, or in the "context" beyond.
        ring_mm: width of the ring in millimeters.
        spacing: size of a voxel in millimeters; None takes it from the affine of the maps.
        part: "positive", "negative" or "absolute".
    """

    def __init__(
        self,
        zone: Literal["inside", "ring", "context"],
        ring_mm: float,
        spacing: Sequence[float] | None = None,
        *,
        part: Part = "positive",
    ) -> None:
        if zone not in ("inside", "ring", "context"):
            raise InputError(f"ZoneShare(zone={zone!r}): choose 'inside', 'ring' or 'context'.")
        super().__init__()
        self.zone, self.ring_mm, self.spacing, self.part = zone, ring_mm, spacing, part

    def compare(self, maps: Tensor, region: Tensor, within: Tensor | None) -> Scores:
        zones = shares(maps, region, self.ring_mm, self.spacing, within=within, part=self.part)
        return zones._asdict()[self.zone]


class Sparseness(MapMetric):
    """Mean of the :func:`~monai_xai.metrics.gini` index; a region is not needed."""

    def scores(self, maps: Tensor, region: Tensor | None, within: Tensor | None) -> Scores:
        return gini(maps, within)


class Complexity(MapMetric):
    """Mean of the :func:`~monai_xai.metrics.entropy` in nats; a region is not needed."""

    def scores(self, maps: Tensor, region: Tensor | None, within: Tensor | None) -> Scores:
        return entropy(maps, within)


class MapsAndRegions:
    """Take maps and regions out of ``engine.state.output``, where :class:`~monai_xai.AttributionHandler` put the maps.

    An output transform for :class:`monai.handlers.IgniteMetricHandler`, before and after decollation, and after
    :class:`~monai_xai.FlattenAttributionsd`. A sample that
    has not been explained counts as not available.

    Args:
        name: of the map, see :class:`~monai_xai.AttributionHandler`; None where there is only one.
        label: which class of the label is the region: ``label == 1``, or channel 1 if the label has several; or a
            function from a label (C, *spatial) to a mask (1, *spatial). None takes every voxel that is not 0.
        within: a function from an image (C, *spatial) to the mask (1, *spatial) to look within; None: everywhere.
        key: where the handler put the maps.
        label_key: where the label is.
        image_key: where the image for ``within`` is.

    Example:
        >>> output = [{"attribution": {"image": torch.ones(1, 2, 2)}, "label": torch.eye(2)[None]}]
        >>> maps, regions = MapsAndRegions(label=1)(output)
        >>> float(RelevanceMass()(maps, regions))
        0.5
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        label: int | Callable[[Tensor], Tensor] | None = None,
        within: Callable[[Tensor], Tensor] | None = None,
        key: str = "attribution",
        label_key: str = "label",
        image_key: str = "image",
    ) -> None:
        self.name = name
        self.label = label
        self.within = within
        self.key = key
        self.label_key = label_key
        self.image_key = image_key

    def __call__(
        self, output: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return maps (C, *spatial) and regions (1 or 2, *spatial) of the samples.

        Raises:
            InputError: if there is no label or image, or no map of that name.
        """
        samples = self._decollated(output) if isinstance(output, Mapping) else list(output)
        regions = [self._region(sample) for sample in samples]
        return [self._map(sample, region) for sample, region in zip(samples, regions, strict=True)], regions

    def _decollated(self, output: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return what is needed of each sample of a batch."""
        maps = {name: list(values) for name, values in output.get(self.key, {}).items()}
        columns = {key: list(output[key]) for key in (self.label_key, self.image_key) if key in output}
        size = max((len(column) for column in columns.values()), default=0)
        return [
            {key: column[i] for key, column in columns.items()}
            | {self.key: {name: values[i] for name, values in maps.items()}}
            for i in range(size)
        ]

    def _region(self, sample: Mapping[str, Any]) -> Tensor:
        label = _tensor(sample, self.label_key)
        if callable(self.label):
            region = self.label(label)
        elif self.label is None:
            region = (label != 0).any(0, keepdim=True)
        elif len(label) == 1:
            region = label == self.label
        elif 0 <= self.label < len(label):
            region = label[self.label : self.label + 1] != 0
        else:
            raise InputError(f"MapsAndRegions(label={self.label}): the label has {len(label)} channels.")
        if self.within is None:
            return region
        return torch.cat([region.bool(), self.within(_tensor(sample, self.image_key)).bool()])

    def _map(self, sample: Mapping[str, Any], region: Tensor) -> Tensor:
        """Return the map of a sample; NaN if it has not been explained."""
        flat = {name: sample[name] for name in sample if str(name).startswith(f"{self.key}_")}
        found = sample.get(self.key) or {name.removeprefix(f"{self.key}_"): flat[name] for name in flat}
        if not found:
            return torch.full((1, *region.shape[1:]), nan, device=region.device)
        name = next(iter(found)) if self.name is None and len(found) == 1 else self.name
        if name not in found:
            raise InputError(
                f"MapsAndRegions(name={self.name!r}): choose one of the maps {', '.join(found)}."
            )
        return found[name]


def _tensor(sample: Mapping[str, Any], key: str) -> Tensor:
    """Return a plain tensor of a sample."""
    value = sample.get(key)
    if not isinstance(value, Tensor):
        raise InputError(f"There is no tensor {key!r} in the output of the engine, only {', '.join(sample)}.")
    return value.as_tensor() if isinstance(value, MetaTensor) else value
