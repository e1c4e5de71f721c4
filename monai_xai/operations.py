"""Operations: every differentiable call that a network makes, one by one, so that a rule may take its place.

Methods that change the rules of backpropagation need to know each nonlinearity, addition and product of a network, and
where it is called. Modules do not tell: activations are shared, called as functions, or work in place, and an addition
is no module at all. So a network is watched *call by call* (``torch.overrides``): nothing of it is changed, and it does
not matter how it was written.
"""

from __future__ import annotations

import inspect
import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import torch.utils.checkpoint
from monai.networks.blocks.activation import Mish, Swish
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.graph import Node
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from monai_xai.convolutions import is_convolution
from monai_xai.errors import UnsupportedNetworkError
from monai_xai.networks import refuse_scripts
from monai_xai.terms import Term, graph_nodes


class Kind(Enum):
    """What an operation does to the tensors that depend on the input."""

    ROUTE = "moves or copies values"
    LINEAR = "is linear (or affine) in the one tensor that depends on the input"
    ADD = "adds or subtracts two tensors that depend on the input"
    PRODUCT = "is linear in each of two tensors that depend on the input"
    ACTIVATION = "works on every element by itself"
    NORM = "normalizes by statistics of the input itself"
    SOFTMAX = "softmax"
    MAXIMUM = "keeps the largest value"
    UNKNOWN = "is known to no rule"


# fmt: off
ROUTES = frozenset((
    "alpha_dropout", "as_tensor", "atleast_1d", "atleast_2d", "atleast_3d", "bfloat16", "broadcast_to", "cat",
    "channel_shuffle", "chunk", "clone", "concat", "concatenate", "contiguous", "cpu", "cuda", "diagonal", "double",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "dsplit", "expand", "expand_as", "feature_dropout", "flatten",
    "flip", "float", "gather", "get", "getitem", "half", "hsplit", "hstack", "index_select", "iter", "masked_fill",
    "masked_select", "meshgrid", "moveaxis", "movedim", "narrow", "native_channel_shuffle", "pad", "permute",
    "pixel_shuffle", "pixel_unshuffle", "positive", "ravel", "repeat", "repeat_interleave", "reshape", "reshape_as",
    "roll", "rot90", "select", "setitem", "split", "split_with_sizes", "squeeze", "stack", "swapaxes", "swapdims", "t",
    "take", "tensor", "tensor_split", "tile", "to", "transpose", "tril", "triu", "type", "type_as", "unbind",
    "unflatten", "unfold", "unsqueeze", "view", "view_as", "vsplit", "vstack", "where",
))
_LINEAR = frozenset((
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "batch_norm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "cumsum", "fold", "grid_sample", "interpolate", "linear", "mean", "nansum", "neg", "negative", "sum", "trace",
    "upsample",
))
ADDITIONS = frozenset((
    "add", "radd", "rsub", "sub", "subtract",
))
_PRODUCT = frozenset((
    "addcmul", "addmm", "baddbmm", "bmm", "div", "divide", "dot", "einsum", "inner", "matmul", "mm", "mul", "multiply",
    "mv", "rmatmul", "rmul", "tensordot", "true_divide",
))
DIVISIONS = frozenset(("div", "divide", "true_divide"))
_ACTIVATION = frozenset((
    "abs", "arctan", "atan", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "elu", "erf", "exp", "expm1",
    "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log10", "log1p", "log2",
    "logsigmoid", "mish", "nan_to_num", "pow", "prelu", "rdiv", "reciprocal", "relu", "relu6", "rpow", "rrelu",
    "rsqrt", "rtruediv", "selu", "sigmoid", "silu", "sin", "softplus", "softshrink", "softsign", "sqrt", "square",
    "tanh", "tanhshrink", "threshold",
))
_NORM = frozenset((
    "group_norm", "instance_norm", "layer_norm", "rms_norm",
))
_SOFTMAX = frozenset((
    "log_softmax", "softmax",
))
_MAXIMUM = frozenset((
    "adaptive_max_pool1d", "adaptive_max_pool1d_with_indices", "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices", "adaptive_max_pool3d", "adaptive_max_pool3d_with_indices", "amax",
    "max_pool1d", "max_pool1d_with_indices", "max_pool2d", "max_pool2d_with_indices", "max_pool3d",
    "max_pool3d_with_indices",
))
RECTIFIERS = frozenset((
    "celu", "clamp", "clamp_min", "elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu", "relu",
    "relu6", "rrelu", "selu", "silu", "softplus", "threshold",
))
# fmt: on
_KINDS = {
    name: kind
    for names, kind in (
        (ROUTES, Kind.ROUTE),
        (_LINEAR, Kind.LINEAR),
        (ADDITIONS, Kind.ADD),
        (_PRODUCT, Kind.PRODUCT),
        (_ACTIVATION, Kind.ACTIVATION),
        (_NORM, Kind.NORM),
        (_SOFTMAX, Kind.SOFTMAX),
        (_MAXIMUM, Kind.MAXIMUM),
    )
    for name in names
}
_KEEPS_MEANING = {
    "iadd": "add",
    "imul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "idiv": "div",
    "truediv": "div",
}


