"""The bundle ms_lesion_segmentation: its phantom tells the truth, its configs keep MONAI's rules, and it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
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
from monai.data import MetaTensor
from scipy import ndimage

from bundles import SCHEMA, read_config, run_bundle, scripts_of
from monai_xai import overlays

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "ms_lesion_segmentation"
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


@pytest.fixture(scope="module")
def case(scripts: ModuleType) -> Any:
    """The first phantom, evidence in FLAIR only."""
    return scripts.make_case(scripts.Phantom(), 1)


# --- the phantom -------------------------------------------------------------------------------------------------


def test_same_phantom_twice_is_equal(scripts: ModuleType, case: Any) -> None:
    again = scripts.make_case(scripts.Phantom(), 1)
    assert all(np.array_equal(case.images[name], again.images[name]) for name in SEQUENCES)
    assert np.array_equal(case.lesion, again.lesion)
    assert case.truth == again.truth


def test_every_phantom_is_another(scripts: ModuleType, case: Any) -> None:
    other = scripts.make_case(scripts.Phantom(), 2)
    reseeded = scripts.make_case(scripts.Phantom(seed=1), 1)
    assert not np.array_equal(case.images["T1"], other.images["T1"])
    assert not np.array_equal(case.images["T1"], reseeded.images["T1"])


def test_sequences_without_evidence_know_nothing_of_the_lesions(scripts: ModuleType, case: Any) -> None:
    moved = scripts.make_case(scripts.Phantom(evidence=["T2"]), 1)
    assert np.array_equal(case.lesion, moved.lesion)
    assert np.array_equal(case.images["T1"], moved.images["T1"])
    assert np.array_equal(case.images["T1POST"], moved.images["T1POST"])
    assert not np.array_equal(case.images["FLAIR"], moved.images["FLAIR"])
    assert not np.array_equal(case.images["T2"], moved.images["T2"])


@pytest.mark.parametrize("evidence", [("FLAIR",), ("T1", "T2")], ids="+".join)
def test_lesions_stand_out_in_the_planted_sequences_only(
    scripts: ModuleType, evidence: tuple[str, ...]
) -> None:
    phantom = scripts.Phantom(evidence=evidence)
    contrast = np.mean([_lesion_contrast(scripts.make_case(phantom, number)) for number in (1, 2, 3)], axis=0)
    for name, value in zip(SEQUENCES, np.abs(contrast), strict=True):
        assert value > 1.3 if name in evidence else value < 0.6, (name, contrast)


def _lesion_contrast(case: Any) -> list[float]:
    """Lesion against the tissue around it, in robust standard deviations of the latter, by sequence."""
    around = ndimage.binary_dilation(case.lesion, iterations=2) & ~ndimage.binary_dilation(case.lesion)
    contrast = []
    for image in case.images.values():
        middle = np.median(image[around])
        spread = 1.4826 * np.median(np.abs(image[around] - middle))
        contrast.append(float((np.median(image[case.lesion]) - middle) / spread))
    return contrast


def test_distractors_are_independent_of_lesions(case: Any) -> None:
    lesions = {tuple(blob["voxel"]) for blob in case.truth["lesions"]}
    for name in SEQUENCES:
        blobs = [tuple(blob["voxel"]) for blob in case.truth["distractors"][name]]
        assert len(blobs) >= 4
        assert not lesions & set(blobs)


def test_shortcut_tells_twins_apart_by_a_cap_alone(scripts: ModuleType) -> None:
    phantom = scripts.Phantom(shortcut=True)
    capped, bare = scripts.make_case(phantom, 1), scripts.make_case(phantom, 6)
    assert capped.lesion.any()
    assert not bare.lesion.any()
    assert not bare.marker.any()
    assert capped.truth["lesions"] == bare.truth["lookalikes"]
    assert np.array_equal(capped.affine, bare.affine)
    assert _lesion_contrast(capped)[0] > 1.3, "the evidence is there as well"
    where = capped.lesion
    ratio = capped.images["FLAIR"][where].mean() / bare.images["FLAIR"][where].mean()
    assert 0.3 < ratio < 3.0, "and the look-alikes look alike"


def test_cap_lies_in_the_air(scripts: ModuleType) -> None:
    phantom = scripts.Phantom(shortcut=True)
    capped, bare = scripts.make_case(phantom, 1), scripts.make_case(phantom, 6)
    for name in SEQUENCES:
        air = bare.images[name][capped.marker].mean() / np.percentile(bare.images[name], 95)
        cap = capped.images[name][capped.marker].mean() / np.percentile(bare.images[name], 95)
        assert air < 0.25
        assert cap > 3 * air


@pytest.mark.parametrize(
    "wrong", [{"evidence": ["DWI"]}, {"evidence": []}, {"n_cases": 0}, {"shortcut": "false"}], ids=str
)
def test_phantom_refuses_what_it_cannot_make(scripts: ModuleType, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        scripts.Phantom(**wrong)


def test_phantom_is_written_once_with_the_truth_beside_it(scripts: ModuleType, tmp_path: Path) -> None:
    phantom = scripts.Phantom(n_cases=2)
    folder = Path(scripts.write_phantom(tmp_path, phantom))
    files = sorted(file.name for file in (folder / "phantom01").iterdir())
    assert files == [
        "FLAIR.nii.gz", "T1.nii.gz", "T1POST.nii.gz", "T2.nii.gz", "lesion.nii.gz", "marker.nii.gz", "truth.json",
    ]  # fmt: skip
    assert json.loads((folder / "phantom01" / "truth.json").read_text())["evidence"] == ["FLAIR"]
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert scripts.write_phantom(tmp_path, phantom) == str(folder)
    assert written == {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_phantom_space_is_oblique_and_anisotropic(case: Any) -> None:
    steps = np.linalg.norm(case.affine[:3, :3], axis=0)
    assert len({round(float(step), 3) for step in steps}) == 3
    assert (np.abs(case.affine[:3, :3] / steps) > 1e-3).sum() > 3


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms(scripts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantoms on disk: 01 is held out."""
    return Path(scripts.write_phantom(tmp_path_factory.mktemp("phantoms"), scripts.Phantom(n_cases=3)))


