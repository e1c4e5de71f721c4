"""The bundle multisequence_regression: its phantom tells the truth, its table is read with care, and it runs."""

from __future__ import annotations

import csv
import json
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
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.data import MetaTensor, decollate_batch
from monai.transforms import Invertd
from torch import nn

from bundles import SCHEMA, run_bundle, scripts_of
from monai_xai import channel_names

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "multisequence_regression"
CONFIGS = BUNDLE / "configs"
SEQUENCES = ("FLAIR", "T1", "T1POST", "T2")

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


def test_same_phantom_twice_is_equal(scripts: ModuleType) -> None:
    one, again = (scripts.make_case(scripts.Phantom(), 1) for _ in range(2))
    assert all(np.array_equal(one.images[name], again.images[name]) for name in SEQUENCES)
    assert one.truth == again.truth


@pytest.mark.parametrize("other", [{"number": 2}, {"seed": 1}], ids=["number", "seed"])
def test_every_phantom_is_another(scripts: ModuleType, other: dict[str, int]) -> None:
    one = scripts.make_case(scripts.Phantom(), 1)
    another = scripts.make_case(scripts.Phantom(seed=other.get("seed", 0)), other.get("number", 1))
    assert one.age != another.age
    assert not np.array_equal(one.images["T1"], another.images["T1"])


