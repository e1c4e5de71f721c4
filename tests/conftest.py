"""What all tests share: quiet machines, the same random numbers every time, and skips that say what is missing."""

from __future__ import annotations

import os
import random
from pathlib import Path

# Before anything imports matplotlib or a BLAS: no window system, and one thread for each xdist worker.
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same generators, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def open_ms_data() -> Path:
    """The public MS lesion scans (marker ``real_data``): $OPEN_MS_DATA, or the ones beside the checkout."""
    beside = ROOT.parent / "shared" / "data" / "open_ms_data"
    folder = Path(os.environ.get("OPEN_MS_DATA", beside))
    if not (folder / "cross_sectional" / "MNI").is_dir():
        pytest.skip(f"no open_ms_data at {folder}; set OPEN_MS_DATA to a clone of it")
    return folder
