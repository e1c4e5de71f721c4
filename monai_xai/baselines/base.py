"""Baselines of general use, and how they are coerced and drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from monai.data import MetaTensor
from monai.networks.layers.convutils import gaussian_1d
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.grids import Case, RegionLike, mask_on_grid
from monai_xai.regions import Mask, Needs, Region
from monai_xai.spelling import Spelled


@dataclass(frozen=True)
class Baseline(Spelled, ABC):
    """What an input is held against, and what takes the place of a part that is taken away.

    ``stochastic`` baselines have a ``seed``. Of ``conditional`` ones, what takes the place of a part depends on which
    part it is: there is no whole baseline whose parts they are, and :meth:`impute` must be asked each time.
    """

    stochastic: ClassVar[bool] = False
    conditional: ClassVar[bool] = False

    @abstractmethod
    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the baselines of an input, one or several whose attributions are averaged.

        Shapes: x (N, C, *spatial) or (N, F); each result has the shape of x.
        """

    def impute(self, x: Tensor, removed: Tensor, draw: Tensor | None = None) -> Tensor:
        """Return an input with what was removed replaced.

        Args:
            x: the whole input.
            removed: where, bool, expandable to x.
            draw: one of the baselines of x; None takes the first.

        Shapes: x (N, C, *spatial) or (N, F); result as x.
        """
        return torch.where(removed, self.draws(x)[0] if draw is None else draw, x)

    def placed(self, case: Case) -> Baseline | Mapping[str, Baseline]:
        """Return the baseline as it lies on a case, or one for each input; an explainer asks before it attributes.

        Here, a baseline that needs no more than the values of an input is what it is.
        """
        return self

    def for_input(self, number: int) -> Baseline:
        """Return a stochastic baseline with a seed of its own for each input, so that their noise is independent."""
        seed = getattr(self, "seed", None) if self.stochastic else None
        return self if seed is None else replace(self, seed=seed + number)  # type: ignore[call-arg]


@dataclass(frozen=True, eq=False)
class Constant(Baseline):
    """One value everywhere, or any tensor that expands to the input.

    Args:
        value: a number, or a tensor that broadcasts to (N, C, *spatial), such as shape (1, C, 1, 1, 1).
    """

    value: float | Tensor = 0.0

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        value = f"tensor of shape {tuple(self.value.shape)}" if isinstance(self.value, Tensor) else self.value
        return f"Constant({value})"

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        return (_expand(self, _plain(self.value), x),)


@dataclass(frozen=True)
class Blur(Baseline):
    """The input, blurred by a Gaussian: keeps the coarse anatomy and takes the detail.

    Args:
        sigma: standard deviation in voxels. Edges are replicated. Inputs without spatial axes, which cannot be
            blurred, get zeros.
    """

    sigma: float = 4.0

    def __post_init__(self) -> None:
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, int | float) or not self.sigma > 0:
            raise InputError(
                f"Blur(sigma={self.sigma}) must be a positive number of voxels, the same along every axis."
            )

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim == 2:
            return (torch.zeros_like(x),)
        kernel = gaussian_1d(torch.tensor(self.sigma)).tolist()
        for axis in range(2, x.ndim):
            x = _filter_axis(x, kernel, axis)
        return (x,)


def _filter_axis(x: Tensor, kernel: Sequence[float], axis: int) -> Tensor:
    """Filter along one axis with replicated edges: one shifted copy at a time, since conv3d unfolds 30 of them."""
    radius, length = len(kernel) // 2, x.shape[axis]
    first, last = x.narrow(axis, 0, 1), x.narrow(axis, length - 1, 1)
    padded = torch.cat([*[first] * radius, x, *[last] * radius], axis)
    total = torch.zeros_like(x)
    for shift, weight in enumerate(kernel):
        total.add_(padded.narrow(axis, shift, length), alpha=weight)
    return total


@dataclass(frozen=True)
class Noise(Baseline):
    """Gaussian noise with the mean and standard deviation of each channel of the input: no structure at all.

    All samples of a batch get the same noise, so that a sample's baseline does not depend on its neighbors.

    Args:
        scale: factor on the standard deviation.
        seed: seed of the noise.
    """

    scale: float = 1.0
    seed: int = 0
    stochastic: ClassVar[bool] = True

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device).expand_as(x)
        axes = tuple(range(2, x.ndim))
        if not axes:
            return (noise * self.scale,)
        deviation, mean = torch.std_mean(x, dim=axes, keepdim=True, correction=0)
        return (mean + self.scale * deviation * noise,)


@dataclass(frozen=True)
class ChannelMinimum(Baseline):
    """The smallest value of each channel: air in CT and MRI, whatever the normalization. Vectors get zeros."""

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim == 2:
            return (torch.zeros_like(x),)
        return (x.amin(tuple(range(2, x.ndim)), keepdim=True).expand_as(x),)


@dataclass(frozen=True, eq=False)
class Mean(Baseline):
    """The mean of each channel over a region of the input, such as the mean of an organ.

    Args:
        region: where the mean is taken: a region of the input, the prediction or the label, or a mask as a tensor or
            file, not 0 inside (see :class:`Within`); None takes the whole image. Vectors, which have no region, get
            zeros.
    """

    region: RegionLike | None = None

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim == 2:
            return (torch.zeros_like(x),)
        axes = tuple(range(2, x.ndim))
        if self.region is None:
            return (x.mean(axes, keepdim=True).expand_as(x),)
        weights = mask_on_grid(self.region, x, "Mean").to(x)
        return (((x * weights).sum(axes, keepdim=True) / weights.sum(axes, keepdim=True)).expand_as(x),)

    def placed(self, case: Case) -> Baseline | Mapping[str, Baseline]:
        region = self.region
        if region is None or (isinstance(region, Region) and region.needs <= Needs.GRID):
            return self
        return {
            name: self if x.ndim == 2 else Mean(Mask(case.mask(region, x, "Mean")))
            for name, x in case.inputs.items()
        }