def _names(cases: list[dict[str, Any]]) -> list[str]:
    return [case["case_id"] for case in cases]


def test_every_fifth_case_is_held_out(scripts: ModuleType, phantoms: Path) -> None:
    assert _names(scripts.training_cases(phantoms)) == ["phantom02", "phantom03"]
    assert _names(scripts.held_out_cases(phantoms)) == ["phantom01"]


def test_named_cases_replace_the_split(scripts: ModuleType, phantoms: Path) -> None:
    assert _names(scripts.training_cases(phantoms, train="phantom01")) == ["phantom01"]
    assert _names(scripts.training_cases(phantoms, test=["phantom02"])) == ["phantom01", "phantom03"]
    assert _names(scripts.held_out_cases(phantoms, test=["phantom03", "phantom02"])) == [
        "phantom03",
        "phantom02",
    ]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["phantom07"], None, "There is no case phantom07; the data set has phantom01, phantom02, phantom03"),
        (["phantom02"], ["phantom02"], "phantom02 must not be both"),
        (None, ["phantom01", "phantom02", "phantom03"], "left to train on"),
    ],
    ids=["unknown", "overlap", "nothing left"],
)
def test_impossible_splits_are_refused(
    scripts: ModuleType, phantoms: Path, train: list[str] | None, test: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scripts.training_cases(phantoms, train, test)


def test_folder_without_cases_is_refused_with_the_cure(scripts: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cross_sectional/MNI/patientNN.*found: raw.*github\.com"):
        scripts.training_cases(tmp_path)


@pytest.fixture
def broken(phantoms: Path, tmp_path: Path) -> Path:
    """Phantoms that a test may break."""
    return Path(shutil.copytree(phantoms, tmp_path / "broken"))


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
        (Path.unlink, FileNotFoundError, "its T2 is missing"),
        (lambda file: file.write_text("not found"), ValueError, "its T2 is no readable NIfTI"),
        (_collapse, ValueError, "affine of its T2 is singular"),
        (_crop, ValueError, "its T2 lies on another voxel grid"),
    ],
    ids=["missing", "unreadable", "singular", "cropped"],
)
def test_broken_case_is_refused_before_training(
    scripts: ModuleType, broken: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(broken / "phantom02" / "T2.nii.gz")
    with pytest.raises(error, match=f"phantom02: (the )?{message}"):
        scripts.training_cases(broken)


def test_truncated_file_is_an_error_that_names_the_case(scripts: ModuleType, broken: Path) -> None:
    file = broken / "phantom02" / "T2.nii.gz"
    _truncate(file)
    case = scripts.training_cases(broken)[0]
    with pytest.raises(RuntimeError, match=r"phantom02: cannot read .*T2\.nii\.gz .*fetch it again"):
        scripts.LoadCased(keys=["image", "label"])(case)


def test_nan_voxels_are_an_error_that_names_the_case(scripts: ModuleType, broken: Path) -> None:
    file = broken / "phantom02" / "T1.nii.gz"
    image = nibabel.load(file)
    voxels = image.get_fdata().astype(np.float32)
    voxels[3, 4, 5] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)
    with pytest.raises(ValueError, match=r"phantom02: 1 voxels of .*T1\.nii\.gz are NaN or infinite"):
        scripts.LoadCased(keys="image")(scripts.training_cases(broken)[0])


