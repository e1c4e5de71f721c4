"""MONAI's bundles look a name up in every module that starts with "monai", and MONAI's own class wins.

So a public name of this package must be found by MONAI's own search, there and nowhere else.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
from monai.bundle import ComponentLocator

import monai_xai

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(monai_xai.__path__, prefix="monai_xai.")
]
PUBLIC = sorted(
    (name, module.__name__)
    for module in MODULES
    for name, item in inspect.getmembers(
        module, lambda item: inspect.isclass(item) or inspect.isfunction(item)
    )
    if item.__module__ == module.__name__ and not name.startswith("_")
)


@pytest.fixture(scope="module")
def locator() -> ComponentLocator:
    return ComponentLocator()


def test_there_are_names_to_check() -> None:
    assert len(PUBLIC) > len(MODULES)


@pytest.mark.parametrize(("name", "module"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_monai_finds_the_name_here_only(locator: ComponentLocator, name: str, module: str) -> None:
    assert locator.get_component_module_name(name) == module


def test_locator_sees_what_it_is_asked_about(locator: ComponentLocator) -> None:
    assert locator.get_component_module_name("SlidingWindowInferer") == "monai.inferers.inferer"


def test_every_exported_name_is_documented_and_exists() -> None:
    missing = [name for name in monai_xai.__all__ if not getattr(monai_xai, name).__doc__]
    assert not missing
