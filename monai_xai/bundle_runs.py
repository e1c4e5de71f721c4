"""A run that explains a bundle, built from the bundle's own configs, which stay as they are."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import merge_kv
from torch.utils.data import DataLoader, Subset

from monai_xai.batches import case_of
from monai_xai.bundle_heads import Config, Head, head_of, index_in
from monai_xai.bundle_settings import as_config, merge_settings
from monai_xai.case_loader import file_of, items_of
from monai_xai.errors import InputError, UnsupportedBundleError
from monai_xai.files import write_whole
from monai_xai.overlays import names as overlay_names
from monai_xai.overlays import path as overlay_path

_SUFFIXES = (".json", ".yaml", ".yml")
_EVALUATORS = ("evaluator", "validate::evaluator")
_TARGETS = (
    "explain_target",
    "grounding_target",
    "comparison_target",
    "modalities::target",
    "explainer::target",
)
_NETWORKS = {"network_def", "network", "net"}
_METHODS = ("explain_method", "grounding_explainer::attributor", "explainer::attributor")
_HANDLERS = ("explain_handler", "grounding_handler", "comparison_handler", "modality_handler")


@dataclass(frozen=True)
class BundleRun:
    """A bundle's config with an overlay merged over it.

    Args:
        folder: of the bundle; the run takes place in it.
        name: under which the config is kept in the output folder.
        config: merged.
        metadata: of the bundle.
        run_id: what is evaluated to run it.
    """

    folder: Path
    name: str
    config: Config
    metadata: Config
    run_id: str

    def as_yaml(self) -> str:
        """Return the config as YAML, which ``python -m monai.bundle run <run_id> --config_file ...`` takes."""
        return str(yaml.safe_dump(self.config, sort_keys=False, width=110, allow_unicode=True))

    def run(self) -> Path:
        """Run as ``python -m monai.bundle run`` does, and return the output folder; the config is kept in it.

        Raises:
            InputError: if the bundle's weights are not there.
        """
        with _inside(self.folder):
            self._require_weights()
            output = Path(str(self._evaluate("output_dir"))).resolve()
            output.mkdir(parents=True, exist_ok=True)
            file = output / f"{self.name}.yaml"
            write_whole(file, self.as_yaml())
            metadata = self.folder / "configs" / "metadata.json"
            workflow = ConfigWorkflow(
                config_file=str(file),
                meta_file=str(metadata) if metadata.is_file() else None,
                logging_file=False,
                run_id=self.run_id,
            )
            workflow.initialize()
            workflow.run()
            workflow.finalize()
        return output

    def _evaluate(self, name: str) -> Any:
        parser = ConfigParser(copy.deepcopy(self.config))
        parser.read_meta(copy.deepcopy(self.metadata))
        return parser.get_parsed_content(name)

    def _require_weights(self) -> None:
        """Refuse a run whose network would keep its random weights, also where the bundle does not mind."""
        for name, loader in _loaders(self.config):
            if loader.get("_disabled_") is True:
                continue
            file = Path(str(self._evaluate(f"{name}::load_path")))
            if not file.is_file():
                raise InputError(
                    f"The weights of this bundle are not there: {file.resolve()}. Fetch them (`python -m monai.bundle "
                    f"download {self.folder.name} --bundle_dir {self.folder.parent}`, or the links in "
                    "large_files.yml), or explain a network that knows nothing, to try things out: --random_weights."
                )


@dataclass(frozen=True)
class BundleRequest:
    """What is asked of a bundle.

    Args:
        bundle: its folder.
        overlay: name of a shipped overlay, or a file.
        config: which of its configs, by name or file, or several with commas between; empty takes ``inference``, or
            else ``evaluate`` over ``train``.
        cases: numbers or names; None for those of the overlay.
        image: files of one case that is to take the place of the bundle's own data.
        target: number or name of a channel or class, or a target as a config or as written in code; None takes what
            fits the network's output.
        head: key or index of the part of the network's output, where it gives several.
        method: a method's name, or a method as a config or as written in code.
        output: takes the place of the bundle's ``output_dir``.
        random_weights: load no weights.
        settings: further values by their id in the config.
    """

    bundle: str | Path
    overlay: str = "explain"
    config: str = ""
    cases: Sequence[int | str] | None = None
    image: Sequence[str] = ()
    target: Any = None
    head: str | int | None = None
    method: Any = None
    output: str | Path | None = None
    random_weights: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> BundleRun:
        """Return the run.

        Raises:
            UnsupportedBundleError: if the bundle cannot be explained; says why.
            InputError: naming what is not there.
        """
        folder = Path(self.bundle).resolve()
        metadata = _read_metadata(folder)
        parser = ConfigParser(_read(find_configs(folder, self.config)))
        parser["bundle_root"] = str(folder)
        if self.output is not None or "output_dir" not in parser:
            parser["output_dir"] = str(Path(self.output or folder / "eval").resolve())
        evaluator = _find_evaluator(parser, folder)
        self._replace_data(parser)
        self._add_overlay(parser, evaluator, metadata)
        merge_settings(parser, self.settings)
        if self.random_weights:
            _drop_weights(parser)
        run_id = _find_run(parser, evaluator)
        return BundleRun(folder, Path(self.overlay).stem, parser.get(), metadata, run_id)

    def _replace_data(self, parser: ConfigParser) -> None:
        if not self.image:
            return
        if "dataset::data" not in parser:
            raise InputError(
                "This config has no dataset::data that an image could take the place of: give a config of your own "
                "with --config, or set what it reads by its id, such as --dataset_dir."
            )
        key = parser.get("image_key", "image")
        files = [str(Path(file).resolve()) for file in self.image]
        if absent := [file for file in files if not Path(file).exists()]:
            raise InputError(f"There is no image {', '.join(absent)}.")
        parser["dataset::data"] = [{str(key): files if len(files) > 1 else files[0]}]

    def _add_overlay(self, parser: ConfigParser, evaluator: str, metadata: Config) -> None:
        overlay = ConfigParser(_renamed(_read_overlay(self.overlay), parser, evaluator))
        self._choose_target(overlay, head_of(parser.get(), metadata))
        if self.method is not None:
            method = as_config(self.method)
            for name in _present(overlay, _METHODS)[:1]:
                overlay[name] = method
        extension = overlay.get().pop("+initialize", [])
        if self.cases is not None:
            for name in _present(overlay, _HANDLERS):
                overlay[f"{name}::cases"] = None
            choice = {"_target_": "monai_xai.bundle_runs.choose_cases", "engine": f"@{evaluator}"}
            extension = [{**choice, "cases": list(self.cases)}, *extension] if self.cases else extension
        for name, value in overlay.get().items():
            merge_kv(parser, name, value)
        parser["initialize"] = [*_as_list(parser.get("initialize")), *extension]

    def _choose_target(self, overlay: ConfigParser, head: Head) -> None:
        """Put in the target that was asked for; else, into a shipped overlay, the one that fits the output."""
        names = [name for name in _present(overlay, _TARGETS) if isinstance(overlay[name], dict)]
        is_own = self.overlay not in overlay_names()
        if not names or (is_own and self.target is None and self.head is None):
            return
        target = _target(self.target, head)
        if self.head is not None:
            target = {**target, "head": self.head}
        overlay[names[0]] = target
        if head.kind != "segmentation" and not is_own:
            for name in _present(overlay, _HANDLERS):
                overlay[name].pop("region", None)


def _target(value: Any, head: Head) -> Config:
    if value is None or head.kind == "boxes":
        return head.target()
    if isinstance(value, int) or (isinstance(value, str) and value.isdigit()) or _is_named(value, head):
        return head.target(index_in(head, value))
    return as_config(value)


def _is_named(value: Any, head: Head) -> bool:
    return isinstance(value, str) and head.index_of(value) is not None


def find_configs(folder: Path, config: str = "") -> list[Path]:
    """Return the config files of a bundle, those that are merged over others last.

    Raises:
        InputError: if there is no such file, naming those that are there.
    """
    if "," in config:
        return [_find_config(folder, name) for name in config.split(",")]
    if config:
        return _with_train(folder, _find_config(folder, config))
    for name in ("inference", "evaluate"):
        if file := _config_file(folder, name):
            return _with_train(folder, file)
    raise UnsupportedBundleError(
        f"{folder} has no configs/inference or configs/evaluate (JSON or YAML): choose a config, --config=..., that "
        f"builds an evaluator.{_known(folder)}"
    )


def _with_train(folder: Path, file: Path) -> list[Path]:
    """Return a config, behind that of the training where it builds no network itself, as those of evaluations do."""
    train = _config_file(folder, "train")
    is_partial = train is not None and train != file and not _NETWORKS & set(_read_one(file))
    return [train, file] if is_partial and train is not None else [file]


def _find_config(folder: Path, name: str) -> Path:
    file = _config_file(folder, name) or Path(name)
    if not file.is_file():
        raise InputError(f"There is no config {name!r}.{_known(folder)}")
    return file.resolve()


def _config_file(folder: Path, name: str) -> Path | None:
    files = [folder / "configs" / f"{name}{suffix}" for suffix in _SUFFIXES]
    return next((file for file in files if file.is_file()), None)


def _known(folder: Path) -> str:
    known = sorted(f.stem for f in folder.glob("configs/*") if f.suffix in _SUFFIXES and f.stem != "metadata")
    return (
        f" The bundle has {', '.join(known)}." if known else f" There are no configs in {folder / 'configs'}."
    )


def _read(files: Sequence[Path]) -> Config:
    with _reading(*files):
        return dict(ConfigParser.load_config_files([str(file) for file in files]))


def _read_overlay(name: str) -> Config:
    """Return an overlay as it is written, with the keys that add to what a bundle has."""
    file = overlay_path(name) if name in overlay_names() else Path(name)
    if not file.is_file():
        raise InputError(
            f"There is no overlay {name!r}: give a file, or one of {', '.join(overlay_names())}."
        )
    return _read_one(file)


def _read_one(file: Path) -> Config:
    """Return a config as it is written: one that changes another refers to what only the other has."""
    with _reading(file):
        return dict(ConfigParser.load_config_file(str(file)))


@contextmanager
def _reading(*files: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, TypeError, ValueError, LookupError, yaml.YAMLError) as error:
        raise InputError(f"{', '.join(map(str, files))} cannot be read as a config: {error}") from error


def _read_metadata(folder: Path) -> Config:
    file = folder / "configs" / "metadata.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from error


def _find_evaluator(parser: ConfigParser, folder: Path) -> str:
    """Return the id of the evaluator, whatever it is called.

    Raises:
        UnsupportedBundleError: if there is none.
    """
    found = [name for name in _EVALUATORS if name in parser and isinstance(parser[name], dict)]
    found += [
        name for name, value in parser.get().items() if isinstance(value, dict) and "val_data_loader" in value
    ]
    if found:
        return found[0]
    if re.search(r"sampler|noise|diffusion", json.dumps(parser.get(), default=str), re.IGNORECASE):
        reason = (
            "it makes images from noise, so that there is no scan whose parts could be credited with them"
        )
    else:
        reason = "without a network that is run over cases there is nothing to explain. Choose another: --config=..."
    raise UnsupportedBundleError(f"The config of {folder.name} has no evaluator: {reason}.")


def _find_run(parser: ConfigParser, evaluator: str) -> str:
    """Return the id of what runs the evaluator, and make one where there is none."""
    call = re.compile(rf"@{evaluator}\.run\b")
    found = [name for name, value in parser.get().items() if any(call.search(v) for v in _texts(value))]
    if not found:
        parser["run"] = [f"$@{evaluator}.run()"]
    return "run" if "run" in found or not found else str(found[0])


def _texts(value: Any) -> list[str]:
    return [text for text in _as_list(value) if isinstance(text, str)]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _present(parser: ConfigParser, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in parser]


def _renamed(value: Any, parser: ConfigParser, evaluator: str) -> Any:
    """Return an overlay with the names that this bundle uses."""
    if isinstance(value, dict):
        return {key: _renamed(part, parser, evaluator) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, parser, evaluator) for part in value]
    if value == "@preprocessing":
        names = ("preprocessing", "validate::preprocessing")
        return next((f"@{name}" for name in _present(parser, names)), None)
    return re.sub(r"@evaluator\b", f"@{evaluator}", value) if isinstance(value, str) else value


def _loaders(value: Any, name: str = "") -> Iterator[tuple[str, Config]]:
    """Iterate over what loads weights: its id and its config."""
    if isinstance(value, dict) and str(value.get("_target_", "")).split(".")[-1] == "CheckpointLoader":
        yield name, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _loaders(part, f"{name}::{key}" if name else str(key))


def _drop_weights(parser: ConfigParser) -> None:
    """Let no weights be loaded, and those that networks start with be the same in every run: it may be continued."""
    parser["initialize"] = ["$__import__('torch').manual_seed(0)", *_as_list(parser.get("initialize"))]
    for name, _ in list(_loaders(parser.get())):
        if name.rpartition("::")[2].isdigit():
            parser[f"{name}::_disabled_"] = True
        else:
            parser[name] = "$lambda engine: None"  # it is called where the run is initialized


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a bundle's folder, with its own code within reach."""
    before = Path.cwd()
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))


