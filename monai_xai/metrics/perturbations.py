"""How metrics disturb inputs: features that are taken away, what takes their place, and noise.

A disturbance is the same for all samples of a batch, so that a sample's value does not depend on its neighbors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from monai_xai.attributors import Attributor
from monai_xai.baselines import Auto, Baseline, BaselineLike, Blur, Constant, as_baseline
from monai_xai.errors import InputError
from monai_xai.features import Blocks, Channels, Features, FeaturesLike, as_features, feature_masks
from monai_xai.forward import Scoring
from monai_xai.metrics.base import as_mask
from monai_xai.spelling import Spelled
from monai_xai.terms import Tensors


class Imputation:
    """What takes the place of features that are taken away.

    Args:
        imputer: a baseline of this package, :class:`~monai_xai.Road` among them; or one by input name.
        scoring: at the inputs.
    """

    def __init__(self, imputer: BaselineLike, scoring: Scoring) -> None:
        baseline = as_baseline(imputer)
        self._values = scoring.values
        self._imputers = [
            baseline[name] if isinstance(baseline, Mapping) else baseline for name in scoring.inputs
        ]
        self.draws = scoring.at(scoring.values).draw(baseline)

    def __call__(self, removed: Sequence[Tensor]) -> list[Tensors]:
        """Return the inputs without what is removed, one tuple in call order for each draw.

        Args:
            removed: for each input bool, expandable to it.
        """
        return [
            tuple(
                imputer.impute(x, gone, start)
                for imputer, x, gone, start in zip(self._imputers, self._values, removed, draw, strict=True)
            )
            for draw in self.draws
        ]


@dataclass(frozen=True, eq=False)
class Players:
    """The features of all inputs that may be taken away.

    Args:
        inputs: the inputs in call order.
        masks: number of the feature that each voxel belongs to, for each input, expandable to it.
        allowed: for each input where it may be taken away, shape (N, 1, *spatial); None: everywhere.
        count: K, how many features there are.
    """

    inputs: Tensors
    masks: Sequence[Tensor]
    allowed: Sequence[Tensor | None]
    count: int

    @classmethod
    def of(
        cls,
        features: FeaturesLike,
        scoring: Scoring,
        within: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Players:
        """Return the features of inputs, but for what lies outside of ``within`` or in ``keep``.

        Raises:
            InputError: if a mask has the grid of no input.
        """
        masks, count = feature_masks(
            _WithTokens(as_features(features), tuple(scoring.embedded)), scoring.inputs
        )
        allowed = [_allowed(x, within, keep) for x in scoring.values]
        if (within is not None or keep is not None) and all(part is None for part in allowed):
            shapes = {name: tuple(x.shape) for name, x in scoring.inputs.items()}
            given = tuple((within if within is not None else keep).shape)  # type: ignore[union-attr]
            raise InputError(f"The mask of shape {given} is on the grid of none of the inputs {shapes}.")
        return cls(scoring.values, masks, allowed, count)

    def sizes(self) -> Tensor:
        """Return how many entries of the inputs each feature has that may be taken away, shape (N, K)."""
        return self.sums([torch.ones_like(x) for x in self.inputs])

    def sums(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the sum of maps over each feature, where it may be taken away, shape (N, K)."""
        first = maps[0]
        total = torch.zeros((first.shape[0], self.count), dtype=first.dtype, device=first.device)
        for values, mask, x, allowed in zip(maps, self.masks, self.inputs, self.allowed, strict=True):
            values = values if allowed is None else torch.where(allowed, values, 0)
            index = mask.expand(1, *x.shape[1:]).flatten()
            total.index_add_(1, index, values.expand_as(x).flatten(1))
        return total

    def where(self, chosen: Tensor) -> list[Tensor]:
        """Return where chosen features lie, for each input: bool, expandable to it.

        Args:
            chosen: shape (N, K), bool.
        """
        places = []
        for mask, allowed in zip(self.masks, self.allowed, strict=True):
            place = chosen[:, mask[0]]
            places.append(place if allowed is None else place & allowed)
        return places


@dataclass(frozen=True)
class _WithTokens(Features):
    """Features in which every token of an embedded input is one."""

    features: Features
    tokens: tuple[str, ...]

    def mask(self, x: Tensor, name: str) -> Tensor:
        return (Channels() if name in self.tokens else self.features).mask(x, name)


def _allowed(x: Tensor, within: Tensor | None, keep: Tensor | None) -> Tensor | None:
    like = x[:, :1]
    parts = []
    if within is not None and x.ndim > 2 and within.shape[2:] == x.shape[2:]:
        parts.append(as_mask(within, like, "mask to look within"))
    if keep is not None and x.ndim > 2 and keep.shape[2:] == x.shape[2:]:
        parts.append(~as_mask(keep, like, "mask to keep"))
    return None if not parts else torch.stack(parts).all(0)


def chosen_at_random(present: Tensor, size: Tensor, number: int, seed: int) -> Tensor:
    """Return features drawn without replacement among those that are present, shape (N, K), bool.

    Args:
        present: shape (N, K), bool.
        size: how many, shape (N,).
        number: which draw.
        seed: the seed.
    """
    return (_shuffled(present, number, seed) < size[:, None]) & present


