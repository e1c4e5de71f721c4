"""Cases, and windows of one case, in one and in two processes: ``python -m benchmarks.ranks``, on a quiet machine.

Each process has one thread, so that two processes on two cores are held against one process on one core. Starting up
and importing is not counted: the clock runs from the start to the end of the evaluator's run, in the first process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer

from benchmarks.cases import image, segresnet
from benchmarks.runs import environment, files_of, run_here, write_bundle
from monai_xai import Box, Explainer, Explanation, IntegratedGradients, RegionScore
from monai_xai.ranks import join, leave, rank, wait_for_all

WORK = {
    "network_def::channels": [16, 32],
    "explainer::attributor::n_steps": 192,
    "explain_handler::explainer": "@explainer",
    "device": {"_target_": "monai_xai.ranks.join"},
}


def work(folder: Path) -> None:
    """Run the bundle as one of several processes; the first one prints its seconds."""
    torch.set_num_threads(1)
    join()
    wait_for_all()
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
    wait_for_all()
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
    parser.add_argument("--cases", type=int, default=12)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    if options.one_case:
        work_on_one_case()
        return
    with tempfile.TemporaryDirectory() as name:
        folder = write_bundle(Path(name) / "bundle", [f"p{number:02}" for number in range(options.cases)])
        taken, left = {}, {}
        for processes in (1, 2):
            shutil.rmtree(folder / "out", ignore_errors=True)
            taken[processes] = in_processes(processes, "--worker", str(folder))
            left[processes] = files_of(folder / "out", without=[])
    print("| processes | seconds | cases per second |\n|---|---|---|")
    for processes, took in taken.items():
        print(f"| {processes} | {took:.1f} | {options.cases / took:.2f} |")
    print(f"\ntwo against one: {taken[1] / taken[2]:.2f} x; files are the same: {left[1] == left[2]}")
    one, two = (in_processes(processes, "--one-case") for processes in (1, 2))
    print(
        f"windows of one case: {one[0]:.1f} and {two[0]:.1f} s, {one[0] / two[0]:.2f} x; "
        f"score and norm {one[1:]}, {two[1:]}"
    )
    print(f"load of the machine, which has {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