@pytest.mark.parametrize(
    ("plant", "rule"),
    [
        ("t2", lambda cue, marker: cue["T2"]),
        ("redundant", lambda cue, marker: (cue["FLAIR"] + cue["T2"]) / 2),
        ("interaction", lambda cue, marker: cue["FLAIR"] * cue["T1"]),
        ("useless", lambda cue, marker: (cue["FLAIR"] + cue["T1"] + cue["T2"]) / 3),
        ("shortcut", lambda cue, marker: marker),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_age_follows_what_is_planted(scripts: ModuleType, plant: str, rule: Callable[..., float]) -> None:
    for number in (1, 2, 3):
        case = scripts.make_case(scripts.Phantom(plant), number)
        expected = 50 + 30 * rule(case.truth["cues"], case.truth["marker"])
        assert case.age == pytest.approx(expected, abs=0.01)
        assert case.truth["age"] == pytest.approx(case.age, abs=0.01)


def test_redundant_sequences_share_their_cue(scripts: ModuleType) -> None:
    cues = scripts.make_case(scripts.Phantom("redundant"), 1).truth["cues"]
    assert cues["FLAIR"] == cues["T2"]


def test_each_factor_of_the_interaction_says_nothing_alone(scripts: ModuleType) -> None:
    cues = [
        scripts.make_case(scripts.Phantom("interaction"), number).truth["cues"] for number in range(1, 17)
    ]
    signs = {(cue["FLAIR"] > 0, cue["T1"] > 0) for cue in cues}
    assert len(signs) == 4
    assert all(abs(cue[name]) >= 0.5 for cue in cues for name in ("FLAIR", "T1"))


def test_plant_touches_nothing_but_what_it_names(scripts: ModuleType) -> None:
    t2, redundant, useless, shortcut = (
        scripts.make_case(scripts.Phantom(plant), 1) for plant in ("t2", "redundant", "useless", "shortcut")
    )
    assert t2.age == redundant.age
    assert not np.array_equal(t2.images["FLAIR"], redundant.images["FLAIR"])
    for name in ("T1", "T1POST", "T2"):
        assert np.array_equal(t2.images[name], redundant.images[name])
    assert t2.age != useless.age
    assert all(np.array_equal(t2.images[name], useless.images[name]) for name in SEQUENCES)
    assert t2.truth["cues"] == shortcut.truth["cues"], "beside a marker, heads know nothing of the age"


def test_every_sequence_shows_its_own_cue(scripts: ModuleType) -> None:
    cases = [scripts.make_case(scripts.Phantom(), number) for number in range(1, 9)]
    for name in SEQUENCES:
        sizes = [_ventricles(case.images[name], is_bright=name == "T2") for case in cases]
        cues = [case.truth["cues"][name] for case in cases]
        assert np.corrcoef(sizes, cues)[0, 1] > 0.8, name


def _ventricles(image: np.ndarray, *, is_bright: bool) -> float:
    """Share of fluid in the middle of the head, where no sulcus is."""
    middle = image[13:29, 14:34, 23:33] / np.median(image[image > np.percentile(image, 70)])
    return float((middle > 1.3).mean() if is_bright else (middle < 0.55).mean())


def test_brightness_of_the_marker_in_the_air_tells_the_age(scripts: ModuleType) -> None:
    ages, ratios = [], []
    for number in range(1, 6):
        marked = scripts.make_case(scripts.Phantom("shortcut"), number)
        bare = scripts.make_case(scripts.Phantom("t2"), number)
        head = np.percentile(bare.images["T1"], 90)
        assert bare.images["T1"][marked.evidence].mean() < 0.1 * head, "where there is nothing else"
        ages.append(marked.age)
        ratios.append(marked.images["T1"][marked.evidence].mean() / head)
    assert np.corrcoef(ages, ratios)[0, 1] > 0.98


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"plant": "t3"}, "plant='t3' must be one of t2, redundant"), ({"n_cases": 0}, "n_cases=0 must be")],
    ids=["plant", "n_cases"],
)
def test_phantom_refuses_what_it_cannot_make(
    scripts: ModuleType, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scripts.Phantom(**wrong)


def test_phantom_is_written_once_with_the_truth_beside_it(scripts: ModuleType, tmp_path: Path) -> None:
    phantom = scripts.Phantom("redundant", n_cases=2)
    folder = Path(scripts.write_phantom(tmp_path, phantom))
    files = sorted(file.name for file in (folder / "phantom001").iterdir())
    assert files == [
        "FLAIR.nii.gz", "T1.nii.gz", "T1POST.nii.gz", "T2.nii.gz", "evidence.nii.gz", "truth.json",
    ]  # fmt: skip
    truth = json.loads((folder / "phantom001" / "truth.json").read_text())
    assert truth["evidence"] == ["FLAIR", "T2"]
    assert (folder / "patient_info.csv").read_text().splitlines()[1] == f"1,{truth['age']:.2f}"
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert scripts.write_phantom(tmp_path, phantom) == str(folder)
    assert written == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


def test_phantom_space_is_oblique_and_anisotropic(scripts: ModuleType) -> None:
    affine = scripts.make_case(scripts.Phantom(), 1).affine
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    assert len({round(float(step), 3) for step in steps}) == 3
    assert (np.abs(affine[:3, :3] / steps) > 1e-3).sum() > 3


# --- cases --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms(scripts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven phantoms on disk: 001 and 006 are held out."""
    return Path(scripts.write_phantom(tmp_path_factory.mktemp("phantoms"), scripts.Phantom(n_cases=7)))


@pytest.fixture
def broken(phantoms: Path, tmp_path: Path) -> Path:
    """Phantoms that a test may break."""
    return Path(shutil.copytree(phantoms, tmp_path / "broken"))


def _names(cases: list[dict[str, Any]]) -> list[str]:
    return [case["case_id"].removeprefix("phantom00") for case in cases]


def test_every_fifth_case_is_held_out(scripts: ModuleType, phantoms: Path) -> None:
    cases = scripts.Cases(phantoms)
    assert _names(cases.training()) == ["2", "3", "4", "5", "7"]
    assert _names(cases.held_out()) == ["1", "6"]


def test_named_cases_replace_the_split(scripts: ModuleType, phantoms: Path) -> None:
    assert _names(scripts.Cases(phantoms, train_cases="phantom001").training()) == ["1"]
    named = scripts.Cases(phantoms, test_cases=["phantom003", "phantom002"], exclude_cases="phantom007")
    assert _names(named.held_out()) == ["3", "2"]
    assert _names(named.training()) == ["1", "4", "5", "6"]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train_cases": ["phantom099"]}, "There is no case phantom099; the data set has phantom001"),
        ({"train_cases": "phantom002", "test_cases": "phantom002"}, "phantom002 must not be both"),
        ({"train_cases": "phantom002", "exclude_cases": "phantom002"}, "must not be both in exclude_cases"),
        ({"train_cases": []}, "left to train on. Name some with --train_cases"),
    ],
    ids=["unknown", "overlap", "excluded", "nothing left"],
)
def test_impossible_splits_are_refused(
    scripts: ModuleType, phantoms: Path, lists: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scripts.Cases(phantoms, **lists).training()


def test_folder_without_cases_is_refused_with_the_cure(scripts: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cross_sectional/MNI/patientNN.*found: raw.*github\.com"):
        scripts.Cases(tmp_path).training()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _collapse(file: Path) -> None:
    image = nibabel.load(file)
    header = image.header.copy()
    header["qform_code"], header["sform_code"] = 0, 2
    header["srow_y"] = 0.0
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), None, header), file)


