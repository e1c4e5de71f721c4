"""What a layer gives within a score: read, differentiated, or replaced, by hooks that come off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from monai_xai.errors import UnsupportedNetworkError
from monai_xai.networks import find_layer, refuse_quantized
from monai_xai.terms import Tensors, Term


@contextmanager
def hooked(network: nn.Module, layer: str, hook: Callable[..., Any]) -> Iterator[None]:
    """Let a hook see, or replace, what a layer gives, inside this block."""
    handle = find_layer(network, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Seen:
    """A hook that keeps the one tensor that a layer gives.

    Args:
        layer: its dotted name, for messages.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self._found: list[Tensor] = []

    def __call__(self, module: nn.Module, arguments: object, output: object) -> None:
        if not isinstance(output, Tensor) or self._found:
            raise UnsupportedNetworkError(
                f"The layer {self.layer!r} must give one tensor and be called once, got {type(output).__name__}; "
                "choose another by layer='...'."
            )
        self._found.append(output)

    @property
    def activation(self) -> Tensor:
        """What the layer gave.

        Raises:
            UnsupportedNetworkError: if the network did not call it.
        """
        if not self._found:
            raise UnsupportedNetworkError(
                f"The network does not call the layer {self.layer!r}; choose another by layer='...'."
            )
        return self._found[0]


class SeenLeaf(Seen):
    """The same, but the network goes on with a copy, so that a gradient can be taken at what the layer gave."""

    def __call__(self, module: nn.Module, arguments: object, output: object) -> Tensor:  # type: ignore[override]
        super().__call__(module, arguments, output)
        activation = self.activation
        return (activation if activation.requires_grad else activation.requires_grad_()).clone()


def activation_of(term: Term, inputs: Tensors, layer: str) -> Tensor:
    """Return the activation of a layer, detached.

    Raises:
        UnsupportedNetworkError: if the layer does not give one tensor, or is not called once.
    """
    with hooked(term.network, layer, seen := Seen(layer)):
        term(inputs)
    activation = seen.activation.detach()
    return activation.dequantize() if activation.is_quantized else activation


def activation_and_gradient(term: Term, inputs: Tensors, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the score of a term, the activation of a layer in it, and the gradient of the score there.

    Raises:
        UnsupportedNetworkError: if the layer is not called once with one tensor, or the score does not depend on it.
    """
    refuse_quantized(term.network)
    with hooked(term.network, layer, seen := SeenLeaf(layer)), torch.enable_grad():
        score = term.function(*(x.clone() for x in inputs), *term.selection())
    activation = seen.activation
    if not score.requires_grad:
        raise UnsupportedNetworkError(f"The score does not depend on the layer {layer!r}; choose another.")
    (gradient,) = torch.autograd.grad(score.sum(), [activation], allow_unused=True)
    found = torch.zeros_like(activation) if gradient is None else gradient
    return score.detach(), activation.detach(), found


def inputs_of_layer(term: Term, inputs: Tensors, layer: str) -> list[bool]:
    """Return for each input of a term whether a layer's activation depends on it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with hooked(term.network, layer, seen := Seen(layer)), torch.enable_grad():
        term.function(*(x.clone() for x in leaves), *term.selection())
    if not seen.activation.requires_grad:
        return [False] * len(inputs)
    gradients = torch.autograd.grad(seen.activation.sum(), leaves, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def interpolated(maps: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Return maps (N, C, *grid) on another grid, by linear interpolation along every axis."""
    return functional.interpolate(maps, spatial, mode=_LINEAR[len(spatial)])


_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