class Kept:
    """Values that rules hold on to until something comes back, safe from what the network writes in place later."""

    def __init__(self) -> None:
        self._by_storage: dict[int, list[weakref.ref[Tensor]]] = {}

    def keep(self, x: Tensor) -> Tensor:
        """Return a tensor without its graph, which shares memory with it until the network writes there."""
        kept = x.detach()
        self._by_storage.setdefault(_memory(x), []).append(weakref.ref(kept))
        return kept

    def part_from(self, written: Tensor) -> None:
        """Give what is kept of a tensor memory of its own."""
        for reference in self._by_storage.pop(_memory(written), ()):
            if (kept := reference()) is not None:
                kept.data = kept.clone()


def _memory(x: Tensor) -> int:
    """Return what tells whose memory a tensor lies in."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else id(x)


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a function of torch.

    Args:
        name: of the function, without what says that it works in place or from the right: ``relu_`` is "relu".
        function: what is called.
        arguments: by position.
        options: by keyword.
        place: dotted name of the module that calls it, for messages.
        kept: what the rules of this pass hold on to.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    place: str
    kept: Kept

    @cached_property
    def dependents(self) -> list[Tensor]:
        """The tensors among the arguments that depend on the input."""
        return _dependents((self.arguments, self.options))

    @cached_property
    def values(self) -> list[Tensor]:
        """The dependents without their graph, as they are when first asked for, whatever is written to them later."""
        return [self.kept.keep(x) for x in self.dependents]

    @cached_property
    def kind(self) -> Kind:
        """What it does to the tensors that depend on the input."""
        kind, count = _KINDS.get(self.name, Kind.UNKNOWN), len(self.dependents)
        if self.options.get("rounding_mode"):
            return Kind.UNKNOWN
        if count == 1:
            return self._kind_of_one(kind)
        if kind in (Kind.ACTIVATION, Kind.NORM, Kind.LINEAR):
            return Kind.UNKNOWN  # slopes, weights or bounds that depend on the input
        if kind is Kind.PRODUCT and self.name in ("addmm", "baddbmm", "addcmul"):
            return Kind.UNKNOWN
        return kind

    def _kind_of_one(self, kind: Kind) -> Kind:
        if kind is Kind.PRODUCT:
            is_divisor = self.name in DIVISIONS and not _depends(self.arguments[0])
            return Kind.ACTIVATION if is_divisor else Kind.LINEAR
        if kind is Kind.ADD:
            return Kind.LINEAR
        if self.name == "where" and _depends(self.arguments[0]):
            return Kind.UNKNOWN
        if self.name in ("grid_sample", "batch_norm") and not self._is_linear_in_input():
            return Kind.UNKNOWN
        return kind

    def _is_linear_in_input(self) -> bool:
        given = self.named(("input", "running_mean", "running_var", "weight", "bias", "training"))
        by_batch = self.name == "batch_norm" and given.get("training", False)
        return _depends(given["input"]) and not by_batch

    def named(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the arguments by their names in the function's signature."""
        return dict(zip(names, self.arguments, strict=False)) | dict(self.options)

    def run(self) -> Any:
        """Call the function."""
        return self.function(*self.arguments, **self.options)

    def out_of_place(self) -> Operation:
        """Return the same call on copies of the dependents, of a function that does not write to them.

        Raises:
            UnsupportedNetworkError: if there is no such function.
        """
        function, spelled = self.function, self.function.__name__
        if spelled.endswith("_"):  # else an option says that it works in place
            owners = (owner for owner in (functional, torch, Tensor) if hasattr(owner, self.name))
            if (owner := next(owners, None)) is None:
                raise UnsupportedNetworkError(f"{spelled} has no form that does not work in place.")
            function = getattr(owner, self.name)
        options = {key: value for key, value in self.options.items() if key != "inplace"}
        copies = _map(self.arguments, lambda x: x.clone())
        return replace(self, function=function, arguments=copies, options=options)

    def on(self, *values: Tensor) -> Operation:
        """Return the same call with other values in place of the dependents."""
        fresh = iter(values)
        arguments, options = _map((self.arguments, dict(self.options)), lambda x: next(fresh))
        return replace(self, arguments=arguments, options=options)

    def held(self) -> Operation:
        """Return the same call, to be made again later: whatever is written to its constants before."""
        arguments, options = _map((self.arguments, dict(self.options)), self.kept.keep, constants=True)
        return replace(self, arguments=arguments, options=options)

    def __str__(self) -> str:
        return f"{self.name}{f' in {self.place!r}' if self.place else ''}"


