"""Guided backpropagation and deconvolution: the gradient, in which rectifiers let only positive signals back."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, Attributor, refuse_repeated_calls
from monai_xai.errors import UnsupportedNetworkError
from monai_xai.forward import Scoring
from monai_xai.operations import COMPARISONS, RECTIFIERS, Operation, Watch, passed, trace
from monai_xai.terms import Tensors, Term, pull_back

_HIDDEN = frozenset(("maximum", "minimum"))


@dataclass(frozen=True)
class RectifiedGradient(Attributor):
    """A gradient with another rule for rectifiers: ReLU and its kin (leaky, parametric, ELU, GELU, SiLU, Mish, …).

    They are found call by call, whether modules or functions, shared, or in place. Gates (sigmoid, tanh, softmax) keep
    their gradient. A network without rectifiers is refused: there it would silently be the plain gradient.
    """

    by_hooks: ClassVar[bool] = True
    by_window: ClassVar[bool] = True
    keeps_derivative: ClassVar[bool]
    """Whether the derivative of a rectifier stays, and the rule comes on top of it."""

    def attribute(self, scoring: Scoring) -> Attribution:
        refuse_repeated_calls(self, scoring)
        score, maps = scoring.propagate(self.name, self._attribute, scoring.values)
        return Attribution(scoring.named(maps), score)

    def _attribute(self, term: Term, inputs: Tensors) -> tuple[Tensor, Tensors]:
        try:
            return self._pass_back(term, inputs, in_place=True)
        except RuntimeError as error:
            if "inplace" not in str(error).lower().replace("-", ""):
                raise
        return self._pass_back(term, inputs, in_place=False)  # in place, autograd refuses this network

    def _pass_back(self, term: Term, inputs: Tensors, *, in_place: bool) -> tuple[Tensor, Tensors]:
        score, leaves = trace(term, inputs, watch := _Rectify(self, in_place))
        watch.require_rectifiers(type(term.network).__name__)
        return score.detach(), pull_back(score, leaves)

    @abstractmethod
    def rectify(self, operation: Operation) -> Tensor:
        """Return the result of a rectifier, with the backward pass of the method."""


@dataclass(frozen=True)
class GuidedBackprop(RectifiedGradient):
    """The gradient, in which every rectifier lets only positive gradients pass: ``max(g, 0) f'(x)``.

    For ReLU this is the paper's rule. For the others, whose derivative takes the place of ReLU's 0 and 1, it is ours.

    Reference: Springenberg et al., "Striving for Simplicity: The All Convolutional Net", ICLR workshop 2015
    (arXiv:1412.6806).
    """

    keeps_derivative: ClassVar[bool] = True

    def rectify(self, operation: Operation) -> Tensor:
        result: Tensor = operation.run()
        result.register_hook(Tensor.relu)  # and on through the derivative
        return result


@dataclass(frozen=True)
class Deconvolution(RectifiedGradient):
    """The gradient, in which every rectifier is applied to what comes back and not where it was: ``max(g, 0)``.

    Reference: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv:1311.2901).
    """

    keeps_derivative: ClassVar[bool] = False

    def rectify(self, operation: Operation) -> Tensor:
        with torch.no_grad():
            result: Tensor = operation.run()
        return passed(lambda coming: [coming.relu()], result, operation.dependents)


class _Rectify(Watch):
    takes_apart = False

    def __init__(self, method: RectifiedGradient, in_place: bool) -> None:
        super().__init__()
        self.method = method
        self.in_place = in_place
        self.count = 0
        self.masks: list[Operation] = []

    def handle(self, operation: Operation) -> Any:
        is_rectifier = operation.name in RECTIFIERS
        if operation.name in _HIDDEN or (is_rectifier and len(operation.dependents) != 1):
            raise self._unclear(operation)
        if not is_rectifier:
            return operation.run()
        self.count += 1
        return self.method.rectify(operation)

    def lose(self, operation: Operation, result: Any) -> Any:
        is_large = isinstance(result, Tensor) and result.numel() > 1
        if is_large and (operation.name in COMPARISONS or result.is_floating_point()):
            self.masks.append(operation)  # or what a mask may be made of
        return result

    def handle_in_place(self, operation: Operation, written: Tensor) -> Any:
        """Let the network work in place where autograd sees it do so, and a rule may come after."""
        is_own = operation.name in RECTIFIERS and (not self.method.keeps_derivative or written._is_view())
        is_copied = is_own or not self.in_place
        return super().handle_in_place(operation, written) if is_copied else self.handle(operation)

    def require_rectifiers(self, network: str) -> None:
        """Refuse a network that has called none, or in which there may be others than those called."""
        if self.masks:
            raise self._unclear(self.masks[0])
        if not self.count:
            raise UnsupportedNetworkError(
                f"{self.method.name} acts on rectifiers (ReLU and its kin), and {network} calls none: it would "
                "silently be the plain gradient. Use Saliency() or IntegratedGradients()."
            )

    def _unclear(self, operation: Operation) -> UnsupportedNetworkError:
        return UnsupportedNetworkError(
            f"{self.method.name} cannot tell whether {operation} rectifies. Use relu, or Saliency()."
        )
