"""Gradients through sliding windows beside plain autograd and the bare work, and what else their users pay for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from monai.engines import SupervisedTrainer
from monai.networks.nets import UNet

from benchmarks.cases import CASES, PARTS, integrated_gradients, warm_up
from benchmarks.measuring import Cost, measure_apart, seconds_in_turn
from benchmarks.results import Block, Table
from monai_xai import AttributionHandler, Blur, Explainer, Noise, RegionScore, Saliency


def windows() -> Iterator[Block]:
    """Time and memory of the gradient of a region score over all of 4 x 128³.

    Windows of 64³ (27) and 32³ (343), a SegResNet and, `tiny`, a small U-Net; by us, by plain autograd through MONAI's
    `sliding_window_inference`, and the floor: one forward and one backward of each window, one by one. Memory is what
    is added at the peak, in a run of its own in which freed blocks go back to the system at once, of 22 GiB at most.
    """
    costs: dict[str, Cost | None] = {
        case: measure_apart(case, limit_gib=22.0) for case in CASES if "128" in case and "part" not in case
    }
    rows = [
        (case, cost.seconds, cost.memory) if cost else (case, "out of memory", "> 22")
        for case, cost in costs.items()
    ]
    yield Table(["work", "seconds", "additional GiB"], rows)
    ratios = []
    for setting in ("128/64", "128/32", "tiny 128/32"):
        own, reference, least = (costs[f"{who} {setting}"] for who in ("ours", "autograd", "floor"))
        assert own and least
        assert not reference or abs(own.note / reference.note - 1) < 1e-3, "the gradients differ"
        against = (
            (own.seconds / reference.seconds, own.memory / reference.memory) if reference else (None, None)
        )
        ratios.append((setting, own.seconds / least.seconds, *against))
    yield Table(["setting", "time, x floor", "time, x autograd", "memory, x autograd"], ratios)


def growth() -> Iterator[Block]:
    """Additional memory of the gradient at two sizes of the volume, with windows of 48³."""
    small, large = measure_apart("ours tiny 96/48"), measure_apart("ours tiny 192/48")
    assert small and large
    volume = 4 * 4 * 192**3 / 2**30
    yield Table(["volume", "GiB"], [("96³", small.memory), ("192³", large.memory)])
    yield f"The difference is {(large.memory - small.memory) / volume:.1f} volumes of 4 x 192³."


def regions() -> Iterator[Block]:
    """Regions that meet some of all windows of 4 x 128³: the time as a multiple of their share of the whole.

    The whole and its parts are run in turn, five times after a first; medians.
    """
    warm_up()
    for windows, setting in PARTS:
        parts = PARTS[windows, setting]
        names = [f"ours {setting}", *(f"part {active} {setting}" for active in parts)]
        whole, *taken = seconds_in_turn([CASES[name]() for name in names], 5)
        rows = [
            (active, seconds, seconds / whole / (active / windows))
            for active, seconds in zip(parts, taken, strict=True)
        ]
        yield Table(
            [f"of {windows} windows", "seconds", "x its share of the whole"], [*rows, (windows, whole, 1.0)]
        )


def integration() -> Iterator[Block]:
    """Adaptive Integrated Gradients to 1 % on random U-Nets beside Captum's with a fixed number of steps.

    Captum's gap goes up and down with the number of steps: *for good* is from which number on it stays there, of those
    tried (2 to 50 by twos, to 250 by tens); *first* is when it is there for the first time.
    """
    rows = []
    for norm in ("BATCH", "INSTANCE"):
        for baseline in (Blur(), Noise()):
            for seed in range(3):
                found = integrated_gradients(norm, baseline, seed)
                rows.append((f"{norm.lower()} norm, {type(baseline).__name__}, {seed}", *found.values()))
    yield Table(["network", *found], rows)


def overhead() -> Iterator[Block]:
    """What the handler costs an iteration of training in which it has nothing to do."""
    torch.manual_seed(0)
    network = UNet(3, 4, 2, (16, 32, 64), (2, 2))
    batch = {"image": torch.randn(2, 4, 32, 32, 32), "label": torch.randn(2, 2, 32, 32, 32)}
    engine = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[batch] * 10,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 1e-3),
        loss_function=torch.nn.MSELoss(),
        decollate=False,
    )
    start = time.perf_counter()
    engine.run()
    iteration = (time.perf_counter() - start) / 10
    handler = AttributionHandler(Explainer(RegionScore(1), Saliency()), 1)
    handler._seen = 1
    start = time.perf_counter()
    for _ in range(1000):
        handler(engine)
    idle = (time.perf_counter() - start) / 1000
    yield Table(
        ["iteration, ms", "handler, µs", "share"], [(iteration * 1e3, idle * 1e6, f"{idle / iteration:.4%}")]
    )
