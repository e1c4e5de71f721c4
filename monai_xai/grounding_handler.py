"""The grounding report inside a training run: is what the network looks at still what it should look at?

:class:`GroundingHandler` judges and saves; :class:`TensorBoardGroundingHandler` draws, and computes nothing.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.handlers import TensorBoardHandler
from monai.inferers import Inferer
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from monai_xai.batches import Batch, row_of
from monai_xai.calls import CallForm
from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.figures import encode_png, rasterize
from monai_xai.files import write_whole
from monai_xai.grounding import Grounding, GroundingCase, GroundingSettings, ground
from monai_xai.handlers import AttributionEvents, register_events
from monai_xai.report import figures_of_grounding, scalars_of_grounding, write_report
from monai_xai.report.markup import number
from monai_xai.report.names import disguise_of, disguised, new_salt
from monai_xai.tensorboard import clean_tag, image_summary

logger = logging.getLogger(__name__)

Masks = str | Callable[[Mapping[str, Any]], Tensor]


@dataclass
class _Gathered:
    """The cases of an epoch, with their masks by name, on the CPU, and how the network takes its inputs."""

    cases: list[GroundingCase] = field(default_factory=list)
    regions: dict[str, Tensor] = field(default_factory=dict)
    bodies: dict[str, Tensor] = field(default_factory=dict)
    call: CallForm = "arguments"


class GroundingHandler:
    """Judge the explanations of a network over its validation set every few epochs, and save the report.

    Attached to an evaluator, it keeps inputs, labels and masks of the first cases of an epoch on the CPU. When it is
    over it runs :func:`monai_xai.ground` on them, puts the result into ``engine.state.grounding``, fires
    ``AttributionEvents.GROUNDING_COMPLETED``, and writes ``grounding-<epoch>.html`` and ``.json``.

    Nothing else in the loop changes; what fails is logged, with its place, and counted in ``failures``.

    Args:
        explainer: what is judged, for a single target; without inferer it takes the engine's.
        every_n_epochs: how often; 1 is every epoch.
        cases: how many cases of the epoch at most; a verdict of GROUNDED needs 20.
        region: where the finding is marked: a key of the batch, or a function of it, that gives masks (N, C, *spatial);
            voxels above 0.5 in any channel belong to it. Empty masks count as none. None: not marked, so that location
            is not tested.
        within: where the body is, in the same way; None: where the image is not empty.
        second_network: an independently trained network, for T2.
        settings: thresholds and effort; None takes :meth:`monai_xai.GroundingSettings.quick`.
        output_dir: where reports are written; None writes none.
        log_dir: where TensorBoard events are written; a :class:`TensorBoardGroundingHandler` is attached for that.
        network: the network, if the engine has none of its own or another is meant.
        case_key: where the batch holds case names; else file names are taken.
        anonymize: replace names of cases by salted hashes in reports, JSON and TensorBoard. ``engine.state.grounding``
            keeps them.
        salt: key of the hashes, see :func:`monai_xai.write_report`; None draws one that holds as long as the handler.
        on_error: "log" keeps the loop alive; "raise" ends it.

    Raises:
        InputError: if a setting makes no sense.
    """

    def __init__(
        self,
        explainer: Explainer,
        *,
        every_n_epochs: int = 1,
        cases: int = 20,
        region: Masks | None = None,
        within: Masks | None = None,
        second_network: nn.Module | None = None,
        settings: GroundingSettings | None = None,
        output_dir: str | Path | None = None,
        log_dir: str | Path | None = None,
        network: nn.Module | None = None,
        case_key: str = "case_id",
        anonymize: bool = False,
        salt: str | None = None,
        on_error: Literal["log", "raise"] = "log",
    ) -> None:
        if on_error not in ("log", "raise"):
            raise InputError(f"GroundingHandler(on_error={on_error!r}): choose 'log' or 'raise'.")
        if min(every_n_epochs, cases) < 1:
            raise InputError(
                f"GroundingHandler(every_n_epochs={every_n_epochs}, cases={cases}): both are 1 or more."
            )
        self.explainer = explainer
        self.every_n_epochs = every_n_epochs
        self.cases = cases
        self.region = region
        self.within = within
        self.second_network = second_network
        self.settings = GroundingSettings.quick() if settings is None else settings
        self.output_dir = output_dir
        self.network = network
        self.case_key = case_key
        self.anonymize = anonymize
        self.salt = new_salt() if salt is None else salt
        self.on_error = on_error
        self.failures = 0
        self._drawer = (
            None
            if log_dir is None
            else TensorBoardGroundingHandler(str(log_dir), anonymize=anonymize, salt=self.salt)
        )
        self._seen = 0
        self._gathered = _Gathered()

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator, or to a plain ignite engine; a second time does nothing."""
        if engine.has_event_handler(self._gather):
            return
        register_events(engine)
        event = (
            IterationEvents.FORWARD_COMPLETED if isinstance(engine, Evaluator) else Events.ITERATION_COMPLETED
        )
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(event, self._gather)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        if self._drawer is not None:
            self._drawer.attach(engine)

    def __call__(self, engine: Engine) -> None:
        """Judge what the epoch has gathered."""
        gathered, self._gathered = self._gathered, _Gathered()
        if not gathered.cases:
            return
        epoch = engine.state.epoch
        try:
            grounding = self._ground(engine, gathered)
            engine.state.grounding = grounding
            logger.info("Grounding, epoch %d: %s. %s", epoch, grounding.verdict, grounding.sentence)
            if self.output_dir is not None:
                self._save(grounding, epoch)
            engine.fire_event(AttributionEvents.GROUNDING_COMPLETED)
        except Exception as error:
            self._fail(error, f"epoch {epoch}, {len(gathered.cases)} cases")

    def _start_epoch(self, engine: Engine) -> None:
        self._seen = 0
        self._gathered = _Gathered()

    def _gather(self, engine: Engine) -> None:
        """Keep the cases of the engine's batch that are still wanted."""
        if engine.state.epoch % self.every_n_epochs or len(self._gathered.cases) >= self.cases:
            return
        batch = Batch(engine, self._seen, self.case_key)
        try:
            self._seen += batch.size
            regions, bodies = (_masks(engine, chosen, batch) for chosen in (self.region, self.within))
            for row in range(min(batch.size, self.cases - len(self._gathered.cases))):
                self._keep(batch, row, regions, bodies)
        except Exception as error:
            self._fail(error, f"epoch {engine.state.epoch}, iteration {engine.state.iteration}")

    def _keep(self, batch: Batch, row: int, regions: Tensor | None, bodies: Tensor | None) -> None:
        known = {case.id for case in self._gathered.cases}
        name = batch.names[row]
        name = name if name not in known else f"{name} ({batch.first + row})"
        self._gathered.call = batch.call
        inputs, label = (_moved(row_of(x, row), "cpu") for x in (batch.inputs, batch.label))
        correct = _is_correct(row_of(batch.prediction, row), label)
        self._gathered.cases.append(GroundingCase(name, inputs, label, correct=correct))
        for masks, kept in ((regions, self._gathered.regions), (bodies, self._gathered.bodies)):
            if masks is not None and masks[row].any():
                kept[name] = masks[row : row + 1]

    def _ground(self, engine: Engine, gathered: _Gathered) -> Grounding:
        network = self.network if self.network is not None else getattr(engine, "network", None)
        if not isinstance(network, nn.Module):
            raise InputError(
                f"{type(engine).__name__} has no single network: give it, GroundingHandler(..., network=network)."
            )
        explainer, own = self.explainer, getattr(engine, "inferer", None)
        if explainer.inferer is None and isinstance(own, Inferer):
            explainer = replace(explainer, inferer=own)
        if explainer.call == "arguments":
            explainer = replace(explainer, call=gathered.call)
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        return ground(
            explainer,
            network,
            [_moved(case, device) for case in gathered.cases],
            regions=gathered.regions,
            within=gathered.bodies,
            second_network=self.second_network,
            settings=self.settings,
        )

    def _save(self, grounding: Grounding, epoch: int) -> None:
        """Write report and numbers; what cannot be written is logged and does not end the loop."""
        shown = shown_to_others(grounding, self.salt) if self.anonymize else grounding
        folder = Path(str(self.output_dir))
        try:
            write_report(
                shown, folder / f"grounding-{epoch}.html", title=f"Is the explanation grounded? Epoch {epoch}"
            )
            write_whole(folder / f"grounding-{epoch}.json", json.dumps(shown.as_dict(), indent=1))
        except OSError as error:
            self._fail(error, f"epoch {epoch}", "Not saved")

    def _fail(self, error: Exception, where: str, what: str = "Not judged") -> None:
        if self.on_error == "raise":
            raise error
        self.failures += 1
        logger.warning(
            "%s: grounding, %s (failure %d): %s", what, where, self.failures, error, exc_info=error
        )


