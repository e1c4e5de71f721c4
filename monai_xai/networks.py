"""Networks: what a method must know about one before it may explain it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from monai.networks.blocks.activation import MemoryEfficientSwish, Swish
from monai.networks.blocks.activation import Mish as MonaiMish
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from monai_xai.errors import InputError, UnsupportedNetworkError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_GATES = (nn.Softmax, nn.Sigmoid)
_NONLINEARITIES = (
    *(getattr(nn, name) for name in nn.modules.activation.__all__ if name != "MultiheadAttention"),
    Swish,
    MemoryEfficientSwish,
    MonaiMish,
)
_NORMS_OF_INPUT = (
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_WITHOUT_RULE = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
# fmt: off
_FUNCTIONS = frozenset((
    "abs", "celu", "clamp", "clamp_max", "clamp_min", "elu", "exp", "gelu", "glu", "hardshrink",
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "logsigmoid", "maximum", "minimum",
    "mish", "multi_head_attention_forward", "prelu", "relu", "relu6", "rrelu",
    "scaled_dot_product_attention", "selu", "silu", "softplus", "softshrink", "softsign", "sqrt", "tanh",
    "tanhshrink", "threshold",
))
# fmt: on
_RESCALED = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax)


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


def require_relu(network: nn.Module, method: str, call: Callable[[], object]) -> None:
    """Refuse a method that acts on ``nn.ReLU`` modules where there is none, or where other nonlinearities act.

    Guided backpropagation through other nonlinearities would silently be the plain gradient there.

    Args:
        network: whose modules count.
        method: what is refused.
        call: calls the network once, to see which nonlinearities are no modules.

    Raises:
        UnsupportedNetworkError: naming the nonlinearities that the method does not act on.
    """
    others = _names_by_type(network, lambda m: isinstance(m, _NONLINEARITIES) and not isinstance(m, nn.ReLU))
    if not any(type(module) is nn.ReLU for module in network.modules()):
        raise UnsupportedNetworkError(
            f"{method} acts on torch.nn.ReLU modules, and {type(network).__name__} has none "
            f"({_list(others) or 'no activation modules at all'}): it would silently be the plain gradient. "
            "Use Saliency(), IntegratedGradients(), or a network with act='RELU'."
        )
    if functional := _functional_nonlinearities(network, call):
        raise UnsupportedNetworkError(
            f"{method} acts on torch.nn.ReLU modules only, but {type(network).__name__} also calls "
            f"{', '.join(functional)} as functions: there it would silently be the plain gradient. Use Saliency() or "
            "IntegratedGradients(), or make them modules of the network."
        )
    hidden = {kind: names for kind, names in others.items() if kind not in {gate.__name__ for gate in _GATES}}
    if hidden:
        raise UnsupportedNetworkError(
            f"{method} acts on torch.nn.ReLU modules only, but {type(network).__name__} also has {_list(hidden)}: "
            "there it would silently be the plain gradient. Use Saliency() or IntegratedGradients()."
        )


class _Watch(TorchFunctionMode):
    """Note the nonlinear functions that are called outside of modules that are nonlinearities themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.found: set[str] = set()

    def enter(self, *_: object) -> None:
        self.depth += 1

    def leave(self, *_: object) -> None:
        self.depth -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").rstrip("_")
        if not self.depth and name in _FUNCTIONS:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def _functional_nonlinearities(network: nn.Module, call: Callable[[], object]) -> list[str]:
    """Return the nonlinear functions that a network calls outside of its activation modules, by name."""
    watch, handles = _Watch(), []
    for module in network.modules():
        if isinstance(module, (*_NONLINEARITIES, *_NORMS_OF_INPUT)):
            handles.append(module.register_forward_pre_hook(watch.enter))
            handles.append(module.register_forward_hook(watch.leave))
    try:
        with watch:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return sorted(watch.found)


def require_rescale_rules(network: nn.Module, method: str) -> None:
    """Refuse DeepLift on modules for which Captum silently takes the gradient in place of a rescale rule.

    Raises:
        UnsupportedNetworkError: naming the modules without a rule.
    """

    def has_no_rule(module: nn.Module) -> bool:
        if isinstance(module, _WITHOUT_RULE):
            return True
        return isinstance(module, (*_NONLINEARITIES, *_NORMS_OF_INPUT)) and type(module) not in _RESCALED

    missing = _names_by_type(network, has_no_rule)
    if missing:
        raise UnsupportedNetworkError(
            f"{method} has no rule for {_list(missing)} of {type(network).__name__}: it would silently treat them "
            "as linear. Use IntegratedGradients(), or a network with act='RELU' (LeakyReLU, ELU) and norm='BATCH'."
        )


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


def _names_by_type(network: nn.Module, accept: Callable[[nn.Module], bool]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        if accept(module):
            found.setdefault(type(module).__name__, []).append(name)
    return found


def _list(found: dict[str, list[str]]) -> str:
    return ", ".join(f"{len(names)} {kind} (first: {names[0]!r})" for kind, names in found.items())
