"""An explaining run that may be interrupted, and may be spread over several processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch
from monai.engines import Evaluator
from monai.transforms import Invertd, InvertibleTransform
from monai.utils.enums import CommonKeys
from torch import Tensor
from torch.utils.data import DataLoader

from monai_xai.batches import as_name, case_of
from monai_xai.case_loader import CaseLoader, NotLoaded, cause_of, file_of, items_of
from monai_xai.cases import ChosenCases, WorstCases
from monai_xai.errors import AttributionError, CasesFailedError, InputError, OutOfStepError, XaiError
from monai_xai.explainer import Explainer
from monai_xai.explanation import Explanation
from monai_xai.files import as_json, checksum, write_whole, writing_whole
from monai_xai.handlers import (
    AttributionEvents,
    AttributionHandler,
    CaseKeeper,
    ExplainedCase,
    hidden_words,
    register_events,
)
from monai_xai.manifest import CaseRecord, Manifest, fingerprint, key_of, label_of, spelled_settings, versions
from monai_xai.modalities import ModalityExplanation
from monai_xai.networks import unwrap
from monai_xai.packing import as_text, pack, unpack
from monai_xai.ranks import from_first, rank, share, wait_for_all, world_size
from monai_xai.transforms import AtomicNibabelWriter

logger = logging.getLogger(__name__)

_ABOUT = {
    "Name": "Explanations of a network",
    "BIDSVersion": "1.10.0",
    "DatasetType": "derivative",
}


@dataclass
class _Draft:
    """What is known of a case before its record is written."""

    case: str
    label: str
    files: dict[str, str] = field(default_factory=dict)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


class AttributionSaver(CaseKeeper):
    """Save every explanation with what it is, in a run that may be killed and goes on when it is started again.

    Attached to the evaluator of one or several :class:`AttributionHandler`, before it runs. In the output folder are

    - ``sub-<label>/sub-<label>_desc-<explainer>_attribution.nii.gz``, the map in the space of the scan, one channel per
      channel of the input, and a JSON file of the same name that says what it is: target, method, baseline, seed,
      score, baseline score, delta, channels, fingerprint of the network, versions. With several inputs, ``desc`` ends
      in the name of the input; without ``transform``, maps stay in the space of the network and bear ``space-network``.
      Vectors have the JSON file alone, with their values;
    - ``index.csv`` and ``index.json``: all outputs of the run, and what failed;
    - ``manifest``: one record per finished case, with SHA-256 checksums.

    *Started again*, the run goes on where it was: finished cases are not loaded and not run through the network, and
    the files are in the end those of a run that was never interrupted. Where the evaluator has metrics, finished cases
    are run through the network for them, and not explained. A case counts as finished when the evaluator is done with
    it, post-processing included. Files of a case whose data have changed, or that are missing or damaged, are made
    again.

    *A case that fails*, in loading, in the network, in explaining or saving, takes nothing from the others; at the end
    of the run they are named in a :class:`CasesFailedError`.

    *In several processes* (``torchrun``), each case goes to one of them, or, with ``Explainer(spread=True)``, the
    windows of each case to all. The first process writes the index, and tells
    those who listen, TensorBoard and cohorts, of all cases in the order of the data list. The output folder must be
    one that all processes see. Networks in ``DistributedDataParallel`` are unwrapped, since its exchange of buffers
    would wait for processes with fewer cases for ever.

    Args:
        output_dir: where files go; for this run alone.
        handlers: what explains.
        transform: the pre-processing of the data set, to bring maps back to the space of the scan; None leaves them in
            the space of the network.
        anonymize: let no name of a case or file appear in file names, JSON, index, TensorBoard or log lines of this
            package. What the bundle itself saves, and what MONAI logs, is not touched.
        salt: the secret under which names become labels, which is written nowhere, see
            :func:`monai_xai.manifest.label_of`. Needed to anonymize, and the same whenever a run is continued.
        overwrite: remove results of other settings that are in the output folder.

    Raises:
        InputError: if a setting makes no sense.
    """

    def __init__(
        self,
        output_dir: str | Path,
        handlers: AttributionHandler | Sequence[AttributionHandler],
        transform: InvertibleTransform | None = None,
        *,
        anonymize: bool = False,
        salt: str | None = None,
        overwrite: bool = False,
    ) -> None:
        if anonymize and not salt:
            raise InputError(
                "AttributionSaver(anonymize=True) needs a secret that its labels are made under, salt=..., the same "
                "whenever the run goes on: $os.environ['XAI_SALT'] in a config, say. Keep it apart from the results."
            )
        self.handlers = [handlers] if isinstance(handlers, AttributionHandler) else list(handlers)
        if not self.handlers or not all(isinstance(h, AttributionHandler) for h in self.handlers):
            raise InputError(f"AttributionSaver needs AttributionHandlers, got {handlers!r}.")
        if any(isinstance(handler.cases, WorstCases) for handler in self.handlers):
            raise InputError(
                "Which cases are the worst is known when all have been seen, so that such a run cannot be continued: "
                "name cases, or explain all (cases=None)."
            )
        self.output_dir = Path(output_dir)
        self.transform = transform
        self.hides_names = anonymize
        self.salt = salt if anonymize else None
        self.overwrite = overwrite
        self.manifest = Manifest(output_dir)
        self._keys: list[str] = []
        self._finished: dict[str, CaseRecord] = {}
        self._drafts: dict[int, _Draft] = {}
        self._causes: dict[int, list[str]] = {}
        self._about: dict[str, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that has not run yet, and the handlers with it; a second time does nothing.

        Raises:
            InputError: if its cases cannot be told apart before they are loaded.
        """
        if engine.has_event_handler(self._start):
            return
        loader = getattr(engine, "data_loader", None)
        if not isinstance(engine, Evaluator) or not isinstance(loader, DataLoader):
            raise InputError(
                "AttributionSaver needs an evaluator of MONAI with a DataLoader, got "
                f"{type(engine).__name__} with {type(loader).__name__}."
            )
        register_events(engine)
        self._loader = CaseLoader(loader, self._not_loaded)
        engine.data_loader = self._loader
        engine.state.is_kept = True
        if world_size() > 1 and hasattr(engine, "network"):
            engine.network = unwrap(engine.network)
        for handler in self.handlers:
            handler.keeper = self
            handler.attach(engine)
        engine._process_function = self._guarded(engine._process_function)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_iteration)
        engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: engine.terminate_epoch())
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        engine.add_event_handler(Events.COMPLETED, self._end)

    # --- what the handlers ask ---

    @property
    def places(self) -> tuple[int, ...]:
        """Index in the data set of each row of the batch that the evaluator works on."""
        return self._loader.places

    def name_of(self, case: str) -> str:
        """Return the name under which a case is to be seen: its label, where names are not."""
        return case if self.salt is None else label_of(case, self.salt)

    def is_finished(self, place: int) -> bool:
        """Return whether a case was finished before this start."""
        return self._keys[place] in self._finished

    def fail(self, places: Sequence[int], cause: str) -> None:
        """Take note that the cases at some places are not explained in full."""
        for place in places:
            self._causes.setdefault(place, []).append(cause)

    def keep(self, engine: Engine, explained: ExplainedCase) -> bool:
        """Save a case, and tell whether those who listen are to be told of it now: not by one of several processes."""
        if not self._is_writing:
            return False
        draft = self._draft(explained)
        for name, explanation in explained.explanations.items():
            if isinstance(explanation, ModalityExplanation):
                numbers = replace(explanation, maps={}, seconds=0.0)
                draft.numbers[name] = pack(numbers, as_text)
            for which, values in explanation.attributions.items():
                self._save(draft, explained, name, which, values)
        if world_size() == 1 or self._is_spread:
            return True
        with writing_whole(self._handoff(explained.place)) as partial:
            torch.save(pack(vars(explained)), partial)
        return False

    # --- the run ---

    @property
    def _is_spread(self) -> bool:
        """Whether all processes work on every case, since an explainer spreads its windows."""
        explainers = [explainer for handler in self.handlers for explainer in handler.explainers.values()]
        return any(isinstance(explainer, Explainer) and explainer.spread for explainer in explainers)

    @property
    def _is_writing(self) -> bool:
        """Whether this process saves the cases that it goes through."""
        return rank() == 0 or not self._is_spread

    def _start(self, engine: Engine) -> None:
        """Compare settings, and share out the cases that are not finished."""
        self._drafts.clear()
        self._causes.clear()
        items = items_of(self._loader.loader.dataset)
        count = len(self._loader.loader.dataset)  # type: ignore[arg-type]
        listed = items if items is not None else [{"place": place, "of": count} for place in range(count)]
        finished, self._keys, self._about, problem = from_first(self._open(engine, listed))
        if problem is not None:
            raise problem
        self._finished = finished
        has_metrics = getattr(engine.state, "key_metric_name", None) is not None
        due = [place for place in range(count) if has_metrics or not self.is_finished(place)]
        self._loader.chosen = due if self._is_spread else share(due)
        engine.state.epoch_length = max(len(self._loader), 1)
        if finished and rank() == 0:
            logger.info("%d of %d cases are finished already.", count - len(due), count)

    def _open(self, engine: Engine, listed: Sequence[Any]) -> tuple[Any, ...]:
        """Open the manifest in the first process, and return what all need to know of it."""
        if rank() > 0:
            return ()
        try:
            network = fingerprint(unwrap(self.handlers[0]._network(engine)))
            about = {"Network": network, "Versions": versions()}
            self.manifest.open(self._settings(engine, about), overwrite=self.overwrite)
            keys = [key_of(item, self.salt) for item in listed]
            return self.manifest.finished(), keys, about, None
        except Exception as error:  # all processes must hear of it, or they wait for ever
            is_told = isinstance(error, XaiError | OSError)
            return {}, [], {}, error if is_told else AttributionError(f"{self.output_dir}: {cause_of(error)}")

    def _settings(self, engine: Engine, about: Mapping[str, Any]) -> dict[str, Any]:
        explainers = {name: e for handler in self.handlers for name, e in handler.explainers.items()}
        return {
            "explainers": spelled_settings(explainers),
            "inferer": spelled_settings(getattr(engine, "inferer", None)),
            "transform": spelled_settings(self.transform),
            "network": about["Network"],
            "versions": about["Versions"],
            "anonymize": None if self.salt is None else label_of("", self.salt),
        }

    def _guarded(self, process: Callable[[Engine, Any], Any]) -> Callable[[Engine, Any], Any]:
        """Return the work of an iteration that goes on with the next batch where one fails."""

        def work(engine: Engine, batch: Any) -> Any:
            while True:
                try:
                    return process(engine, batch)
                except Exception as error:
                    is_fatal = isinstance(error, OutOfStepError)
                    if is_fatal or any(handler.on_error == "raise" for handler in self.handlers):
                        raise
                    self._fail(self.places, error)
                batch = next(engine._dataloader_iter, None)
                if batch is None:
                    engine.terminate_epoch()
                    engine._maybe_terminate_legacy()
                engine.state.batch = batch

        return work

    def _fail(self, places: Sequence[int], error: Exception) -> None:
        words = hidden_words(error) if self.hides_names else cause_of(error)
        for place in places:
            name = self._name_at(place)
            trace = None if self.hides_names or isinstance(error, XaiError) else error
            logger.warning("Not run through the network: case %s: %s", name, words, exc_info=trace)
            self.fail([place], f"case {name}: {words}")
        self._commit(places)

    def _not_loaded(self, failure: NotLoaded) -> None:
        for place in failure.places:
            name, file = self._name_at(place), self._file_at(place)
            if self.hides_names:
                kind = failure.cause.partition(":")[0]
                words = f"not loaded: {kind} (its words are withheld: they may name the patient)"
            else:
                words = f"not loaded{f' from {file}' if file else ''}: {failure.cause}"
            logger.warning("Case %s is %s", name, words)
            self.fail([place], f"case {name}: {words}")
        self._commit(failure.places)

    def _end_iteration(self, engine: Engine) -> None:
        self._commit(self.places)

    def _commit(self, places: Sequence[int]) -> None:
        """Write the records of cases that the evaluator is done with."""
        for place in dict.fromkeys(places):
            causes = self._causes.pop(place, [])
            draft = self._drafts.pop(place, None)
            if self.is_finished(place) or (draft is None and not causes) or not self._is_writing:
                continue
            draft = draft or self._draft_at(place)
            self.manifest.add(
                CaseRecord(
                    draft.case,
                    draft.label,
                    self._keys[place],
                    draft.files,
                    draft.outputs,
                    draft.numbers,
                    causes,
                )
            )

    def _end_epoch(self, engine: Engine) -> None:
        """In the first process, tell those who listen of what others have explained, and write the index."""
        wait_for_all("the end of the epoch")
        if rank() == 0:
            self._tell_of_others(engine)
            self.manifest.write_index(self._keys)
            about = _ABOUT | {
                "GeneratedBy": [{"Name": "monai_xai", "Version": self._about["Versions"]["monai_xai"]}]
            }
            write_whole(self.output_dir / "dataset_description.json", as_json(about))
        engine.fire_event(AttributionEvents.EPOCH_EXPLAINED)

    def _tell_of_others(self, engine: Engine) -> None:
        """Tell of cases that other processes have explained, and, for cohorts, of those finished before."""
        for place, key in enumerate(self._keys):
            file = self._handoff(place)
            if file.exists():
                packed = torch.load(file, weights_only=True, map_location="cpu")
                self.handlers[0]._tell(engine, ExplainedCase(**unpack(packed)))
                file.unlink()
            elif key in self._finished and self._finished[key].numbers:
                record = self._finished[key]
                found = {name: unpack(packed) for name, packed in record.numbers.items()}
                engine.state.explained = ExplainedCase(
                    record.case, found, {}, None, None, engine.state.epoch, {}, place
                )
                engine.fire_event(AttributionEvents.ATTRIBUTION_RESTORED)

    def _end(self, engine: Engine) -> None:
        wait_for_all("the end of the run")
        keys = set(self._keys)
        records = [record for record in self.manifest.records() if record.key in keys]
        self._miss_chosen({record.case for record in records})
        failed = [record for record in records if record.failures]
        if failed:
            lines = "\n".join(f"  {cause}" for record in failed for cause in record.failures)
            raise CasesFailedError(
                f"{len(failed)} of {len(keys)} cases are not explained in full; the others are in {self.output_dir}. "
                f"Mend them and start again, which goes on with them:\n{lines}"
            )

    def _miss_chosen(self, known: set[str]) -> None:
        for handler in self.handlers:
            if isinstance(handler.cases, ChosenCases):
                names = sorted(str(c) for c in handler.cases.chosen if isinstance(c, str))
                absent = [name for name in names if self.name_of(name) not in known]
                if absent and rank() == 0:
                    shown = f"{len(absent)} of the chosen" if self.hides_names else ", ".join(absent)
                    logger.warning("The cases %s did not come.", shown)

    # --- one case ---

    def _draft(self, explained: ExplainedCase) -> _Draft:
        """Return what is known of a case that is being explained, once it is sure that its name is its own."""
        if explained.place not in self._drafts:
            label = explained.name if self.hides_names else label_of(explained.name)
            self.manifest.require_own(label, self._keys[explained.place], self._keys, explained.name)
            self._drafts[explained.place] = _Draft(explained.name, label)
        return self._drafts[explained.place]

    def _draft_at(self, place: int) -> _Draft:
        name = self._name_at(place)
        return _Draft(name, name if self.hides_names else label_of(name))

    def _name_at(self, place: int) -> str:
        """Return the name of a case that is not loaded, as it is to be seen."""
        name, file = self._item_at(place).get(self.handlers[0].case_key), self._file_at(place)
        name = case_of(file) if name is None and file is not None else name
        return self.name_of(f"case{place}" if name is None else as_name(name))

    def _file_at(self, place: int) -> str | None:
        return file_of(self._item_at(place).get(CommonKeys.IMAGE))

    def _item_at(self, place: int) -> Mapping[str, Any]:
        items = items_of(self._loader.loader.dataset)
        item = items[place] if items is not None else None
        return item if isinstance(item, Mapping) else {}

    def _handoff(self, place: int) -> Path:
        return self.manifest.folder / f"{self._keys[place]}.pt"

    def _save(self, draft: _Draft, explained: ExplainedCase, name: str, which: str, values: Tensor) -> None:
        """Save the map of one input, and beside it what it is."""
        explanation = explained.explanations[name]
        several = len(explanation.attributions) > 1
        stem = self._stem(draft.label, f"{name}_{which}" if several else name, values.ndim > 2)
        about = self._describe(explained, name, which)
        if values.ndim > 2:
            self._write_map(draft, f"{stem}.nii.gz", values, explained.inputs[which])
        else:
            about["Values"] = _numbers(values)[0]
        write_whole(self._path(f"{stem}.json"), as_json(about))
        draft.files[f"{stem}.json"] = checksum(self.output_dir / f"{stem}.json")
        row = {"label": draft.label, "explainer": name, "input": which}
        row |= {"file": f"{stem}.nii.gz" if values.ndim > 2 else "", "sidecar": f"{stem}.json"}
        row |= {"sha256": draft.files.get(f"{stem}.nii.gz", draft.files[f"{stem}.json"])}
        names = {"Target": "target", "Method": "method", "Seed": "seed", "Score": "score"}
        names |= {"BaselineScore": "baseline_score", "Delta": "delta"}
        draft.outputs.append(row | {short: about.get(long) for long, short in names.items()})

    def _stem(self, label: str, what: str, is_image: bool) -> str:
        space = "_space-network" if is_image and self.transform is None else ""
        return f"sub-{label}/sub-{label}{space}_desc-{label_of(what)}_attribution"

    def _path(self, name: str) -> Path:
        path = self.output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write_map(self, draft: _Draft, name: str, values: Tensor, source: Tensor) -> None:
        placed = self._in_scan_space(values, source)
        writer = AtomicNibabelWriter(output_dtype=np.float32)
        writer.set_data_array(placed, channel_dim=0)
        writer.set_metadata(placed.meta if isinstance(placed, MetaTensor) else None, resample=False)
        writer.write(self._path(name))
        draft.files[name] = checksum(self.output_dir / name)

    def _in_scan_space(self, values: Tensor, source: Tensor) -> Tensor:
        """Return the map of the only row, channel first, where its scan lies."""
        if not isinstance(source, MetaTensor):
            return values[0].detach().cpu()
        image = decollate_batch(source.detach().cpu())[0]
        plain = values.as_tensor() if isinstance(values, MetaTensor) else values
        own = MetaTensor(plain[0].detach().cpu()).copy_meta_from(image, copy_attr=True)
        if self.transform is None:
            return own
        inverse = Invertd("map", self.transform, orig_keys=CommonKeys.IMAGE, nearest_interp=False)
        placed: Tensor = inverse({"map": own, CommonKeys.IMAGE: image})["map"]
        return placed

    def _describe(self, explained: ExplainedCase, name: str, which: str) -> dict[str, Any]:
        """Return what the JSON file beside a map says."""
        explanation = explained.explanations[name]
        own: dict[str, Any] = (
            _about_maps(explanation, which)
            if isinstance(explanation, Explanation)
            else _about_modalities(explanation)
        )
        source = None if self.hides_names else file_of(explained.inputs.get(which))
        return {
            "Description": f"Attribution of {explanation.target} to the input {which}",
            "Case": explained.name,
            "Sources": [] if source is None else [source],
            "Input": which,
            "Explainer": name,
            **own,
            **self._about,
        }