@dataclass(frozen=True, eq=False)
class Samples(Baseline):
    """A distribution given by examples, such as other patients: attributions are averaged over them.

    Args:
        values: the examples, shape (K, C, *spatial) or (K, F), on the grid of the input; see :meth:`from_dataset`.

    Reference: Erion et al., "Improving performance of deep learning models with axiomatic attribution priors and
    expected gradients", Nature Machine Intelligence 2021 (doi:10.1038/s42256-021-00343-w).
    """

    values: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or self.values.ndim < 2 or len(self.values) == 0:
            raise InputError(
                "Samples needs a tensor of examples, shape (K, C, *spatial) or (K, F), with K at least 1."
            )

    @classmethod
    def from_dataset(
        cls, dataset: Sequence[Any], key: str = "image", *, n: int = 8, seed: int = 0
    ) -> Samples:
        """Return ``n`` examples drawn from a dataset of dictionaries, whose ``key`` has shape (C, *spatial)."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(dataset), generator=generator)[:n].tolist()
        examples = [_plain(dataset[i][key]) for i in chosen]
        shapes = {tuple(example.shape) for example in examples}
        if len(shapes) != 1:
            raise InputError(
                f"Samples.from_dataset needs examples of one shape under {key!r}, got {sorted(shapes) or 'none'}: "
                "resample and crop them to the grid of the input."
            )
        return cls(torch.stack(examples))

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_expand(self, value[None], x) for value in self.values)


BaselineLike = Baseline | float | Tensor | Literal["auto"] | Mapping[str, "BaselineLike"]


@dataclass(frozen=True)
class Auto(Baseline):
    """The first of several baselines from which a method adds up on this network and input.

    The :class:`~monai_xai.Explainer` tries one after the other, and says in ``facts["baseline"]`` which it took: the
    first whose gap is within its ``tolerated_gap`` and the method's own ``tolerance``, or else the one with the
    smallest. Where a method may take many steps (``max_steps`` of 510 and more), each is tried with 255 first; if that
    is not enough from any, it takes all from the one with the smallest gap, and so on. Written ``baseline="auto"``.

    Args:
        candidates: what is tried, in this order.
    """

    candidates: tuple[Baseline, ...] = field(default_factory=lambda: (Blur(), ChannelMinimum(), Noise()))

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        raise InputError(
            "baseline='auto' picks by the gap of a method that adds up (IntegratedGradients, DeepLift, GradientShap), "
            "as the explainer's own attributor. Here, name a baseline such as Blur()."
        )


def as_baseline(value: BaselineLike) -> Baseline | Mapping[str, Baseline]:
    """Coerce "auto" into :class:`Auto`, a number or tensor into :class:`Constant`, a mapping value by value."""
    if isinstance(value, str) and value == "auto":
        return Auto()
    if isinstance(value, Mapping):
        return {name: as_baseline(part) for name, part in value.items()}  # type: ignore[misc]
    if isinstance(value, bool) or not isinstance(value, Baseline | int | float | Tensor):
        raise InputError(
            f"A baseline such as Blur(), Constant(0.0), a number or a tensor is needed, got {value!r}."
        )
    return value if isinstance(value, Baseline) else Constant(value)


def draw_baselines(
    baseline: Baseline | Mapping[str, Baseline], inputs: Mapping[str, Tensor]
) -> list[tuple[Tensor, ...]]:
    """Return the baselines of all inputs: a list of draws, each a tuple in call order.

    Args:
        baseline: one baseline for every input, or one by input name.
        inputs: the inputs by name, in call order.

    Raises:
        InputError: if an input has no baseline, if it does not broadcast to the input, or is not finite.
    """
    if isinstance(baseline, Mapping) and set(baseline) != set(inputs):
        raise InputError(f"Baselines are given for {sorted(baseline)}, but the inputs are {sorted(inputs)}.")
    draws = []
    for number, (name, x) in enumerate(inputs.items()):
        own = (baseline[name] if isinstance(baseline, Mapping) else baseline).for_input(number)
        if not x.is_floating_point() and not isinstance(own, Constant | Samples):
            raise InputError(
                f"The input {name!r} holds whole numbers, for which {own} means nothing: give it a baseline of its own "
                "such as Constant(0) (the number of the padding token) or Samples(...), by its name."
            )
        draws.append(own.draws(x))
        if not all(torch.isfinite(draw).all() for draw in draws[-1]):
            raise InputError(f"{own} has NaN or infinite values for the input {name!r}.")
    counts = {len(draw) for draw in draws} - {1}
    if len(counts) > 1:
        raise InputError(
            f"Inputs have different numbers of baselines, {sorted(counts)}: give each the same number."
        )
    return [tuple(draw[i % len(draw)] for draw in draws) for i in range(max(map(len, draws)))]


def _plain(value: Any) -> Tensor:
    return value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)


def _expand(baseline: Baseline, value: Tensor, x: Tensor) -> Tensor:
    try:
        return _plain(value).to(x).expand_as(x)
    except RuntimeError as error:
        raise InputError(
            f"{type(baseline).__name__} of shape {tuple(value.shape)} does not broadcast to the input of shape "
            f"{tuple(x.shape)}."
        ) from error
