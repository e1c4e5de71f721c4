"""What the documents show is true: Python runs, commands run, YAML parses, and Sphinx has nothing to complain about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    file
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.rst"), *(ROOT / "docs").rglob("*.md")]
    if file.is_file() and "_build" not in file.parts
)
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix()
)

# A fenced block of Markdown; a code-block directive of reStructuredText with its options and its indented body.
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^ *```", re.DOTALL | re.MULTILINE
)
DIRECTIVE = re.compile(
    r"^(?P<indent> *)\.\. code-block:: (?P<language>\w+)\n(?P<options>(?:(?P=indent) +:[^\n]*\n)*)"
    r"(?P<code>(?:\n|(?P=indent) +[^\n]*\n)*)",
    re.MULTILINE,
)


class Block(NamedTuple):
    """A block of code in a document; blank lines in front of the code keep line numbers true."""

    language: str
    code: str
    caption: str | None


def _blocks(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for match in (FENCE if document.suffix == ".md" else DIRECTIVE).finditer(text):
        lines_before = text.count("\n", 0, match.start("code"))
        caption = re.search(r":caption: *(\S+)", match.groupdict().get("options") or "")
        code = "\n" * lines_before + textwrap.dedent(match["code"])
        yield Block(match["language"], code, caption and caption[1])


def _script(code: str) -> str:
    """Return the commands of a console block that uses ``python``, else nothing."""
    commands = [line.removeprefix("$ ") for line in code.splitlines() if line.startswith("$ ")]
    return "\n".join(commands) if any("python " in command for command in commands) else ""


@each_document
def test_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run one after the other, as a reader would type them, in an empty folder.

    All Python shares one namespace. In reStructuredText, a block with a caption is a file of that name, and console
    blocks that use ``python`` are run with this one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, code, caption in _blocks(document):
        if caption:
            file = tmp_path / caption
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code.lstrip("\n"), encoding="utf-8")
        elif language == "python":
            exec(compile(code, str(document), "exec", dont_inherit=True), namespace)
        elif language == "console" and document.suffix == ".rst":
            ran = subprocess.run(["bash", "-ec", _script(code)], capture_output=True, text=True)
            assert ran.returncode == 0, f"{code.strip()}\n{ran.stdout}\n{ran.stderr}"


@each_document
def test_yaml_of_document_parses(document: Path) -> None:
    for language, code, _ in _blocks(document):
        if language == "yaml":
            assert isinstance(yaml.safe_load(code), dict), f"{document.name}: not a mapping:\n{code.strip()}"


def test_blocks_are_found_in_both_kinds_of_document(tmp_path: Path) -> None:
    markdown, restructured = tmp_path / "a.md", tmp_path / "b.rst"
    markdown.write_text("text\n\n```python\nx = 1\n```\n\n```yaml\nx: 1\n```\n")
    restructured.write_text(
        "text\n\n.. code-block:: yaml\n   :caption: a/b.yaml\n\n   x: 1\n\n   y: 2\n\n"
        "more\n\n.. code-block:: console\n\n   $ cd a\n   $ python b\n   output\n"
    )
    assert list(_blocks(markdown)) == [("python", "\n\n\nx = 1\n", None), ("yaml", "\n" * 7 + "x: 1\n", None)]
    files, console = _blocks(restructured)
    assert (files.language, files.code.strip(), files.caption) == ("yaml", "x: 1\n\ny: 2", "a/b.yaml")
    assert _script(console.code) == "cd a\npython b"
    assert not _script("$ make demo")


@pytest.mark.slow
def test_sphinx_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--nitpicky", "--quiet", "--keep-going"]
    built = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "html" / "index.html").is_file()
