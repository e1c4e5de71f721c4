"""Layers and neurons: any method, at the activations of a layer, or for the activation of a neuron.

Maps of a layer lie on its own grid, which is not that of the scan: they are plain tensors, without an affine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from monai_xai.attributors.activations import Seen, activation_and_gradient, activation_of, hooked
from monai_xai.attributors.base import Attribution, Attributor, BaselineAttributor, average
from monai_xai.attributors.gradients import Saliency
from monai_xai.baselines import Baseline, BaselineLike, Blur
from monai_xai.errors import InputError, UnsupportedInfererError
from monai_xai.forward import Scoring
from monai_xai.terms import Tensors, Term, WholeTerm


@dataclass(frozen=True)
class Layer(Attributor):
    """Any method, at the activations of a layer in place of the inputs.

    Args:
        layer: dotted name of the layer, which must give one tensor and be called once.
        attributor: the method; its baseline is the layer's activation at the baseline of the inputs.

    ``Layer("bottleneck", IntegratedGradients())`` is Captum's ``LayerIntegratedGradients``, and so on.
    """

    layer: str = ""
    attributor: Attributor = field(default_factory=Saliency)

    needs_layer: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_layer(self)
        _take_facts(self, self.attributor)

    @property
    def name(self) -> str:
        """The method's name, with the one inside."""
        return f"Layer({self.layer}, {self.attributor.name})"

    def attribute(self, scoring: Scoring) -> Attribution:
        term, inputs = _only_term(self, scoring)
        activation = activation_of(term, inputs, self.layer)
        function = _FromLayer(term, inputs, self.layer)
        inner = _LayerScoring(
            {self.layer: activation},
            [WholeTerm(function, ())],
            progress=scoring.progress,
            origin=scoring,
            layer=self.layer,
        )
        return self.attributor.attribute(inner)


@dataclass(frozen=True)
class Neuron(Attributor):
    """Any method, for the activation of one neuron in place of the score.

    Args:
        layer: dotted name of the layer, which must give one tensor and be called once.
        index: which of its activations, after the batch: a channel (the mean over its places), or channel and place.
        attributor: the method.

    The target still says which output is looked at, and is not used otherwise.
    """

    layer: str = ""
    index: int | Sequence[int] = 0
    attributor: Attributor = field(default_factory=Saliency)

    needs_layer: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_layer(self)
        _take_facts(self, self.attributor)

    @property
    def name(self) -> str:
        """The method's name, with the one inside."""
        return f"Neuron({self.layer}, {self.index}, {self.attributor.name})"

    def attribute(self, scoring: Scoring) -> Attribution:
        term, _ = _only_term(self, scoring)
        index = (self.index,) if isinstance(self.index, int) else tuple(self.index)
        function = _ToNeuron(term, self.layer, index)
        inner = Scoring(
            scoring.inputs,
            [WholeTerm(function, ())],
            padding=scoring.padding,
            progress=scoring.progress,
            drawn=scoring.drawn,
            embedded=scoring.embedded,
        )
        return self.attributor.attribute(inner)


@dataclass(frozen=True)
class LayerActivation(Attributor):
    """The activations of a layer, as they are.

    Args:
        layer: dotted name of the layer.
    """

    layer: str = ""

    linear: ClassVar[bool] = False
    needs_layer: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_layer(self)

    def attribute(self, scoring: Scoring) -> Attribution:
        term, inputs = _only_term(self, scoring)
        return Attribution({self.layer: activation_of(term, inputs, self.layer)}, scoring.score())


