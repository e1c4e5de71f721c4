"""Convolutions of one small volume by oneDNN, which PyTorch does not use for them.

On a CPU, PyTorch convolves with oneDNN, but not one float32 volume alone with at most 20480 channels times slices times
rows and a kernel of at most 3 rows or columns (``use_mkldnn`` in ATen's Convolution.cpp): there it unfolds every
neighborhood, which takes up to 16 times as long. Windows and volumes that are explained do come alone, so that most of
the time of a network may go there. While it is explained, oneDNN convolves these as well, where the stride is 1 (with
others there is little to gain): the same numbers but for rounding.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

_ONES = (1, 1, 1)
_LEFT_ASIDE = 20480  # channels times slices times rows
_LEAST_VOXELS = 512  # of fewer, unfolding is as quick


def quicken(module: nn.Module) -> None:
    """Let a module that convolves volumes do so by :func:`conv3d`, until its attributes are what they were before."""
    if (
        isinstance(module, nn.Conv3d)
        and type(module)._conv_forward is nn.Conv3d._conv_forward
        and "_conv_forward" not in vars(module)  # its owner's, or there already
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
        and torch.backends.mkldnn.is_available()
    ):
        vars(module)["_conv_forward"] = functools.partial(_convolve, module)


def _convolve(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv3d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = _ONES,
    padding: tuple[int, ...] = (0, 0, 0),
    dilation: tuple[int, ...] = _ONES,
    groups: int = 1,
) -> Tensor:
    """Return what ``torch.nn.functional.conv3d`` does, of one small volume by oneDNN.

    A ``TorchFunctionMode`` sees it under that name. Where something is to come back to weights or bias, and of tensors
    of other classes, it calls PyTorch's own.

    Args:
        x: shape (N, C, *spatial).
        weight: shape (out, C / groups, *kernel).
        bias: shape (out,).
        stride: in voxels, along each axis.
        padding: in voxels, along each axis.
        dilation: in voxels, along each axis.
        groups: of channels that are convolved for themselves.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    are_plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    if are_plain and has_torch_function(tensors):
        seen: Tensor = handle_torch_function(
            conv3d, tensors, x, weight, bias, stride, padding, dilation, groups
        )
        return seen
    if (
        are_plain
        and not any(tensor.requires_grad for tensor in tensors[1:])
        and (stride, dilation, groups) == (_ONES, _ONES, 1)
        and all(map(operator.lt, padding, weight.shape[2:]))
        and _is_left_aside(x, weight)
    ):
        quick: Tensor = _SmallConvolution.apply(x, weight, bias, padding)  # type: ignore[no-untyped-call]
        return quick
    return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)


def _is_left_aside(x: Tensor, weight: Tensor) -> bool:
    """Tell whether PyTorch would unfold a volume although oneDNN is quicker."""
    return (
        x.ndim == 5
        and len(x) == 1
        and math.prod(x.shape[:4]) <= _LEFT_ASIDE
        and math.prod(x.shape[2:]) >= _LEAST_VOXELS
        and min(weight.shape[3:]) <= 3
        and math.prod(weight.shape[2:]) > 1
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


def is_convolution(function: object) -> bool:
    """Tell whether a class is the ``torch.autograd.Function`` by which small volumes are convolved."""
    return function is _SmallConvolution


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    return torch.mkldnn_convolution(x.contiguous(), weight.contiguous(), bias, padding, _ONES, _ONES, 1)


class _SmallConvolution(torch.autograd.Function):
    """A convolution of stride 1 by oneDNN; nothing comes back to the weights.

    What comes back to the input is a convolution as well, with the kernels turned around and their two axes of channels
    exchanged. The input is kept, as PyTorch's own keeps it, so that what one part takes tells what a batch takes.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
        return _run(x, weight, bias, padding)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, tuple[int, ...]], output: Tensor
    ) -> None:
        x, weight, _, ctx.padding = inputs
        ctx.shape = output.shape
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, coming: Tensor) -> tuple[Tensor | None, ...]:
        _, weight = ctx.saved_tensors
        margins = tuple(k - 1 - p for k, p in zip(weight.shape[2:], ctx.padding, strict=True))
        turned = weight.transpose(0, 1).flip(2, 3, 4)
        going = _SmallConvolution.apply(coming, turned, None, margins)  # type: ignore[no-untyped-call]
        return going, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None, _: None
    ) -> Tensor:
        x, weight = ctx.saved_tensors
        tangent = x.new_zeros(ctx.shape)
        if of_x is not None:
            tangent = tangent + _run(of_x, weight, None, ctx.padding)
        if of_weight is not None:
            tangent = tangent + _run(x, of_weight, None, ctx.padding)
        return tangent if of_bias is None else tangent + of_bias.reshape(-1, 1, 1, 1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        *tensors, padding = arguments
        convolve = functools.partial(torch.conv3d, padding=padding)
        return torch.vmap(convolve, in_dims[:3])(*tensors), 0
