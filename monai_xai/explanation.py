"""The result: attributions of every input, with the numbers that say how far to trust them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.features import Features

ROUNDING_SHARE = 1e-6
"""Share of a whole up to which a part of it is what single precision leaves of nothing."""


def rounding(*scores: Tensor) -> Tensor:
    """Return how far scores of this size may be off by rounding alone, shape (N,)."""
    size = torch.stack([score.abs() for score in scores]).amax(0)
    return 16 * torch.finfo(size.dtype).eps * size + torch.finfo(size.dtype).tiny


def is_place(affine: Tensor) -> bool:
    """Tell whether an affine, or each of a batch of them, gives voxels a place in space, however small they are."""
    matrix = affine.double()[..., :-1, :-1]
    volume = torch.linalg.det(matrix).abs() / matrix.norm(dim=-2).prod(-1)
    return bool(torch.isfinite(affine).all() and (volume > 1e-6).all())


@dataclass(frozen=True, eq=False)
class Explanation:
    """The result of explaining a batch: nothing in it is summed, clipped or normalized.

    Args:
        attributions: signed maps by input name, shape (N, C, *spatial) or (N, F); a ``MetaTensor`` with the affine
            and applied operations of its input where the input was one. Layer methods give one channel.
        score: what was explained, shape (N,).
        baseline_score: the score at the baseline, shape (N,); None for methods without one.
        delta: the completeness gap ``sum(attributions) - (score - baseline_score)``, shape (N,), for methods that
            promise to sum up; else None.
        seconds: time the method took.
        method: the attributor, as written in code.
        target: the target, as written in code.
        seed: the seed of a stochastic method or baseline, else None.
        summable: whether values are contributions in units of the score, so that they may be added up.
        channels: names of the channels (modalities) by input name.
        facts: further numbers, such as ``windows``, ``active_windows``, ``passes`` or ``layer``.
        unit: of the score, such as "years"; empty if none was given.
        features: of a method that has some, as they lay on the inputs; see :func:`monai_xai.feature_table`.
    """

    attributions: Mapping[str, Tensor]
    score: Tensor
    baseline_score: Tensor | None
    delta: Tensor | None
    seconds: float
    method: str
    target: str
    seed: int | None = None
    summable: bool = False
    channels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    unit: str = ""
    features: Features | None = None

    @property
    def gap(self) -> Tensor | None:
        """``|delta|`` relative to ``|score - baseline_score|``, shape (N,); None for methods without delta.

        A delta that is no more than rounding counts as none.
        """
        if self.delta is None or self.baseline_score is None:
            return None
        return relative_gap(self.delta, self.score, self.baseline_score)

    def beyond_rounding(self) -> Mapping[str, Tensor]:
        """Return the maps as they are read and drawn: zeros for an input whose map is rounding beside the others.

        A color scale of its own would make a pattern of what is left of an input that the network does not use.
        """
        if not self.summable or len(self.attributions) == 1:
            return self.attributions
        sizes = {name: float(v.abs().sum(dtype=torch.double)) for name, v in self.attributions.items()}
        least = ROUNDING_SHARE * sum(sizes.values())
        return {
            name: torch.zeros_like(values) if sizes[name] <= least else values
            for name, values in self.attributions.items()
        }

    def contributions(self) -> dict[str, Tensor]:
        """Return the signed sum of each channel, in units of the score, by input name: shape (N, C) or (N, F).

        Raises:
            InputError: if the method's values must not be added up.
        """
        if not self.summable:
            raise InputError(f"{self.method} does not give contributions: its values must not be added up.")
        return {
            name: (values.sum(tuple(range(2, values.ndim))) if values.ndim > 2 else values)
            for name, values in self.attributions.items()
        }


def relative_gap(delta: Tensor, score: Tensor, baseline_score: Tensor) -> Tensor:
    """Return ``|delta|`` relative to the change of the score; a delta that is no more than rounding counts as none."""
    floor = rounding(score, baseline_score)
    change = (score - baseline_score).abs().clamp(min=floor)
    return torch.where(delta.abs() <= floor, 0.0, delta.abs() / change)
