"""DeepLift: differences of activations between input and baseline, call by call, so that they always add up.

The network runs at the baseline, where every nonlinear call is remembered, and then at the input, where the same call
gets a backward pass that carries its change from the one to the other exactly:

- An activation is passed by its secant ``(f(x) - f(b)) / (x - b)`` (rescale rule).
- A product, of matrices or gates too: ``x y - b c = (x - b) (y + c) / 2 + (y - c) (x + b) / 2``.
- A norm, with centered values ``c`` and deviations ``s`` at input and baseline (1, 0): ``c1 / s1 - c0 / s0 =
  (c1 - c0) (s1 + s0) / (s1² + s0²) + (s1² c0 + s0² c1) / (s1² + s0²) (1 / s1 - 1 / s0)``, and the last bracket by the
  secant and the product rule on the mean of squares. It stays bounded where the baseline is constant.
- A softmax: ``p_i - q_i = m_i (d_i - sum_j m_j d_j / sum_j m_j)`` with ``d = x - b`` and the logarithmic mean ``m``
  of p and q.
- Of a maximum, what it rises goes to the largest at the input, what it falls to the largest at the baseline.

Everything else is linear, or refused by name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, BaselineAttributor, average, refuse_repeated_calls
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import UnsupportedNetworkError
from monai_xai.forward import Scoring
from monai_xai.operations import DIVISIONS, Kind, Norm, Operation, Watch, passed, pull_back_through, trace
from monai_xai.terms import Tensors, Term, pull_back


@dataclass(frozen=True)
class DeepLift(BaselineAttributor):
    """Differences of activations between input and baseline, passed back by the rescale rule.

    Args:
        baseline: what the input is held against; attributions are averaged over several (``Samples``), which is
            DeepLIFT SHAP.

    It adds up on every network that is made of operations it knows (activations, products, norms, softmax, attention,
    maxima, and all that is linear); others are refused by name. Where Captum's DeepLift adds up
    (ReLU, ELU and leaky ReLU modules, batch norm), these are its values.

    Reference: Shrikumar et al., "Learning Important Features Through Propagating Activation Differences", ICML 2017
    (arXiv:1704.02685), rescale rule; for products and maxima Lundberg & Lee, NeurIPS 2017 (arXiv:1705.07874).
    """

    baseline: BaselineLike = field(default_factory=Blur)

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True
    by_window: ClassVar[bool] = True
    cause_of_gap: ClassVar[str] = (
        "single precision on a score that hardly changes, or a network that draws random numbers; use "
        "IntegratedGradients(), or run in double precision"
    )

    def attribute(self, scoring: Scoring) -> Attribution:
        refuse_repeated_calls(self, scoring)
        return average([self._propagate(scoring, baseline) for baseline in self.draws(scoring)])

    def _propagate(self, scoring: Scoring, baseline: Tensors) -> Attribution:
        starts: list[Tensor] = []

        def attribute(term: Term, inputs: Tensors, start: Tensors) -> tuple[Tensor, Tensors]:
            score, start_score, multipliers = _multipliers(term, inputs, start)
            starts.append(start_score)
            return score, tuple(m * (x - b) for m, x, b in zip(multipliers, inputs, start, strict=True))

        score, maps = scoring.propagate(self.name, attribute, scoring.values, baseline)
        return Attribution(scoring.named(maps), score, scoring.sum_scores(starts))


def _multipliers(term: Term, inputs: Tensors, baseline: Tensors) -> tuple[Tensor, Tensor, Tensors]:
    """Return the scores of a part at the input and at the baseline, and the multipliers of every input."""
    start_score, _ = trace(term, baseline, start := _Remember())
    score, leaves = trace(term, inputs, compare := _Compare(start))
    compare.require_end()
    return score.detach(), start_score.detach(), pull_back(score, leaves)


class _Moment(NamedTuple):
    """A nonlinear call at the baseline: its name, where it was, and what it got and gave, without a graph."""

    name: str
    where: str
    values: list[Tensor]
    result: Tensor

    def is_call_of(self, operation: Operation) -> bool:
        """Tell whether another call may be the same one at the input."""
        shapes = [x.shape for x in operation.dependents]
        return self.name == operation.name and [x.shape for x in self.values] == shapes


class _TwoPoints(Watch):
    """A pass in which every nonlinear call is handled, after quotients were taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[tuple[str, Any]] = []

    def lose(self, operation: Operation, result: Any) -> Any:
        self.lost.append((str(operation), _copied(result)))
        return result

    def handle(self, operation: Operation) -> Any:
        kind = operation.kind
        if kind in (Kind.ROUTE, Kind.LINEAR, Kind.ADD):
            return operation.run()
        if kind is Kind.PRODUCT and operation.name in DIVISIONS:
            numerator, divisor = operation.dependents
            with self:
                return numerator * divisor.reciprocal()
        if kind is Kind.UNKNOWN or (kind is Kind.PRODUCT and len(operation.dependents) != 2):
            raise UnsupportedNetworkError(
                f"DeepLift has no rule for {operation}. Use IntegratedGradients(), which needs none."
            )
        return self.nonlinear(operation)

    @abstractmethod
    def nonlinear(self, operation: Operation) -> Any:
        """Return the result of an activation, product, norm, softmax or maximum."""


