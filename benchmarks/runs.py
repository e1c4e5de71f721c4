"""A small bundle whose explaining run is killed, continued and spread over processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.bundle import ConfigParser

from monai_xai.files import checksum

CONFIG = """
imports:
- $import glob
device: "$torch.device('cpu')"
bundle_root: .
data_dir: scans
output_dir: out
network_def:
  _target_: UNet
  spatial_dims: 3
  in_channels: 1
  out_channels: 2
  channels: [4, 8]
  strides: [2]
network: "$@network_def.to(@device)"
inferer: {_target_: SlidingWindowInferer, roi_size: [16, 16, 16], overlap: 0.25}
preprocessing:
  _target_: Compose
  transforms:
  - {_target_: LoadImaged, keys: image, ensure_channel_first: true}
  - {_target_: Spacingd, keys: image, pixdim: [1.5, 1.5, 1.5]}
  - {_target_: ScaleIntensityd, keys: image}
dataset:
  _target_: Dataset
  data: "$[{'image': f} for f in sorted(glob.glob(@data_dir + '/*'))]"
  transform: "@preprocessing"
postprocessing:
  _target_: Compose
  transforms:
  - {_target_: Invertd, keys: pred, orig_keys: image, transform: "@preprocessing"}
  - {_target_: AsDiscreted, keys: pred, argmax: true}
  - {_target_: SaveImaged, keys: pred, output_dir: "@output_dir", writer: monai_xai.AtomicNibabelWriter}
evaluator:
  _target_: SupervisedEvaluator
  device: "@device"
  val_data_loader: {_target_: DataLoader, dataset: "@dataset", batch_size: 1}
  network: "@network"
  inferer: "@inferer"
  postprocessing: "@postprocessing"
initialize:
- "$torch.manual_seed(0)"
run:
- "$@evaluator.run()"
"""
"""A bundle's inference config as they are; the overlay knows nothing of it but the names."""

OVERLAY = """
explainer:
  _target_: monai_xai.Explainer
  target:
    _target_: monai_xai.RegionScore
    channel: 1
    region: {_target_: monai_xai.Box, start: [2, 2, 2], end: [9, 9, 9]}
  attributor: {_target_: monai_xai.IntegratedGradients, n_steps: 2, tolerance: null}
  tolerated_gap: 100.0
  progress: false
modalities:
  _target_: monai_xai.ModalityShapley
  target: "@explainer#target"
  baselines:
    zero: {_target_: monai_xai.Constant, value: 0.0}
    half: {_target_: monai_xai.Constant, value: 0.5}
explain_handler:
  _target_: monai_xai.AttributionHandler
  explainer: {IntegratedGradients: "@explainer", modalities: "@modalities"}
  cases: null
cohort: {_target_: monai_xai.ModalityCohortHandler, output_dir: "$@output_dir + '/xai'"}
saver:
  _target_: monai_xai.AttributionSaver
  output_dir: "$@output_dir + '/xai'"
  handlers: "@explain_handler"
  transform: "@preprocessing"
+initialize:
- "$@saver.attach(@evaluator)"
- "$@cohort.attach(@evaluator)"
"""


def write_bundle(folder: Path, cases: Sequence[str] = ("p1", "p2", "p3", "p4")) -> Path:
    """Write config, overlay and random scans that lie askew in space."""
    (folder / "scans").mkdir(parents=True)
    (folder / "inference.yaml").write_text(CONFIG)
    (folder / "explain.yaml").write_text(OVERLAY)
    for number, case in enumerate(cases):
        write_scan(folder / "scans" / f"{case}.nii.gz", number)
    return folder


def write_scan(file: Path, seed: int) -> None:
    """Write a random scan."""
    voxels = np.random.default_rng(seed).random((20, 18, 14 + seed % 3), dtype=np.float32)
    affine = np.array([[0, 1.2, 0, -20], [-1.2, 0, 0, 30], [0, 0, 2, 5], [0, 0, 0, 1.0]])
    scan = nibabel.Nifti1Image(voxels, affine)
    scan.set_sform(affine, 2)
    scan.set_qform(affine, 3)
    nibabel.save(scan, file)


def command(folder: Path, *options: str, processes: int = 1, more: Sequence[str] = ()) -> list[str]:
    """Return the command that a user types."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    configs = str([str(folder / name) for name in ("inference.yaml", "explain.yaml", *more)])
    return [*launch, "monai.bundle", "run", "--config_file", configs, *options]


def environment() -> dict[str, str]:
    """Return the environment of a run: one thread, no warnings of configs as code."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(
    folder: Path, *options: str, processes: int = 1, more: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the bundle with the overlay, and with more of them."""
    return subprocess.run(
        command(folder, *options, processes=processes, more=more),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def files_of(folder: Path, *, without: Iterable[str] = ("events.out", "settings.json")) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder; TensorBoard's events hold times and are left out."""
    return {
        path.relative_to(folder).as_posix(): checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in path.name for part in without)
    }


def numbers_of(folder: Path) -> dict[str, Any]:
    """Return the maps of a run by file."""
    return {path.name: nibabel.load(path).get_fdata() for path in sorted(folder.rglob("*attribution.nii.gz"))}


def run_here(folder: Path, **settings: Any) -> None:
    """Run the bundle with the overlay in this process, as ``python -m monai.bundle run`` does.

    Args:
        folder: of the bundle.
        settings: overrides, with ``::`` in their names where they go deeper, such as ``saver::anonymize``.
    """
    with chdir(folder):
        parser = ConfigParser()
        parser.read_config(["inference.yaml", "explain.yaml"])
        parser.update(settings)
        parser.get_parsed_content("initialize")
        parser.get_parsed_content("evaluator").run()


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    """Work in a folder, as bundles do."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_apart(folder: Path, seconds: float | None = None, **settings: Any) -> int | None:
    """Run the bundle in a process of its own, which has everything imported, and kill it (SIGKILL) after some seconds.

    Returns:
        its exit code; -9 if it was killed.
    """
    child = multiprocessing.get_context("fork").Process(target=run_here, args=(folder,), kwargs=settings)
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode
