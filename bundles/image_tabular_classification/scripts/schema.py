"""What the columns of a clinical table mean, and how a row becomes a vector; see configs/clinical.yaml."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

KINDS = ("continuous", "categorical", "ordinal")
SAYS_MISSING = ("", "nan", "na", "n/a", "none", "null")
CONFUSED_WITH: Mapping[str, str] = {"°C": "°F", "%": "a share of 1", "mg/L": "mg/dL", "years": "months"}


@dataclass(frozen=True)
class Variable:
    """One clinical variable and how it is encoded.

    Args:
        name: as it is shown.
        kind: "continuous", "categorical" or "ordinal".
        column: its name in the table.
        unit: of a continuous variable.
        reference_range: what is normal, in `unit`.
        levels: of a categorical or ordinal variable, in order.
        missing: whether it may be missing.
        center: what is subtracted from a continuous value.
        scale: what it is divided by then.
        possible: what a living patient can have, in `unit`.

    Raises:
        ValueError: if the facts contradict each other, naming the variable.
    """

    name: str
    kind: str
    column: str
    unit: str = ""
    reference_range: tuple[float, float] | None = None
    levels: tuple[str, ...] = ()
    missing: bool = False
    center: float = 0.0
    scale: float = 1.0
    possible: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"variable {self.name!r}: kind={self.kind!r} must be one of {', '.join(KINDS)}.")
        if (self.kind == "continuous") == bool(self.levels):
            raise ValueError(
                f"variable {self.name!r} is {self.kind}: levels are for categorical and ordinal variables, "
                "which need them."
            )
        if self.scale == 0:
            raise ValueError(f"variable {self.name!r}: scale must not be 0.")

    @property
    def width(self) -> int:
        """How many columns of the vector it takes."""
        return (len(self.levels) or 1) + self.missing

    @property
    def column_names(self) -> list[str]:
        """What each of its columns says, such as "age" or "sex: F"."""
        own = [f"{self.name}: {level}" for level in self.levels] or [self.name]
        return own + [f"{self.name}: missing"] * self.missing

    def encode(self, text: str) -> list[float]:
        """Its columns of the vector.

        Args:
            text: what the table says.

        Raises:
            ValueError: if that is missing and must not be, no number, an impossible number, or no level.
        """
        text = text.strip()
        if text.lower() in SAYS_MISSING and text not in self.levels:
            if not self.missing:
                raise ValueError(
                    "is missing, which the schema does not allow. Fill it in, leave the case out with --exclude_cases, "
                    "or set `missing: true` in the schema and train again."
                )
            return [0.0] * (self.width - 1) + [1.0]
        return (self._level(text) if self.levels else self._number(text)) + [0.0] * self.missing

    def _number(self, text: str) -> list[float]:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{text!r} is no number. Correct it, without its unit and with a decimal point.")
        if self.possible is not None and not self.possible[0] <= value <= self.possible[1]:
            low, high = self.possible
            other = CONFUSED_WITH.get(self.unit)
            raise ValueError(
                f"{value:g} {self.unit} is impossible (possible: {low:g} to {high:g} {self.unit}). Is it in another "
                f"unit{f', such as {other}' if other else ''}? Convert the column to {self.unit}, correct the value, "
                "or leave the case out with --exclude_cases."
            )
        return [(value - self.center) / self.scale]

    def _level(self, text: str) -> list[float]:
        if text not in self.levels:
            raise ValueError(
                f"{text!r} is none of the levels {', '.join(self.levels)}{suggest(text, self.levels)}. Correct the "
                "table, or add the level to the schema and train again: the network has never seen it."
            )
        return [float(level == text) for level in self.levels]


@dataclass(frozen=True)
class TableLayout:
    """The columns of the table that are no clinical variables.

    Args:
        image: file names, relative to the folder of images.
        patient: whom an image is of.
        label: whether there is a pneumonia.
        positive: what the label says then.
        negative: what it says otherwise.
        only: columns and what they must say for a row to be used.
    """

    image: str
    patient: str
    label: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    only: Mapping[str, Sequence[str]]

    def read_label(self, text: str) -> int | None:
        """1 with pneumonia, 0 without, None if the table does not say.

        Args:
            text: one finding, or several separated by ``|``; ``a/b`` is a finding below ``a``.

        Raises:
            ValueError: if it says anything else.
        """
        if text.strip().lower() in SAYS_MISSING:
            return None
        if says(text, self.positive):
            return 1
        if all(says(finding, self.negative) for finding in text.split("|")):
            return 0
        raise ValueError(
            f"{text!r} is no label, expected {' or '.join(self.negative)} (no pneumonia), or "
            f"{' or '.join(self.positive)} (pneumonia). Correct the table, list it under `positive` or `negative` in "
            "the schema, or leave such rows out with `only`."
        )

    def uses(self, row: Mapping[str, str]) -> bool:
        """Whether a row is used."""
        return all(says(row[column], allowed) for column, allowed in self.only.items())


@dataclass(frozen=True)
class ClinicalSchema:
    """A clinical table: its layout and, in the order of the vector, its variables.

    Args:
        table: columns that are no variables.
        variables: of different names.
        file: where this was read.

    Example:
        >>> sex = Variable("sex", "categorical", "Sex", levels=("F", "M"))
        >>> age = Variable("age", "continuous", "Age", center=50, scale=10, missing=True)
        >>> schema = ClinicalSchema(TableLayout("file", "id", "label", ("1",), ("0",), {}), (sex, age))
        >>> schema.encode({"Sex": "M", "Age": "70"})
        tensor([0., 1., 2., 0.])
        >>> schema.columns
        {'sex': [0, 1], 'age': [2, 3]}
    """

    table: TableLayout
    variables: tuple[Variable, ...]
    file: str = "the schema"

    @property
    def width(self) -> int:
        """Length of the vector."""
        return sum(variable.width for variable in self.variables)

    @property
    def column_names(self) -> list[str]:
        """What each column of the vector says."""
        return [name for variable in self.variables for name in variable.column_names]

    @property
    def columns(self) -> dict[str, list[int]]:
        """The columns of the vector that belong to each variable, by its name."""
        found, start = {}, 0
        for variable in self.variables:
            found[variable.name] = list(range(start, start + variable.width))
            start += variable.width
        return found

    def encode(self, row: Mapping[str, str]) -> Tensor:
        """A row of the table, by column, as a vector of shape (width,).

        Raises:
            ValueError: if a value does not fit, naming its column.
        """
        vector: list[float] = []
        for variable in self.variables:
            try:
                vector += variable.encode(row[variable.column])
            except ValueError as error:
                raise ValueError(f"column {variable.column!r}: {error}") from error
        return torch.tensor(vector)


def read_schema(path: str | os.PathLike[str]) -> ClinicalSchema:
    """Read a file such as configs/clinical.yaml.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is no such file, naming what is wrong.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        table = _layout(content["table"])
        possible = {name: _range(limits) for name, limits in (content.get("possible") or {}).items()}
        variables = tuple(_variable(facts, possible) for facts in content["variables"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no clinical schema as configs/clinical.yaml is: {what}") from error
    names = [variable.name for variable in variables]
    unknown = sorted(set(possible) - set(names))
    if len(set(names)) < len(names) or not names or unknown:
        raise ValueError(
            f"{path}: variables need different names, got {names}"
            + (f", and `possible` names {unknown}, which is none of them." if unknown else ".")
        )
    return ClinicalSchema(table, variables, str(path))


def _layout(facts: Mapping[str, Any]) -> TableLayout:
    positive, negative = _words(facts["positive"]), _words(facts["negative"])
    only = {column: _words(words) for column, words in (facts.get("only") or {}).items()}
    return TableLayout(facts["image"], facts["patient"], facts["label"], positive, negative, only)


def _variable(facts: Mapping[str, Any], possible: Mapping[str, tuple[float, float]]) -> Variable:
    known = {field.name for field in fields(Variable)} - {"possible"}
    unknown = sorted(set(facts) - known)
    if unknown:
        raise ValueError(
            f"variable {facts.get('name')!r} has {', '.join(unknown)}{suggest(unknown[0], known)}"
        )
    given = dict(facts)
    given["levels"] = _words(facts.get("levels") or ())
    if given.get("reference_range") is not None:
        given["reference_range"] = _range(given["reference_range"])
    return Variable(**given, possible=possible.get(facts["name"]))


def _words(values: Sequence[object]) -> tuple[str, ...]:
    if any(isinstance(value, bool) for value in values):
        raise ValueError(
            f"{list(values)} holds a truth value, which is what YAML makes of yes and no: put it into quotes"
        )
    return tuple(str(value) for value in values)


def _range(limits: Sequence[float]) -> tuple[float, float]:
    low, high = (float(limit) for limit in limits)
    if not low < high:
        raise ValueError(f"the range [{low:g}, {high:g}] must go from low to high")
    return low, high


def says(text: str, names: Iterable[str]) -> bool:
    """Whether a cell names one of these findings, or one below it."""
    parts = [part.strip() for part in text.split("|")]
    return any(part == name or part.startswith(f"{name}/") for part in parts for name in names)


def suggest(word: str, known: Iterable[str]) -> str:
    """What might be meant, as the end of a sentence; empty if nothing is near."""
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=2, cutoff=0.4)
    return f" (did you mean {' or '.join(repr(by_lower_case[name]) for name in near)}?)" if near else ""
