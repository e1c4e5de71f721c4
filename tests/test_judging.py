"""Handlers that judge an epoch in several processes say what they say in one."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
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
from monai_xai.comparison import Criterion, _pairs, default_criteria
from monai_xai.errors import InputError, OtherProcessError, OutOfStepError
from monai_xai.gathering import Gathered, unite
from monai_xai.grounding import Grounding, GroundingCase, GroundingSettings, ground
from monai_xai.metrics import Scores
from monai_xai.ranks import Crew, in_step, rank, world_size

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


def scans(n: int = 5, name: str = "patient{}", factor: float = 1.0) -> Dataset:
    """Return two modalities of patients with a lesion each, and its mask; without a name, they have no files."""
    items = []
    for i in range(n):
        image = 0.1 * torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) + 0.5
        lesion = torch.zeros(1, SIZE, SIZE)
        lesion[:, 3 + i : 6 + i, 4:8] = 1
        image[:1] += lesion
        scan = MetaTensor(
            factor * image, meta={"filename_or_obj": f"{name.format(i)}.nii.gz"} if name else {}
        )
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


def _told(folder: Path, *, sampled: bool, name: str, factor: float = 1.0) -> tuple[Any, Any]:
    """Return what both handlers find in this process, where others round differently."""
    options = {"region": "lesion", "on_error": "raise", "salt": "", "cases": 4, "spread": True}
    judge = GroundingHandler(
        EXPLAINER, second_network=network(1), settings=SETTINGS, output_dir=folder, log_dir=folder / "grounding",
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    judge_methods = ComparisonHandler(
        METHODS, target=ClassScore(1), criteria=CRITERIA, output_dir=folder, log_dir=folder / "comparison",
        progress=False, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    engine = run([judge, judge_methods], scans(name=name, factor=factor ** rank()), sampled=sampled)
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
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=where)
    else:
        assert found == expected, where


WAYS = {
    "each sees all": {"sampled": False, "name": "patient{}", "factor": 1 + 1e-7},
    "each sees its part": {"sampled": True, "name": "patient{}"},
    "each sees its part of what has no name": {"sampled": True, "name": ""},
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_judge_as_one_does(tmp_path: Path, way: str) -> None:
    name = str(WAYS[way]["name"])
    alone, compared = _told(tmp_path / "one", sampled=False, name=name)
    for grounding, comparison in in_processes(2, partial(_told, tmp_path / "two", **WAYS[way])):
        _alike(grounding, alone)
        assert comparison["cases"] == tuple(f"{'patient' if name else 'case'}{i}" for i in range(4))
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
        own.unnamed |= {name} if name.startswith("#") else set()
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
    "one name, other data": ({0: [("a", 1)], 1: [("a", 2)]}, 9, ["a"]),
    "counted": ({0: [("#0", 1), ("#1", 3)], 1: [("#0", 2), ("#1", 1)]}, 9, ["case0", "case1", "case2"]),
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


class FailsOnce(GroundingHandler):
    """Fails in the second process, once the cases are there, the first time."""

    def _judge(self, engine: Engine, gathered: Gathered) -> Grounding:
        if rank() == 1 and engine.state.epoch == 1:
            raise torch.OutOfMemoryError("no room for the cases")
        return super()._judge(engine, gathered)


def _fail_on_the_way() -> tuple[int, int]:
    handler = FailsOnce(EXPLAINER, settings=SETTINGS, cases=2, spread=True)
    engine = run([handler], scans(), epochs=2)
    return handler.failures, len(engine.state.grounding.cases)


class Chokes(nn.Module):
    """Has no memory for one patient in the second process."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.patient = scans()[1]["image"].as_tensor().double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if rank() == 1 and any(torch.equal(one, self.patient) for one in x):
            raise torch.OutOfMemoryError("out of memory")
        out: torch.Tensor = self.body(x)
        return out


def _cases(n: int = 3) -> list[GroundingCase]:
    return [
        GroundingCase(f"patient{i}", scan["image"].as_tensor().double()[None], torch.tensor([1]))
        for i, scan in enumerate(scans(n))
    ]


def _judge(net: nn.Module, cases: list[GroundingCase], **options: Any) -> Any:
    try:
        found = ground(EXPLAINER, net, cases, settings=SETTINGS, **options)
    except (InputError, OutOfStepError, OtherProcessError) as error:
        return type(error).__name__
    return found.as_dict()


def _judge_in_step() -> dict[str, Any]:
    """Judge what goes well, or cannot go together, in a row: processes stay in step after every failure."""
    shifted = [replace(case, inputs=case.inputs + rank()) for case in _cases()]
    twice = [_cases()[0]] * (1 + rank())
    return {
        "left out": _judge(Chokes(), _cases(), spread=True),
        "few": _judge(network(), _cases(1), spread=True),
        "other data": _judge(network(), shifted, spread=True),
        "other weights": _judge(network(rank()), _cases(), spread=True),
        "other names": _judge(network(), _cases()[rank() :], spread=True),
        "a name twice": _judge(network(), twice, spread=True),
        "nothing": _judge(network(), [] if rank() else _cases(), spread=True),
    }


def test_processes_leave_out_the_same_cases_and_refuse_to_judge_others_together() -> None:
    cases = _cases()
    for found in in_processes(2, _judge_in_step):
        told, expected = found["left out"], _judge(Chokes(), [cases[0], cases[2]])
        assert list(told["configuration"]["left_out"]) == ["patient1"]
        for own, other in zip(told["tests"], expected["tests"], strict=True):
            _alike(own["per_case"], other["per_case"], own["id"])
        _alike(found["few"], _judge(network(), cases[:1]))
        for what in ("other data", "other weights", "other names", "a name twice", "nothing"):
            assert found[what] == "OutOfStepError", what


def test_a_failure_beside_the_judging_costs_one_epoch_in_all() -> None:
    assert in_processes(2, _fail_on_the_way) == [(1, 2), (1, 2)]


@pytest.mark.parametrize(("methods", "processes"), [(2, 2), (9, 3), (9, 2), (3, 2)])
def test_no_process_has_a_method_of_its_own(methods: int, processes: int) -> None:
    pairs = _pairs(methods, 2 * processes, processes)
    assert sorted(pairs) == [(m, c) for m in range(methods) for c in range(2 * processes)]
    for number in range(processes):
        assert {method for method, _ in pairs[number::processes]} == set(range(methods))


def _hand_over() -> str:
    try:
        with in_step("handing over"):
            Crew.among(2).each([0, 1], lambda item: (lambda: item) if rank() == 1 else item, "functions")
    except (InputError, OtherProcessError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_cannot_be_handed_over_is_named() -> None:
    first, second = in_processes(2, _hand_over)
    assert first.startswith("OtherProcessError: in process 1: InputError: What this process found")
    assert second.startswith("InputError: What this process found cannot be handed to the others (functions)")


def _by_itself() -> tuple[int, int]:
    handler = GroundingHandler(EXPLAINER, settings=SETTINGS, cases=2)
    engine = run([handler] if rank() == 0 else [], scans())
    found = getattr(engine.state, "grounding", None)
    return handler.failures, 0 if found is None else len(found.cases)


def test_a_handler_of_one_process_waits_for_no_other() -> None:
    assert in_processes(2, _by_itself) == [(0, 2), (0, 0)]
