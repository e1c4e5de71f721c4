"""The command line says what there is, and names what there is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from monai_xai import attributors
from monai_xai.__main__ import layers, methods, overlay
from monai_xai.errors import InputError


def test_methods_lists_every_method_with_the_facts_of_its_class():
    header, *rows = methods().splitlines()
    assert header.split()[:6] == ["method", "complete", "summable", "needs_layer", "stochastic", "by_hooks"]
    facts = {row.split()[0]: row.split()[1:6] for row in rows}
    rules = {name for name in attributors.__all__ if name.endswith("Rule")}
    assert set(facts) == set(attributors.__all__) - {"Attribution", "Attributor"} - rules
    assert facts["DeepLift"] == ["yes", "yes", "-", "-", "yes"]


def test_the_table_of_the_readme_is_the_table_of_the_code():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    rows = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("| `")]
    for names, adds_up, contributions, windows, random in rows:
        for name in set(attributors.__all__) & set(names.replace("`", " ").replace(",", " ").split()):
            method = getattr(attributors, name)
            assert method.complete == ("yes" in adds_up), name
            assert method.summable == ("yes" in contributions or name in contributions), name
            assert method.by_hooks == ("linear" in windows), name
            assert method.stochastic == ("seed" in random), name


def test_layers_lists_what_a_network_gives_and_marks_the_choice_of_cams(tmp_path):
    config = tmp_path / "inference.yaml"
    options = "spatial_dims: 2, in_channels: 1, out_channels: 2, channels: [4, 8], strides: [2]"
    config.write_text(f"network_def: {{_target_: UNet, {options}}}")
    rows = layers(str(config), (1, 16, 16)).splitlines()
    (chosen,) = [row for row in rows if row.startswith("*")]
    assert chosen.split()[1:] == [
        "model.1.submodule.conv",
        "Conv2d",
        *["1", "x", "8", "x", "8", "x", "8"],
    ]
    with pytest.raises(InputError, match="shape of each input"):
        layers(str(config))


@pytest.mark.parametrize("name", ["inference", "train", "flat"])
def test_an_overlay_is_a_file(name):
    assert overlay(name).endswith(f"{name}.yaml")
    assert Path(overlay(name)).is_file()


def test_an_overlay_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(
        InputError, match="no overlay 'inferrence'; there are flat, grounding, inference, modalities, train"
    ):
        overlay("inferrence")


def test_help_teaches():
    command = [sys.executable, "-m", "monai_xai", "overlay", "--help"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PAGER": "cat", "PATH": "/usr/bin"}
    )
    assert "monai.bundle run --config_file" in result.stdout + result.stderr
