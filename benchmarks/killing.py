"""Kill an explaining run at random moments and start it again: ``python -m benchmarks.killing`` from the root.

The run is that of a bundle's config with an overlay: a small network, Integrated Gradients and Shapley values of
modalities over a cohort. What it leaves in the end, after as many kills as are asked for, must be what a run leaves
that nobody has disturbed: the same files, byte for byte. TensorBoard's events hold times and are not compared.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.runs import files_of, run_apart, run_here, write_bundle


class Outcome(NamedTuple):
    """What became of a run.

    Args:
        kills: how often it was killed.
        starts: how often it was started.
        moments: seconds after the start of each kill, and how many files of the output were there.
        differing: files that differ from those of the undisturbed run, or that only one of the two has.
        lost: finished cases whose record was gone or changed after a kill.
    """

    kills: int
    starts: int
    moments: list[tuple[float, int]]
    differing: list[str]
    lost: list[str]


def kill_and_resume(folder: Path, kills: int, cases: int, seed: int) -> Outcome:
    """Run a bundle without and with kills, and compare what they leave.

    Args:
        folder: empty; the two bundles are written there.
        kills: how many.
        cases: how many scans.
        seed: of the moments.
    """
    calm = write_bundle(folder / "calm", [f"p{number:02}" for number in range(cases)])
    hunted = Path(shutil.copytree(calm, folder / "hunted"))  # with times of change, which count as well
    run_here(calm)
    start = time.perf_counter()
    assert run_apart(calm, **{"output_dir": "again"}) == 0
    whole = time.perf_counter() - start
    moments, lost, starts = [], [], 0
    chance = random.Random(seed)
    while len(moments) < kills:
        starts += 1
        before = files_of(hunted / "out" / "xai" / "manifest", without=[".partial-", "settings.json"])
        seconds = chance.uniform(0.02, whole * 0.6)
        if run_apart(hunted, seconds) == 0:  # done before its time: once more
            lost += _compare(calm, hunted)
            shutil.rmtree(hunted / "out")
            continue
        after = files_of(hunted / "out" / "xai" / "manifest")
        lost += [name for name, digest in before.items() if after.get(name) != digest]
        moments.append((seconds, len(files_of(hunted / "out"))))
    assert run_apart(hunted) == 0
    return Outcome(kills, starts + 1, moments, _compare(calm, hunted), lost)


def _compare(one: Path, other: Path) -> list[str]:
    mine, theirs = (
        files_of(one / "out", without=["events.out"]),
        files_of(other / "out", without=["events.out"]),
    )
    return [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]


def main() -> None:
    """Kill a run and say what is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_and_resume(Path(folder), options.kills, options.cases, options.seed)
    print("| kill | seconds after the start | files there |\n|---|---|---|")
    for number, (seconds, files) in enumerate(outcome.moments, 1):
        print(f"| {number} | {seconds:.2f} | {files} |")
    print(f"\n{outcome.starts} starts, {outcome.kills} kills; finished and lost: {outcome.lost or 'none'}")
    print(f"files that differ from an undisturbed run: {outcome.differing or 'none'}")


if __name__ == "__main__":
    main()