def choose_cases(engine: Any, cases: Sequence[int | str]) -> None:
    """Let an evaluator run through chosen cases alone.

    Args:
        engine: an evaluator that has not run yet, with a ``DataLoader`` of a data set with places.
        cases: numbers in the data set, or names.

    Raises:
        InputError: naming a case that is not there.
    """
    loader = engine.data_loader
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise InputError(
            f"Cases can be chosen from a DataLoader of a data set with places, not from a {type(loader).__name__}: "
            "explain all, --case=all."
        )
    names = _case_names(loader.dataset) if any(isinstance(case, str) for case in cases) else []
    places = [_place_of(case, names, len(loader.dataset)) for case in cases]
    engine.data_loader = DataLoader(
        Subset(loader.dataset, places),
        batch_size=loader.batch_size,
        num_workers=min(loader.num_workers, len(places)),
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
    )
    engine.state.epoch_length = len(engine.data_loader)


def _case_names(dataset: Any) -> list[str]:
    items = items_of(dataset) or [None] * len(dataset)
    return [_name_of(item) for item in items]


def _name_of(item: Any) -> str:
    if not isinstance(item, Mapping):
        return ""
    file = file_of(item.get("image"))
    return str(item["case_id"]) if "case_id" in item else case_of(file) if file else ""


def _place_of(case: int | str, names: Sequence[str], count: int) -> int:
    if isinstance(case, str) and case in names:
        return names.index(case)
    if isinstance(case, int) and -count <= case < count:
        return case % count
    near = difflib.get_close_matches(str(case), names, 3) or list(filter(None, names[:3]))
    there = f", such as {', '.join(near)}" if near else ""
    raise InputError(f"There is no case {case!r} among {count}{there}.")
