"""What the documents show is true: Python runs, YAML parses, and Sphinx has nothing to complain about."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    file
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.rst"), *(ROOT / "docs").rglob("*.md")]
    if file.is_file() and "_build" not in file.parts
)
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))

# A fenced block of Markdown, or a code-block directive with its indented body (options in between are skipped).
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^ *```", re.DOTALL | re.MULTILINE
)
DIRECTIVE = re.compile(
    r"^(?P<indent> *)\.\. code-block:: (?P<language>\w+)\n(?:(?P=indent) +:[^\n]*\n)*"
    r"(?P<code>(?:\n|(?P=indent) +[^\n]*\n)*)",
    re.MULTILINE,
)


def _blocks(document: Path, language: str) -> Iterator[str]:
    """Yield the code of every block of one language, preceded by blank lines so that line numbers stay true."""
    text = document.read_text(encoding="utf-8")
    for match in (FENCE if document.suffix == ".md" else DIRECTIVE).finditer(text):
        if match["language"] == language:
            lines_before = text.count("\n", 0, match.start("code"))
            yield "\n" * lines_before + textwrap.dedent(match["code"])


@each_document
def test_python_of_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one document run one after the other in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": document.stem}
    for code in _blocks(document, "python"):
        exec(compile(code, str(document), "exec"), namespace)


@each_document
def test_yaml_of_document_parses(document: Path) -> None:
    for code in _blocks(document, "yaml"):
        assert isinstance(yaml.safe_load(code), dict), f"{document.name}: not a mapping:\n{code.strip()}"


def test_blocks_are_found_in_both_kinds_of_document(tmp_path: Path) -> None:
    markdown, restructured = tmp_path / "a.md", tmp_path / "b.rst"
    markdown.write_text("text\n\n```python\nx = 1\n```\n\n```yaml\nx: 1\n```\n")
    restructured.write_text(
        "text\n\n.. code-block:: python\n   :caption: c\n\n   x = 1\n\n   y = 2\n\nmore\n"
    )
    assert list(_blocks(markdown, "python")) == ["\n\n\nx = 1\n"]
    assert next(_blocks(restructured, "python")).strip() == "x = 1\n\ny = 2"
    assert not list(_blocks(restructured, "yaml"))


@pytest.mark.slow
def test_sphinx_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--nitpicky", "--quiet", "--keep-going"]
    built = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "html" / "index.html").is_file()
