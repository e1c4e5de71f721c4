"""Cases per second in one and in two processes: ``python -m benchmarks.ranks`` from the root, on a quiet machine.

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

import torch

from benchmarks.runs import environment, files_of, run_here, write_bundle
from monai_xai.ranks import join, leave, rank, wait_for_all

WORK = {
    "network_def::channels": [16, 32],
    "explainer::attributor::n_steps": 24,
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


def seconds(folder: Path, processes: int) -> float:
    """Return how long a run takes in so many processes."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launch, "-m", "benchmarks.ranks", "--worker", str(folder)]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Measure, or work for a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--cases", type=int, default=12)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = write_bundle(Path(name) / "bundle", [f"p{number:02}" for number in range(options.cases)])
        taken, left = {}, {}
        for processes in (1, 2):
            taken[processes] = seconds(folder, processes)
            left[processes] = files_of(folder / "out", without=[])
    print("| processes | seconds | cases per second |\n|---|---|---|")
    for processes, took in taken.items():
        print(f"| {processes} | {took:.1f} | {options.cases / took:.2f} |")
    print(f"\ntwo against one: {taken[1] / taken[2]:.2f} x; files are the same: {left[1] == left[2]}")
    print(f"load of the machine, which has {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
