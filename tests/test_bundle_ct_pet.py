"""The bundle ct_pet_classification: its phantom tells the truth, broken pairs of scans are refused, and it runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.data import MetaTensor, decollate_batch
from monai.transforms import Invertd
from torch import nn

from bundles import SCHEMA, read_config, run_bundle, scripts_of
from monai_xai import channel_names

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "ct_pet_classification"
CONFIGS = BUNDLE / "configs"
PLANTS = ("pet", "ct", "redundant", "xor", "shortcut")
BLOCK = range(1, 9)  # the numbers of cases among which every combination of cues occurs once
CT_SIZE, PET_SIZE = (36, 30, 30), (28, 22, 22)  # voxels of what the network gets

pytestmark = [
    # MONAI warns of every config that it runs, because a config is code.
    pytest.mark.filterwarnings("ignore::UserWarning:monai"),
    pytest.mark.filterwarnings("ignore::FutureWarning:monai"),
]


@pytest.fixture(scope="module")
def scripts() -> Iterator[ModuleType]:
    with scripts_of(BUNDLE) as package:
        yield package


# --- the phantom -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks(scripts: ModuleType) -> dict[str, list[Any]]:
    """The first block of cases, by plant."""
    return {plant: [scripts.make_case(scripts.Phantom(plant), i) for i in BLOCK] for plant in PLANTS}


def test_same_phantom_twice_is_equal(scripts: ModuleType, blocks: dict[str, list[Any]]) -> None:
    again = scripts.make_case(scripts.Phantom("pet"), 1)
    assert np.array_equal(again.ct, blocks["pet"][0].ct)
    assert np.array_equal(again.pet, blocks["pet"][0].pet)
    assert again.truth == blocks["pet"][0].truth


def test_every_phantom_is_another(scripts: ModuleType, blocks: dict[str, list[Any]]) -> None:
    first, second = blocks["pet"][:2]
    reseeded = scripts.make_case(scripts.Phantom("pet", seed=1), 1)
    for other in (second, reseeded):
        assert first.truth["center_mm"] != other.truth["center_mm"]
        assert not np.array_equal(first.ct, other.ct)


@pytest.mark.parametrize(
    ("plant", "rule"),
    [
        ("pet", lambda truth: truth["is_hot"]),
        ("ct", lambda truth: truth["is_solid"]),
        ("redundant", lambda truth: truth["is_solid"] and truth["is_hot"]),
        ("xor", lambda truth: truth["is_solid"] != truth["is_hot"]),
        ("shortcut", lambda truth: truth["has_tag"]),
    ],
    ids=PLANTS,
)
def test_label_is_what_was_planted(
    blocks: dict[str, list[Any]], plant: str, rule: Callable[[Any], bool]
) -> None:
    labels = [case.label for case in blocks[plant]]
    assert labels == [int(rule(case.truth)) for case in blocks[plant]]
    assert sum(labels) == 4, "balanced within every block"


def test_redundant_scans_agree(blocks: dict[str, list[Any]]) -> None:
    assert all(case.truth["is_solid"] == case.truth["is_hot"] for case in blocks["redundant"])


@pytest.mark.parametrize("cue", ["is_solid", "is_hot"])
def test_neither_cue_of_the_xor_tells_anything_alone(blocks: dict[str, list[Any]], cue: str) -> None:
    for value in (False, True):
        assert np.mean([case.label for case in blocks["xor"] if case.truth[cue] == value]) == 0.5


def test_plant_touches_nothing_but_what_it_names(blocks: dict[str, list[Any]]) -> None:
    for pet, ct, xor, shortcut in zip(
        *(blocks[name] for name in ("pet", "ct", "xor", "shortcut")), strict=True
    ):
        for other in (ct, xor):
            assert np.array_equal(pet.ct, other.ct)
            assert np.array_equal(pet.pet, other.pet)
        assert np.array_equal(pet.pet, shortcut.pet)
        changed = pet.ct != shortcut.ct
        assert changed.any() == shortcut.truth["has_tag"]
        assert changed.mean() < 0.01


def test_lesion_shows_its_cues_where_the_masks_say(blocks: dict[str, list[Any]]) -> None:
    for case in blocks["pet"]:
        density, uptake = np.median(case.ct[case.lesion_ct]), np.median(case.pet[case.lesion_pet])
        assert (density > 400) == case.truth["is_solid"]
        assert (uptake > 4) == case.truth["is_hot"]
        for mask, affine in ((case.lesion_ct, case.ct_affine), (case.lesion_pet, case.pet_affine)):
            middle = affine @ [*np.argwhere(mask).mean(0), 1]
            assert np.abs(middle[:3] - case.truth["center_mm"]).max() < 2, "in mm, on either grid"


def test_tag_is_metal_in_the_air(blocks: dict[str, list[Any]]) -> None:
    for bare, tagged in zip(blocks["pet"], blocks["shortcut"], strict=True):
        assert tagged.tag_ct.any() == tagged.truth["has_tag"] == tagged.label
        assert not bare.tag_ct.any()
        if tagged.label:
            assert tagged.ct[tagged.tag_ct].min() > 800
            assert bare.ct[tagged.tag_ct].max() < -800


def test_scans_lie_on_grids_of_their_own(blocks: dict[str, list[Any]]) -> None:
    for case in blocks["pet"]:
        assert case.ct.shape != case.pet.shape
        steps = [np.linalg.norm(affine[:3, :3], axis=0) for affine in (case.ct_affine, case.pet_affine)]
        assert (steps[1] > steps[0] + 1).all()
        assert np.linalg.norm(_middle(case.ct, case.ct_affine) - _middle(case.pet, case.pet_affine)) > 0.5


def _middle(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    middle: np.ndarray = (affine @ [*(np.array(voxels.shape) - 1) / 2, 1])[:3]
    return middle


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"plant": "mri"}, "plant='mri' must be one of pet, ct, redundant, xor, shortcut"),
        ({"n_cases": 8}, "n_cases=8 must be a multiple of 8, and at least 16"),
        ({"n_cases": 20}, "n_cases=20 must be a multiple of 8"),
    ],
    ids=["plant", "too few", "unbalanced"],
)
def test_phantom_refuses_what_it_cannot_make(
    scripts: ModuleType, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scripts.Phantom(**wrong)


@pytest.fixture(scope="module")
def phantoms(scripts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen phantoms on disk: 001 to 008 are held out."""
    root = tmp_path_factory.mktemp("phantoms")
    return Path(scripts.write_phantom(root, scripts.Phantom("shortcut", n_cases=16)))