def _about_maps(explanation: Explanation, which: str) -> dict[str, Any]:
    return {
        "Target": explanation.target,
        "Method": explanation.method,
        "Baseline": explanation.facts.get("baseline"),
        "Seed": explanation.seed,
        "Score": float(explanation.score[0]),
        "BaselineScore": _number(explanation.baseline_score),
        "Delta": _number(explanation.delta),
        "Gap": _number(explanation.gap),
        "Units": (explanation.unit or "score") if explanation.summable else "arbitrary",
        "Summable": explanation.summable,
        "Channels": list(explanation.channels.get(which, ())),
        "Facts": {name: fact for name, fact in explanation.facts.items() if name != "seconds"},
    }


def _about_modalities(explanation: ModalityExplanation) -> dict[str, Any]:
    return {
        "Target": explanation.target,
        "Method": "ModalityShapley",
        "Baseline": explanation.baselines[0],
        "Seed": explanation.seed,
        "Score": float(explanation.score[0]),
        "BaselineScore": _number(explanation.baseline_scores[explanation.baselines[0]]),
        "Units": explanation.unit or "score",
        "Summable": True,
    }


def _number(values: Tensor | None) -> float | None:
    return None if values is None else float(values[0])


def _numbers(values: Tensor) -> list[Any]:
    plain = values.as_tensor() if isinstance(values, MetaTensor) else values
    found: list[Any] = plain.detach().cpu().double().tolist()
    return found
