"""What the configs of this bundle call by name."""

from __future__ import annotations

from .cases import held_out_cases, is_phantom, training_cases
from .phantom import Phantom, make_case, write_phantom
from .report import log_dice, require_checkpoint
from .transforms import LoadCased, NormalizeForegroundd
from .writer import AtomicWriter

__all__ = [
    "AtomicWriter",
    "LoadCased",
    "NormalizeForegroundd",
    "Phantom",
    "held_out_cases",
    "is_phantom",
    "log_dice",
    "make_case",
    "require_checkpoint",
    "training_cases",
    "write_phantom",
]
