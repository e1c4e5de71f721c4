"""FullGrad: the gradient of the input and of every bias, which together are the score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from monai_xai.attributors.base import Attribution, Attributor, refuse_repeated_calls
from monai_xai.errors import UnsupportedNetworkError
from monai_xai.forward import Scoring
from monai_xai.operations import Kind, Operation, Watch, trace
from monai_xai.terms import Tensors, Term, pull_back


@dataclass(frozen=True)
class FullGrad(Attributor):
    """Input times gradient, and for every call of the network its bias times the gradient there, scaled up.

    The bias of a call is what it gives beyond its linear part, ``f(x) - f'(x) x``: that of a convolution, the shift of
    a norm, and what the curvature of a smooth activation adds. All of them and the input's part sum to the score, on
    every network. Those of calls without a grid (of a head after pooling) have no place on the map; their sum is
    ``facts["without_place"]``. Biases go to the first image.

    Reference: Srinivas & Fleuret, "Full-Gradient Representation for Neural Network Visualization", NeurIPS 2019,
    equation 3 (arXiv:1905.00780), with sign.
    """

    summable: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def attribute(self, scoring: Scoring) -> Attribution:
        refuse_repeated_calls(self, scoring)
        homeless: list[float] = []
        image = next((i for i, x in enumerate(scoring.values) if x.ndim > 2), None)

        def attribute(term: Term, inputs: Tensors) -> tuple[Tensor, Tensors]:
            score, maps, rest = _full_gradient(term, inputs, image)
            homeless.append(rest)
            return score, maps

        score, maps = scoring.propagate(self.name, attribute, scoring.values)
        return Attribution(scoring.named(maps), score, facts={"without_place": sum(homeless)})


def _full_gradient(term: Term, inputs: Tensors, image: int | None) -> tuple[Tensor, Tensors, float]:
    score, leaves = trace(term, inputs, watch := _Biases())
    found = pull_back(score, [*leaves, *(result for result, _ in watch.found)])
    maps = [x * g for x, g in zip(inputs, found, strict=False)]
    rest = 0.0
    for (_, bias), gradient in zip(watch.found, found[len(leaves) :], strict=True):
        part = gradient * bias
        if image is not None and _has_place(part, inputs[image]):
            maps[image] = maps[image] + _spread(part.sum(1, keepdim=True), inputs[image])
        else:
            rest += float(part.sum())
    return score.detach(), tuple(maps), rest


def _has_place(part: Tensor, image: Tensor) -> bool:
    """Tell whether values lie on a grid that is the image's or a coarser one."""
    if part.ndim != image.ndim or len(part) != len(image) or part[0, 0].numel() == 1:
        return False  # such as windows of attention, which are samples of their own
    return all(m <= n for m, n in zip(part.shape[2:], image.shape[2:], strict=True))


def _spread(part: Tensor, image: Tensor) -> Tensor:
    """Scale up a map to the image, with every value shared by its voxels and channels, so that the sum stays."""
    size = tuple(image.shape[2:])
    with torch.enable_grad():
        one = torch.ones_like(part).requires_grad_()
        (count,) = torch.autograd.grad(functional.interpolate(one, size, mode="nearest").sum(), one)
    return (functional.interpolate(part / count, size, mode="nearest") / image.shape[1]).expand_as(image)


class _Biases(Watch):
    """Notes the result of every call, and what of it is not its linear part."""

    routes = frozenset(
        (
            "cat",
            "concat",
            "concatenate",
            "hstack",
            "masked_fill",
            "pad",
            "setitem",
            "stack",
            "vstack",
            "where",
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def handle(self, operation: Operation) -> Any:
        if operation.kind is Kind.UNKNOWN:
            raise UnsupportedNetworkError(f"FullGrad does not know {operation}. Use IntegratedGradients().")
        if operation.name == "setitem":
            return _set_without_bias(operation)
        result = operation.run()
        if operation.kind is Kind.MAXIMUM:
            return result
        bias = result.detach() - _linear_part(operation)
        if bias.any():
            self.found.append((result, bias))
            return result.clone()  # the network may go on to work on it in place
        return result


def _set_without_bias(operation: Operation) -> None:
    """Write into a tensor, unless constants meet there what depends on the input: they would have no bias to be in."""
    written, _, value = operation.arguments
    values = [torch.as_tensor(x) for x in (written, value)]
    if any(bool(x.any()) for x in values if not x.requires_grad):
        raise UnsupportedNetworkError(
            f"FullGrad has no place for constants that are written by index, {operation}. Use torch.where, torch.cat "
            "or IntegratedGradients()."
        )
    operation.run()


def _linear_part(operation: Operation) -> Tensor:
    values = tuple(x.detach() for x in operation.dependents)
    if operation.kind in (Kind.LINEAR, Kind.ADD, Kind.ROUTE):
        with torch.no_grad():
            result = operation.run()
            zero = operation.on(*(torch.zeros_like(x) for x in values)).run()
        change: Tensor = result - zero
        return change
    part: Tensor = torch.func.jvp(lambda *xs: operation.on(*xs).run(), values, values)[1]
    return part