_CALL = nn.Module._call_impl.__code__  # through which PyTorch calls every module


class Watch(TorchFunctionMode):
    """While entered, every call whose arguments depend on the input goes through :meth:`handle`.

    Only what requires a gradient depends on the input: parameters have to be frozen. Calls in place come as calls out
    of place, and what they return is written back (:meth:`handle_in_place`). What a call gives without a gradient (a
    mask, an index, anything under ``torch.no_grad``) goes through :meth:`lose` and is a constant from there on.
    """

    routes: ClassVar[frozenset[str]] = frozenset()
    """Calls that merely move values and are to be handled all the same."""
    takes_apart: ClassVar[bool] = True
    """Whether attention and deviations come as the calls that they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Mapping[nn.Module, str] = {}
        self.kept = Kept()

    @property
    def place(self) -> str:
        """Dotted name of the module that is running, read off the stack: hooks on all modules would cost more."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is _CALL and (name := self.names.get(frame.f_locals["self"])) is not None:
                return name
            frame = frame.f_back
        return ""

    @abstractmethod
    def handle(self, operation: Operation) -> Any:
        """Return the result of an operation."""

    def lose(self, operation: Operation, result: Any) -> Any:
        """Return a result that tells of the input, but through which nothing is passed back."""
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():  # what is seen here, _Unseen need not look at
            return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        spelled = getattr(func, "__name__", "")
        if spelled in _QUERIES:
            return func(*args, **kwargs)
        written = _written_in_place(spelled, args, kwargs)
        if written is not None or spelled == "__setitem__":
            self.kept.part_from(args[0] if written is None else written)
        if not _depends((args, kwargs)):
            return func(*args, **kwargs)
        name = _name_of(func, spelled)
        operation = Operation(name, func, args, kwargs, self.place, self.kept)
        if name in _WITHOUT_GRADIENT or not torch.is_grad_enabled():
            return self.lose(operation, _map(operation.run(), Tensor.detach))
        if name in ROUTES and name not in self.routes:
            result = operation.run()
            return result if _depends(result) else self.lose(operation, result)
        if kwargs.get("out") is not None:
            raise UnsupportedNetworkError(
                f"{name}(out=...) in {self.place!r} cannot be explained: return the result."
            )
        return self._see(operation) if written is None else self.handle_in_place(operation, written)

    def handle_in_place(self, operation: Operation, written: Tensor) -> Any:
        """Return the result of an operation that works in place: of the same out of place, on copies, written back."""
        return written.copy_(self._see(operation.out_of_place()))

    def _see(self, operation: Operation) -> Any:
        apart = _IN_STEPS.get(operation.name) if self.takes_apart else None
        if apart is None:
            return self.handle(operation)
        with self:
            return apart(operation)


