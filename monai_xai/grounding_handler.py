"""The grounding report inside a training run: is what the network looks at still what it should look at?

:class:`GroundingHandler` judges and saves; :class:`TensorBoardGroundingHandler` draws, and computes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ignite.engine import Engine
from monai.handlers import TensorBoardHandler
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.figures import encode_png, rasterize
from monai_xai.files import write_whole
from monai_xai.gathering import Gathered, Gathering, Masks, asked_as_run, device_of, network_of, on_device
from monai_xai.grounding import Grounding, GroundingSettings, ground
from monai_xai.handlers import AttributionEvents, register_events
from monai_xai.report import figures_of_grounding, scalars_of_grounding, write_report
from monai_xai.report.markup import number, plain_words
from monai_xai.report.names import disguise_of, disguised, new_salt
from monai_xai.tensorboard import clean_tag, image_summary

logger = logging.getLogger(__name__)


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
            is not tested. Where the batch has no masks in its ``"label"``, the same.
        within: where the body is, in the same way; None: where the image is not empty.
        structures: a label map of known structures (an atlas, a scanner's marker), in the same way, so that evidence
            that is off target is told by name.
        structure_names: names of its labels; None takes numbers.
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
        structures: Masks | None = None,
        structure_names: Mapping[int, str] | None = None,
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
        self.explainer = explainer
        self.structure_names = structure_names
        self.second_network = second_network
        self.settings = GroundingSettings.quick() if settings is None else settings
        self.output_dir = output_dir
        self.network = network
        self.anonymize = anonymize
        self.salt = new_salt() if salt is None else salt
        self.on_error = on_error
        self.failures = 0
        self._drawer = (
            None
            if log_dir is None
            else TensorBoardGroundingHandler(str(log_dir), anonymize=anonymize, salt=self.salt)
        )
        self._gathering = Gathering(
            "GroundingHandler", cases, every_n_epochs, case_key, {"region": region, "within": within},
            {"structures": structures},
        )  # fmt: skip

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator, or to a plain ignite engine; a second time does nothing."""
        register_events(engine)
        self._gathering.attach(engine, self, self._fail)
        if self._drawer is not None:
            self._drawer.attach(engine)

    def __call__(self, engine: Engine) -> None:
        """Judge what the epoch has gathered."""
        gathered = self._gathering.take()
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

    def _ground(self, engine: Engine, gathered: Gathered) -> Grounding:
        network = network_of(engine, self.network, "GroundingHandler")
        return ground(
            asked_as_run(self.explainer, engine, gathered.call),
            network,
            on_device(gathered.cases, device_of(network)),
            regions=gathered.masks.get("region"),
            within=gathered.masks.get("within"),
            second_network=self.second_network,
            structures=gathered.labels.get("structures"),
            structure_names=self.structure_names,
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
        f"| {plain_words(test.id)} | {plain_words(test.title)} | {plain_words(test.status)} | {number(test.value)} "
        f"| {number(test.p_corrected)} | {test.n} | {plain_words(test.message)} |"
        for test in grounding.tests
    ]
    head = ["| test | title | status | value | p | n | what follows |", "|---|---|---|---|---|---|---|"]
    missing = [f"- to supply: {plain_words(words)}" for words in grounding.missing]
    lines = [
        f"**{plain_words(grounding.verdict)}**",
        "",
        plain_words(grounding.sentence),
        "",
        *head,
        *tests,
        "",
        *missing,
    ]
    return "\n".join(lines)


def shown_to_others(grounding: Grounding, salt: str) -> Grounding:
    """Return the same results with the names of cases replaced by hashes under a salt."""
    return disguised(grounding, disguise_of(grounding, None, salt))
