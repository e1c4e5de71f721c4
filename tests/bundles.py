"""What the tests of every bundle need: its scripts, MONAI's schema of metadata, and MONAI's own command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from monai.bundle import ConfigParser


@contextmanager
def scripts_of(bundle: Path) -> Iterator[ModuleType]:
    """The Python package of a bundle, which goes by the name that all bundles give theirs."""
    sys.path.insert(0, str(bundle))
    import scripts as package

    yield package
    sys.path.remove(str(bundle))
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]


def read_config(*files: Path) -> ConfigParser:
    """Return the parser of config files, merged."""
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    return parser


def run_bundle(bundle: Path, files: Sequence[Path | str], **settings: Any) -> str:
    """Run configs in the folder of a bundle as a user does, and return what it says."""
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    configs = str([str(file) for file in files])
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", configs, *options],
        cwd=bundle,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


TEXT, OBJECT = {"type": "string"}, {"type": "object"}
TENSORS = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {
        "type": "object",
        "properties": {
            **dict.fromkeys(("type", "format", "dtype"), TEXT),
            "num_channels": {"type": "integer"},
            "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
            "value_range": {"type": "array", "items": {"type": "number"}},
            "is_patch_data": {"type": "boolean"},
            "channel_def": OBJECT,
        },
        "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    },
}
TEXTS = (
    "schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
    "copyright",
)  # fmt: skip
# What the Model Zoo's meta_schema_20240725.json asks for.
SCHEMA = {
    "type": "object",
    "properties": {
        **dict.fromkeys((*TEXTS, "data_source", "data_type", "intended_use"), TEXT),
        **dict.fromkeys(("changelog", "required_packages_version", "eval_metrics"), OBJECT),
        "references": {"type": "array", "items": TEXT},
        "network_data_format": {
            "type": "object",
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
            "required": ["inputs", "outputs"],
        },
    },
    "required": [*TEXTS, "required_packages_version", "network_data_format"],
}