@dataclass(frozen=True)
class PathLayerAttributor(BaselineAttributor):
    """A method at a layer, along the straight way from a baseline to the input of the network.

    Args:
        layer: dotted name of the layer.
        n_steps: steps along the way.
        baseline: where the way begins.
    """

    layer: str = ""
    n_steps: int = 50
    baseline: BaselineLike = field(default_factory=Blur)

    needs_layer: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_layer(self)
        if self.n_steps < 1:
            raise InputError(f"{type(self).__name__}(n_steps={self.n_steps}) needs at least one step.")

    def attribute(self, scoring: Scoring) -> Attribution:
        term, _ = _only_term(self, scoring)
        return average([self._walk(scoring, term, start) for start in self.draws(scoring)])

    def _walk(self, scoring: Scoring, term: Term, start: Tensors) -> Attribution:
        total: Tensor | None = None
        before: tuple[Tensor, Tensor] | None = None
        for step in scoring.track(range(self.n_steps + 1), self.name):
            points = [b + step / self.n_steps * (x - b) for x, b in zip(scoring.values, start, strict=True)]
            part = term.cut([scoring.padding.pad(x) for x in points])
            _, *now = activation_and_gradient(term, part, self.layer)
            if before is not None:
                added = self.add(before, (now[0], now[1]))
                total = added if total is None else total + added
            before = now[0], now[1]
        assert total is not None
        return Attribution(
            {self.layer: total}, scoring.score(), scoring.score(start), {"passes": self.n_steps + 1}
        )

    @abstractmethod
    def add(self, before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> Tensor:
        """Return what one step adds, from activation and gradient at its ends."""


@dataclass(frozen=True)
class LayerConductance(PathLayerAttributor):
    """How much of the change of the score flows through each activation of a layer: all of it, if none goes around it.

    Reference: Dhamdhere et al., "How Important Is a Neuron?", ICLR 2019 (arXiv:1805.12233); by trapezoids.
    """

    summable: ClassVar[bool] = True

    def add(self, before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> Tensor:
        return (now[0] - before[0]) * (now[1] + before[1]) / 2


@dataclass(frozen=True)
class InternalInfluence(PathLayerAttributor):
    """The mean gradient at each activation of a layer, along the way.

    Reference: Leino et al., "Influence-Directed Explanations for Deep Convolutional Networks", ITC 2018
    (arXiv:1802.03788); by trapezoids.
    """

    def add(self, before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> Tensor:
        return (now[1] + before[1]) / (2 * self.n_steps)


class _FromLayer(nn.Module):
    """The score as a function of the activation of a layer."""

    def __init__(self, term: Term, inputs: Tensors, layer: str) -> None:
        super().__init__()
        self.network = term.network
        self._term, self._inputs, self._layer = term, inputs, layer

    def forward(self, activation: Tensor) -> Tensor:
        with hooked(self.network, self._layer, lambda *_: activation):
            score: Tensor = self._term.function(*(x.clone() for x in self._inputs), *self._term.selection())
        return score


class _ToNeuron(nn.Module):
    """The activation of a neuron as a function of the inputs."""

    def __init__(self, term: Term, layer: str, index: tuple[int, ...]) -> None:
        super().__init__()
        self.network = term.network
        self._term, self._name, self._index = term, layer, index

    def forward(self, *inputs: Tensor) -> Tensor:
        with hooked(self.network, self._name, seen := Seen(self._name)):
            self._term.function(*inputs, *self._term.selection())
        return self._pick(seen.activation)

    def _pick(self, activation: Tensor) -> Tensor:
        sizes = tuple(activation.shape[1:])
        is_inside = all(0 <= i < n for i, n in zip(self._index, sizes, strict=False))
        if len(self._index) not in (1, len(sizes)) or not is_inside:
            raise InputError(
                f"Neuron(index={self._index}) does not lie in the layer {self._name!r}, which gives {sizes} after the "
                "batch: name a channel, or a channel and a place."
            )
        for i in self._index:
            activation = activation.select(1, i)
        return activation.flatten(1).mean(1) if activation.ndim > 1 else activation


@dataclass(frozen=True)
class _LayerScoring(Scoring):
    """A score as a function of a layer's activation; a baseline is the activation at a baseline of the inputs."""

    origin: Scoring | None = None
    layer: str = ""

    def draw(self, baseline: Baseline | Mapping[str, Baseline]) -> list[Tensors]:
        assert self.origin is not None
        if id(baseline) not in self.drawn:
            term = self.origin.terms[0]
            parts = [
                term.cut([self.origin.padding.pad(x) for x in draw]) for draw in self.origin.draw(baseline)
            ]
            self.drawn[id(baseline)] = [(activation_of(term, part, self.layer),) for part in parts]
        return self.drawn[id(baseline)]


def _only_term(method: Attributor, scoring: Scoring) -> tuple[Term, Tensors]:
    """Return the one term of a score and what it sees.

    Raises:
        UnsupportedInfererError: if windows or an inferer call the network more than once.
    """
    if scoring.repeats_calls or len(scoring.terms) != 1:
        raise UnsupportedInfererError(
            f"{method.name}: a layer has activations of its own in every window, which have no common grid. Explain "
            "one window without an inferer, or take a class activation map, which is blended."
        )
    term, (inputs,) = next(scoring.parts(method.name, scoring.values))
    return term, inputs


def _require_layer(method: Attributor) -> None:
    layer = getattr(method, "layer", "")
    if not isinstance(layer, str) or not layer:
        raise InputError(
            f"{type(method).__name__}(layer=...) needs the dotted name of a layer, got {layer!r}."
        )


def _take_facts(method: Attributor, inner: Attributor) -> None:
    """Let a method promise what the one inside promises."""
    for fact in ("complete", "summable", "paints", "stochastic", "cause_of_gap"):
        object.__setattr__(method, fact, getattr(inner, fact))
