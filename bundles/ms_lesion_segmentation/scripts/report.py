"""What a run needs before it starts, and says when it ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine

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


def log_dice(evaluator: Engine, cases: Sequence[Mapping[str, Any]], metric: str = "val_mean_dice") -> None:
    """Log the Dice of every case and their mean.

    Args:
        evaluator: has just run over the cases, in their order.
        cases: as :func:`scripts.held_out_cases` describes them.
        metric: name of the metric.
    """
    values = evaluator.state.metric_details[metric].reshape(-1).tolist()
    for case, value in zip(cases, values, strict=True):
        logger.info("Dice of %s: %.3f", case["case_id"], value)
    logger.info("Mean Dice of %d cases: %.3f", len(values), evaluator.state.metrics[metric])
