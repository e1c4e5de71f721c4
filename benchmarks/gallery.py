"""The maps of many methods on a trained network, side by side: ``python -m benchmarks.gallery``.

Trains the bundle ms_lesion_segmentation on its phantoms (a minute or two) unless ``--model`` names weights, explains
the mean lesion logit over the predicted mask, and writes one picture and a table. The evidence is planted in FLAIR, so
that what each method should find is known.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from monai.bundle import ConfigParser
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

import monai_xai as xai

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "ms_lesion_segmentation"
FLAIR = 0
BLUR = xai.Blur(4.0)
METHODS: dict[str, xai.Attributor] = {
    "IntegratedGradients": xai.IntegratedGradients(baseline=BLUR),
    "BlurIntegratedGradients": xai.BlurIntegratedGradients(n_steps=8, baseline=BLUR),
    "GradientShap": xai.GradientShap(8, baseline=BLUR),
    "DeepLift": xai.DeepLift(BLUR),
    "LRP": xai.LRP(),
    "InputXGradient": xai.InputXGradient(),
    "FullGrad": xai.FullGrad(),
    "FeatureAblation": xai.FeatureAblation(xai.Blocks(8), BLUR),
    "Saliency": xai.Saliency(),
    "SmoothGrad": xai.NoiseTunnel(n_samples=8, stdev_spread=0.05),
    "GuidedBackprop": xai.GuidedBackprop(),
    "Deconvolution": xai.Deconvolution(),
    "GradCam": xai.GradCam(),
    "HiResCam": xai.HiResCam(),
    "LayerCam": xai.LayerCam(),
    "SegXResCam": xai.SegXResCam(),
}


class Row(NamedTuple):
    """What is measured of a map.

    Args:
        method: its name.
        flair: share of FLAIR in the sum of absolute values.
        enrichment: positive attribution in the planted lesions over their share of the volume.
        agreement: Spearman's correlation with IntegratedGradients over the voxels near the mask, absolute values.
        gap: how far the map is from adding up; None where it does not promise to.
        seconds: time it took.
    """

    method: str
    flair: float | None
    enrichment: float
    agreement: float
    gap: float | None
    seconds: float


def train(folder: Path) -> Path:
    """Train the bundle as ``make demo`` does, and return the weights."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.yaml"]
    settings = {"epochs": 6, "ckpt_dir": folder, "output_dir": folder / "eval"}
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    subprocess.run([*command, *options], cwd=BUNDLE, check=True, stdout=subprocess.DEVNULL)
    return folder / "model.pt"


def read_case(model: Path) -> tuple[torch.nn.Module, Any, Mapping[str, Any]]:
    """Return the network, the inferer and the first held-out case of the bundle."""
    sys.path.insert(0, str(BUNDLE))
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.yaml"))
    parser.update({"bundle_root": str(BUNDLE)})
    network = parser.get_parsed_content("network")
    state = torch.load(model, map_location="cpu", weights_only=True)
    network.load_state_dict(state.get("model", state))
    scripts = parser.get_parsed_content("imports") and sys.modules["scripts"]
    folder = parser.get_parsed_content("dataset_dir")
    case = scripts.held_out_cases(folder)[0]
    return (
        network.eval(),
        parser.get_parsed_content("inferer"),
        parser.get_parsed_content("preprocessing")(case),
    )


def measure(method: str, explanation: xai.Explanation, lesion: Tensor, first: Tensor | None) -> Row:
    """Return the numbers of one map."""
    values = explanation.attributions["image"][0].as_tensor()
    near = torch.nn.functional.max_pool3d(lesion[None].float(), 9, 1, 4)[0, 0] > 0
    total = values.clamp(min=0).sum(0)
    share = float(total[lesion[0]].sum() / total.sum()) / float(lesion.float().mean())
    own, reference = (v.abs().sum(0)[near].numpy() for v in (values, values if first is None else first))
    size = values.abs().sum((1, 2, 3))
    is_by_channel = len(size) > 1 and float(size.std()) > 1e-6 * float(size.mean())
    return Row(
        method,
        float(size[FLAIR] / size.sum()) if is_by_channel else None,
        share,
        float(spearmanr(own, reference).statistic),
        None if explanation.gap is None else float(explanation.gap),
        explanation.seconds,
    )


def draw(
    maps: Mapping[str, NDArray[np.float32]], image: NDArray[np.float32], lesion: NDArray[np.bool_]
) -> Any:
    """Return the slice with most lesion voxels, every map in its own color scale."""
    depth = int(lesion.sum((0, 1)).argmax())
    background = np.rot90(image[..., depth])
    columns = 6
    rows = -(-(len(maps) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.6 * rows), facecolor="black")
    for axis in axes.flat:
        axis.axis("off")
    low, high = np.percentile(image, (1, 99.5))
    for axis, (name, values) in zip(axes.flat, {"FLAIR and lesions": None, **maps}.items(), strict=False):
        axis.imshow(background, cmap="gray", vmin=low, vmax=high)
        axis.set_title(name, color="white", fontsize=8)
        if values is not None:
            part = np.rot90(values[..., depth])
            limit = float(np.quantile(np.abs(values[np.abs(values) > 0]), 0.995))
            axis.imshow(
                part, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=np.clip(np.abs(part) / limit * 2, 0, 1)
            )
        axis.contour(np.rot90(lesion[..., depth]), [0.5], colors="lime", linewidths=0.6)
    figure.tight_layout(pad=0.3)
    return figure


def main() -> None:
    """Explain by all methods, and write the picture; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="weights of the bundle; trained first if not given")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "_static" / "methods.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        network, inferer, case = read_case(arguments.model or train(Path(folder)))
    image, lesion = case["image"], case["label"].as_tensor() > 0
    maps, rows, first = {}, [], None
    for name, method in tqdm(METHODS.items()):
        explainer = xai.Explainer(xai.RegionScore(1), method, inferer, progress=False, tolerated_gap=1.0)
        explanation = explainer(network, image[None])
        assert isinstance(explanation, xai.Explanation)
        rows.append(measure(name, explanation, lesion, first))
        values = explanation.attributions["image"][0].as_tensor()
        first = values if first is None else first
        maps[name] = values.sum(0).numpy() if len(values) > 1 else values[0].numpy()
    draw(maps, image[FLAIR].numpy(), lesion[0].numpy()).savefig(arguments.output, dpi=110, facecolor="black")
    print(
        "| method | FLAIR's share | in the lesions, times their volume | Spearman with IG | gap | seconds |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        flair = "" if row.flair is None else f"{row.flair:.0%}"
        gap = "" if row.gap is None else f"{row.gap:.1%}"
        print(
            f"| {row.method} | {flair} | {row.enrichment:.0f} | {row.agreement:.2f} | {gap} | {row.seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
