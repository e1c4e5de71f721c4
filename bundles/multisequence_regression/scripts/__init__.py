"""What the configs of this bundle call by name."""

from __future__ import annotations

from .biomarkers import read_biomarker, typical
from .cases import Cases, is_phantom
from .network import BiomarkerNet
from .phantom import PLANTS, Phantom, make_case, write_phantom
from .report import R2, PredictionTable, require_checkpoint
from .transforms import LoadCased, NormalizeForegroundd, RandDropSequencesd

__all__ = [
    "PLANTS",
    "R2",
    "BiomarkerNet",
    "Cases",
    "LoadCased",
    "NormalizeForegroundd",
    "Phantom",
    "PredictionTable",
    "RandDropSequencesd",
    "is_phantom",
    "make_case",
    "read_biomarker",
    "require_checkpoint",
    "typical",
    "write_phantom",
]
