"""The command line: ``python -m monai_xai`` (or ``monai_xai``)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser

from monai_xai import attributors
from monai_xai.errors import InputError
from monai_xai.networks import choose_layer, list_layers
from monai_xai.overlays import path

_FACTS = ("complete", "summable", "needs_layer", "stochastic", "by_hooks")


def methods() -> str:
    """List the methods, with the facts that decide which to take.

    complete: the maps add up to score minus baseline score, and the gap is always reported.
    summable: values are contributions in units of the score and may be added up over voxels.
    needs_layer: looks at one layer, chosen automatically if not named.
    stochastic: draws random numbers from a seed.
    by_hooks: through sliding windows it needs a target linear in the output, such as RegionScore.
    """
    found = [getattr(attributors, name) for name in attributors.__all__]
    rows = [("method", *_FACTS, "what it gives")]
    for method in (m for m in found if issubclass(m, attributors.Attributor) and not inspect.isabstract(m)):
        summary = " ".join((inspect.getdoc(method) or "").split("\n\n")[0].split())
        rows.append((method.__name__, *("yes" if getattr(method, fact) else "-" for fact in _FACTS), summary))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def overlay(name: str = "inference") -> str:
    """Print where a shipped config overlay is: inference, train or flat.

    It adds explanations to a bundle without an edit to it:

        python -m monai.bundle run --config_file "['configs/inference.json','$(monai_xai overlay inference)']"

    Args:
        name: "inference"; "train" for training and evaluation where the validation is validate::evaluator; "flat"
            where it is plain evaluator.
    """
    return str(path(name))


def layers(config: str, *shapes: Sequence[int], network: str = "network_def") -> str:
    """List the layers of a bundle's network with the shapes of what they give, and the one that CAMs take by default.

        monai_xai layers configs/inference.yaml 4,64,64,64

    Args:
        config: a config file of the bundle, JSON or YAML, or the network part of one. Run in the bundle's folder.
        shapes: channels and size of an input, without the batch; of several inputs, one each.
        network: id of the network in the config.
    """
    if not shapes:
        raise InputError("Give the shape of each input without the batch, such as 4,64,64,64.")
    parser = ConfigParser()
    parser.read_config(config)
    sys.path.insert(0, str(Path.cwd()))  # where a bundle's own code lies
    built = parser.get_parsed_content(network).eval()

    def call() -> object:
        return built(*(torch.zeros(1, *shape) for shape in shapes))

    chosen = choose_layer(built, call)
    rows = [(name, kind, " x ".join(map(str, shape))) for name, kind, shape in list_layers(built, call)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(
        f"{'*' if row[0] == chosen else ' '} {row[0].ljust(widths[0])}  {row[1].ljust(widths[1])}  {row[2]}"
        for row in rows
    )


def main() -> None:
    """Run the command line."""
    fire.Fire({"methods": methods, "overlay": overlay, "layers": layers}, name="monai_xai")


if __name__ == "__main__":
    main()
