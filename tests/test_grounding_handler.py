"""Grounding inside real MONAI loops: what is judged when, what is written where, and that nothing else changes."""

from __future__ import annotations

import html
import json
import logging
import re
from pathlib import Path
from typing import Any

import markdown
import pytest
import torch
from grounded import a_case, a_test, grounding
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from benchmarks.phantoms import Classifier as PhantomClassifier
from benchmarks.phantoms import Phantoms, make_phantoms
from monai_xai import Blur, ClassScore, Explainer, InputError, InputXGradient, IntegratedGradients, Saliency
from monai_xai.grounding import Grounding, GroundingSettings
from monai_xai.grounding_handler import (
    GroundingHandler,
    TensorBoardGroundingHandler,
    text_of_grounding,
)
from monai_xai.handlers import AttributionEvents, register_events

SIZE = 16
LITTLE = GroundingSettings.quick(steps=3, n_disturbed=3, n_draws=99)
EXPLAINER = Explainer(ClassScore(1), InputXGradient())


def scans(n: int = 4) -> Dataset:
    """Return named scans, every second with a bright lesion, and its mask."""
    items = []
    for i in range(n):
        image = 0.1 * torch.randn(1, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) + 0.5
        lesion = torch.zeros(1, SIZE, SIZE)
        lesion[:, 3 + i : 6 + i, 4:8] = 1
        image = image + lesion * (i % 2)
        scan = MetaTensor(
            image,
            affine=torch.diag(torch.tensor([2.0, 2.0, 1.0])),
            meta={"filename_or_obj": f"scans/patient{i}.nii.gz"},
        )
        items.append({"image": scan, "label": torch.tensor(i % 2), "lesion": lesion * (i % 2)})
    return Dataset(items)  # fmt: skip


class Classifier(nn.Module):
    """Two convolutions and the mean of what they find."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))


def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier()


def evaluator(handlers: list[Any], network: nn.Module | None = None, **options: Any) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(scans(), batch_size=2),
        network=classifier() if network is None else network,
        val_handlers=handlers,
        **options,
    )


def train(handlers: list[Any], epochs: int = 3) -> dict[str, Any]:
    """Train with a validation in every epoch and return all state."""
    torch.manual_seed(3)
    network = classifier()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    validation = ValidationHandler(interval=1, validator=evaluator(handlers, network))
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(scans(), batch_size=2, shuffle=True),
        network=network,
        optimizer=optimizer,
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=[validation],
    ).run()
    states = optimizer.state_dict()["state"].items()
    return {
        **network.state_dict(),
        **{f"{i} {name}": value for i, state in states for name, value in state.items()},
        "generator": torch.get_rng_state(),
        "training": torch.tensor([module.training for module in network.modules()]),
    }


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A training judged in every second epoch, and the same training left alone."""
    folder = tmp_path_factory.mktemp("training")
    handler = GroundingHandler(
        EXPLAINER, every_n_epochs=2, region="lesion", settings=LITTLE, output_dir=folder / "reports",
        log_dir=folder / "events", on_error="raise",
    )  # fmt: skip
    return folder, train([handler]), train([])


def test_report_and_numbers_are_written_in_every_second_epoch(trained: Any) -> None:
    folder = trained[0] / "reports"
    assert sorted(file.name for file in folder.iterdir()) == ["grounding-2.html", "grounding-2.json"]
    told = json.loads((folder / "grounding-2.json").read_text())
    assert [case["id"] for case in told["cases"]] == ["patient0", "patient1", "patient2", "patient3"]
    assert told["verdict"] != "GROUNDED"  # four cases are no cohort
    page = html.unescape((folder / "grounding-2.html").read_text())
    for test in told["tests"]:
        assert f"{test['id']} {test['title']}" in page
    assert "Epoch 2" in page


