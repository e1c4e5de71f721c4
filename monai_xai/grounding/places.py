"""Where evidence lies, by name: in the finding, in known structures, elsewhere in the body, outside of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.grounding.evidence import Evidence
from monai_xai.metrics.base import real
from monai_xai.metrics.localization import structure_table

FINDING, BODY, OUTSIDE = "the marked finding", "the body elsewhere", "the outside of the body"
_WORTH_NAMING = 0.05  # of the evidence


def shares_of_places(
    cases: Sequence[Evidence],
    structures: Mapping[str, Tensor] | None = None,
    names: Mapping[int, str] | None = None,
) -> dict[str, float]:
    """Return which share of the evidence lies where, the mean over cases; shares add up to 1.

    A voxel counts once: for the finding, else for its structure, else for the body or its outside.

    Args:
        cases: with maps.
        structures: label maps by case id, integers from 0, shape (1, 1, *spatial) or less; 0 is no structure.
        names: of their labels; None takes numbers.

    Raises:
        InputError: if a label map does not fit, naming the case.
    """
    given = structures or {}
    atlases = {e.id: _atlas(e, given[e.id]) for e in cases if e.id in given}
    labels = sorted({int(label) for atlas in atlases.values() for label in atlas.unique() if label > 0})
    titles = {label: (names or {}).get(label, f"structure {label}") for label in labels}
    first = max(labels, default=0) + 1  # labels of our own begin here
    titles |= dict(zip(range(first, first + 3), (FINDING, BODY, OUTSIDE), strict=True))
    rows = []
    for e in cases:
        atlas = atlases.get(e.id, torch.zeros_like(e.body, dtype=torch.long)).clone()
        atlas[(atlas == 0) & e.body] = first + 1
        atlas[(atlas == 0) & ~e.body] = first + 2
        if e.region is not None:
            atlas[e.region] = first
        table = structure_table(e.located(), atlas, titles)
        if any(row.share == row.share for row in table):
            rows.append([0.0 if row.share != row.share else row.share for row in table])
    if not rows:
        return {}
    means = np.mean(rows, axis=0)
    return {name: float(share) for name, share in zip(titles.values(), means, strict=True) if share > 0}


def name_places(cases: Sequence[Evidence], shares: Mapping[str, float]) -> str:
    """Say where evidence beyond the finding lies, most first, and around which voxel; nothing without shares."""
    beyond = sorted((share, name) for name, share in shares.items() if name != FINDING)[::-1]
    if not beyond:
        return ""
    (share, most), *rest = beyond
    further = "".join(f", then {name}: {part:.0%}" for part, name in rest if part >= _WORTH_NAMING)
    marked = any(e.region is not None for e in cases)
    head = (
        f" {shares.get(FINDING, 0.0):.0%} of the evidence lies in the finding; of the rest"
        if marked
        else " Of it"
    )
    return f"{head}, most is in {most}: {share:.0%} of all{further}{_peak(cases)}."


def _peak(cases: Sequence[Evidence]) -> str:
    """Say around which voxel the evidence beyond the findings is highest, on average; nothing for mixed shapes."""
    parts = [(e.located().clamp(min=0) * (1 if e.region is None else ~e.region))[0, 0] for e in cases]
    if len({part.shape for part in parts}) != 1:
        return ""
    total = torch.stack([part / part.sum().clamp(min=1e-300) for part in parts]).mean(0)
    return (
        f", highest around voxel {tuple(int(i) for i in np.unravel_index(int(total.argmax()), total.shape))}"
    )


def _atlas(e: Evidence, given: Tensor) -> Tensor:
    """Return a label map on the grid of the body, integers."""
    plain = real(torch.as_tensor(given)).cpu()
    while plain.ndim < e.body.ndim:
        plain = plain[None]
    if plain.shape != e.body.shape or (plain < 0).any() or (plain != plain.round()).any():
        raise InputError(
            f"Case {e.id}: structures need a label map of integers from 0 and of shape {tuple(e.body.shape)}, got "
            f"{tuple(plain.shape)}."
        )
    return plain.long()
