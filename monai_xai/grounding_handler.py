"""The grounding report inside a training run: is what the network looks at still what it should look at?

:class:`GroundingHandler` judges and saves; :class:`TensorBoardGroundingHandler` draws, and computes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ignite.engine import Engine
from torch import nn

from monai_xai.explainer import Explainer
from monai_xai.files import write_whole
from monai_xai.gathering import Gathered, Masks, asked_as_run, network_of, on_device
from monai_xai.grounding import Grounding, GroundingSettings, ground
from monai_xai.handlers import AttributionEvents
from monai_xai.judging import EpochJudge, JudgmentBoard
from monai_xai.networks import device_of
from monai_xai.report import figures_of_grounding, scalars_of_grounding, write_report
from monai_xai.report.markup import number, plain_words
from monai_xai.report.names import disguise_of, disguised
from monai_xai.tensorboard import clean_tag


class TensorBoardGroundingHandler(JudgmentBoard[Grounding]):
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

    kept_as = "grounding"
    completed = AttributionEvents.GROUNDING_COMPLETED

    @staticmethod
    def hide_names(result: Grounding, salt: str) -> Grounding:
        return disguised(result, disguise_of(result, None, salt))

    def write(self, result: Grounding, step: int) -> None:
        for name, value in scalars_of_grounding(result):
            self._writer.add_scalar(f"grounding/{name}", value, step)
        self._writer.add_text("grounding", text_of_grounding(result), step)
        for name, figure in figures_of_grounding(result):
            kind, _, which = name.partition("/")
            own = result.cases[int(which)].id if kind == "case" else which
            self._add_picture(f"grounding/{kind}/{clean_tag(own)}", figure, step)
        self._writer.flush()


class GroundingHandler(EpochJudge[Grounding]):
    """Judge the explanations of a network over its validation set every few epochs, and save the report.

    Attached to an evaluator, it keeps inputs, labels and masks of the first cases of an epoch on the CPU. When it is
    over it runs :func:`monai_xai.ground` on them, puts the result into ``engine.state.grounding``, fires
    ``AttributionEvents.GROUNDING_COMPLETED``, and writes ``grounding-<epoch>.html`` and ``.json``.

    Nothing else in the loop changes; what fails is logged, with its place, and counted in ``failures``.

    Args:
        explainer: what is judged, for a single target; without inferer it takes the engine's.
        every_n_epochs: how often; 1 is every epoch.
        cases: how many cases of the epoch at most, None: all; a verdict of GROUNDED needs 20.
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
        spread: where there are several processes, whether they unite the cases that each has seen, share the work, and
            let the first one write. The handler is then attached in all of them, as a metric is; else in one, which
            judges what it has seen.

    Raises:
        InputError: if a setting makes no sense.
    """

    board = TensorBoardGroundingHandler
    not_done = "Not judged"

    def __init__(
        self,
        explainer: Explainer,
        *,
        every_n_epochs: int = 1,
        cases: int | None = 20,
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
        spread: bool = False,
    ) -> None:
        super().__init__(
            cases=cases,
            every_n_epochs=every_n_epochs,
            masks={"region": region, "within": within},
            labels={"structures": structures},
            output_dir=output_dir,
            log_dir=log_dir,
            network=network,
            case_key=case_key,
            anonymize=anonymize,
            salt=salt,
            on_error=on_error,
            spread=spread,
        )
        self.explainer = explainer
        self.structure_names = structure_names
        self.second_network = second_network
        self.settings = GroundingSettings.quick() if settings is None else settings

    def _judge(self, engine: Engine, gathered: Gathered) -> Grounding:
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
            spread=self.spread,
        )

    def _summary(self, result: Grounding) -> str:
        return f"{result.verdict}. {result.sentence}"

    def _save(self, result: Grounding, folder: Path, epoch: int) -> None:
        title = f"Is the explanation grounded? Epoch {epoch}"
        write_report(result, folder / f"grounding-{epoch}.html", title=title)
        write_whole(folder / f"grounding-{epoch}.json", json.dumps(result.as_dict(), indent=1))


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
