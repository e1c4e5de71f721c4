"""Targets: what is explained, selected once and scored often.

A target looks at the clean prediction once (:meth:`Target.select`) and from then on turns any output of the network
into one number per sample (:meth:`Target.score`). What was selected does not move while the input is perturbed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from monai_xai.errors import EmptyRegionError, InputError
from monai_xai.regions import Mask, Needs, Predicted, Region
from monai_xai.spelling import Spelled


@dataclass(frozen=True)
class Target(Spelled, ABC):
    """What is explained: one score per sample.

    Args:
        head: which part of a list, tuple or dict output is meant (deep supervision, several tasks).
        unit: of the score, such as "years"; shown beside it.
    """

    head: str | int | None = field(default=None, kw_only=True)
    unit: str = field(default="", kw_only=True, repr=False)

    @property
    def needs(self) -> Needs:
        """How much of the prediction :meth:`select` looks at."""
        return Needs.VALUES

    @property
    def linear(self) -> bool:
        """Whether the score is ``sum(weights * linear function of the output at the same voxel)``.

        The selection of a linear target is one tensor of weights, shape (N, 1, *spatial). Over sliding windows such
        a score is a sum of window scores, see :mod:`monai_xai.windows`.
        """
        return False

    @property
    def is_several(self) -> bool:
        """Whether it stands for as many targets as the prediction has parts, see :meth:`each`."""
        return False

    def pick(self, output: Any) -> Tensor:
        """Return the tensor of the network's output that ``head`` chooses."""
        return pick_head(output, self.head)

    @abstractmethod
    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        """Look at the clean prediction once; return batch-first tensors that :meth:`score` takes."""

    @abstractmethod
    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        """Turn an output of the network, shape (N, C, ...), into scores of shape (N,)."""

    def each(self, output: Tensor, label: Tensor | None) -> dict[str, Target]:
        """Return the targets that this one stands for, by name; empty if it stands for itself."""
        return {}


def pick_head(output: Any, head: str | int | None) -> Tensor:
    """Return the tensor that ``head`` chooses from a network's output, which may be a tensor, sequence or mapping.

    Raises:
        InputError: naming the type and parts of the output where the choice is missing or wrong.
    """
    if head is not None:
        if isinstance(output, Tensor):
            raise InputError(
                f"head={head!r}, but the network's output is one tensor of shape {tuple(output.shape)}."
            )
        try:
            output = output[head]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"head={head!r} is not a part of the network's output, which {_describe(output)}."
            ) from error
    if not isinstance(output, Tensor):
        raise InputError(
            f"The network's output {_describe(output)}. Choose a part with head=..., for example head=0."
        )
    return output


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"is a dict with keys {sorted(map(str, output))}"
    if isinstance(output, Sequence):
        return f"is a {type(output).__name__} of {len(output)} parts"
    return f"is of type {type(output).__name__}"


_HINT = ' If the network returns a dict or list, choose a part with head=..., such as head="seg" or head=0.'


def _class_scores(target: Target, output: Tensor) -> Tensor:
    """Return an output as (N, K); (N,) and trailing axes of size one are accepted."""
    if output.ndim == 0 or output[0].numel() != (output.shape[1] if output.ndim > 1 else 1):
        raise InputError(f"{target} needs an output of shape (N, K), got {tuple(output.shape)}.{_HINT}")
    return output.reshape(output.shape[0], -1)


def _channel(target: Target, output: Tensor, channel: int) -> Tensor:
    """Return one channel of a dense output, shape (N, 1, *spatial)."""
    if output.ndim < 3:
        raise InputError(
            f"{target} needs an output of shape (N, C, *spatial), got {tuple(output.shape)}.{_HINT}"
        )
    _check_channel(target, output, channel)
    return output[:, channel : channel + 1]


def _check_channel(target: Target, output: Tensor, channel: int) -> None:
    if not 0 <= channel < output.shape[1]:
        raise InputError(
            f"{target} needs at least {channel + 1} output channels, got shape {tuple(output.shape)}.{_HINT}"
        )


