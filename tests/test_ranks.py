"""A run in several processes leaves what a run in one leaves, file for file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from networks import random_image
from processes import in_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.runs import files_of, run, write_bundle
from monai_xai import (
    LRP,
    AttributionError,
    Blocks,
    BlurIntegratedGradients,
    Box,
    DeepLift,
    Explainer,
    Explanation,
    FeatureAblation,
    FullGrad,
    GradCam,
    GradientShap,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    Lime,
    Noise,
    NoiseTunnel,
    Occlusion,
    RegionScore,
    Rise,
    Saliency,
    Samples,
    ShapleyValues,
    ShapleyValueSampling,
)
from monai_xai.attributors import Attributor
from monai_xai.manifest import Manifest
from monai_xai.networks import unwrap
from monai_xai.overlays import path
from monai_xai.ranks import from_first, rank, share, wait_for_all, world_size

BOARD = """
explain_board:
  _target_: monai_xai.TensorBoardAttributionHandler
  log_dir: board
  animation_frames: 0
  montage_slices: 0
+initialize:
- "$@explain_board.attach(@evaluator)"
"""


def _look_around() -> tuple[Any, ...]:
    """Return who I am, my share and what the first says; the first also calls a wrapped network, alone.

    Through the wrapper, its exchange of buffers would wait for the other process for ever.
    """
    network = UNet(2, 1, 2, (4, 8), (2,), norm="BATCH")
    wrapped = torch.nn.parallel.DistributedDataParallel(network) if world_size() > 1 else network
    if rank() == 0:
        assert unwrap(wrapped)(torch.ones(1, 1, 8, 8)).shape == (1, 2, 8, 8)
    wait_for_all("here")
    return rank(), world_size(), share(range(5)), from_first(f"from {rank()}")


def test_every_item_goes_to_one_process_and_the_first_is_heard() -> None:
    assert in_processes(2, _look_around) == [(0, 2, [0, 2, 4], "from 0"), (1, 2, [1, 3], "from 0")]


def test_one_process_has_everything() -> None:
    assert _look_around() == (0, 1, [0, 1, 2, 3, 4], "from 0")


TARGET = RegionScore(1, Box((3, 5), (40, 30)))
METHODS = [
    Saliency(),
    InputXGradient(),
    IntegratedGradients(6),
    GradientShap(4),
    DeepLift(),
    GuidedBackprop(),
    Occlusion((1, 8, 8)),
    FeatureAblation(Blocks(8)),
    ShapleyValues(Blocks(24)),
    ShapleyValueSampling(Blocks(4), n_samples=4),
    KernelShap(Blocks(8), n_samples=64),
    Rise(n_samples=32),
    BlurIntegratedGradients(n_steps=8),
    GradientShap(4, baseline=Samples(random_image(3, 2, 48, 40))),
]
WHOLE = [
    Saliency(absolute=True),
    NoiseTunnel(Saliency(), n_samples=2),
    LRP(),
    FullGrad(),
    GradCam(),
    Occlusion((1, 8, 8), top_k=2),
    ShapleyValueSampling(Blocks(8), n_samples=4, coarse=Blocks(16)),
    Lime(Blocks(16), n_samples=64),
]


def _network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(2, 2, 2, (4, 8), (2,), act="RELU", norm="BATCH").double().eval()


def _ask(method: Attributor, **options: Any) -> Explanation:
    inferer = SlidingWindowInferer((16, 16), overlap=0.5)
    explainer = Explainer(TARGET, method, inferer, progress=False, tolerated_gap=10.0, **options)
    found = explainer(_network(), random_image(2, 2, 48, 40))
    assert isinstance(found, Explanation)
    return found


def _ask_all() -> dict[str, Explanation]:
    return {str(method): _ask(method, spread=True) for method in METHODS}


def _adaptive() -> tuple[Explanation, ...]:
    return (
        _ask(IntegratedGradients(baseline=Noise(), tolerance=0.001), spread=True),
        _ask(IntegratedGradients(baseline="auto"), spread=True),
        _ask(ShapleyValueSampling(Blocks(4), n_samples=400, tolerance=0.02), spread=True),
        _ask(BlurIntegratedGradients(tolerance=0.001), spread=True),
    )


def _ask_several() -> dict[str, float]:
    targets = {"region": TARGET, "function": lambda output: output[:, 1].mean((1, 2))}
    inferer = SlidingWindowInferer((16, 16), overlap=0.5)
    explainer = Explainer(targets, Saliency(), inferer, progress=False, spread=True)
    found = explainer.explain(_network(), random_image(1, 2, 48, 40))
    return {name: float(e.attributions["image"].sum()) for name, e in found.items()}


def test_several_targets_one_of_them_a_function_are_the_same_work_in_all_processes() -> None:
    first, second = in_processes(2, _ask_several)
    assert first == second


def _ask_whole() -> dict[str, Explanation]:
    return {str(method): _ask(method, spread=True) for method in WHOLE}


def test_windows_of_a_case_are_shared_out_and_add_up() -> None:
    first, second = in_processes(2, _ask_all)
    for method in METHODS:
        alone = _ask(method)
        for found in (first[str(method)], second[str(method)]):
            assert found.facts["processes"] == 2
            assert found.facts["active_windows"] == alone.facts["active_windows"]
            torch.testing.assert_close(
                found.attributions["image"], alone.attributions["image"], rtol=0, atol=1e-12
            )
            torch.testing.assert_close(found.score, alone.score, rtol=0, atol=1e-12)
            for own, other in ((found.baseline_score, alone.baseline_score), (found.delta, alone.delta)):
                assert (own is None) == (other is None)
                if own is not None:
                    torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_what_is_refined_together_adds_up_to_its_tolerance() -> None:
    for refined, automatic, drawn, blurred in in_processes(2, _adaptive):
        assert blurred.gap is not None and float(blurred.gap.max()) <= 0.001
        assert refined.gap is not None and float(refined.gap.max()) <= 0.001
        assert automatic.gap is not None and float(automatic.gap.max()) <= 0.01
        change = (drawn.score - drawn.baseline_score).abs()
        assert float(drawn.facts["standard_error"]) <= 0.02 * float(change.min())
        alone = _ask(IntegratedGradients(baseline=Noise(), tolerance=0.001)).attributions["image"]
        assert (refined.attributions["image"] - alone).norm() < 0.02 * alone.norm()


def test_what_is_not_the_sum_of_windows_by_themselves_is_whole_in_every_process() -> None:
    for found in in_processes(2, _ask_whole):
        for method in WHOLE:
            alone, whole = _ask(method), found[str(method)]
            assert "processes" not in whole.facts
            for name, values in alone.attributions.items():
                torch.testing.assert_close(whole.attributions[name], values, rtol=0, atol=1e-12)


class Stumbling(torch.nn.Module):
    """Fails in the second process alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if rank() == 1 and x.shape[-1] == 16:
            raise ValueError("stumbled")
        out: torch.Tensor = self.body(x)
        return out


