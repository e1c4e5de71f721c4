"""From a question and a batch to scorings: what every way of explaining starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from monai_xai.calls import CalledNetwork, CallForm, ReplayedInferer, find_embeddings
from monai_xai.errors import AttributionError, InputError
from monai_xai.explanation import is_place
from monai_xai.forward import Scoring, guard
from monai_xai.grids import Case
from monai_xai.joined import JoinedGradients, JoinedScores
from monai_xai.networks import require_module
from monai_xai.placing import place
from monai_xai.regions import Needs, Region
from monai_xai.stitching import StitchedNetwork, StitchedTerm
from monai_xai.targets import FunctionTarget, Target
from monai_xai.terms import InfererNetwork, ScoreFunction, Tensors, WholeTerm, count_not_finite
from monai_xai.undisturbed import undisturbed
from monai_xai.windows import is_sliding_window, output_channels, plan_windows, window_scoring

Inputs = Tensor | Mapping[str, Tensor]
Label = Tensor | Mapping[str, Tensor] | None
TargetLike = Target | Callable[..., Tensor]
T = TypeVar("T")


class Question(Protocol):
    """What is asked of a network: which score, over what extent, and how it takes its inputs."""

    @property
    def target(self) -> TargetLike | Mapping[str, TargetLike]:
        """What is explained, one or several by name."""

    @property
    def inferer(self) -> Inferer | None:
        """How the network is applied."""

    @property
    def progress(self) -> bool:
        """Whether long work shows a bar."""

    @property
    def memory_gib(self) -> float | None:
        """What a batch of perturbed inputs may take."""

    @property
    def call(self) -> CallForm:
        """How the network takes several inputs."""

    @property
    def embeddings(self) -> Mapping[str, str]:
        """Names of embeddings, by input."""


class Task:
    """One batch to be explained, with what several targets share: the clean predictions, by head, and the baselines.

    Args:
        question: what is asked.
        network: the network, undisturbed.
        inputs: plain tensors by name.
        given: the inputs as the caller gave them.
        label: plain ground truth.
        predicted: the network's clean output through the inferer, if the caller has it.
    """

    def __init__(
        self,
        question: Question,
        network: CalledNetwork,
        inputs: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        label: Label,
        predicted: Any,
    ) -> None:
        self.inferer = question.inferer
        self.target = as_targets(question.target)
        self.progress = question.progress
        self.memory_gib = question.memory_gib
        self.network = network
        self.inputs = inputs
        self.label = label
        self.given = given
        self.predicted = predicted
        self._predictions: dict[str | int | None, Tensor] = {}
        self._drawn: dict[int, list[Tensors]] = {}
        self._placed: dict[tuple[int, str], tuple[Any, Any]] = {}

    def targets(self) -> dict[str, Target]:
        """Return the targets by name, those that stand for several taken apart."""
        named = self.target if isinstance(self.target, Mapping) else {"": self.target}
        found: dict[str, Target] = {}
        for name, target in named.items():
            assert isinstance(target, Target)
            parts = target.each(self._output(target), self._label_of(target)) or {"": target}
            found |= {"_".join(filter(None, (name, part))): single for part, single in parts.items()}
        return found

    def scoring(self, target: Target) -> Scoring:
        """Select once, and return the score of the frozen selection."""
        with guard("the score", tuple(self.inputs.values())):
            return self._share(self._scoring(target))

    def select(self, target: Target) -> Tensors:
        """Return what a target selects from the clean prediction, see :meth:`Target.select`."""
        selected = target.select(self._output(target), self._label_of(target))
        return tuple(part.to(self._image.device) for part in selected)

    def placed(self, owner: T, target: Target) -> T:
        """Return a method, say, with the features and baselines in it as they lie on this batch."""
        key = id(owner), str(target)
        if key not in self._placed:
            case = Case(self.given, lambda region: self._region(region, target))
            self._placed[key] = owner, place(owner, case)  # both are kept: baselines go by their identity
        return self._placed[key][1]

    def _region(self, region: Region, target: Target) -> Tensor:
        """Return the voxels of a region of the prediction or label, shape (N, 1, *spatial), bool."""
        output, label = self.prediction(target), self._label_of(target)
        if output.ndim == 2 and region.needs < Needs.VALUES:
            output = self._image[:, :1]  # of a label, beside a prediction without a grid
        channel = explained_channel(target)
        if output.ndim == 2 or channel is None:
            raise InputError(
                f"{region} has no meaning for {target}, which is no score of one channel of an output map: give a "
                "mask, a tensor or a file, in its place."
            )
        return region.mask(output, label, channel)

    def _scoring(self, target: Target) -> Scoring:
        selection = self.select(target)
        if (sliding := self._sliding) and target.linear:
            return window_scoring(self.network, sliding, target, selection[0], inputs=self.inputs)
        whole = self._whole(target.head)
        term: WholeTerm
        if isinstance(whole, StitchedNetwork):
            term = StitchedTerm(ScoreFunction(whole, replace(target, head=None), len(self.inputs)), selection)
        else:
            term = WholeTerm(ScoreFunction(whole, target, len(self.inputs)), selection)
        return Scoring(self.inputs, [term], repeats_calls=whole is not self.network)

    def _share(self, scoring: Scoring) -> Scoring:
        """Return a scoring with what all targets of this batch share."""
        return self.again(
            replace(
                scoring,
                progress=self.progress,
                drawn=self._drawn,
                embedded=self.network.embedded,
                memory_gib=self.memory_gib,
            )
        )

    def again(self, scoring: Scoring) -> Scoring:
        """Return the same score, of which nothing is known yet: what batches hold, and whether their parts agree."""
        return replace(
            scoring,
            joined_scores=JoinedScores(self.memory_gib),
            joined_gradients=JoinedGradients(self.memory_gib),
        )

    def facts(self, scoring: Scoring) -> dict[str, int]:
        """Return how many windows there are and how many of them matter."""
        if not (sliding := self._sliding):
            return {}
        windows = len(plan_windows(sliding, scoring.values).places) * self._image.shape[0]
        return {
            "windows": windows,
            "active_windows": windows if scoring.repeats_calls else len(scoring.terms),
        }

    def _label_of(self, target: Target) -> Tensor | None:
        if not isinstance(self.label, Mapping):
            return self.label
        return self.label.get(str(target.head))

    @property
    def _sliding(self) -> SlidingWindowInferer | None:
        inferer = self.inferer
        return inferer if isinstance(inferer, SlidingWindowInferer) and is_sliding_window(inferer) else None

    @property
    def _image(self) -> Tensor:
        values = tuple(self.inputs.values())
        return next((x for x in values if x.ndim > 2), values[0])

    def _whole(self, head: str | int | None) -> nn.Module:
        """Return the network as a function of whole inputs."""
        if self.inferer is None or isinstance(self.inferer, SimpleInferer):
            return self.network
        if sliding := self._sliding:
            return StitchedNetwork(
                self.network, sliding, head, progress=self.progress, memory_gib=self.memory_gib
            )
        is_replayed = isinstance(self.inferer, ReplayedInferer)
        return InfererNetwork(self.network.network if is_replayed else self.network, self.inferer)

    def _output(self, target: Target) -> Tensor:
        """Return the clean prediction; where its values are not looked at, a tensor of its shape as far as needed."""
        is_known = target.needs is Needs.NOTHING or (self._sliding is not None and target.linear)
        if is_known and target.needs is not Needs.VALUES:
            return self._placeholder(target)
        return self.prediction(target)

    def prediction(self, target: Target) -> Tensor:
        """Return the clean prediction that a target looks at, shape (N, ...)."""
        if target.head not in self._predictions:
            self._predictions[target.head] = self._predict(target)
        return self._predictions[target.head]

    def _placeholder(self, target: Target) -> Tensor:
        channels = 1
        if target.needs is Needs.SHAPE:
            assert self._sliding is not None
            inputs = tuple(self.inputs.values())
            with guard("the look at one window", inputs):
                channels = output_channels(self.network, self._sliding, target.head, inputs)
        return self._image.new_zeros(()).expand(self._image.shape[0], channels, *self._image.shape[2:])

    def _predict(self, target: Target) -> Tensor:
        if self.predicted is not None:
            prediction = target.pick(self.predicted)
            if prediction.shape[0] != self._image.shape[0]:
                raise InputError(
                    f"The prediction has batch size {prediction.shape[0]}, the inputs have {self._image.shape[0]}."
                )
            return prediction
        whole = self._whole(target.head)
        with guard("the clean prediction", tuple(self.inputs.values())), torch.no_grad():
            output = whole(*(x.clone() for x in self.inputs.values()))
        return output if isinstance(whole, StitchedNetwork) else target.pick(output)


def explained_channel(target: Any) -> int | None:
    """Return the output channel that a target, or the one it keeps frozen, speaks about; None if there is none."""
    while target is not None and not hasattr(target, "channel"):
        target = getattr(target, "target", None)
    return None if target is None else int(target.channel)


@contextmanager
def open_task(
    question: Question, network: nn.Module, inputs: Inputs, label: Label = None, prediction: Any = None
) -> Iterator[Task]:
    """Make a batch ready to be explained; inside, the network is undisturbed by what is done to it.

    Raises:
        InputError: naming an input, label or target that cannot be explained.
        UnsupportedNetworkError: if the network cannot be.
    """
    network = require_module(network)
    given = name_inputs(inputs)
    with undisturbed(network), _named_dtypes(network, given):
        tensors = {name: _plain(x) for name, x in given.items()}
        with guard("the look at embeddings", tuple(tensors.values())):
            called = CalledNetwork(network, tuple(given), question.call)
            embedded = find_embeddings(called, tensors, question.embeddings)
            tensors |= {name: part.embed(part.numbers) for name, part in embedded.items()}
        called = CalledNetwork(network, tuple(given), question.call, embedded)
        predicted = _plain(prediction) if isinstance(prediction, Tensor) else prediction
        yield Task(question, called, tensors, given, _plain_label(label), predicted)


@contextmanager
def _named_dtypes(network: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Add to an error that the inputs are of another type than the weights, if they are."""
    try:
        yield
    except AttributionError as error:
        weights = {x.dtype for x in network.parameters() if x.is_floating_point()}
        others = {
            name: x.dtype for name, x in inputs.items() if x.is_floating_point() and x.dtype not in weights
        }
        if not weights or not others:
            raise
        raise AttributionError(
            f"{error} The weights are {', '.join(sorted(map(str, weights)))}, the inputs {others}: explain "
            "network.float() at inputs.float(), or convert the one to the type of the other."
        ) from error.__cause__


def name_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Return inputs by name, in call order, after checking that they can be explained.

    Raises:
        InputError: naming the input that is no batch of finite floating-point numbers or lies nowhere in space.
    """
    if isinstance(inputs, Tensor):
        inputs = {"image" if inputs.ndim > 2 else "input": inputs}
    if not isinstance(inputs, Mapping):
        raise InputError(f"Inputs must be a tensor or tensors by name, got {type(inputs).__name__}.")
    if not inputs:
        raise InputError("There is no input to explain.")
    for name, x in inputs.items():
        _check_input(name, x)
    if len({x.shape[0] for x in inputs.values()}) > 1:
        raise InputError(
            f"Inputs must have one batch size, got { {name: tuple(x.shape) for name, x in inputs.items()} }."
        )
    return dict(inputs)


def _check_input(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.numel() == 0:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            f"The input {name!r} must be a tensor of shape (N, C, *spatial) or (N, F), got {shape}."
        )
    if x.is_complex() or x.dtype == torch.bool or (not x.is_floating_point() and x.ndim > 2):
        raise InputError(
            f"The input {name!r} must be of floating-point numbers, got {x.dtype}: convert with .float()."
        )
    for sample, values in enumerate(x if x.is_floating_point() else []):
        if bad := count_not_finite(values):
            raise InputError(
                f"The input {name!r} has {bad} NaN or infinite values in sample {sample} (shape {tuple(x.shape)}): "
                "no attribution is defined there. Mend the image, or clean it with torch.nan_to_num first."
            )
    if isinstance(x, MetaTensor):
        _check_affine(name, x)


def _check_affine(name: str, x: MetaTensor) -> None:
    if not is_place(torch.as_tensor(x.affine)):
        raise InputError(
            f"The input {name!r} has a singular affine {x.affine.tolist()}: its voxels have no place in space, and "
            "maps could not be saved in it. Mend the header (spacing and directions) of the file."
        )


def _plain_label(label: Label) -> Label:
    """Return a label, or the labels of several heads, as plain tensors.

    Raises:
        InputError: if it is neither.
    """
    if isinstance(label, Mapping):
        return {name: _plain(part) for name, part in label.items() if isinstance(part, Tensor)}
    if not isinstance(label, Tensor | None):
        raise InputError(
            "The label must be a tensor of shape (N, 1, *spatial), or such tensors by the name of the network's head, "
            f"got {type(label).__name__}."
        )
    return None if label is None else _plain(label)


def _plain(x: Tensor) -> Tensor:
    """Return a plain tensor that autograd may use, also from inside ``torch.inference_mode``."""
    x = x.as_tensor() if isinstance(x, MetaTensor) else x
    return x.clone() if x.is_inference() else x.detach()


def like(values: Tensor, source: Tensor) -> Tensor:
    """Return maps with the affine and applied operations of their input."""
    return (
        MetaTensor(values).copy_meta_from(source, copy_attr=True)
        if isinstance(source, MetaTensor)
        else values
    )


def as_targets(value: TargetLike | Mapping[str, TargetLike]) -> Target | Mapping[str, Target]:
    """Coerce a function into :class:`~monai_xai.targets.FunctionTarget`, also each of several by name."""
    if not isinstance(value, Mapping):
        return _as_target(value)
    if not value:
        raise InputError("target={} names no target.")
    return {name: _as_target(target) for name, target in value.items()}


def as_inferer(value: Inferer | None) -> Inferer | None:
    """Return an inferer.

    Raises:
        InputError: if it is none.
    """
    if value is not None and not isinstance(value, Inferer):
        raise InputError(f"inferer=... needs a MONAI inferer object, got {value!r}.")
    return value


def _as_target(target: TargetLike) -> Target:
    if isinstance(target, Target):
        return target
    if callable(target):
        return FunctionTarget(target)
    raise InputError(f"target=... needs a target such as ClassScore() or RegionScore(1), got {target!r}.")
