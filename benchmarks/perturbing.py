"""Perturbation methods side by side with Captum, MONAI and plain loops, on the same scores in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import captum.attr
import torch
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.networks.nets import DenseNet121
from monai.visualize import OcclusionSensitivity
from torch import Tensor, nn

from benchmarks.cases import image, tiny_unet, warm_up
from monai_xai import (
    Blocks,
    Box,
    ClassScore,
    Constant,
    Explainer,
    Explanation,
    Occlusion,
    RegionScore,
    ShapleyValueSampling,
)
from monai_xai.attributors.games import Game
from monai_xai.features import feature_masks
from monai_xai.memory import PeakMemory
from monai_xai.tasks import open_task

ZERO = Constant(0.0)
WINDOW, BLOCK = 64, 16


class Row(NamedTuple):
    """One comparison.

    Args:
        work: what was done.
        other: what it is held against.
        seconds: of ours and of the other.
        difference: largest difference of values, relative to the largest value.
        evaluations: calls of the network on one window or image, of ours and of the other.
        memory: additional GiB at the peak, of ours.
        floor: seconds of ours over evaluations times the measured cost of one.
    """

    work: str
    other: str
    seconds: tuple[float, float]
    difference: float
    evaluations: tuple[float, float]
    memory: float
    floor: float

    @property
    def speedup(self) -> float:
        """How many times as long the other takes."""
        return self.seconds[1] / self.seconds[0]


class Calls:
    """Counts the samples that a network sees."""

    def __init__(self, network: nn.Module) -> None:
        self._count: list[int] = []
        add = self._count.append
        network.register_forward_pre_hook(lambda module, inputs: add(len(inputs[0])))

    def taken(self) -> int:
        """Return how many there were since the last look."""
        total = sum(self._count)
        self._count.clear()
        return total


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that work takes, and its result."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def cost_of_one(network: nn.Module, part: Tensor) -> float:
    """Return the seconds of the network on one part, at the best of some batch sizes."""
    costs = []
    with torch.no_grad():
        for size in (1, 2, 4):
            batch = part.repeat(size, *[1] * (part.ndim - 1))
            network(batch)
            costs += [timed(lambda batch=batch: network(batch))[0] / size for _ in range(8)]
    return min(costs)


def occlusion(size: int, region: Box, name: str, *, other: bool = True) -> Row:
    """Occlude a volume of 4 channels in blocks through windows, as Captum does over the whole inference."""
    network, x = tiny_unet(), image(size)
    calls, block = Calls(network), (4, BLOCK, BLOCK, BLOCK)
    explainer = Explainer(
        RegionScore(1, region),
        Occlusion(block, baseline=ZERO),
        SlidingWindowInferer(WINDOW, overlap=0.5, sw_batch_size=1),
        progress=False,
    )
    warm_up()
    with PeakMemory() as peak:
        seconds, found = timed(lambda: explainer(network, x))
    evaluations = calls.taken()
    assert isinstance(found, Explanation)
    place = tuple(slice(a, b) for a, b in zip(region.start, region.end, strict=True))

    def score(inputs: Tensor) -> Tensor:
        output = sliding_window_inference(inputs, WINDOW, 1, network, overlap=0.5)
        return output[(slice(None), 1, *place)].mean((1, 2, 3))  # type: ignore[index, union-attr]

    theirs, difference, their_evaluations = math.nan, math.nan, math.nan
    if other:
        with torch.no_grad():
            theirs, expected = timed(
                lambda: captum.attr.Occlusion(score).attribute(x, block, block, baselines=0.0)
            )
        their_evaluations = calls.taken()
        own = found.attributions["image"]
        difference = float((own - expected).abs().max() / expected.abs().max())
    floor = seconds / (evaluations * cost_of_one(network, x[..., :WINDOW, :WINDOW, :WINDOW]))
    return Row(
        name,
        "captum.attr.Occlusion over sliding_window_inference",
        (seconds, theirs),
        difference,
        (evaluations, their_evaluations),
        peak.gib,
        floor,
    )


FEW = Box((0, 40, 40), (16, 56, 56))
"""Meets 4 of the 27 windows of 64³ in 128³."""
WHOLE = Box((0, 0, 0), (128, 128, 128))


def classification() -> Iterator[Row]:
    """Occlude a volume of a 3D DenseNet121, beside Captum at its best batch size and MONAI's OcclusionSensitivity."""
    torch.manual_seed(0)
    network = DenseNet121(3, 1, 2).eval()
    calls, x = Calls(network), image(WINDOW)[:, :1]
    block = (1, BLOCK, BLOCK, BLOCK)
    explainer = Explainer(ClassScore(1), Occlusion(block, baseline=ZERO), progress=False)
    explainer(network, x)
    calls.taken()
    with PeakMemory() as peak:
        seconds, found = timed(lambda: explainer(network, x))
    evaluations = calls.taken()
    assert isinstance(found, Explanation)
    floor = seconds / (evaluations * cost_of_one(network, x))
    calls.taken()
    theirs: dict[int, float] = {}
    method = captum.attr.Occlusion(network)
    for size in (1, 2, 4, 8):
        with torch.no_grad():
            theirs[size], expected = timed(
                lambda size=size: method.attribute(
                    x, block, block, baselines=0.0, target=1, perturbations_per_eval=size
                )
            )
    best = min(theirs, key=lambda size: theirs[size])
    difference = float((found.attributions["image"] - expected).abs().max() / expected.abs().max())
    captum_evaluations = calls.taken() / len(theirs)
    yield Row(
        "Occlusion, DenseNet121 3D, 64³, 64 blocks",
        f"captum.attr.Occlusion, best perturbations_per_eval={best} of {list(theirs)}",
        (seconds, theirs[best]),
        difference,
        (evaluations, captum_evaluations),
        peak.gib,
        floor,
    )
    for batch in (1, 4):
        sensitivity = OcclusionSensitivity(
            network, mask_size=BLOCK, n_batch=batch, overlap=0.0, mode=0.0, verbose=False
        )
        theirs[batch], (maps, _) = timed(lambda sensitivity=sensitivity: sensitivity(x))
    best = min((1, 4), key=lambda size: theirs[size])
    scores = explainer(network, x)
    assert isinstance(scores, Explanation)
    own = scores.score - scores.attributions["image"][0, 0]
    yield Row(
        "the same",
        f"monai.visualize.OcclusionSensitivity, best n_batch={best} of [1, 4]",
        (seconds, theirs[best]),
        float((own - maps[0, 1]).abs().max() / own.abs().max()),
        (evaluations, 64),
        peak.gib,
        floor,
    )


