"""Values that somebody gives for a bundle's config: on a command line, as text, by the id of what they replace."""

from __future__ import annotations

import ast
import copy
import difflib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from monai_xai.bundle_heads import Config, mappings_in
from monai_xai.errors import InputError

_READ_BY_MONAI = {"imports", "initialize", "run", "finalize"}


def merge_settings(parser: ConfigParser, settings: Mapping[str, Any]) -> None:
    """Put values into a config by their ids, as ``python -m monai.bundle run`` does, but for what nothing would read.

    Args:
        parser: has the config.
        settings: values by id; with ``+`` in front lists are extended and dicts updated. A config given as text is
            what it says.

    Raises:
        InputError: if there is no such place, or it is a top-level name that the config neither has nor refers to,
            with places that may be meant.
    """
    values = {name: _parsed(name, value) for name, value in settings.items()}
    words = json.dumps([parser.get(), values], default=str, ensure_ascii=False)
    for name, value in values.items():
        id_ = name.removeprefix("+").replace("#", "::")
        if not _is_read(parser, id_, words):
            near = _near(parser, id_)
            meant = f" Did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"{name} sets nothing: the config has no place for it.{meant}")
        try:
            merge_kv(parser, name, value)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"{name} cannot be set to {value!r}: {error}") from error


def _parsed(name: str, value: Any) -> Any:
    if not (isinstance(value, str) and value.lstrip().startswith("{") and "_target_" in value):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{name} is no config in YAML: {value!r}, {error}") from error


def _is_read(parser: ConfigParser, id_: str, words: str) -> bool:
    """Tell whether a config has a place for a value, or says its name."""
    parent, _, _ = id_.rpartition("::")
    if parent:
        return isinstance(parser.get(parent), dict | list)
    is_said = re.search(rf"[@%](?:::|#)*{re.escape(id_)}\b", words)  # also from further down, as @::name
    return id_ in _READ_BY_MONAI or id_ in parser or bool(is_said)


def _near(parser: ConfigParser, id_: str) -> list[str]:
    """Return ids that may be meant: another part of the config that has such a place, or another top-level name."""
    config = parser.get()
    parent, _, last = id_.rpartition("::")
    if not parent:
        return difflib.get_close_matches(id_, map(str, config), 3)
    if isinstance(reference := parser.get(parent), str) and reference.startswith("@"):
        return [f"{reference[1:]}::{last}"]
    parts = list(_parts(config))
    same_end = [part for part in parts if part.endswith(f"::{parent}")]
    return [f"{part}::{last}" for part in same_end[:3] or difflib.get_close_matches(parent, parts, 3)]


def _parts(config: Config, above: str = "") -> Iterator[str]:
    """Yield the ids of all dicts in a config."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield f"{above}{key}"
            yield from _parts(value, f"{above}{key}::")


def as_config(value: Any) -> Config:
    """Return a target, method, region or baseline as a config.

    Args:
        value: a config, as a mapping or as text; or text as written in code, and as explanations have it in
            ``method`` and ``target``. Names without dots are those of ``monai_xai``.

    Raises:
        InputError: if it is none of these, or there is no such name.

    Example:
        >>> as_config("IntegratedGradients(n_steps=8, baseline=Blur(sigma=2.0))")
        {'_target_': 'monai_xai.IntegratedGradients', 'n_steps': 8,
         'baseline': {'_target_': 'monai_xai.Blur', 'sigma': 2.0}}
        >>> as_config("{_target_: Occlusion, window: [1, 8, 8]}")
        {'_target_': 'monai_xai.Occlusion', 'window': [1, 8, 8]}
    """
    if isinstance(value, str):
        value = yaml.safe_load(value) if value.lstrip().startswith("{") else _from_code(value)
    if not isinstance(value, dict) or "_target_" not in value:
        raise InputError(
            f"{value!r} is neither a name such as IntegratedGradients, nor a config such as "
            '"{_target_: IntegratedGradients, n_steps: 8}", nor IntegratedGradients(n_steps=8).'
        )
    config = copy.deepcopy(value)
    for part in mappings_in(config):
        if "_target_" in part:
            part["_target_"] = _dotted(str(part["_target_"]))
    return dict(config)


def _dotted(name: str) -> str:
    if "." in name:
        return name
    known = importlib.import_module("monai_xai").__all__
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise InputError(
            f"There is no {name} in monai_xai{'; did you mean ' + ', '.join(near) if near else ''}."
        )
    return f"monai_xai.{name}"


def _from_code(text: str) -> Any:
    try:
        return _literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        return text


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name | ast.Attribute):
        return {"_target_": ast.unparse(node)}
    if isinstance(node, ast.Call) and not node.args:
        options = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
        return {"_target_": ast.unparse(node.func), **options}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(part) for part in node.elts]
    return ast.literal_eval(node)
