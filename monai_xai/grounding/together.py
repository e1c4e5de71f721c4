"""Processes that judge the same cases of the same networks, and share the work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from monai_xai.grounding.words import GroundingCase
from monai_xai.ranks import Crew, in_step, numbers_of, world_size


@contextmanager
def together(
    what: str,
    cases: Sequence[GroundingCase],
    networks: Sequence[nn.Module | None],
    pieces: int,
    *,
    spread: bool,
) -> Iterator[Crew]:
    """Judge cases in step with the other processes, and yield those that share the work: this one alone, if none do.

    Args:
        what: is done.
        cases: that are judged.
        networks: that are asked.
        pieces: of work there are.
        spread: whether the work is shared.

    Raises:
        OtherProcessError: if another process failed.
        OutOfStepError: if another process has other cases, data or weights.
    """
    if not spread or world_size() == 1:
        yield Crew()
        return
    ids = hashlib.sha256("\n".join(case.id for case in cases).encode()).hexdigest()[:12]
    numbers = [n for case in cases for x in tensors_in(case.inputs) for n in numbers_of(x)]
    for network in filter(None, networks):
        parts = [numbers_of(x) for x in network.state_dict().values() if isinstance(x, Tensor)]
        numbers += map(sum, zip(*parts, strict=True))
    with in_step(f"the {what} of {len(cases)} cases ({ids})", numbers):
        yield Crew.among(pieces)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)