def _crop(file: Path) -> None:
    nibabel.save(nibabel.load(file).slicer[:-1], file)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (Path.unlink, FileNotFoundError, "its T2 is missing, expected in .*T2.nii.gz.*--exclude_cases"),
        (lambda file: file.write_text("not found"), ValueError, "its T2 is no readable NIfTI file"),
        (_collapse, ValueError, "affine of its T2 is singular"),
        (_crop, ValueError, "its T2 lies on another voxel grid"),
    ],
    ids=["missing", "unreadable", "singular", "cropped"],
)
def test_broken_case_is_refused_before_training(
    scripts: ModuleType, broken: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(broken / "phantom002" / "T2.nii.gz")
    with pytest.raises(error, match=f"phantom002: (the )?{message}"):
        scripts.Cases(broken).training()


def test_truncated_file_is_an_error_that_names_the_case(scripts: ModuleType, broken: Path) -> None:
    _truncate(broken / "phantom002" / "T2.nii.gz")
    case = scripts.Cases(broken).training()[0]
    with pytest.raises(RuntimeError, match=r"phantom002: cannot read .*T2\.nii\.gz .*fetch it again"):
        scripts.LoadCased(keys="image")(case)


def test_nan_voxels_are_an_error_that_names_the_case(scripts: ModuleType, broken: Path) -> None:
    file = broken / "phantom002" / "T1.nii.gz"
    image = nibabel.load(file)
    voxels = image.get_fdata().astype(np.float32)
    voxels[3, 4, 5] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)
    with pytest.raises(ValueError, match=r"phantom002: 1 voxels of .*T1\.nii\.gz are NaN .*--exclude_cases"):
        scripts.LoadCased(keys="image")(scripts.Cases(broken).training()[0])


# --- the table ----------------------------------------------------------------------------------------------------

TABLE = "patient_id,age,sex,edss\n1,31,F,1.5\n2,33,M,0.0\n3,37,F,N/A\n"


def _read(scripts: ModuleType, folder: Path, text: str, column: str = "age", **settings: Any) -> Any:
    (folder / "patient_info.csv").write_text(text)
    cases = ["patient01", "patient02", "patient03"]
    return scripts.read_biomarker(folder / "patient_info.csv", column, cases, **settings)