def shapley() -> list[str]:
    """Sample Shapley values of 216 blocks through windows: error against window evaluations, beside Captum's.

    The geometry is that of the other rows at half the size. Captum's own code walks the same game, whose value it asks
    us for (27 window evaluations each, as it would make them): over the volume itself it would take hours.
    """
    network, x, features = tiny_unet(), image(64), Blocks(11)
    inferer = SlidingWindowInferer(WINDOW // 2, overlap=0.5, sw_batch_size=1)
    target = RegionScore(1, Box((0, 20, 20), (8, 28, 28)))

    def ours(n_samples: int, seed: int) -> tuple[float, Tensor]:
        method = ShapleyValueSampling(features, ZERO, n_samples=n_samples, seed=seed)
        found = Explainer(target, method, inferer, progress=False)(network, x)
        assert isinstance(found, Explanation)
        values = found.attributions["image"][0, 0, ::11, ::11, ::11].flatten().double()
        return float(found.facts["passes"]) * len(scoring.terms), values

    question = Explainer(target, ShapleyValueSampling(features, ZERO), inferer, progress=False)
    with open_task(question, network, x) as task:
        scoring = task.scoring(next(iter(task.targets().values())))
        masks, count = feature_masks(features, scoring.inputs)
        game = Game(scoring, scoring.draw(ZERO)[0], masks, count, scoring.score())
        asked = 0

        def value(present: Tensor) -> Tensor:
            nonlocal asked
            asked += len(present)
            bits = [sum(1 << i for i, there in enumerate(row) if there) for row in present.bool().tolist()]
            game.prepare(bits)
            return torch.cat([game(coalition) for coalition in bits])

        def theirs(n_samples: int) -> tuple[float, Tensor]:
            nonlocal asked
            asked = 0
            torch.manual_seed(0)
            method = captum.attr.ShapleyValueSampling(value)
            found = method.attribute(torch.ones(1, count), 0.0, n_samples=n_samples)[0].double()
            return asked * 27, found

        reference = ours(120, 1000)[1]
        found = {"ours": [ours(n, 1) for n in (2, 4, 8, 16)], "Captum": [theirs(n) for n in (1, 2, 4, 8)]}
    lines = [
        "\n| Shapley values of 216 blocks | window evaluations | root-mean-square error |",
        "|---|---|---|",
    ]
    budgets = {}
    for who, runs in found.items():
        errors = [(evaluations, float((v - reference).square().mean().sqrt())) for evaluations, v in runs]
        lines += [f"| {who} | {evaluations:.0f} | {error:.2e} |" for evaluations, error in errors]
        budgets[who] = sum(evaluations * error**2 for evaluations, error in errors) / len(errors)
    lines.append(
        f"at equal error (which falls with the root of evaluations) Captum needs "
        f"{budgets['Captum'] / budgets['ours']:.0f} times the window evaluations"
    )
    return lines


def coarse_to_fine() -> str:
    """Look for the ten strongest blocks of a lesion-like region, beside the full grid."""
    network, x = tiny_unet(), image(128)
    inferer = SlidingWindowInferer(WINDOW, overlap=0.5, sw_batch_size=1)

    def explain(top_k: int | None) -> Explanation:
        method = Occlusion((4, BLOCK, BLOCK, BLOCK), baseline=ZERO, top_k=top_k)
        found = Explainer(RegionScore(1, FEW), method, inferer, progress=False)(network, x)
        assert isinstance(found, Explanation)
        return found

    full, found = explain(None), explain(10)
    tops = [
        set(
            e.attributions["image"][0, 0, ::BLOCK, ::BLOCK, ::BLOCK].flatten().abs().topk(10).indices.tolist()
        )
        for e in (full, found)
    ]
    return (
        f"\ncoarse to fine: {len(tops[0] & tops[1])} of the 10 strongest blocks with {found.facts['pieces']} of "
        f"{found.facts['pieces_of_full_grid']} evaluations; largest effect of a box that was not divided: "
        f"{found.facts['largest_not_divided']:.2e}, of all {float(full.attributions['image'].abs().max()):.2e}"
    )


def scaling() -> list[str]:
    """Measure how the time of an occlusion grows with the volume, the region and the number of blocks."""
    lines = ["\n| volume | region | windows | seconds | x floor |", "|---|---|---|---|---|"]
    for size in (64, 96, 128, 192):
        for name, end in (("16³", 16), ("32³", 32)):
            row = occlusion(size, Box((0, 0, 0), (end,) * 3), "", other=False)
            lines.append(
                f"| {size}³ | {name} | {row.evaluations[0]:.0f} evaluations | {row.seconds[0]:.1f} | {row.floor:.2f} |"
            )
    return lines


HEAD = (
    "\n| work | beside | seconds, ours | theirs | times as fast | largest difference | evaluations, ours | theirs | "
    "additional GiB | x floor |\n|---|---|---|---|---|---|---|---|---|---|"
)


def perturbing() -> Iterator[str]:
    """Yield the lines of all comparisons."""
    yield HEAD
    yield _line(occlusion(128, FEW, "Occlusion, region in 4 of 27 windows, 128³, 512 blocks"))
    yield _line(occlusion(128, WHOLE, "Occlusion, region everywhere, 128³, 512 blocks"))
    yield from map(_line, classification())
    yield from shapley()
    yield coarse_to_fine()
    yield from scaling()


def _line(row: Row) -> str:
    return (
        f"| {row.work} | {row.other} | {row.seconds[0]:.1f} | {row.seconds[1]:.1f} | {row.speedup:.1f} | "
        f"{row.difference:.1e} | {row.evaluations[0]:.0f} | {row.evaluations[1]:.0f} | {row.memory:.2f} | "
        f"{row.floor:.2f} |"
    )
