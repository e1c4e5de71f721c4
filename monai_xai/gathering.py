"""The first cases of an epoch, kept with their masks for handlers that judge them all when it is over."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.utils.enums import CommonKeys
from torch import Tensor, nn

from monai_xai.batches import Batch, row_of
from monai_xai.calls import CallForm
from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.grounding import GroundingCase
from monai_xai.grounding.together import tensors_in
from monai_xai.networks import unwrap
from monai_xai.ranks import exchange, meet, numbers_of, same_numbers, world_size

logger = logging.getLogger(__name__)

Masks = str | Callable[[Mapping[str, Any]], Tensor]
"""A key of the batch, or a function of the batch, that gives masks (N, C, *spatial)."""


@dataclass
class Gathered:
    """The cases of an epoch, on the CPU.

    Args:
        cases: batches of one.
        masks: by what they mark and case id, shape (1, 1, *spatial), bool; empty ones are left out.
        labels: label maps likewise, integers.
        call: how the network takes its inputs.
        unnamed: cases that are only counted.
    """

    cases: list[GroundingCase] = field(default_factory=list)
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    labels: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    call: CallForm = "arguments"
    unnamed: set[str] = field(default_factory=set)

    def add(self, other: Gathered, index: int, name: str) -> None:
        """Add a case that was gathered elsewhere, with its masks, under a name."""
        case = other.cases[index]
        self.cases.append(replace(case, id=name))
        for own, theirs in ((self.masks, other.masks), (self.labels, other.labels)):
            for what, by_case in theirs.items():
                if case.id in by_case:
                    own.setdefault(what, {})[name] = by_case[case.id]

    def marks(self) -> list[_Mark]:
        """Return what the cases are known by in other processes."""
        return [
            _Mark(
                None if case.id in self.unnamed else case.id,
                [tuple(x.shape) for x in tensors_in(case.inputs)],
                [number for x in tensors_in(case.inputs) for number in numbers_of(x)],
            )
            for case in self.cases
        ]


class _Mark(NamedTuple):
    """Name of a case, if it has one of its own, and what its inputs are known by."""

    name: str | None
    shapes: list[tuple[int, ...]]
    numbers: list[float]

    def has_data_of(self, other: _Mark) -> bool:
        return self.shapes == other.shapes and same_numbers(self.numbers, other.numbers)

    def is_of(self, other: _Mark) -> bool:
        """Tell whether two marks are of the same case: of one name, or, without names, of the same data."""
        if self.name is None and other.name is None:
            return self.has_data_of(other)
        return self.name == other.name


def unite(gathered: Gathered, most: int) -> Gathered:
    """Return the cases that the processes have gathered: the first of each, then the second of each, and so on.

    A case that several have, as samplers give them that even processes out, comes once. Cases without names of their
    own are counted anew. All processes must call it, and all get the same.

    Args:
        gathered: the cases of this process.
        most: how many cases at most.

    Raises:
        OtherProcessError: if another process failed on its way here.
        OutOfStepError: if another process is elsewhere.
    """
    if world_size() == 1:
        return gathered
    marks = meet("the gathering of cases", gathered.marks())
    if all(_are_of(own, marks[0]) for own in marks):
        return gathered
    parts = exchange("the gathering of cases", gathered)
    united = Gathered(call=next((part.call for part in parts if part.cases), gathered.call))
    known: list[tuple[int, _Mark]] = []
    for index in range(max(map(len, marks))):
        for number, own in enumerate(marks):
            if index >= len(own) or len(united.cases) == most:
                continue
            mark = own[index]
            twin = next((other for first, other in known if first != number and mark.is_of(other)), None)
            if twin is None:
                known.append((number, mark))
                name = f"case{len(united.cases)}" if mark.name is None else mark.name
                united.add(parts[number], index, name)
            elif not mark.has_data_of(twin):
                logger.warning(
                    "Case %s has other data in process %d: taken for the same. If it is another, give it a name of its "
                    "own in the data list.", mark.name, number,
                )  # fmt: skip
    return united


def _are_of(some: Sequence[_Mark], others: Sequence[_Mark]) -> bool:
    return len(some) == len(others) and all(
        one.is_of(other) and one.has_data_of(other) for one, other in zip(some, others, strict=True)
    )


class Gathering:
    """Keeps the first cases of every epoch that is due, and hands them over when it is over.

    Args:
        owner: name of the handler, for errors.
        n_cases: how many cases of an epoch at most; None: all.
        every_n_epochs: which epochs are due.
        case_key: where the batch holds case names; else file names are taken.
        masks: where masks come from, by what they mark; None: nowhere. A "label" that is absent or no mask counts as
            nowhere, too.
        labels: where label maps (N, 1, *spatial) come from, likewise.

    Raises:
        InputError: if a number is below 1.
    """

    def __init__(
        self,
        owner: str,
        n_cases: int | None,
        every_n_epochs: int,
        case_key: str,
        masks: Mapping[str, Masks | None],
        labels: Mapping[str, Masks | None] | None = None,
    ) -> None:
        if every_n_epochs < 1 or (n_cases is not None and n_cases < 1):
            raise InputError(
                f"{owner}(every_n_epochs={every_n_epochs}, cases={n_cases}): both are 1 or more."
            )
        self.owner = owner
        self.n_cases = sys.maxsize if n_cases is None else n_cases
        self.every_n_epochs = every_n_epochs
        self.case_key = case_key
        self.masks = {name: given for name, given in masks.items() if given is not None}
        self.labels = {name: given for name, given in (labels or {}).items() if given is not None}
        self._seen = 0
        self._gathered = Gathered()

    def attach(self, engine: Engine, judge: Callable[..., None], fail: Callable[..., None]) -> None:
        """Attach to an engine; a second time does nothing.

        Args:
            engine: an evaluator, or a plain ignite engine.
            judge: called with the engine when an epoch is over.
            fail: called with an exception and its place.
        """
        if engine.has_event_handler(judge):
            return
        is_evaluator = isinstance(engine, Evaluator)
        event = IterationEvents.FORWARD_COMPLETED if is_evaluator else Events.ITERATION_COMPLETED
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(event, self._gather, fail)
        engine.add_event_handler(Events.EPOCH_COMPLETED, judge)

    def is_due(self, engine: Engine) -> bool:
        """Tell whether the epoch of an engine is one whose cases are judged."""
        return engine.state.epoch % self.every_n_epochs == 0

    def take(self, *, spread: bool = False) -> Gathered:
        """Return what was gathered, and keep nothing of it.

        Args:
            spread: return what all processes have gathered, see :func:`unite`.
        """
        gathered, self._gathered = self._gathered, Gathered()
        return unite(gathered, self.n_cases) if spread else gathered

    def _start(self) -> None:
        self._seen = 0
        self._gathered = Gathered()

    def _gather(self, engine: Engine, fail: Callable[..., None]) -> None:
        """Keep the cases of the engine's batch that are still wanted."""
        wanted = self.n_cases - len(self._gathered.cases)
        if not self.is_due(engine) or wanted < 1:
            return
        batch = Batch(engine, self._seen, self.case_key)
        try:
            self._seen += batch.size
            masks = {name: self._read(engine, given, batch) for name, given in self.masks.items()}
            labels = {name: self._read(engine, given, batch) for name, given in self.labels.items()}
            for row in range(min(batch.size, wanted)):
                self._keep(batch, row, masks, labels)
        except Exception as error:
            fail(error, f"epoch {engine.state.epoch}, iteration {engine.state.iteration}")

    def _keep(
        self, batch: Batch, row: int, masks: Mapping[str, Tensor | None], labels: Mapping[str, Tensor | None]
    ) -> None:
        gathered = self._gathered
        name = batch.names[row]
        if name in {case.id for case in gathered.cases}:
            name = f"{name} ({batch.first + row})"
        if not batch.has_names:
            gathered.unnamed.add(name)
        gathered.call = batch.call
        inputs, label = (on_device(row_of(x, row), "cpu") for x in (batch.inputs, batch.label))
        correct = _is_correct(row_of(batch.prediction, row), label)
        gathered.cases.append(GroundingCase(name, inputs, label, correct=correct))
        for what, found in masks.items():
            mask = None if found is None else (found[row : row + 1] > 0.5).any(1, keepdim=True)
            if mask is not None and mask.any():
                gathered.masks.setdefault(what, {})[name] = mask
        for what, found in labels.items():
            if found is not None:
                gathered.labels.setdefault(what, {})[name] = found[row : row + 1].round().long()

    def _read(self, engine: Engine, chosen: Masks, batch: Batch) -> Tensor | None:
        """Return masks of a batch on the CPU, shape (N, C, *spatial); None for a label that is none.

        Raises:
            InputError: if what was named is not there, or not of every row.
        """
        given = engine.state.batch
        found: Any
        if callable(chosen):
            found = chosen(given)
        elif chosen == CommonKeys.LABEL:
            found = batch.label
            if not isinstance(found, Tensor) or found.ndim < 4:
                logger.info("%s: the label is no mask, so that nothing is marked.", self.owner)
                return None
        else:
            found = given.get(chosen) if isinstance(given, Mapping) else None
        if not isinstance(found, Tensor) or found.ndim < 4 or len(found) != batch.size:
            got = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            there = f"The batch has {sorted(map(str, given))}." if isinstance(given, Mapping) else ""
            raise InputError(
                f"{self.owner} needs masks of shape ({batch.size}, C, *spatial) in {chosen!r}, got {got}. {there}"
            )
        plain = found.as_tensor() if isinstance(found, MetaTensor) else found
        return plain.detach().cpu()


