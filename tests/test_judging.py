"""Handlers that judge an epoch in several processes say what they say in one."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from processes import in_processes
from torch import nn
from torch.utils.data import DistributedSampler

from monai_xai import (
    Blur,
    ClassScore,
    ComparisonHandler,
    Explainer,
    GroundingHandler,
    InputXGradient,
    IntegratedGradients,
    Saliency,
)
from monai_xai.comparison import Criterion, default_criteria
from monai_xai.errors import OtherProcessError, OutOfStepError
from monai_xai.gathering import Gathered, unite
from monai_xai.grounding import GroundingCase, GroundingSettings, ground
from monai_xai.metrics import Scores
from monai_xai.ranks import rank, world_size

SIZE = 16
SETTINGS = GroundingSettings(
    steps=4, n_shifts=1, n_orders=2, n_disturbed=4, n_draws=199, n_cascade=2, n_random=2, stop_early=False
)
EXPLAINER = Explainer(ClassScore(1), IntegratedGradients(8, Blur()), progress=False)
METHODS = {"IG": EXPLAINER, "gradient": Saliency(), "input": InputXGradient()}
CRITERIA = {
    name: criterion
    for name, criterion in default_criteria().items()
    if name in ("relevance mass", "deletion area", "likeness at random weights", "completeness gap")
}


def scans(n: int = 5, name: str = "patient{}") -> Dataset:
    """Return two modalities of patients with a lesion each, and its mask."""
    items = []
    for i in range(n):
        image = 0.1 * torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) + 0.5
        lesion = torch.zeros(1, SIZE, SIZE)
        lesion[:, 3 + i : 6 + i, 4:8] = 1
        image[:1] += lesion
        scan = MetaTensor(image, meta={"filename_or_obj": f"{name.format(i)}.nii.gz"})
        items.append({"image": scan, "label": torch.tensor(1), "lesion": lesion})
    return Dataset(items)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()


def run(handlers: list[Any], data: Dataset, *, sampled: bool = False, epochs: int = 1) -> SupervisedEvaluator:
    """Evaluate; where it is sampled, each process sees its part, filled up to equal numbers as MONAI's configs do."""
    wrapped = nn.parallel.DistributedDataParallel(network()) if world_size() > 1 else network()
    sampler = DistributedSampler(data, shuffle=False) if sampled and world_size() > 1 else None
    engine = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=DataLoader(data, batch_size=1, sampler=sampler),
        network=wrapped, val_handlers=handlers, prepare_batch=_double,
    )  # fmt: skip
    for epoch in range(1, epochs + 1):
        engine.run(epoch)
    return engine


