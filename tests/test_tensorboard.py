"""What TensorBoard shows equals what was explained: event files are written and read back."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import textwrap
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from monai.transforms import SpatialCrop
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from monai_xai import (
    AttributionHandler,
    ClinicalVariables,
    Explainer,
    Labeled,
    ModalityCohort,
    ModalityShapley,
    OutputScore,
    ReferenceRecord,
    RegionScore,
    Saliency,
    TableSchema,
    Variable,
)
from monai_xai.errors import InputError
from monai_xai.explanation import Explanation
from monai_xai.figures import draw_bars
from monai_xai.handlers import AttributionEvents, ExplainedCase, register_events
from monai_xai.modalities import ModalityExplanation
from monai_xai.tensorboard import (
    TensorBoardAttributionHandler,
    affine_of,
    contributions_of,
    figures_of_cohort,
    figures_of_modalities,
    scene_of,
    waterfall_steps,
)

SHAPE = (12, 14, 10)
MODALITIES = ("FLAIR", "T1")
PLANES_ONLY: dict[str, Any] = {"montage_slices": 0, "animation_frames": 0}
AFFINE = torch.diag(torch.tensor([-1.0, 1.0, 2.0, 1.0], dtype=torch.float64))


def explanation(**changes: Any) -> Explanation:
    """Return the explanation of a case with a scan of two sequences and a vector."""
    maps = torch.zeros(1, 2, *SHAPE)
    maps[:, 0, 3:6, 4:7, 5:8] = 0.2
    maps[:, 1, 3:6, 4:7, 5:8] = -0.05
    values = {
        "attributions": {"image": maps, "clinical": torch.tensor([[1.0, 0.0, 1.0]])},
        "score": torch.tensor([4.0]),
        "baseline_score": torch.tensor([-2.0]),
        "delta": torch.tensor([0.02]),
        "seconds": 1.5,
        "method": "IntegratedGradients(n_steps=8)",
        "target": "RegionScore(channel=1)",
        "seed": 7,
        "summable": True,
        "channels": {"image": MODALITIES, "clinical": ("age", "sex", "stage")},
        "facts": {"windows": 27},
    }
    return Explanation(**(values | changes))


def explained(epoch: int = 3, **changes: Any) -> ExplainedCase:
    """Return what was found for one case."""
    label = torch.zeros(1, 1, *SHAPE)
    label[:, :, 3:6, 4:7, 5:8] = 1
    values = {
        "name": "patient26",
        "explanations": {"ig": explanation()},
        "inputs": {"image": torch.rand(1, 2, *SHAPE), "clinical": torch.rand(1, 3)},
        "prediction": torch.cat([1 - label, label], 1),
        "label": label,
        "epoch": epoch,
    }
    return ExplainedCase(**(values | changes))


def fire(handler: TensorBoardAttributionHandler, *cases: ExplainedCase) -> None:
    """Run a real engine that explains one case per iteration."""

    def explain(engine: Engine, case: ExplainedCase) -> None:
        engine.state.explained = case
        engine.fire_event(AttributionEvents.ATTRIBUTION_COMPLETED)

    engine = Engine(explain)
    register_events(engine)
    handler.attach(engine)
    handler.attach(engine)
    engine.run(list(cases))


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


def write(folder: Path, *cases: ExplainedCase, **options: Any) -> EventAccumulator:
    handler = TensorBoardAttributionHandler(str(folder), on_error="raise", **options)
    fire(handler, *cases)
    handler.close()
    return read(folder)


def test_one_case_has_its_pictures_together(tmp_path: Path) -> None:
    events = write(tmp_path, explained())
    assert sorted(events.Tags()["images"]) == [
        "ig/patient26/clinical/features",
        "ig/patient26/image/animation",
        "ig/patient26/image/montage",
        "ig/patient26/image/planes",
        "ig/patient26/modalities",
    ]


def test_declared_size_is_the_size_of_the_picture(tmp_path: Path) -> None:
    events = write(tmp_path, explained())
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        picture = Image.open(BytesIO(event.encoded_image_string))
        assert picture.size == (event.width, event.height)
        assert min(picture.size) > 100
        assert picture.format == ("GIF" if tag.endswith("animation") else "PNG")


def test_animation_has_frames_in_color(tmp_path: Path) -> None:
    (event,) = write(tmp_path, explained()).Images("ig/patient26/image/animation")
    gif = Image.open(BytesIO(event.encoded_image_string))
    assert gif.n_frames == SHAPE[2]
    colors = np.asarray(gif.convert("RGB")).astype(int)[40:-30, :-70]
    assert (colors[..., 0] - colors[..., 2] > 60).any()


def test_scalars_equal_the_numbers_over_epochs(tmp_path: Path) -> None:
    later = replace(explained(epoch=5), explanations={"ig": explanation(score=torch.tensor([9.0]))})
    events = write(tmp_path, explained(), later, **PLANES_ONLY)
    expected = {
        "score": [4.0, 9.0],
        "baseline_score": [-2.0] * 2,
        "delta": [0.02] * 2,
        "seconds": [1.5] * 2,
        "contribution/FLAIR": [27 * 0.2] * 2,
        "contribution/T1": [-27 * 0.05] * 2,
        "contribution/clinical": [2.0] * 2,
        "share/FLAIR": [5.4 / 8.75] * 2,
        "share/T1": [1.35 / 8.75] * 2,
        "share/clinical": [2.0 / 8.75] * 2,
    }
    assert set(events.Tags()["scalars"]) == {f"attribution/ig/patient26/{name}" for name in expected}
    for name, values in expected.items():
        points = events.Scalars(f"attribution/ig/patient26/{name}")
        assert [point.step for point in points] == [3, 5]
        assert [point.value for point in points] == pytest.approx(values, rel=1e-5)


def test_all_modalities_of_a_case_share_a_chart(tmp_path: Path) -> None:
    cases = ("patient19", "patient26")
    events = write(tmp_path, *(explained(name=case) for case in cases), **PLANES_ONLY)
    layout = Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert list(charts) == [f"{case}: {kind}" for case in cases for kind in ("contribution", "share")]
    assert charts["patient26: share"][0] == "^attribution/ig/patient26/share/FLAIR$"


def test_only_what_adds_up_is_added_up(tmp_path: Path) -> None:
    sums = explanation(summable=False, baseline_score=None, delta=None)
    events = write(tmp_path, explained(explanations={"saliency": sums}), **PLANES_ONLY)
    assert "saliency/patient26/modalities" not in events.Tags()["images"]
    names = {tag.rsplit("/", 1)[1] for tag in events.Tags()["scalars"]}
    assert names == {"score", "seconds"}
    assert contributions_of(sums) == {}


def test_pictures_can_be_left_out(tmp_path: Path) -> None:
    events = write(tmp_path, explained(), **PLANES_ONLY)
    assert {tag.rsplit("/", 1)[1] for tag in events.Tags()["images"]} == {"planes", "features", "modalities"}


def test_image_of_two_dimensions_has_no_slices(tmp_path: Path) -> None:
    flat = explanation(attributions={"image": torch.rand(1, 2, 20, 30)})
    case = explained(
        explanations={"ig": flat},
        inputs={"image": torch.rand(1, 2, 20, 30)},
        prediction=torch.rand(1, 5),
        label=None,
    )
    events = write(tmp_path, case)
    assert set(events.Tags()["images"]) == {"ig/patient26/image/planes", "ig/patient26/modalities"}


def modalities_of_a_patient() -> ExplainedCase:
    schema = TableSchema(
        (
            Variable("CRP", unit="mg/L", reference_range=(0, 5)),
            Variable("sex", "categorical", levels=("f", "m")),
        )
    )

    class Fusion(torch.nn.Module):
        def forward(self, image: torch.Tensor, clinical: torch.Tensor) -> torch.Tensor:
            return image.mean((1, 2, 3))[:, None] * clinical[:, :1] + clinical[:, 1:2]

    inputs = {"image": torch.ones(1, 1, 4, 4), "clinical": schema.encode({"CRP": 48, "sex": "f"})[None]}
    baselines = {
        name: {"image": value, "clinical": ReferenceRecord(schema, record={"sex": "m"})}
        for name, value in (("air", 0.0), ("half", 0.5))
    }
    target = OutputScore(unit="log-odds")
    found = ModalityShapley(target, baselines, parts=ClinicalVariables(schema))(Fusion(), inputs)
    return ExplainedCase("p1", {"modalities": found}, inputs, None, None, 3)


def test_modalities_have_a_waterfall_interactions_and_curves(tmp_path: Path) -> None:
    case = modalities_of_a_patient()
    events = write(tmp_path, case)
    assert sorted(events.Tags()["images"]) == [
        f"modalities/p1/{baseline}/{kind}"
        for baseline in ("air", "half")
        for kind in ("interactions", "waterfall")
    ]
    found = case.explanations["modalities"]
    curve = events.Scalars("attribution/modalities/p1/value/air/clinical")
    assert [(event.step, event.value) for event in curve] == [
        (3, pytest.approx(float(found.values["air"][0, 1])))
    ]


def test_modalities_that_add_up_have_no_interaction_to_name() -> None:
    found = modalities_of_a_patient().explanations["modalities"]
    alone = replace(found, interactions={name: pairs * 1e-8 for name, pairs in found.interactions.items()})
    for explanation, said in ((found, "largest interaction: "), (alone, "no interaction: ")):
        figure = dict(figures_of_modalities(explanation, "p1"))["air/waterfall"]
        assert [text.get_text() for text in figure.texts if said in text.get_text()]


def test_what_rounding_leaves_of_an_unused_input_is_not_drawn() -> None:
    found = explanation()
    unused = found.attributions | {"image": found.attributions["image"] * 1e-8}
    for given, is_drawn in ((found, True), (replace(found, attributions=unused), False)):
        scene = scene_of(explained(explanations={"ig": given}), "ig", "image", multilabel=False)
        assert bool(scene.attribution.any()) is is_drawn
    gradients = replace(found, attributions=unused, summable=False)  # in units that cannot be compared
    assert gradients.beyond_rounding()["image"].any()


def test_clinical_variables_stand_with_value_unit_and_range_and_lead_to_the_score() -> None:
    found = modalities_of_a_patient().explanations["modalities"]
    steps = waterfall_steps(found, "air")
    assert [step.label for step in steps] == ["image", "clinical", "CRP = 48 mg/L (0 to 5)", "sex = f"]
    reached = float(found.baseline_scores["air"]) + sum(step.value for step in steps if not step.is_part)
    assert reached == pytest.approx(float(found.score), abs=1e-5)
    assert steps[1].value == pytest.approx(steps[2].value + steps[3].value, abs=1e-5)


def test_a_cohort_has_its_spread_and_curves_over_epochs(tmp_path: Path) -> None:
    cohort, case = ModalityCohort(), modalities_of_a_patient()
    for i in range(6):
        cohort.add(f"p{i}", case.explanations["modalities"])
    engine = Engine(lambda engine, batch: None)
    register_events(engine)
    handler = TensorBoardAttributionHandler(str(tmp_path), on_error="raise")
    handler.attach(engine)
    engine.state.cohorts, engine.state.epoch = {"modalities": cohort}, 2
    engine.fire_event(AttributionEvents.COHORT_COMPLETED)
    handler.close()
    events = read(tmp_path)
    assert "modalities/cohort/air/values" in events.Tags()["images"]
    assert [event.step for event in events.Scalars("cohort/modalities/mean/air/image")] == [2]


def test_pictures_are_drawn_of_the_first_cases_and_numbers_written_of_all(tmp_path: Path) -> None:
    events = write(tmp_path, explained(), explained(name="patient27"), cases=1, **PLANES_ONLY)
    assert {tag.split("/")[1] for tag in events.Tags()["images"]} == {"patient26"}
    scores = [tag for tag in events.Tags()["scalars"] if tag.endswith("/score")]
    assert {tag.split("/")[2] for tag in scores} == {"patient26", "patient27"}


def test_bars_of_modalities_say_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units: list[str] = []

    def draw(*args: Any, **options: Any) -> Any:
        units.append(options["unit"])
        return draw_bars(*args, **options)

    monkeypatch.setattr("monai_xai.tensorboard.draw_bars", draw)
    write(tmp_path, explained(explanations={"ig": explanation(unit="years")}), **PLANES_ONLY)
    assert set(units) == {"contribution in years"}


class Alarm(torch.nn.Module):
    """Two inputs, one of which is enough to raise or lower the score; both together do no more."""

    def forward(self, ct: torch.Tensor, pet: torch.Tensor) -> torch.Tensor:
        return (ct + pet).clamp(-1, 1)


class Agreement(torch.nn.Module):
    """Two inputs that tell something together only."""

    def forward(self, ct: torch.Tensor, pet: torch.Tensor) -> torch.Tensor:
        return ct * pet.abs()


def of_both_directions(network: torch.nn.Module) -> list[ModalityExplanation]:
    """Explain a case whose score rises by 1 and one whose score falls by 1."""
    ask = ModalityShapley(OutputScore(unit="log-odds"), {"absent": 0.0, "again": 0.0})
    inputs = [{"ct": torch.full((1, 1), value), "pet": torch.full((1, 1), value)} for value in (1.0, -1.0)]
    return [ask(network, given) for given in inputs]


@pytest.mark.parametrize(
    ("network", "interaction", "word"),
    [(Alarm(), -1.0, "redundancy"), (Agreement(), 1.0, "synergy")],
    ids=["redundant", "together"],
)
def test_redundancy_is_called_so_whether_the_score_rises_or_falls(
    network: torch.nn.Module, interaction: float, word: str
) -> None:
    rising, falling = of_both_directions(network)
    for found, sign in ((rising, 1), (falling, -1)):
        assert found.interactions["absent"][0, 0, 1] == pytest.approx(sign * interaction)
        assert found.synergies("absent")[0, 0, 1] == pytest.approx(interaction)
        waterfall = dict(figures_of_modalities(found, "p1"))["absent/waterfall"]
        assert f"({word})" in " ".join(text.get_text() for text in waterfall.texts)


def test_picture_of_a_cohort_does_not_cancel_cases_of_opposite_direction() -> None:
    cohort = ModalityCohort()
    for name, found in zip(("p1", "p2"), of_both_directions(Alarm()), strict=True):
        cohort.add(name, found)
    figures = dict(figures_of_cohort(cohort, "epoch 1"))
    table = figures["absent/interactions"].axes[0].images[0].get_array()
    np.testing.assert_allclose(table, [[0.5, -1.0], [-1.0, 0.5]], atol=1e-6)
    assert figures["absent/values"].axes[0].get_xlabel() == "contribution in log-odds"


def test_names_stay_one_level_of_a_tag(tmp_path: Path) -> None:
    case = explained(name="site 1/patient:{2}", explanations={"a/b": explanation()})
    events = write(tmp_path, case, **PLANES_ONLY)
    assert "a_b/site_1_patient_2/image/planes" in events.Tags()["images"]
    assert "attribution/a_b/site_1_patient_2/score" in events.Tags()["scalars"]


def test_equal_channel_names_of_two_inputs_are_told_apart() -> None:
    maps = torch.ones(1, 2, 3, 3)
    two = explanation(
        attributions={"before": maps, "after": 2 * maps, "pet": maps[:, :1]},
        channels={"before": ("T1", "T2"), "after": ("T1", "FLAIR")},
    )
    assert contributions_of(two) == {
        "before T1": 9.0,
        "T2": 9.0,
        "after T1": 18.0,
        "FLAIR": 18.0,
        "pet": 9.0,
    }


# ---- outlines and place in space


def voxels(mask: np.ndarray[Any, Any] | None) -> int:
    assert mask is not None
    return int(mask.sum())


def test_outlines_follow_the_kind_of_output() -> None:
    logits = torch.full((1, 3, 4, 4), -1.0)
    logits[0, 0] = 0.5
    logits[0, 1, :2] = 1.0
    logits[0, 2, 0] = 2.0
    maps = explanation(attributions={"image": torch.rand(1, 1, 4, 4)}, channels={})
    case = explained(
        name="x",
        explanations={"ig": maps},
        inputs={"image": torch.rand(1, 1, 4, 4)},
        prediction=logits,
        label=torch.nn.functional.one_hot(logits.argmax(1), 3).moveaxis(-1, 1),
    )
    classes = scene_of(case, "ig", "image", multilabel=False)
    assert (voxels(classes.prediction), voxels(classes.label)) == (8, 8)
    overlapping = replace(case, prediction=logits[:, 1:], label=logits[:, 1:] > 0)
    both = scene_of(overlapping, "ig", "image", multilabel=True)
    assert (voxels(both.prediction), voxels(both.label)) == (8, 8)
    single = replace(case, prediction=logits[:, 2:], label=(logits[:, 2:] > 0).float())
    one = scene_of(single, "ig", "image", multilabel=False)
    assert (voxels(one.prediction), voxels(one.label)) == (4, 4)
    heads = replace(case, prediction={"seg": logits, "cls": logits[:, :, 0, 0]}, label={"cls": torch.ones(1)})
    headed = scene_of(replace(heads, heads={"ig": "seg"}), "ig", "image", multilabel=False)
    assert voxels(headed.prediction) == 8
    assert headed.label is None
    assert scene_of(heads, "ig", "image", multilabel=False).prediction is None
    elsewhere = replace(case, prediction=torch.rand(1, 2, 9, 9), label=torch.tensor([3]))
    none = scene_of(elsewhere, "ig", "image", multilabel=False)
    assert none.prediction is None
    assert none.label is None


def test_each_case_of_a_batch_has_its_own_affine() -> None:
    other = AFFINE.clone()
    other[0, 3] = 12.0
    batch = list_data_collate(
        [{"image": MetaTensor(torch.zeros(1, 3, 3, 3), affine=a)} for a in (AFFINE, other)]
    )
    for row, affine in enumerate((AFFINE, other)):
        np.testing.assert_array_equal(affine_of(batch["image"][row : row + 1]), affine)


def test_an_array_without_a_header_lies_nowhere() -> None:
    assert affine_of(torch.zeros(1, 1, 3, 3, 3)) is None
    image = MetaTensor(torch.zeros(1, 1, 3, 3, 3))
    assert affine_of(image) is None
    image.meta["original_affine"] = torch.eye(4)
    image.affine = AFFINE
    assert affine_of(image) is None


def test_a_scan_along_the_axes_of_the_body_at_one_millimeter_is_known() -> None:
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = torch.tensor([-90.0, -126.0, -72.0])
    image = MetaTensor(torch.zeros(1, 1, 3, 3, 3), affine=affine)
    np.testing.assert_array_equal(affine_of(image), affine)
    image.meta["original_affine"] = affine
    np.testing.assert_array_equal(affine_of(image), affine)


def test_a_crop_of_an_array_without_a_header_lies_nowhere() -> None:
    crop = SpatialCrop(roi_start=(1, 1, 1), roi_end=(4, 4, 4))(MetaTensor(torch.zeros(1, 5, 5, 5)))
    batch = list_data_collate([{"image": crop}, {"image": crop}])["image"]
    assert batch.affine[1, 0, 3] == 1
    assert affine_of(batch[1:]) is None


def test_affine_to_the_left_and_back_is_turned() -> None:
    image = MetaTensor(torch.zeros(1, 1, 3, 3, 3), affine=AFFINE)
    image.meta["space"] = "LPS"
    np.testing.assert_array_equal(affine_of(image), np.diag([1.0, -1.0, 2.0, 1.0]))


# ---- as a handler


def test_failures_are_logged_with_their_case_and_others_are_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = explanation(attributions={"image": torch.rand(1, 2, 3, 3, 3)})
    handler = TensorBoardAttributionHandler(str(tmp_path), **PLANES_ONLY)
    with caplog.at_level(logging.WARNING):
        fire(handler, explained(explanations={"wrong": wrong, "ig": explanation()}))
    handler.close()
    assert handler.failures == 1
    assert "wrong of case patient26, epoch 3" in caplog.text
    assert "ig/patient26/image/planes" in read(tmp_path).Tags()["images"]


def test_failures_are_handed_on_when_asked(tmp_path: Path) -> None:
    wrong = explanation(attributions={"image": torch.rand(1, 2, 3, 3, 3)})
    with pytest.raises(InputError, match="maps"):
        write(tmp_path, explained(explanations={"wrong": wrong}))
    with pytest.raises(InputError, match="'log' or 'raise'"):
        TensorBoardAttributionHandler(str(tmp_path), on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got builtins\.str"):
        TensorBoardAttributionHandler(summary_writer="runs")  # type: ignore[arg-type]


def test_a_full_disk_takes_pictures_and_no_maps_and_no_other_case(tmp_path: Path) -> None:
    script = f"""
        import resource, signal
        import torch
        from monai.data import DataLoader, Dataset
        from monai.engines import SupervisedEvaluator
        from monai.engines.utils import IterationEvents
        from monai_xai import AttributionHandler, Box, Explainer, RegionScore, Saliency
        from monai_xai.tensorboard import TensorBoardAttributionHandler
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        cases = Dataset([{{"image": torch.rand(1, 8, 8), "case_id": f"p{{i}}"}} for i in range(2)])
        explainer = Explainer(RegionScore(1, Box((1, 1), (5, 5))), Saliency())
        computes = AttributionHandler(explainer, 2, on_error="raise")
        draws = TensorBoardAttributionHandler({str(tmp_path)!r})
        network = torch.nn.Conv2d(1, 2, 3, padding=1)
        engine = SupervisedEvaluator("cpu", DataLoader(cases), network, val_handlers=[computes, draws], decollate=False)

        @engine.on(IterationEvents.MODEL_COMPLETED)
        def count(engine):
            print(engine.state.output["attribution"]["image"].isfinite().all().item())

        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        engine.run()
        print(computes.failures, draws.failures)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True", "True", "0", "2"], done.stderr
    assert "Not drawn: Saliency of case p1" in done.stderr


