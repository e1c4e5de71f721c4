"""Tables: what the columns of a clinical vector mean, and which of them belong to one clinical variable.

A variable may take several columns: one-hot levels, a missing indicator, quantities derived from it. They are one
*player*: they are kept or replaced together, since a patient of two sexes, or one whose body mass index does not follow
from height and weight, tells nothing about the network on patients.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from torch import Tensor

from monai_xai.baselines import Baseline
from monai_xai.errors import InputError
from monai_xai.features import Channels, Features

Value = float | str | None


class Reading(NamedTuple):
    """One variable of one patient, as a clinician reads it.

    Args:
        name: of the variable.
        value: a number in ``unit``, a level, or None where it is missing.
        unit: of the number.
        reference_range: what is normal, in ``unit``.
    """

    name: str
    value: Value
    unit: str = ""
    reference_range: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name} = missing"
        text = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        unit = f" {self.unit}" if self.unit else ""
        low_high = self.reference_range
        normal = "" if low_high is None else f" ({low_high[0]:g} to {low_high[1]:g})"
        return f"{self.name} = {text}{unit}{normal}"


@dataclass(frozen=True)
class Variable:
    """One clinical variable and how it is encoded.

    Args:
        name: as it is shown.
        kind: "continuous": one column, ``(value - center) / scale``; "categorical" or "ordinal": one column per level
            (one-hot), or a single column with the level's number if ``encoding`` is "code", for networks that embed it.
        column: its name in a table; ``name`` if empty.
        unit: of a continuous value.
        reference_range: what is normal, in ``unit``.
        levels: of a categorical or ordinal variable, in order.
        missing: whether it may be missing; a column with 1 for missing then follows its own, which are 0.
        center: what is subtracted.
        scale: what is divided by.
        encoding: see ``kind``.
        player: the player that it belongs to, if it is derived from another variable (a body mass index belongs to
            the weight); itself if empty.
    """

    name: str
    kind: Literal["continuous", "categorical", "ordinal"] = "continuous"
    column: str = ""
    unit: str = ""
    reference_range: tuple[float, float] | None = None
    levels: tuple[str, ...] = ()
    missing: bool = False
    center: float = 0.0
    scale: float = 1.0
    encoding: Literal["one-hot", "code"] = "one-hot"
    player: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(str(level) for level in self.levels or ()))
        if self.reference_range is not None:
            low, high = self.reference_range
            object.__setattr__(self, "reference_range", (float(low), float(high)))
        if self.kind not in ("continuous", "categorical", "ordinal"):
            raise InputError(
                f"Variable {self.name!r}: kind={self.kind!r} is not continuous, categorical or ordinal."
            )
        if (self.kind == "continuous") == bool(self.levels):
            raise InputError(
                f"Variable {self.name!r} is {self.kind}: levels are for categorical and ordinal ones."
            )
        if self.scale == 0:
            raise InputError(f"Variable {self.name!r}: scale must not be 0.")

    @property
    def width(self) -> int:
        """How many columns it takes."""
        is_one_hot = self.kind != "continuous" and self.encoding == "one-hot"
        return (len(self.levels) if is_one_hot else 1) + self.missing

    def encode(self, value: Value) -> list[float]:
        """Return its columns.

        Raises:
            InputError: if the value is missing and must not be, or no number, or no level.
        """
        is_missing = (
            value is None or value == "" or (isinstance(value, float | int) and math.isnan(float(value)))
        )
        if is_missing:
            if not self.missing:
                raise InputError(
                    f"{self.name} is missing, which its schema does not allow. Fill it in, leave the case out, or set "
                    "missing: true and train with it."
                )
            return [0.0] * (self.width - 1) + [1.0]
        return self._columns(value) + [0.0] * self.missing

    def _columns(self, value: Value) -> list[float]:
        if self.kind == "continuous":
            try:
                number = float(value)  # type: ignore[arg-type]
            except ValueError as error:
                raise InputError(f"{self.name} = {value!r} is no number.") from error
            return [(number - self.center) / self.scale]
        level = str(value)
        if level not in self.levels:
            near = difflib.get_close_matches(level, self.levels, n=1, cutoff=0.3)
            raise InputError(
                f"{self.name} = {level!r} is none of its levels {list(self.levels)}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        index = self.levels.index(level)
        return (
            [float(index)]
            if self.encoding == "code"
            else [float(i == index) for i in range(len(self.levels))]
        )

    def decode(self, columns: Sequence[float]) -> Reading:
        """Return what its columns say.

        Raises:
            InputError: if no patient has these values, such as two levels at once.
        """
        if self.missing and columns[-1] >= 0.5:
            return Reading(self.name, None, self.unit, self.reference_range)
        values = list(columns[: len(columns) - self.missing])
        if self.kind == "continuous":
            return Reading(self.name, values[0] * self.scale + self.center, self.unit, self.reference_range)
        index = round(values[0]) if self.encoding == "code" else _one_hot_index(values)
        if index is None or not 0 <= index < len(self.levels):
            raise InputError(
                f"{self.name} has the columns {values}, which are none of {list(self.levels)}: no such patient."
            )
        return Reading(self.name, self.levels[index])


def _one_hot_index(values: Sequence[float]) -> int | None:
    on = [i for i, value in enumerate(values) if abs(value - 1) < 1e-3]
    off = [i for i, value in enumerate(values) if abs(value) < 1e-3]
    return on[0] if len(on) == 1 and len(off) == len(values) - 1 else None


@dataclass(frozen=True)
class TableSchema:
    """The variables of a clinical vector, in the order of its columns.

    Args:
        variables: each a :class:`Variable`, or a mapping of its arguments.

    Example:
        >>> schema = TableSchema((Variable("age", unit="years", center=60, scale=10),
        ...                       Variable("sex", "categorical", levels=("f", "m"))))
        >>> schema.encode({"age": 70, "sex": "m"})
        tensor([1., 0., 1.])
        >>> [str(reading) for reading in schema.read(schema.encode({"age": 70, "sex": "m"}))]
        ['age = 70 years', 'sex = m']
    """

    variables: tuple[Variable, ...]

    def __post_init__(self) -> None:
        variables = tuple(v if isinstance(v, Variable) else _variable(v) for v in self.variables)
        names = [variable.name for variable in variables]
        if not names or len(set(names)) < len(names):
            raise InputError(f"A TableSchema needs variables of different names, got {names}.")
        object.__setattr__(self, "variables", variables)

    @classmethod
    def from_file(cls, path: str | Path) -> TableSchema:
        """Read a schema from a YAML or JSON file with a list ``variables``.

        Raises:
            InputError: naming the file and what is wrong in it.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
            return cls(tuple(content["variables"]))
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no schema with a list 'variables': {error}") from error

    @property
    def width(self) -> int:
        """How many columns a vector has."""
        return sum(variable.width for variable in self.variables)

    @property
    def players(self) -> dict[str, tuple[int, ...]]:
        """The columns of each player, by its name."""
        found: dict[str, tuple[int, ...]] = {}
        start = 0
        for variable in self.variables:
            columns = tuple(range(start, start + variable.width))
            player = variable.player or variable.name
            found[player] = found.get(player, ()) + columns
            start += variable.width
        return found

    def encode(self, row: Mapping[str, Any], units: Mapping[str, str] | None = None) -> Tensor:
        """Return a row of a table as a vector, shape (F,).

        Args:
            row: values by column.
            units: the units of the table, by column, where it has any; must be those of the schema.

        Raises:
            InputError: naming a column that is missing or renamed, a unit that differs, or a value that does not fit.
        """
        vector: list[float] = []
        for variable in self.variables:
            column = variable.column or variable.name
            if column not in row:
                near = difflib.get_close_matches(column, list(row), n=1, cutoff=0.5)
                raise InputError(
                    f"The table has no column {column!r}"
                    + (f"; is it {near[0]!r} now? Set column: {near[0]} in the schema." if near else ".")
                )
            unit = (units or {}).get(column, variable.unit)
            if unit != variable.unit:
                raise InputError(
                    f"{column!r} is in {unit!r}, the schema says {variable.unit!r}: convert the table."
                )
            vector += variable.encode(row[column])
        return torch.tensor(vector)

    def read(self, vector: Tensor) -> list[Reading]:
        """Return what a vector (F,) says, variable by variable.

        Raises:
            InputError: if its length is not that of the schema, or no patient has such values.
        """
        if tuple(vector.shape) != (self.width,):
            raise InputError(
                f"The schema describes {self.width} columns, the vector has shape {tuple(vector.shape)}."
            )
        readings, start, values = [], 0, vector.tolist()
        for variable in self.variables:
            readings.append(variable.decode(values[start : start + variable.width]))
            start += variable.width
        return readings

    def read_players(self, vector: Tensor) -> dict[str, str]:
        """Return what a vector (F,) says about each player, in words."""
        said: dict[str, list[str]] = {}
        for variable, reading in zip(self.variables, self.read(vector), strict=True):
            said.setdefault(variable.player or variable.name, []).append(str(reading))
        return {player: "; ".join(readings) for player, readings in said.items()}


