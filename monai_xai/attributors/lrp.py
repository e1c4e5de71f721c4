"""Layer-wise relevance propagation, call by call: a score is handed down from each result to what it was made of.

Every call of a network passes on the relevance of its result. How a call with weights does that, a
:class:`PropagationRule` says; all others are fixed:

- An activation and a norm pass it on as it is (Achtibat et al. 2024); batch norm is folded into the convolution before.
- An addition shares it in proportion to the absolute values (Otsuki et al. 2024) or to the values.
- Means and pooling share it in proportion to the values, a maximum gives it to the largest.
- A product gives half to each factor; a matrix product in proportion to the products in it (Achtibat et al. 2024).
- A softmax gives ``x_i (R_i - p_i sum R)`` (Achtibat et al. 2024).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, Attributor, refuse_repeated_calls
from monai_xai.errors import InputError, UnsupportedNetworkError
from monai_xai.forward import Scoring
from monai_xai.operations import (
    ADDITIONS,
    DIVISIONS,
    ROUTES,
    Kind,
    Operation,
    Watch,
    passed,
    pull_back_through,
    trace,
)
from monai_xai.terms import Tensors, Term, pull_back

_WEIGHTED = frozenset(
    ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
)
EPSILON = 1e-9  # keeps quotients of the fixed rules from dividing by zero


class Branch(NamedTuple):
    """Part of a rule: relevance goes in proportion to ``sum_i f(x_i, w_i) + bias``, each product to its own x.

    Args:
        share: of the relevance that this part passes on.
        pairs: inputs and weights.
        bias: a part of the bias, or None.
        mask: where the branch is in force, by the sign of the result; None everywhere.
    """

    share: float
    pairs: Sequence[tuple[Tensor, Tensor]]
    bias: Tensor | None
    mask: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class PropagationRule(ABC):
    """How relevance goes through a convolution or a linear layer."""

    epsilon: ClassVar[float] = EPSILON

    @abstractmethod
    def branches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Branch]:
        """Return the parts of the rule."""


@dataclass(frozen=True)
class EpsilonRule(PropagationRule):
    """In proportion to all products, ``z = sum x w + b``, with ``epsilon`` times its root mean square added.

    With a vanishing epsilon the result on networks of ReLU is the input times the gradient.

    Reference: Bach et al., PLOS ONE 2015 (doi:10.1371/journal.pone.0130140), equation 58.
    """

    epsilon: float = 1e-2  # type: ignore[misc]

    def branches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Branch]:
        return [Branch(1.0, [(x, weight)], bias)]


@dataclass(frozen=True)
class GammaRule(PropagationRule):
    """Products that agree with the sign of the result count ``1 + gamma`` times.

    Reference: Montavon et al., "Layer-Wise Relevance Propagation: An Overview", 2019, section 10.2.3; for inputs of
    both signs as in Andéol et al. 2021 (arXiv:2112.01442).
    """

    gamma: float = 0.25

    def branches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Branch]:
        high, low, plus, minus = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
        more = 1 + self.gamma
        rising = [(high, more * plus + minus), (low, plus + more * minus)]
        falling = [(high, plus + more * minus), (low, more * plus + minus)]
        up = None if bias is None else bias + self.gamma * bias.clamp(min=0)
        down = None if bias is None else bias + self.gamma * bias.clamp(max=0)
        return [Branch(1.0, rising, up, lambda z: z >= 0), Branch(1.0, falling, down, lambda z: z < 0)]


@dataclass(frozen=True)
class AlphaBetaRule(PropagationRule):
    """Positive products share ``alpha`` times the relevance, negative ones take ``alpha - 1`` times of it away.

    Reference: Bach et al. 2015, equation 60.
    """

    alpha: float = 2.0

    def __post_init__(self) -> None:
        if self.alpha < 1:
            raise InputError(f"AlphaBetaRule(alpha={self.alpha}) must be at least 1; beta is alpha - 1.")

    def branches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Branch]:
        high, low, plus, minus = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
        up, down = (None, None) if bias is None else (bias.clamp(min=0), bias.clamp(max=0))
        found = [Branch(self.alpha, [(high, plus), (low, minus)], up)]
        if self.alpha != 1:
            found.append(Branch(1 - self.alpha, [(high, minus), (low, plus)], down))
        return found


@dataclass(frozen=True)
class ZPlusRule(PropagationRule):
    """Only positive products share the relevance: :class:`AlphaBetaRule` with alpha 1.

    Reference: Montavon et al., "Explaining nonlinear classification decisions with deep Taylor decomposition", Pattern
    Recognition 2017 (doi:10.1016/j.patcog.2016.11.008).
    """

    def branches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Branch]:
        return AlphaBetaRule(1.0).branches(x, weight, bias)


@dataclass(frozen=True)
class FlatRule(PropagationRule):
    """Every value in the field of view gets the same share.

    Reference: Lapuschkin et al., Nature Communications 2019 (doi:10.1038/s41467-019-08987-4).
    """

    def branches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Branch]:
        return [Branch(1.0, [(torch.ones_like(x), torch.ones_like(weight))], None)]


@dataclass(frozen=True)
class BoxRule(PropagationRule):
    """For inputs in a range: ``x w - low w+ - high w-``, for the first layer.

    Args:
        low: the smallest possible value.
        high: the largest possible value.

    Reference: Montavon et al. 2017 (doi:10.1016/j.patcog.2016.11.008), z-B rule.
    """

    low: float = 0.0
    high: float = 1.0

    def branches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Branch]:
        low, high = torch.full_like(x, self.low), torch.full_like(x, self.high)
        return [Branch(1.0, [(x, weight), (low, -weight.clamp(min=0)), (high, -weight.clamp(max=0))], None)]


@dataclass(frozen=True)
class ExcitationRule(PropagationRule):
    """Only positive inputs by positive weights share the relevance; the bias takes none.

    Args:
        is_contrastive: whether what the negated weights would get is taken off.

    Reference: Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 2018, equations 5 and 10
    (arXiv:1608.00507).
    """

    is_contrastive: bool = False

    def branches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Branch]:
        found = [Branch(1.0, [(x.clamp(min=0), weight.clamp(min=0))], None)]
        if self.is_contrastive:
            found.append(Branch(-1.0, [(x.clamp(min=0), (-weight).clamp(min=0))], None))
        return found


@dataclass(frozen=True)
class LRP(Attributor):
    """Layer-wise relevance propagation: relevance in units of the score, handed down layer by layer.

    Args:
        convolution: the rule of convolutions.
        dense: the rule of linear layers.
        first: the rule of calls that see an input of the network; None takes that of their kind.
        last: the rule of the call with weights that comes last; None takes that of its kind.
        addition: "ratio" splits relevance where branches meet in proportion to their absolute values, which stays
            bounded where they cancel; "signed" in proportion to the values, as all else.

    What biases take is not on the map: ``facts["conserved"]`` says which share of the score is, and
    ``facts["absorbed_by_biases"]`` which they took. That is no error of the method but part of it. Masks and indices
    that the network makes of its input are constants.

    Reference: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance
    Propagation", PLOS ONE 2015 (doi:10.1371/journal.pone.0130140); composites as in Montavon et al. 2019; attention as
    in Achtibat et al., "AttnLRP", ICML 2024 (arXiv:2402.05602); sums as in Otsuki et al., ECCV 2024 (arXiv:2407.09115).
    """

    convolution: PropagationRule = field(default_factory=GammaRule)
    dense: PropagationRule = field(default_factory=EpsilonRule)
    first: PropagationRule | None = None
    last: PropagationRule | None = None
    addition: Literal["ratio", "signed"] = "ratio"

    summable: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.addition not in ("ratio", "signed"):
            raise InputError(f"LRP(addition={self.addition!r}): choose 'ratio' or 'signed'.")

    def attribute(self, scoring: Scoring) -> Attribution:
        refuse_repeated_calls(self, scoring)
        absorbed: list[float] = []

        def attribute(term: Term, inputs: Tensors) -> tuple[Tensor, Tensors]:
            score, leaves = trace(term, inputs, watch := _HandDown(self))
            relevance = pull_back(score, leaves, score.detach())
            absorbed.append(watch.absorbed)
            return score.detach(), relevance

        score, maps = scoring.propagate(self.name, attribute, scoring.values)
        whole, total = float(score.sum()), sum(float(values.sum()) for values in maps)
        facts = {"conserved": total / whole, "absorbed_by_biases": sum(absorbed) / whole} if whole else {}
        return Attribution(scoring.named(maps), score, facts=facts)


@dataclass(frozen=True)
class ExcitationBackprop(Attributor):
    """Which positive activations feed the score, as the probability of a walk from the output down to the input.

    Args:
        is_contrastive: whether what feeds the opposite of the score is taken off, at the last layer.

    It is :class:`LRP` with :class:`ExcitationRule` everywhere. Below the first layer only positive inputs count: on
    images with values of both signs the map says little of where they are negative.

    Reference: Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 2018 (arXiv:1608.00507).
    """

    is_contrastive: bool = False

    summable: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def attribute(self, scoring: Scoring) -> Attribution:
        last = ExcitationRule(is_contrastive=True) if self.is_contrastive else None
        return LRP(ExcitationRule(), ExcitationRule(), last=last).attribute(scoring)


class _HandDown(Watch):
    """A pass in which every call gets a backward pass that hands down relevance in place of a gradient."""

    routes = ROUTES

    def __init__(self, method: LRP) -> None:
        super().__init__()
        self.method = method
        self.is_below = False  # whether relevance has come through a call with weights
        self.absorbed = 0.0  # relevance that convolutions and linear layers kept for their biases
        self.moved: dict[int, Tensor] = {}  # inputs of the network that were merely moved
        self.folding: dict[int, _Weights] = {}  # by their results

    def handle(self, operation: Operation) -> Any:
        if operation.kind is Kind.ROUTE:
            return self._follow(operation)
        if operation.name == "batch_norm" and (folded := self._fold(operation)):
            operation = folded
        if operation.name in ADDITIONS and self.method.addition == "ratio":
            return _by_ratio(operation)
        rule = _FIXED.get(operation.kind)
        if (
            operation.name in _WEIGHTED
            and operation.kind is Kind.LINEAR
            and _Weighted.of(operation).sees_input
        ):
            return self._weighted(operation)
        if rule is None:
            raise UnsupportedNetworkError(f"LRP has no rule for {operation}. Use IntegratedGradients().")
        return rule(operation)

    def _follow(self, operation: Operation) -> Any:
        """Move values, and know an input of the network again afterwards."""
        result = operation.run()
        if any(self._is_input(x) for x in operation.dependents):
            moved = result if isinstance(result, tuple | list) else (result,)
            self.moved |= {id(x): x for x in moved if isinstance(x, Tensor)}
        return result

    def _is_input(self, x: Tensor) -> bool:
        return x.is_leaf or id(x) in self.moved

    def _weighted(self, operation: Operation) -> Tensor:
        (x,) = operation.dependents
        weighted = _Weighted.of(operation)
        rule = self.method.dense if operation.name == "linear" else self.method.convolution
        if self.method.first is not None and self._is_input(x):
            rule = self.method.first
        (values,) = operation.values

        def backward(coming: Tensor) -> list[Tensor]:
            is_last, self.is_below = not self.is_below, True
            own = self.method.last if is_last and self.method.last is not None else rule
            relevance = weighted.hand_down(own, values, coming)
            self.absorbed += float(coming.sum() - relevance.sum())
            return [relevance]

        result = passed(backward, operation.run(), [x])
        self.folding[id(result)] = _Weights(operation, result, (result._version, x._version))
        return result

    def _fold(self, operation: Operation) -> Operation | None:
        """Return the convolution before a batch norm with the norm in its weights, if there is one."""
        given = operation.named(_BATCH_NORM)
        found = self.folding.get(id(given["input"]))
        if found is None or found.is_written:
            return None
        before = found.operation
        scale = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
        scale = scale if given.get("weight") is None else scale * given["weight"]
        shift = 0 if given.get("bias") is None else given["bias"]
        weighted = _Weighted.of(before)
        axis = 1 if "transpose" in before.name else 0
        groups = weighted.rest.get("groups", 1) if axis else 1
        weight = weighted.weight
        if axis:
            shape = (groups, weight.shape[0] // groups, weight.shape[1], *weight.shape[2:])
            per_group = scale.reshape(groups, 1, -1, *(1,) * (weight.ndim - 2))
            weight = (weight.reshape(shape) * per_group).reshape(weight.shape)
        else:
            weight = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
        bias = (0 if weighted.bias is None else weighted.bias) - given["running_mean"]
        return weighted.with_weights(weight, bias * scale + shift)


class _Weights(NamedTuple):
    """A call with weights, into which a batch norm that comes next may be folded.

    Args:
        operation: the call.
        result: what it gave.
        versions: of its result and its input, which count what is written in place.
    """

    operation: Operation
    result: Tensor
    versions: tuple[int, int]

    @property
    def is_written(self) -> bool:
        """Whether the network has written to the input or the result since, so that the norm is a call of its own."""
        return (self.result._version, self.operation.dependents[0]._version) != self.versions


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@dataclass(frozen=True)
class _Weighted:
    """A convolution or linear layer as a function of input, weight and bias."""

    operation: Operation
    weight: Tensor
    bias: Tensor | None
    rest: dict[str, Any]

    @classmethod
    def of(cls, operation: Operation) -> _Weighted:
        given = operation.named(_ARGUMENTS[operation.name])
        rest = {key: value for key, value in given.items() if key not in ("input", "weight", "bias")}
        return cls(operation, given["weight"], given.get("bias"), rest)

    @property
    def sees_input(self) -> bool:
        """Whether it is the layer's input that depends on that of the network, and not its weights."""
        found: bool = self.operation.named(_ARGUMENTS[self.operation.name])["input"].requires_grad
        return found

    def with_weights(self, weight: Tensor, bias: Tensor | None) -> Operation:
        """Return the call with other weights."""
        return replace(
            self.operation,
            arguments=(self.operation.dependents[0],),
            options={"weight": weight, "bias": bias, **self.rest},
        )

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the result for other values."""
        result: Tensor = self.operation.function(x, weight=weight, bias=bias, **self.rest)
        return result

    def hand_down(self, rule: PropagationRule, x: Tensor, coming: Tensor) -> Tensor:
        """Return the relevance of the input from that of the result."""
        branches = rule.branches(x, self.weight, self.bias)
        is_masked = any(branch.mask for branch in branches)
        result = self.call(x, self.weight, self.bias) if is_masked else None
        total = torch.zeros_like(x)
        for branch in branches:
            relevance = coming * branch.share
            if branch.mask is not None and result is not None:
                relevance = torch.where(branch.mask(result), relevance, 0)
            total += self._through(branch, relevance, rule.epsilon)
        return total

    def _through(self, branch: Branch, relevance: Tensor, epsilon: float) -> Tensor:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x, _ in branch.pairs]
            parts = [self.call(x, weight) for x, (_, weight) in zip(leaves, branch.pairs, strict=True)]
            z = torch.stack([part.detach() for part in parts]).sum(0)
        if branch.bias is not None:
            z = z + (
                branch.bias
                if self.operation.name == "linear"
                else branch.bias.reshape(1, -1, *(1,) * (z.ndim - 2))
            )
        quotient = relevance / stabilized(z, epsilon)
        found = torch.autograd.grad(parts, leaves, [quotient] * len(parts))
        return sum(
            (leaf.detach() * g for leaf, g in zip(leaves, found, strict=True)), torch.zeros_like(leaves[0])
        )


_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    **{
        f"conv{n}d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups") for n in (1, 2, 3)
    },
    **{
        f"conv_transpose{n}d": (
            *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
        )
        for n in (1, 2, 3)
    },
}


def stabilized(z: Tensor, epsilon: float) -> Tensor:
    """Return z with its absolute value raised by a share of each sample's root mean square, to be divided by.

    Raises:
        UnsupportedNetworkError: if such a share is zero in the type of z.
    """
    if torch.finfo(z.dtype).tiny > EPSILON:
        raise UnsupportedNetworkError(
            f"LRP divides by sums that {z.dtype} is too coarse for: use network.float() and inputs.float()."
        )
    axes = tuple(range(1, z.ndim))
    floor = epsilon * (z.square().mean(axes, keepdim=True).sqrt() if axes else z.abs())
    floor = floor.where(floor > 0, 1)
    return z + torch.where(z >= 0, floor, -floor)


def _as_it_is(operation: Operation) -> Tensor:
    return passed(lambda coming: [coming], operation.run(), operation.dependents)


def _by_ratio(operation: Operation) -> Tensor:
    """A sum or difference: each summand gets its share of the absolute values; a constant keeps its own."""
    one, other = operation.arguments[:2]
    sizes = [torch.as_tensor(value).detach().abs().to(operation.dependents[0]) for value in (one, other)]
    sizes[1] = sizes[1] * abs(operation.options.get("alpha", 1))

    def backward(coming: Tensor) -> list[Tensor]:
        total = sizes[0] + sizes[1]
        shares = [torch.where(total > 0, size / torch.where(total > 0, total, 1), 0.5) for size in sizes]
        return [
            (coming * share).sum_to_size(value.shape)
            for value, share in zip((one, other), shares, strict=True)
            if isinstance(value, Tensor) and value.requires_grad
        ]

    return passed(backward, operation.run(), operation.dependents)


def _in_proportion(operation: Operation, share: float = 1.0) -> Tensor:
    """A call that is linear in its dependents: each gets its part of the result, times a share."""
    values, result = operation.values, operation.run()
    kept, again = operation.kept.keep(result), operation.held()

    def backward(coming: Tensor) -> list[Tensor]:
        quotient = coming * share / stabilized(kept, EPSILON)
        found = pull_back_through(lambda *xs: again.on(*xs).run(), values, quotient)
        return [x * g for x, g in zip(values, found, strict=True)]

    return passed(backward, result, operation.dependents)


def _halves(operation: Operation) -> Tensor:
    """A call that is linear in each of two dependents alone: each gets half; of a quotient, the numerator gets all."""
    if len(operation.dependents) != 2:
        raise UnsupportedNetworkError(f"LRP has no rule for {operation}. Use IntegratedGradients().")
    if operation.name in DIVISIONS:
        _, divisor = operation.dependents
        return passed(
            lambda coming: [coming, torch.zeros_like(divisor)], operation.run(), operation.dependents
        )
    return _in_proportion(operation, 0.5)


def _softmax(operation: Operation) -> Tensor:
    dim = operation.named(("input", "dim"))["dim"]
    (values,) = operation.values

    def backward(coming: Tensor) -> list[Tensor]:
        return [values * (coming - torch.softmax(values, dim) * coming.sum(dim, keepdim=True))]

    return passed(backward, operation.run(), operation.dependents)


_FIXED: dict[Kind, Callable[[Operation], Any]] = {
    Kind.MAXIMUM: Operation.run,
    Kind.ACTIVATION: _as_it_is,
    Kind.NORM: _as_it_is,
    Kind.LINEAR: _in_proportion,
    Kind.ADD: _in_proportion,
    Kind.PRODUCT: _halves,
    Kind.SOFTMAX: _softmax,
}