class _Remember(_TwoPoints):
    """At the baseline: notes what goes in and comes out, and keeps no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[_Moment] = []

    def nonlinear(self, operation: Operation) -> Any:
        with torch.no_grad():
            result = operation.run()
        values, *rest = result if isinstance(result, tuple) else (result,)
        self._remember(operation, operation.values, values)
        values = passed(lambda coming: [None], values, [torch.zeros((), requires_grad=True)])
        return (values, *rest) if rest else values

    def handle_in_place(self, operation: Operation, written: Tensor) -> Any:
        """Let activations work in place: nothing is passed back through this pass."""
        if operation.kind is not Kind.ACTIVATION or operation.dependents[0] is not written:
            return super().handle_in_place(operation, written)
        before = written.detach().clone()
        with torch.no_grad():
            operation.run()
        self._remember(operation, [before], written)
        return written

    def _remember(self, operation: Operation, given: list[Tensor], result: Tensor) -> None:
        self.memory.append(_Moment(operation.name, str(operation), given, operation.kept.keep(result)))


class _Compare(_TwoPoints):
    """At the input: gives each call the backward pass that carries its change from the baseline."""

    def __init__(self, start: _Remember) -> None:
        super().__init__()
        self.start = start
        self.kept = start.kept  # both passes may write to what one of them keeps
        self.memory = start.memory[::-1]

    def nonlinear(self, operation: Operation) -> Any:
        moment = self.memory.pop() if self.memory else None
        if moment is None or not moment.is_call_of(operation):
            raise _another_path(str(operation))
        now = operation.dependents
        result = operation.run()
        values, *rest = result if isinstance(result, tuple) else (result,)
        pair = _Pair(operation, operation.values, moment.values, operation.kept.keep(values), moment.result)
        values = passed(_RULES[operation.kind](pair), values, now)
        return (values, *rest) if rest else values

    def require_end(self) -> None:
        """Refuse a network that has called less than at the baseline, or used other masks or indices."""
        if self.memory:
            raise _another_path(self.memory[-1].where)
        for (where, now), (_, then) in zip(self.lost, self.start.lost, strict=False):
            if not _is_same(now, then):
                raise _another_path(where)


def _copied(value: Any) -> Any:
    """Return what a network knows of its input without a gradient, as it is now."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copied(item) for item in value] if isinstance(value, tuple | list) else value


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one == other if isinstance(one, bool | int | float) else type(one) is type(other)


def _another_path(where: str) -> UnsupportedNetworkError:
    return UnsupportedNetworkError(
        f"The network takes another path at the input than at the baseline, at {where}: its masks, indices or "
        "control flow depend on the data, so that activations cannot be compared. Use IntegratedGradients() or "
        "FeatureAblation()."
    )


class _Pair(NamedTuple):
    """A nonlinear call at the input and at the baseline."""

    operation: Operation
    inputs: list[Tensor]
    baselines: list[Tensor]
    output: Tensor
    baseline_output: Tensor

    def values(self, *inputs: Tensor) -> Tensor:
        """Call the function on other inputs; the result without indices."""
        result = self.operation.on(*inputs).run()
        values: Tensor = result[0] if isinstance(result, tuple) else result
        return values


Backward = Callable[[Tensor], Sequence[Tensor]]


def _pull_back(function: Callable[[Tensor], Tensor], x: Tensor, coming: Tensor) -> Tensor:
    (found,) = pull_back_through(function, [x], coming)
    return found


