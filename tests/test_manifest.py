"""A run may be killed at any moment: it goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import Compose, Spacingd

from benchmarks.killing import kill_and_resume
from benchmarks.runs import files_of, run_apart, run_here, write_bundle, write_scan
from monai_xai import (
    AttributionHandler,
    AttributionSaver,
    CasesFailedError,
    Constant,
    Explainer,
    InputError,
    IntegratedGradients,
    ModalityShapley,
    RegionScore,
    Saliency,
    SettingsChangedError,
    WorstCases,
)
from monai_xai.errors import XaiError
from monai_xai.files import checksum, remove_partial_files, write_whole, writing_whole
from monai_xai.manifest import CaseRecord, Manifest, fingerprint, key_of, label_of, spelled_settings
from monai_xai.packing import as_text, pack, unpack

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:monai"),
    pytest.mark.filterwarnings("ignore::FutureWarning:monai"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four cases that nobody has disturbed."""
    folder = write_bundle(tmp_path_factory.mktemp("calm") / "bundle")
    run_here(folder)
    return folder


@pytest.fixture
def bundle(calm: Path, tmp_path: Path) -> Path:
    """The same bundle before it has run."""
    folder = shutil.copytree(calm, tmp_path / "bundle")
    shutil.rmtree(folder / "out")
    return Path(folder)


def everything(folder: Path) -> dict[str, str]:
    return files_of(folder / "out", without=[])


class Interrupted(BaseException):
    """Not an error: nothing may catch it, as nothing catches a kill."""


class Interrupt:
    """Ends the run in the middle of a case, after its maps are written and before its record is."""

    def __init__(self, after: int) -> None:
        self.after = after

    def attach(self, engine: Any) -> None:
        def stop(_: Any) -> None:
            if engine.state.iteration == self.after:
                raise Interrupted

        from monai.engines.utils import IterationEvents

        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, stop)


def interrupted(folder: Path, after: int, **settings: Any) -> None:
    interrupt = {"_target_": f"{__name__}.Interrupt", "after": after}
    with pytest.raises(Interrupted):
        run_here(folder, **{"evaluator::val_handlers": [interrupt], **settings})


# --- killed and continued --------------------------------------------------------------------------------------------


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    outcome = kill_and_resume(tmp_path, kills=3, cases=3, seed=1)
    assert outcome.kills == 3
    assert not outcome.lost
    assert not outcome.differing


def test_an_interrupted_case_is_made_again_and_finished_ones_are_not(calm: Path, bundle: Path) -> None:
    interrupted(bundle, after=3)
    records = {record.case for record in Manifest(bundle / "out" / "xai").records()}
    assert records == {"p1", "p2"}
    assert list((bundle / "out" / "xai" / "sub-p3").glob("*.nii.gz")), (
        "maps are there, the case does not count"
    )
    before = (bundle / "out" / "xai" / "sub-p1").stat().st_mtime_ns
    run_here(bundle)
    assert everything(bundle) == everything(calm)
    assert (bundle / "out" / "xai" / "sub-p1").stat().st_mtime_ns == before


def test_finished_cases_are_neither_loaded_nor_run(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(bundle, after=3)
    for case in ("p1", "p2"):  # unreadable, but of the size and time that were seen
        file = bundle / "scans" / f"{case}.nii.gz"
        times = file.stat()
        file.write_bytes(b"\0" * times.st_size)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    caplog.set_level(logging.INFO, "monai_xai.saver")
    run_here(bundle)
    assert "2 of 4 cases are finished already" in caplog.text


def test_a_run_that_is_done_starts_and_ends_without_work(calm: Path, bundle: Path) -> None:
    run_here(bundle)
    run_here(bundle)
    assert everything(bundle) == everything(calm)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: file.write_bytes(b"damaged")], ids=["gone", "changed"]
)
def test_damaged_results_are_made_again(calm: Path, bundle: Path, damage: Any) -> None:
    run_here(bundle)
    damage(next((bundle / "out" / "xai" / "sub-p2").glob("*.nii.gz")))
    run_here(bundle)
    assert everything(bundle) == everything(calm)


