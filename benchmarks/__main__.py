"""Run benchmarks, all or some: ``python -m benchmarks [NAME ...]`` from the root of the repository.

Each prints its tables, keeps them in ``benchmarks/results.json`` and writes ``docs/benchmarks.md`` anew.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import gradients, methods, modalities, perturbing, ranks
from benchmarks.cases import CASES, warm_up
from benchmarks.measuring import measure
from benchmarks.results import Block, as_markdown, keep

BENCHMARKS: dict[str, Callable[[], Iterable[Block]]] = {
    benchmark.__name__: benchmark
    for benchmark in (
        gradients.windows,
        gradients.growth,
        gradients.regions,
        gradients.integration,
        gradients.overhead,
        methods.methods,
        modalities.modalities,
        perturbing.occlusion,
        perturbing.classification,
        perturbing.shapley,
        perturbing.coarse_to_fine,
        perturbing.scaling,
        ranks.processes,
    )
}


def main() -> None:
    """Run one case (for a process of its own), or benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--case", help="run this case alone and print seconds, GiB and its number as JSON")
    options = parser.parse_args()
    if options.case:
        warm_up()
        print(json.dumps(measure(CASES[options.case]())))
        return
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in options.names or BENCHMARKS:
        found = []
        print(f"\n{name}", file=sys.stderr)
        for block in BENCHMARKS[name]():
            print(as_markdown(block), flush=True)
            found.append(block)
        keep(name, inspect.getdoc(BENCHMARKS[name]) or "", found)


if __name__ == "__main__":
    assert Path("benchmarks").is_dir(), "run from the root of the repository"
    main()
