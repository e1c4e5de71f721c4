"""What a score is a sum of: calls of one function on parts of the inputs, and their gradients."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from monai_xai.calls import CalledNetwork, called_by_position
from monai_xai.errors import InputError, UnsupportedNetworkError
from monai_xai.targets import Target

Tensors = tuple[Tensor, ...]


class SeveredGradientWarning(UserWarning):
    """The network cuts its own graph, so that its gradient leaves out what passes there."""


def count_not_finite(x: Tensor) -> int:
    """Return how many values are NaN or infinite; a finite sum spares looking at each."""
    return 0 if torch.isfinite(x.detach().sum()) else int((~torch.isfinite(x)).sum())


class ScoreFunction(nn.Module):
    """The network and its target as one module: ``(*inputs, *selection)`` to scores of shape (N,).

    Args:
        network: called with the inputs by position.
        target: turns the output into scores.
        n_inputs: how many of the arguments are inputs of the network.
    """

    def __init__(self, network: nn.Module, target: Target, n_inputs: int) -> None:
        super().__init__()
        self.network = network
        self.target = target
        self.n_inputs = n_inputs

    def forward(self, *arguments: Tensor) -> Tensor:
        inputs, selection = arguments[: self.n_inputs], arguments[self.n_inputs :]
        output = self.target.pick(self.network(*inputs))
        scores = self.target.score(output, *selection)
        if scores.shape != inputs[0].shape[:1]:
            raise InputError(
                f"{self.target} must give one score per sample, shape ({inputs[0].shape[0]},), got "
                f"{tuple(scores.shape)} from an output of shape {tuple(output.shape)}."
            )
        return scores


class Term(ABC):
    """One call of a function on a part of the inputs.

    The function gets copies: networks that work in place on their input leave the user's as it is.

    Attributes:
        function: ``(*inputs, *selection)`` to scores of shape (n,).
        samples: the rows of the batch that it contributes to, n of N.
    """

    function: nn.Module
    samples: slice

    @property
    def network(self) -> nn.Module:
        """The network inside the function."""
        network = self.function.network
        assert isinstance(network, nn.Module)
        return called_by_position(network)

    @property
    def joins_batches(self) -> bool:
        """Whether several parts may go through the function together, also those of other terms.

        Not where the network behind the function is an inferer, or sees the numbers of these very samples in the place
        of embedded values.
        """
        network = self.function.network
        return isinstance(network, CalledNetwork) and not network.embedded

    @abstractmethod
    def selection(self) -> Tensors:
        """Return the further arguments of the function."""

    @abstractmethod
    def cut(self, inputs: Sequence[Tensor]) -> Tensors:
        """Return the part of (padded) whole inputs that the function sees."""

    @abstractmethod
    def add(self, totals: Sequence[Tensor], maps: Sequence[Tensor]) -> None:
        """Add maps of the part to (padded) whole maps in place: the adjoint of :meth:`cut`."""

    @abstractmethod
    def blending(self) -> Tensor | float:
        """Return how much this term's voxels count among all terms that see them; sums to one over all terms."""

    @abstractmethod
    def coordinates(self, x: Tensor) -> list[Tensor]:
        """Return, for each axis of an unpadded input after the batch, which indices the part sees; -1 for none."""

    def near(self, inputs: Sequence[Tensor]) -> Term:
        """Return the same term, made quick at parts that differ from this one in places."""
        return self

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the scores of a part, without a graph, shape (n,)."""
        with torch.no_grad():
            return self.function(*(x.clone() for x in inputs), *self.selection())

    def trace(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the scores of a part, shape (n,), with a graph that leads to copies of its inputs, and these.

        Raises:
            UnsupportedNetworkError: if the score does not depend on the inputs.
        """
        return trace_inputs(self.function, inputs, self.selection())


class Cuts(TorchFunctionMode):
    """Notes where a network takes values out of the graph: ``Tensor.data`` and ``detach``."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CUTTING and args[0].requires_grad and args[0].numel() > 1:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))

    def warn(self, network: nn.Module) -> None:
        """Warn of what was found."""
        if self.shapes:
            warnings.warn(
                f"{type(network).__name__} takes values of shape {self.shapes[0]} out of its graph (.data, detach()): "
                "what passes there is left out of its gradient. Mend the network, or use a method that asks for its "
                "output alone, such as FeatureAblation() or Occlusion(...).",
                SeveredGradientWarning,
                stacklevel=2,
            )


_CUTTING = (Tensor.data.__get__, Tensor.detach, torch.detach)  # type: ignore[attr-defined]


def pull_back(
    outputs: Tensor, leaves: Sequence[Tensor], cotangent: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return what comes back from outputs to leaves; zeros for those that are not used.

    Args:
        outputs: with a graph.
        leaves: what it leads to.
        cotangent: what comes from above; None is 1 everywhere.
    """
    cotangent = torch.ones_like(outputs) if cotangent is None else cotangent
    found = torch.autograd.grad(outputs, leaves, cotangent, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))


def trace_inputs(
    function: nn.Module, inputs: Sequence[Tensor], selection: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return ``function(*inputs, *selection)`` with a graph that leads to copies of the inputs, and these.

    Raises:
        UnsupportedNetworkError: if it does not depend on the inputs.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        scores: Tensor = function(*(x.clone() for x in leaves), *selection)
    if not scores.requires_grad:
        raise UnsupportedNetworkError(
            "The score does not depend on the inputs through autograd (a frozen engine, detach() or arg-max "
            "on the way?). Use a perturbation method such as FeatureAblation or Occlusion."
        )
    return scores, leaves


def graph_nodes(output: Tensor) -> Iterator[Node]:
    """Iterate over the nodes of the graph that leads to an output."""
    seen: set[Node] = set()
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(earlier for earlier, _ in node.next_functions)


class InfererNetwork(nn.Module):
    """A network behind an inferer that is no sliding window, as one function of whole inputs.

    Args:
        network: what the inferer calls.
        inferer: called as ``inferer(first input, network, *other inputs)``, as MONAI's engines do.
    """

    def __init__(self, network: nn.Module, inferer: Inferer) -> None:
        super().__init__()
        self.network = network
        self.inferer = inferer

    def forward(self, *inputs: Tensor) -> Any:
        return self.inferer(inputs[0], self.network, *inputs[1:])


@dataclass(frozen=True)
class WholeTerm(Term):
    """The one term of a network that sees whole inputs."""

    function: nn.Module
    selected: Tensors
    samples: ClassVar[slice] = slice(None)  # type: ignore[misc]

    def selection(self) -> Tensors:
        return self.selected

    def cut(self, inputs: Sequence[Tensor]) -> Tensors:
        return tuple(inputs)

    def add(self, totals: Sequence[Tensor], maps: Sequence[Tensor]) -> None:
        for total, part in zip(totals, maps, strict=True):
            total += part

    def blending(self) -> float:
        return 1.0

    def coordinates(self, x: Tensor) -> list[Tensor]:
        return [torch.arange(length, device=x.device) for length in x.shape[1:]]
