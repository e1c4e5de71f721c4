"""Parts of inputs that are to go through the network, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from monai_xai.terms import Tensors, Term

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class Patched(Sequence[Tensor]):
    """What a term sees of inputs that differ from others in one place: made only where it is wanted as a whole.

    Args:
        base: the others.
        source: which input differs.
        place: where, an index.
        patch: what is there.
    """

    base: Tensors
    source: int
    place: tuple[slice, ...]
    patch: Tensor

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, number: Any) -> Any:
        x = self.base[number]
        if number != self.source:
            return x
        x = x.clone()
        x[self.place] = self.patch
        return x


class Trial(NamedTuple, Generic[Key]):
    """A part of inputs that is to go through the network.

    Args:
        key: what it is to whoever asks.
        term: whose part it is.
        part: what the term sees.
    """

    key: Key
    term: Term
    part: Sequence[Tensor]

    @property
    def like(self) -> Sequence[Tensor]:
        """Tensors of the shapes of the part, which are there already."""
        return self.part.base if isinstance(self.part, Patched) else self.part

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return sum(x.nbytes for x in self.like)

    @property
    def varies(self) -> bool:
        """Whether some input of the part is not constant."""
        return any(bool(x.amin() != x.amax()) for x in self.part)

    def fits(self, other: Trial[Any]) -> bool:
        """Tell whether one call can take both."""
        shapes = ([(x.shape[1:], x.dtype, x.device) for x in trial.like] for trial in (self, other))
        return self.term.function is other.term.function and next(shapes) == next(shapes)

    def differs(self, other: Trial[Any]) -> bool:
        """Tell whether the parts of two trials differ."""
        return not all(map(torch.equal, self.part, other.part))


class _Rows:
    """One input of all trials of a batch, in memory that is kept: new memory costs more than to write it.

    A row that holds what a trial differs from in one place is written in that place alone.
    """

    def __init__(self, like: Tensor, count: int) -> None:
        self._rows = like.new_empty((count, *like.shape[1:]))
        # Whether a row is found again as it was written; None: not looked at yet.
        self._is_kept: bool | None = None
        self._held: dict[int, tuple[Tensor, tuple[slice, ...] | None]] = {}
        self._version = self._rows._version
        self._length = 0  # of the rows of one trial

    def holds(self, like: Tensor, count: int) -> bool:
        """Tell whether so many rows like this fit."""
        rows = self._rows
        alike = rows.shape[1:] == like.shape[1:] and (rows.dtype, rows.device) == (like.dtype, like.device)
        return alike and len(rows) >= count

    def of(self, number: int, trials: Sequence[Trial[Any]]) -> Tensor:
        """Return the input of that number of all trials."""
        lengths = {len(trial.like[number]) for trial in trials}
        if self._rows._version != self._version or lengths != {self._length}:
            self._held.clear()  # the network works in place, or rows lie elsewhere
        end = 0
        for trial in trials:
            begin, end = end, end + len(trial.like[number])
            held = self._write(self._rows[begin:end], number, trial, self._held.pop(begin, None))
            if isinstance(trial.part, Patched):  # nothing else comes again
                self._held[begin] = held
        self._version, self._length = self._rows._version, max(lengths)
        return self._rows[:end]

    def _write(
        self,
        rows: Tensor,
        number: int,
        trial: Trial[Any],
        held: tuple[Tensor, tuple[slice, ...] | None] | None,
    ) -> tuple[Tensor, tuple[slice, ...] | None]:
        base, part = trial.like[number], trial.part
        if held is not None and held[0] is base and self._is_kept is not False:
            if held[1] is not None:
                rows[held[1]] = base[held[1]]
            if self._is_kept is None:  # a network may work in its input behind PyTorch's back, in `.data`
                self._is_kept = torch.equal(rows, base)
                if not self._is_kept:
                    rows.copy_(base)
        else:
            rows.copy_(base)
        if not isinstance(part, Patched) or part.source != number:
            return base, None
        rows[part.place] = part.patch
        return base, part.place


class Batches:
    """Batches of trials, whose memory is used again."""

    def __init__(self) -> None:
        self._rows: dict[int, _Rows] = {}

    def of(self, trials: Sequence[Trial[Any]]) -> tuple[Tensors, Tensors]:
        """Return the inputs and the further arguments of all trials in one, until the next batch is made."""
        terms = {id(trial.term): trial.term for trial in trials}
        selections = {key: term.selection() for key, term in terms.items()}
        with torch.no_grad():
            inputs = tuple(self._join(number, trials) for number in range(len(trials[0].part)))
            columns = zip(*(selections[id(trial.term)] for trial in trials), strict=True)
            return inputs, tuple(_in_one(rows) for rows in columns)

    def _join(self, number: int, trials: Sequence[Trial[Any]]) -> Tensor:
        """Return one input of all trials."""
        like, count = trials[0].like[number], sum(len(trial.like[number]) for trial in trials)
        if number not in self._rows or not self._rows[number].holds(like, count):
            self._rows[number] = _Rows(like, count)
        return self._rows[number].of(number, trials)


def _in_one(rows: Sequence[Tensor]) -> Tensor:
    """Return an argument of all trials in one."""
    if len(rows[0]) == 1 and all(row is rows[0] for row in rows):
        return rows[0].expand(len(rows), *rows[0].shape[1:])
    return torch.cat(list(rows))