def _stumble() -> list[str]:
    errors = []
    inferer = SlidingWindowInferer((16, 16), overlap=0.5)
    explainer = Explainer(TARGET, IntegratedGradients(4), inferer, progress=False, spread=True)
    for image in (random_image(1, 2, 48, 40), random_image(1, 2, 48, 40).roll(rank(), -1)):
        try:
            explainer(Stumbling(), image)
        except AttributionError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_a_failure_in_one_process_is_heard_of_in_the_other_and_other_work_is_out_of_step() -> None:
    first, second = in_processes(2, _stumble)
    assert first[0].startswith("OtherProcessError: in process 1: ")
    assert "stumbled" in first[0]
    assert second[0].startswith("AttributionError: ")
    assert first[1].startswith("OutOfStepError: ")
    assert second[1].startswith("OutOfStepError: ")


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[Path, Path]:
    """A bundle twice, with a wrapped network that has buffers and one scan of five that cannot be explained."""
    one = write_bundle(tmp_path / "one", [f"p{number}" for number in range(5)])
    config = (one / "inference.yaml").read_text().replace("strides: [2]", "strides: [2]\n  norm: BATCH")
    (one / "inference.yaml").write_text(config)
    (one / "board.yaml").write_text(BOARD)
    (one / "processes.yaml").write_text(path("processes").read_text())
    return one, Path(shutil.copytree(one, tmp_path / "several"))


