"""What the configs of this bundle call by name."""

from __future__ import annotations

from .cases import CLASSES, SCANS, held_out_cases, is_phantom, other_cases, training_cases
from .network import LateFusionNet
from .phantom import EVIDENCE, Phantom, make_case, write_phantom
from .report import PredictionSaver, log_scores, require_checkpoint, scores_and_labels
from .transforms import CropAroundd, LoadCased, RandDropScansd

__all__ = [
    "CLASSES",
    "EVIDENCE",
    "SCANS",
    "CropAroundd",
    "LateFusionNet",
    "LoadCased",
    "Phantom",
    "PredictionSaver",
    "RandDropScansd",
    "held_out_cases",
    "is_phantom",
    "log_scores",
    "make_case",
    "other_cases",
    "require_checkpoint",
    "scores_and_labels",
    "training_cases",
    "write_phantom",
]
