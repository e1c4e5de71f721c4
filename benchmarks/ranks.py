"""Cases, and windows of one case, in one and in two processes: ``python -m benchmarks processes``, on a quiet machine.

Each process has one thread, so that two processes on two cores are held against one process on one core. Starting up
and importing is not counted: the clock runs from the start to the end of the evaluator's run, in the first process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer

from benchmarks.cases import image, segresnet
from benchmarks.results import Block, Table, as_markdown
from benchmarks.runs import environment, files_of, run_here, write_bundle
from monai_xai import Box, Explainer, Explanation, IntegratedGradients, RegionScore
from monai_xai.ranks import join, leave, rank, wait_for_all

WORK = {
    "network_def::channels": [16, 32],
    "explainer::attributor::n_steps": 192,
    "explain_handler::explainer": "@explainer",
    "device": {"_target_": "monai_xai.ranks.join"},
}

CASES, REPEATS = 30, 2


def work(folder: Path) -> None:
    """Run the bundle as one of several processes; the first one prints its seconds."""
    torch.set_num_threads(1)
    join()
    wait_for_all("the start")
    start = time.perf_counter()
    run_here(folder, **WORK)
    if rank() == 0:
        print(json.dumps(time.perf_counter() - start))
    leave()


def work_on_one_case() -> None:
    """Explain one case of 125 windows as one of several processes; the first one prints seconds, score and norm."""
    torch.set_num_threads(1)
    join()
    network, volume = segresnet(), image(96)
    inferer = SlidingWindowInferer(32, overlap=0.5)
    target = RegionScore(1, Box((0, 0, 0), (96, 96, 96)))
    explainer = Explainer(
        target, IntegratedGradients(6), inferer, progress=False, spread=True, tolerated_gap=1.0
    )
    wait_for_all("the start")
    start = time.perf_counter()
    explanation = explainer(network, volume)
    took = time.perf_counter() - start
    assert isinstance(explanation, Explanation)
    if rank() == 0:
        print(json.dumps([took, float(explanation.score), float(explanation.attributions["image"].norm())]))
    leave()


def in_processes(processes: int, *options: str) -> Any:
    """Return what the first of so many workers prints."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launch, "-m", "benchmarks.ranks", *options]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, or work for a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--one-case", action="store_true", help="work on the windows of one case")
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    if options.one_case:
        work_on_one_case()
        return
    for block in processes():
        print(as_markdown(block))


def processes() -> Iterator[Block]:
    """Cases, and windows of one case, in one and in two processes of one thread each.

    Starting up and importing is not counted. 30 cases of 192 steps of Integrated Gradients; one case of 125 windows.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = write_bundle(Path(name) / "bundle", [f"p{number:02}" for number in range(CASES)])
        taken: dict[int, list[float]] = {1: [], 2: []}
        left = {}
        for count in (1, 2) * REPEATS:
            shutil.rmtree(folder / "out", ignore_errors=True)
            taken[count].append(in_processes(count, "--worker", str(folder)))
            left[count] = files_of(folder / "out", without=[])
    cases = {count: statistics.median(times) for count, times in taken.items()}
    one, two = (in_processes(count, "--one-case") for count in (1, 2))
    rows = [
        ("cases", cases[1], cases[2], cases[1] / cases[2]),
        ("windows of one case", one[0], two[0], one[0] / two[0]),
    ]
    yield Table(["spread over processes", "one, seconds", "two, seconds", "times as fast"], rows)
    sameness = "the same" if left[1] == left[2] else "NOT the same"
    yield (
        f"The files of one and two processes are {sameness}. Score and norm of the one case differ by "
        f"{abs(two[1] / one[1] - 1):.0e} and {abs(two[2] / one[2] - 1):.0e} of themselves."
    )


if __name__ == "__main__":
    main()