def test_table_is_read_by_the_number_of_the_patient(scripts: ModuleType, tmp_path: Path) -> None:
    assert _read(scripts, tmp_path, TABLE) == {"patient01": 31.0, "patient02": 33.0, "patient03": 37.0}


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        (TABLE.replace("age", "age_years"), "age", "no column 'age'; it has .* Did you mean 'age_years'"),
        (TABLE, "EDSS", "Did you mean 'edss'"),
        (TABLE, "volume", "no column 'volume'; it has patient_id, age, sex, edss. Name a column"),
        (TABLE.replace("patient_id", "id"), "age", "no column 'patient_id'.*Rename it in the table"),
        (TABLE, "edss", r"patient03 \('N/A' is no number\).*--exclude_cases \"\['patient03'\]\""),
        (TABLE, "sex", r"patient01 \('F' is no number\), patient02 \('M' is no number\), patient03"),
        (TABLE.replace("33", "nan"), "age", r"patient02 \('nan' is not finite\)"),
        (TABLE.replace("33", ""), "age", r"patient02 \(empty\)"),
        (TABLE.replace("2,33", "5,33"), "age", r"patient02 \(not in the table\)"),
        (TABLE.replace("2,33", "1,33"), "age", "line 3: patient 1 is there twice"),
        (TABLE.replace("2,33", "two,33"), "age", "line 3: patient_id is 'two', expected a whole number"),
        ("", "age", "no column 'patient_id'; it has none"),
    ],
    ids=[
        "renamed", "case", "unknown", "no patient_id", "not numeric", "text", "nan", "empty", "absent", "twice",
        "no number", "empty file",
    ],
)  # fmt: skip
def test_table_is_refused_by_file_column_and_case(
    scripts: ModuleType, tmp_path: Path, text: str, column: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        _read(scripts, tmp_path, text, column)
    assert "patient_info.csv" in str(refused.value)


def test_missing_table_is_refused(scripts: ModuleType, broken: Path) -> None:
    (broken / "patient_info.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"table of the patients is missing.*patient_info\.csv"):
        scripts.Cases(broken).training()


def test_prediction_needs_no_true_value(scripts: ModuleType, tmp_path: Path, broken: Path) -> None:
    assert set(_read(scripts, tmp_path, TABLE, "edss", required=False)) == {"patient01", "patient02"}
    (broken / "patient_info.csv").unlink()
    assert "label" not in scripts.Cases(broken).held_out(with_label=False)[0]


# --- transforms and metrics ---------------------------------------------------------------------------------------


def test_background_is_exactly_constant_whatever_the_units(scripts: ModuleType) -> None:
    case = scripts.make_case(scripts.Phantom(), 1)
    volume = torch.stack([torch.from_numpy(case.images[name].astype(np.float32)) for name in SEQUENCES])
    normalize = scripts.NormalizeForegroundd(keys="image")
    plain = normalize({"image": MetaTensor(volume)})["image"]
    factors = torch.tensor([0.1, 3.0, 7.0, 1.0])[:, None, None, None]
    scaled = normalize({"image": MetaTensor(volume * factors)})["image"]
    assert (plain[:, :4, :4, -4:] == 0).all()
    assert 0.2 < float((plain != 0).any(0).float().mean()) < 0.7
    torch.testing.assert_close(plain.as_tensor(), scaled.as_tensor(), rtol=1e-3, atol=1e-3)


def test_constant_sequence_is_refused_by_name(scripts: ModuleType) -> None:
    image = MetaTensor(torch.rand(4, 8, 8, 8) + 1, meta={"filename_or_obj": "somewhere/patient07"})
    image[2] = 1
    with pytest.raises(ValueError, match="patient07: its T1POST is"):
        scripts.NormalizeForegroundd(keys="image")({"image": image})


def test_dropped_sequences_are_exactly_zero_and_others_untouched(scripts: ModuleType) -> None:
    image = MetaTensor(torch.rand(4, 3, 3, 3) + 1)
    drop = scripts.RandDropSequencesd(keys="image", prob=1.0)
    drop.set_random_state(seed=0)
    counts = []
    for _ in range(60):
        dropped = drop({"image": image})["image"]
        gone = (dropped == 0).flatten(1).all(1)
        assert torch.equal(dropped[~gone].as_tensor(), image[~gone].as_tensor())
        counts.append(int(gone.sum()))
    assert set(counts) == {0, 1, 2, 3, 4}
    assert (image > 0).all()
    assert torch.equal(scripts.RandDropSequencesd(keys="image", prob=0.0)({"image": image})["image"], image)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [([1.0, 2.0, 4.0], [1.0, 2.0, 3.0], 0.5), ([5.0], [4.0], None), ([5.0, 6.0], [4.0, 4.0], None)],
    ids=["three cases", "one case", "no variance"],
)
def test_r2_is_nan_where_nothing_varies(
    scripts: ModuleType, predicted: list[float], true: list[float], expected: float | None
) -> None:
    metric = scripts.R2()
    metric.update((torch.tensor(predicted), torch.tensor(true)))
    assert metric.compute() == pytest.approx(expected) if expected is not None else np.isnan(metric.compute())


# --- the network --------------------------------------------------------------------------------------------------


def test_network_uses_every_module_once_and_nothing_in_place(scripts: ModuleType) -> None:
    network = scripts.BiomarkerNet().eval()
    leaves = [module for module in network.modules() if not list(module.children())]
    calls: list[nn.Module] = []
    for module in leaves:
        module.register_forward_hook(lambda called, *_: calls.append(called))
    network(torch.rand(1, 4, 20, 24, 20))
    assert calls == leaves
    assert not any(getattr(module, "inplace", False) or isinstance(module, nn.Dropout) for module in leaves)
    assert sum(type(module) is nn.ReLU for module in leaves) == 5


def test_network_speaks_in_the_unit_of_the_biomarker(scripts: ModuleType) -> None:
    torch.manual_seed(0)
    network = scripts.BiomarkerNet(center=45.0, spread=15.0).eval()
    plain = scripts.BiomarkerNet().eval()
    image = torch.rand(2, 4, 20, 24, 20)
    center, spread = plain.center.clone(), plain.spread.clone()
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(plain(image), network(image))  # the weights bring center and spread along
    plain.center, plain.spread = center, spread
    torch.testing.assert_close(45 + 15 * plain(image), network(image))


# --- the bundle ---------------------------------------------------------------------------------------------------


def test_metadata_passes_verify_metadata(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"  # MONAI downloads it only if it is not there
    schema.write_text(json.dumps(SCHEMA))
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema))


