"""Handlers in real MONAI engines: what is explained when, where maps go, and that nothing else changes."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents, PrepareBatchExtraInput
from monai.handlers import ValidationHandler
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.transforms import Compose
from networks import ImageAndVector, random_image, small_unet

from monai_xai import (
    AttributionEvents,
    AttributionHandler,
    Box,
    ClassScore,
    CompletenessWarning,
    Component,
    Explainer,
    FlattenAttributionsd,
    GradientShap,
    InputError,
    InputXGradient,
    IntegratedGradients,
    Labeled,
    MarginScore,
    ModalityCohortHandler,
    ModalityShapley,
    OutputScore,
    RegionScore,
    Saliency,
    UnsavedMapWarning,
    WorstCases,
)
from monai_xai.batches import case_of
from monai_xai.cases import foreground_dice, multilabel_dice
from monai_xai.handlers import register_events

TARGET = RegionScore(1, Box((2, 2), (9, 9)))
EXPLAINER = Explainer(TARGET, Saliency())


def cases(n=4, **extra):
    """Return a data set of n named cases with image and label."""
    items = []
    for i in range(n):
        image = MetaTensor(
            random_image(2, 16, 16, seed=i), meta={"filename_or_obj": f"scans/case-{i}.nii.gz"}
        )
        items.append({"image": image, "label": (random_image(1, 16, 16, seed=100 + i) > 0).double(), **extra})
    return Dataset(items)


def evaluator(handlers, *, data=None, network=None, batch_size=1, **options):
    """Return an evaluator on the CPU with a small U-Net."""
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(cases() if data is None else data, batch_size=batch_size),
        network=small_unet() if network is None else network,
        val_handlers=handlers,
        **options,
    )


class Recorder:
    """Keep what was explained."""

    def __init__(self):
        self.explained = []

    def attach(self, engine):
        register_events(engine)
        engine.add_event_handler(
            AttributionEvents.ATTRIBUTION_COMPLETED, lambda e: self.explained.append(e.state.explained)
        )

    @property
    def cases(self):
        return [case.name for case in self.explained]


def explained_cases(choice, **options):
    recorder = Recorder()
    evaluator([recorder, AttributionHandler(EXPLAINER, choice)], **options).run()
    return recorder.cases


# -------------------------------------------------------------------------------------------- what is explained when


def test_the_first_cases_by_index_and_by_name():
    assert explained_cases(2) == ["case-0", "case-1"]
    assert explained_cases([1, 3]) == ["case-1", "case-3"]
    assert explained_cases(["case-2"]) == ["case-2"]
    assert explained_cases([3], batch_size=3) == ["case-3"]
    assert explained_cases(["b"], data=cases(2, case_id="b")) == ["b", "b"]


def test_the_worst_cases_by_a_metric_are_all_among_the_explained():
    values = {0: 0.9, 1: 0.2, 2: 0.8, 3: 0.1}
    order = iter(values)
    found = explained_cases(WorstCases(2, lambda prediction, label: torch.tensor([values[next(order)]])))
    assert found == ["case-0", "case-1", "case-2", "case-3"]
    healthy = WorstCases(1, lambda prediction, label: torch.full((1,), float("nan")))
    assert explained_cases(healthy) == []
    order = iter([3, 1, 0, 2])
    assert explained_cases(WorstCases(2, lambda prediction, label: torch.tensor([values[next(order)]]))) == [
        "case-0",
        "case-1",
    ]


def test_the_default_metric_of_the_worst_cases_is_the_foreground_dice():
    truth = torch.zeros(1, 1, 4, 4)
    truth[..., :2, :] = 1
    prediction = torch.zeros(1, 2, 4, 4)
    prediction[:, 1, 1:3] = 1.0
    prediction[:, 0] = 0.5
    assert float(foreground_dice(prediction, truth)) == pytest.approx(0.5)
    assert float(foreground_dice(prediction[:, 1:] - 0.5, truth)) == pytest.approx(0.5)


def test_an_evaluator_inside_training_explains_every_interval_th_epoch():
    network, recorder = small_unet(), Recorder()
    validator = evaluator([AttributionHandler(EXPLAINER, 1, interval=2), recorder], network=network)
    trainer(network, [ValidationHandler(1, validator=validator)], epochs=4).run()
    assert [case.epoch for case in recorder.explained] == [2, 4]


def test_the_epochs_may_be_listed():
    network, recorder = small_unet(), Recorder()
    validator = evaluator([AttributionHandler(EXPLAINER, 1, interval=[1, 3]), recorder], network=network)
    trainer(network, [ValidationHandler(1, validator=validator)], epochs=4).run()
    assert [case.epoch for case in recorder.explained] == [1, 3]


def test_attaching_twice_explains_once():
    recorder, handler = Recorder(), AttributionHandler(EXPLAINER)
    engine = evaluator([handler, handler, recorder])
    engine.run()
    assert len(recorder.explained) == 1


@pytest.mark.parametrize("form", ["dict", "pair"])
def test_a_plain_ignite_engine_is_explained_by_its_image_and_label(form):
    network, recorder = small_unet(), Recorder()
    engine = Engine(lambda engine, batch: None)
    handler = AttributionHandler(EXPLAINER, network=network)
    for each in (handler, recorder):
        each.attach(engine)
    batch = {"image": random_image(1, 2, 16, 16), "label": torch.ones(1, 1, 16, 16)}
    engine.run([batch if form == "dict" else (batch["image"], batch["label"])])
    (case,) = recorder.explained
    torch.testing.assert_close(case.explanations["Saliency"].score, EXPLAINER(network, batch["image"]).score)
    assert torch.equal(case.label, batch["label"])


@pytest.mark.gpu
def test_a_plain_ignite_engine_may_move_its_batch_to_the_device_by_itself():
    network = small_unet().cuda()
    engine = Engine(lambda engine, batch: network(batch["image"].cuda()))
    explainer = Explainer(RegionScore(1, Labeled()), Saliency())
    handler, recorder = AttributionHandler(explainer, network=network, on_error="raise"), Recorder()
    for each in (handler, recorder):
        each.attach(engine)
    engine.run([{"image": random_image(1, 2, 16, 16), "label": torch.ones(1, 1, 16, 16)}])
    assert recorder.explained[0].explanations["Saliency"].attributions["image"].is_cuda


def test_a_plain_ignite_engine_needs_a_batch_it_can_read(caplog):
    engine = Engine(lambda engine, batch: None)
    handler = AttributionHandler(EXPLAINER, network=small_unet())
    handler.attach(engine)
    engine.run([{"scan": random_image(1, 2, 16, 16)}])
    assert handler.failures == 1
    assert "must be a dict with 'image'" in caplog.text


# --------------------------------------------------------------------------------------------------- where maps go


def test_maps_are_in_the_output_before_decollation_and_pass_through_post_processing():
    post = Compose([FlattenAttributionsd()])
    engine = evaluator([AttributionHandler(EXPLAINER, [1])], postprocessing=post)
    found = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: found.extend(e.state.output))
    engine.run()
    assert ["attribution_image" in item for item in found] == [False, True, False, False]
    item = found[1]
    assert item["attribution_image"].shape == item["image"].shape
    expected = EXPLAINER(small_unet(), cases()[1]["image"].as_tensor()[None]).attributions["image"]
    torch.testing.assert_close(item["attribution_image"].as_tensor(), expected[0])
    assert item["attribution_image"].meta["filename_or_obj"] == "scans/case-1.nii.gz"


def test_maps_that_nobody_saves_are_warned_of_once():
    post = Compose([FlattenAttributionsd(saved="attribution_image")])
    engine = evaluator([AttributionHandler(EXPLAINER, 2)], postprocessing=post)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsavedMapWarning)
        engine.run()
    with warnings.catch_warnings():  # a vector, which is no image to be saved
        warnings.simplefilter("error", UnsavedMapWarning)
        maps = {"image": torch.rand(1, 4, 4), "clinical": torch.rand(3)}
        FlattenAttributionsd(saved="attribution_image")({"attribution": maps})
    named = AttributionHandler({"gradient": EXPLAINER}, 2)
    engine = evaluator([named], postprocessing=Compose([FlattenAttributionsd(saved="attribution_image")]))
    with pytest.warns(
        UnsavedMapWarning, match="Nothing saves the maps attribution_gradient_image:"
    ) as caught:
        engine.run()
    assert len([w for w in caught if w.category is UnsavedMapWarning]) == 1


def test_several_explainers_are_kept_apart_by_name():
    several = Explainer({"a": TARGET, "b": MarginScore(1, 0, TARGET.region)}, Saliency())
    recorder, keys = Recorder(), []
    engine = evaluator(
        [AttributionHandler({"gradient": EXPLAINER, "both": several}), recorder], data=cases(1)
    )
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: keys.extend(e.state.output[0]["attribution"])
    )
    engine.run()
    assert keys == ["gradient_image", "both_a_image", "both_b_image"]
    assert list(recorder.explained[0].explanations) == ["gradient", "both_a", "both_b"]


def test_the_engines_own_inferer_and_prediction_are_explained():
    inferer, recorder = SlidingWindowInferer(8, overlap=0.5), Recorder()
    network, rows = small_unet(), []
    explainer = Explainer(RegionScore(1), Saliency())
    engine = evaluator(
        [AttributionHandler(explainer), recorder], data=cases(1), network=network, inferer=inferer
    )
    network.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    engine.run()
    explanation = next(iter(recorder.explained[0].explanations.values()))
    assert explanation.facts["windows"] == 9
    assert sum(rows) == 9 + explanation.facts["active_windows"] + 2  # two are repeated to check their batch


def test_extra_inputs_of_prepare_batch_are_explained_by_name():
    recorder = Recorder()
    data = cases(2, clinical=torch.ones(3, dtype=torch.float64))
    engine = evaluator(
        [AttributionHandler(EXPLAINER), recorder],
        data=data,
        network=ImageAndVector(images=2),
        prepare_batch=PrepareBatchExtraInput("clinical"),
        inferer=None,
    )
    with torch.no_grad():
        engine.network.body = small_unet(channels=2)
    engine.network.forward = lambda image, vector: ImageAndVector.forward(engine.network, image, vector)
    engine.run()
    explanation = next(iter(recorder.explained[0].explanations.values()))
    assert explanation.attributions["clinical"].shape == (1, 3)


def test_a_half_precision_prediction_gives_the_region_and_single_precision_the_maps():
    recorder = Recorder()
    engine = evaluator(
        [AttributionHandler(Explainer(RegionScore(1), Saliency()), on_error="raise"), recorder]
    )
    engine.inferer = HalfPrecision()
    engine.run()
    explanation = next(iter(recorder.explained[0].explanations.values()))
    assert explanation.attributions["image"].dtype == torch.float64
    assert recorder.explained[0].prediction.dtype == torch.bfloat16


class HalfPrecision(SimpleInferer):
    """Predicts in half precision, as mixed-precision evaluators do."""

    def __call__(self, inputs, network, *args, **kwargs):
        return network(inputs).bfloat16()


# --------------------------------------------------------------------------------------------------------- errors


def test_a_failing_explanation_is_logged_with_its_case_and_the_loop_goes_on(caplog):
    recorder = Recorder()
    explainers = {"broken": Explainer(RegionScore(7), Saliency()), "fine": EXPLAINER}
    handler = AttributionHandler(explainers, 2)
    engine = evaluator([handler, recorder])
    with caplog.at_level(logging.WARNING):
        engine.run()
    assert engine.state.iteration == 4
    assert handler.failures == 2
    assert "Not explained: case case-0, broken (Saliency)" in caplog.text
    assert "needs at least 8 output channels" in caplog.text
    assert [list(case.explanations) for case in recorder.explained] == [["fine"], ["fine"]]


def test_a_listener_that_fails_takes_no_map_and_no_other_case(caplog):
    maps = []

    class Listener(Recorder):
        def attach(self, engine):
            super().attach(engine)
            engine.add_event_handler(AttributionEvents.ATTRIBUTION_COMPLETED, self.fail)
            engine.add_event_handler(
                IterationEvents.MODEL_COMPLETED, lambda e: maps.append(e.state.output["attribution"]["image"])
            )

        def fail(self, engine):
            raise OSError(28, "No space left on device")

    listener, handler = Listener(), AttributionHandler(EXPLAINER, 2)
    evaluator([handler, listener], batch_size=2, data=cases(2), decollate=False).run()
    assert listener.cases == ["case-0", "case-1"]
    assert not torch.isnan(maps[0]).any()
    assert handler.failures == 2
    assert "Explained, but not handed on: case case-1, a listener" in caplog.text


def test_maps_are_named_by_the_configuration_and_not_by_how_many_lesions_there_are():
    class Threshold(torch.nn.Module):
        def forward(self, x):
            return torch.cat([torch.full_like(x[:, :1], 0.5), x[:, :1]], 1)

    found = []
    for lesions in (1, 2):
        image = torch.zeros(2, 16, 16, dtype=torch.float64)
        for i in range(lesions):
            image[0, 4 * i : 4 * i + 2, 3:6] = 1
        engine = evaluator(
            [AttributionHandler(Explainer(RegionScore(1, Component(None)), Saliency()))],
            data=Dataset([{"image": image, "label": image[:1]}]),
            network=Threshold(),
            decollate=False,
        )
        engine.run()
        found.append(list(engine.state.output["attribution"]))
    names = ["Saliency_component0_image", "Saliency_component1_image"]
    assert found == [names[:1], names]


def test_two_handlers_share_the_output_and_do_not_overwrite_each_other(caplog):
    other = AttributionHandler({"second": EXPLAINER, "third": EXPLAINER})
    same = AttributionHandler(EXPLAINER)
    engine = evaluator([AttributionHandler(EXPLAINER), other, same], data=cases(1), decollate=False)
    engine.run()
    assert list(engine.state.output["attribution"]) == ["image", "second_image", "third_image"]
    assert same.failures == 1
    assert "different keys" in caplog.text


def test_two_handlers_do_not_share_a_map_for_different_cases_of_a_batch(caplog):
    first, second = AttributionHandler(EXPLAINER, [0]), AttributionHandler(EXPLAINER, [1])
    engine = evaluator([first, second], data=cases(2), batch_size=2, decollate=False)
    engine.run()
    assert torch.isnan(engine.state.output["attribution"]["image"]).all((1, 2, 3)).tolist() == [False, True]
    assert (first.failures, second.failures) == (0, 1)
    assert "case case-1" in caplog.text


def test_generic_file_names_get_their_folder_and_cases_that_did_not_come_are_named(caplog):
    data = [
        {
            **case,
            "image": MetaTensor(case["image"].as_tensor(), meta={"filename_or_obj": f"p{i}/flair.nii.gz"}),
        }
        for i, case in enumerate(cases(2))
    ]
    recorder = Recorder()
    evaluator([recorder, AttributionHandler(EXPLAINER, ["p1_flair", "p7_flair"])], data=Dataset(data)).run()
    assert recorder.cases == ["p1_flair"]
    assert "The cases p7_flair did not come. The epoch had p0_flair, p1_flair" in caplog.text


KINDS = [
    "flair", "T1", "t1ce", "T1POST_N4_noneck_reduced_winsor_regtoMNI", "T2_N4_reg", "T1_mni152", "T1_2x2x2mm",
    "T1_iso1mm", "T2_1_5mm", "1.5T_flair", "3T_T1", "brainT1", "MNI152_T1_1mm", "t1_3D", "dwi_2d", "pet",
]  # fmt: skip
PATIENTS = [
    "BRATS_001", "spleen_10", "patient26", "0001", "IXI002-Guys", "T1_subject7", "img12", "scan3", "N4", "N12",
    "sub-07_T1w", "T1234", "n41", "case4_T1", "CT0012", "T10", "s0011", "2d3", "PET3",
]  # fmt: skip


def test_a_file_of_a_kind_of_scan_is_called_by_its_folder_and_one_of_a_patient_is_not():
    assert [case_of(f"a/{kind}.nii.gz") for kind in KINDS] == [f"a_{kind}" for kind in KINDS]
    assert [case_of(f"a/{patient}.nii.gz") for patient in PATIENTS] == PATIENTS


def test_a_large_gap_is_warned_of_with_its_case():
    explainer = Explainer(TARGET, IntegratedGradients(1, baseline=0.0))
    network = small_unet(norm="INSTANCE")
    with pytest.warns(CompletenessWarning, match="case case-0, IntegratedGradients: .*miss the change"):
        evaluator([AttributionHandler(explainer)], data=cases(1), network=network).run()


def test_warnings_of_others_come_through_as_they_are():
    class Noisy(Saliency):
        def attribute(self, scoring):
            warnings.warn("slow kernel", RuntimeWarning, stacklevel=1)
            return super().attribute(scoring)

    with pytest.warns(RuntimeWarning, match="^slow kernel$") as caught:
        evaluator([AttributionHandler(Explainer(TARGET, Noisy()))], data=cases(1)).run()
    assert [warning.filename for warning in caught] == [__file__]


class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small_unet()

    def forward(self, x):
        return {"seg": self.body(x), "cls": x.mean((2, 3))}


def test_the_head_that_is_explained_is_the_prediction_that_is_shown():
    recorder = Recorder()
    explainer = Explainer(RegionScore(1, Box((2, 2), (9, 9)), head="seg"), Saliency())
    evaluator([recorder, AttributionHandler(explainer)], data=cases(1), network=TwoHeads()).run()
    assert recorder.explained[0].prediction_of("Saliency").shape == (1, 2, 16, 16)


def test_each_explanation_has_the_prediction_and_label_of_its_own_head():
    def prepare(batch, device, non_blocking, **kwargs):
        return batch["image"], {"seg": batch["label"], "cls": torch.ones(len(batch["image"]))}

    recorder = Recorder()
    explainers = {
        "class": Explainer(ClassScore(0, head="cls"), Saliency()),
        "both": Explainer(
            {"a": RegionScore(1, Labeled(), head="seg"), "ab": OutputScore(head="cls")}, Saliency()
        ),
    }
    handler = AttributionHandler(explainers, [1], on_error="raise")
    evaluator(
        [recorder, handler],
        data=cases(2),
        batch_size=2,
        network=TwoHeads(),
        prepare_batch=prepare,
        decollate=False,
    ).run()
    (case,) = recorder.explained
    assert {name: tuple(case.prediction_of(name).shape) for name in case.explanations} == {
        "class": (1, 2),
        "both_a": (1, 2, 16, 16),
        "both_ab": (1, 2),
    }
    assert torch.equal(case.label_of("both_a"), cases(2)[1]["label"][None])
    assert torch.equal(case.label_of("class"), torch.ones(1))


def test_labels_by_head_do_not_stand_in_the_way_of_what_needs_none():
    def prepare(batch, device, non_blocking, **kwargs):
        return batch["image"], {"seg": batch["label"], "grade": [3]}

    recorder, handler = Recorder(), AttributionHandler(EXPLAINER, on_error="raise")
    evaluator([recorder, handler], data=cases(1), prepare_batch=prepare, decollate=False).run()
    assert recorder.cases == ["case-0"]
    assert recorder.explained[0].label_of("Saliency") is None


def test_the_worst_cases_of_overlapping_classes_and_of_one_head():
    truth = (random_image(1, 3, 8, 8) > 0).double()
    assert multilabel_dice(2 * truth - 1, truth).item() == pytest.approx(1.0)
    choice = WorstCases(1, head="seg")
    recorder = Recorder()
    explainer = Explainer(RegionScore(1, Box((2, 2), (9, 9)), head="seg"), Saliency())
    evaluator([recorder, AttributionHandler(explainer, choice)], data=cases(1), network=TwoHeads()).run()
    assert recorder.cases == ["case-0"]


def test_a_metric_that_does_not_fit_is_named(caplog):
    def metric(prediction, label):
        raise ValueError("shapes differ")

    evaluator([AttributionHandler(EXPLAINER, WorstCases(1, metric))], data=cases(1)).run()
    assert "WorstCases: the metric failed" in caplog.text
    assert "metric=..." in caplog.text


@pytest.mark.parametrize("form", ["keywords", "mapping", "sequence"])
def test_whatever_prepare_batch_hands_over_is_explained_by_name(form):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = ImageAndVector()

        def forward(self, image, clinical=None):
            if form == "mapping":
                image, clinical = image["image"], image["clinical"]
            elif form == "sequence":
                image, clinical = image
            return self.body(image, clinical)

    def prepare(batch, device, non_blocking, **kwargs):
        image, clinical = batch["image"][:, :1], batch["clinical"]
        if form == "keywords":
            return image, batch["label"], (), {"clinical": clinical}
        both = {"image": image, "clinical": clinical}
        return (both if form == "mapping" else tuple(both.values())), batch["label"]

    recorder, handler = Recorder(), AttributionHandler(EXPLAINER, on_error="raise")
    data = cases(1, clinical=random_image(3))
    evaluator([recorder, handler], data=data, network=Network(), prepare_batch=prepare, decollate=False).run()
    maps = recorder.explained[0].explanations["Saliency"].attributions
    expected = EXPLAINER(
        ImageAndVector(), {"image": data[0]["image"][None, :1], "clinical": data[0]["clinical"][None]}
    )
    for values, own in zip(maps.values(), expected.attributions.values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(values), torch.as_tensor(own), rtol=0, atol=1e-12)


def test_a_modality_that_is_absent_is_named(caplog):
    def prepare(batch, device, non_blocking, **kwargs):
        return batch["image"], batch["label"], (None,), {}

    class Network(torch.nn.Module):
        def forward(self, image, pet):
            return small_unet()(image)

    evaluator([AttributionHandler(EXPLAINER)], data=cases(1), network=Network(), prepare_batch=prepare).run()
    assert "The input 'input1' of the network is None" in caplog.text


def test_modalities_of_an_epoch_are_gathered_saved_and_a_collapsed_one_is_named(caplog, tmp_path):
    class Network(torch.nn.Module):
        def forward(self, x):
            return torch.cat([-x[:, :1], x[:, :1] + 1e-5 * x[:, 1:]], 1)

    shapley = ModalityShapley(RegionScore(1, Box((2, 2), (9, 9))), {"zero": 0.0, "one": 1.0})
    shapley = replace(shapley, channel_names={"image": ("FLAIR", "T1")})
    handler, gather = AttributionHandler({"parts": shapley}, 6), ModalityCohortHandler(tmp_path)
    engine = evaluator([gather, handler], data=cases(6), network=Network())
    engine.run()
    assert list(engine.state.cohorts["parts"].cases) == [f"case-{i}" for i in range(6)]
    assert "the modality T1 has collapsed under the baseline zero" in caplog.text
    assert "the modality FLAIR has collapsed" not in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modalities.csv", "modalities.json"]


def test_modalities_without_maps_leave_the_output_as_it_was():
    shapley = ModalityShapley(RegionScore(1, Box((2, 2), (9, 9))), {"zero": 0.0, "one": 1.0})
    engine = evaluator(
        [AttributionHandler(shapley, on_error="raise")],
        data=cases(1),
        postprocessing=Compose([FlattenAttributionsd()]),
    )
    engine.run()
    assert "attribution" not in engine.state.output[0]


def test_a_cohort_that_cannot_be_written_does_not_end_the_loop(caplog, tmp_path):
    (tmp_path / "file").write_text("in the way")
    shapley = ModalityShapley(RegionScore(1, Box((2, 2), (9, 9))), {"zero": 0.0, "one": 1.0})
    gather = ModalityCohortHandler(tmp_path / "file")
    engine = evaluator([gather, AttributionHandler(shapley)], data=cases(1))
    engine.run()
    assert "are not written to" in caplog.text
    assert engine.state.cohorts


def test_a_failing_explanation_ends_the_loop_when_asked():
    explainers = {"why": Explainer(RegionScore(7), Saliency())}
    message = r"^case case-0, why \(Saliency\): .*needs at least 8 output channels"
    with pytest.raises(InputError, match=message) as caught:
        evaluator([AttributionHandler(explainers, on_error="raise")]).run()
    assert isinstance(caught.value.__cause__, InputError)


def test_a_listener_that_fails_ends_the_loop_with_its_own_type_of_error_when_asked():
    class Listener(Recorder):
        def attach(self, engine):
            register_events(engine)
            engine.add_event_handler(AttributionEvents.ATTRIBUTION_COMPLETED, self.fail)

        def fail(self, engine):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"^case case-0, a listener: .*No space left"):
        evaluator([AttributionHandler(EXPLAINER, on_error="raise"), Listener()]).run()


def test_an_interruption_is_never_swallowed():
    class Interrupting(Saliency):
        def attribute(self, scoring):
            raise KeyboardInterrupt

    network = small_unet().train()
    engine = evaluator([AttributionHandler(Explainer(TARGET, Interrupting()))], network=network)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_an_interruption_leaves_the_maps_of_the_cases_before():
    class InterruptingTheSecond(Saliency):
        def attribute(self, scoring):
            done.append(1)
            if len(done) == 2:
                raise KeyboardInterrupt
            return super().attribute(scoring)

    done = []
    explainer = Explainer(TARGET, InterruptingTheSecond())
    engine = evaluator([AttributionHandler(explainer, 3)], data=cases(3), batch_size=3, decollate=False)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    maps = engine.state.output["attribution"]["image"]
    assert torch.isnan(maps).all((1, 2, 3)).tolist() == [False, True, True]


class Threshold(torch.nn.Module):
    """Predicts class 1 where the first channel is above zero."""

    def forward(self, x):
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :1]], 1)


def test_a_case_without_lesion_takes_nothing_from_its_neighbors(caplog):
    data = [
        {"image": sign * random_image(2, 8, 8).abs() - 1e-9, "case_id": str(sign)}
        for sign in (-1.0, 1.0, 2.0)
    ]
    recorder, found = Recorder(), []
    handler = AttributionHandler(Explainer(RegionScore(1), Saliency()), 2)
    options = {"data": Dataset(data), "network": Threshold(), "batch_size": 3}
    engine = evaluator([handler, recorder], postprocessing=FlattenAttributionsd(), **options)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: found.extend(e.state.output))
    engine.run()
    assert recorder.cases == ["1.0"]
    assert ["attribution_image" in item for item in found] == [False, True, False]
    assert handler.failures == 1
    assert "case -1.0" in caplog.text
    assert "Traceback" not in caplog.text


def test_another_network_is_explained_by_its_own_prediction():
    other = small_unet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1)
    recorder, explainer = Recorder(), Explainer(RegionScore(1), Saliency())
    evaluator([AttributionHandler(explainer, network=other), recorder], data=cases(1)).run()
    expected = explainer(other, cases()[0]["image"][None].as_tensor())
    torch.testing.assert_close(recorder.explained[0].explanations["Saliency"].score, expected.score)


@pytest.mark.parametrize(
    "options",
    [{"on_error": "ignore"}, {"interval": 0}, {"interval": {1}}, {"interval": "5"}, {"interval": [1.5]}],
    ids=str,
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        AttributionHandler(EXPLAINER, **options)


# ------------------------------------------------------------------------------------------------------- innocence


def trainer(network, handlers, *, epochs=2):
    """Return a trainer whose loop draws random numbers, so that a disturbed generator would show."""
    data = cases(4)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=2, shuffle=True, generator=generator),
        network=network,
        optimizer=optimizer,
        loss_function=lambda p, y: torch.nn.functional.cross_entropy(
            p + 0.01 * torch.randn_like(p), y[:, 0].long()
        ),
        train_handlers=handlers,
        decollate=False,
    )


def trained_state(handlers, validation_handlers):
    torch.manual_seed(0)
    network = small_unet().train()
    torch.manual_seed(0)
    validator = evaluator(validation_handlers, network=network, inferer=SlidingWindowInferer(8, overlap=0.5))
    engine = trainer(network, [*handlers, ValidationHandler(1, validator=validator)])
    engine.run()
    return {
        "network": network.state_dict(),
        "optimizer": engine.optimizer.state_dict()["state"],
        "generator": torch.get_rng_state(),
        "training": torch.tensor([m.training for m in network.modules()]),
    }


def test_training_with_and_without_handlers_is_bit_identical():
    explainers = {
        "gradient": EXPLAINER,
        "product": Explainer(TARGET, InputXGradient()),
        "integrated": Explainer(RegionScore(1), IntegratedGradients(3)),
        "sampled": Explainer(TARGET, GradientShap(3)),
    }
    recorder = Recorder()
    plain = trained_state([], [])
    explained = trained_state(
        [AttributionHandler(explainers, 2), recorder], [AttributionHandler(explainers, 2), recorder]
    )
    assert len(recorder.explained) > 4
    for name, value in plain.items():
        torch.testing.assert_close(
            explained[name], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
