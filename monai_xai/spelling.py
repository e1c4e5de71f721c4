"""How targets, regions, baselines and methods are written in titles, errors and files."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor


class Spelled:
    """A dataclass that ``str`` writes as it would be made, without what was left open.

    Example:
        >>> from monai_xai import RegionScore
        >>> str(RegionScore(1)), repr(RegionScore(1))  # doctest: +NORMALIZE_WHITESPACE
        ("RegionScore(channel=1, region=Predicted(), reduction='mean')",
         "RegionScore(head=None, channel=1, region=Predicted(threshold=None), reduction='mean')")
    """

    def __str__(self) -> str:
        shown = ((f.name, getattr(self, f.name)) for f in fields(self) if f.repr)  # type: ignore[arg-type]
        settings = (f"{name}={_spell(value)}" for name, value in shown if value is not None)
        return f"{type(self).__name__}({', '.join(settings)})"


def _spell(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_spell(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, Spelled):
        return str(value)
    return getattr(value, "__qualname__", repr(value))  # functions by name, not by address
