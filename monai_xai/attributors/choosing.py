"""Chooses a baseline from which a method adds up, and spends most steps on the most promising one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from monai_xai.attributors.base import Attribution, Attributor
from monai_xai.baselines import Auto
from monai_xai.clock import Clock


def attribute_from_first(
    attributor: Attributor, wanted: float, clock: Clock, run: Callable[[Attributor], Attribution]
) -> Attribution:
    """Return what a method gives from the first of its candidate baselines from which it adds up.

    A method that may take very many steps (:meth:`~monai_xai.attributors.base.Attributor.briefly`) takes few of them
    from every candidate first. If that is not enough from any, it takes all, from the candidate with the smallest gap
    first. If none adds up, what comes is that with the smallest gap of all.

    Args:
        attributor: a complete method whose baseline is :class:`~monai_xai.Auto`.
        wanted: the relative gap that is small enough.
        clock: ends the search with what there is.
        run: attributes by the method that it is given.

    Returns:
        Its ``facts["baseline"]`` names the candidate.
    """
    found: list[Attribution] = []

    def ends_with(method: Attributor) -> bool:
        attribution = run(method)
        facts = {**attribution.facts, "baseline": str(method.baseline)}  # type: ignore[attr-defined]
        found.append(replace(attribution, facts=facts))
        return found[-1].largest_gap <= wanted or clock.is_cut

    auto = attributor.baseline  # type: ignore[attr-defined]
    assert isinstance(auto, Auto)
    methods: list[Attributor] = [replace(attributor, baseline=candidate) for candidate in auto.candidates]  # type: ignore[call-arg]
    for method in methods:
        if ends_with(method.briefly()):
            break
    else:
        for method, _ in sorted(zip(methods, found, strict=True), key=lambda pair: _size(pair[1])):
            if method.briefly() is not method and ends_with(method):
                break
    return min(found, key=_size)


def _size(attribution: Attribution) -> float:
    """Return the gap by which attributions are compared: one that is not finite is the worst."""
    gap = attribution.largest_gap
    return gap if math.isfinite(gap) else math.inf