# fmt: off
_QUERIES = frozenset((
    "__format__", "__hash__", "__len__", "__repr__", "__set__", "dim", "element_size", "empty_like", "full_like",
    "get_device", "is_complex", "is_contiguous", "is_floating_point", "is_same_size", "ndimension", "new_empty",
    "new_full", "new_ones", "new_zeros", "numel", "ones_like", "requires_grad_", "size", "stride", "zeros_like",
))
COMPARISONS = frozenset((
    "ge", "greater", "greater_equal", "gt", "le", "less", "less_equal", "lt", "sign", "signbit",
))
_WITHOUT_GRADIENT = COMPARISONS | frozenset((
    "all", "any", "argmax", "argmin", "argsort", "bool", "byte", "ceil", "detach", "eq", "equal", "floor",
    "int", "isfinite", "isinf", "isnan", "item", "long", "ne", "new_tensor", "nonzero",
    "not_equal", "numpy", "rand_like", "randn_like", "round", "short", "tolist", "trunc",
))
# fmt: on


def _name_of(func: Callable[..., Any], spelled: str) -> str:
    """Return the name of a function in the tables.

    Raises:
        UnsupportedNetworkError: if it is called past the interface of torch, so that its arguments are others.
    """
    if isinstance(func, OpOverload | OpOverloadPacket):
        raise UnsupportedNetworkError(
            f"The network calls {func} directly, as exported programs (torch.export) and extensions in C++ do, where "
            "no rule reaches it. Explain the network that was exported, or use IntegratedGradients()."
        )
    name = spelled.strip("_")
    return f"torch.{name}" if func in _OTHERWISE_ORDERED else _KEEPS_MEANING.get(name, name)


_OTHERWISE_ORDERED = (torch.batch_norm, torch.instance_norm)  # than their namesakes in torch.nn.functional


