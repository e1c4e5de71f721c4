"""Ignite handlers: explanations inside training and evaluation loops.

:class:`AttributionHandler` computes and never draws; :mod:`monai_xai.tensorboard` draws and never computes. Between
them stands the event :attr:`AttributionEvents.ATTRIBUTION_COMPLETED` and ``engine.state.explained``.
"""

from __future__ import annotations

import heapq
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from ignite.engine import Engine, EventEnum, Events
from monai.data import MetaTensor
from monai.engines import Evaluator, Trainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.metrics import DiceHelper
from monai.utils.enums import CommonKeys
from torch import Tensor

from monai_xai.errors import InputError, XaiError
from monai_xai.explainer import Explainer
from monai_xai.explanation import Explanation
from monai_xai.forward import preserved_generators

logger = logging.getLogger(__name__)


class AttributionEvents(EventEnum):
    """Events that :class:`AttributionHandler` fires on the engine it is attached to."""

    ATTRIBUTION_COMPLETED = "attribution_completed"


def register_events(engine: Engine) -> None:
    """Make :class:`AttributionEvents` known to an engine, once."""
    if AttributionEvents.ATTRIBUTION_COMPLETED not in engine._allowed_events:
        engine.register_events(*AttributionEvents)


@dataclass(frozen=True, eq=False)
class ExplainedCase:
    """One case that :class:`AttributionHandler` has explained, in ``engine.state.explained``; a batch of one.

    Args:
        name: name of the case.
        explanations: explanations by explainer name.
        inputs: what went into the network, by name.
        prediction: the network's output, shape (1, C, ...), if it is one tensor.
        label: ground truth, if there is one.
        epoch: epoch of the engine; for a MONAI evaluator inside training, the epoch of the training.
    """

    name: str
    explanations: Mapping[str, Explanation]
    inputs: Mapping[str, Tensor]
    prediction: Tensor | None
    label: Tensor | None
    epoch: int


class Cases(ABC):
    """Which cases of an epoch are explained."""

    def start_epoch(self) -> None:  # noqa: B027 - most choices keep nothing between batches
        """Forget what was seen in the epoch before."""

    @abstractmethod
    def due(
        self, first: int, size: int, engine: Engine, names: Callable[[], tuple[str, ...]]
    ) -> tuple[int, ...]:
        """Return the samples of a batch that are to be explained.

        Args:
            first: index in the epoch of the first sample of the batch.
            size: number of samples of the batch.
            engine: the engine, whose ``state.output`` holds prediction and label.
            names: returns the names of the cases.
        """


@dataclass(frozen=True)
class FirstCases(Cases):
    """The first ``n`` cases of an epoch."""

    n: int

    def due(
        self, first: int, size: int, engine: Engine, names: Callable[[], tuple[str, ...]]
    ) -> tuple[int, ...]:
        return tuple(range(min(size, max(self.n - first, 0))))


@dataclass(frozen=True)
class ChosenCases(Cases):
    """Cases by index in the epoch (numbers) or by name (strings)."""

    chosen: frozenset[int | str]

    def due(
        self, first: int, size: int, engine: Engine, names: Callable[[], tuple[str, ...]]
    ) -> tuple[int, ...]:
        by_name = any(isinstance(choice, str) for choice in self.chosen)
        own = names() if by_name else ("",) * size
        return tuple(i for i in range(size) if first + i in self.chosen or own[i] in self.chosen)