def _masks(engine: Engine, chosen: Masks | None, batch: Batch) -> Tensor | None:
    """Return masks of a batch on the CPU, shape (N, 1, *spatial), bool; None where none are asked for.

    Raises:
        InputError: if what was named is not there, or no mask of every row.
    """
    if chosen is None:
        return None
    given = engine.state.batch
    found: Any
    if callable(chosen):
        found = chosen(given)
    elif chosen == CommonKeys.LABEL:
        found = batch.label
    else:
        found = given.get(chosen) if isinstance(given, Mapping) else None
    if not isinstance(found, Tensor) or found.ndim < 4 or len(found) != batch.size:
        got = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        there = f"The batch has {sorted(map(str, given))}." if isinstance(given, Mapping) else ""
        raise InputError(
            f"GroundingHandler needs masks of shape ({batch.size}, C, *spatial) in {chosen!r}, got {got}. {there}"
        )
    plain = found.as_tensor() if isinstance(found, MetaTensor) else found
    return (plain.detach().cpu() > 0.5).any(1, keepdim=True)


def _moved(value: Any, device: torch.device | str) -> Any:
    """Return a tensor, or the tensors in a mapping, list or case, on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, GroundingCase):
        return replace(value, inputs=_moved(value.inputs, device), label=_moved(value.label, device))
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    return [_moved(part, device) for part in value] if isinstance(value, list | tuple) else value


def _is_correct(prediction: Any, label: Any) -> bool | None:
    """Return whether the largest of several classes is the label's; None where nothing can be said."""
    if not (isinstance(prediction, Tensor) and isinstance(label, Tensor)):
        return None
    classes = prediction.shape[1] if prediction.ndim == 2 else 0
    if classes < 2 or label.numel() not in (1, classes):
        return None
    truth = label.flatten().argmax() if label.numel() == classes else label.flatten()[0]
    return int(prediction[0].argmax()) == int(truth)