def chosen_in_turn(present: Tensor, size: Tensor, number: int, seed: int) -> Tensor:
    """Return features drawn at random so that successive draws take all of them before one comes again.

    Each draw alone is as one of :func:`chosen_at_random`; means over several are closer to what they are of, and a
    single feature that matters is not missed. Where the features are no multiple of the size, the last draw of a round
    takes some twice.

    Args:
        present: shape (N, K), bool.
        size: how many, shape (N,), at least 1.
        number: which draw.
        seed: the seed.
    """
    chosen = torch.zeros_like(present)
    for row, (there, take) in enumerate(zip(present, size.tolist(), strict=True)):
        count = int(there.sum())
        turn, part = divmod(number, max(math.ceil(count / take), 1))
        places = _shuffled(there[None], turn, seed)[0]
        first = min(part * int(take), max(count - int(take), 0))
        chosen[row] = (places >= first) & (places < first + take) & there
    return chosen


def _shuffled(present: Tensor, number: int, seed: int) -> Tensor:
    """Return the place of each feature in an order drawn at random, absent ones last, shape (N, K)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    keys = torch.rand(present.shape[1], generator=generator, dtype=torch.float64).to(present.device)
    keys = torch.where(present, keys, 2)
    return keys.argsort(dim=1, stable=True).argsort(dim=1)


class Disturbed(NamedTuple):
    """Disturbed inputs.

    Args:
        inputs: whole inputs in call order.
        removed: for each input what was taken away; None if nothing was.
        chosen: which features that is, shape (N, K).
        players: the features.
    """

    inputs: Tensors
    removed: Sequence[Tensor] | None = None
    chosen: Tensor | None = None
    players: Players | None = None


@dataclass(frozen=True)
class Perturbation(Spelled, ABC):
    """A way to disturb inputs at random. Its draws are numbered, and each is the same every time."""

    @abstractmethod
    def prepare(self, scoring: Scoring) -> Callable[[int], Disturbed]:
        """Return what gives the disturbed inputs of a draw, by its number."""


@dataclass(frozen=True)
class UniformNoise(Perturbation):
    """Uniform noise in [-radius, radius] on every voxel: the ball of the maximum norm.

    Args:
        radius: in units of the input, or a number for each input by name.
        seed: seed of the noise.

    Reference: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019 (arXiv:1901.09392).
    """

    radius: float | Mapping[str, float] = 0.02
    seed: int = 0

    def prepare(self, scoring: Scoring) -> Callable[[int], Disturbed]:
        radii = _by_name(self.radius, scoring, "UniformNoise(radius=...)")

        def draw(number: int) -> Disturbed:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            return Disturbed(
                tuple(
                    x
                    + ((torch.rand(x.shape[1:], generator=generator, dtype=x.dtype) * 2 - 1) * radius).to(
                        x.device
                    )
                    for x, radius in zip(scoring.values, radii, strict=True)
                )
            )

        return draw


@dataclass(frozen=True)
class GaussianPerturbation(Perturbation):
    """Gaussian noise on every voxel.

    Args:
        sigma: standard deviation as a share of that of each channel (of vectors: in their own unit), or a number for
            each input by name.
        seed: seed of the noise.
    """

    sigma: float | Mapping[str, float] = 0.1
    seed: int = 0

    def prepare(self, scoring: Scoring) -> Callable[[int], Disturbed]:
        sigmas = [
            sigma * (x.std(tuple(range(2, x.ndim)), keepdim=True, correction=0) if x.ndim > 2 else 1.0)
            for x, sigma in zip(
                scoring.values, _by_name(self.sigma, scoring, "GaussianPerturbation(sigma=...)"), strict=True
            )
        ]

        def draw(number: int) -> Disturbed:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            return Disturbed(
                tuple(
                    x + torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device) * sigma
                    for x, sigma in zip(scoring.values, sigmas, strict=True)
                )
            )

        return draw


@dataclass(frozen=True)
class RandomRemoval(Perturbation):
    """Features drawn at random are taken away, all of them in turn before one comes again.

    Args:
        features: what is taken away together.
        imputer: what takes its place; of several draws the first counts.
        share: of the features.
        seed: seed of the draws.
    """

    features: FeaturesLike = field(default_factory=lambda: Blocks(8))
    imputer: BaselineLike = field(default_factory=Blur)
    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"RandomRemoval(share={self.share}) must lie between 0 and 1.")

    def prepare(self, scoring: Scoring) -> Callable[[int], Disturbed]:
        players = Players.of(self.features, scoring)
        impute = Imputation(self.imputer, scoring)
        present = players.sizes() > 0
        size = (present.sum(1) * self.share).round().clamp(min=1)

        def draw(number: int) -> Disturbed:
            chosen = chosen_in_turn(present, size, number, self.seed)
            removed = players.where(chosen)
            return Disturbed(impute(removed)[0], removed, chosen, players)

        return draw


def _by_name(value: float | Mapping[str, float], scoring: Scoring, where: str) -> list[float]:
    if not isinstance(value, Mapping):
        return [float(value)] * len(scoring.inputs)
    if set(value) != set(scoring.inputs):
        raise InputError(
            f"{where} is given for {sorted(value)}, but the inputs are {sorted(scoring.inputs)}."
        )
    return [float(value[name]) for name in scoring.inputs]


def usual_imputer(attributor: Attributor) -> BaselineLike:
    """Return what a method itself holds the input against: its baseline, or zero for contributions without one.

    What has neither (a gradient, a baseline that the network chooses) is held against a blur.
    """
    baseline = getattr(attributor, "baseline", None)
    if isinstance(baseline, Baseline | Mapping) and not isinstance(baseline, Auto):
        return baseline
    return Constant(0.0) if baseline is None and attributor.summable else Blur()


def with_seed(perturbation: Perturbation, seed: int | None) -> Perturbation:
    """Return a perturbation with another seed."""
    return perturbation if seed is None else replace(perturbation, seed=seed)  # type: ignore[call-arg]
