"""Networks: what a method must know about one before it may explain it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

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
        cure = "Take its .module()" if hasattr(network, "graph_module") else "Wrap a function in a module"
        raise UnsupportedNetworkError(
            f"The network must be a torch.nn.Module, got {type(network).__name__}. {cure}."
        )
    for name, module in network.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_inference():
                raise UnsupportedNetworkError(
                    f"{f'{name}.{key}' if name else key} was made under torch.inference_mode(), so autograd cannot see "
                    "through it. Build the network outside, or copy.deepcopy it and load_state_dict outside of "
                    "inference mode."
                )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UnsupportedNetworkError(
                f"{name or type(module).__name__} normalizes by the statistics of whatever batch it sees "
                "(track_running_stats=False), so that a sample's prediction depends on its neighbors and has no "
                "explanation of its own. Use InstanceNorm or GroupNorm, or keep running statistics."
            )
    return unwrap(network)


def device_of(network: nn.Module) -> torch.device:
    """Return where the parameters of a network are; the CPU if it has none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def evaluate(network: nn.Module) -> None:
    """Put a network into evaluation mode, and leave exported programs, which have none, as they are."""
    try:
        network.eval()
    except NotImplementedError:
        for module in network.modules():
            module.training = False


def refuse_scripts(modules: Iterable[tuple[str, nn.Module]], reason: str) -> None:
    """Refuse a network with parts in TorchScript.

    Args:
        modules: its ``named_modules()``.
        reason: what they are in the way of.

    Raises:
        UnsupportedNetworkError: naming the first of them.
    """
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            place = f"The submodule {name!r}" if name else "The network"
            raise UnsupportedNetworkError(
                f"{place} is in TorchScript (torch.jit.script or trace), {reason}. Build it in Python and load its "
                "state_dict(), or use IntegratedGradients()."
            )


def refuse_quantized(network: nn.Module) -> None:
    """Refuse a network that is no function of real numbers.

    Raises:
        UnsupportedNetworkError: naming its quantized modules.
    """
    found = [
        repr(name or type(module).__name__)
        for name, module in network.named_modules()
        if re.match(r"torch\.ao\.nn\..*quantized\.", type(module).__module__) and "_packed" not in name
    ]
    if found:
        raise UnsupportedNetworkError(
            f"The modules {', '.join(found)} are quantized and pass no gradient back. Explain the network before "
            "quantization, or use a perturbation method such as FeatureAblation or Occlusion."
        )


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """Return the submodule of that dotted name.

    Raises:
        InputError: with the most similar names there are.
        UnsupportedNetworkError: if it is in TorchScript, which keeps no hooks.
    """
    modules = dict(network.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, [n for n in modules if n], n=5, cutoff=0.3)
        raise InputError(
            f"{type(network).__name__} has no layer {name!r}. Similar names: {', '.join(near) or 'none'}."
        )
    if isinstance(modules[name], torch.jit.ScriptModule):
        refuse_scripts(modules.items(), "so that nothing is seen of its layers")
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
        if name and not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_hook(recorder(name)))
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def with_grid(network: nn.Module, call: Callable[[], object], ndim: int | None = None) -> str:
    """Return a sentence that names the last layers with a spatial output, for messages.

    Args:
        network: whose layers are named.
        call: calls the network once.
        ndim: how many axes the output must have; None takes any with a grid.
    """
    shapes = [(name, shape) for name, _, shape in list_layers(network, call)]
    found = [name for name, shape in shapes if (len(shape) == ndim if ndim else len(shape) > 3)]
    return f"Layers with a grid: {', '.join(map(repr, found[-8:])) or 'none'}."


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
        refuse_scripts(network.named_modules(), "so that nothing is seen of its layers")
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has no convolution with a spatial output: name the layer, layer='...'. "
            f"{with_grid(network, call)}"
        )
    coarsest = min(sizes.values())
    return [name for name, size in sizes.items() if size == coarsest][-1]