def _written_in_place(spelled: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a call writes its result to, if it does."""
    by_name = spelled.endswith("_") and not spelled.endswith("__")
    by_operator = spelled.startswith("__i") and spelled.strip("_") in _KEEPS_MEANING
    if not (by_name or by_operator or options.get("inplace")):
        return None
    written = arguments[0] if arguments else options.get("input", options.get("self"))
    return written if isinstance(written, Tensor) else None


def trace(term: Term, inputs: Sequence[Tensor], watch: Watch) -> tuple[Tensor, list[Tensor]]:
    """Return what :meth:`Term.trace` does, of a pass in which a watch has seen every call.

    Raises:
        UnsupportedNetworkError: naming the part of the network that no watch sees.
    """
    unseen = _Unseen(watch)
    try:
        with (
            watched(term.network, watch),
            unseen,
            torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTED),
        ):
            score, leaves = term.trace(inputs)
    except RuntimeError as error:
        if str(error) != _CHECKPOINTED:
            raise
        raise UnsupportedNetworkError(_CHECKPOINTED) from error
    for node in graph_nodes(score):
        _refuse_function(node)
    unseen.require_none()
    return score, leaves


_CHECKPOINTED = (
    "The network computes parts again in the backward pass (gradient checkpointing, saved_tensors_hooks), where no "
    "rule reaches them. Build it with use_checkpoint=False, or use IntegratedGradients()."
)


class _Unseen(TorchDispatchMode):
    """Notes what is computed from tensors that depend on the input outside of all calls that a watch sees."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _depends((args, kwargs)):
            place = f" in {self.watch.place!r}" if self.watch.place else ""
            self.found.append(f"{func}{place}")
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

    def require_none(self) -> None:
        """Refuse a network that computes unseen."""
        if self.found:
            raise UnsupportedNetworkError(
                f"{self.found[0]} is hidden from the method (a function of TorchScript, an extension in C++?). Write "
                "it with functions of torch, or use IntegratedGradients()."
            )


def _refuse_function(node: Node) -> None:
    function = getattr(node, "_forward_cls", None)
    if function is torch.utils.checkpoint.CheckpointFunction:
        raise UnsupportedNetworkError(_CHECKPOINTED)
    if function not in (None, _Passed) and not is_convolution(function):
        raise UnsupportedNetworkError(
            f"The network calls {function.__name__}, a torch.autograd.Function with a backward pass of its own, which "
            "no rule reaches. Write it with functions of torch, or use IntegratedGradients()."
        )


@contextmanager
def watched(network: nn.Module, watch: Watch) -> Iterator[None]:
    """Enter a watch, and let it know in which module of the network a call is made.

    Composite activations of MONAI (x * sigmoid(x), x * tanh(softplus(x))) become calls of one function.

    Raises:
        UnsupportedNetworkError: if the network has parts in TorchScript, of which no watch sees the calls.
    """
    named = list(network.named_modules())
    refuse_scripts(named, "which hides the calls that this method changes")
    watch.names = {module: name for name, module in named}
    composites = {
        module: composite
        for module in watch.names
        if (composite := _COMPOSITES.get(type(module))) and "forward" not in vars(module)
    }
    try:
        for module, composite in composites.items():
            module.forward = composite(module)
        with watch:
            yield
    finally:
        for module in composites:
            del module.forward
        watch.names = {}


def _swish(module: Swish) -> Callable[[Tensor], Tensor]:
    return lambda x: (
        functional.silu(module.alpha * x) / module.alpha if module.alpha != 1 else functional.silu(x)
    )


_COMPOSITES: dict[type, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    Swish: _swish,
    Mish: lambda module: functional.mish,
}


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backward: Callable[[Tensor], Sequence[Tensor | None]], value: list[Tensor], *_: Tensor
    ) -> Tensor:
        ctx.passed = backward
        return value[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, coming: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.passed(coming)


def passed(
    backward: Callable[[Tensor], Sequence[Tensor | None]], value: Tensor, dependents: Sequence[Tensor]
) -> Tensor:
    """Return a value with a backward pass of its own, and no other graph.

    Args:
        backward: gets what comes from above, and returns what goes to each of the dependents.
        value: the result of a call.
        dependents: what the result depends on.
    """
    # In a list, the value counts as new, so that the network may go on to work on it in place.
    result: Tensor = _Passed.apply(backward, [value.detach()], *dependents)  # type: ignore[no-untyped-call]
    return result


def pull_back_through(
    function: Callable[..., Tensor], values: Sequence[Tensor], coming: Tensor
) -> tuple[Tensor, ...]:
    """Return what a function passes back to each of its values of what comes from above."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in values]
        return torch.autograd.grad(function(*leaves), leaves, coming)


class Norm(NamedTuple):
    """What a normalizing call does: groups, takes the mean off, divides, and scales.

    Args:
        x: the input.
        shape: of the groups.
        axes: of the grouped input over which statistics go.
        weight: broadcasts to the input, if there is one.
        eps: is added to the variance.
        is_centered: whether the mean is taken off.
    """

    x: Tensor
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    weight: Tensor | None
    eps: float
    is_centered: bool

    @classmethod
    def of(cls, operation: Operation) -> Norm:
        """Read a call of instance, group, layer or root-mean-square norm."""
        given = operation.named(_NORM_ARGUMENTS[operation.name])
        x, weight, eps = given["input"], given.get("weight"), given.get("eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        if operation.name in ("layer_norm", "rms_norm"):
            axes = tuple(range(-len(given["normalized_shape"]), 0))
            return cls(x, tuple(x.shape), axes, weight, eps, operation.name == "layer_norm")
        if operation.name == "instance_norm" and not given.get("use_input_stats", True):
            raise UnsupportedNetworkError(f"{operation} with running statistics has no rule; use BatchNorm.")
        groups = given.get("num_groups", x.shape[1])
        weight = None if weight is None else weight.reshape(1, -1, *(1,) * (x.ndim - 2))
        return cls(x, (x.shape[0], groups, -1), (2,), weight, eps, is_centered=True)

    def center(self, x: Tensor) -> Tensor:
        """Return values in groups, without their mean if that is taken off."""
        grouped = x.reshape(self.shape)
        return grouped - grouped.mean(self.axes, keepdim=True) if self.is_centered else grouped

    def deviation(self, centered: Tensor) -> Tensor:
        """Return what centered values are divided by."""
        return (centered.square().mean(self.axes, keepdim=True) + self.eps).sqrt()


_NORM_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "instance_norm": (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps",
    ),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
}  # fmt: skip


def _attend_in_steps(operation: Operation) -> Tensor:
    """Scaled dot-product attention by products and a softmax, each a call of its own."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = operation.named(names)
    query, key, value = given["query"], given["key"], given["value"]
    scale = given.get("scale") or 1 / math.sqrt(query.shape[-1])
    logits = torch.matmul(query * scale, key.transpose(-2, -1))
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        floor = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, floor) if mask.dtype == torch.bool else logits + mask
    return torch.matmul(torch.softmax(logits, -1), value)