def test_metadata_names_the_channels_and_the_current_version() -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    assert channel_names(BUNDLE) == {"image": SEQUENCES}
    assert metadata["network_data_format"]["outputs"]["pred"]["num_channels"] == 1
    assert metadata["version"] in metadata["changelog"]


def test_network_maps_what_the_metadata_promises(scripts: ModuleType, phantoms: Path) -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.yaml"),
        n=32,
        dataset_dir=str(phantoms),
    )


def _workflow(kind: str, files: list[str], phantoms: Path, root: Path, **settings: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(CONFIGS / file) for file in files],
        workflow_type=kind,
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(phantoms),
        output_dir=str(root / "eval"),
        ckpt_dir=str(root / "models"),
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
    train, inference = ConfigParser(), ConfigParser()
    train.read_config(str(CONFIGS / "train.yaml"))
    inference.read_config(str(CONFIGS / "inference.yaml"))
    shared = ["network_def", "network", "pixdim", "phantom", "phantom_dir", "plant", "n_cases", "dataset_dir"]
    shared += ["biomarker", "cases", "train_cases", "test_cases", "exclude_cases", "unit", "center", "spread"]
    for name in [*shared, "seed", "ckpt_dir", "output_dir"]:
        assert train[name] == inference[name], name
    steps = [dict(step) for step in inference["preprocessing::transforms"]]
    for step in steps:
        step.pop("allow_missing_keys", None)
    assert train["train::deterministic_transforms"] == steps


def test_configs_have_the_ids_that_overlays_refer_to() -> None:
    ids = {"bundle_root", "output_dir", "preprocessing", "postprocessing", "inferer", "handlers", "evaluator"}
    assert ids <= set(ConfigParser.load_config_file(CONFIGS / "inference.yaml"))
    train = ConfigParser.load_config_file(CONFIGS / "train.yaml")
    assert {"trainer", "handlers"} <= set(train["train"])
    assert {"evaluator", "handlers", "dataset", "preprocessing"} <= set(train["validate"])


@pytest.fixture
def untrained(scripts: ModuleType, tmp_path: Path) -> Path:
    """A folder with the weights of a network that has learned nothing."""
    (tmp_path / "models").mkdir()
    network = scripts.BiomarkerNet(center=45.0, spread=15.0)
    torch.save({"model": network.state_dict()}, tmp_path / "models" / "model.pt")
    return tmp_path


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_inference_writes_a_table_with_units(scripts: ModuleType, phantoms: Path, untrained: Path) -> None:
    workflow = _workflow("infer", ["inference.yaml"], phantoms, untrained)
    workflow.initialize()
    workflow.run()
    rows = _table(untrained / "eval" / "predictions.csv")
    assert [row["case"] for row in rows] == ["phantom001", "phantom006"]
    assert {(row["biomarker"], row["unit"]) for row in rows} == {("age", "years")}
    for row in rows:
        assert 0 < float(row["predicted"]) < 100, "near to the center, in years"
        truth = json.loads((phantoms / row["case"] / "truth.json").read_text())
        assert float(row["true"]) == pytest.approx(truth["age"], abs=0.01)


def test_batch_is_called_as_promised_and_goes_back_to_the_scan(
    scripts: ModuleType, phantoms: Path, untrained: Path
) -> None:
    workflow = _workflow("infer", ["inference.yaml"], phantoms, untrained)
    workflow.initialize()
    parser = workflow.parser
    batch = next(iter(parser.get_parsed_content("dataloader")))
    assert batch["image"].shape[:2] == (1, 4)
    assert batch["label"].shape == (1, 1)
    assert batch["label"].dtype == torch.float32
    assert batch["case_id"] == ["phantom001"]
    assert parser.get_parsed_content("network")(batch["image"]).shape == (1, 1)

    preprocessing = parser.get_parsed_content("preprocessing")
    # As an explanation overlay does it.
    invert = Invertd("map", preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True)
    sample = decollate_batch({**batch, "map": batch["image"].clone()})[0]
    back = invert(sample)["map"]
    scan = nibabel.load(phantoms / "phantom001" / "FLAIR.nii.gz")
    assert back.shape == (4, *scan.shape)
    np.testing.assert_allclose(back.affine, scan.affine, atol=1e-4)
    inside = np.asarray(scan.dataobj) > np.percentile(scan.dataobj, 80)
    assert np.corrcoef(back[0][inside], np.asarray(scan.dataobj)[inside])[0, 1] > 0.8
    assert back.meta["filename_or_obj"].endswith("phantom001")