def test_a_record_that_is_no_json_costs_its_case_only(calm: Path, bundle: Path) -> None:
    run_here(bundle)
    (bundle / "out" / "xai" / "manifest" / "sub-p4.json").write_text('{"case": ')
    run_here(bundle)
    assert everything(bundle) == everything(calm)


def test_a_scan_that_has_changed_is_explained_again(bundle: Path) -> None:
    run_here(bundle)
    before = everything(bundle)
    write_scan(bundle / "scans" / "p2.nii.gz", seed=77)
    run_here(bundle)
    changed = {name for name, digest in everything(bundle).items() if before.get(name) != digest}
    assert any("sub-p2_" in name for name in changed)
    assert not any("sub-p1" in name for name in changed)


def test_a_case_that_comes_later_joins_the_others(bundle: Path) -> None:
    (bundle / "later.nii.gz").write_bytes((bundle / "scans" / "p3.nii.gz").read_bytes())
    shutil.copystat(bundle / "scans" / "p3.nii.gz", bundle / "later.nii.gz")
    (bundle / "scans" / "p3.nii.gz").unlink()
    run_here(bundle)
    assert len(Manifest(bundle / "out" / "xai").records()) == 3
    (bundle / "later.nii.gz").rename(bundle / "scans" / "p3.nii.gz")
    run_here(bundle)
    index = json.loads((bundle / "out" / "xai" / "index.json").read_text())
    assert [case["case"] for case in index["cases"]] == ["p1", "p2", "p3", "p4"]


def test_with_metrics_finished_cases_are_run_for_them_and_not_explained(bundle: Path) -> None:
    metric = {"mean": {"_target_": f"{__name__}.mean_of_predictions"}}
    run_here(bundle, **{"evaluator::key_val_metric": metric, "output_dir": "whole"})
    whole = SEEN[-1]
    interrupted(bundle, after=3, **{"evaluator::key_val_metric": metric})
    maps = {f: f.stat().st_mtime_ns for f in (bundle / "out" / "xai").glob("sub-p[12]/*")}
    run_here(bundle, **{"evaluator::key_val_metric": metric})
    assert SEEN[-1] == whole
    assert maps == {f: f.stat().st_mtime_ns for f in (bundle / "out" / "xai").glob("sub-p[12]/*")}


SEEN: list[float] = []


def mean_of_predictions() -> Any:
    from ignite.metrics import Average

    class Mean(Average):  # type: ignore[misc]
        def compute(self) -> float:
            SEEN.append(float(super().compute()))
            return SEEN[-1]

    return Mean(output_transform=lambda output: float(output[0]["pred"].float().mean()))


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("explainer::attributor::n_steps", 3, "IntegratedGradients.attributor.n_steps was 2, is 3"),
        ("inferer::overlap", 0.5, 'inferer.overlap was "0.25", is "0.5"'),
        ("initialize::0", "$torch.manual_seed(1)", "network was"),
        ("preprocessing::transforms::1::pixdim", [1.5, 1.5, 2.0], "pixdim was"),
    ],
    ids=["method", "inferer", "weights", "transform"],
)
def test_other_settings_are_refused_by_name(bundle: Path, setting: str, value: Any, named: str) -> None:
    run_here(bundle)
    before = everything(bundle)
    with pytest.raises(SettingsChangedError) as caught:
        run_here(bundle, **{setting: value})
    assert named in str(caught.value)
    assert "overwrite=True" in str(caught.value)
    assert everything(bundle) == before


def test_results_whose_settings_are_lost_are_not_mixed_with_others(bundle: Path) -> None:
    run_here(bundle)
    (bundle / "out" / "xai" / "manifest" / "settings.json").unlink()
    with pytest.raises(SettingsChangedError, match="not known"):
        run_here(bundle)


def test_overwrite_removes_what_other_settings_made(calm: Path, bundle: Path) -> None:
    run_here(bundle, **{"explainer::attributor::n_steps": 3})
    run_here(bundle, **{"saver::overwrite": True})
    assert everything(bundle) == everything(calm)