@dataclass(frozen=True)
class ClassScore(Target):
    """The score of one class of a classification network.

    Args:
        class_index: the class; None takes the class that each sample is predicted as.

    Shapes: output (N, K), usually logits.
    """

    class_index: int | None = None

    def __post_init__(self) -> None:
        if self.class_index is not None:
            _require_index("ClassScore(class_index=...)", self.class_index)

    @property
    def needs(self) -> Needs:
        return Needs.VALUES if self.class_index is None else Needs.NOTHING

    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        if self.class_index is not None:
            return (torch.full((output.shape[0],), self.class_index, dtype=torch.long, device=output.device),)
        return (_class_scores(self, output).argmax(1),)

    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        scores = _class_scores(self, output)
        if self.class_index is not None:
            _check_channel(self, scores, self.class_index)
        return scores.gather(1, selection[0][:, None])[:, 0]


@dataclass(frozen=True)
class LogOddsScore(Target):
    """The log-odds of one class against all others, ``log(p / (1 - p))`` of the softmax of the logits.

    What one class loses is here told from what all classes lose together.

    Args:
        class_index: the class; None takes the class that each sample is predicted as.

    Shapes: output (N, K) with K at least 2, logits.
    """

    class_index: int | None = None

    def __post_init__(self) -> None:
        if self.class_index is not None:
            _require_index("LogOddsScore(class_index=...)", self.class_index)

    @property
    def needs(self) -> Needs:
        return self._logit.needs

    @property
    def _logit(self) -> ClassScore:
        return ClassScore(self.class_index)

    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        return self._logit.select(output, label)

    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        logits = _class_scores(self, output)
        _check_channel(self, logits, max(1, self.class_index or 0))
        own = torch.nn.functional.one_hot(selection[0], logits.shape[1]).bool()
        others = logits.masked_fill(own, -torch.inf).logsumexp(1)
        return self._logit.score(output, *selection) - others


@dataclass(frozen=True)
class OutputScore(Target):
    """One number that a regression network returns, in its own unit.

    Args:
        index: which of the K outputs.

    Shapes: output (N,) or (N, K).
    """

    index: int = 0

    def __post_init__(self) -> None:
        _require_index("OutputScore(index=...)", self.index)

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        return ()

    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        outputs = _class_scores(self, output)
        _check_channel(self, outputs, self.index)
        return outputs[:, self.index]


def _region_weights(target: Target, mask: Tensor, output: Tensor, reduction: str) -> Tensor:
    """Turn a region into weights whose product with the output is its mean or sum over the region."""
    counts = mask.flatten(1).sum(1)
    for sample, count in enumerate(counts.tolist()):
        if count == 0:
            raise EmptyRegionError(
                f"{target}: the region is empty in sample {sample} (output {tuple(output.shape)}). "
                "Choose another region (Labeled(), Box(...), Predicted(threshold=...)) or leave this case out."
            )
    dtype = torch.promote_types(output.dtype, torch.float32)
    weights = mask.to(dtype)
    return weights / counts.to(dtype).reshape(-1, *[1] * (mask.ndim - 1)) if reduction == "mean" else weights


def _weighted_sum(target: Target, values: Tensor, weights: Tensor) -> Tensor:
    """Sum values (N, 1, *spatial) with the weights of a region, per sample."""
    if values.shape[2:] != weights.shape[2:]:
        raise InputError(
            f"{target} has a region on the grid {tuple(weights.shape[2:])}, but the network's output there is "
            f"{tuple(values.shape[2:])}: output and region must lie on one grid."
        )
    return (values * weights).flatten(1).sum(1)


def as_region(value: Region | Tensor) -> Region:
    """Coerce a tensor into :class:`~monai_xai.regions.Mask`."""
    region = Mask(value) if isinstance(value, Tensor) else value
    if not isinstance(region, Region):
        raise InputError(
            f"A region such as Predicted(), Box(start, end) or a mask tensor is needed, got {value!r}."
        )
    return region


def _require_index(where: str, value: object) -> None:
    if not isinstance(value, int) or value < 0:
        raise InputError(f"{where} must be a whole number from 0, got {value!r}.")


