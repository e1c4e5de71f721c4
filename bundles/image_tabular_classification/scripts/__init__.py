"""What the configs of this bundle call by name."""

from __future__ import annotations

from .cases import CLASSES, held_out_cases, is_phantom, training_cases
from .network import ImageTableNet
from .phantom import PLANTS, Phantom, make_films, write_phantom
from .report import PredictionSaver, log_scores, require_checkpoint, scores_and_labels
from .schema import ClinicalSchema, TableLayout, Variable, read_schema
from .transforms import LoadRadiographd, RandDropInputsd

__all__ = [
    "CLASSES",
    "PLANTS",
    "ClinicalSchema",
    "ImageTableNet",
    "LoadRadiographd",
    "Phantom",
    "PredictionSaver",
    "RandDropInputsd",
    "TableLayout",
    "Variable",
    "held_out_cases",
    "is_phantom",
    "log_scores",
    "make_films",
    "read_schema",
    "require_checkpoint",
    "scores_and_labels",
    "training_cases",
    "write_phantom",
]