def test_settings_reach_into_transforms_and_leave_generators_out() -> None:
    one, same, other = (
        spelled_settings(Compose([Spacingd("image", (size, 1.0, 1.0))])) for size in (1.0, 1.0, 2.0)
    )
    assert one == same
    assert one != other


def test_fingerprint_is_of_weights_and_buffers() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    before = fingerprint(network)
    assert fingerprint(network) == before
    network[1].running_mean[0] += 1e-6
    assert fingerprint(network) != before


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_case_that_cannot_be_loaded_takes_nothing_from_the_others(calm: Path, bundle: Path) -> None:
    (bundle / "scans" / "p2.nii.gz").write_bytes(b"no NIfTI")
    with pytest.raises(
        CasesFailedError, match=r"1 of 4 cases .*\n  case p2: not loaded from scans/p2.nii.gz: .*gzip"
    ):
        run_here(bundle)
    for case in ("p1", "p3", "p4"):
        assert files_of(bundle / "out" / "xai" / f"sub-{case}") == files_of(
            calm / "out" / "xai" / f"sub-{case}"
        )
    shutil.copy2(calm / "scans" / "p2.nii.gz", bundle / "scans" / "p2.nii.gz")
    run_here(bundle)
    assert everything(bundle) == everything(calm)


class FailsOn:
    """A post-processing that fails on one case, as those of bundles do."""

    def __init__(self, case: str) -> None:
        self.case = case

    def __call__(self, data: Any) -> Any:
        if self.case in str(data["image"].meta["filename_or_obj"]):
            raise IndexError("index 7 is out of range")
        return data


@pytest.mark.parametrize("case", ["p1", "p4"], ids=["first", "last"])
def test_a_case_that_fails_behind_the_network_takes_nothing_from_the_others(
    calm: Path, bundle: Path, case: str
) -> None:
    broken = {"_target_": f"{__name__}.FailsOn", "case": case}
    with pytest.raises(CasesFailedError, match=f"case {case}: IndexError: index 7"):
        run_here(bundle, **{"postprocessing::transforms::1": broken})
    done = {r.case for r in Manifest(bundle / "out" / "xai").records() if not r.failures}
    assert done == {"p1", "p2", "p3", "p4"} - {case}
    run_here(bundle)
    assert files_of(bundle / "out" / "xai") == files_of(calm / "out" / "xai")


def test_a_case_that_cannot_be_explained_is_named_with_its_cause(bundle: Path) -> None:
    write_scan(bundle / "scans" / "p3.nii.gz", seed=3)
    scan = nibabel.load(bundle / "scans" / "p3.nii.gz")
    voxels = scan.get_fdata().astype(np.float32)
    voxels[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, scan.affine), bundle / "scans" / "p3.nii.gz")
    with pytest.raises(CasesFailedError, match=r"1 of 4 cases .*\n  Not explained: case p3, Integr.*NaN"):
        run_here(bundle)
    index = json.loads((bundle / "out" / "xai" / "index.json").read_text())
    assert [bool(case["failures"]) for case in index["cases"]] == [False, False, True, False]


def test_two_cases_of_one_name_do_not_replace_each_other(bundle: Path) -> None:
    (bundle / "scans" / "more").mkdir()
    shutil.move(bundle / "scans" / "p4.nii.gz", bundle / "scans" / "more" / "p1.nii.gz")
    data = "$[{'image': f} for f in sorted(glob.glob('scans/**/*.nii.gz', recursive=True))]"
    with pytest.raises(CasesFailedError, match="Two cases are called p1"):
        run_here(bundle, **{"dataset::data": data})
    assert sum(not r.failures for r in Manifest(bundle / "out" / "xai").records()) >= 2


def test_a_run_that_failed_leaves_a_non_zero_exit(bundle: Path) -> None:
    (bundle / "scans" / "p2.nii.gz").write_bytes(b"no NIfTI")
    assert run_apart(bundle) == 1


# --- what is written -------------------------------------------------------------------------------------------------