@dataclass(frozen=True)
class RegionScore(Target):
    """The mean (or sum) of one output channel over a region: the score of a segmentation.

    Args:
        channel: the output channel.
        region: the voxels, see :mod:`monai_xai.regions`; a tensor is coerced to ``Mask``.
        reduction: "mean" or "sum" over the region.

    Shapes: output (N, C, *spatial), usually logits; selection: weights (N, 1, *spatial).

    Raises:
        EmptyRegionError: if the region holds no voxel, naming the sample.

    Reference: Vinogradova et al., "Towards Interpretable Semantic Segmentation via Gradient-Weighted Class
    Activation Mapping", AAAI 2020, equation 2 (the score of a pixel set).
    """

    channel: int
    region: Region = field(default_factory=Predicted)
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "region", as_region(self.region))
        _require_index("RegionScore(channel=...)", self.channel)
        if self.reduction not in ("mean", "sum"):
            raise InputError(f"RegionScore(reduction={self.reduction!r}): choose 'mean' or 'sum'.")

    @property
    def linear(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return self.region.needs

    @property
    def is_several(self) -> bool:
        return self.region.is_several

    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        if self.needs is Needs.VALUES:
            _channel(self, output, self.channel)
        mask = self.region.mask(output, label, self.channel)
        return (_region_weights(self, mask, output, self.reduction),)

    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        return _weighted_sum(self, _channel(self, output, self.channel), selection[0])

    def each(self, output: Tensor, label: Tensor | None) -> dict[str, Target]:
        regions = self.region.each(output, label, self.channel)
        return {name: replace(self, region=region) for name, region in regions.items()}


@dataclass(frozen=True)
class DiceScore(Target):
    """How much of a predicted mask remains: Dice between the mask of any output and the frozen one, from 0 to 1.

    Args:
        channel: the output channel.
        region: how an output becomes a mask, and what is held against it: ``Predicted`` for the clean prediction.

    A step function of the output, for methods that perturb; it has no gradient.
    """

    channel: int
    region: Predicted = field(default_factory=Predicted)

    def __post_init__(self) -> None:
        _require_index("DiceScore(channel=...)", self.channel)
        if not isinstance(self.region, Predicted):
            raise InputError(f"DiceScore(region=...) needs Predicted(), got {self.region!r}.")

    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        mask = self._mask(output)
        _region_weights(self, mask, output, "sum")  # refuses empty regions
        return (mask,)

    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        mask, frozen = self._mask(output).flatten(1), selection[0].flatten(1)
        dice = 2 * (mask & frozen).sum(1) / (mask.sum(1) + frozen.sum(1))
        return dice.to(torch.promote_types(output.dtype, torch.float32))

    def _mask(self, output: Tensor) -> Tensor:
        _channel(self, output, self.channel)
        return self.region.mask(output, None, self.channel)


@dataclass(frozen=True)
class MarginScore(Target):
    """How far one class lies above another: the difference of two channels.

    Args:
        channel: the class that is explained.
        against: the class it is held against.
        region: the voxels over which the mean is taken; None for a classification network, output (N, K).
    """

    channel: int
    against: int
    region: Region | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "region", None if self.region is None else as_region(self.region))
        _require_index("MarginScore(channel=...)", self.channel)
        _require_index("MarginScore(against=...)", self.against)

    @property
    def linear(self) -> bool:
        return self.region is not None

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING if self.region is None else self.region.needs

    @property
    def is_several(self) -> bool:
        return self.region is not None and self.region.is_several

    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        if self.region is None:
            return ()
        if self.needs is Needs.VALUES:
            _channel(self, output, self.channel)
        return (_region_weights(self, self.region.mask(output, label, self.channel), output, "mean"),)

    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        if self.region is None:
            output = _class_scores(self, output)
            _check_channel(self, output, max(self.channel, self.against))
            return output[:, self.channel] - output[:, self.against]
        margin = _channel(self, output, self.channel) - _channel(self, output, self.against)
        return _weighted_sum(self, margin, selection[0])

    def each(self, output: Tensor, label: Tensor | None) -> dict[str, Target]:
        regions = self.region.each(output, label, self.channel) if self.region is not None else {}
        return {name: replace(self, region=region) for name, region in regions.items()}


@dataclass(frozen=True)
class FunctionTarget(Target):
    """Any function of the output.

    Args:
        function: ``function(output, *selection)`` returns scores of shape (N,); must be differentiable for gradient
            methods.
        selector: ``selector(output, label)`` returns a tuple of batch-first tensors, once, from the clean prediction.
    """

    function: Callable[..., Tensor]
    selector: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]] | None = None

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING if self.selector is None else Needs.VALUES

    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        return self.selector(output, label) if self.selector else ()

    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        return self.function(output, *selection)
