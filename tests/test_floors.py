"""The house has floors: a module imports only from floors below its own. Read from the source, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "monai_xai"

# The floor of every module. A new module is entered here first.
FLOORS = {
    "errors": 0,
    "targets": 0,
    "regions": 0,
    "baselines": 0,
    "features": 0,
    "tables": 0,
    "spelling": 0,
    "files": 0,
    "memory": 0,
    "convolutions": 0,
    "clock": 0,
    "ranks": 0,
    "explanation": 0,
    "grids": 0,
    "importance": 0,
    "placing": 0,
    "calls": 1,
    "terms": 1,
    "joined": 1,
    "trials": 1,
    "forward": 1,
    "windows": 1,
    "stitching": 1,
    "networks": 1,
    "undisturbed": 1,
    "operations": 1,
    "perturbed": 1,
    "attributors": 2,
    "tasks": 3,
    "explainer": 3,
    "modalities": 3,
    "figures": 4,
    "cohorts": 4,
    "comparison": 4,
    "statistics": 4,
    "manifest": 4,
    "packing": 4,
    "grounding": 4,
    "metrics": 4,
    "transforms": 5,
    "inferers": 5,
    "batches": 5,
    "gathering": 5,
    "judging": 5,
    "cases": 5,
    "handlers": 5,
    "case_loader": 5,
    "saver": 5,
    "tensorboard": 5,
    "report": 5,
    "grounding_handler": 5,
    "comparison_handler": 5,
    "overlays": 6,
    "bundle_heads": 6,
    "bundle_settings": 6,
    "bundle_runs": 6,
    "__main__": 6,
}
# The few arrows between neighbors on one floor.
NEIGHBORS = {
    "regions": {"errors", "spelling"},
    "targets": {"errors", "regions", "spelling"},
    "grids": {"errors", "regions"},
    "baselines": {"errors", "grids", "regions", "spelling"},
    "features": {"errors", "grids", "regions", "spelling"},
    "ranks": {"errors"},
    "placing": {"baselines", "features", "grids", "regions", "spelling"},
    "explanation": {"errors", "features"},
    "importance": {"errors", "explanation", "features", "grids"},
    "tables": {"errors", "baselines", "features"},
    "calls": {"networks"},
    "terms": {"calls"},
    "trials": {"terms"},
    "joined": {"terms", "trials"},
    "forward": {"calls", "joined", "networks", "terms", "trials"},
    "windows": {"forward", "terms"},
    "stitching": {"forward", "joined", "terms", "trials", "windows"},
    "undisturbed": {"networks"},
    "operations": {"networks", "terms"},
    "perturbed": {"forward", "joined", "terms", "trials"},
    "explainer": {"tasks"},
    "modalities": {"tasks"},
    "cohorts": {"statistics"},
    "metrics": {"statistics"},
    "grounding": {"cohorts", "metrics", "statistics"},
    "comparison": {"grounding", "metrics", "statistics"},
    "cases": {"batches"},
    "handlers": {"batches", "cases"},
    "saver": {"batches", "case_loader", "cases", "handlers", "transforms"},
    "tensorboard": {"handlers"},
    "report": {"tensorboard"},
    "gathering": {"batches"},
    "judging": {"gathering", "handlers", "report", "tensorboard"},
    "grounding_handler": {"gathering", "handlers", "judging", "report", "tensorboard"},
    "comparison_handler": {"gathering", "handlers", "judging", "report", "tensorboard"},
    "bundle_settings": {"bundle_heads"},
    "bundle_runs": {"bundle_heads", "bundle_settings", "overlays"},
    "__main__": {"bundle_runs", "overlays"},
}
# Hosts that only some floors may touch.
HOSTS = {
    "captum": {2},
    "ignite": {5},
    "tensorboard": {5},
    "torch.utils.tensorboard": {5},
    "monai.engines": {5},
    "monai.handlers": {5},
}


def _modules() -> list[tuple[str, Path]]:
    """Every module of the package but its front door: (dotted name below monai_xai, file)."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = [
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for file in files
    ]
    return [(name, file) for name, file in zip(names, files, strict=True) if name != "__init__"]


MODULES = _modules()
each_module = pytest.mark.parametrize(("module", "file"), MODULES, ids=[name for name, _ in MODULES])


def _imports(file: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports anywhere, also within functions and type guards."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(file: Path) -> set[str]:
    """Return the modules of this package that a file imports, as dotted names below monai_xai."""
    names = {name for name, _ in MODULES}
    imported = set()
    for full in _imports(file):
        if full.split(".")[0] == "monai_xai":
            candidates = [".".join(full.split(".")[1:end]) for end in range(len(full.split(".")), 1, -1)]
            found = next((name for name in candidates if name in names), None)
            assert found, f"{file.name} imports {full}: take it from the module that defines it"
            imported.add(found)
    return imported


def _floor(module: str) -> int:
    top = module.split(".")[0]
    assert top in FLOORS, f"monai_xai.{top} has no floor yet: enter it in {Path(__file__).name}"
    return FLOORS[top]


def _may_import(module: str, other: str) -> bool:
    """Whether an arrow points down, stays within one package, or joins named neighbors."""
    top, other_top = module.split(".")[0], other.split(".")[0]
    return _floor(other) < _floor(module) or other_top == top or other_top in NEIGHBORS.get(top, set())


@each_module
def test_module_has_a_floor(module: str, file: Path) -> None:
    _floor(module)


def test_every_floor_entry_is_a_module() -> None:
    assert set(FLOORS) == {name.split(".")[0] for name, _ in MODULES}


@each_module
def test_arrows_point_down(module: str, file: Path) -> None:
    wrong = [
        f"{other} (floor {_floor(other)})"
        for other in sorted(_own_imports(file))
        if not _may_import(module, other)
    ]
    assert not wrong, f"{module} (floor {_floor(module)}) may not import from {', '.join(wrong)}"


@each_module
def test_hosts_stay_on_their_floors(module: str, file: Path) -> None:
    touched = {host for full in _imports(file) for host in HOSTS if f"{full}.".startswith(f"{host}.")}
    forbidden = {host for host in touched if _floor(module) not in HOSTS[host]}
    assert not forbidden, f"{module} (floor {_floor(module)}) imports {sorted(forbidden)}"


def test_no_import_cycle() -> None:
    graph = {name: _own_imports(file) - {name} for name, file in MODULES}
    while leaves := {name for name, imports in graph.items() if not imports & set(graph)}:
        graph = {name: imports for name, imports in graph.items() if name not in leaves}
    assert not graph, f"imports in a circle, or onto one: {sorted(graph)}"