def test_maps_lie_where_their_scans_lie_with_codes_and_say_what_they_are(calm: Path) -> None:
    scan = nibabel.load(calm / "scans" / "p2.nii.gz")
    (file,) = (calm / "out" / "xai" / "sub-p2").glob("*.nii.gz")
    saved = nibabel.load(file)
    assert file.name == "sub-p2_desc-IntegratedGradients_attribution.nii.gz"
    assert saved.shape == scan.shape
    np.testing.assert_allclose(saved.affine, scan.affine, atol=1e-6)
    np.testing.assert_allclose(saved.get_qform(), scan.get_qform(), atol=1e-6)
    assert (int(saved.header["sform_code"]), int(saved.header["qform_code"])) == (2, 3)
    about = json.loads(file.with_name(file.name.replace(".nii.gz", ".json")).read_text())
    assert about["Target"].startswith("RegionScore(channel=1")
    assert about["Method"].startswith("IntegratedGradients(n_steps=2")
    assert about["Sources"] == ["scans/p2.nii.gz"]
    assert abs(about["Delta"]) < 100
    assert len(about["Network"]) == 64
    assert set(about["Versions"]) == {"monai_xai", "captum", "monai", "torch"}


def test_index_names_every_file_with_its_checksum(calm: Path) -> None:
    output = calm / "out" / "xai"
    index = json.loads((output / "index.json").read_text())
    assert [case["case"] for case in index["cases"]] == ["p1", "p2", "p3", "p4"]
    listed = {name: digest for case in index["cases"] for name, digest in case["files"].items()}
    assert listed == {name: checksum(output / name) for name in files_of(output) if name.startswith("sub-")}
    assert len((output / "index.csv").read_text().splitlines()) == 1 + len(index["outputs"]) == 5


def test_without_transform_maps_stay_in_the_space_of_the_network(bundle: Path) -> None:
    run_here(bundle, **{"saver::transform": None})
    file = (
        bundle / "out" / "xai" / "sub-p1" / "sub-p1_space-network_desc-IntegratedGradients_attribution.nii.gz"
    )
    np.testing.assert_allclose(np.linalg.norm(nibabel.load(file).affine[:3, :3], axis=0), 1.5, atol=1e-5)


SECRET = "Mueller_Anna_19500304"


def test_no_name_appears_where_it_must_not(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in sorted((bundle / "scans").iterdir()):
        file.rename(file.with_name(f"{SECRET}_{file.name}"))
    (bundle / "scans" / f"{SECRET}_p2.nii.gz").write_bytes(b"no NIfTI")
    write_scan(bundle / "scans" / f"{SECRET}_p3.nii.gz", 3)
    board = {
        "_target_": "monai_xai.TensorBoardAttributionHandler",
        "log_dir": "out/board",
        "animation_frames": 0,
    }
    settings = {"saver::anonymize": True, "saver::salt": "secret", "board": board, "postprocessing": None}
    settings["evaluator::postprocessing"] = None
    caplog.set_level(logging.INFO, "monai_xai")
    with pytest.raises(CasesFailedError) as caught:
        run_here(bundle, **settings, **{"evaluator::val_handlers": ["@board"]})
    own = "".join(record.getMessage() for record in caplog.records if record.name.startswith("monai_xai"))
    written = list((bundle / "out").rglob("*"))
    assert len(written) > 20
    for part in ("Mueller", "Anna", "19500304"):
        assert part not in str(caught.value)
        assert part not in own
        for path in written:
            assert part not in path.name
            assert path.is_dir() or part.encode() not in path.read_bytes(), path
    assert label_of(f"{SECRET}_p1", "secret") in (bundle / "out" / "xai" / "index.csv").read_text()


def test_anonymizing_needs_a_secret_that_stays(bundle: Path) -> None:
    handler = AttributionHandler(Explainer(RegionScore(1), Saliency()), None)
    with pytest.raises(InputError, match=r"salt=\.\.\."):
        AttributionSaver(bundle / "out", handler, anonymize=True)
    run_here(bundle, **{"saver::anonymize": True, "saver::salt": "one"})
    with pytest.raises(SettingsChangedError, match="anonymize was"):
        run_here(bundle, **{"saver::anonymize": True, "saver::salt": "other"})


def test_worst_cases_cannot_be_continued(tmp_path: Path) -> None:
    handler = AttributionHandler(Explainer(RegionScore(1), Saliency()), WorstCases(2))
    with pytest.raises(InputError, match="worst"):
        AttributionSaver(tmp_path, handler)


def test_only_evaluators_with_a_data_loader_are_kept(tmp_path: Path) -> None:
    from ignite.engine import Engine

    handler = AttributionHandler(Explainer(RegionScore(1), Saliency()), None)
    with pytest.raises(InputError, match="needs an evaluator of MONAI with a DataLoader, got Engine"):
        AttributionSaver(tmp_path, handler).attach(Engine(lambda engine, batch: None))


# --- labels, keys, records -------------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "nul\0name", "CON", "aux.txt", "x" * 4000,
    "a b", "-rf", "*?<>|:\"", "\u202egnp", "mit Umlaut ä", "\udcff", "trailing.", "a\nb", "$(reboot)", "=1+1",
    "%s%n", "a_b", "a-b", "a.b", "A_b", "~root", "C:\\x", "sub-01_ses-1",
]  # fmt: skip


