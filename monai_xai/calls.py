"""How named inputs reach the network: by position, by keyword, as one mapping, or through an embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_xai.errors import InputError, UnsupportedNetworkError
from monai_xai.networks import find_layer

CallForm = Literal["arguments", "mapping", "sequence"] | Sequence[str]


class CalledNetwork(nn.Module):
    """A network as a function of its inputs by position, whatever way it takes them.

    Args:
        network: the user's network.
        names: names of the inputs, in call order.
        form: "arguments" for ``network(a, b)``, "mapping" for ``network({"a": a, "b": b})``, "sequence" for
            ``network((a, b))``, or the names of those that go by keyword, ``network(a, b=b)``.
        embedded: inputs of whole numbers, which come here as the output of their embedding.

    Attributes:
        autocast: what the network computes in where PyTorch's autocast sees fit, set from outside; None leaves it as it
            is. What it gives is in the type of its inputs all the same.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        form: CallForm = "arguments",
        embedded: Mapping[str, EmbeddedInput] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)
        self.form = form
        self.embedded = dict(embedded or {})
        self.autocast: torch.dtype | None = None
        unknown = set(form) - set(names) if not isinstance(form, str) else set()
        if unknown:
            raise InputError(
                f"Inputs {sorted(unknown)} are to go by keyword, but the inputs are {list(names)}."
            )

    def forward(self, *inputs: Tensor) -> Any:
        named = dict(zip(self.names, inputs, strict=True))
        handles = [part.replace(named[name]) for name, part in self.embedded.items()]
        named |= {name: part.numbers_for(named[name]) for name, part in self.embedded.items()}
        try:
            return self._call(named) if self.autocast is None else self._call_lowered(named, self.autocast)
        finally:
            for handle in handles:
                handle.remove()

    def _call_lowered(self, named: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
        first = next(iter(named.values()))
        with torch.autocast(first.device.type, dtype):
            output = self._call(named)
        return _raised(output, dtype)

    def _call(self, named: Mapping[str, Tensor]) -> Any:
        if self.form == "arguments":
            return self.network(*named.values())
        if self.form == "mapping":
            return self.network(dict(named))
        if self.form == "sequence":
            return self.network(tuple(named.values()))
        keywords = {name: x for name, x in named.items() if name in self.form}
        return self.network(*(x for name, x in named.items() if name not in self.form), **keywords)


def _raised(output: Any, dtype: torch.dtype) -> Any:
    """Return an output, or several in lists, tuples and mappings, with what is of some type in single precision."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype == dtype else output
    if isinstance(output, Mapping):
        return {name: _raised(part, dtype) for name, part in output.items()}
    if not isinstance(output, list | tuple):
        return output
    parts = [_raised(part, dtype) for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


class EmbeddedInput:
    """An input of whole numbers (tokens, category codes), explained at the output of its embedding.

    Args:
        numbers: what the user gave, shape (N, L), integer.
        layer: the embedding.
    """

    def __init__(self, numbers: Tensor, layer: nn.Embedding) -> None:
        self.numbers = numbers
        self.layer = layer

    def embed(self, numbers: Tensor) -> Tensor:
        """Return the embedding of numbers, shape (N, L, D)."""
        with torch.no_grad():
            return self.layer(numbers.to(self.numbers.device, torch.long)).detach()

    def numbers_for(self, values: Tensor) -> Tensor:
        """Return the numbers that belong to embedded values."""
        if len(values) != len(self.numbers):
            raise UnsupportedNetworkError(
                "Inputs of whole numbers cannot be explained batch by batch in parts: explain one case at a time."
            )
        return self.numbers

    def replace(self, values: Tensor) -> Any:
        """Let the embedding return these values; the handle takes it back."""
        return self.layer.register_forward_hook(lambda module, arguments, output: values.to(output))


class RecordingInferer(Inferer):
    """An inferer that keeps how an engine of its own making called it last.

    Args:
        inferer: the engine's; its attributes can be read here too.
    """

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer
        self.inputs: Any = None
        self.replay: ReplayedInferer | None = None

    def __call__(self, inputs: Any, network: Any, *args: Any, **kwargs: Any) -> Any:
        self.inputs, self.replay = inputs, ReplayedInferer(self.inferer, args, kwargs)
        return self.inferer(inputs, network, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inferer"], name)


class ReplayedInferer(Inferer):
    """An inferer that is called as an engine has called it, with its prompts, at other inputs.

    Args:
        inferer: the engine's; gets the network as it is, not behind a :class:`CalledNetwork`.
        args: what came after the network, by position.
        kwargs: what came by keyword.
    """

    def __init__(self, inferer: Inferer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.inferer = inferer
        self.args = tuple(args)
        self.kwargs = dict(kwargs)

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inferer(inputs, network, *self.args, **self.kwargs)


def called_by_position(network: nn.Module) -> nn.Module:
    """Return the user's network inside a :class:`CalledNetwork`."""
    return network.network if isinstance(network, CalledNetwork) else network


def find_embeddings(
    network: CalledNetwork, inputs: Mapping[str, Tensor], given: Mapping[str, str]
) -> dict[str, EmbeddedInput]:
    """Return the embedding of every input of whole numbers: the one given by name, or the one that sees it first.

    Args:
        network: called once, to see which embedding an input goes to.
        inputs: plain tensors by name, in call order.
        given: dotted names of embeddings, by input.

    Raises:
        UnsupportedNetworkError: naming an input that no embedding sees.
    """
    integers = {name: x for name, x in inputs.items() if not x.is_floating_point()}
    if not integers:
        return {}
    named = {name: find_layer(network.network, layer) for name, layer in given.items()}
    unnamed = {name: x for name, x in integers.items() if name not in named}
    found = named | (_watch_embeddings(network, inputs, unnamed) if unnamed else {})
    for name, x in integers.items():
        if not isinstance(found.get(name), nn.Embedding):
            raise UnsupportedNetworkError(
                f"The input {name!r} holds whole numbers ({x.dtype}), but no torch.nn.Embedding sees it as it is. Name "
                "the layer, Explainer(embeddings={...}), or hand it over as floating-point numbers."
            )
    return {name: EmbeddedInput(x, found[name]) for name, x in integers.items()}  # type: ignore[arg-type]


def _watch_embeddings(
    network: CalledNetwork, inputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Call the network once, and return the first embedding that sees each of the wanted inputs as it is."""
    found: dict[str, nn.Module] = {}

    def notice(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        for name, x in wanted.items():
            if name not in found and arguments[0].shape == x.shape and torch.equal(arguments[0], x):
                found[name] = module

    embeddings = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_pre_hook(notice) for module in embeddings]
    try:
        with torch.no_grad():
            network(*inputs.values())
    finally:
        for handle in handles:
            handle.remove()
    return found