def test_training_with_and_without_the_handler_is_bit_identical(trained: Any) -> None:
    _, judged, plain = trained
    assert judged.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(
            judged[name], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_tensorboard_shows_what_the_report_says(trained: Any) -> None:
    folder = trained[0]
    told = json.loads((folder / "reports" / "grounding-2.json").read_text())
    events = read(folder / "events")
    tags = events.Tags()
    for test in told["tests"]:
        if test["value"] is not None:
            (event,) = events.Scalars(f"grounding/{test['id']}/value")
            assert event.step == 2
            assert event.value == pytest.approx(test["value"], rel=1e-6)
    assert {f"grounding/case/patient{i}" for i in range(4)} <= set(tags["images"])
    (event,) = events.Tensors("grounding/text_summary")
    words = event.tensor_proto.string_val[0].decode()
    assert told["verdict"] in words


def learn(tag: str) -> dict[int, Grounding]:
    """Train where a tag tells the class and the lesion does not, or the other way round; return verdicts by epoch."""
    shape = (32, 32)
    options = {"tag": tag, "lesion_tells": tag != "class"}
    seen, held_out = (
        make_phantoms(768, shape, seed=1000, **options),
        make_phantoms(10, shape, seed=5, **options),
    )

    def dataset(phantoms: Phantoms) -> Dataset:
        return Dataset(
            [
                {
                    "image": image,
                    "label": label,
                    "lesion": lesion,
                    "tag": place.long(),
                    "body": phantoms.body[0],
                }
                for image, label, lesion, place in zip(
                    phantoms.images, phantoms.classes, phantoms.lesions, phantoms.tags, strict=True
                )
            ]
        )

    torch.manual_seed(0)
    network = PhantomClassifier(2)
    handler = GroundingHandler(
        Explainer(ClassScore(), IntegratedGradients(n_steps=16, baseline=Blur(4.0)), progress=False),
        every_n_epochs=3, region="lesion", within="body", structures="tag", structure_names={1: "the tag"},
        settings=GroundingSettings.quick(min_cases=10, steps=8, n_disturbed=8, n_cascade=0), on_error="raise",
    )  # fmt: skip
    engine = evaluator([handler], network)
    engine.data_loader = DataLoader(dataset(held_out), batch_size=5)
    register_events(engine)
    found: dict[int, Grounding] = {}
    engine.add_event_handler(
        AttributionEvents.GROUNDING_COMPLETED, lambda e: found.update({e.state.epoch: e.state.grounding})
    )
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=18,
        train_data_loader=DataLoader(dataset(seen), batch_size=48, shuffle=True),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 3e-3),
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=[ValidationHandler(interval=9, validator=engine)],
    ).run()
    return found


@pytest.mark.slow
def test_a_shortcut_that_is_learned_turns_the_verdict_and_is_named() -> None:
    found = learn("class")
    assert list(found) == [9, 18]
    last = found[18]
    assert last.verdict == "FAITHFUL BUT OFF TARGET"
    assert "possible shortcut" in last.sentence
    assert "of the rest, most is in the tag" in last.sentence
    assert max(last.places, key=lambda place: last.places[place]) == "the tag"


@pytest.mark.slow
def test_a_network_that_learns_the_lesion_is_not_accused_of_a_shortcut() -> None:
    last = learn("random")[18]
    assert last.verdict in ("GROUNDED", "INCONCLUSIVE")  # no second network: what it takes for more is listed
    assert last.test("T9").status == "PASS"
    assert last.test("T10").status == "PASS"
    assert max(last.places, key=lambda place: last.places[place]) == "the marked finding"


def judged(engine: Engine) -> Grounding:
    engine.run()
    return engine.state.grounding


def small(**options: Any) -> GroundingHandler:
    return GroundingHandler(EXPLAINER, settings=LITTLE, on_error="raise", **options)


def test_masks_and_correctness_reach_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def keep(explainer: Any, network: Any, cases: Any, **given: Any) -> Grounding:
        seen.update(given, cases=cases, explainer=explainer)
        return grounding(tests=(), cases=(), curves={})

    monkeypatch.setattr("monai_xai.grounding_handler.ground", keep)
    network = classifier()
    evaluator([small(region="lesion", within=lambda batch: batch["image"] > 0, cases=3)], network).run()
    assert [case.id for case in seen["cases"]] == ["patient0", "patient1", "patient2"]
    assert list(seen["regions"]) == ["patient1"]  # an empty mask is none
    assert torch.equal(seen["regions"]["patient1"][0], scans()[1]["lesion"] > 0)
    assert len(seen["within"]) == 3
    for case, item in zip(seen["cases"], scans(), strict=False):
        with torch.no_grad():
            largest = int(network.eval()(item["image"].as_tensor()[None]).argmax())
        assert case.correct == (largest == int(item["label"]))
        assert torch.equal(case.inputs["image"].as_tensor()[0], item["image"].as_tensor())


