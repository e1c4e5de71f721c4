"""Run the benchmarks and print a table: ``python -m benchmarks`` from the root of the repository."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from monai.engines import SupervisedTrainer
from monai.networks.nets import UNet

from benchmarks.cases import CASES, PARTS, integrated_gradients, warm_up
from benchmarks.measuring import Cost, measure, measure_apart
from benchmarks.modalities import modalities
from benchmarks.perturbing import perturbing
from monai_xai import AttributionHandler, Blur, Explainer, Noise, RegionScore, Saliency


def main() -> None:
    """Run one case (for a process of its own) or all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="run this case alone and print seconds, GiB and its number as JSON")
    case = parser.parse_args().case
    if case:
        warm_up()
        print(json.dumps(measure(CASES[case]())))
        return
    for benchmark in (windows, growth, regions, integration, overhead, modalities):
        print("\n".join(benchmark()), flush=True)
    for line in perturbing():
        print(line, flush=True)


def windows() -> list[str]:
    """Compare the gradient through 27 and 343 windows with plain autograd and with the floor."""
    lines = ["\n| gradient of a region score, 4 x 128³ | seconds | additional GiB |", "|---|---|---|"]
    costs: dict[str, Cost | None] = {}
    for case in [c for c in CASES if "128" in c and "part" not in c]:
        costs[case] = cost = measure_apart(case, limit_gib=22.0)
        lines.append(
            f"| {case} | {cost.seconds:.1f} | {cost.memory:.2f} |"
            if cost
            else f"| {case} | out of memory | > 22 |"
        )
        print(lines[-1], flush=True)
    for setting in ("128/64", "128/32", "tiny 128/32"):
        own, reference, least = (costs[f"{who} {setting}"] for who in ("ours", "autograd", "floor"))
        assert own and least
        lines.append(f"{setting}: time {own.seconds / least.seconds:.2f} x the floor")
        if reference:
            assert abs(own.note / reference.note - 1) < 1e-3, "the gradients differ"
            lines.append(
                f"{setting}: time {own.seconds / reference.seconds:.2f} x autograd, "
                f"memory 1/{reference.memory / own.memory:.0f} of autograd"
            )
    return lines


def growth() -> list[str]:
    """Show that memory grows with the volume, not with the number of windows."""
    small, large = measure_apart("ours tiny 96/48"), measure_apart("ours tiny 192/48")
    assert small and large
    volume = 4 * 4 * 192**3 / 2**30
    grown = large.memory - small.memory
    return [
        f"\n96³ → 192³: {small.memory:.2f} → {large.memory:.2f} GiB, {grown / volume:.1f} volumes of 4 x 192³"
    ]


def regions() -> list[str]:
    """Compare the cost of regions in some of the windows with their share of all, and of the floor of all."""
    whole, floor = measure_apart("ours 128/32"), measure_apart("floor 128/32")
    assert whole and floor
    lines = ["\n| region in windows of 343 | seconds | x its share of the whole | x its share of the floor |"]
    lines += ["|---|---|---|---|"]
    for active in PARTS:
        part = measure_apart(f"part {active} 128/32")
        assert part
        shares = (part.seconds / cost.seconds / (active / 343) for cost in (whole, floor))
        lines.append(f"| {active} | {part.seconds:.2f} | {next(shares):.2f} | {next(shares):.2f} |")
    return lines


def integration() -> list[str]:
    """Compare adaptive IG with Captum's default 50 steps."""
    lines = [
        "\n| IG on a random U-Net | to 1 %: our passes (gap) | Captum is within 1 % for good after | within our gap "
        "after | Captum's gap at 50 | our passes to that gap |",
        "|---|---|---|---|---|---|",
    ]
    for norm in ("BATCH", "INSTANCE"):
        for baseline in (Blur(), Noise()):
            for seed in range(3):
                r = integrated_gradients(norm, baseline, seed)
                lines.append(
                    f"| {norm}, {type(baseline).__name__}, {seed} | {r['passes']:.0f} ({r['gap']:.2%}) | "
                    f"{r['captum outside 1 % at']} steps | {r['captum outside our gap at']} steps | "
                    f"{r['captum gap at 50']:.2%} | "
                    f"{r['passes to that gap']:.0f} |"
                )
    return lines


def overhead() -> list[str]:
    """Measure what the training handler costs an iteration when nothing is due."""
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
    return [
        f"\nhandler with nothing due: {idle * 1e6:.0f} µs of {iteration * 1e3:.0f} ms, {idle / iteration:.4%}"
    ]


if __name__ == "__main__":
    assert Path("benchmarks").is_dir(), "run from the root of the repository"
    main()
