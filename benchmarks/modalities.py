"""Modality Shapley values against Captum's on the same game, and the sampler against plain permutations."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import captum.attr
import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import DenseNet121, SegResNet
from torch import Tensor, nn

from benchmarks.results import Block, Table
from monai_xai import Box, Constant, ModalityExplanation, ModalityShapley, OutputScore, RegionScore
from monai_xai.modalities import shapley_values

ZEROS = {"zero": Constant(0.0), "again": Constant(0.0)}


class Calls:
    """Count the samples that a network sees."""

    def __init__(self, network: nn.Module) -> None:
        self.count = 0
        network.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.count += len(inputs[0])


def exact() -> Table:
    """Four sequences of a 3D classification network: passes and time beside Captum's."""
    torch.manual_seed(0)
    network = DenseNet121(3, 4, 2, init_features=16, growth_rate=8).eval()
    x = torch.randn(1, 4, 64, 64, 64)
    calls = Calls(network)
    start = time.perf_counter()
    found = ModalityShapley(OutputScore(1), ZEROS, progress=False)(network, x)
    ours, passes = (
        (time.perf_counter() - start) / 2,
        (calls.count - 1) / 2 + 1,
    )  # two baselines share one pass
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(16):
            network(x)
    sixteen = time.perf_counter() - start
    calls.count = 0
    start = time.perf_counter()
    mask = torch.arange(4).reshape(1, 4, 1, 1, 1)
    with torch.no_grad():
        theirs = captum.attr.ShapleyValues(network).attribute(x, 0.0, target=1, feature_mask=mask)
    captum_time, captum_passes = time.perf_counter() - start, calls.count
    assert isinstance(found, ModalityExplanation)
    difference = (found.values["zero"] - theirs[:, :, 0, 0, 0]).abs().max()
    return Table(
        ["four modalities of a 3D classification, 64³", "passes", "seconds", "x sixteen forwards"],
        [
            ("ours", int(passes), ours, ours / sixteen),
            (
                f"captum.attr.ShapleyValues, values within {difference:.0e}",
                captum_passes,
                captum_time,
                captum_time / sixteen,
            ),
        ],
    )


def windows() -> Table:
    """Four sequences of a segmentation at 128³: a lesion region against the whole volume."""
    torch.manual_seed(0)
    network, x = (
        SegResNet(3, init_filters=8, in_channels=4, out_channels=2).eval(),
        torch.randn(1, 4, 128, 128, 128),
    )
    inferer = SlidingWindowInferer(32, overlap=0.5)
    seconds, active = [], []
    for end in (10, 30):  # 1 and 8 windows
        target = RegionScore(1, Box((0, 0, 0), (end,) * 3))
        found = ModalityShapley(target, ZEROS, inferer, progress=False)(network, x)
        assert isinstance(found, ModalityExplanation)
        seconds.append(found.seconds)
        active.append(int(found.facts["active_windows"]))
    rows = [(n, took, took / n) for n, took in zip(active, seconds, strict=True)]
    return Table(["windows of 343 that meet the region, segmentation at 128³", "seconds", "per window"], rows)


def sampler() -> Table:
    """A sigmoid game of 12 players: root-mean-square error at an equal number of permutations."""
    count = 12
    weights = torch.linspace(-1, 1.5, count, dtype=torch.float64)
    members = (torch.arange(2**count)[:, None] >> torch.arange(count) & 1).double()
    table = torch.sigmoid(members @ weights)
    exact_values = shapley_values(table[None])[0]

    class Game(nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return torch.sigmoid((torch.cat(x, 1) * weights).sum(1, keepdim=True))

    inputs = {f"x{i}": torch.ones(1, 1, dtype=torch.float64) for i in range(count)}

    def plain(n: int, seed: int) -> Tensor:
        generator, total = np.random.default_rng(seed), torch.zeros(count, dtype=torch.float64)
        for _ in range(n):
            bits = 0
            for player in generator.permutation(count).tolist():
                total[player] += table[bits | 1 << player] - table[bits]
                bits |= 1 << player
        return total / n

    def ours(n: int, seed: int) -> Tensor:
        shapley = ModalityShapley(
            OutputScore(), ZEROS, max_permutations=n, tolerance=1e-12, seed=seed, progress=False
        )
        found = shapley(Game(), inputs)
        assert isinstance(found, ModalityExplanation)
        return found.values["zero"][0]

    def error(sample: object, n: int) -> float:
        squares = [(sample(n, seed) - exact_values).square().mean() for seed in range(20)]  # type: ignore[operator]
        return math.sqrt(float(sum(squares)) / len(squares))

    rows = [(n, error(ours, n), error(plain, n)) for n in (20, 100)]
    return Table(["permutations of 12 players", "error, ours", "plain permutations"], rows)


def modalities() -> Iterator[Block]:
    """Shapley values of modalities.

    Exact ones beside Captum's on the same game, through windows, and sampled ones beside plain permutations
    (root-mean-square error over 20 seeds).
    """
    yield exact()
    yield windows()
    yield sampler()
