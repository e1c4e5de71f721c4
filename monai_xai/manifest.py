"""The manifest of an explaining run: which cases are finished, under which settings, with which files."""

from __future__ import annotations

import enum
import errno
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_xai.errors import InputError, SettingsChangedError
from monai_xai.files import as_csv, as_json, checksum, keyed_hash, remove_partial_files, write_whole

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_FOLDER = "manifest"
_LONGEST = 48
_DEEPEST = 12


@dataclass(frozen=True)
class CaseRecord:
    """One case of a run.

    Args:
        case: its name; the label where names are not to be seen.
        label: its name in file names, see :func:`label_of`.
        key: what it was made from, see :func:`key_of`.
        files: SHA-256 of each file, by path below the output folder.
        outputs: one row per file of maps, for the index.
        numbers: what cohorts need of it, by explainer.
        failures: why it is not finished; empty if it is.
    """

    case: str
    label: str
    key: str
    files: Mapping[str, str] = field(default_factory=dict)
    outputs: Sequence[Mapping[str, Any]] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[str] = ()


class Manifest:
    """The records of a run in ``folder``, which is ``manifest`` below its output folder, one file per case.

    A record is written when all files of its case are there, and never before; each file is written whole or not at
    all. So a run that is killed at any moment leaves finished cases and nothing else that counts.

    Args:
        output_dir: the output folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / _FOLDER

    def open(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Begin or continue a run: remove what a killed one left half done, and compare its settings with these.

        Args:
            settings: what decides the result, as JSON knows it.
            overwrite: remove what was made under other settings.

        Raises:
            SettingsChangedError: if the settings are others, naming them.
            InputError: if another process is at work there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        remove_partial_files(self.output_dir)
        file = self.folder / "settings.json"
        settings = json.loads(as_json(settings))
        before = self._read(file)
        if before is None:
            changed = ["what they were is not known"] if self.records() else []
        else:
            changed = list(_differences(before, settings))
        if changed and not overwrite:
            raise SettingsChangedError(
                f"{self.output_dir} holds the results of a run with other settings: {'; '.join(changed)}. Choose "
                "another output folder, or overwrite=True to remove those results."
            )
        if changed:
            for record in self.records():
                self.remove(record)
            for file in self.folder.glob("*.pt"):
                file.unlink()
        write_whole(file, as_json(settings))

    def records(self) -> list[CaseRecord]:
        """Return all records, by label; one that cannot be read counts as none."""
        files = sorted(file for file in self.folder.glob("sub-*.json"))
        found = (self._read(file) for file in files)
        return [CaseRecord(**record) for record in found if _is_record(record)]

    def of(self, label: str) -> CaseRecord | None:
        """Return the record of a case; None if there is none."""
        record = self._read(self._file(label))
        return CaseRecord(**record) if _is_record(record) else None

    def finished(self) -> dict[str, CaseRecord]:
        """Return the cases that are finished, by key: all their files are there and as they were written."""
        whole = {}
        for record in self.records():
            if record.failures:
                continue
            if broken := [name for name, digest in record.files.items() if not self._is_whole(name, digest)]:
                logger.warning(
                    "Case %s is explained again: %s is missing or changed.", record.case, broken[0]
                )
                continue
            whole[record.key] = record
        return whole

    def add(self, record: CaseRecord) -> None:
        """Write the record of a case, and remove files of an earlier one that it does not have any more."""
        before = self.of(record.label)
        write_whole(self._file(record.label), as_json(asdict(record)))
        for name in set(before.files if before else ()) - set(record.files):
            self._inside(name).unlink(missing_ok=True)

    def remove(self, record: CaseRecord) -> None:
        """Remove a record and the files that it names."""
        self._file(record.label).unlink(missing_ok=True)
        for name in record.files:
            self._inside(name).unlink(missing_ok=True)

    def require_own(self, label: str, key: str, keys: Iterable[str], case: str) -> None:
        """Make sure that no other case of this run has the label.

        Args:
            label: of the case that is about to be written.
            key: of that case.
            keys: of all cases of the run.
            case: name of the case, for the message.

        Raises:
            InputError: if there is one.
        """
        record = self.of(label)
        if record is not None and record.key != key and record.key in set(keys):
            raise InputError(
                f"Two cases are called {case}: the files of the one would replace those of the other. Give each a "
                "name of its own in the data list, such as case_id."
            )

    def write_index(self, keys: Sequence[str]) -> None:
        """Write ``index.json`` and ``index.csv``: cases in the order of ``keys``, then those of earlier runs.

        Raises:
            OSError: if a file cannot be written.
        """
        places = {key: place for place, key in enumerate(keys)}
        known = [r for r in self.records() if r.key in places or not r.failures]
        known.sort(key=lambda r: (places.get(r.key, len(places)), r.label))
        cases = [
            {"case": r.case, "label": r.label, "failures": list(r.failures), "files": dict(r.files)}
            for r in known
        ]
        rows = [{"case": r.case, **row} for r in known for row in r.outputs]
        write_whole(self.output_dir / "index.json", as_json({"cases": cases, "outputs": rows}))
        write_whole(self.output_dir / "index.csv", as_csv(_for_spreadsheets(row) for row in rows))

    def _lock(self) -> None:
        """Hold the folder until this process ends, or is killed; where files cannot be locked, do without."""
        if fcntl is None:
            return
        held = os.open(
            self.folder / ".lock", os.O_RDWR | os.O_CREAT
        )  # never closed, which would let go of it
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"Another run is at work in {self.output_dir}: choose another output folder, or wait for it. "
                    "Processes that are to share one run must know of each other, see the overlay 'processes'."
                ) from error

    def _file(self, label: str) -> Path:
        return self.folder / f"sub-{label}.json"

    def _is_whole(self, name: str, digest: str) -> bool:
        file = self._inside(name)
        return file.is_file() and checksum(file) == digest

    def _inside(self, name: str) -> Path:
        """Return a file named by a record, which somebody may have edited: it must lie in the output folder."""
        path = (self.output_dir / name).resolve()
        if not path.is_relative_to(self.output_dir.resolve()):
            raise InputError(
                f"The manifest in {self.folder} names {name!r}, which is not in the output folder."
            )
        return path

    def _read(self, file: Path) -> Any:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            logger.warning("%s is no JSON and is left out of account.", file)
            return None


def label_of(name: str, salt: str | None = None) -> str:
    """Return the name of a case as it stands in file names: letters, digits and ``+``, as labels of BIDS.

    A name of letters, digits and underscores is kept, with ``+`` for an underscore. Of any other, what is left of it is
    followed by the first 8 digits of its SHA-256, so that two names do not become one.

    Args:
        name: any text, of any length.
        salt: a secret; given one, the label is a keyed hash (HMAC-SHA256) and tells nothing of the name. A plain hash
            would tell: names and record numbers are few enough to try them all.

    Example:
        >>> label_of("patient_07"), label_of("../../etc/passwd")
        ('patient+07', 'etc+passwd+3754d6cb')
    """
    data = name.encode("utf-8", "surrogatepass")
    if salt is not None:
        return keyed_hash(data, salt)[:16]
    if len(name) <= _LONGEST and re.fullmatch(r"[0-9A-Za-z](\w*[0-9A-Za-z])?", name, re.ASCII):
        return name.replace("_", "+")
    kept = re.sub(r"[^0-9A-Za-z]+", "+", name).strip("+")[:_LONGEST].rstrip("+")
    return f"{kept}+{hashlib.sha256(data).hexdigest()[:8]}".lstrip("+")


def key_of(item: Any, salt: str | None = None) -> str:
    """Return a hash of what a data list says of one case; files in it count with size and time of change.

    Args:
        item: an item of the data list.
        salt: a secret, where names are not to be found out, see :func:`label_of`.
    """
    return keyed_hash(json.dumps(_stamped(item), sort_keys=True).encode(), salt or "")


def fingerprint(network: nn.Module) -> str:
    """Return a SHA-256 of the weights and buffers of a network, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}:".encode())
        digest.update(_bytes_of(tensor) if isinstance(tensor, Tensor) else repr(tensor).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what computes the results."""
    return {name: version(name) for name in ("monai_xai", "captum", "monai", "torch")}


def spelled_settings(value: Any) -> Any:
    """Return the settings of an explainer, inferer or transform as JSON knows them, whatever class it is of.

    Random generators, progress bars and numbers that objects keep for themselves are left out.
    """
    return _settings(value, 0)


def _settings(value: Any, depth: int) -> Any:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Tensor | np.ndarray | np.generic):
        tensor = torch.as_tensor(value)
        is_short = tensor.numel() <= 16
        return str(tensor.tolist()) if is_short else hashlib.sha256(_bytes_of(tensor)).hexdigest()
    if isinstance(value, nn.Module):
        return fingerprint(value)
    if isinstance(value, type):
        return value.__qualname__
    return str(type(value).__name__) if depth > _DEEPEST else _settings_within(value, depth + 1)


def _settings_within(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _settings(part, depth) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_settings(part, depth) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((_settings(part, depth) for part in value), key=str)
    if isinstance(value, functools.partial):
        return [_settings(part, depth) for part in (value.func, value.args, value.keywords)]
    if hasattr(value, "__code__"):
        return f"{value.__qualname__}:{hashlib.sha256(value.__code__.co_code).hexdigest()[:8]}"
    kind = {"class": type(value).__qualname__}
    if is_dataclass(value):
        shown = {f.name: getattr(value, f.name) for f in fields(value) if f.init and f.name != "progress"}
    else:
        shown = {name: part for name, part in getattr(value, "__dict__", {}).items() if _is_shown(name, part)}
    return kind | {name: _settings(part, depth) for name, part in sorted(shown.items())}


def _is_shown(name: str, part: Any) -> bool:
    """Whether an attribute is a setting: public, or a part that has settings of its own."""
    if isinstance(part, np.random.RandomState | np.random.Generator | torch.Generator):
        return False
    return not name.startswith("_") or (hasattr(part, "__dict__") and not isinstance(part, Tensor))


def _differences(before: Any, now: Any, place: str = "") -> Iterable[str]:
    """Yield what differs, by place."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            inner = f"{place}.{name}" if place else name
            yield from _differences(before.get(name), now.get(name), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(one, other, f"{place}.{number}")
    elif before != now:
        yield f"{place} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _stamped(item: Any) -> Any:
    if isinstance(item, Mapping):
        return {str(name): _stamped(part) for name, part in item.items()}
    if isinstance(item, list | tuple):
        return [_stamped(part) for part in item]
    if isinstance(item, str | Path):
        return [str(item), *_stamp(item)]
    return _settings(item, 0)


def _stamp(name: str | Path) -> list[int]:
    """Return size and time of change of a file; nothing if the text names none."""
    try:
        found = Path(name).stat()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return []
    return [found.st_size, found.st_mtime_ns]


def _bytes_of(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype}{tuple(plain.shape)}".encode()
    if plain.is_quantized:
        plain = plain.dequantize()
    return head + plain.flatten().view(torch.uint8).numpy().tobytes()


def _is_record(value: Any) -> bool:
    names = {f.name for f in fields(CaseRecord)}
    return isinstance(value, dict) and {"case", "label", "key"} <= set(value) <= names


def _for_spreadsheets(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in which no text is taken for a formula."""
    return {
        name: f"'{value}"
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
        else value
        for name, value in row.items()
    }