def _double(batch: Any, device: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["image"].double(), batch["label"]


def _told(folder: Path, *, sampled: bool) -> tuple[Any, Any]:
    """Return what both handlers find in this process."""
    options = {"region": "lesion", "on_error": "raise", "salt": "", "cases": 4, "spread": True}
    judge = GroundingHandler(
        EXPLAINER, second_network=network(1), settings=SETTINGS, output_dir=folder, log_dir=folder / "grounding",
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    judge_methods = ComparisonHandler(
        METHODS, target=ClassScore(1), criteria=CRITERIA, output_dir=folder, log_dir=folder / "comparison",
        progress=False, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    engine = run([judge, judge_methods], scans(), sampled=sampled)
    found = engine.state.comparison
    measured = {name: values for name, values in found.values.items() if name in CRITERIA}
    return engine.state.grounding.as_dict(), {"cases": found.cases, "reasons": found.reasons, **measured}


def _alike(found: Any, expected: Any, where: str = "") -> None:
    """Require that two nested values are the same but for rounding and time."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            if key != "mean_seconds":
                _alike(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            _alike(found[i], value, f"{where}/{i}")
    elif isinstance(expected, float | np.ndarray):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=where)
    else:
        assert found == expected, where


@pytest.mark.parametrize("sampled", [False, True], ids=["each sees all", "each sees its part"])
def test_two_processes_judge_as_one_does(tmp_path: Path, sampled: bool) -> None:
    alone, compared = _told(tmp_path / "one", sampled=False)
    for grounding, comparison in in_processes(2, partial(_told, tmp_path / "two", sampled=sampled)):
        _alike(grounding, alone)
        assert comparison["cases"] == tuple(f"patient{i}" for i in range(4))
        _alike(comparison, compared)
    one, two = (
        sorted(str(f.relative_to(tmp_path / n)) for f in (tmp_path / n).glob("*.*")) for n in ("one", "two")
    )
    assert one == two
    for board in ("grounding", "comparison"):
        assert len(list((tmp_path / "two" / board).glob("events*"))) == 1  # of the first process
    told = json.loads((tmp_path / "two" / "grounding-1.json").read_text())
    assert told["verdict"] == alone["verdict"]


def _gather(cases: dict[int, list[tuple[str, float]]], most: int) -> tuple[list[str], list[float], list[str]]:
    """Unite cases that are given by process, as names and values."""
    own = Gathered()
    for name, value in cases[rank()]:
        own.cases.append(GroundingCase(name, torch.full((1, 1, 2, 2), value)))
        own.masks.setdefault("region", {})[name] = torch.full((1, 1, 2, 2), value)
    found = unite(own, most)
    assert all(
        float(found.masks["region"][case.id][0, 0, 0, 0]) == float(case.inputs.max()) for case in found.cases
    )
    return (
        [c.id for c in found.cases],
        [float(c.inputs.max()) for c in found.cases],
        list(found.masks["region"]),
    )


GATHERED: dict[str, tuple[dict[int, list[tuple[str, float]]], int, list[str]]] = {
    "filled up": ({0: [("a", 1), ("c", 3)], 1: [("b", 2), ("a", 1)]}, 9, ["a", "b", "c"]),
    "enough": ({0: [("a", 1), ("c", 3)], 1: [("b", 2), ("d", 4)]}, 3, ["a", "b", "c"]),
    "each has all": ({0: [("a", 1), ("b", 2)], 1: [("a", 1), ("b", 2)]}, 2, ["a", "b"]),
    "names by number": ({0: [("case 0", 1)], 1: [("case 0", 2)]}, 9, ["case 0", "case 0 (process 1)"]),
    "one has none": ({0: [], 1: [("a", 1)]}, 9, ["a"]),
}  # fmt: skip


def _gather_all() -> dict[str, Any]:
    return {name: _gather(cases, most) for name, (cases, most, _) in GATHERED.items()}


def test_cases_come_in_turn_and_once() -> None:
    first, second = in_processes(2, _gather_all)
    assert first == second
    for name, (_, _, expected) in GATHERED.items():
        assert first[name][0] == first[name][2] == expected, name


def _stumble(times: list[int], judged: Any) -> Scores:
    """Fail in the second process, the first time."""
    times.append(1)
    if rank() == 1 and len(times) == 1:
        raise ValueError("stumbled")
    return Scores(torch.ones(1, dtype=torch.float64))


def _loop_with_failure() -> tuple[int, list[str], list[str]]:
    logged: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    logger = logging.getLogger("monai_xai.judging")
    logger.addHandler(Keeper(logging.WARNING))
    handler = ComparisonHandler(
        METHODS,
        target=ClassScore(1),
        criteria={"one": Criterion(partial(_stumble, []))},
        progress=False,
        spread=True,
    )
    engine = run([handler], scans(), epochs=2)
    return handler.failures, logged, list(engine.state.comparison.cases)


def test_a_failure_in_one_process_costs_one_epoch_in_all() -> None:
    for number, (failures, logged, cases) in enumerate(in_processes(2, _loop_with_failure)):
        assert failures == 1
        assert len(cases) == 5  # of the second epoch
        assert "stumbled" in logged[0]
        assert ("in process 1" in logged[0]) == (number == 0)


def _others() -> str:
    case = GroundingCase(f"patient{rank()}", torch.rand(1, 2, SIZE, SIZE).double())
    try:
        ground(EXPLAINER, network(), [case], spread=True)
    except (OutOfStepError, OtherProcessError) as error:
        return type(error).__name__
    return "nothing"


def test_processes_with_other_cases_do_not_judge_together() -> None:
    assert in_processes(2, _others) == ["OutOfStepError", "OutOfStepError"]


def _by_itself() -> tuple[int, int]:
    handler = GroundingHandler(EXPLAINER, settings=SETTINGS, cases=2)
    engine = run([handler] if rank() == 0 else [], scans())
    found = getattr(engine.state, "grounding", None)
    return handler.failures, 0 if found is None else len(found.cases)


def test_a_handler_of_one_process_waits_for_no_other() -> None:
    assert in_processes(2, _by_itself) == [(0, 2), (0, 0)]