def test_a_shared_writer_stays_open(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    handler = TensorBoardAttributionHandler(summary_writer=writer, **PLANES_ONLY)
    fire(handler, explained())
    handler.close()
    writer.add_scalar("loss", 1.0, 0)
    writer.close()
    assert "loss" in read(tmp_path).Tags()["scalars"]


def test_drawing_draws_no_random_numbers(tmp_path: Path) -> None:
    case = explained()
    handler = TensorBoardAttributionHandler(str(tmp_path), on_error="raise")
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    fire(handler, case)
    handler.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("draws_first", [True, False], ids=["draws-first", "computes-first"])
def test_training_shows_each_case_once_per_epoch(tmp_path: Path, draws_first: bool) -> None:
    def case(name: str) -> dict[str, Any]:
        image = MetaTensor(
            torch.rand(2, 8, 8, 8), affine=AFFINE, meta={"filename_or_obj": f"/scans/{name}.nii.gz"}
        )
        return {"image": image, "label": (image[:1] > 0.7).as_tensor().float()}

    network = torch.nn.Conv3d(2, 2, 3, padding=1)
    data = DataLoader(Dataset([case("patient19"), case("patient26"), case("patient27")]), batch_size=1)
    evaluator = SupervisedEvaluator(torch.device("cpu"), data, network)
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        2,
        data,
        network,
        torch.optim.SGD(network.parameters(), 0.1),
        torch.nn.BCEWithLogitsLoss(),
        prepare_batch=lambda batch, *_, **__: (batch["image"], batch["label"].repeat(1, 2, 1, 1, 1)),
    )
    explainer = Explainer(RegionScore(1, Labeled()), Saliency(), progress=False)
    computes = AttributionHandler(explainer, cases=["patient26"], on_error="raise")
    draws = TensorBoardAttributionHandler(str(tmp_path), on_error="raise")
    for handler in (draws, computes) if draws_first else (computes, draws):
        handler.attach(evaluator)
    finished = []
    evaluator.add_event_handler(Events.COMPLETED, lambda: finished.append(1))
    ValidationHandler(1, evaluator).attach(trainer)
    trainer.run()
    draws.close()

    events = read(tmp_path)
    assert set(events.Tags()["images"]) == {
        f"Saliency/patient26/image/{kind}" for kind in ("planes", "montage", "animation")
    }
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == [1, 2]
    assert [event.step for event in events.Scalars("attribution/Saliency/patient26/score")] == [1, 2]
    assert len(finished) == 2