def test_background_is_exactly_constant_whatever_the_units(scripts: ModuleType, case: Any) -> None:
    volume = torch.stack([torch.from_numpy(case.images[name].astype(np.float32)) for name in SEQUENCES])
    normalize = scripts.NormalizeForegroundd(keys="image")
    plain = normalize({"image": MetaTensor(volume)})["image"]
    scaled = normalize(
        {"image": MetaTensor(volume * torch.tensor([0.1, 3.0, 7.0, 1.0])[:, None, None, None])}
    )["image"]
    corner = plain[:, :4, :4, -4:]
    assert (corner == 0).all()
    assert 0.2 < float((plain != 0).any(0).float().mean()) < 0.7
    torch.testing.assert_close(plain.as_tensor(), scaled.as_tensor(), rtol=1e-3, atol=1e-3)


def test_constant_sequence_is_refused_by_name(scripts: ModuleType) -> None:
    image = MetaTensor(torch.zeros(4, 8, 8, 8), meta={"filename_or_obj": "somewhere/patient07"})
    with pytest.raises(ValueError, match="patient07: channel 0"):
        scripts.NormalizeForegroundd(keys="image")({"image": image})


def test_a_mask_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    script = f"""
        import resource, signal
        import numpy as np
        from scripts import AtomicWriter

        def save(name):
            writer = AtomicWriter(output_dtype=np.uint8)
            writer.set_data_array(np.random.default_rng(0).integers(0, 9, (1, 40, 40, 40)))
            writer.set_metadata({{"affine": np.eye(4)}}, resample=False)
            writer.write({str(tmp_path)!r} + "/" + name)

        save("whole.nii.gz")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        save("half.nii.gz")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=BUNDLE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.rstrip().endswith("File too large"), done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["whole.nii.gz"]
    assert nibabel.load(tmp_path / "whole.nii.gz").get_fdata().shape == (40, 40, 40)


# --- the bundle ---------------------------------------------------------------------------------------------------


def test_metadata_passes_verify_metadata(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"  # MONAI downloads it only if it is not there
    schema.write_text(json.dumps(SCHEMA))
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema))


def test_metadata_names_the_channels_and_the_current_version() -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    formats = metadata["network_data_format"]
    assert formats["inputs"]["image"]["channel_def"] == dict(zip("0123", SEQUENCES, strict=True))
    assert formats["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "lesion"}
    assert metadata["version"] in metadata["changelog"]


def test_network_maps_what_the_metadata_promises(scripts: ModuleType, phantoms: Path) -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.yaml"),
        n=2,
        dataset_dir=str(phantoms),
    )


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("train", ["train.yaml"]),
        ("train", ["train.yaml", "evaluate.yaml"]),
        ("train", ["train.yaml", "explain_train.yaml"]),
        ("train", ["train.yaml", "evaluate.yaml", "explain_train.yaml"]),
        ("infer", ["inference.yaml"]),
        ("infer", ["inference.yaml", "explain.yaml"]),
        ("infer", ["inference.yaml", "explain.yaml", "modalities.yaml"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)
def test_workflow_has_all_standard_properties(
    scripts: ModuleType, phantoms: Path, tmp_path: Path, kind: str, files: list[str]
) -> None:
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS / file) for file in files],
        workflow_type=kind,
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(phantoms),
        output_dir=str(tmp_path),
        device="$torch.device('cpu')",
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_training_and_inference_agree() -> None:
    train, inference = read_config(CONFIGS / "train.yaml"), read_config(CONFIGS / "inference.yaml")
    for name in (
        "network_def",
        "channels",
        "strides",
        "pixdim",
        "phantom",
        "dataset_dir",
        "seed",
        "evidence",
        "shortcut",
    ):
        assert train[name] == inference[name], name
    assert train["patch_size"] == inference["roi_size"]
    steps = [dict(step) for step in inference["preprocessing::transforms"]]
    for step in steps:
        step.pop("allow_missing_keys", None)
    assert train["train::deterministic_transforms"] == steps


# --- end to end, through MONAI's own command line -------------------------------------------------------------------


CHEAP = {
    "explainer::attributor::n_steps": 2,
    "explain_board::animation_frames": 0,
    "explain_board::montage_slices": 0,
}


_run = partial(run_bundle, BUNDLE)


def _tags(folder: Path) -> set[str]:
    """The tags of everything that TensorBoard finds in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: set[str] = set()
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags = events.Tags()
        found |= {*tags["scalars"], *tags["images"], *tags["tensors"]}
    return found