def _variable(arguments: Mapping[str, Any]) -> Variable:
    try:
        return Variable(**arguments)
    except TypeError as error:
        raise InputError(f"{dict(arguments)} does not describe a variable: {error}") from error


def as_schema(value: TableSchema | str | Path) -> TableSchema:
    """Coerce the path of a file into a :class:`TableSchema`."""
    return value if isinstance(value, TableSchema) else TableSchema.from_file(value)


@dataclass(frozen=True, eq=False)
class ClinicalVariables(Features):
    """Each clinical variable of a vector is one feature; each channel of an image is.

    Args:
        schemas: a schema or its file, for the inputs that are vectors; or one by input name.
    """

    schemas: TableSchema | str | Path | Mapping[str, TableSchema | str | Path] = field(repr=False)

    def schema(self, name: str) -> TableSchema | None:
        """Return the schema of an input."""
        if isinstance(self.schemas, Mapping):
            return as_schema(self.schemas[name]) if name in self.schemas else None
        return as_schema(self.schemas)

    def mask(self, x: Tensor, name: str) -> Tensor:
        schema = self.schema(name) if x.ndim == 2 else None
        if schema is None:
            return Channels().mask(x, name)
        if schema.width != x.shape[1]:
            raise InputError(
                f"The schema of {name!r} describes {schema.width} columns, the vector has {x.shape[1]}."
            )
        numbers = torch.zeros((1, x.shape[1]), dtype=torch.long, device=x.device)
        for player, columns in enumerate(schema.players.values()):
            numbers[0, list(columns)] = player
        return numbers


