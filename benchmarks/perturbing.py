"""Perturbation methods side by side with Captum, MONAI and plain loops, on the same scores in one process."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import captum.attr
import torch
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.networks.nets import DenseNet121
from monai.visualize import OcclusionSensitivity
from torch import Tensor, nn

from benchmarks.cases import image, segresnet, tiny_unet, warm_up
from benchmarks.gallery import read_case, train
from benchmarks.results import Block, Table
from monai_xai import (
    Blocks,
    Blur,
    Box,
    ClassScore,
    Constant,
    Explainer,
    Explanation,
    Occlusion,
    Predicted,
    RegionScore,
    ShapleyValueSampling,
)
from monai_xai.attributors.games import Game
from monai_xai.features import feature_masks
from monai_xai.memory import PeakMemory
from monai_xai.tasks import open_task

ZERO = Constant(0.0)
SMALL = 8
"""Width of a block on the phantoms, whose lesions are small."""
WINDOW, BLOCK = 64, 16


class Row(NamedTuple):
    """One comparison.

    Args:
        work: what was done.
        other: what it is held against.
        seconds: of ours and of the other.
        difference: largest difference of values, relative to the largest value.
        rounding: the same between ours and ours in double precision.
        evaluations: calls of the network on one window or image, of ours and of the other.
        memory: additional GiB at the peak, of ours.
        floor: seconds of ours over evaluations times the measured cost of one.
    """

    work: str
    other: str
    seconds: tuple[float, float]
    difference: float
    rounding: float
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


def apart(values: Tensor, expected: Tensor) -> float:
    """Return the largest difference of values, relative to the largest that is expected."""
    return float((values - expected).abs().max() / expected.abs().max())


def cost_of_one(network: nn.Module, part: Tensor) -> float:
    """Return the seconds of the network on one part: the median of some calls, at the best of some batch sizes."""
    costs = []
    with torch.no_grad():
        for size in (1, 2, 4):
            batch = part.repeat(size, *[1] * (part.ndim - 1))
            network(batch)
            times = [timed(lambda batch=batch: network(batch))[0] for _ in range(9)]  # type: ignore[misc]
            costs.append(statistics.median(times) / size)
    return min(costs)


def occlude(
    size: int,
    region: Box,
    name: str,
    *,
    block: int = BLOCK,
    other: bool = True,
    make: Callable[[], nn.Module] = tiny_unet,
) -> Row:
    """Occlude a volume of 4 channels in blocks through windows, as Captum does over the whole inference."""
    network, x = make(), image(size)
    calls, box = Calls(network), (4, block, block, block)
    explainer = Explainer(
        RegionScore(1, region),
        Occlusion(box, baseline=ZERO),
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

    theirs, difference, rounding, their_evaluations = math.nan, math.nan, math.nan, math.nan
    if other:
        with torch.no_grad():
            theirs, expected = timed(
                lambda: captum.attr.Occlusion(score).attribute(x, box, box, baselines=0.0)
            )
        their_evaluations = calls.taken()
        own = found.attributions["image"]
        difference = apart(own, expected)
        rounding = apart(own, explainer(make().double(), x.double()).attributions["image"])
    floor = seconds / (evaluations * cost_of_one(network, x[..., :WINDOW, :WINDOW, :WINDOW]))
    return Row(
        name,
        "captum.attr.Occlusion over sliding_window_inference",
        (seconds, theirs),
        difference,
        rounding,
        (evaluations, their_evaluations),
        peak.gib,
        floor,
    )


FEW = Box((0, 40, 40), (16, 56, 56))
"""Meets 4 of the 27 windows of 64³ in 128³."""
WHOLE = Box((0, 0, 0), (128, 128, 128))


def _classify() -> Iterator[Row]:
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
    difference = apart(found.attributions["image"], expected)
    captum_evaluations = calls.taken() / len(theirs)
    exact = explainer(copy.deepcopy(network).double(), x.double())
    assert isinstance(exact, Explanation)
    rounding = apart(found.attributions["image"], exact.attributions["image"])
    yield Row(
        "Occlusion, DenseNet121 3D, 64³, 64 blocks",
        f"captum.attr.Occlusion, best perturbations_per_eval={best} of {list(theirs)}",
        (seconds, theirs[best]),
        difference,
        rounding,
        (evaluations, captum_evaluations),
        peak.gib,
        floor,
    )
    for batch in (1, 4):
        sensitivity = OcclusionSensitivity(
            network, mask_size=BLOCK, n_batch=batch, overlap=0.0, mode=0.0, activate=False, verbose=False
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
        apart(own, maps[0, 1]),
        rounding,
        (evaluations, 64),
        peak.gib,
        floor,
    )


def shapley() -> Iterator[Block]:
    """Sampled Shapley values of 216 blocks through windows: error against window evaluations, beside Captum's.

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
        game = Game(scoring, scoring.draw(ZERO)[0], masks, count, scoring.term_scores())
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
    rows, budgets = [], {}
    for who, runs in found.items():
        errors = [(evaluations, float((v - reference).square().mean().sqrt())) for evaluations, v in runs]
        rows += [(who, int(evaluations), error) for evaluations, error in errors]
        budgets[who] = sum(evaluations * error**2 for evaluations, error in errors) / len(errors)
    yield Table(["Shapley values of 216 blocks", "window evaluations", "root-mean-square error"], rows)
    yield (
        "At equal error, which falls with the root of evaluations, Captum needs "
        f"{budgets['Captum'] / budgets['ours']:.0f} times the window evaluations."
    )