def test_labels_of_hostile_names_are_short_plain_and_different() -> None:
    for salt in (None, "secret"):
        labels = [label_of(name, salt) for name in HOSTILE]
        assert all(
            len(label) <= 60 and label.replace("+", "").isalnum() and label.isascii() for label in labels
        )
        assert len(set(labels)) == len(HOSTILE)


def test_a_keyed_label_tells_nothing_of_its_name() -> None:
    assert label_of("p1", "one") != label_of("p1", "other")
    assert label_of("p1", "one") == label_of("p1", "one")
    assert key_of({"image": "p1"}, "one") != key_of({"image": "p1"}, "other")


def test_key_knows_that_a_file_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "scan.nii"
    file.write_bytes(b"one")
    before = key_of({"image": str(file)})
    assert key_of({"image": str(file)}) == before
    file.write_bytes(b"other")
    assert key_of({"image": str(file)}) != before


def test_a_record_cannot_name_files_outside(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("stays")
    manifest = Manifest(tmp_path / "out")
    manifest.open({})
    manifest.add(CaseRecord("p1", "p1", "key", {"../outside.txt": checksum(outside)}))
    with pytest.raises(InputError, match="not in the output folder"):
        manifest.remove(manifest.records()[0])
    assert outside.read_text() == "stays"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old")
    with pytest.raises(TypeError), writing_whole(file) as partial:
        partial.write_text(b"no text")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    left = tmp_path / f".partial-{gone}-a.json"
    others = [tmp_path / f".partial-{gone}-b.json", tmp_path / f".partial-{os.getppid()}-a.json"]
    for file in (left, *others):
        file.write_text("half")
    write_whole(tmp_path / "a.json", "whole")
    assert not left.exists()
    assert all(file.exists() for file in others)
    assert remove_partial_files(tmp_path) == 2


def test_explanations_come_back_from_text_as_they_were() -> None:
    network = torch.nn.Conv3d(2, 2, 3, padding=1)
    modalities = ModalityShapley(RegionScore(1), {"zero": Constant(0.0), "one": Constant(1.0)})
    image = torch.randn(1, 2, 8, 8, 8)
    image[:, :, 2:5] += 9
    explanation = modalities.explain(network, {"image": image})[""]
    again = unpack(json.loads(json.dumps(pack(explanation, as_text))))
    assert list(again.rows("p1")) == list(explanation.rows("p1"))
    explainer = Explainer(RegionScore(1), IntegratedGradients(n_steps=2, tolerance=None), tolerated_gap=9e9)
    plain = explainer.explain(network, {"image": image})[""]
    back = unpack(pack(plain))
    torch.testing.assert_close(back.attributions["image"], plain.attributions["image"], rtol=0, atol=0)
    assert str(back.facts) == str(dict(plain.facts))


def test_errors_of_runs_are_in_the_tree() -> None:
    assert issubclass(CasesFailedError, XaiError)
    assert issubclass(SettingsChangedError, XaiError)


def test_a_second_run_in_one_folder_is_refused(bundle: Path) -> None:
    manifest = Manifest(bundle / "out" / "xai")
    manifest.open({})
    assert run_apart(bundle) == 1
    assert not manifest.records()
