"""From a network and a target to scores: the functions that attributors attribute.

A :class:`Scoring` is the score of one frozen selection as a function of whole inputs. It is a sum of *terms*, each one
call of a function on a part of the inputs: one term for a network that sees whole inputs, one per active window for a
sliding-window prediction (:mod:`monai_xai.windows`). A method that works term by term works on both.
"""

from __future__ import annotations

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from monai_xai.baselines import Baseline, draw_baselines
from monai_xai.calls import CalledNetwork, EmbeddedInput, called_by_position
from monai_xai.errors import AttributionError, InputError, UnsupportedNetworkError, XaiError
from monai_xai.networks import evaluate, refuse_quantized
from monai_xai.targets import Target

Tensors = tuple[Tensor, ...]
T = TypeVar("T")


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
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            scores: Tensor = self.function(*(x.clone() for x in leaves), *self.selection())
        if not scores.requires_grad:
            raise UnsupportedNetworkError(
                "The score does not depend on the inputs through autograd (a frozen engine, detach() or arg-max "
                "on the way?). Use a perturbation method such as FeatureAblation or Occlusion."
            )
        return scores, leaves

    def gradient(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensors]:
        """Return scores of shape (n,) and the gradient of their sum with respect to every input of a part."""
        scores, leaves = self.trace(inputs)
        return scores.detach(), pull_back(scores, leaves)


class _Cuts(TorchFunctionMode):
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


class Padding:
    """How whole inputs become what terms are cut from: here, not at all."""

    def pad(self, x: Tensor) -> Tensor:
        """Return the padded input."""
        return x

    def unpad(self, total: Tensor) -> Tensor:
        """Return maps of the padded input as maps of the input: the adjoint of the linear part of :meth:`pad`."""
        return total

    def crop(self, x: Tensor) -> Tensor:
        """Return the part of a padded image that the image occupies."""
        return x