def coarse_to_fine() -> Iterator[Block]:
    """The ten strongest blocks of the trained lesion network, from coarse to fine beside the full grid.

    The bundle ms_lesion_segmentation, trained on its phantoms; the score is the mean lesion logit over the predicted
    mask.
    """
    with tempfile.TemporaryDirectory() as folder:
        network, inferer, case = read_case(train(Path(folder)))
    rows, tops = [], []
    for top_k in (None, 10):
        method = Occlusion((4, SMALL, SMALL, SMALL), baseline=Blur(4.0), top_k=top_k)
        explainer = Explainer(RegionScore(1, Predicted()), method, inferer, progress=False)
        seconds, found = timed(lambda explainer=explainer: explainer(network, case["image"][None]))
        assert isinstance(found, Explanation)
        blocks = found.attributions["image"][0, 0, ::SMALL, ::SMALL, ::SMALL].flatten().abs()
        tops.append(set(blocks.topk(10).indices.tolist()))
        missed = float(found.facts.get("largest_not_divided", 0.0))
        rows.append(
            ("full grid" if top_k is None else "coarse to fine", int(found.facts["pieces"]), seconds, missed)
        )
    yield Table(["blocks of 8³", "blocks tried", "seconds", "largest effect not divided"], rows)
    yield (
        f"{len(tops[0] & tops[1])} of the 10 strongest blocks are the same, with {rows[1][1] / rows[0][1]:.0%} of the "
        "evaluations."
    )


def scaling() -> Iterator[Block]:
    """How the time of an occlusion grows with volume, region and number of blocks, as a multiple of the floor.

    The floor is the number of window evaluations that must be done times the measured cost of one. Windows of 64³.
    """
    shapes = [(tiny_unet, size, end, BLOCK) for size in (64, 96, 128, 192) for end in (16, 48)]
    shapes += [(tiny_unet, 128, 16, block) for block in (32, 8)]
    shapes += [(segresnet, size, 16, BLOCK) for size in (128, 192)]
    rows = []
    for make, size, end, block in shapes:
        row = occlude(size, Box((0, 0, 0), (end,) * 3), "", block=block, other=False, make=make)
        setting = (make.__name__.replace("_", " "), f"{size}³", f"{end}³", (size // block) ** 3)
        rows.append((*setting, int(row.evaluations[0]), row.seconds[0], row.floor))
    yield Table(["network", "volume", "region", "blocks", "window evaluations", "seconds", "x floor"], rows)


def occlusion() -> Iterator[Block]:
    """Occlusion of 512 blocks of 16³ in 4 x 128³ through windows of 64³, beside Captum's over the whole inference.

    Captum takes the difference of two scores of the whole volume, which costs digits in single precision: ours are held
    against double precision as well.
    """
    yield _table(
        [
            occlude(128, FEW, "region in 4 of 27 windows"),
            occlude(128, WHOLE, "region everywhere"),
        ]
    )


def classification() -> Iterator[Block]:
    """Occlusion of a volume of a 3D DenseNet121, beside Captum at its best batch size and MONAI's own."""
    yield _table(list(_classify()))


def _table(rows: Sequence[Row]) -> Table:
    columns = ["work", "beside", "seconds, ours", "theirs", "times as fast", "largest difference, relative"]
    columns += ["ours from double precision", "evaluations, ours", "theirs", "additional GiB", "x floor"]
    return Table(
        columns,
        [
            (
                *(row.work, row.other, *row.seconds, row.speedup),
                *(f"{row.difference:.0e}", f"{row.rounding:.0e}"),
                *map(int, row.evaluations),
                *(row.memory, row.floor),
            )
            for row in rows
        ],
    )
