"""What metrics that call the network ask it: the explainer's own question, with its selection frozen.

A metric explains again at other inputs, or with other weights. What was selected from the clean prediction (the
predicted class, the predicted mask) is kept through all of that: else the metric would compare answers to different
questions, or find the region empty as soon as the weights are random.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from monai_xai.errors import AttributionError, InputError
from monai_xai.explainer import CompletenessWarning, Explainer
from monai_xai.explanation import Explanation
from monai_xai.forward import Scoring
from monai_xai.metrics.base import real
from monai_xai.regions import Needs
from monai_xai.targets import Target
from monai_xai.tasks import Inputs, Label, Question, TargetLike, Task, as_targets, open_task
from monai_xai.terms import Tensors

T = TypeVar("T")
Explained = Explanation | Mapping[str, Tensor] | Tensor
"""An explanation, or maps alone (of a control, say): by input name, or one tensor for one input."""


@dataclass(frozen=True, eq=False)
class FrozenTarget(Target):
    """A target whose selection was made before, whatever it is shown now.

    Args:
        target: what is scored.
        selection: what it selected from the clean prediction.
    """

    target: Target
    selection: Tensors

    def __str__(self) -> str:
        return str(self.target)

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    @property
    def linear(self) -> bool:
        return self.target.linear

    def select(self, output: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        return self.selection

    def score(self, output: Tensor, *selection: Tensor) -> Tensor:
        return self.target.score(output, *selection)


def freeze(task: Task, target: Target) -> FrozenTarget:
    """Return a target that keeps what it selects from the clean prediction of a task."""
    return FrozenTarget(target, task.select(target), head=target.head, unit=target.unit)


@dataclass(frozen=True, eq=False)
class OpenQuestion:
    """One question to one network about one batch, opened.

    Args:
        task: the batch; the network in it is undisturbed.
        target: what is explained, frozen.
        scoring: its score as a function of the inputs.
    """

    task: Task
    target: FrozenTarget
    scoring: Scoring

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, in call order."""
        return tuple(self.scoring.inputs)

    def placed(self, words: T) -> T:
        """Return features, an imputer or a perturbation as they lie on the batch."""
        return self.task.placed(words, self.target)


@contextmanager
def ask(
    question: Question,
    network: nn.Module,
    inputs: Inputs,
    label: Label = None,
    *,
    score: TargetLike | None = None,
) -> Iterator[OpenQuestion]:
    """Open the one question that a metric is about; inside, the network is undisturbed.

    Args:
        question: an explainer, say.
        network: the network.
        inputs: as the explainer takes them.
        label: as the explainer takes it.
        score: what is scored in place of the question's target.

    Raises:
        InputError: if the question has several targets, of which a metric could take only one.
    """
    with open_task(question, network, inputs, label) as task:
        target = only_target(task) if score is None else as_targets(score)
        assert isinstance(target, Target)
        frozen = freeze(task, target)
        yield OpenQuestion(task, frozen, task.scoring(frozen))


def only_target(task: Task) -> Target:
    """Return the one target of a task.

    Raises:
        InputError: naming the targets, if there are several.
    """
    targets = task.targets()
    if len(targets) != 1:
        raise InputError(
            f"A metric judges one target, but the explainer has {len(targets)}: {', '.join(targets)}. Give it an "
            "explainer for each of them: dataclasses.replace(explainer, target=...)."
        )
    return next(iter(targets.values()))


def freeze_explainer(explainer: Explainer, network: nn.Module, inputs: Inputs, label: Label) -> Explainer:
    """Return the explainer with its selection frozen, so that other inputs or weights are asked the same."""
    with ask(explainer, network, inputs, label) as asked:
        return asked_alone(explainer, asked.target)


def asked_alone(explainer: Explainer, target: Target, **changes: Any) -> Explainer:
    """Return the explainer with another target, for this process alone: what others judge is not in step with it."""
    return replace(explainer, target=target, spread=False, **changes)


def explain_again(explainer: Explainer, network: nn.Module, inputs: Inputs) -> Explanation:
    """Explain with a frozen explainer; gaps of completeness are not what is judged here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletenessWarning)
        explanation = explainer(network, inputs)
    assert isinstance(explanation, Explanation)
    return explanation


def try_again(explainer: Explainer, network: nn.Module, inputs: Inputs) -> Explanation | str:
    """Explain with a frozen explainer, or return why it cannot be done (a network with random weights may overflow)."""
    try:
        return explain_again(explainer, network, inputs)
    except AttributionError as error:
        return str(error)


def named_maps(explained: Explained, inputs: Sequence[str]) -> dict[str, Tensor]:
    """Return maps by input name, in call order.

    Raises:
        InputError: if an input has no map.
    """
    maps: Mapping[str, Any]
    if isinstance(explained, Explanation):
        maps = explained.attributions
    elif isinstance(explained, Tensor):
        maps = dict.fromkeys(inputs[:1], explained)
    else:
        maps = explained
    if not isinstance(maps, Mapping) or (missing := [name for name in inputs if name not in maps]):
        found = sorted(maps) if isinstance(maps, Mapping) else type(maps).__name__
        raise InputError(
            f"A map is needed for each of the inputs {list(inputs)}, got {found}: {missing} cannot be judged. Methods "
            "that explain a layer have no maps of the inputs."
        )
    return {name: maps[name] for name in inputs}


def maps_of(explained: Explained, scoring: Scoring, *, paints: bool = False) -> Tensors:
    """Return the maps of all inputs in call order, each of the shape of its input, in double precision on the CPU.

    A map of one channel speaks about all channels of its input alike.

    Args:
        explained: explanation or maps.
        scoring: at the inputs.
        paints: whether values repeat on all voxels of a feature; else the value of an embedded token is shared among
            the numbers that embed it.

    Raises:
        InputError: naming the map that is not on the grid of its input, or not finite.
    """
    found = []
    for name, values in named_maps(explained, tuple(scoring.inputs)).items():
        x = scoring.inputs[name]
        values = real(values)
        if name in scoring.embedded and values.ndim == x.ndim - 1:
            values = values[..., None].expand_as(x) / (1 if paints else x.shape[-1])
        fits = values.shape == x.shape or (
            values.ndim == x.ndim > 2 and values.shape == (x.shape[0], 1, *x.shape[2:])
        )
        if not fits:
            raise InputError(
                f"The map of {name!r} has shape {tuple(values.shape)}, its input {tuple(x.shape)}: metrics that call "
                "the network need maps on the grid of the input, with its channels or one."
            )
        if not torch.isfinite(values).all():
            raise InputError(f"The map of {name!r} (shape {tuple(values.shape)}) has NaN or infinite values.")
        found.append(values.expand_as(x).to(x.device))
    return tuple(found)


def explanation_or_maps(
    explainer: Explainer, asked: OpenQuestion, network: nn.Module, inputs: Inputs, explained: Explained | None
) -> Explained:
    """Return what the caller has, or explain."""
    if explained is not None:
        return explained
    return explain_again(asked_alone(explainer, asked.target), network, inputs)
