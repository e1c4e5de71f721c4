"""Sphinx settings, and the directive that draws the table of methods from the facts declared on their classes."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import monai_xai
from monai_xai import attributors

project = "monai_xai"
author = "the monai_xai developers"
version = release = monai_xai.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "sphinx_rtd_theme"
html_show_copyright = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# The sections that docstrings of this package use besides Google's own.
napoleon_custom_sections = [("Shapes", "params_style"), ("Reference", "references")]

# Hosts are linked where the network is there for certain; a build elsewhere must not wait for it.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "monai": ("https://docs.monai.io/en/stable", None),
        "captum": ("https://captum.ai/api", None),
        "ignite": ("https://docs.pytorch.org/ignite", None),
    }

# Without them, a name of a host cannot be resolved; every name of ours must be.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!monai_xai).*")]


class MethodTable(SphinxDirective):
    """``.. method-table::`` lists every attributor with the facts that its class declares."""

    HEADER = ("Method", "complete", "linear", "needs layer", "stochastic", "In one sentence")

    def run(self) -> list[nodes.Node]:
        rows = ["   * - " + "\n     - ".join(row) for row in (self.HEADER, *_method_rows())]
        table = ".. list-table::\n   :header-rows: 1\n   :widths: 20 8 8 8 8 48\n\n" + "\n".join(rows)
        return self.parse_text_to_nodes(table)


def _method_rows() -> Iterator[tuple[str, ...]]:
    for name, method in sorted(inspect.getmembers(attributors, _is_method)):
        facts = [_mark(getattr(method, fact)) for fact in ("complete", "linear", "needs_layer", "stochastic")]
        sentence = inspect.getdoc(method).split("\n\n")[0].replace("\n", " ")
        yield f":class:`~monai_xai.{name}`", *facts, sentence


def _is_method(item: Any) -> bool:
    return (
        inspect.isclass(item)
        and issubclass(item, attributors.Attributor)
        and dataclasses.is_dataclass(item)
        and not inspect.isabstract(item)
        and not item.__name__.startswith("_")
    )


def _mark(fact: Any) -> str:
    """A fact may be a property, where it depends on the fields of the instance."""
    return "depends" if isinstance(fact, property) else "yes" if fact else ""


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("method-table", MethodTable)