def _activation(pair: _Pair) -> Backward:
    """The secant; where both points are the same to rounding, the derivative."""
    (x,), (b,) = pair.inputs, pair.baselines
    change = x - b
    if pair.operation.name == "relu":
        # No digits are lost: of two points on one side, the difference stays or is 0.
        steps = (pair.output - pair.baseline_output).div_(change)
        is_same = change == 0
        if is_same.any():
            steps = torch.where(is_same, (x > 0).to(x), steps)
        return lambda coming: [coming * steps]
    is_same = change.abs() <= 8 * torch.finfo(x.dtype).eps * (x.abs() + b.abs())
    secant = (pair.output - pair.baseline_output) / torch.where(is_same, 1, change)
    if is_same.any():
        secant = torch.where(is_same, _pull_back(pair.values, x, torch.ones_like(pair.output)), secant)
    return lambda coming: [coming * secant]


def _product(pair: _Pair) -> Backward:
    """Each factor times the middle of the other."""
    (x, y), (b, c) = pair.inputs, pair.baselines

    def backward(coming: Tensor) -> list[Tensor]:
        return [
            _pull_back(lambda a: pair.values(a, (y + c) / 2), x, coming),
            _pull_back(lambda a: pair.values((x + b) / 2, a), y, coming),
        ]

    return backward


def _norm(pair: _Pair) -> Backward:
    """The rule of the module's table, and the mean taken off."""
    norm = Norm.of(pair.operation)
    one, zero = norm.center(pair.inputs[0]), norm.center(pair.baselines[0])
    sigma, start_sigma = norm.deviation(one), norm.deviation(zero)
    squares = sigma.square() + start_sigma.square()
    slope = (sigma + start_sigma) / squares
    middle = (sigma.square() * zero + start_sigma.square() * one) / squares
    mean = (one + zero) / -(sigma * start_sigma * (sigma + start_sigma))  # of both, times twice the secant

    def backward(coming: Tensor) -> list[Tensor]:
        scaled = coming if norm.weight is None else coming * norm.weight
        grouped = scaled.reshape(norm.shape)
        back = slope * grouped + (grouped * middle).mean(norm.axes, keepdim=True) * mean
        return [norm.center(back).reshape(coming.shape)]

    return backward


def _softmax(pair: _Pair) -> Backward:
    """By the logarithmic mean of both distributions, for which the changes sum to zero exactly."""
    dim = pair.operation.named(("input", "dim"))["dim"]
    logs = [torch.log_softmax(x, dim) for x in (pair.inputs[0], pair.baselines[0])]
    mean = _logarithmic_mean(*logs)
    share = mean / mean.sum(dim, keepdim=True)
    if pair.operation.name == "log_softmax":
        return lambda coming: [coming - share * coming.sum(dim, keepdim=True)]
    return lambda coming: [mean * coming - share * (mean * coming).sum(dim, keepdim=True)]


def _logarithmic_mean(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``(p - q) / (log p - log q)``, from the logarithms."""
    difference = torch.nan_to_num(log_p - log_q)
    is_close = difference.abs() < 1e-2
    near = ((log_p + log_q) / 2).exp() * (1 + difference.square() / 24)
    return torch.where(is_close, near, (log_p.exp() - log_q.exp()) / torch.where(is_close, 1, difference))


def _maximum(pair: _Pair) -> Backward:
    """What rises goes to the largest at the input, what falls to the largest at the baseline."""
    (x,), (b,) = pair.inputs, pair.baselines
    change = x - b
    higher = torch.maximum(pair.output, pair.baseline_output)
    rise, fall = higher - pair.baseline_output, pair.output - higher

    def backward(coming: Tensor) -> list[Tensor]:
        moved = _pull_back(pair.values, x, coming * rise) + _pull_back(pair.values, b, coming * fall)
        is_same = change == 0
        slope = _pull_back(pair.values, x, coming) if is_same.any() else coming.new_zeros(())
        return [torch.where(is_same, slope, moved / torch.where(is_same, 1, change))]

    return backward


_RULES: dict[Kind, Callable[[_Pair], Backward]] = {
    Kind.ACTIVATION: _activation,
    Kind.PRODUCT: _product,
    Kind.NORM: _norm,
    Kind.SOFTMAX: _softmax,
    Kind.MAXIMUM: _maximum,
}
