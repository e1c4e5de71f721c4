"""How long work may take, where it can end early with what it has."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


@dataclass
class ClockNotes:
    """What is noted of a clock and its parts.

    Args:
        is_cut: whether work was ended since its time was over.
    """

    is_cut: bool = False


@dataclass(frozen=True)
class Clock:
    """A stretch of time that work may take.

    Args:
        begins: in seconds of ``time.monotonic``.
        ends: likewise.
        notes: kept together with the parts of this stretch.

    Example:
        >>> Clock().is_over, Clock.of(0.0).is_over
        (False, True)
    """

    begins: float = 0.0
    ends: float = math.inf
    notes: ClockNotes = field(default_factory=ClockNotes)

    @classmethod
    def of(cls, seconds: float | None) -> Clock:
        """Return a clock that runs from now; None for ever."""
        now = time.monotonic()
        return cls(now, math.inf if seconds is None else now + seconds)

    @property
    def is_cut(self) -> bool:
        """Whether work was ended since its time was over."""
        return self.notes.is_cut

    @property
    def is_over(self) -> bool:
        """Whether work has to end. Asked only by work that would go on: if it is, that is noted."""
        is_over = time.monotonic() >= self.ends
        self.notes.is_cut |= is_over
        return is_over

    def part(self, number: int, total: int) -> Clock:
        """Return one of equal parts. What an earlier one leaves of its time, those after it have besides."""
        if math.isinf(self.ends):
            return self
        length = (self.ends - self.begins) / total
        return Clock(self.begins + number * length, self.begins + (number + 1) * length, self.notes)

    def anew(self) -> Clock:
        """Return the same stretch with notes of its own."""
        return Clock(self.begins, self.ends)

    def limit(self, work: Iterable[Item], least: int) -> Iterator[Item]:
        """Iterate until the time is over, but over no fewer items than ``least``."""
        for number, item in enumerate(work):
            if number >= least and self.is_over:
                return
            yield item
