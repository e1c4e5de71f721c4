"""What a run needs before it starts, and what it says at its end."""

from __future__ import annotations

import csv
import logging
import math
import os
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.metrics.regression import R2Score

from .network import BiomarkerNet

SCALE = ("center", "spread")
logger = logging.getLogger(__name__)


def require_checkpoint(path: str | os.PathLike[str], network: BiomarkerNet) -> None:
    """Refuse to start without a network that was trained for this biomarker.

    Args:
        path: where training saves its weights.
        network: which is to be given them.

    Raises:
        FileNotFoundError: if they are not there.
        ValueError: if they were trained for a biomarker of another center and spread.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no trained network in {path}. Train one first, in the folder of this bundle: "
            "python -m monai.bundle run --config_file configs/train.yaml"
        )
    saved = torch.load(path, map_location="cpu", weights_only=True)
    saved = saved.get("model", saved)
    trained, wanted = (tuple(float(of[name]) for name in SCALE) for of in (saved, network.state_dict()))
    if trained != wanted:
        raise ValueError(
            f"The network in {path} was trained for a biomarker of {trained[0]:g} ± {trained[1]:g}, not of "
            f"{wanted[0]:g} ± {wanted[1]:g}. Give --biomarker (and --center, --spread) as in the training, or train "
            "again with another --ckpt_dir."
        )


class PredictionTable:
    """Write what was predicted for every case to a CSV file: case, biomarker, predicted, true (if known), unit.

    Args:
        file: where to.
        biomarker: its name.
        unit: of the predictions.
    """

    def __init__(self, file: str | os.PathLike[str], biomarker: str, unit: str) -> None:
        self.file = Path(file)
        self.biomarker = biomarker
        self.unit = unit
        self._rows: list[tuple[str, str, str, str, str]] = []

    def attach(self, engine: Engine) -> None:
        """Write at the end of every run of an evaluator, whose batches hold `case_id` and perhaps `label`."""
        engine.add_event_handler(Events.STARTED, self._clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _clear(self, engine: Engine) -> None:
        self._rows = []

    def _collect(self, engine: Engine) -> None:
        for sample, output in zip(engine.state.batch, engine.state.output, strict=True):
            label = sample.get("label")
            true = "" if label is None else f"{float(label):.2f}"
            predicted = f"{float(output['pred']):.2f}"
            self._rows.append((sample["case_id"], self.biomarker, predicted, true, self.unit))
            known = f" (true: {true})" if true else ""
            logger.info("%s of %s: %s %s%s", self.biomarker, sample["case_id"], predicted, self.unit, known)

    def _write(self, engine: Engine) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w", newline="") as file:
            csv.writer(file).writerows([("case", "biomarker", "predicted", "true", "unit"), *self._rows])
        logger.info("wrote %d predictions to %s", len(self._rows), self.file)


class R2(R2Score):
    """Share of the variance between cases that is predicted; NaN where there is none, as with a single case."""

    def compute(self) -> float:
        try:
            return math.nan if self._num_examples < 2 else super().compute()
        except ZeroDivisionError:
            return math.nan
