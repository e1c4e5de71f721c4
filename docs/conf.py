"""Sphinx settings; directives that read from the package what nobody should write twice; formulas without a network."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from types import ModuleType

from docutils import nodes
from docutils.core import publish_from_doctree
from docutils.utils import new_document
from docutils.writers.html5_polyglot import Writer
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

import monai_xai
from monai_xai import attributors

project = "monai_xai"
author = "the monai_xai developers"
version = release = monai_xai.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "sphinx_rtd_theme"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # an overriding method is documented where it is declared
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Sections of docstrings besides Google's own.
napoleon_custom_sections = ["Shapes", "Reference"]

# Names of ours must resolve. Those of hosts do where the network is there for certain; no other build waits for it.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!monai_xai\b).*")]
_TYPE_VARIABLES = (
    "clock.Item", "joined.Result", "joined.Returned", "judging.Result", "ranks._Item", "ranks._Value", "trials.Key",
)  # fmt: skip
nitpick_ignore = [("py:class", f"monai_xai.{name}") for name in _TYPE_VARIABLES]
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "monai": ("https://docs.monai.io/en/stable", None),
        "ignite": ("https://docs.pytorch.org/ignite", None),
    }


class PublicNames(SphinxDirective):
    """``.. public-names:: module`` documents a module and its public names, under the name users import them by."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module = importlib.import_module(self.arguments[0])
        entries = [f".. automodule:: {module.__name__}\n   :no-members:"]
        for name, item in _public_members(module):
            home = monai_xai if getattr(monai_xai, name, None) is item else module
            kind = "autofunction" if inspect.isfunction(item) else "autoclass"
            members = "" if kind == "autofunction" else "\n   :members:"
            entries.append(f".. {kind}:: {home.__name__}.{name}{members}")
        return self.parse_text_to_nodes("\n\n".join(entries))


def _public_members(module: ModuleType) -> list[tuple[str, object]]:
    """Return the classes and functions of a module in the order of its source; of a package, what it exports."""
    exported = getattr(module, "__all__", None)
    names = exported or [name for name in vars(module) if not name.startswith("_")]
    members = [(name, getattr(module, name)) for name in names]
    return [
        (name, item)
        for name, item in members
        if (inspect.isclass(item) or inspect.isfunction(item))
        and (exported or item.__module__ == module.__name__)
    ]


class MethodTable(SphinxDirective):
    """``.. method-table::`` lists every attributor with the facts that its class declares."""

    FACTS = ("complete", "summable", "linear", "by_window", "needs_layer", "stochastic")

    def run(self) -> list[nodes.Node]:
        header = ("Method", *(fact.replace("_", " ") for fact in self.FACTS))
        rows = ["   * - " + "\n     - ".join(row) for row in (header, *self._rows())]
        table = ".. list-table::\n   :header-rows: 1\n   :widths: 46 11 11 8 8 8 12\n\n" + "\n".join(rows)
        return self.parse_text_to_nodes(table)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for name, method in _public_members(attributors):
            if _is_method(method):
                summary = " ".join((inspect.getdoc(method) or "").split("\n\n")[0].split())
                facts = ("yes" if getattr(method, fact) else "" for fact in self.FACTS)
                yield f"| :class:`~monai_xai.{name}`\n       | {summary}", *facts


def _is_method(item: object) -> bool:
    """Tell an attributor that can be used from an interface and from other names."""
    is_attributor = inspect.isclass(item) and issubclass(item, attributors.Attributor)
    return is_attributor and dataclasses.is_dataclass(item) and not inspect.isabstract(item)


def quote_shapes(app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Make literals of the shapes in a docstring, such as (N, C, *spatial), which reST would read as emphasis."""
    literal_or_shape = re.compile(r"(``.+?``)|(\([^()`]*\*[a-z]+[^()`]*\))", re.DOTALL)
    text = literal_or_shape.sub(lambda match: match[1] or f"``{match[2]}``", "\n".join(lines))
    lines[:] = text.split("\n")


def write_inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers draw by themselves; MathJax would need a network."""
    translator.body.append(_mathml(nodes.paragraph("", "", nodes.math("", node.astext()))))
    raise nodes.SkipNode


def write_displayed_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed formula with its number, if it has one."""
    number = (
        f'<span class="eqno">({get_node_equation_number(translator, node)})</span>' if node["number"] else ""
    )
    formula = _mathml(nodes.math_block("", node.astext()))
    translator.body.append(translator.starttag(node, "div", CLASS="math") + number + formula + "</div>")
    raise nodes.SkipNode


def _mathml(formula: nodes.Element) -> str:
    """Return what docutils, which knows MathML, makes of a formula."""
    document = new_document("formula")
    document += formula
    options = {"math_output": "MathML", "output_encoding": "unicode", "halt_level": 2}
    page = publish_from_doctree(document, writer=Writer(), settings_overrides=options)
    return str(page[page.index("<math") : page.rindex("</math>")]) + "</math>"


def setup(app: Sphinx) -> None:
    """Register the directives, the writers of formulas, and the hook in front of napoleon's."""
    app.connect("autodoc-process-docstring", quote_shapes, priority=400)
    app.add_html_math_renderer("mathml", (write_inline_math, None), (write_displayed_math, None))
    app.add_directive("public-names", PublicNames)
    app.add_directive("method-table", MethodTable)