def test_names_are_hashed_everywhere_alike(tmp_path: Path) -> None:
    folders = {"output_dir": tmp_path / "reports", "log_dir": tmp_path / "events"}
    handler = small(anonymize=True, salt="secret", region="lesion", **folders)
    found = judged(evaluator([handler]))
    assert [case.id for case in found.cases] == ["patient0", "patient1", "patient2", "patient3"]
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert not re.search(rb"patient\d", everything)
    told = json.loads((tmp_path / "reports" / "grounding-1.json").read_text())
    names = [case["id"] for case in told["cases"]]
    assert len(set(names)) == 4
    assert {f"grounding/case/{name}" for name in names} <= set(read(tmp_path / "events").Tags()["images"])


def test_what_fails_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    handler = GroundingHandler(EXPLAINER, region="nothing", settings=LITTLE)
    with caplog.at_level(logging.WARNING):
        evaluator([handler]).run()
    assert handler.failures == 2
    assert "needs masks of shape (2, C, *spatial) in 'nothing', got NoneType. The batch has" in caplog.text
    with pytest.raises(InputError, match="needs masks"):
        evaluator([small(region="nothing")]).run()


def test_report_that_cannot_be_written_does_not_end_the_loop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "monai_xai.grounding_handler.ground", lambda *_, **__: grounding(tests=(), cases=(), curves={})
    )
    (tmp_path / "full").write_text("no folder")
    handler = GroundingHandler(EXPLAINER, settings=LITTLE, output_dir=tmp_path / "full")
    engine = evaluator([handler])
    register_events(engine)
    told: list[str] = []
    engine.add_event_handler(
        AttributionEvents.GROUNDING_COMPLETED, lambda e: told.append(e.state.grounding.verdict)
    )
    with caplog.at_level(logging.WARNING):
        engine.run()
    assert handler.failures == 1
    assert told == ["GROUNDED"]
    assert "Not saved: grounding, epoch 1" in caplog.text


def test_handler_attached_twice_judges_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def count(explainer: Any, network: Any, cases: Any, **_: Any) -> Grounding:
        calls.append(len(cases))
        return grounding(tests=(), cases=(), curves={})

    monkeypatch.setattr("monai_xai.grounding_handler.ground", count)
    handler = small()
    evaluator([handler, handler]).run()
    assert calls == [4]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"every_n_epochs": 0}, "1 or more"), ({"cases": 0}, "1 or more"), ({"on_error": "ignore"}, "choose 'log'")],
    ids=["epochs", "cases", "on_error"],
)  # fmt: skip
def test_settings_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        GroundingHandler(Explainer(ClassScore(1), Saliency()), **options)


def test_hostile_words_are_only_words_in_tensorboard(tmp_path: Path) -> None:
    hostile = (
        "<script>alert(1)</script> | [x](javascript:alert(1)) `a` **b** é \ud800\n# c <img src=x onerror=y>"
    )
    results = grounding(
        sentence=hostile,
        tests=(a_test("T2", ("a",), title=hostile, message=hostile),),
        cases=(a_case(hostile),),
        curves={f"deletion: {hostile}": {"x": (0.0, 1.0), "y": (0.0, -1.0)}},
        missing=(hostile,),
    )
    page = markdown.markdown(
        text_of_grounding(results), extensions=["markdown.extensions.tables"]
    )  # as TensorBoard does
    assert set(re.findall(r"<(\w+)", page)) == {
        "p",
        "strong",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "ul",
        "li",
    }
    shown = " ".join(hostile.replace("\ud800", "?").split())
    assert html.unescape(page).count(shown) == 4  # sentence, title, message, what to supply
    assert page.count("<td>") == 7
    handler = TensorBoardGroundingHandler(str(tmp_path))
    handler.write(results, 1)
    assert any(tag.startswith("grounding/case/") for tag in read(tmp_path).Tags()["images"])