class WorstCases(Cases):
    """The ``n`` cases of an epoch with the lowest metric.

    Whether a case is among the worst is decided when it comes, against those before it: the ``n`` worst are always
    explained, and early in an epoch some that turn out better. Cases whose metric is NaN (no lesion) are left out.

    Args:
        n: how many.
        metric: ``metric(prediction, label)`` returns one number per sample, shape (N,), higher is better. Default:
            mean Dice of the foreground classes of an arg-max segmentation.
    """

    def __init__(self, n: int, metric: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.n = n
        self.metric = metric or foreground_dice
        self._worst: list[float] = []

    def start_epoch(self) -> None:
        self._worst.clear()

    def due(
        self, first: int, size: int, engine: Engine, names: Callable[[], tuple[str, ...]]
    ) -> tuple[int, ...]:
        prediction, label = engine.state.output[CommonKeys.PRED], engine.state.output.get(CommonKeys.LABEL)
        if label is None:
            raise InputError("WorstCases needs a label in the batch; choose FirstCases(n) or name the cases.")
        with torch.no_grad():
            values = self.metric(prediction, label).reshape(size).tolist()
        return tuple(i for i, value in enumerate(values) if self._is_among_worst(value))

    def _is_among_worst(self, value: float) -> bool:
        if math.isnan(value):
            return False
        key = -value
        if len(self._worst) < self.n:
            heapq.heappush(self._worst, key)
            return True
        return heapq.heappushpop(self._worst, key) != key


def foreground_dice(prediction: Tensor, label: Tensor) -> Tensor:
    """Return the mean Dice of the foreground classes, shape (N,); an output of one channel is cut at 0."""
    one_channel = prediction.shape[1] == 1
    classes = (prediction > 0).long() if one_channel else prediction.argmax(1, keepdim=True)
    truth = label if label.shape[1] == 1 else label.argmax(1, keepdim=True)
    helper = DiceHelper(
        include_background=False,
        reduction="none",
        num_classes=max(prediction.shape[1], 2),
        get_not_nans=False,
    )
    return torch.as_tensor(helper(classes, truth)).nanmean(1)


def as_cases(value: Cases | int | str | Sequence[int | str]) -> Cases:
    """Coerce a number into :class:`FirstCases` and a list of indices or names into :class:`ChosenCases`."""
    if isinstance(value, Cases):
        return value
    if isinstance(value, int):
        return FirstCases(value)
    if not isinstance(value, str | Iterable):
        raise InputError(
            f"AttributionHandler(cases={value!r}) needs a number, indices or case names, or WorstCases(n)."
        )
    return ChosenCases(frozenset([value] if isinstance(value, str) else value))


class AttributionHandler:
    """Compute explanations inside an engine's loop, and change nothing else in it.

    In evaluators it explains at ``IterationEvents.FORWARD_COMPLETED``, so that the maps are in
    ``engine.state.output[key]`` (one entry per input; ``<explainer>_<input>`` if there are several explainers) before
    decollation, and the bundle's own ``Invertd`` and ``SaveImaged`` carry them on; in trainers at
    ``BACKWARD_COMPLETED``; in plain ignite engines at ``ITERATION_COMPLETED``. Cases are explained one by one, so that
    one that cannot be explained takes nothing from the others. In a batch that is explained in part, the maps of the
    other cases are NaN; :class:`~monai_xai.transforms.FlattenAttributionsd` leaves those out.

    Args:
        explainer: one explainer, or several by name. An explainer without inferer takes the engine's.
        cases: which cases of an epoch: a number for the first ones, a list of indices or case names, or
            :class:`WorstCases`.
        interval: explain in every ``interval``-th epoch, or in the epochs of a list.
        network: the network, if the engine has none of its own or another is meant.
        key: where maps go in ``engine.state.output``.
        case_key: where the batch holds case names; else file names are taken.
        on_error: "log" keeps the loop alive and counts what failed in ``failures``; "raise" ends it.
    """

    def __init__(
        self,
        explainer: Explainer | Mapping[str, Explainer],
        cases: Cases | int | Sequence[int | str] = 1,
        *,
        interval: int | Sequence[int] = 1,
        network: torch.nn.Module | None = None,
        key: str = "attribution",
        case_key: str = "case_id",
        on_error: Literal["log", "raise"] = "log",
    ) -> None:
        if on_error not in ("log", "raise"):
            raise InputError(f"AttributionHandler(on_error={on_error!r}): choose 'log' or 'raise'.")
        if isinstance(interval, int) and interval < 1:
            raise InputError(f"AttributionHandler(interval={interval}) must be at least 1.")
        self.is_single = not isinstance(explainer, Mapping)
        self.explainers = _named(explainer)
        self.cases = as_cases(cases)
        self.interval = interval
        self.network = network
        self.key = key
        self.case_key = case_key
        self.on_error = on_error
        self.failures = 0
        self._seen = 0

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, an evaluator or a plain ignite engine; a second time does nothing."""
        if engine.has_event_handler(self):
            return
        register_events(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(_event(engine), self)

    def _start_epoch(self, engine: Engine) -> None:
        self._seen = 0
        self.cases.start_epoch()

    def __call__(self, engine: Engine) -> None:
        """Explain the engine's batch if one of its cases is due."""
        if not self._is_due_in(engine.state.epoch):
            return
        try:
            self._explain_if_due(engine)
        except Exception as error:
            self._fail(error, f"epoch {engine.state.epoch}, iteration {engine.state.iteration}")

    def _is_due_in(self, epoch: int) -> bool:
        return epoch in self.interval if isinstance(self.interval, Sequence) else epoch % self.interval == 0

    def _explain_if_due(self, engine: Engine) -> None:
        size = _batch_size(engine)
        first, self._seen = self._seen, self._seen + size
        due = self.cases.due(first, size, engine, lambda: self._names(engine, first, size))
        if not due:
            return
        names = self._names(engine, first, size)
        inputs, label = self._batch(engine)
        rows = [
            self._explain_case(engine, i, names[i], inputs, label) if i in due else {} for i in range(size)
        ]
        self._put(engine, rows, inputs)

    def _explain_case(
        self, engine: Engine, row: int, name: str, inputs: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Explanation]:
        """Explain one row of the batch, tell those who listen, and return its explanations by explainer."""
        own = {key: _row(x, row) for key, x in inputs.items()}
        own_label, prediction = _row(label, row), _row(_prediction(engine), row)
        explanations: dict[str, Explanation] = {}
        for explainer_name, explainer in self.explainers.items():
            try:
                found = self._run(engine, explainer, own, own_label, prediction)
            except Exception as error:
                self._fail(error, f"case {name}, {explainer.attributor.name}")
                continue
            explanations |= {"_".join(filter(None, (explainer_name, part))): e for part, e in found.items()}
        if explanations:
            shown = prediction if isinstance(prediction, Tensor) else None
            engine.state.explained = ExplainedCase(
                name, explanations, own, shown, own_label, engine.state.epoch
            )
            engine.fire_event(AttributionEvents.ATTRIBUTION_COMPLETED)
        return explanations

    def _run(
        self,
        engine: Engine,
        explainer: Explainer,
        inputs: Mapping[str, Tensor],
        label: Tensor | None,
        prediction: Any,
    ) -> dict[str, Explanation]:
        network, own = self._network(engine), getattr(engine, "inferer", None)
        is_what_ran = (
            isinstance(engine, Evaluator)
            and (explainer.inferer is None or explainer.inferer is own)
            and network is getattr(engine, "network", None)
        )
        if explainer.inferer is None and isinstance(own, Inferer):
            explainer = replace(explainer, inferer=own)
        return explainer.explain(network, inputs, label=label, prediction=prediction if is_what_ran else None)

    def _put(
        self, engine: Engine, rows: Sequence[Mapping[str, Explanation]], inputs: Mapping[str, Tensor]
    ) -> None:
        """Put the maps where post-processing, metrics and later handlers find them; NaN in rows without any."""
        if not isinstance(engine.state.output, dict):
            return
        maps: dict[str, dict[int, Tensor]] = {}
        sources: dict[str, Tensor] = {}
        alone = self.is_single and all(len(row) <= 1 for row in rows)
        for number, row in enumerate(rows):
            for explained, explanation in row.items():
                for name, values in explanation.attributions.items():
                    key = name if alone else f"{explained}_{name}"
                    maps.setdefault(key, {})[number] = values
                    sources[key] = inputs[name]
        if maps:
            engine.state.output[self.key] = {
                key: _stack(values, len(rows), sources[key]) for key, values in maps.items()
            }

    def _network(self, engine: Engine) -> torch.nn.Module:
        network = self.network if self.network is not None else getattr(engine, "network", None)
        if not isinstance(network, torch.nn.Module):
            raise InputError(
                f"{type(engine).__name__} has no single network: give it, AttributionHandler(..., network=network)."
            )
        return network

    def _batch(self, engine: Engine) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the inputs of the network by name, as the engine fed them, and the label."""
        prepare = getattr(engine, "prepare_batch", None)
        if prepare is None:
            raise InputError(
                f"{type(engine).__name__} has no prepare_batch: use a MONAI trainer or evaluator."
            )
        with preserved_generators():
            batch = prepare(engine.state.batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        image, label, *further = batch
        arguments, keywords = further or ((), {})
        if keywords:
            raise InputError(
                f"The network takes keyword inputs {sorted(keywords)}, which have no place in the call order. Use "
                "PrepareBatchExtraInput with a list of keys, so that they are positional."
            )
        if isinstance(engine.state.output, dict):
            image, label = (
                engine.state.output.get(CommonKeys.IMAGE, image),
                engine.state.output.get(CommonKeys.LABEL, label),
            )
        names = getattr(prepare, "extra_keys", None) or [f"input{i + 1}" for i in range(len(arguments))]
        names = [names] if isinstance(names, str) else names
        return {CommonKeys.IMAGE: image, **dict(zip(names, arguments, strict=True))}, label

    def _names(self, engine: Engine, first: int, size: int) -> tuple[str, ...]:
        """Return the names of the cases: the batch's own, else file names, else their number in the epoch."""
        batch = engine.state.batch
        names = batch.get(self.case_key) if isinstance(batch, Mapping) else None
        if names is None and isinstance(batch, Mapping):
            image = batch.get(CommonKeys.IMAGE)
            files = image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else None
            names = (
                None
                if files is None
                else [Path(str(file).removesuffix(".gz")).stem for file in _as_list(files)]
            )
        names = [f"case{first + i}" for i in range(size)] if names is None else _as_list(names)
        return tuple(str(name.item() if isinstance(name, Tensor) else name) for name in names)

    def _fail(self, error: Exception, where: str) -> None:
        if self.on_error == "raise":
            raise error
        self.failures += 1
        trace = None if isinstance(error, XaiError) else error
        logger.warning("Not explained: %s (failure %d): %s", where, self.failures, error, exc_info=trace)


def _event(engine: Engine) -> Any:
    if isinstance(engine, Trainer):
        return IterationEvents.BACKWARD_COMPLETED
    return IterationEvents.FORWARD_COMPLETED if isinstance(engine, Evaluator) else Events.ITERATION_COMPLETED


def _batch_size(engine: Engine) -> int:
    output, batch = engine.state.output, engine.state.batch
    image = output.get(CommonKeys.IMAGE) if isinstance(output, dict) else None
    if image is None:
        image = batch[CommonKeys.IMAGE] if isinstance(batch, Mapping) else batch[0]
    return len(image)


def _prediction(engine: Engine) -> Any:
    return engine.state.output.get(CommonKeys.PRED) if isinstance(engine.state.output, dict) else None


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _named(explainer: Explainer | Mapping[str, Explainer]) -> dict[str, Explainer]:
    named = dict(explainer) if isinstance(explainer, Mapping) else {"": explainer}
    for value in named.values():
        if not isinstance(value, Explainer):
            raise InputError(f"AttributionHandler needs an Explainer or several by name, got {value!r}.")
    return {name or value.attributor.name: value for name, value in named.items()}


def _row(value: Any, row: int) -> Any:
    """Return one row of a batched tensor, or of the tensors in a list or dict, with a batch axis of one."""
    if isinstance(value, Tensor):
        return value[row : row + 1]
    if isinstance(value, Mapping):
        return {key: _row(part, row) for key, part in value.items()}
    return [_row(part, row) for part in value] if isinstance(value, list | tuple) else value


def _stack(maps: Mapping[int, Tensor], size: int, source: Tensor) -> Tensor:
    """Return a batch of maps, NaN in the rows that have none, in the space of the input."""
    first = next(iter(maps.values()))
    plain = first.as_tensor() if isinstance(first, MetaTensor) else first
    batch = plain.new_full((size, *first.shape[1:]), math.nan)
    for row, values in maps.items():
        batch[row] = values.as_tensor()[0] if isinstance(values, MetaTensor) else values[0]
    return (
        MetaTensor(batch).copy_meta_from(source, copy_attr=True) if isinstance(source, MetaTensor) else batch
    )
