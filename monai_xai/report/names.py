"""Case names replaced by salted hashes, wherever they stand."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from numbers import Number
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from monai_xai.cohorts import ModalityCohort
from monai_xai.files import keyed_hash
from monai_xai.grounding import Grounding

_Value = TypeVar("_Value")
_SHORT = 4


class Disguise:
    """Other names for cases: a keyed hash (HMAC-SHA256) of the true one.

    Args:
        names: the true ones.
        salt: the key, which is written nowhere. With one salt a case has one name in all reports; without its key
            nobody can try names until one fits. None draws one, so that no two disguises have names in common.

    Example:
        >>> Disguise(["patient26"], salt="secret").words("patient26 fails")
        'ff619c66 fails'
    """

    def __init__(self, names: Iterable[str], salt: str | None = None) -> None:
        key = new_salt() if salt is None else salt
        true = sorted({str(name) for name in names} - {""}, key=lambda name: (-len(name), name))
        self.names = _hashed(true, key)
        # A long name is replaced wherever it stands, also within a path; a short one ("7") only as a word, since it
        # could be a part of anything.
        parts = [
            re.escape(name) if len(name) >= _SHORT else rf"(?<!\w){re.escape(name)}(?!\w)" for name in true
        ]
        self._pattern = re.compile("|".join(parts), re.IGNORECASE) if parts else None
        self._folded = {name.casefold(): other for name, other in reversed(self.names.items())}

    def words(self, text: str) -> str:
        """Return a text in which every true name, in capitals or not, is replaced."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: self._other(found[0]), text)

    def of(self, value: _Value) -> _Value:
        """Return a copy of a value in which every text, also in mappings, lists and dataclasses, is disguised."""
        return self._walk(value)

    def _other(self, found: str) -> str:
        return self.names.get(found) or self._folded.get(found.casefold(), "case")

    def _walk(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.words(value)
        if value is None or isinstance(value, Number | np.ndarray | np.generic | Tensor):
            return value
        if isinstance(value, Mapping):
            return {self._walk(key): self._walk(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._walk(part) for part in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(
                value, **{f.name: self._walk(getattr(value, f.name)) for f in fields(value) if f.init}
            )
        return self.words(str(value))


def new_salt() -> str:
    """Return a key that nobody knows; no generator that others draw from is touched."""
    return secrets.token_hex(16)


def disguise_of(grounding: Grounding, cohort: ModalityCohort | None, salt: str | None) -> Disguise:
    """Return other names for all cases that a report could name."""
    names = [case.id for case in grounding.cases]
    names += [case for test in grounding.tests for case in test.per_case]
    left_out = grounding.configuration.get("left_out")
    names += list(left_out) if isinstance(left_out, Mapping) else []
    names += [] if cohort is None else list(cohort.cases)
    return Disguise(names, salt)


def disguised(grounding: Grounding, disguise: Disguise) -> Grounding:
    """Return the same results under other names; the words of the procedure (verdict, "P1", "PASS") stay."""
    of = disguise.of
    return replace(
        grounding,
        sentence=of(grounding.sentence),
        tests=tuple(
            replace(test, title=of(test.title), message=of(test.message), per_case=of(dict(test.per_case)))
            for test in grounding.tests
        ),
        missing=of(grounding.missing),
        cases=tuple(replace(case, id=disguise.words(str(case.id))) for case in grounding.cases),
        curves=of(dict(grounding.curves)),
        configuration=of(dict(grounding.configuration)),
        places=of(dict(grounding.places)),
    )


def disguised_cohort(cohort: ModalityCohort, disguise: Disguise) -> ModalityCohort:
    """Return a cohort of the same numbers under other names."""
    other = ModalityCohort(cohort.collapse_below, cohort.seed)
    for case, explanation in cohort.cases.items():
        other.add(disguise.words(case), disguise.of(explanation))
    return other


def _hashed(names: list[str], key: str) -> dict[str, str]:
    """Return a hash for each name, as short as tells them apart."""
    digests = [keyed_hash(name.encode("utf-8", "surrogatepass"), key) for name in names]
    length = next(n for n in range(8, 65) if len({digest[:n] for digest in digests}) == len(digests))
    return {name: digest[:length] for name, digest in zip(names, digests, strict=True)}
