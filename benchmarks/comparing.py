"""The table of docs/how_to/compare_methods.rst: ``python -m benchmarks.comparing`` from the root of the repository.

Methods as in the shipped overlay, on phantoms with a network that is known to use the lesion; every criterion.
"""

from __future__ import annotations

import csv
import io
import warnings

import torch

from benchmarks.phantoms import make_phantoms, train
from monai_xai import (
    Attributor,
    Blocks,
    Blur,
    ClassScore,
    DeepLift,
    EdgeControl,
    Explainer,
    FeatureAblation,
    GradCam,
    GradientShap,
    GroundingCase,
    InputXGradient,
    IntegratedGradients,
    NoiseControl,
    Saliency,
    compare,
)
from monai_xai.comparison import Comparison

SHAPE, COUNT, SEED = (32, 32), 12, 0


def methods() -> dict[str, Attributor]:
    """Return the methods of the overlay by name, in units of a small image."""
    baseline = Blur(4.0)
    return {
        method.name: method
        for method in (
            IntegratedGradients(baseline=baseline),
            GradientShap(n_samples=8, baseline=baseline),
            DeepLift(baseline=baseline),
            InputXGradient(),
            Saliency(),
            GradCam(),
            FeatureAblation(features=Blocks(4), baseline=baseline),
            EdgeControl(),
            NoiseControl(),
        )
    }


def run() -> Comparison:
    """Compare the methods on phantoms without a tag."""
    network = train(SHAPE, by_tag=False, seed=SEED)
    phantoms = make_phantoms(COUNT, SHAPE, tag="none", seed=SEED)
    cases = [GroundingCase(f"case{i}", phantoms.images[i : i + 1]) for i in range(COUNT)]
    regions = {case.id: phantoms.lesions[i : i + 1] for i, case in enumerate(cases)}
    explainers = {name: Explainer(ClassScore(), method, progress=False) for name, method in methods().items()}
    return compare(explainers, network, cases, regions=regions)


def as_table(found: Comparison) -> str:
    """Return the table of the comparison as rows of a csv-table, with intervals of the mean ranks."""
    heads, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in found.as_markdown().splitlines()
    )
    shown = [number for number, head in enumerate(heads) if not head.startswith("peak GiB")]
    for cells, whole in zip(lines, found.overall(), strict=True):
        cells[1] += f", {whole.rank_low:.2f} to {whole.rank_high:.2f}"
    heads[1] += ", 95 % interval"
    text = io.StringIO()
    table = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    table.writerows([cells[number] for number in shown] for cells in (heads, *lines))
    return text.getvalue()


def main() -> None:
    """Print the table, and which methods are not told apart from the best one."""
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    found = run()
    print(as_table(found))
    for row in found.overall():
        print(f"{row.method}: mean rank {row.rank:.2f}, p against the best {row.p:.3g}")


if __name__ == "__main__":
    main()