def _attend_with_heads_in_steps(operation: Operation) -> tuple[Tensor, None]:
    """Multi-head attention, as ``nn.MultiheadAttention`` calls it, by its projections and attention in steps."""
    names = (
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
        "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    )  # fmt: skip
    given = operation.named(names)
    unusual = [
        name
        for name in (
            "bias_k",
            "bias_v",
            "add_zero_attn",
            "key_padding_mask",
            "use_separate_proj_weight",
            "attn_mask",
        )
        if given.get(name) not in (None, False)
    ]
    if unusual:
        raise UnsupportedNetworkError(f"{operation} with {', '.join(unusual)} has no rule.")
    weights = given["in_proj_weight"].chunk(3)
    biases = (None,) * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    heads = given["num_heads"]

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        projected = functional.linear(x, weight, bias)  # (L, N, E)
        return projected.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # (N, heads, L, E / heads)

    query, key, value = (
        project(given[name], weight, bias)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
    )
    together = functional.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(-2)
    return functional.linear(together, given["out_proj_weight"], given["out_proj_bias"]), None


def _deviate_in_steps(operation: Operation) -> Tensor:
    """Variance or standard deviation by differences, squares and a root, each a call of its own."""
    names = ("input", "dim", "unbiased", "keepdim")
    given = operation.named(names)
    if isinstance(given.get("dim"), bool):  # x.std(False)
        given["unbiased"] = given.pop("dim")
    x = given["input"]
    axes = tuple(range(x.ndim)) if given.get("dim") is None else given["dim"]
    centered = x - x.mean(axes, keepdim=True)
    squares = (centered * centered).sum(axes, keepdim=given.get("keepdim", False))
    correction = (
        given["correction"] if given.get("correction") is not None else int(given.get("unbiased", True))
    )
    variance = squares / (x.numel() // squares.numel() - correction)
    return variance.sqrt() if operation.name == "std" else variance


_IN_STEPS: Mapping[str, Callable[[Operation], Any]] = {
    "scaled_dot_product_attention": _attend_in_steps,
    "std": _deviate_in_steps,
    "var": _deviate_in_steps,
    "multi_head_attention_forward": _attend_with_heads_in_steps,
}


def _depends(value: Any) -> bool:
    return bool(_dependents((value,)))


def _dependents(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors that depend on the input, in nested tuples, lists and dictionaries."""
    found: list[Tensor] = []
    for value in values:  # for each argument of each call, so that a generator would be too slow
        if isinstance(value, Tensor):
            if value.requires_grad:
                found.append(value)
        elif isinstance(value, tuple | list):
            found += _dependents(value)
        elif isinstance(value, dict):
            found += _dependents(value.values())
    return found


def _map(value: Any, change: Callable[[Tensor], Tensor], *, constants: bool = False) -> Any:
    """Return nested arguments, each tensor that depends on the input changed, in the order of :func:`_dependents`.

    Args:
        value: the arguments.
        change: what is done to a tensor.
        constants: whether it is done to the tensors that do not depend on the input instead.
    """
    if isinstance(value, Tensor):
        return value if value.requires_grad is constants else change(value)
    if isinstance(value, tuple | list):
        return type(value)([_map(item, change, constants=constants) for item in value])
    if isinstance(value, dict):
        return {key: _map(item, change, constants=constants) for key, item in value.items()}
    return value
