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
        ends: in seconds of ``time.monotonic``.
        notes: kept together with the parts of this stretch.

    Example:
        >>> Clock().is_over, Clock.of(0.0).is_over
        (False, True)
    """

    ends: float = math.inf
    notes: ClockNotes = field(default_factory=ClockNotes)

    @classmethod
    def of(cls, seconds: float | None) -> Clock:
        """Return a clock that runs from now; None for ever."""
        return cls(math.inf if seconds is None else time.monotonic() + seconds)

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

    def split(self, total: int) -> list[Clock]:
        """Return equal parts of what is left from now on, one after another.

        What an earlier one leaves of its time, those after it have besides.
        """
        now = time.monotonic()
        left = self.ends - now
        return [Clock(now + left * number / total, self.notes) for number in range(1, total + 1)]

    def anew(self) -> Clock:
        """Return the same stretch with notes of its own."""
        return Clock(self.ends)

    def limit(self, work: Iterable[Item], least: int) -> Iterator[Item]:
        """Iterate until the time is over, but over no fewer items than ``least``."""
        for number, item in enumerate(work):
            if number >= least and self.is_over:
                return
            yield item