def test_phantom_is_written_once_with_the_truth_beside_it(scripts: ModuleType, phantoms: Path) -> None:
    truth = json.loads((phantoms / "truth.json").read_text())
    assert truth["evidence"] == ["image"]
    for name, facts in truth["cases"].items():
        tag = {"tag_ct.nii.gz"} if facts["has_tag"] else set()
        files = {"ct.nii.gz", "pet.nii.gz", "lesion_ct.nii.gz", "lesion_pet.nii.gz"} | tag
        assert {file.name for file in (phantoms / name).iterdir()} == files
    written = {file: file.stat().st_mtime_ns for file in phantoms.parent.rglob("*")}
    again = scripts.write_phantom(phantoms.parent, scripts.Phantom("shortcut", n_cases=16))
    assert again == str(phantoms)
    assert written == {file: file.stat().st_mtime_ns for file in phantoms.parent.rglob("*")}


# --- cases --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(phantoms: Path, tmp_path: Path) -> Path:
    """Phantoms that a test may break."""
    return Path(shutil.copytree(phantoms, tmp_path / "broken"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the datalist; what is changed first is phantom009, the first case to train on."""
    file = folder / "datalist.json"
    datalist = json.loads(file.read_text())
    change(datalist)
    file.write_text(json.dumps(datalist))


def test_datalist_says_who_trains_and_who_is_held_out(scripts: ModuleType, phantoms: Path) -> None:
    train, test = scripts.training_cases(phantoms), scripts.held_out_cases(phantoms)
    assert [case["case_id"] for case in test] == [f"phantom{i:03d}" for i in range(1, 9)]
    assert [case["case_id"] for case in train] == [f"phantom{i:03d}" for i in range(9, 17)]
    assert sum(case["label"] for case in train) == sum(case["label"] for case in test) == 4


def test_crop_is_around_the_ct_unless_the_datalist_names_a_point(scripts: ModuleType, broken: Path) -> None:
    ct = nibabel.load(broken / "phantom009" / "ct.nii.gz")
    case = scripts.training_cases(broken)[0]
    np.testing.assert_allclose(case["center_mm"], _middle(ct.dataobj, ct.affine), atol=1e-3)
    _edit(broken, lambda datalist: datalist["training"][0].update(center_mm=[12, -3, 20.5]))
    assert scripts.training_cases(broken)[0]["center_mm"].tolist() == [12, -3, 20.5]


def test_folder_without_datalist_is_refused_with_the_cure(scripts: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no datalist\.json\. Write one, .*docs/README\.md"):
        scripts.training_cases(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["training"][0].pop("pet"), r'phantom009: has no PET \("pet" is None in datalist\.json\)'),
        (lambda d: d["training"][0].pop("image"), r'phantom009: has no CT \("image" is None'),
        (lambda d: d["training"][0].pop("label"), r"phantom009: has no label .* must be 0 \(benign\) or 1 \(malig"),
        (lambda d: d["training"][0].update(label=2), r"phantom009: has label=2 in datalist\.json"),
        (lambda d: d["training"][0].update(label="1"), r"phantom009: has label='1'"),
        (lambda d: d["training"][0].update(case_id="a/b"), r"Case 0 under 'training' .* has case_id='a/b'"),
        (lambda d: d["training"][0].update(case_id="phantom001"), "phantom001: more than one case"),
        (lambda d: d["training"][0].update(center_mm=[1, 2]), r"phantom009: center_mm=\[1, 2\] .* three numbers"),
        (lambda d: d["training"][0].update(center_mm=[500, 0, 0]), r"center_mm, \(500, 0, 0\) mm, is not in both"),
        (lambda d: d.update(training=[]), r'has no case under "training"'),
        (lambda d: d.update(training="all"), "is no list of cases for training and testing"),
        (lambda d: [case.update(label=1) for case in d["training"]], "All 8 cases .* are malignant"),
    ],
    ids=[
        "no PET", "no CT", "no label", "unknown class", "text", "name", "twice", "center", "far center",
        "no cases", "no list", "one class",
    ],
)  # fmt: skip
def test_bad_datalist_is_refused_by_case_and_cure(
    scripts: ModuleType, broken: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    _edit(broken, change)
    with pytest.raises(ValueError, match=message):
        scripts.training_cases(broken)


def _collapse(file: Path) -> None:
    image = nibabel.load(file)
    header = image.header.copy()
    header["qform_code"], header["sform_code"] = 0, 2
    header["srow_y"] = 0.0
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), None, header), file)


def _move(file: Path, x_mm: float) -> None:
    image = nibabel.load(file)
    affine = image.affine.copy()
    affine[0, 3] += x_mm
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), affine), file)


def _stack(file: Path) -> None:
    image = nibabel.load(file)
    voxels = np.stack([np.asanyarray(image.dataobj)] * 2, axis=-1)
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (Path.unlink, FileNotFoundError, r"its PET is missing, expected in .*phantom009/pet\.nii\.gz"),
        (lambda file: file.write_text("not found"), ValueError, "its PET is no readable NIfTI file"),
        (_collapse, ValueError, "the affine of its PET is singular"),
        (_stack, ValueError, r"its PET has shape \(32, 26, 28, 2\), expected three axes"),
        (
            lambda file: _move(file, 400),
            ValueError,
            r"CT and PET have no place in common \(CT covers x -\d+ to \d+, .* PET covers x 3\d\d to",
        ),
        (
            lambda file: _move(file, 120),
            ValueError,
            r'the middle of its CT, .* is not in both scans .*"center_mm": \[x, y, z\]',
        ),
    ],
    ids=["missing", "unreadable", "singular", "four axes", "elsewhere", "beside"],
)
def test_broken_scan_is_refused_before_training(
    scripts: ModuleType, broken: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(broken / "phantom009" / "pet.nii.gz")
    with pytest.raises(error, match=f"phantom009: {message}"):
        scripts.training_cases(broken)


def _load(scripts: ModuleType, folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = scripts.LoadCased(keys=["image", "pet"])(scripts.training_cases(folder)[0])
    return loaded


def test_swapped_scans_are_named(scripts: ModuleType, broken: Path) -> None:
    _edit(
        broken,
        lambda datalist: datalist["training"][0].update(
            image="phantom009/pet.nii.gz", pet="phantom009/ct.nii.gz"
        ),
    )
    with pytest.raises(
        ValueError, match=r"phantom009: .* does not look like a CT: .* Are CT and PET swapped"
    ):
        _load(scripts, broken)


def _scale(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda voxels: voxels * factor


def _spoil(voxels: np.ndarray) -> np.ndarray:
    voxels = voxels.copy()
    voxels[3, 4, 5] = np.nan
    return voxels


@pytest.mark.parametrize(
    ("scan", "change", "message"),
    [
        ("ct", lambda voxels: voxels + 1024, r"its lowest voxel is \d+, but air has about -1000 HU"),
        ("pet", lambda voxels: voxels - 1000, "its lowest voxel is -1000, but uptake is not negative"),
        ("pet", _scale(3000.0), r"1 % of its voxels exceed \S+, far above any SUV; it is in Bq/ml or counts"),
        ("pet", _spoil, r"phantom009: 1 voxels of its PET, .*pet\.nii\.gz, are NaN or infinite"),
    ],
    ids=["CT without HU", "CT for PET", "PET in Bq/ml", "NaN"],
)
def test_voxels_in_other_units_are_refused(
    scripts: ModuleType, broken: Path, scan: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    file = broken / "phantom009" / f"{scan}.nii.gz"
    image = nibabel.load(file)
    voxels = change(image.get_fdata().astype(np.float32))
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), image.affine), file)
    with pytest.raises(ValueError, match=message):
        _load(scripts, broken)


def test_truncated_file_is_an_error_that_names_the_case(scripts: ModuleType, broken: Path) -> None:
    file = broken / "phantom009" / "pet.nii.gz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(RuntimeError, match=r"phantom009: cannot read its PET, .*pet\.nii\.gz .*truncated"):
        _load(scripts, broken)


def test_label_is_only_needed_to_train_and_to_evaluate(scripts: ModuleType, broken: Path) -> None:
    def strip(datalist: dict[str, Any]) -> None:
        for case in datalist["training"] + datalist["testing"]:
            del case["label"]

    _edit(broken, strip)
    for cases in (scripts.training_cases, scripts.held_out_cases):
        assert all("label" not in case for case in cases(broken, with_label=False))
        with pytest.raises(ValueError, match="has no label"):
            cases(broken)


def test_cases_to_compare_with_are_of_both_classes(scripts: ModuleType, phantoms: Path, broken: Path) -> None:
    drawn = scripts.other_cases(phantoms, 6)
    assert sum(case["label"] for case in drawn) == 3
    names = {case["case_id"] for case in drawn}
    assert len(names) == 6
    assert names <= {case["case_id"] for case in scripts.training_cases(phantoms)}
    assert [case["case_id"] for case in scripts.other_cases(phantoms, 6)] == [
        case["case_id"] for case in drawn
    ]
    _edit(broken, lambda datalist: [case.pop("label") for case in datalist["training"]])
    assert len(scripts.other_cases(broken, 100)) == 8


# --- transforms ---------------------------------------------------------------------------------------------------


def _ball(shape: tuple[int, int, int], step: float, origin: tuple[float, float, float]) -> MetaTensor:
    """A ball of 9 mm around (10, -6, 4) mm on a grid of its own."""
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = origin
    points = np.stack(np.meshgrid(*(np.arange(n) * step for n in shape), indexing="ij")) + np.reshape(
        origin, (3, 1, 1, 1)
    )
    inside = ((points - np.reshape((10, -6, 4), (3, 1, 1, 1))) ** 2).sum(0) < 81
    return MetaTensor(torch.from_numpy(inside[None].astype(np.float32)), affine=torch.from_numpy(affine))


def test_two_grids_are_cropped_around_one_point_of_the_world_and_go_back(scripts: ModuleType) -> None:
    case = {
        "image": _ball((40, 40, 40), 2.0, (-40, -40, -40)),
        "pet": _ball((20, 24, 16), 5.0, (-55, -60, -35)),
        "center_mm": np.array([10.0, -6.0, 4.0]),
    }
    crop = scripts.CropAroundd(keys=["image", "pet"], sizes=[(15, 15, 15), (9, 9, 30)])
    cropped = crop(case)
    assert cropped["image"].shape == (1, 15, 15, 15)
    assert cropped["pet"].shape == (1, 9, 9, 30), "padded where the crop is larger than the scan"
    for name in ("image", "pet"):
        inside = np.argwhere(cropped[name][0].numpy() > 0)
        assert len(inside) == int(case[name].sum()), "the ball is there as a whole"
        middle = cropped[name].affine.numpy() @ [*inside.mean(0), 1]
        np.testing.assert_allclose(middle[:3], (10, -6, 4), atol=1.0)
    whole = crop.inverse(cropped)
    for name in ("image", "pet"):
        assert torch.equal(whole[name].as_tensor(), case[name].as_tensor())
        np.testing.assert_allclose(whole[name].affine, case[name].affine)


def test_scans_go_missing_one_by_one_and_together(scripts: ModuleType) -> None:
    drop = scripts.RandDropScansd(keys=["image", "pet"], prob=0.6).set_random_state(0)
    counts: dict[tuple[bool, bool], int] = {}
    for _ in range(600):
        dropped = drop({"image": torch.ones(1, 2, 2, 2), "pet": torch.ones(1, 3, 3, 3)})
        there = (bool(dropped["image"].any()), bool(dropped["pet"].any()))
        counts[there] = counts.get(there, 0) + 1
    assert 200 < counts[True, True] < 280
    assert all(90 < counts[there] < 150 for there in ((True, False), (False, True), (False, False)))


# --- the network --------------------------------------------------------------------------------------------------


def test_every_activation_is_a_module_used_once(scripts: ModuleType) -> None:
    network = scripts.LateFusionNet().eval()
    calls: dict[str, int] = {}
    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    assert network(torch.rand(2, 1, *CT_SIZE), torch.rand(2, 1, *PET_SIZE)).shape == (2, 2)
    assert set(calls.values()) == {1}
    assert not any(isinstance(module, nn.ReLU) and module.inplace for module in network.modules())


def test_network_is_independent_of_the_batch(scripts: ModuleType) -> None:
    network = scripts.LateFusionNet().eval()
    ct, pet = torch.rand(3, 1, 16, 12, 12), torch.rand(3, 1, 12, 10, 8)
    alone = torch.cat([network(ct[i : i + 1], pet[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(ct, pet), alone)


# --- the bundle ---------------------------------------------------------------------------------------------------


def test_metadata_passes_verify_metadata(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"  # MONAI downloads it only if it is not there
    schema.write_text(json.dumps(SCHEMA))
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema))


def test_metadata_names_scans_classes_and_the_current_version(scripts: ModuleType) -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    formats = metadata["network_data_format"]
    assert list(formats["inputs"]) == list(scripts.SCANS), "in the order of the network's arguments"
    for key, scan in scripts.SCANS.items():
        assert formats["inputs"][key]["channel_def"] == {"0": scan}
    assert formats["outputs"]["pred"]["channel_def"] == dict(zip("01", scripts.CLASSES, strict=True))
    assert metadata["version"] in metadata["changelog"]
    assert channel_names(BUNDLE) == {"image": ("CT",), "pet": ("PET",)}


def test_network_maps_what_the_metadata_promises(scripts: ModuleType, phantoms: Path) -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.yaml"),
        device="cpu",
        n=32,
        extra_forward_args={"pet": torch.zeros(1, 1, *PET_SIZE)},
        bundle_root=str(BUNDLE),
        dataset_dir=str(phantoms),
    )


def _workflow(kind: str, files: list[str], dataset_dir: Path, root: Path, **settings: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(CONFIGS / file) for file in files],
        workflow_type=kind,
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(dataset_dir),
        ckpt_dir=str(root / "models"),
        output_dir=str(root / "eval"),
        device="$torch.device('cpu')",
        **settings,
    )


@pytest.mark.parametrize(
    ("kind", "files"),
    [("train", ["train.yaml"]), ("train", ["train.yaml", "evaluate.yaml"]), ("infer", ["inference.yaml"])],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)
def test_workflow_has_all_standard_properties(
    scripts: ModuleType, phantoms: Path, tmp_path: Path, kind: str, files: list[str]
) -> None:
    workflow = _workflow(kind, files, phantoms, tmp_path)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_training_and_inference_agree() -> None:
    train, inference = read_config(CONFIGS / "train.yaml"), read_config(CONFIGS / "inference.yaml")
    for name in (
        "network_def", "channels", "prepare_batch", "phantom", "phantom_dir", "plant", "needs_both", "dataset_dir",
        "image_pixdim", "pet_pixdim", "image_size", "pet_size", "image_window", "seed", "ckpt_dir", "output_dir",
    ):  # fmt: skip
        assert train[name] == inference[name], name
    assert train["train::deterministic_transforms"] == inference["preprocessing::transforms"]


def test_training_batch_has_both_scans_in_range(scripts: ModuleType, phantoms: Path, tmp_path: Path) -> None:
    workflow = _workflow("train", ["train.yaml"], phantoms, tmp_path, missing_scans=0.0)
    workflow.initialize()
    batch = next(iter(workflow.parser.get_parsed_content("train::dataloader")))
    assert batch["image"].shape == (8, 1, *CT_SIZE)
    assert batch["pet"].shape == (8, 1, *PET_SIZE)
    assert batch["label"].tolist() == [
        json.loads((phantoms / "truth.json").read_text())["cases"][name]["label"] for name in batch["case_id"]
    ]
    for name, highest in (("image", 1.0), ("pet", 2.0)):
        assert float(batch[name].min()) >= 0
        assert 0.9 < float(batch[name].max()) <= highest, name


@pytest.fixture
def untrained(scripts: ModuleType, tmp_path: Path) -> Path:
    """A folder with the weights of a network that has learned nothing."""
    (tmp_path / "models").mkdir()
    torch.save({"model": scripts.LateFusionNet().state_dict()}, tmp_path / "models" / "model.pt")
    return tmp_path


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_inference_writes_a_table_of_probabilities(
    scripts: ModuleType, phantoms: Path, untrained: Path
) -> None:
    workflow = _workflow("infer", ["inference.yaml"], phantoms, untrained)
    workflow.initialize()
    workflow.run()
    rows = _table(untrained / "eval" / "predictions.csv")
    truth = json.loads((phantoms / "truth.json").read_text())["cases"]
    assert [row["case_id"] for row in rows] == [f"phantom{i:03d}" for i in range(1, 9)]
    for row in rows:
        benign, malignant = float(row["probability_benign"]), float(row["probability_malignant"])
        assert benign + malignant == pytest.approx(1, abs=2e-4)
        assert row["predicted"] == ("malignant" if malignant > benign else "benign")
        assert row["label"] == scripts.CLASSES[truth[row["case_id"]]["label"]]


def test_inference_without_a_trained_network_says_what_to_do(
    scripts: ModuleType, phantoms: Path, tmp_path: Path
) -> None:
    workflow = _workflow("infer", ["inference.yaml"], phantoms, tmp_path)
    workflow.initialize()
    with pytest.raises(RuntimeError) as refused:
        workflow.run()
    assert "There is no trained network in" in str(refused.value.__cause__)


@pytest.mark.parametrize(("key", "scan"), [("image", "ct"), ("pet", "pet")])
def test_map_of_each_scan_goes_back_to_its_own_grid(
    scripts: ModuleType, phantoms: Path, untrained: Path, key: str, scan: str
) -> None:
    parser = _workflow("infer", ["inference.yaml"], phantoms, untrained).parser
    batch = next(iter(parser.get_parsed_content("dataloader")))
    # As the explanation overlay does it.
    preprocessing = parser.get_parsed_content("preprocessing")
    invert = Invertd("map", preprocessing, orig_keys=key, nearest_interp=False, to_tensor=True)
    back = invert(decollate_batch({**batch, "map": batch[key].clone()})[0])["map"]
    stored = nibabel.load(phantoms / "phantom001" / f"{scan}.nii.gz")
    assert back.shape == (1, *stored.shape)
    np.testing.assert_allclose(back.affine, stored.affine, atol=1e-4)
    middle = tuple(slice(n // 4, -n // 4) for n in stored.shape)
    assert np.corrcoef(back[0][middle].ravel(), np.asarray(stored.dataobj)[middle].ravel())[0, 1] > 0.8


# --- end to end, through MONAI's own command line -------------------------------------------------------------------

EXPLAIN = ["configs/inference.yaml", "configs/explain.yaml"]


_run = partial(run_bundle, BUNDLE)


def _tags(folder: Path, kind: str) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: set[str] = set()
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        found |= set(events.Tags()[kind])
    return found


@pytest.mark.slow
def test_explanation_asks_every_case_and_maps_the_first_two(phantoms: Path, untrained: Path) -> None:
    output = untrained / "eval"
    _run(EXPLAIN, dataset_dir=phantoms, ckpt_dir=untrained / "models", output_dir=output, n_others=3)
    rows = _table(output / "modalities" / "modalities.csv")
    assert sorted({row["case"] for row in rows}) == [f"phantom{i:03d}" for i in range(1, 9)]
    assert {(row["baseline"], row["modality"]) for row in rows} == {
        (baseline, scan) for baseline in ("missing", "others") for scan in ("CT", "PET")
    }
    assert max(abs(float(row["residual"])) for row in rows) < 1e-5
    for case in ("phantom001", "phantom002"):
        for scan in ("ct", "pet"):
            drawn = nibabel.load(output / case / f"{case}_attribution_{scan}.nii.gz")
            stored = nibabel.load(phantoms / case / f"{scan}.nii.gz")
            assert drawn.shape == stored.shape
            np.testing.assert_allclose(drawn.affine, stored.affine, atol=1e-4)
    assert not (output / "phantom003").exists()
    pictures = _tags(output / "attribution", "images")
    assert {"scans/phantom001/missing/waterfall", "scans/cohort/others/values"} <= pictures
    assert {tag for tag in pictures if tag.endswith("/planes")}


@pytest.mark.slow
def test_bundle_trains_and_evaluates(phantoms: Path, tmp_path: Path) -> None:
    settings = {"dataset_dir": phantoms, "ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "eval"}
    _run(["configs/train.yaml"], epochs=2, val_interval=1, **settings)
    assert (tmp_path / "models" / "model.pt").is_file()
    assert {"train_loss", "val_accuracy", "val_auc"} <= _tags(tmp_path / "eval", "scalars")

    said = _run(["configs/train.yaml", "configs/evaluate.yaml"], **settings)
    rows = _table(tmp_path / "eval" / "evaluation.csv")
    accuracy = np.mean([row["predicted"] == row["label"] for row in rows])
    assert f"Accuracy: {accuracy:.3f}, AUC: " in said
    assert (tmp_path / "eval" / "metrics.csv").is_file()


@pytest.mark.slow
def test_network_learns_what_neither_scan_tells_alone(tmp_path: Path) -> None:
    settings = {
        "plant": "xor",
        "phantom_dir": tmp_path,
        "ckpt_dir": tmp_path / "models",
        "output_dir": tmp_path,
    }
    said = _run(["configs/train.yaml"], **settings, epochs=20, val_interval=20)
    assert float(re.findall(r"val_accuracy: ([\d.]+)", said)[-1]) >= 0.9

    _run(EXPLAIN, **settings, n_others=2, **{"explain_handler::cases": 1})
    rows = _table(tmp_path / "modalities" / "modalities.csv")
    rows = [row for row in rows if (row["baseline"], row["modality"]) == ("missing", "CT")]
    way = np.array([float(row["score"]) - float(row["baseline_score"]) for row in rows])
    alone = np.mean([float(row["single_gain"]) for row in rows] * np.sign(way))
    together = np.mean([float(row["interaction with PET"]) for row in rows] * np.sign(way))
    assert abs(alone) < 0.2 * np.abs(way).mean(), "the CT alone tells nothing"
    assert together > 0.8 * np.abs(way).mean(), "what it does, it does together with the PET"
