"""A run in several processes leaves what a run in one leaves, file for file."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed, multiprocessing

from benchmarks.runs import files_of, run, write_bundle
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


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def _work(number: int, port: str, many: int, work: Callable[[], Any], found: Any) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=number, world_size=many
    )
    found[number] = work()
    distributed.destroy_process_group()


def in_processes(many: int, work: Callable[[], Any]) -> list[Any]:
    """Return what a function gives in each of several processes."""
    with multiprocessing.get_context("spawn").Manager() as manager:
        found = manager.dict()
        multiprocessing.spawn(_work, (_free_port(), many, work, found), nprocs=many)
        return [found[number] for number in range(many)]


def _look_around() -> tuple[Any, ...]:
    """Return who I am, my share and what the first says; the first also calls a wrapped network, alone.

    Through the wrapper, its exchange of buffers would wait for the other process for ever.
    """
    network = UNet(2, 1, 2, (4, 8), (2,), norm="BATCH")
    wrapped = torch.nn.parallel.DistributedDataParallel(network) if world_size() > 1 else network
    if rank() == 0:
        assert unwrap(wrapped)(torch.ones(1, 1, 8, 8)).shape == (1, 2, 8, 8)
    wait_for_all()
    return rank(), world_size(), share(range(5)), from_first(f"from {rank()}")


def test_every_item_goes_to_one_process_and_the_first_is_heard() -> None:
    assert in_processes(2, _look_around) == [(0, 2, [0, 2, 4], "from 0"), (1, 2, [1, 3], "from 0")]


def test_one_process_has_everything() -> None:
    assert _look_around() == (0, 1, [0, 1, 2, 3, 4], "from 0")


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
