"""The explainer: *what* is explained, *how*, and *over what extent*."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from monai_xai.attributors import Attribution, Attributor
from monai_xai.calls import CalledNetwork, CallForm, find_embeddings
from monai_xai.errors import AttributionError, InputError
from monai_xai.explanation import Explanation
from monai_xai.forward import InfererNetwork, ScoreFunction, Scoring, Tensors, WholeTerm, guard, undisturbed
from monai_xai.networks import require_module
from monai_xai.regions import Needs
from monai_xai.targets import FunctionTarget, Target
from monai_xai.windows import (
    StitchedNetwork,
    is_sliding_window,
    output_channels,
    plan_windows,
    window_scoring,
)

Inputs = Tensor | Mapping[str, Tensor]
Label = Tensor | Mapping[str, Tensor] | None
TargetLike = Target | Callable[..., Tensor]


class CompletenessWarning(UserWarning):
    """The attributions of a method that promises to sum up miss the change of the score by a large share."""


@dataclass(frozen=True, eq=False)
class Explainer:
    """What is explained (target), how (attributor), over what extent (inferer). Pure configuration.

    Args:
        target: what is explained; a function of the output is coerced to ``FunctionTarget``. A mapping of names to
            targets explains each of them from one clean prediction.
        attributor: the method.
        inferer: how the network is applied to whole inputs; None calls it on them. Sliding windows are attributed
            exactly, see :mod:`monai_xai.windows`; any other inferer is differentiated or perturbed as a whole.
        channel_names: names of the channels (modalities) by input name.
        call: how the network takes several inputs: "arguments" by position, "mapping" as one dict by name, "sequence"
            as one tuple, or the names of those that go by keyword.
        embeddings: dotted name of the embedding, by input, for inputs of whole numbers (tokens, category codes; shape
            (N, L)) that more than one embedding sees; their attributions are summed over the embedding.
        progress: whether long work shows a progress bar.
        tolerated_gap: relative completeness gap above which a :class:`CompletenessWarning` is given.

    Example:
        >>> import torch
        >>> from monai_xai import Constant, DeepLift, Explainer, OutputScore
        >>> network = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(network.weight)
        >>> explainer = Explainer(OutputScore(), DeepLift(baseline=Constant(0.0)))
        >>> explainer(network, torch.tensor([[2.0, 3.0]])).attributions["input"]
        tensor([[2., 3.]])
    """

    target: TargetLike | Mapping[str, TargetLike]
    attributor: Attributor
    inferer: Inferer | None = None
    channel_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    progress: bool = True
    tolerated_gap: float = 0.05
    call: CallForm = "arguments"
    embeddings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.attributor, Attributor):
            raise InputError(
                f"Explainer(attributor=...) needs an attributor such as Saliency(), got {self.attributor!r}."
            )
        if self.inferer is not None and not isinstance(self.inferer, Inferer):
            raise InputError(f"Explainer(inferer=...) needs a MONAI inferer object, got {self.inferer!r}.")
        if isinstance(self.target, Mapping) and not self.target:
            raise InputError("Explainer(target={}) names no target.")
        target = self.target
        coerced = (
            {k: _as_target(t) for k, t in target.items()}
            if isinstance(target, Mapping)
            else _as_target(target)
        )
        object.__setattr__(self, "target", coerced)

    def __call__(
        self, network: nn.Module, inputs: Inputs, label: Label = None, prediction: Any = None
    ) -> Explanation | dict[str, Explanation]:
        """Explain a batch.

        Args:
            network: called with the inputs by position, in the order of the mapping. Not changed in any way.
            inputs: one tensor (named "image", or "input" if it has no spatial axes) or tensors by name, shape
                (N, C, *spatial) or (N, F).
            label: ground truth for regions that need one, shape (N, 1, *spatial) or (N, C, *spatial); or a mapping,
                from which a target takes what has the name of its ``head``.
            prediction: the network's clean output through the inferer, if it is there already; spares a forward pass.

        Returns:
            One explanation; a dict of them if the target is a mapping or stands for several (``Component(k=None)``).

        Raises:
            InputError: if inputs, label, target and output do not fit each other.
            UnsupportedNetworkError: if the method is not defined on this network.
            UnsupportedInfererError: if the inferer cannot be attributed exactly.
            AttributionError: if the method fails while it runs.
        """
        explanations = self.explain(network, inputs, label=label, prediction=prediction)
        return explanations[""] if set(explanations) == {""} else explanations

    def explain(
        self, network: nn.Module, inputs: Inputs, *, label: Label = None, prediction: Any = None
    ) -> dict[str, Explanation]:
        """Explain a batch as :meth:`__call__` does, and return explanations by target name ("" for a single one)."""
        network = require_module(network)
        named = name_inputs(inputs)
        with undisturbed(network):
            called, tensors = self._prepare(network, {name: _plain(x) for name, x in named.items()})
            plain_label = _plain_label(label)
            plain_prediction = _plain(prediction) if isinstance(prediction, Tensor) else prediction
            task = _Task(self, called, tensors, plain_label, plain_prediction)
            return {name: self._explain(task, target, named) for name, target in task.targets().items()}

    def _prepare(
        self, network: nn.Module, inputs: Mapping[str, Tensor]
    ) -> tuple[CalledNetwork, dict[str, Tensor]]:
        """Return the network as a function by position, and inputs of whole numbers at their embedding."""
        with guard("the look at embeddings", tuple(inputs.values())):
            called = CalledNetwork(network, tuple(inputs), self.call)
            embedded = find_embeddings(called, inputs, self.embeddings)
            embeddings = {name: part.embed(part.numbers) for name, part in embedded.items()}
        return CalledNetwork(network, tuple(inputs), self.call, embedded), {**inputs, **embeddings}

    def _explain(self, task: _Task, target: Target, named: Mapping[str, Tensor]) -> Explanation:
        start = time.perf_counter()
        with guard("the score", tuple(task.inputs.values())):
            scoring = task.scoring(target)
        with guard(self.attributor.name, scoring.values):
            attribution = self.attributor.attribute(scoring)
        self._require_finite(attribution, target)
        explanation = Explanation(
            attributions={
                name: _like(self._per_token(values) if name in task.network.embedded else values, named[name])
                for name, values in attribution.maps.items()
            },
            score=attribution.score,
            baseline_score=attribution.baseline_score,
            delta=_delta(attribution) if self.attributor.complete else None,
            seconds=time.perf_counter() - start,
            method=str(self.attributor),
            target=str(target),
            seed=_seed(self.attributor),
            summable=self.attributor.summable,
            channels={name: tuple(self.channel_names[name]) for name in named if name in self.channel_names},
            facts={**task.facts(scoring), **attribution.facts},
        )
        self._judge(explanation)
        return explanation

    def _per_token(self, values: Tensor) -> Tensor:
        """Return one value for each token from those of its embedding, shape (N, L, D) to (N, L)."""
        return values.mean(-1) if self.attributor.paints else values.sum(-1)

    def _require_finite(self, attribution: Attribution, target: Target) -> None:
        """Refuse results with NaN or infinite values, whichever part of the work they come from."""
        if not torch.isfinite(attribution.score).all():
            raise AttributionError(
                f"The score of {target} is not finite, {attribution.score.tolist()}: the network's output holds NaN or "
                "infinite values there. Look at its weights (diverged training?) and at the intensities of the input."
            )
        baseline_score = attribution.baseline_score
        if baseline_score is not None and not torch.isfinite(baseline_score).all():
            raise AttributionError(
                f"The score of {target} is not finite at the baseline, {baseline_score.tolist()}: this network is not "
                f"defined on what {self.attributor} holds the input against. Choose another baseline, such as Blur()."
            )
        for name, values in attribution.maps.items():
            if bad := int((~torch.isfinite(values)).sum()):
                raise AttributionError(
                    f"{self.attributor.name} gave {bad} NaN or infinite attributions for the input {name!r} of "
                    f"{values.numel()}: the network has no finite gradient there (a square root or division at 0?). "
                    "Use a perturbation method such as FeatureAblation, or mend the operation in the network."
                )

    def _judge(self, explanation: Explanation) -> None:
        """Warn of attributions that do not add up."""
        gap = explanation.gap
        if gap is None or (gap <= self.tolerated_gap).all():
            return
        worst = int(gap.argmax())
        assert explanation.delta is not None and explanation.baseline_score is not None
        change = float(explanation.score[worst] - explanation.baseline_score[worst])
        warnings.warn(
            f"{self.attributor.name}: attributions of sample {worst} miss the change of the score by "
            f"{float(gap[worst]):.1%} (delta {float(explanation.delta[worst]):.4g}, score minus baseline score "
            f"{change:.4g}). Likely cure: {self.attributor.cause_of_gap}.",
            CompletenessWarning,
            stacklevel=4,
        )


class _Task:
    """One batch to be explained, with what several targets share: the clean predictions, by head, and the baselines.

    Args:
        explainer: the configuration.
        network: the network, undisturbed.
        inputs: plain tensors by name.
        label: plain ground truth.
        given: the network's clean output through the inferer, if the caller has it.
    """

    def __init__(
        self,
        explainer: Explainer,
        network: CalledNetwork,
        inputs: Mapping[str, Tensor],
        label: Label,
        given: Any,
    ) -> None:
        self.inferer = explainer.inferer
        self.target = explainer.target
        self.progress = explainer.progress
        self.network = network
        self.inputs = inputs
        self.label = label
        self.given = given
        self._predictions: dict[str | int | None, Tensor] = {}
        self._drawn: dict[int, list[Tensors]] = {}

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
        selection = tuple(
            part.to(self._image.device)
            for part in target.select(self._output(target), self._label_of(target))
        )
        if (sliding := self._sliding) and target.linear:
            scoring = window_scoring(self.network, sliding, target, selection[0], inputs=self.inputs)
            return self._share(scoring)
        whole = self._whole(target.head)
        scored = replace(target, head=None) if isinstance(whole, StitchedNetwork) else target
        function = ScoreFunction(whole, scored, len(self.inputs))
        repeats = whole is not self.network
        scoring = Scoring(self.inputs, [WholeTerm(function, selection)], repeats_calls=repeats)
        return self._share(scoring)

    def _share(self, scoring: Scoring) -> Scoring:
        """Return a scoring with what all targets of this batch share."""
        return replace(scoring, progress=self.progress, drawn=self._drawn, embedded=self.network.embedded)

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
            return StitchedNetwork(self.network, sliding, head, progress=self.progress)
        return InfererNetwork(self.network, self.inferer)

    def _output(self, target: Target) -> Tensor:
        """Return the clean prediction; where its values are not looked at, a tensor of its shape as far as needed."""
        is_known = target.needs is Needs.NOTHING or (self._sliding is not None and target.linear)
        if is_known and target.needs is not Needs.VALUES:
            return self._placeholder(target)
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
        if self.given is not None:
            prediction = target.pick(self.given)
            if prediction.shape[0] != self._image.shape[0]:
                raise InputError(
                    f"The prediction has batch size {prediction.shape[0]}, the inputs have {self._image.shape[0]}."
                )
            return prediction
        whole = self._whole(target.head)
        with guard("the clean prediction", tuple(self.inputs.values())), torch.no_grad():
            output = whole(*(x.clone() for x in self.inputs.values()))
        return output if isinstance(whole, StitchedNetwork) else target.pick(output)


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
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise InputError(
                f"The input {name!r} has {bad} NaN or infinite values in sample {sample} (shape {tuple(x.shape)}): "
                "no attribution is defined there. Mend the image, or clean it with torch.nan_to_num first."
            )
    if isinstance(x, MetaTensor):
        _check_affine(name, x)


def _check_affine(name: str, x: MetaTensor) -> None:
    matrix = torch.as_tensor(x.affine).double()[..., :-1, :-1]
    volume = torch.linalg.det(matrix).abs() / matrix.norm(dim=-2).prod(-1)
    if not (volume > 1e-6).all():
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


def _like(values: Tensor, source: Tensor) -> Tensor:
    """Return maps with the affine and applied operations of their input."""
    return (
        MetaTensor(values).copy_meta_from(source, copy_attr=True)
        if isinstance(source, MetaTensor)
        else values
    )


def _delta(attribution: Attribution) -> Tensor:
    assert attribution.baseline_score is not None
    sums = [values.flatten(1).sum(1) for values in attribution.maps.values()]
    return sum(sums[1:], sums[0]) - (attribution.score - attribution.baseline_score)


def _seed(attributor: Attributor) -> int | None:
    baseline = getattr(attributor, "baseline", None)
    baselines = baseline.values() if isinstance(baseline, Mapping) else [baseline]
    seeds = (getattr(owner, "seed", None) for owner in (attributor, *baselines))
    return next((int(seed) for seed in seeds if seed is not None), None)


def _as_target(target: TargetLike) -> Target:
    if isinstance(target, Target):
        return target
    if callable(target):
        return FunctionTarget(target)
    raise InputError(
        f"Explainer(target=...) needs a target such as ClassScore() or RegionScore(1), got {target!r}."
    )
