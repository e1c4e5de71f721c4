"""Does things to a network, and leaves it as it was."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_xai.convolutions import quicken
from monai_xai.networks import evaluate


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Explain inside this block, and find network and generators afterwards as they were before, bit for bit.

    Inside, the network is in evaluation mode, its parameters are constants, autograd is on, autocast and inference mode
    are off, compiled parts run as they were written, and small volumes are convolved by oneDNN
    (:mod:`monai_xai.convolutions`). Afterwards every submodule has its own train or eval flag, hooks, attributes and
    buffers again, parameters their ``requires_grad``, and the generators of torch, NumPy and Python their state; also
    after an exception. ``.grad`` is never touched. A network that writes in its forward pass to its parameters, or into
    containers within containers, is beyond it.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_generators())
        modules = list(network.modules())
        snapshots = [_Snapshot(module) for module in modules]
        # Each is restored for itself, so that one that fails keeps no other from it.
        for values in _Values.of(tensor for snapshot in snapshots for tensor in snapshot.tensors):
            stack.callback(values.restore)
        for snapshot in snapshots:
            stack.callback(snapshot.restore)
            quicken(snapshot.module)
        parameters = list(network.parameters())
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        if any(module.training for module in modules):
            evaluate(network)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {"cpu", *(p.device.type for p in parameters)}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the random generators of torch, NumPy and Python as they were, whatever is drawn inside."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


_UNALTERABLE = frozenset({bool, int, float, str, tuple, type(None)})
_FEW = 4096  # values of a tensor up to which it is looked at together with others


class _Snapshot:
    """A module as it is now but for the values of its tensors, without a look at parts that hold nothing.

    Attributes:
        tensors: its buffers, and the tensors among its attributes.
    """

    __slots__ = ("attributes", "empty", "filled", "module", "tensors", "training")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training, self.attributes = module, module.training, vars(module).copy()
        self.empty: list[Any] = []  # most containers are, so that they are not copied
        self.filled: list[tuple[Any, Any]] = []
        self.tensors = [buffer for buffer in module._buffers.values() if buffer is not None]
        for value in self.attributes.values():
            if type(value) in _UNALTERABLE:
                continue
            if isinstance(value, dict | list | set):
                if value:
                    self.filled.append((value, value.copy()))
                else:
                    self.empty.append(value)
            elif isinstance(value, Tensor):
                self.tensors.append(value)

    def restore(self) -> None:
        """Give the module its attributes again, and what was in their containers."""
        own, before = vars(self.module), self.attributes
        if [*own] != [*before] or not all(map(operator.is_, own.values(), before.values())):
            own.clear()
            own.update(before)
        if self.module.training != self.training:  # modules of TorchScript keep the flag elsewhere
            self.module.training = self.training
        for container in filter(None, self.empty):
            container.clear()
        for container, content in self.filled:
            _refill(container, content)


def _refill(container: dict[Any, Any] | list[Any] | set[Any], content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


class _Values:
    """What tensors hold now; a common look tells whether anything has changed.

    Args:
        tensors: of one type and place, or a single one.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.constant = [tensor.grad_fn is None for tensor in tensors]
        self.shapes = [tensor.shape for tensor in tensors]
        if len(tensors) == 1:
            self.together, self.before = None, [tensors[0].detach().clone()]
        else:
            self.together = self._join()
            parts = self.together.split([tensor.numel() for tensor in tensors])
            self.before = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Iterator[_Values]:
        """Yield the values of tensors: those of the small and ordinary ones of a type together."""
        groups: dict[Any, list[Tensor]] = {}
        for number, tensor in enumerate(tensors):
            if tensor.device.type == "meta":
                continue  # without values
            is_plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
            is_alone = not is_plain or tensor.numel() > _FEW
            groups.setdefault(number if is_alone else (tensor.dtype, tensor.device), []).append(tensor)
        return map(cls, groups.values())

    def _join(self) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def restore(self) -> None:
        """Write back what has changed, and nothing else."""
        for tensor, was_constant in zip(self.tensors, self.constant, strict=True):
            if was_constant and tensor.grad_fn is not None and not tensor._is_view():
                tensor.detach_()  # the network has written to it what depends on its input
        have_shapes = self.shapes == [tensor.shape for tensor in self.tensors]
        if self.together is not None and have_shapes and _is_same(self._join(), self.together):
            return
        with ExitStack() as stack:
            for tensor, before in zip(self.tensors, self.before, strict=True):
                stack.callback(_write_back, tensor, before)


def _write_back(tensor: Tensor, before: Tensor) -> None:
    if tensor.shape != before.shape or tensor.dtype != before.dtype:
        tensor.data = before
    elif not _is_same(tensor, before):
        # A tensor that is as it was gets no new version: a backward pass of the user's may ask for the old one.
        with torch.no_grad():
            tensor.copy_(before)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Tell whether tensors of one shape and type hold the same, bit for bit where they can be looked at so."""
    if one.layout is not torch.strided:
        return False
    if one.is_quantized or one.is_complex():
        return torch.equal(one, other)
    bits = [x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (one, other)]
    return torch.equal(*bits)
