"""Several methods compared over a run: which is best on these cases, by which criterion, and at what cost?

:class:`ComparisonHandler` judges and saves; :class:`TensorBoardComparisonHandler` draws, and computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ignite.engine import Engine
from matplotlib.figure import Figure
from torch import nn

from monai_xai.attributors import Attributor
from monai_xai.comparison import Comparison, ComparisonRow, Criterion, compare
from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.figures import Entry, draw_methods
from monai_xai.gathering import Gathered, Masks, asked_as_run, network_of, on_device
from monai_xai.handlers import AttributionEvents
from monai_xai.judging import EpochJudge, JudgmentBoard
from monai_xai.networks import device_of
from monai_xai.report.markup import plain_words
from monai_xai.report.names import Disguise
from monai_xai.tasks import TargetLike
from monai_xai.tensorboard import clean_tag


class TensorBoardComparisonHandler(JudgmentBoard[Comparison]):
    """Write a comparison to TensorBoard as curves, a table and plots, and compute nothing.

    Attached to the engine of a :class:`ComparisonHandler`. The text page gets ``comparison``, a table of means and
    ranks with what has no value and why; the image page ``comparison/ranks`` and ``comparison/by/<criterion>``, a row
    per method; the scalar page ``comparison/<method>/rank`` and ``comparison/<method>/<criterion>``. Steps are epochs.
    Cases have no names there but where a reason tells one.

    Args:
        log_dir: where the event file is written, if there is no ``summary_writer``.
        summary_writer: a writer to share with other handlers; who made it closes it.
        anonymize: replace names of cases by salted hashes.
        salt: key of the hashes; None draws one.
    """

    kept_as = "comparison"
    completed = AttributionEvents.COMPARISON_COMPLETED

    @staticmethod
    def hide_names(result: Comparison, salt: str) -> Comparison:
        disguise = Disguise(result.cases, salt)
        return replace(
            result,
            cases=tuple(map(disguise.words, result.cases)),
            reasons={
                (criterion, method, disguise.words(case)): disguise.words(reason)
                for (criterion, method, case), reason in result.reasons.items()
            },
        )

    def write(self, result: Comparison, step: int) -> None:
        for row in result.rows():
            if math.isfinite(row.mean):
                tag = f"comparison/{clean_tag(row.method)}/{clean_tag(row.criterion)}"
                self._writer.add_scalar(tag, row.mean, step)
        for row in result.overall():
            if math.isfinite(row.rank):
                self._writer.add_scalar(f"comparison/{clean_tag(row.method)}/rank", row.rank, step)
        self._writer.add_text("comparison", text_of_comparison(result), step)
        for name, figure in figures_of_comparison(result):
            self._add_picture(f"comparison/{name}", figure, step)
        self._writer.flush()


class ComparisonHandler(EpochJudge[Comparison]):
    """Compare methods over the cases of an epoch, every few epochs, and save every value.

    Attached to an evaluator, it keeps inputs, labels and masks of the first cases of an epoch on the CPU. When it is
    over it runs :func:`monai_xai.compare` on them, puts the result into ``engine.state.comparison``, fires
    ``AttributionEvents.COMPARISON_COMPLETED``, and writes ``comparison-<epoch>.csv`` and ``.json``.

    Nothing else in the loop changes; what fails is logged, with its place, and counted in ``failures``.

    Args:
        explainers: the methods by name, two or more: explainers, which should ask the same target, or attributors. One
            without inferer takes the engine's.
        target: what attributors are asked about.
        every_n_epochs: how often; 1 is every epoch.
        cases: how many cases of the epoch at most, None: all; intervals need 5.
        region: where the evidence should be, see :class:`~monai_xai.GroundingHandler`; None: location is not judged.
        within: where the body is, in the same way; None: everywhere.
        criteria: by name; None takes :func:`monai_xai.comparison.default_criteria`.
        output_dir: where files are written; None writes none.
        log_dir: where TensorBoard events are written; a :class:`TensorBoardComparisonHandler` is attached for that.
        network: the network, if the engine has none of its own or another is meant.
        case_key: where the batch holds case names; else file names are taken.
        anonymize: replace names of cases by salted hashes in files and TensorBoard. ``engine.state.comparison`` keeps
            them.
        salt: key of the hashes; None draws one that holds as long as the handler.
        seed: of the bootstrap.
        progress: whether a bar is shown.
        on_error: "log" keeps the loop alive; "raise" ends it.
        spread: where there are several processes, whether they unite the cases that each has seen, share the work, and
            let the first one write. The handler is then attached in all of them, as a metric is; else in one, which
            judges what it has seen.

    Raises:
        InputError: if a setting makes no sense.
    """

    board = TensorBoardComparisonHandler
    not_done = "Not compared"

    def __init__(
        self,
        explainers: Mapping[str, Explainer | Attributor],
        *,
        target: TargetLike | None = None,
        every_n_epochs: int = 1,
        cases: int | None = 20,
        region: Masks | None = None,
        within: Masks | None = None,
        criteria: Mapping[str, Criterion] | None = None,
        output_dir: str | Path | None = None,
        log_dir: str | Path | None = None,
        network: nn.Module | None = None,
        case_key: str = "case_id",
        anonymize: bool = False,
        salt: str | None = None,
        seed: int = 0,
        progress: bool = True,
        on_error: Literal["log", "raise"] = "log",
        spread: bool = False,
    ) -> None:
        if not isinstance(explainers, Mapping) or len(explainers) < 2:
            raise InputError("ComparisonHandler needs a mapping of names to two explainers or more.")
        self.explainers = {name: _as_explainer(name, method, target) for name, method in explainers.items()}
        super().__init__(
            cases=cases,
            every_n_epochs=every_n_epochs,
            masks={"region": region, "within": within},
            output_dir=output_dir,
            log_dir=log_dir,
            network=network,
            case_key=case_key,
            anonymize=anonymize,
            salt=salt,
            on_error=on_error,
            spread=spread,
        )
        self.criteria = criteria
        self.seed = seed
        self.progress = progress

    def _judge(self, engine: Engine, gathered: Gathered) -> Comparison:
        network = network_of(engine, self.network, "ComparisonHandler")
        device = device_of(network)
        return compare(
            {name: asked_as_run(e, engine, gathered.call) for name, e in self.explainers.items()},
            network,
            on_device(gathered.cases, device),
            regions=on_device(gathered.masks.get("region", {}), device),
            within=on_device(gathered.masks.get("within", {}), device),
            criteria=self.criteria,
            seed=self.seed,
            progress=self.progress,
            spread=self.spread,
        )

    def _summary(self, result: Comparison) -> str:
        return summary_of(result)

    def _save(self, result: Comparison, folder: Path, epoch: int) -> None:
        result.save(folder, f"comparison-{epoch}")


def _as_explainer(name: str, method: Explainer | Attributor, target: TargetLike | None) -> Explainer:
    if isinstance(method, Explainer):
        return method
    if not isinstance(method, Attributor) or target is None:
        raise InputError(
            f"ComparisonHandler needs an Explainer for {name!r}, or an attributor and target=..., got {method!r} and "
            f"target={target!r}."
        )
    return Explainer(target, method, progress=False)


def figures_of_comparison(comparison: Comparison) -> Iterator[tuple[str, Figure]]:
    """Yield name and figure: ``ranks`` over all criteria, and ``by/<criterion>`` for each that has a value.

    Args:
        comparison: what is drawn.
    """
    number = len(comparison.cases)
    cases = f"{number} case{'s' * (number != 1)}; bars: 95 % bootstrap intervals (from 5 cases on)"
    overall = [row for row in comparison.overall() if math.isfinite(row.rank)]
    everything = comparison.rows()
    if overall:
        counted = "Mean over criteria but costs, 1 is best; p: paired, against the best, Holm"
        yield "ranks", _drawn(overall, "Mean rank", [cases, counted], "rank", [])
    for name, criterion in comparison.criteria.items():
        rows = [row for row in everything if row.criterion == name]
        if not any(math.isfinite(row.mean) for row in rows):
            continue
        better = {"more": "more is better", "less": "less is better", "": "describes only"}[criterion.better]
        points = [list(values) for values in comparison.values[name]]
        yield f"by/{clean_tag(name)}", _drawn(rows, name, [f"{better}; {cases}"], criterion.unit, points)


def _drawn(
    rows: list[ComparisonRow], title: str, about: list[str], unit: str, points: list[list[float]]
) -> Figure:
    """Return rows, the best first where they have ranks."""
    own = points or [[] for _ in rows]
    order = sorted(
        range(len(rows)), key=lambda i: (math.isnan(rows[i].mean), _place(rows[i].rank), rows[i].mean)
    )
    entries = [
        Entry(rows[i].method, rows[i].mean, rows[i].low, rows[i].high, own[i], _note(rows[i])) for i in order
    ]
    best = 0 if math.isfinite(rows[order[0]].rank) else -1
    return draw_methods(entries, title=title, about=about, unit=unit, best=best)


def _place(rank: float) -> float:
    return math.inf if math.isnan(rank) else rank


def _note(row: ComparisonRow) -> str:
    """Return rank and p-value as they stand behind a value."""
    rank = f"rank {row.rank:.1f}" if math.isfinite(row.rank) and row.criterion != "overall" else ""
    p = f"p {row.p:.2g}" if math.isfinite(row.p) else ""
    words = ", ".join(filter(None, (rank, p)))
    return f"({words})" if words else ""


def text_of_comparison(comparison: Comparison) -> str:
    """Return the table and what has no value as Markdown in which words from data are only words."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in comparison.rows():
        if row.not_available:
            reasons.setdefault((row.criterion, row.not_available), []).append(row.method)
    absent = [
        f"- {plain_words(', '.join(methods))}; {plain_words(criterion)}: {plain_words(reason)}"
        for (criterion, reason), methods in reasons.items()
    ]
    legend = f"{len(comparison.cases)} cases. Means over cases, mean ranks in brackets, the best of a column in bold."
    lines = [comparison.as_markdown(plain_words), "", legend, "", *absent]
    return "\n".join(lines)


def summary_of(comparison: Comparison) -> str:
    """Return which method ranks best, and which are no worse as far as these cases tell."""
    rows = [row for row in comparison.overall() if math.isfinite(row.rank)]
    if not rows:
        return "no criterion has a value for every method."
    best = min(rows, key=lambda row: row.rank)
    others = [row.method for row in rows if row is not best and not row.p < 0.05]
    tail = f"; not told apart from it (p >= 0.05): {', '.join(others)}" if others else ""
    return f"{best.method} has the best mean rank, {best.rank:.2f} of {len(rows)}, over {best.n} cases{tail}."
