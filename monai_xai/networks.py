"""Networks: what a method must know about one before it may explain it."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from monai_xai.errors import InputError, UnsupportedNetworkError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``.

    Explaining through the wrapper on one rank would wait for the others for ever.
    """
    while True:
        inner = getattr(network, "_orig_mod", None)
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def require_module(network: object) -> nn.Module:
    """Return the unwrapped network, or say why it cannot be explained.

    Raises:
        UnsupportedNetworkError: if it is no ``nn.Module`` or its weights were made under ``torch.inference_mode``.
    """
    if not isinstance(network, nn.Module):
        raise UnsupportedNetworkError(
            f"The network must be a torch.nn.Module, got {type(network).__name__}. Wrap a function in a module."
        )
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_inference():
            raise UnsupportedNetworkError(
                f"{name} was made under torch.inference_mode(), so autograd cannot see through it. Build the network "
                "outside, or copy.deepcopy it and load_state_dict outside of inference mode."
            )
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UnsupportedNetworkError(
                f"{name or type(module).__name__} normalizes by the statistics of whatever batch it sees "
                "(track_running_stats=False), so that a sample's prediction depends on its neighbors and has no "
                "explanation of its own. Use InstanceNorm or GroupNorm, or keep running statistics."
            )
    return unwrap(network)


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """Return the submodule of that dotted name.

    Raises:
        InputError: with the most similar names there are.
    """
    modules = dict(network.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, [n for n in modules if n], n=5, cutoff=0.3)
        raise InputError(
            f"{type(network).__name__} has no layer {name!r}. Similar names: {', '.join(near) or 'none'}."
        )
    return modules[name]


def list_layers(network: nn.Module, call: Callable[[], object]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, type and shape of the output of every layer that gives one tensor, in the order of the calls.

    Args:
        network: whose layers are listed.
        call: calls the network once.
    """
    found: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    handles = []

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, (name, type(module).__name__, tuple(output.shape)))

        return record

    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_hook(recorder(name)))
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def choose_layer(network: nn.Module, call: Callable[[], object]) -> str:
    """Return the name of the layer for class activation maps: the last convolution at the coarsest resolution.

    For a classification network this is the last convolution, for a U-shaped one the bottleneck, as in Seg-Grad-CAM.

    Args:
        network: whose layers are looked at.
        call: calls the network once.

    Raises:
        UnsupportedNetworkError: if no convolution gives a spatial output.
    """
    sizes: dict[str, int] = {}
    handles = []

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: object, output: Tensor) -> None:
            if output.ndim > 2 and output[0, 0].numel() > 1:
                sizes.pop(name, None)
                sizes[name] = output[0, 0].numel()

        return record

    for name, module in network.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            handles.append(module.register_forward_hook(recorder(name)))
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    if not sizes:
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has no convolution with a spatial output: name the layer, layer='...'."
        )
    coarsest = min(sizes.values())
    return [name for name, size in sizes.items() if size == coarsest][-1]
