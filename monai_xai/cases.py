"""Which cases of an epoch are explained."""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from monai.metrics import DiceHelper, compute_dice
from torch import Tensor

from monai_xai.batches import Batch
from monai_xai.errors import InputError
from monai_xai.targets import pick_head


class Cases(ABC):
    """Which cases of an epoch are explained."""

    def start_epoch(self) -> None:  # noqa: B027 - most choices keep nothing between batches
        """Forget what was seen in the epoch before."""

    def missing(self) -> str:
        """Return, at the end of an epoch, what was asked for and did not come; empty if all came."""
        return ""

    @abstractmethod
    def due(self, batch: Batch) -> tuple[int, ...]:
        """Return the rows of a batch that are to be explained."""


class AllCases(Cases):
    """Every case."""

    def due(self, batch: Batch) -> tuple[int, ...]:
        return tuple(range(batch.size))


class FirstCases(Cases):
    """The first ``n`` cases of an epoch."""

    def __init__(self, n: int) -> None:
        self.n = n

    def due(self, batch: Batch) -> tuple[int, ...]:
        return tuple(row for row in range(batch.size) if batch.place(row) < self.n)


class ChosenCases(Cases):
    """Cases by index in the epoch (numbers) or by name (strings)."""

    def __init__(self, chosen: Iterable[int | str]) -> None:
        self.chosen = frozenset(chosen)
        self._by_name = any(isinstance(choice, str) for choice in self.chosen)
        self._came: set[int | str] = set()
        self._names: list[str] = []

    def start_epoch(self) -> None:
        self._came.clear()
        self._names.clear()

    def due(self, batch: Batch) -> tuple[int, ...]:
        names = batch.names if self._by_name else ("",) * batch.size
        self._names += names
        rows = []
        for row, name in enumerate(names):
            found = self.chosen & {batch.place(row), name}
            self._came |= found
            rows += [row] if found else []
        return tuple(rows)

    def missing(self) -> str:
        absent = sorted(map(str, self.chosen - self._came))
        if not absent:
            return ""
        there = f" The epoch had {', '.join(self._names[:5])}, …" if self._by_name and self._names else ""
        return f"The cases {', '.join(absent)} did not come.{there}"


class WorstCases(Cases):
    """The ``n`` cases of an epoch with the lowest metric.

    Whether a case is among the worst is decided when it comes, against those before it: the ``n`` worst are always
    explained, and early in an epoch some that turn out better. Cases whose metric is NaN (no lesion) are left out.

    Args:
        n: how many.
        metric: ``metric(prediction, label)`` returns one number per sample, shape (N,), higher is better. Default:
            mean Dice of the foreground classes.
        multilabel: for the default metric, whether classes may overlap, as in BraTS: each channel is then a class of
            its own, predicted where it is above 0, and the label has as many channels.
        head: which part of a list or dict output (and label) the metric is of.
    """

    def __init__(
        self,
        n: int,
        metric: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        multilabel: bool = False,
        head: str | int | None = None,
    ) -> None:
        self.n = n
        self.metric = metric or (multilabel_dice if multilabel else foreground_dice)
        self.head = head
        self._worst: list[float] = []

    def start_epoch(self) -> None:
        self._worst.clear()

    def due(self, batch: Batch) -> tuple[int, ...]:
        prediction, label = pick_head(batch.prediction, self.head), _of_head(batch.label, self.head)
        if not isinstance(label, Tensor):
            raise InputError("WorstCases needs a label in the batch; choose a number of cases or name them.")
        try:
            with torch.no_grad():
                values = torch.as_tensor(self.metric(prediction, label)).reshape(batch.size).tolist()
        except Exception as error:
            raise InputError(
                f"WorstCases: the metric failed on a prediction of shape {tuple(prediction.shape)} and a label of "
                f"shape {tuple(label.shape)} ({type(error).__name__}: {error}). Give one that fits, metric=..., or "
                "multilabel=True where classes overlap."
            ) from error
        return tuple(i for i, value in enumerate(values) if self._is_among_worst(value))

    def _is_among_worst(self, value: float) -> bool:
        if math.isnan(value):
            return False
        key = -value
        if len(self._worst) < self.n:
            heapq.heappush(self._worst, key)
            return True
        return heapq.heappushpop(self._worst, key) != key


def _of_head(label: Any, head: str | int | None) -> Any:
    return label.get(str(head)) if isinstance(label, dict) else label


def foreground_dice(prediction: Tensor, label: Tensor) -> Tensor:
    """Return the mean Dice of the foreground classes, shape (N,); an output of one channel is cut at 0.

    Raises:
        InputError: if the classes of the label overlap, so that no arg-max can predict them.
    """
    if label.shape[1] > 1 and ((label > 0.5).sum(1) > 1).any():
        raise InputError(f"the classes of the label {tuple(label.shape)} overlap")
    classes = (prediction > 0).long() if prediction.shape[1] == 1 else prediction.argmax(1, keepdim=True)
    truth = label if label.shape[1] == 1 else label.argmax(1, keepdim=True)
    helper = DiceHelper(
        include_background=False,
        reduction="none",
        num_classes=max(prediction.shape[1], 2),
        get_not_nans=False,
    )
    return torch.as_tensor(helper(classes, truth)).nanmean(1)


def multilabel_dice(prediction: Tensor, label: Tensor) -> Tensor:
    """Return the mean Dice of classes that may overlap, shape (N,): each channel of the logits is cut at 0."""
    dice = compute_dice((prediction > 0).float(), (label > 0.5).float(), include_background=True)
    return torch.as_tensor(dice).nanmean(1)


def as_cases(value: Cases | int | str | Sequence[int | str] | None) -> Cases:
    """Coerce a number into :class:`FirstCases`, a list of indices or names into :class:`ChosenCases`, None into all."""
    if isinstance(value, Cases):
        return value
    if value is None:
        return AllCases()
    if isinstance(value, int):
        return FirstCases(value)
    if not isinstance(value, str | Iterable):
        raise InputError(
            f"AttributionHandler(cases={value!r}) needs a number, indices or case names, or WorstCases(n)."
        )
    return ChosenCases([value] if isinstance(value, str) else value)