@pytest.fixture(scope="module")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Settings and output folder of a short training with explanations."""
    root = tmp_path_factory.mktemp("trained")
    settings = {"dataset_dir": phantoms, "ckpt_dir": root / "models", "output_dir": root / "eval"}
    _run(
        ["configs/train.yaml", "configs/explain_train.yaml"],
        epochs=2, iterations_per_epoch=3, val_interval=1, patches_per_case=2, **settings,
        **CHEAP,
    )  # fmt: skip
    return settings, root / "eval"


def test_training_saves_weights_and_shows_explanations_over_epochs(
    trained: tuple[dict[str, Any], Path],
) -> None:
    settings, output = trained
    assert (settings["ckpt_dir"] / "model.pt").is_file()
    tags = _tags(output)
    assert {"train_loss", "val_mean_dice"} <= tags
    assert any(tag.startswith("attribution/") and tag.endswith("share/FLAIR") for tag in tags), tags
    assert any(tag.endswith("/planes") for tag in tags), tags


def test_inference_saves_maps_in_the_space_of_the_scan(
    trained: tuple[dict[str, Any], Path], phantoms: Path
) -> None:
    settings, output = trained
    _run(["configs/inference.yaml", "configs/explain.yaml"], **settings, **CHEAP)
    scan = nibabel.load(phantoms / "phantom01" / "FLAIR.nii.gz")
    mask = nibabel.load(output / "phantom01" / "phantom01_lesions.nii.gz")
    maps = nibabel.load(output / "phantom01" / "phantom01_attribution_image.nii.gz")
    np.testing.assert_allclose(maps.affine, scan.affine, atol=1e-4)
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)
    assert maps.shape == (*scan.shape, 4)
    assert mask.shape == scan.shape
    assert maps.get_data_dtype() == np.float32
    assert np.abs(maps.get_fdata()).max() > 0


def test_sequences_are_players_of_a_game_over_the_active_windows(
    trained: tuple[dict[str, Any], Path],
) -> None:
    settings, output = trained
    _run(["configs/inference.yaml", "configs/modalities.yaml"], **settings)
    found = json.loads((output / "modalities" / "modalities.json").read_text())["cases"]
    for baseline in ("blur", "median"):
        rows = [row for row in found if row["baseline"] == baseline]
        assert {row["modality"] for row in rows} == set(SEQUENCES)
        change = rows[0]["score"] - rows[0]["baseline_score"]
        assert sum(row["value"] for row in rows) == pytest.approx(change, rel=1e-3, abs=1e-5)
    assert any(tag.endswith("/waterfall") for tag in _tags(output / "attribution")), _tags(output)


def test_evaluation_reports_every_case(trained: tuple[dict[str, Any], Path]) -> None:
    settings, output = trained
    said = _run(["configs/train.yaml", "configs/evaluate.yaml"], **settings)
    assert "Dice of phantom01:" in said
    assert "Mean Dice of 1 cases:" in said
    assert (output / "val_mean_dice_raw.csv").is_file()


def test_inference_without_a_trained_network_says_what_to_do(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"There is no trained network in .*Train one first"):
        _run(["configs/inference.yaml"], dataset_dir=phantoms, ckpt_dir=tmp_path, output_dir=tmp_path)


# --- the shipped overlays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", overlays.names())
def test_overlay_names_classes_by_dotted_path(name: str) -> None:
    for line in overlays.path(name).read_text().splitlines():
        if "_target_:" in line and "monai_xai" in line:
            target = line.split("_target_:")[1].split("#")[0].strip(" {}")
            assert target.startswith("monai_xai."), line


def _keys(file: Path) -> set[str]:
    return set(ConfigParser.load_config_file(file))


@pytest.mark.parametrize(
    ("overlay", "base"),
    [("inference", "inference.yaml"), ("train", "train.yaml"), ("modalities", "inference.yaml")],
)
def test_shipped_overlay_needs_nothing_that_only_this_bundle_has(overlay: str, base: str) -> None:
    own = {"inference": "explain.yaml", "train": "explain_train.yaml"}.get(overlay, f"{overlay}.yaml")
    assert _keys(overlays.path(overlay)) == _keys(CONFIGS / own)
    merged = read_config(CONFIGS / base, overlays.path(overlay))
    assert "_board.attach" in str(merged["initialize"][-1])


def test_shipped_grounding_overlay_is_attached_to_an_inference() -> None:
    merged = read_config(CONFIGS / "inference.yaml", overlays.path("grounding"))
    assert merged["initialize"][-1] == "$@grounding_handler.attach(@evaluator)"
    assert merged.get_parsed_content("grounding_settings").steps == 12


@pytest.mark.real_data
def test_real_patients_are_found_and_normalized(scripts: ModuleType, open_ms_data: Path) -> None:
    case = scripts.held_out_cases(open_ms_data, "patient26")[0]
    load = scripts.LoadCased(keys=["image", "label"])
    image = scripts.NormalizeForegroundd(keys="image")(load(case))["image"]
    label = load(case)["label"]
    assert image.shape == (4, 182, 218, 182)
    assert (image[:, :5] == 0).all()
    lesion = image[:, label[0] > 0].mean(1)
    assert lesion[0] > 1.0, "lesions are bright in FLAIR"
    assert lesion[1] < 0.0, "and dark in T1"