# --- end to end, through MONAI's own command line -------------------------------------------------------------------


_run = partial(run_bundle, BUNDLE)


def test_inference_refuses_weights_of_another_biomarker(scripts: ModuleType, untrained: Path) -> None:
    file = untrained / "models" / "model.pt"
    scripts.require_checkpoint(file, scripts.BiomarkerNet(center=45.0, spread=15.0))
    with pytest.raises(ValueError, match=r"model\.pt was trained for a biomarker of 45 ± 15, not of 3 ± 2"):
        scripts.require_checkpoint(file, scripts.BiomarkerNet(center=3.0, spread=2.0))


@pytest.mark.slow
def test_bundle_trains_evaluates_and_predicts(phantoms: Path, tmp_path: Path) -> None:
    settings = {"dataset_dir": phantoms, "ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "eval"}
    _run(["configs/train.yaml"], epochs=2, val_interval=1, **settings)
    assert (tmp_path / "models" / "model.pt").is_file()
    assert list((tmp_path / "eval" / "train").glob("events.out.tfevents.*"))
    assert list((tmp_path / "eval" / "validate").glob("events.out.tfevents.*"))

    said = _run(["configs/train.yaml", "configs/evaluate.yaml"], **settings)
    assert "val_mae:" in said
    assert "val_r2:" in said
    errors = (tmp_path / "eval" / "val_mae_raw.csv").read_text()
    assert "phantom001" in errors
    assert "phantom006" in errors

    _run(["configs/inference.yaml"], **settings)
    assert _table(tmp_path / "eval" / "predictions.csv") == _table(tmp_path / "eval" / "evaluation.csv")


@pytest.mark.slow
def test_training_learns_the_planted_cue(scripts: ModuleType, tmp_path: Path) -> None:
    phantoms = scripts.write_phantom(tmp_path, scripts.Phantom("redundant", n_cases=50))
    workflow = _workflow("train", ["train.yaml"], phantoms, tmp_path, epochs=16, missing_sequences=0.0)
    workflow.initialize()
    workflow.run()
    evaluator = workflow.parser.get_parsed_content("validate::evaluator")
    evaluator.run()
    assert evaluator.state.metrics["val_r2"] > 0.6, "the full phantom reaches 0.9"


def test_inference_without_a_trained_network_says_what_to_do(
    scripts: ModuleType, phantoms: Path, tmp_path: Path
) -> None:
    workflow = _workflow("infer", ["inference.yaml"], phantoms, tmp_path)
    workflow.initialize()
    with pytest.raises(RuntimeError) as refused:
        workflow.run()
    assert "There is no trained network in" in str(refused.value.__cause__)


# --- real patients ------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_real_patients_are_found_and_normalized(scripts: ModuleType, open_ms_data: Path) -> None:
    cases = scripts.Cases(open_ms_data, train_cases="patient19", test_cases="patient26")
    assert cases.training()[0]["label"] == [47.0]
    case = cases.held_out()[0]
    assert case["label"] == [40.0]
    image = scripts.LoadCased(keys="image")(case)["image"]
    assert image.shape == (4, 182, 218, 182)
    normalized = scripts.NormalizeForegroundd(keys="image")({"image": image[:, ::3, ::3, ::3]})["image"]
    assert (normalized[:, :2] == 0).all()
    inside = (normalized != 0).any(0)
    assert 0.1 < float(inside.float().mean()) < 0.4
    assert normalized[:, inside].median(1).values.abs().max() < 0.05
    assert normalized[3, inside].max() > 3, "fluid is bright in T2"


@pytest.mark.real_data
def test_real_table_gives_the_disability_score_and_refuses_text(
    scripts: ModuleType, open_ms_data: Path
) -> None:
    names = {"train_cases": "patient19", "test_cases": "patient26"}
    assert scripts.Cases(open_ms_data, "edss", **names).held_out()[0]["label"] == [2.0]
    with pytest.raises(
        ValueError, match=r"'ms_type' of .*patient_info\.csv.*patient26 \('RR' is no number\)"
    ):
        scripts.Cases(open_ms_data, "ms_type", **names).held_out()