@dataclass(frozen=True)
class Scoring:
    """The score of a frozen selection as a function of whole inputs: a sum of terms.

    Args:
        inputs: plain tensors by name, in call order; shape (N, C, *spatial) or (N, F).
        terms: what is summed.
        padding: how whole inputs become what terms are cut from.
        repeats_calls: whether one term calls the network several times (an inferer inside), which methods that work
            by hooks cannot bear.
        progress: whether long work shows a bar.
        drawn: the baselines of these inputs that were drawn already, by identity: several targets share them.
        embedded: inputs that were whole numbers and are explained at the output of their embedding.
        watched_for_cuts: not empty once a gradient was watched for cuts in the network's graph.
        memory_gib: what a batch of perturbed inputs may take; None leaves it to :mod:`monai_xai.perturbed`.
    """

    inputs: Mapping[str, Tensor]
    terms: Sequence[Term]
    padding: Padding = field(default_factory=Padding)
    repeats_calls: bool = False
    progress: bool = False
    drawn: dict[int, list[Tensors]] = field(default_factory=dict)
    embedded: Mapping[str, EmbeddedInput] = field(default_factory=dict)
    watched_for_cuts: list[bool] = field(default_factory=list)
    memory_gib: float | None = None

    @property
    def values(self) -> Tensors:
        """The inputs in call order."""
        return tuple(self.inputs.values())

    def at(self, inputs: Sequence[Tensor]) -> Scoring:
        """Return the same score, to be explained at other inputs."""
        return replace(self, inputs=dict(zip(self.inputs, inputs, strict=True)), drawn={})

    def draw(self, baseline: Baseline | Mapping[str, Baseline]) -> list[Tensors]:
        """Return the baselines of the inputs, one tuple in call order for each draw."""
        if id(baseline) not in self.drawn:
            sources = {
                name: self.embedded[name].numbers if name in self.embedded else x
                for name, x in self.inputs.items()
            }
            self.drawn[id(baseline)] = [self._embed(draw) for draw in draw_baselines(baseline, sources)]
        return self.drawn[id(baseline)]

    def _embed(self, draw: Tensors) -> Tensors:
        named = zip(self.inputs, draw, strict=True)
        return tuple(self.embedded[name].embed(x) if name in self.embedded else x for name, x in named)

    def track(self, work: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
        """Iterate with a progress bar that appears once the work has taken two seconds."""
        return iter(with_progress(work, name, total=total, shown=self.progress))

    def track_within(self, work: Iterable[T], name: str) -> Iterator[T]:
        """Iterate over the work of one term, with a progress bar if there is no other term to show progress by."""
        return self.track(work, name) if len(self.terms) == 1 else iter(work)

    def parts(self, name: str, *wholes: Sequence[Tensor]) -> Iterator[tuple[Term, tuple[Tensors, ...]]]:
        """Iterate over the terms with what each sees of some whole inputs.

        An error inside the loop body is not seen here; wrap the body with :meth:`guard`.
        """
        padded = [[self.padding.pad(x) for x in whole] for whole in wholes]
        for term in self.track(self.terms, name) if len(self.terms) > 1 else self.terms:
            yield term, tuple(term.cut(whole) for whole in padded)

    def score(self, inputs: Sequence[Tensor] | None = None) -> Tensor:
        """Return the scores at whole inputs (default: the inputs themselves), shape (N,)."""
        return self.sum_scores(self.term_scores(inputs))

    def term_scores(self, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the score of every term at whole inputs (default: the inputs themselves), each of shape (n,)."""
        parts = self.parts("score", self.values if inputs is None else inputs)
        return [term(part) for term, (part,) in parts]

    def sum_scores(self, scores: Iterable[Tensor]) -> Tensor:
        """Sum one score per term, each of shape (n,), to scores of shape (N,)."""
        first = self.values[0]
        total = torch.zeros(first.shape[0], dtype=first.dtype, device=first.device)
        for term, score in zip(self.terms, scores, strict=True):
            total[term.samples] += score.to(total)
        return total

    def gradient(self, inputs: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensors]:
        """Return scores (N,) and their gradient with respect to every whole input.

        The first gradient of a score warns of a network that cuts its own graph.
        """

        def gradient(term: Term, part: Tensors) -> tuple[Tensor, Tensors]:
            if self.watched_for_cuts:
                return term.gradient(part)
            self.watched_for_cuts.append(True)
            with _Cuts() as cuts:
                scores, leaves = term.trace(part)
            cuts.warn(term.network)
            return scores.detach(), pull_back(scores, leaves)

        return self.propagate("gradient", gradient, self.values if inputs is None else inputs)

    def propagate(
        self,
        name: str,
        attribute: Callable[..., tuple[Tensor, Sequence[Tensor]]],
        *wholes: Sequence[Tensor],
    ) -> tuple[Tensor, Tensors]:
        """Return scores (N,) and maps, summed over what ``attribute(term, *parts)`` gives of both."""
        scores: list[Tensor] = []

        def keep_score(term: Term, *parts: Tensors) -> Sequence[Tensor]:
            score, maps = attribute(term, *parts)
            scores.append(score)
            return maps

        maps = self.accumulate(name, keep_score, *wholes)
        return self.sum_scores(scores), maps

    def named(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return maps by the names of their inputs."""
        return dict(zip(self.inputs, maps, strict=True))

    def accumulate(
        self, name: str, attribute: Callable[..., Sequence[Tensor]], *wholes: Sequence[Tensor]
    ) -> Tensors:
        """Sum the maps that ``attribute(term, *parts)`` gives over all terms.

        Args:
            name: what the progress bar says.
            attribute: gets a term and what it sees of each of ``wholes``; returns one map per input.
            wholes: whole inputs, baselines, …, each in call order.

        Raises:
            AttributionError: naming the window and its shapes, if ``attribute`` fails.
            UnsupportedNetworkError: if the network is quantized, so that nothing comes back through it.
        """
        refuse_quantized(self.terms[0].network)
        totals = [torch.zeros_like(self.padding.pad(x)) for x in self.values]
        for number, (term, parts) in enumerate(self.parts(name, *wholes)):
            window = f", window {number + 1} of {len(self.terms)}" if len(self.terms) > 1 else ""
            with guard(name + window, parts[0]):
                term.add(totals, attribute(term, *parts))
        return tuple(self.padding.unpad(total) for total in totals)


def with_progress(
    work: Iterable[T], name: str, *, total: int | None = None, shown: bool = True
) -> Iterable[T]:
    """Return work with a progress bar that appears in a terminal once it has taken two seconds."""
    bar: Iterable[T] = tqdm(
        work, desc=name, total=total, leave=False, delay=2.0, disable=None if shown else True
    )
    return bar


@contextmanager
def guard(where: str, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Turn an error of the host into one that says where it happened and what may help."""
    try:
        yield
    except XaiError:
        raise
    except torch.OutOfMemoryError as error:
        raise AttributionError(
            f"Out of memory in {where}, inputs {[tuple(x.shape) for x in inputs]}. Use smaller windows "
            "(SlidingWindowInferer(roi_size=...)), explain fewer samples at a time, or another device."
        ) from error
    except Exception as error:
        raise AttributionError(
            f"{where} failed on inputs {[tuple(x.shape) for x in inputs]}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Explain inside this block, and find network and generators afterwards as they were before, bit for bit.

    Inside, the network is in evaluation mode, its parameters are constants, autograd is on, autocast and inference mode
    are off, and compiled parts run as they were written. Afterwards every submodule has its own train or eval flag,
    hooks, attributes and buffers again, parameters their ``requires_grad``, and the generators of torch, NumPy and
    Python their state; also after an exception. ``.grad`` is never touched. A network that writes in its forward pass
    to its parameters, or into containers within containers, is beyond it.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_generators())
        for module in network.modules():
            stack.callback(_module_restorer(module))
        for parameter in network.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        evaluate(network)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {"cpu", *(p.device.type for p in network.parameters())}:
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


def _module_restorer(module: nn.Module) -> Callable[[], None]:
    training, attributes = module.training, dict(vars(module))
    containers = [
        (value, value.copy()) for value in attributes.values() if isinstance(value, dict | list | set)
    ]
    own = [*module.buffers(recurse=False), *(v for v in attributes.values() if isinstance(v, Tensor))]
    tensors = [(tensor, tensor.detach().clone()) for tensor in own]

    def restore() -> None:
        vars(module).clear()
        vars(module).update(attributes)
        if module.training != training:  # modules of TorchScript keep the flag elsewhere
            module.training = training
        for container, content in containers:
            _refill(container, content)
        for tensor, values in tensors:
            if not torch.equal(tensor, values):
                with torch.no_grad():
                    tensor.copy_(values)

    return restore


def _refill(container: dict[Any, Any] | list[Any] | set[Any], content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
