"""The check of the Model Zoo tells right maps from wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_bundle_runs import SEGMENTATION, make_bundle, output

from benchmarks.zoo import table

SEVERED = """
import torch
from monai.networks.nets import UNet

class Severed(UNet):
    def forward(self, x):
        return super().forward(x + 0.5 * x.detach())
"""


def check(zoo: Path, name: str, repository: Path) -> dict[str, Any]:
    """Return what the benchmark says of one bundle, from a process of its own."""
    file = zoo / "result.json"
    command = [sys.executable, "-m", "benchmarks.zoo", str(zoo), "--bundle", name, "--result", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def bundle_of(zoo: Path, name: str, network: str = "UNet") -> Path:
    config = json.loads(json.dumps(SEGMENTATION))
    config["network_def"]["_target_"] = network
    config["inferer"]["roi_size"] = [32, 32, 32]
    format_of_input = {"num_channels": 1, "spatial_shape": ["8*n", "8*n", "8*n"]}
    metadata = output()
    metadata["network_data_format"]["inputs"] = {"image": format_of_input}
    return make_bundle(zoo / "models" / name, config, metadata=metadata)


def test_a_right_map_is_told_from_one_of_a_network_that_cuts_its_gradient(tmp_path, repository):
    bundle_of(tmp_path, "whole")
    found = check(tmp_path, "whole", repository)
    assert found["status"] == "checked", found
    assert found["difference"] < 1e-3
    assert found["autograd"] < 1e-9
    cut = bundle_of(tmp_path, "cut", "scripts.Severed")
    (cut / "scripts").mkdir()
    (cut / "scripts" / "__init__.py").write_text(SEVERED)
    found = check(tmp_path, "cut", repository)
    assert found["status"] == "wrong", found
    assert found["difference"] == pytest.approx(1 / 3, rel=0.05)
    rows = table({"cut": found}, tmp_path)
    assert "**wrong**" in rows[-1]
    assert "Severed" in rows[-1]
