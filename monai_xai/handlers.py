"""Ignite handlers: explanations inside training and evaluation loops.

:class:`AttributionHandler` computes and never draws; :mod:`monai_xai.tensorboard` draws and never computes. Between
them stand the events :class:`AttributionEvents` and ``engine.state.explained``.
"""

from __future__ import annotations

import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from ignite.engine import Engine, EventEnum, Events
from monai.data import MetaTensor
from monai.engines import Evaluator, SupervisedEvaluator, Trainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from torch import Tensor

from monai_xai.batches import Batch, row_of
from monai_xai.calls import RecordingInferer
from monai_xai.cases import Cases, as_cases
from monai_xai.cohorts import ModalityCohort
from monai_xai.errors import AttributionError, InputError, OutOfStepError, XaiError
from monai_xai.explainer import CompletenessWarning, Explainer
from monai_xai.explanation import Explanation
from monai_xai.modalities import ModalityExplanation, ModalityShapley
from monai_xai.targets import Target, pick_head

logger = logging.getLogger(__name__)

AnyExplainer = Explainer | ModalityShapley
AnyExplanation = Explanation | ModalityExplanation


class AttributionEvents(EventEnum):
    """Events that handlers fire on the engine they are attached to."""

    ATTRIBUTION_COMPLETED = "attribution_completed"
    """A case is explained: ``engine.state.explained`` holds an :class:`ExplainedCase`."""
    ATTRIBUTION_RESTORED = "attribution_restored"
    """A case was explained in an earlier run that goes on: ``engine.state.explained`` holds its numbers, no images."""
    EPOCH_EXPLAINED = "epoch_explained"
    """All cases of a run that an :class:`~monai_xai.AttributionSaver` keeps are explained, and told of."""
    COHORT_COMPLETED = "cohort_completed"
    """An epoch of explained cases is over: ``engine.state.cohorts`` holds cohorts by explainer."""
    GROUNDING_COMPLETED = "grounding_completed"
    """Explanations are judged: ``engine.state.grounding`` holds a :class:`~monai_xai.Grounding`."""
    COMPARISON_COMPLETED = "comparison_completed"
    """Methods are compared: ``engine.state.comparison`` holds a :class:`~monai_xai.comparison.Comparison`."""


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
        prediction: the network's output as it is: one tensor (1, C, ...), or several of them in a list or dict.
        label: ground truth, if there is one; a tensor, or tensors by head.
        epoch: epoch of the engine; for a MONAI evaluator inside training, the epoch of the training.
        heads: the head that each explanation speaks about, where the network has several.
        place: index of the case in the data set.
    """

    name: str
    explanations: Mapping[str, AnyExplanation]
    inputs: Mapping[str, Tensor]
    prediction: Any
    label: Any
    epoch: int
    heads: Mapping[str, str | int | None] = field(default_factory=dict)
    place: int = 0

    def prediction_of(self, explanation: str) -> Tensor | None:
        """Return the part of the prediction that an explanation speaks about; None if it is no single tensor."""
        try:
            return pick_head(self.prediction, self.heads.get(explanation))
        except InputError:
            return None

    def label_of(self, explanation: str) -> Tensor | None:
        """Return the part of the label that belongs to the head of an explanation; None if there is none."""
        label = self.label
        if isinstance(label, Mapping):
            label = label.get(str(self.heads.get(explanation)))
        return label if isinstance(label, Tensor) else None


class CaseKeeper(ABC):
    """Takes each case from an :class:`AttributionHandler` before those who listen are told of it."""

    hides_names: bool
    """Whether no message may hold anything that could be the name of a case."""

    @property
    @abstractmethod
    def places(self) -> tuple[int, ...]:
        """Index in the data set of each row of the batch that is being explained."""

    @abstractmethod
    def name_of(self, case: str) -> str:
        """Return the name under which a case is to be seen."""

    @abstractmethod
    def is_finished(self, place: int) -> bool:
        """Return whether a case was explained in an earlier run."""

    @abstractmethod
    def keep(self, engine: Engine, explained: ExplainedCase) -> bool:
        """Take a case, and tell whether those who listen are to be told of it now."""

    @abstractmethod
    def fail(self, places: Sequence[int], cause: str) -> None:
        """Take note that the cases at some places are not explained in full."""


class AttributionHandler:
    """Compute explanations inside an engine's loop, and change nothing else in it.

    In evaluators it explains at ``IterationEvents.FORWARD_COMPLETED``, so that the maps are in
    ``engine.state.output[key]`` before decollation, and the bundle's own ``Invertd`` and ``SaveImaged`` carry them on;
    in trainers at ``BACKWARD_COMPLETED``; in plain ignite engines at ``ITERATION_COMPLETED``. Maps go by the name of
    their input where there is one explainer with one target; else by ``<explainer>_<input>``, or
    ``<explainer>_<target>_<input>`` where it has several targets (every lesion, say).

    Cases are explained one by one and their maps are put where they belong at once, so that one that cannot be
    explained, or an interruption, takes nothing from the others. In a batch that is explained in part, the maps of the
    other cases are NaN; :class:`~monai_xai.transforms.FlattenAttributionsd` leaves those out.

    Args:
        explainer: an :class:`~monai_xai.Explainer` or :class:`~monai_xai.ModalityShapley`, or several by name. One
            without inferer takes the engine's.
        cases: which cases of an epoch: a number for the first ones, a list of indices or case names, or
            :class:`~monai_xai.cases.WorstCases`; None for all.
        interval: explain in every ``interval``-th epoch, or in the epochs of a list.
        network: the network, if the engine has none of its own or another is meant.
        key: where maps go in ``engine.state.output``.
        case_key: where the batch holds case names; else file names are taken.
        on_error: "log" keeps the loop alive and counts what failed in ``failures``; "raise" ends it.
    """

    def __init__(
        self,
        explainer: AnyExplainer | Mapping[str, AnyExplainer],
        cases: Cases | int | Sequence[int | str] | None = 1,
        *,
        interval: int | Sequence[int] = 1,
        network: torch.nn.Module | None = None,
        key: str = "attribution",
        case_key: str = "case_id",
        on_error: Literal["log", "raise"] = "log",
    ) -> None:
        if on_error not in ("log", "raise"):
            raise InputError(f"AttributionHandler(on_error={on_error!r}): choose 'log' or 'raise'.")
        if not _is_interval(interval):
            raise InputError(
                f"AttributionHandler(interval={interval!r}) must be a number from 1 or a list of epochs."
            )
        if not all(isinstance(name, str) and name for name in (key, case_key)):
            raise InputError(f"AttributionHandler(key={key!r}, case_key={case_key!r}) must both be names.")
        self.explainers = _named(explainer)
        self.has_one_map = not isinstance(explainer, Mapping) and _has_one_target(explainer)
        self.cases = as_cases(cases)
        self.interval = interval
        self.network = network
        self.key = key
        self.case_key = case_key
        self.on_error = on_error
        self.failures = 0
        self.keeper: CaseKeeper | None = None
        self._seen = 0
        self._own_maps: set[str] = set()

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, an evaluator or a plain ignite engine; a second time does nothing."""
        if engine.has_event_handler(self):
            return
        register_events(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(_event(engine), self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def _start_epoch(self, engine: Engine) -> None:
        self._seen = 0
        self.cases.start_epoch()
        _record_calls(engine)

    def _end_epoch(self, engine: Engine) -> None:
        if self.keeper is None and self._is_due_in(engine.state.epoch) and (missing := self.cases.missing()):
            logger.warning("AttributionHandler: %s", missing)

    def __call__(self, engine: Engine) -> None:
        """Explain the engine's batch if one of its cases is due."""
        if not self._is_due_in(engine.state.epoch):
            return
        places = None if self.keeper is None else self.keeper.places
        batch = Batch(engine, self._seen, self.case_key, places)
        self._own_maps.clear()
        for row in self._rows_due(engine, batch):
            self._explain_row(engine, batch, row)

    def _rows_due(self, engine: Engine, batch: Batch) -> tuple[int, ...]:
        """Return the rows of a batch to be explained; what they need can be read if there are any."""
        try:
            self._seen += batch.size
            rows = self.cases.due(batch)
            if self.keeper is not None:
                rows = tuple(row for row in rows if not self.keeper.is_finished(batch.place(row)))
            return rows if rows and batch.names and batch.inputs else ()
        except Exception as error:
            where = f"epoch {engine.state.epoch}, iteration {engine.state.iteration}"
            self._fail(error, where, places=batch.places or ())
            return ()

    def _is_due_in(self, epoch: int) -> bool:
        return epoch in self.interval if isinstance(self.interval, Sequence) else epoch % self.interval == 0

    def _explain_row(self, engine: Engine, batch: Batch, row: int) -> None:
        """Explain one row of the batch, put its maps where they belong, and tell those who listen."""
        name, place = batch.names[row], batch.place(row)
        name = name if self.keeper is None else self.keeper.name_of(name)
        inputs, label, prediction = (row_of(x, row) for x in (batch.inputs, batch.label, batch.prediction))
        explanations: dict[str, AnyExplanation] = {}
        heads: dict[str, str | int | None] = {}
        for explainer_name, explainer in self.explainers.items():
            where = f"case {name}, {_described(explainer_name, explainer)}"
            try:
                with _placing_gaps(where):
                    found = self._run(engine, _called(explainer, batch), inputs, label, prediction)
                own = {_joined(explainer_name, part): explanation for part, explanation in found.items()}
                self._put(engine, batch, row, own)
            except Exception as error:
                self._fail(error, where, places=[place])
                continue
            explanations |= own
            heads |= {_joined(explainer_name, part): _head(explainer, part) for part in found}
        if explanations:
            epoch = engine.state.epoch
            explained = ExplainedCase(name, explanations, inputs, prediction, label, epoch, heads, place)
            if self._is_to_be_told(engine, explained):
                self._tell(engine, explained)

    def _is_to_be_told(self, engine: Engine, explained: ExplainedCase) -> bool:
        try:
            return self.keeper is None or self.keeper.keep(engine, explained)
        except Exception as error:
            self._fail(error, f"case {explained.name}", "Explained, but not saved", [explained.place])
            return False

    def _tell(self, engine: Engine, explained: ExplainedCase) -> None:
        """Tell those who listen that a case is explained; what fails there takes nothing from it."""
        engine.state.explained = explained
        try:
            engine.fire_event(AttributionEvents.ATTRIBUTION_COMPLETED)
        except Exception as error:
            self._fail(error, f"case {explained.name}, a listener", "Explained, but not handed on")

    def _run(
        self,
        engine: Engine,
        explainer: AnyExplainer,
        inputs: Mapping[str, Tensor],
        label: Any,
        prediction: Any,
    ) -> Mapping[str, AnyExplanation]:
        network, own = self._network(engine), getattr(engine, "inferer", None)
        own = own.replay if isinstance(own, RecordingInferer) else own
        is_what_ran = (
            isinstance(engine, Evaluator)
            and (explainer.inferer is None or explainer.inferer is own)
            and network is getattr(engine, "network", None)
        )
        if explainer.inferer is None and isinstance(own, Inferer):
            explainer = replace(explainer, inferer=own)
        inputs, label = _beside(network, inputs), _beside(network, label)
        return explainer.explain(network, inputs, label=label, prediction=prediction if is_what_ran else None)

    def _put(
        self, engine: Engine, batch: Batch, row: int, explanations: Mapping[str, AnyExplanation]
    ) -> None:
        """Put maps where post-processing, metrics and later handlers find them; NaN in rows without any.

        Raises:
            InputError: if another handler has put maps of that name there.
        """
        if not isinstance(engine.state.output, dict):
            return
        for explained, explanation in explanations.items():
            for name, values in explanation.attributions.items():
                maps = engine.state.output.setdefault(
                    self.key, {}
                )  # an empty dict does not survive decollation
                key = name if self.has_one_map else f"{explained}_{name}"
                if key not in self._own_maps:
                    if key in maps:
                        raise InputError(
                            f"Another handler has put maps {self.key!r}, {key!r} there already: give two handlers on "
                            "one engine different keys, AttributionHandler(key=...), or names to their explainers."
                        )
                    maps[key] = _empty(values, batch.size, batch.inputs[name])
                    self._own_maps.add(key)
                maps[key][row] = values.as_tensor()[0] if isinstance(values, MetaTensor) else values[0]

    def _network(self, engine: Engine) -> torch.nn.Module:
        network = self.network if self.network is not None else getattr(engine, "network", None)
        if not isinstance(network, torch.nn.Module):
            raise InputError(
                f"{type(engine).__name__} has no single network: give it, AttributionHandler(..., network=network)."
            )
        return network

    def _fail(
        self, error: Exception, where: str, what: str = "Not explained", places: Sequence[int] = ()
    ) -> None:
        if isinstance(error, OutOfStepError):
            raise error
        if self.on_error == "raise":
            raise _placed(error, where) from error
        self.failures += 1
        is_hidden = self.keeper is not None and self.keeper.hides_names
        trace = None if isinstance(error, XaiError) or is_hidden else error
        words = hidden_words(error) if is_hidden else str(error) or type(error).__name__
        if self.keeper is not None:
            self.keeper.fail(places, f"{what}: {where}: {words}")
        logger.warning("%s: %s (failure %d): %s", what, where, self.failures, words, exc_info=trace)


class ModalityCohortHandler:
    """Gather the modality explanations of an epoch, save every number, and warn of modalities that collapse.

    Attached to the engine of an :class:`AttributionHandler` with a :class:`~monai_xai.ModalityShapley`. At the end of
    each epoch the cohorts are in ``engine.state.cohorts`` by explainer, for
    :class:`~monai_xai.TensorBoardAttributionHandler` to draw, and ``modalities.csv`` and ``modalities.json`` of the
    epoch are in ``output_dir`` (one folder per explainer if there are several).

    Args:
        output_dir: where files go; None saves none.
        collapse_below: a modality has collapsed if the upper end of the 95 % interval of its share over the cohort is
            below this.
        seed: seed of the bootstrap.
    """

    def __init__(
        self, output_dir: str | Path | None = None, *, collapse_below: float = 0.01, seed: int = 0
    ) -> None:
        self.output_dir = output_dir
        self.collapse_below = collapse_below
        self.seed = seed
        self._cohorts: dict[str, ModalityCohort] = {}
        self._places: dict[str, int] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to the engine that is explained; a second time does nothing."""
        register_events(engine)
        if engine.has_event_handler(self._add, AttributionEvents.ATTRIBUTION_COMPLETED):
            return
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self._cohorts.clear())
        engine.add_event_handler(AttributionEvents.ATTRIBUTION_COMPLETED, self._add)
        engine.add_event_handler(AttributionEvents.ATTRIBUTION_RESTORED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._complete_unless_kept)
        engine.add_event_handler(AttributionEvents.EPOCH_EXPLAINED, self._complete)

    def _add(self, engine: Engine) -> None:
        explained: ExplainedCase = engine.state.explained
        self._places[explained.name] = explained.place
        for name, explanation in explained.explanations.items():
            if isinstance(explanation, ModalityExplanation):
                cohort = self._cohorts.setdefault(name, ModalityCohort(self.collapse_below, self.seed))
                cohort.add(explained.name, explanation)

    def _complete_unless_kept(self, engine: Engine) -> None:
        """Complete the epoch, unless an ``AttributionSaver`` is still to tell of cases."""
        if not getattr(engine.state, "is_kept", False):
            self._complete(engine)

    def _complete(self, engine: Engine) -> None:
        if not self._cohorts:
            return
        for cohort in self._cohorts.values():  # in the order of the data, in whatever order they came
            in_order = sorted(cohort.cases.items(), key=lambda item: self._places[item[0]])
            cohort.cases = dict(in_order)
        for name, cohort in self._cohorts.items():
            for row in (row for row in cohort.rows() if row.collapsed):
                logger.warning(
                    "%s, epoch %d: the modality %s has collapsed under the baseline %s: its share over %d cases is "
                    "%.2g, at most %.2g. The network hardly uses it.",
                    name, engine.state.epoch, row.modality, row.baseline, row.n, row.share, row.share_high,
                )  # fmt: skip
            self._save(name, cohort)
        engine.state.cohorts = dict(self._cohorts)
        engine.fire_event(AttributionEvents.COHORT_COMPLETED)

    def _save(self, name: str, cohort: ModalityCohort) -> None:
        """Save a cohort; what cannot be written is logged and does not end the loop."""
        if self.output_dir is None:
            return
        folder = Path(self.output_dir, name) if len(self._cohorts) > 1 else Path(self.output_dir)
        try:
            cohort.save(folder)
        except OSError as error:
            logger.warning(
                "The modalities of %s are not written to %s (%s): free disk space or check rights.",
                name, folder, error.strerror or error,
            )  # fmt: skip


def hidden_words(error: Exception) -> str:
    """Return what may be said of an error where names are not to be seen: of our own all, of others the type alone."""
    if isinstance(error, XaiError):
        return str(error)
    return f"{type(error).__name__} (its words are withheld: they may name the patient)"


def _placed(error: Exception, where: str) -> Exception:
    """Return an error of the same type with its place in front."""
    try:
        return type(error)(f"{where}: {error}")
    except TypeError:  # a type that is not made from a message alone
        return AttributionError(f"{where}: {type(error).__name__}: {error}")


@contextmanager
def _placing_gaps(where: str) -> Iterator[None]:
    """Put a place in front of every :class:`CompletenessWarning`; other warnings come through as they are."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CompletenessWarning)
            yield
    finally:
        for given in caught:
            if issubclass(given.category, CompletenessWarning):
                message = f"{where}: {given.message}"
                warnings.warn_explicit(message, given.category, given.filename, given.lineno)
            else:
                warnings.showwarning(given.message, given.category, given.filename, given.lineno)


def _is_interval(value: object) -> bool:
    if isinstance(value, int):
        return value >= 1
    return isinstance(value, Sequence) and all(isinstance(epoch, int) for epoch in value)


def _record_calls(engine: Engine) -> None:
    """Let an evaluator with an iteration of its own keep how it calls its inferer, to be called so again."""
    own = getattr(engine, "inferer", None)
    if not isinstance(engine, SupervisedEvaluator) or isinstance(own, RecordingInferer):
        return
    if type(engine)._iteration is not SupervisedEvaluator._iteration and isinstance(own, Inferer):
        engine.inferer = RecordingInferer(own)


def _event(engine: Engine) -> Any:
    if isinstance(engine, Trainer):
        return IterationEvents.BACKWARD_COMPLETED
    return IterationEvents.FORWARD_COMPLETED if isinstance(engine, Evaluator) else Events.ITERATION_COMPLETED


def _named(explainer: AnyExplainer | Mapping[str, AnyExplainer]) -> dict[str, AnyExplainer]:
    named = dict(explainer) if isinstance(explainer, Mapping) else {"": explainer}
    for value in named.values():
        if not isinstance(value, AnyExplainer):
            raise InputError(f"AttributionHandler needs an Explainer or several by name, got {value!r}.")
    return {name or _method(value): value for name, value in named.items()}


def _method(explainer: AnyExplainer) -> str:
    return explainer.attributor.name if isinstance(explainer, Explainer) else "modalities"


def _joined(explainer: str, target: str) -> str:
    return f"{explainer}_{target}" if target else explainer


def _described(name: str, explainer: AnyExplainer) -> str:
    method = _method(explainer)
    return name if name == method else f"{name} ({method})"


def _has_one_target(explainer: AnyExplainer) -> bool:
    return isinstance(explainer.target, Target) and not explainer.target.is_several


def _called(explainer: AnyExplainer, batch: Batch) -> AnyExplainer:
    """Return an explainer that calls the network as the engine does, unless it has a way of its own."""
    return replace(explainer, call=batch.call) if explainer.call == "arguments" else explainer


def _head(explainer: AnyExplainer, part: str) -> str | int | None:
    """Return the head of the target that an explanation is of; ``part`` is its name, or begins with it."""
    target = explainer.target
    if isinstance(target, Mapping):
        names = [name for name in target if part == name or part.startswith(f"{name}_")]
        target = target[max(names, key=len)]
    return target.head if isinstance(target, Target) else None


def _beside(network: torch.nn.Module, value: Any) -> Any:
    """Return a tensor, or the tensors in a mapping, on the device of the network.

    A plain ignite engine moves its batch within its own function, so that it is seen here where it was loaded.
    """
    if isinstance(value, Mapping):
        return {key: _beside(network, part) for key, part in value.items()}
    parameter = next(network.parameters(), None)
    return value.to(parameter.device) if isinstance(value, Tensor) and parameter is not None else value


def _empty(values: Tensor, size: int, source: Tensor) -> Tensor:
    """Return a batch of maps that are NaN, in the space of their input."""
    plain = values.as_tensor() if isinstance(values, MetaTensor) else values
    batch = plain.new_full((size, *values.shape[1:]), math.nan)
    return (
        MetaTensor(batch).copy_meta_from(source, copy_attr=True) if isinstance(source, MetaTensor) else batch
    )