class TensorBoardGroundingHandler(TensorBoardHandler):
    """Write a verdict and its tests to TensorBoard as curves, text and pictures, and compute nothing.

    Attached to the engine of a :class:`GroundingHandler`. The scalar page gets ``grounding/verdict`` (0: ARTIFACT, 1:
    INCONCLUSIVE, 2: MODEL OK BUT MAP MISLEADING, 3: FAITHFUL BUT OFF TARGET, 4: GROUNDED) and per test
    ``grounding/<id>/value``, ``p``, ``p_corrected`` and ``passed``; the text page ``grounding``, a table of all tests;
    the image page ``grounding/test/<id>``, ``grounding/curves/<name>`` and ``grounding/case/<case>``. Steps are epochs.

    Args:
        log_dir: where the event file is written, if there is no ``summary_writer``.
        summary_writer: a writer to share with other handlers; who made it closes it.
        anonymize: replace names of cases by salted hashes.
        salt: key of the hashes; None draws one.
    """

    def __init__(
        self,
        log_dir: str = "./runs",
        summary_writer: SummaryWriter | None = None,
        *,
        anonymize: bool = False,
        salt: str | None = None,
    ) -> None:
        super().__init__(summary_writer=summary_writer, log_dir=log_dir)
        self.anonymize = anonymize
        self.salt = new_salt() if salt is None else salt

    def attach(self, engine: Engine) -> None:
        """Attach to the engine whose explanations are judged; a second time does nothing."""
        register_events(engine)
        if not engine.has_event_handler(self, AttributionEvents.GROUNDING_COMPLETED):
            engine.add_event_handler(AttributionEvents.GROUNDING_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write what is in ``engine.state.grounding``."""
        grounding: Grounding = engine.state.grounding
        self.write(shown_to_others(grounding, self.salt) if self.anonymize else grounding, engine.state.epoch)

    def write(self, grounding: Grounding, step: int) -> None:
        """Write a verdict.

        Args:
            grounding: what is written, as it is.
            step: the place on the axis of steps.
        """
        for name, value in scalars_of_grounding(grounding):
            self._writer.add_scalar(f"grounding/{name}", value, step)
        self._writer.add_text("grounding", text_of_grounding(grounding), step)
        for name, figure in figures_of_grounding(grounding):
            kind, _, which = name.partition("/")
            own = grounding.cases[int(which)].id if kind == "case" else which
            tag = f"grounding/{kind}/{clean_tag(own)}"
            self._writer._get_file_writer().add_summary(
                image_summary(tag, encode_png(rasterize(figure)), ""), step
            )
        self._writer.flush()


def text_of_grounding(grounding: Grounding) -> str:
    """Return verdict, tests and what is missing as Markdown in which words from data are only words."""
    tests = [
        f"| {_word(test.id)} | {_word(test.title)} | {_word(test.status)} | {number(test.value)} "
        f"| {number(test.p_corrected)} | {test.n} | {_word(test.message)} |"
        for test in grounding.tests
    ]
    head = ["| test | title | status | value | p | n | what follows |", "|---|---|---|---|---|---|---|"]
    missing = [f"- to supply: {_word(words)}" for words in grounding.missing]
    lines = [
        f"**{_word(grounding.verdict)}**",
        "",
        _word(grounding.sentence),
        "",
        *head,
        *tests,
        "",
        *missing,
    ]
    return "\n".join(lines)


def _word(text: Any) -> str:
    """Return text that neither Markdown nor HTML reads as anything else."""
    line = " ".join(str(text).encode("utf-8", "replace").decode().split())
    return re.sub(r"[\\`*_{}\[\]()#+!|~<>&\"'-]", lambda found: f"&#{ord(found[0])};", line)


def shown_to_others(grounding: Grounding, salt: str) -> Grounding:
    """Return the same results with the names of cases replaced by hashes under a salt."""
    return disguised(grounding, disguise_of(grounding, None, salt))