def asked_as_run(explainer: Explainer, engine: Engine, call: CallForm) -> Explainer:
    """Return an explainer with the engine's inferer and way of calling, unless it has its own."""
    own = getattr(engine, "inferer", None)
    if explainer.inferer is None and isinstance(own, Inferer):
        explainer = replace(explainer, inferer=own)
    return replace(explainer, call=call) if explainer.call == "arguments" else explainer


def network_of(engine: Engine, network: nn.Module | None, owner: str) -> nn.Module:
    """Return the network that is meant, else the engine's own, unwrapped.

    Raises:
        InputError: if the engine has no single one.
    """
    found = network if network is not None else getattr(engine, "network", None)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{type(engine).__name__} has no single network: give it, {owner}(..., network=network)."
        )
    return unwrap(found)


def on_device(value: Any, device: torch.device | str) -> Any:
    """Return a tensor, or the tensors in a mapping, list or case, on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, GroundingCase):
        return replace(value, inputs=on_device(value.inputs, device), label=on_device(value.label, device))
    if isinstance(value, Mapping):
        return {key: on_device(part, device) for key, part in value.items()}
    return [on_device(part, device) for part in value] if isinstance(value, list | tuple) else value


def _is_correct(prediction: Any, label: Any) -> bool | None:
    """Return whether the largest of several classes is the label's; None where nothing can be said."""
    if not (isinstance(prediction, Tensor) and isinstance(label, Tensor)):
        return None
    classes = prediction.shape[1] if prediction.ndim == 2 else 0
    if classes < 2 or label.numel() not in (1, classes):
        return None
    truth = label.flatten().argmax() if label.numel() == classes else label.flatten()[0]
    return int(prediction[0].argmax()) == int(truth)