MORE = ("board.yaml", "processes.yaml")
WRAPPED = (
    "--network",
    "{'_target_': 'torch.nn.parallel.DistributedDataParallel', 'module': '$@network_def.to(@device)'}",
)


def _tags(folder: Path) -> list[str]:
    (file,) = folder.glob("events*")
    events = EventAccumulator(str(file), {"images": 0, "scalars": 0}).Reload()
    found: list[str] = [
        tag for tag in events.Tags()["images"] + events.Tags()["scalars"] if "seconds" not in tag
    ]
    return found


def _spoil(folder: Path) -> None:
    file = folder / "scans" / "p3.nii.gz"
    scan = nibabel.load(file)
    voxels = scan.get_fdata(dtype=np.float32)
    voxels[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, scan.affine), file)


def test_two_processes_leave_what_one_leaves(bundles: tuple[Path, Path]) -> None:
    one, several = bundles
    alone = run(one, more=MORE[:1])
    assert alone.returncode == 0, alone.stderr[-2000:]
    together = run(several, *WRAPPED, processes=2, more=MORE)
    assert together.returncode == 0, together.stderr[-2000:]
    assert files_of(one / "out", without=[]) == files_of(several / "out", without=[])
    assert _tags(one / "board") == _tags(several / "board")


def test_a_bundle_whose_cases_are_each_worked_on_by_all(bundles: tuple[Path, Path]) -> None:
    one, several = bundles
    for folder in bundles:
        _spoil(folder)
        (folder / "scans" / "p4.nii.gz").write_bytes(b"no NIfTI")
    alone = run(one, more=MORE[:1])
    together = run(several, *WRAPPED, "--explainer::spread", "true", processes=2, more=MORE)
    assert alone.returncode == 1
    assert together.returncode != 0
    assert "2 of 5 cases are not explained in full" in together.stderr
    assert _tags(one / "board") == _tags(several / "board")
    names = {str(file.relative_to(one / "out")) for file in (one / "out").rglob("*.nii.gz")}
    assert names == {str(file.relative_to(several / "out")) for file in (several / "out").rglob("*.nii.gz")}
    for name in names:
        maps = [nibabel.load(folder / "out" / name).get_fdata() for folder in bundles]
        np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=1e-5 * np.abs(maps[0]).max())
    done = {record.case for record in Manifest(several / "out" / "xai").records() if not record.failures}
    assert done == {"p0", "p1", "p2"}


def test_a_failure_in_one_process_keeps_no_other_waiting(bundles: tuple[Path, Path]) -> None:
    one, several = bundles
    _spoil(several)
    shutil.copy2(several / "scans" / "p3.nii.gz", one / "scans" / "p3.nii.gz")
    (several / "scans" / "p4.nii.gz").write_bytes(b"no NIfTI")
    together = run(several, *WRAPPED, processes=2, more=MORE)
    assert together.returncode != 0
    assert "2 of 5 cases are not explained in full" in together.stderr
    assert "Not explained: case p3, IntegratedGradients" in together.stderr
    done = {record.case for record in Manifest(several / "out" / "xai").records() if not record.failures}
    assert done == {"p0", "p1", "p2"}
    shutil.copy2(
        one / "scans" / "p4.nii.gz", several / "scans" / "p4.nii.gz"
    )  # mended, and gone on with in one
    alone, again = run(one, more=MORE[:1]), run(several, more=MORE[:1])
    assert alone.returncode == again.returncode == 1
    assert files_of(one / "out" / "xai", without=[]) == files_of(several / "out" / "xai", without=[])


def test_processes_that_do_not_know_of_each_other_are_refused(bundles: tuple[Path, Path]) -> None:
    one, _ = bundles
    manifest = Manifest(one / "out" / "xai")
    manifest.open({})
    refused = run(one, more=MORE[:1])
    assert refused.returncode == 1
    assert "Another run is at work in out/xai" in refused.stderr