@dataclass(frozen=True, eq=False)
class ReferenceRecord(Baseline):
    """Normal patients: the middle of each reference range, and levels drawn at random.

    Attributions are averaged over the records. Levels are never mixed and never left out: half a man and half a woman,
    or a patient without a sex, is no patient.

    Args:
        schema: the schema or its file.
        n_records: how many records, if there are levels to draw.
        seed: seed of the levels.
        record: values that are given, by variable, such as ``{"sex": "f"}``.

    Reference: Amoukou et al., "Accurate Shapley Values for explaining tree-based models", AISTATS 2022
    (arXiv:2106.03820), on why one-hot columns belong together.
    """

    schema: TableSchema | str | Path = field(repr=False)
    n_records: int = 8
    seed: int = 0
    record: Mapping[str, Value] = field(default_factory=dict)
    stochastic = True

    def draws(self, x: Tensor) -> tuple[Tensor, ...]:
        schema = as_schema(self.schema)
        if x.ndim != 2 or x.shape[1] != schema.width:
            raise InputError(
                f"ReferenceRecord is for vectors (N, {schema.width}), got {tuple(x.shape)}: give each input its own "
                "baseline, by name."
            )
        generator = torch.Generator().manual_seed(self.seed)
        has_levels = any(v.levels and v.name not in self.record for v in schema.variables)
        records = [
            torch.tensor([c for v in schema.variables for c in v.encode(self._value(v, generator))])
            for _ in range(self.n_records if has_levels else 1)
        ]
        return tuple(record.to(x).expand_as(x) for record in records)

    def _value(self, variable: Variable, generator: torch.Generator) -> Value:
        if variable.name in self.record:
            return self.record[variable.name]
        if variable.levels:
            return variable.levels[int(torch.randint(len(variable.levels), (), generator=generator))]
        return sum(variable.reference_range) / 2 if variable.reference_range else variable.center
