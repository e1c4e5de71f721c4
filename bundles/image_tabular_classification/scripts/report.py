"""What a run needs before it starts, keeps while it runs, and says when it ends."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from .cases import CLASSES

logger = logging.getLogger(__name__)


def require_checkpoint(path: str | os.PathLike[str]) -> None:
    """Refuse to start without a trained network.

    Args:
        path: where training saves it.

    Raises:
        FileNotFoundError: if it is not there.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no trained network in {path}. Train one first, in the folder of this bundle: "
            "python -m monai.bundle run --config_file configs/train.yaml"
        )


def scores_and_labels(output: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """What :class:`ignite.metrics.Accuracy` takes, from the output of an evaluator.

    Args:
        output: one dictionary per case: `pred` of shape (2,), `label` one-hot of shape (2,).

    Returns:
        Scores, (N, 2), and class numbers, (N,).
    """
    scores = torch.stack([torch.as_tensor(case["pred"]) for case in output])
    labels = torch.stack([torch.as_tensor(case["label"]) for case in output])
    return scores, labels.argmax(1)


class PredictionSaver:
    """Write the probabilities of every case to a CSV file with a header, at the end of every epoch of an evaluator.

    Args:
        output_dir: folder of the file.
        filename: its name.
    """

    def __init__(self, output_dir: str | os.PathLike[str], filename: str = "predictions.csv") -> None:
        self.path = Path(output_dir) / filename
        self.rows: list[list[Any]] = []

    def attach(self, engine: Engine) -> None:
        """Write what this evaluator predicts."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _keep(self, engine: Engine) -> None:
        for case, output in zip(engine.state.batch, engine.state.output, strict=True):
            probabilities = [float(value) for value in output["pred"]]
            predicted = CLASSES[max(range(len(CLASSES)), key=probabilities.__getitem__)]
            label = case.get("label")
            known = "" if label is None else CLASSES[int(label)]
            self.rows.append(
                [case["case_id"], *(f"{value:.4f}" for value in probabilities), predicted, known]
            )

    def _write(self, _: Engine) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            header = ["case_id", *(f"probability of {name}" for name in CLASSES), "predicted", "label"]
            csv.writer(file).writerows([header, *self.rows])
        logger.info("wrote the predictions of %d cases to %s", len(self.rows), self.path)


def log_scores(evaluator: Engine) -> None:
    """Log accuracy and area under the ROC curve.

    Args:
        evaluator: has just run over the held-out cases.
    """
    metrics = evaluator.state.metrics
    logger.info("Accuracy: %.3f, AUC: %.3f", metrics["val_accuracy"], metrics["val_auc"])
