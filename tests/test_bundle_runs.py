"""A run from a bundle's own configs: whatever they call things, the explanation is that of the network they run."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SlidingWindowInferer
from monai.networks.nets import UNet
from networks import random_image, small_unet
from PIL import Image

from monai_xai import (
    AttributionEvents,
    AttributionHandler,
    Box,
    Explainer,
    InputError,
    RegionScore,
    Saliency,
    UnsupportedBundleError,
)
from monai_xai.__main__ import main
from monai_xai.bundle_heads import Head, head_of
from monai_xai.bundle_runs import BundleRequest, choose_cases
from monai_xai.bundle_settings import as_config
from monai_xai.handlers import register_events

pytestmark = [
    # MONAI warns of every config that it runs, because a config is code.
    pytest.mark.filterwarnings("ignore::UserWarning:monai"),
    pytest.mark.filterwarnings("ignore::FutureWarning:monai"),
]

UNET = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8],
    "strides": [2],
}
LOAD = {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}
SEGMENTATION = {
    "imports": ["$import glob"],
    "device": "$torch.device('cpu')",
    "bundle_root": ".",
    "network_def": UNET,
    "network": "$@network_def.to(@device)",
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16], "overlap": 0.25},
    "preprocessing": {"_target_": "Compose", "transforms": [LOAD]},
    "dataset": {
        "_target_": "Dataset",
        "data": "$[{'image': i} for i in sorted(glob.glob(@bundle_root + '/scans/*.nii.gz'))]",
        "transform": "@preprocessing",
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [{"_target_": "AsDiscreted", "keys": "pred", "argmax": True}],
    },
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": {"_target_": "DataLoader", "dataset": "@dataset"},
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
    },
    "evaluating": ["$@evaluator.run()"],
}
LOADER = {
    "_target_": "CheckpointLoader",
    "load_path": "$@bundle_root + '/models/model.pt'",
    "load_dict": {"model": "@network"},
}
BOX = "RegionScore(channel=1, region=Box(start=[2, 2, 2], end=[9, 9, 9]))"


def output(**changes: Any) -> dict[str, Any]:
    """Return metadata of one output, a segmentation unless it is changed."""
    own = {"type": "image", "format": "segmentation", "num_channels": 2, "spatial_shape": ["n", "n", "n"]}
    names = {"channel_def": {"0": "background", "1": "Spleen"}}
    return {"network_data_format": {"inputs": {}, "outputs": {"pred": {**own, **names, **changes}}}}


def make_bundle(
    folder: Path, config: dict[str, Any], suffix: str = "json", metadata: dict[str, Any] | None = None
) -> Path:
    """Write a bundle with two scans that lie askew in space."""
    (folder / "configs").mkdir(parents=True)
    (folder / "scans").mkdir()
    text = json.dumps(config) if suffix == "json" else yaml.safe_dump(config, sort_keys=False)
    (folder / "configs" / f"inference.{suffix}").write_text(text)
    (folder / "configs" / "metadata.json").write_text(json.dumps(output() if metadata is None else metadata))
    affine = np.array([[0, 1.2, 0, -20], [-1.2, 0, 0, 30], [0, 0, 2, 5], [0, 0, 0, 1.0]])
    for number in range(2):
        scan = random_image(20, 18, 16, seed=number).float().numpy()
        nibabel.save(nibabel.Nifti1Image(scan, affine), folder / "scans" / f"scan{number}.nii.gz")
    return folder


def attribution(output_dir: Path, case: str) -> np.ndarray:
    """Return the only map of a case."""
    label = case.replace("_", "")
    (file,) = (output_dir / "explanations" / f"sub-{label}").glob("*.nii.gz")
    return np.asarray(nibabel.load(file).dataobj)


# ------------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_bundle_without_handlers_initialize_or_output_dir_is_explained_with_its_own_weights(
    tmp_path, suffix
):
    bundle = make_bundle(tmp_path / "bundle", {**SEGMENTATION, "checkpointloader": LOADER}, suffix)
    config = json.loads(json.dumps(SEGMENTATION))
    config["checkpointloader"] = LOADER
    config["initialize"] = ["$@checkpointloader(@evaluator)"]
    (bundle / "configs" / f"inference.{suffix}").write_text(
        json.dumps(config) if suffix == "json" else yaml.safe_dump(config)
    )
    torch.manual_seed(3)
    network = UNet(3, 1, 2, (4, 8), (2,))
    (bundle / "models").mkdir()
    torch.save({"model": network.state_dict()}, bundle / "models" / "model.pt")
    request = BundleRequest(
        bundle, cases=[1], target=BOX, method="Saliency", settings={"explainer::progress": False}
    )
    where = request.build().run()
    assert where == bundle / "eval"
    assert not (where / "explanations" / "sub-scan0").exists(), "cases that are not asked for are not run"
    explainer = Explainer(
        RegionScore(1, Box((2, 2, 2), (9, 9, 9))),
        Saliency(),
        SlidingWindowInferer((16, 16, 16), overlap=0.25),
    )
    image = random_image(1, 1, 20, 18, 16, seed=1).float()
    expected = explainer(network, image).attributions["image"][0, 0]
    assert np.allclose(attribution(where, "scan1"), expected, atol=1e-6 * float(expected.abs().max()))


def test_the_command_line_ends_with_the_reason_and_no_traceback_of_the_hosts(tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    (bundle / "scans" / "scan1.nii.gz").write_bytes(b"no NIfTI")
    options = ["--target", BOX, "--method", "Saliency", "--case", "all", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["monai_xai", "explain", "--bundle", str(bundle), *options])
    with pytest.raises(
        SystemExit, match=r"\ACasesFailedError: 1 of 2 cases .*\n +case scan1: not loaded from"
    ):
        main()
    assert attribution(tmp_path / "out", "scan0").shape == (20, 18, 16)


def test_missing_weights_are_told_of_and_random_ones_are_explained_on_request(tmp_path):
    config = copy.deepcopy(SEGMENTATION)
    config["handlers"] = [{**LOADER, "_disabled_": "$not __import__('os').path.exists('nowhere')"}]
    config["evaluator"]["val_handlers"] = "@handlers"
    bundle = make_bundle(tmp_path / "bundle", config)
    request = BundleRequest(bundle, cases=[0], target=BOX, method="Saliency", output=tmp_path / "out")
    with pytest.raises(InputError, match=r"weights of this bundle are not there.*model.pt.*--random_weights"):
        request.build().run()
    random = BundleRequest(
        bundle, cases=[0], target=BOX, method="Saliency", output=tmp_path / "out", random_weights=True
    ).build()
    assert random.config["handlers"][0]["_disabled_"] is True
    assert attribution(random.run(), "scan0").shape == (20, 18, 16)
    assert (tmp_path / "out" / "explain.yaml").is_file()


def test_a_run_with_random_weights_goes_on_with_the_same(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    asked = BundleRequest(bundle, target=BOX, method="Saliency", output=tmp_path / "out", random_weights=True)
    first = attribution(replace(asked, cases=[0]).build().run(), "scan0")
    torch.rand(1)
    where = replace(asked, cases=[]).build().run()
    assert attribution(where, "scan1").any()
    assert np.array_equal(attribution(where, "scan0"), first)
    other = attribution(replace(asked, cases=[0], output=tmp_path / "other").build().run(), "scan0")
    assert np.array_equal(other, first)


def test_a_checkpoint_loader_that_initialize_calls_is_dropped_and_initialize_stays(tmp_path):
    own = ["$@checkpointloader(@evaluator)", "$torch.manual_seed(0)"]
    config = {**SEGMENTATION, "checkpointloader": LOADER, "initialize": own}
    run = BundleRequest(make_bundle(tmp_path / "bundle", config), random_weights=True).build()
    assert run.config["checkpointloader"] == "$lambda engine: None"
    assert run.config["initialize"][1:3] == own


def test_names_that_a_bundle_does_not_share_are_found(tmp_path):
    config = copy.deepcopy(SEGMENTATION)
    config["validate"] = {"evaluator": config.pop("evaluator"), "preprocessing": config.pop("preprocessing")}
    config["dataset"]["transform"] = "@validate::preprocessing"
    config["run"] = config.pop("evaluating")[0].replace("@evaluator", "@validate#evaluator")
    config["run"] = ["$@validate::evaluator.run()"]
    bundle = make_bundle(tmp_path / "bundle", config)
    (bundle / "configs" / "inference.json").rename(bundle / "configs" / "evaluate.json")
    run = BundleRequest(bundle).build()
    assert run.run_id == "run"
    assert run.config["explain_saver"]["transform"] == "@validate::preprocessing"
    assert run.config["initialize"][0] == "$@explain_saver.attach(@validate::evaluator)"


@pytest.mark.parametrize("config", ["", "evaluate"])
def test_an_evaluation_that_changes_the_training_is_read_over_it(tmp_path, config):
    training = copy.deepcopy(SEGMENTATION)
    training["validate"] = {"evaluator": training.pop("evaluator")}
    training["validate"]["evaluator"]["val_handlers"] = "@validate::handlers"
    training["validate"]["handlers"] = []
    bundle = make_bundle(tmp_path / "bundle", training)
    (bundle / "configs" / "inference.json").rename(bundle / "configs" / "train.json")
    changes = {"validate#handlers": [LOADER], "run": ["$@validate#evaluator.run()"]}
    (bundle / "configs" / "evaluate.json").write_text(json.dumps(changes))
    run = BundleRequest(bundle, config=config).build()
    assert run.config["validate"]["handlers"] == [LOADER]
    assert run.config["initialize"][0] == "$@explain_saver.attach(@validate::evaluator)"


def test_a_config_that_changes_what_is_not_there_is_named(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    (bundle / "configs" / "other.json").write_text(json.dumps({"validate#handlers": []}))
    with pytest.raises(InputError, match=r"other\.json cannot be read as a config: .*validate"):
        BundleRequest(bundle, config="other").build()


def test_an_image_takes_the_place_of_the_data(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    scan = bundle / "scans" / "scan1.nii.gz"
    run = BundleRequest(
        bundle, image=[str(scan)], target=BOX, method="Saliency", output=tmp_path / "out"
    ).build()
    assert run.run_id == "evaluating"
    assert attribution(run.run(), "scan1").shape == (20, 18, 16)
    with pytest.raises(InputError, match=r"no image .*scan7"):
        BundleRequest(bundle, image=["scan7.nii.gz"]).build()


def test_the_part_of_a_list_is_chosen_by_its_head(tmp_path):
    config = copy.deepcopy(SEGMENTATION)
    config["network_def"] = {
        "_target_": "BasicUNetPlusPlus",
        "in_channels": 1,
        "out_channels": 2,
        "features": [2, 2, 2, 2, 2, 2],
        "deep_supervision": True,
    }
    config["inferer"] = {"_target_": "SimpleInferer"}
    config["preprocessing"]["transforms"].append(
        {"_target_": "Resized", "keys": "image", "spatial_size": [32] * 3}
    )
    config["postprocessing"]["transforms"] = []  # which takes no lists
    bundle = make_bundle(tmp_path / "bundle", config)
    request = BundleRequest(bundle, cases=[0], target=BOX, head=1, method="Saliency", random_weights=True)
    run = request.build()
    assert run.config["explain_target"]["head"] == 1
    assert attribution(run.run(), "scan0").shape == (20, 18, 16), "back in the space of the scan"


def test_a_classification_in_2d_is_asked_about_the_class_that_it_predicts(tmp_path):
    config = copy.deepcopy(SEGMENTATION)
    options = {"init_features": 4, "growth_rate": 2, "block_config": [2, 2]}
    config["network_def"] = {
        "_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 3, **options
    }  # fmt: skip
    config["inferer"] = {"_target_": "SimpleInferer"}
    config["dataset"]["data"] = "$[{'image': @bundle_root + '/xray7.png'}]"
    scale = {"_target_": "ScaleIntensityd", "keys": "image"}
    config["preprocessing"]["transforms"].append(scale)
    config["postprocessing"]["transforms"] = [{"_target_": "Activationsd", "keys": "pred", "softmax": True}]
    metadata = output(
        type="probabilities", format="classes", num_channels=3, spatial_shape=[1, 3], channel_def=None
    )
    bundle = make_bundle(tmp_path / "bundle", config, metadata=metadata)
    pixels = (np.arange(32 * 40).reshape(32, 40) % 251).astype(np.uint8)
    Image.fromarray(pixels).save(bundle / "xray7.png")
    where = BundleRequest(bundle, cases=["xray7"], method="Saliency", random_weights=True).build().run()
    about = json.loads(next((where / "explanations" / "sub-xray7").glob("*.json")).read_text())
    assert about["Target"] == "ClassScore()"
    assert attribution(where, "xray7").squeeze().shape == (40, 32), (
        "MONAI reads PNG files with the axes swapped"
    )


def test_a_merged_config_is_one_that_monai_runs(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION, "yaml")
    run = BundleRequest(bundle, cases=[0], output=tmp_path / "out").build()
    assert yaml.safe_load(run.as_yaml()) == run.config
    assert (bundle / "configs" / "inference.yaml").read_text() == yaml.safe_dump(
        SEGMENTATION, sort_keys=False
    )


@pytest.mark.parametrize(
    ("overlay", "region"), [("grounding", "label"), ("comparison", "label"), ("modalities", None)]
)
def test_every_overlay_gets_target_and_cases(tmp_path, overlay, region):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    run = BundleRequest(bundle, overlay, cases=[1], target="spleen").build()
    handler = {"grounding": "grounding_handler", "comparison": "comparison_handler"}.get(
        overlay, "modality_handler"
    )
    target = run.config.get(f"{overlay}_target") or run.config["modalities"]["target"]
    assert target == {"_target_": "monai_xai.RegionScore", "channel": 1}
    assert run.config[handler]["cases"] is None
    assert run.config[handler].get("region") == region
    assert run.config["initialize"][0]["cases"] == [1]


def test_location_is_not_asked_of_a_classification(tmp_path):
    metadata = output(format="classes", spatial_shape=[1, 2])
    run = BundleRequest(
        make_bundle(tmp_path / "bundle", SEGMENTATION, metadata=metadata), "grounding"
    ).build()
    assert run.config["grounding_target"] == {"_target_": "monai_xai.ClassScore", "class_index": None}
    assert "region" not in run.config["grounding_handler"]


def test_an_overlay_of_ones_own_keeps_its_target(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    own = tmp_path / "xai.yaml"
    own.write_text(
        "explain_target: {_target_: monai_xai.RegionScore, channel: 0}\n+initialize: ['$print(1)']\n"
    )
    assert BundleRequest(bundle, str(own)).build().config["explain_target"]["channel"] == 0
    assert BundleRequest(bundle, str(own), target=1).build().config["explain_target"]["channel"] == 1


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "magnitude"}, "makes an image"),
        ({"channel_def": None, "num_channels": 3}, "says what the network's output means"),
    ],
    ids=["image", "unknown"],
)
def test_what_has_no_score_is_refused_with_the_reason_unless_it_is_asked_for(tmp_path, changes, reason):
    config = {**SEGMENTATION, "postprocessing": {"_target_": "Compose", "transforms": []}}
    bundle = make_bundle(tmp_path / "bundle", config, metadata=output(**changes))
    with pytest.raises(UnsupportedBundleError, match=rf"{reason}.*--target"):
        BundleRequest(bundle).build()
    assert BundleRequest(bundle, target=BOX).build().config["explain_target"]["channel"] == 1


@pytest.mark.parametrize("target", [None, BOX], ids=["no target", "a target"])
def test_boxes_are_refused_and_what_can_be_explained_of_them_is_said(tmp_path, target):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION, metadata=output(type="object", format="dict"))
    with pytest.raises(UnsupportedBundleError, match=r"finds boxes.*the class score of one anchor"):
        BundleRequest(bundle, target=target).build()


def test_a_bundle_without_evaluator_is_refused_with_the_reason(tmp_path):
    config = {key: value for key, value in SEGMENTATION.items() if key not in ("evaluator", "evaluating")}
    plain = make_bundle(tmp_path / "plain", {**config, "evaluator": None})
    with pytest.raises(UnsupportedBundleError, match="plain has no evaluator: without a network"):
        BundleRequest(plain).build()
    diffusion = make_bundle(tmp_path / "diffusion", {**config, "inferer": {"_target_": "scripts.LDMSampler"}})
    with pytest.raises(UnsupportedBundleError, match="no evaluator: it makes images from noise"):
        BundleRequest(diffusion).build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "inferrence"}, "no config 'inferrence'. The bundle has inference"),
        ({"overlay": "explian"}, "no overlay 'explian'"),
        ({"target": 7}, "no channel or class 7 in this bundle; there are 0 background, 1 Spleen"),
        ({"target": "liver"}, "no liver in monai_xai"),
        ({"method": "IntegratedGradient"}, "did you mean IntegratedGradients"),
        ({"method": "3"}, "neither a name such as"),
    ],
    ids=["config", "overlay", "channel", "class", "method", "number"],
)
def test_what_is_not_there_is_named_with_what_is(tmp_path, options, message):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    with pytest.raises(InputError, match=message):
        BundleRequest(bundle, **options).build()


def test_a_folder_that_is_no_bundle_and_a_broken_config_are_named(tmp_path):
    with pytest.raises(UnsupportedBundleError, match="no configs/inference"):
        BundleRequest(tmp_path).build()
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    (bundle / "configs" / "inference.json").write_text("{")
    with pytest.raises(InputError, match=r"inference.json cannot be read"):
        BundleRequest(bundle).build()


# --------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("changes", "step", "expected"),
    [
        ({}, {"softmax": True}, Head("segmentation", 2, {0: "background", 1: "Spleen"})),
        ({}, {"sigmoid": True}, Head("segmentation", 2, {0: "background", 1: "Spleen"}, True)),
        ({}, {"sigmoid": True, "softmax": False}, Head("segmentation", 2, {0: "background", 1: "Spleen"}, True)),
        ({"format": "labels", "spatial_shape": [1, 2]}, {}, Head("classes", 2, {0: "background", 1: "Spleen"})),
        ({"type": "regression", "format": "age", "num_channels": 1, "spatial_shape": [], "channel_def": None}, {},
         Head("values", 1, {}, True)),
        ({"type": "tuples", "format": "points", "spatial_shape": [2, 10], "channel_def": None}, {}, Head("points", 2)),
    ],
    ids=["softmax", "sigmoid", "sigmoid and no softmax", "class", "value", "points"],
)  # fmt: skip
def test_the_output_is_what_metadata_and_postprocessing_say(changes, step, expected):
    config = {"postprocessing": {"transforms": [{"_target_": "monai.transforms.Activationsd", **step}]}}
    assert head_of(config, output(**changes)) == expected


def test_without_metadata_the_postprocessing_decides():
    steps = [{"_target_": "AsDiscreted", "argmax": True}, {"_target_": "SaveImaged"}]
    assert head_of({"postprocessing": {"transforms": steps}}, {}).kind == "segmentation"
    assert head_of({"handlers": [{"_target_": "ClassificationSaver"}]}, {}).kind == "classes"
    assert head_of({}, {}).kind == "unknown"


def test_of_several_outputs_the_segmentation_is_asked_about():
    outputs = output()["network_data_format"]["outputs"]
    several = {"distances": {"format": "regression"}, "nuclei": outputs["pred"]}
    head = head_of({}, {"network_data_format": {"outputs": several}})
    assert head.target()["head"] == "nuclei"


@pytest.mark.parametrize(
    ("head", "target"),
    [
        (Head("segmentation", 3, {0: "core", 1: "whole"}, True), {"channel": 0}),
        (Head("segmentation", 3, {0: "Background", 2: "liver"}), {"channel": 2}),
        (Head("segmentation", 3), {"channel": 1}),
        (Head("segmentation", 1), {"channel": 0}),
        (Head("classes", 4), {"class_index": None}),
        (Head("classes", 1), {"index": 0}),
        (Head("values", 3), {"index": 0}),
    ],
    ids=["overlapping", "named", "unnamed", "one channel", "classes", "yes or no", "values"],
)
def test_the_target_fits_the_output(head, target):
    own = head.target()
    assert {key: own[key] for key in target} == target
    assert ("threshold" in str(own)) == head.may_overlap


# ------------------------------------------------------------------------------- configs of targets and methods


def test_what_explanations_print_can_be_asked_for_again():
    target = RegionScore(1, Box((2, 2), (9, 9)))
    assert as_config(str(target)) == {
        "_target_": "monai_xai.RegionScore",
        "channel": 1,
        "region": {"_target_": "monai_xai.Box", "start": [2, 2], "end": [9, 9]},
        "reduction": "mean",
    }
    assert as_config({"_target_": "own.Target", "region": {"_target_": "Predicted"}}) == {
        "_target_": "own.Target",
        "region": {"_target_": "monai_xai.Predicted"},
    }


# ------------------------------------------------------------------------------------------------------- cases


def named_engine() -> SupervisedEvaluator:
    data = [{"image": MetaTensor(random_image(2, 16, 16)), "case_id": f"patient{n}"} for n in range(4)]
    return SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=DataLoader(Dataset(data)), network=small_unet()
    )


def test_an_evaluator_runs_through_chosen_cases_in_their_order():
    engine = named_engine()
    choose_cases(engine, ["patient3", 0, -2])
    assert [name for batch in engine.data_loader for name in batch["case_id"]] == [
        "patient3",
        "patient0",
        "patient2",
    ]
    engine.run()
    assert engine.state.iteration == 3


def test_a_case_that_is_not_there_is_named_with_those_nearby():
    with pytest.raises(InputError, match="no case 'patient7' among 4, such as patient"):
        choose_cases(named_engine(), ["patient7"])
    with pytest.raises(InputError, match="no case 4 among 4"):
        choose_cases(named_engine(), [4])


# ----------------------------------------------------------------------------------- engines with calls of their own


class PromptedNetwork(torch.nn.Module):
    """Answers by keyword, and has a part that its inferer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_unet()
        self.prompt_head = torch.nn.Identity()

    def forward(self, *, patch: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return self.prompt_head(self.body(patch) * prompt.reshape(1, -1, 1, 1))


class PromptedInferer(Inferer):
    def __call__(self, inputs, network, *, prompt, labels=None):
        assert isinstance(network.prompt_head, torch.nn.Identity)
        return network(patch=inputs, prompt=prompt)


class PromptedEvaluator(SupervisedEvaluator):
    """Calls its inferer with prompts, as VISTA3D does."""

    def _iteration(self, engine, batchdata):
        image, prompt = batchdata["image"], batchdata["prompt"]
        engine.state.output = {"image": image, "label": None}
        engine.state.output["pred"] = engine.inferer(
            inputs=image, network=engine.network, prompt=prompt, labels=None
        )
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        return engine.state.output


def test_a_call_with_prompts_is_made_again_as_the_engine_made_it():
    image, prompt = random_image(2, 16, 16), torch.tensor([1.0, -3.0], dtype=torch.float64)
    network, found = PromptedNetwork(), []
    engine = PromptedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset([{"image": image, "prompt": prompt}])),
        network=network,
        inferer=PromptedInferer(),
        decollate=False,
        val_handlers=[
            AttributionHandler(Explainer(RegionScore(1, Box((2, 2), (9, 9))), Saliency()), on_error="raise")
        ],
    )
    register_events(engine)
    engine.add_event_handler(
        AttributionEvents.ATTRIBUTION_COMPLETED, lambda e: found.append(e.state.explained)
    )
    engine.run()
    x = image[None].clone().requires_grad_()
    network.eval()(patch=x, prompt=prompt)[0, 1, 2:9, 2:9].mean().backward()
    (explained,) = found
    assert torch.allclose(
        explained.explanations["Saliency"].attributions["image"], x.grad, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize(
    ("overlay", "result"),
    [
        ("comparison", "comparison/comparison-1.csv"),
        ("grounding", "grounding/grounding-1.html"),
        ("modalities", "modalities/modalities.csv"),
    ],
)
def test_every_question_about_chosen_cases_is_answered(tmp_path, overlay, result):
    bundle = make_bundle(tmp_path / "bundle", SEGMENTATION)
    run = BundleRequest(
        bundle, overlay, cases=[0, 1], target=BOX, output=tmp_path / "out", random_weights=True
    ).build()
    text = (run.run() / result).read_text()
    assert "scan0" in text
    assert "scan1" in text
