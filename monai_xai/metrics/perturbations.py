"""How metrics disturb inputs: features that are taken away, what takes their place, and noise.

A disturbance is the same for all samples of a batch, so that a sample's value does not depend on its neighbors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_xai.attributors import Attributor
from monai_xai.baselines import Auto, Baseline, BaselineLike, Blur, Constant, as_baseline
from monai_xai.errors import AttributionError, InputError
from monai_xai.features import Blocks, Channels, Features, FeaturesLike, as_features, feature_masks
from monai_xai.forward import Scoring, Tensors
from monai_xai.metrics.base import as_mask
from monai_xai.spelling import Spelled


class CachedScore:
    """A score at many inputs that differ in places: only terms (windows) that see a difference are computed.

    Args:
        scoring: the score.
    """

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self._pinned: tuple[Tensors, list[Tensor]] | None = None
        self._last: tuple[Tensors, list[Tensor]] | None = None
        self.calls = 0

    def pin(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the scores at inputs that all later ones are held against, shape (N,)."""
        score = self(inputs)
        self._pinned = self._last
        return score

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the scores at whole inputs, shape (N,)."""
        padded = tuple(self._scoring.padding.pad(x) for x in inputs)
        scores = []
        for number, term in enumerate(self._scoring.terms):
            part = term.cut(padded)
            known = None
            for state in (self._last, self._pinned):
                if known is None and state is not None:
                    same = map(torch.equal, part, term.cut(state[0]))
                    known = state[1][number] if all(same) else None
            if known is None:
                known = term(part)
                self.calls += 1
            scores.append(known)
        self._last = padded, scores
        return self._scoring.sum_scores(scores)

    @property
    def evaluations(self) -> float:
        """How often the terms were computed, on average over them."""
        return self.calls / max(len(self._scoring.terms), 1)


@dataclass(frozen=True)
class Road(Baseline):
    """Noisy linear imputation: voxels that are taken away become the weighted mean of their neighbors.

    Neighbors that are taken away too are unknowns of one sparse linear system. The weights are those of the kernel
    [1, 2, 1] along every axis: 1/6 and 1/12 in 2D; 1/14 (face), 1/28 (edge) and 1/56 (corner) in 3D. Where nothing of
    a channel is left, its mean takes its place. Vectors get zeros.

    Args:
        noise: standard deviation of Gaussian noise on what is imputed, as a share of the standard deviation of the
            channel.
        seed: seed of the noise.

    Reference: Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022
    (arXiv:2202.00449), section 4; there in 2D.
    """

    noise: float = 0.01
    seed: int = 0
    stochastic: ClassVar[bool] = True

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what is left where nothing is known: the mean of each channel, and zeros for vectors."""
        if x.ndim == 2:
            return (torch.zeros_like(x),)
        return (x.mean(tuple(range(2, x.ndim)), keepdim=True).expand_as(x),)

    def impute(self, x: Tensor, removed: Tensor) -> Tensor:
        """Return an input with what was removed imputed from what is left.

        Shapes: x (N, C, *spatial) or (N, F); removed bool, expandable to x; result as x.
        """
        if x.ndim == 2:
            return torch.where(removed, 0, x)
        gone = removed.expand_as(x)
        filled = torch.where(gone, self.draws(x)[0], x)
        precision = torch.promote_types(x.dtype, torch.float32)
        for index in np.ndindex(*x.shape[:2]):
            if gone[index].any() and not gone[index].all():
                filled[index] = _impute(x[index].to(precision), gone[index], _TOLERANCE[x.dtype]).to(x)
        return filled if self.noise == 0 else torch.where(removed, filled + self._noise(x), x)

    def _noise(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device)
        return noise * self.noise * x.std(tuple(range(2, x.ndim)), keepdim=True, correction=0)


_MOST_ITERATIONS = 5000
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def _impute(values: Tensor, removed: Tensor, tolerance: float) -> Tensor:
    """Return one channel (*spatial) with each removed voxel the weighted mean of its neighbors.

    The system is symmetric and positive definite as long as something is left; solved by conjugate gradients with the
    diagonal as preconditioner, starting from the mean of what is left.
    """
    diagonal = _sum_neighbors(torch.ones_like(values))

    def apply(x: Tensor) -> Tensor:
        return torch.where(removed, diagonal * x - _sum_neighbors(x), 0)

    known = torch.where(removed, 0, values)
    shift = values[
        ~removed
    ].mean()  # what is left is held against its mean, so that the tolerance is of the contrast
    right = torch.where(removed, _sum_neighbors(torch.where(removed, 0, values - shift)), 0)
    found, residual = torch.zeros_like(values), right
    scaled = residual / diagonal
    direction, product = scaled, (residual * scaled).sum()
    limit = tolerance**2 * product
    for _ in range(_MOST_ITERATIONS):
        if product <= limit:
            return torch.where(removed, found + shift, known)
        moved = apply(direction)
        length = product / (direction * moved).sum()
        found = found + length * direction
        residual = residual - length * moved
        scaled = residual / diagonal
        before, product = product, (residual * scaled).sum()
        direction = scaled + product / before * direction
    raise AttributionError(
        f"Road: the system of {int(removed.sum())} removed voxels of {removed.numel()} did not converge."
    )


def _sum_neighbors(x: Tensor) -> Tensor:
    """Return the sum of neighbors with the weights of [1, 2, 1] along every axis, halved; none beyond the edges."""
    total = x
    for axis in range(x.ndim):
        length = x.shape[axis]
        summed = total.clone()
        if length > 1:
            summed.narrow(axis, 1, length - 1).add_(total.narrow(axis, 0, length - 1), alpha=0.5)
            summed.narrow(axis, 0, length - 1).add_(total.narrow(axis, 1, length - 1), alpha=0.5)
        total = summed
    return total - x


class Imputation:
    """What takes the place of features that are taken away.

    Args:
        imputer: a baseline of this package, :class:`Road` among them; or one by input name.
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
        imputed = {
            number: imputer.impute(x, gone)
            for number, (imputer, x, gone) in enumerate(
                zip(self._imputers, self._values, removed, strict=True)
            )
            if isinstance(imputer, Road)
        }
        return [
            tuple(
                imputed[number] if number in imputed else torch.where(gone, b, x)
                for number, (gone, b, x) in enumerate(zip(removed, draw, self._values, strict=True))
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
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    keys = torch.rand(present.shape[1], generator=generator, dtype=torch.float64).to(present.device)
    keys = torch.where(present, keys, 2)
    ranks = keys.argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks < size[:, None]) & present


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
    """Features drawn at random are taken away.

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
            chosen = chosen_at_random(present, size, number, self.seed)
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
