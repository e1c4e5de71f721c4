"""Several methods on the same cases and network: every metric, who is better beyond chance, and what it costs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from monai_xai import metrics
from monai_xai.errors import InputError, XaiError
from monai_xai.explainer import CompletenessWarning, Explainer
from monai_xai.explanation import Explanation
from monai_xai.files import as_csv, as_json, write_whole
from monai_xai.forward import with_progress
from monai_xai.grounding import GroundingCase
from monai_xai.memory import PeakMemory
from monai_xai.metrics import Scores
from monai_xai.statistics import holm, interval, sign_flip_test


class Judged(NamedTuple):
    """What a metric is given.

    Args:
        explainer: explains.
        network: the network.
        case: the case.
        explanation: its explanation.
        region: where the evidence should be, shape (1, 1, *spatial), or None.
        within: the body, likewise.
        peak_gib: additional memory that the explanation took at its peak; NaN where nothing tells.
    """

    explainer: Explainer
    network: nn.Module
    case: GroundingCase
    explanation: Explanation
    region: Tensor | None
    within: Tensor | None
    peak_gib: float = math.nan


@dataclass(frozen=True)
class Criterion:
    """A metric by which methods are compared.

    Args:
        judge: returns one value, NaN with a reason where there is none.
        better: "more", "less", or "" for what only describes.
        unit: of the value.
    """

    judge: Callable[[Judged], Scores]
    better: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        if self.better not in ("more", "less", ""):
            raise InputError(f"Criterion(better={self.better!r}): choose 'more', 'less' or ''.")


def _of_region(metric: Callable[..., Scores]) -> Callable[[Judged], Scores]:
    def judge(judged: Judged) -> Scores:
        if judged.region is None:
            return _undefined("no region is given")
        grid = judged.region.shape[2:]
        maps = next((m for m in judged.explanation.attributions.values() if m.shape[2:] == grid), None)
        if maps is None:
            return _undefined(f"no map lies on the grid of the region, {tuple(grid)}")
        return metric(torch.as_tensor(maps), judged.region, judged.within)

    return judge


def _of_map(metric: Callable[..., Scores]) -> Callable[[Judged], Scores]:
    return lambda judged: metric(torch.as_tensor(next(iter(judged.explanation.attributions.values()))))


def _of_network(metric: Callable[..., Any], **options: Any) -> Callable[[Judged], Scores]:
    def judge(judged: Judged) -> Scores:
        found = metric(
            replace(judged.explainer, progress=False),
            judged.network,
            judged.case.inputs,
            label=judged.case.label,
            explanation=judged.explanation,
            **options,
        )
        return found.areas if isinstance(found, metrics.Curve) else found

    return judge


def _gap(judged: Judged) -> Scores:
    gap = judged.explanation.gap
    return _undefined("the method does not promise to add up") if gap is None else Scores(gap.double())


def _undefined(reason: str) -> Scores:
    return _known(math.nan, reason)


def _known(value: float, reason: str) -> Scores:
    """Return one value, with the reason for where it is NaN."""
    return Scores(torch.tensor([value], dtype=torch.float64), (reason,))


def default_criteria() -> dict[str, Criterion]:
    """Return the criteria by name: location (needs a region), faithfulness, robustness, randomization, complexity."""
    return {
        "relevance mass": Criterion(_of_region(metrics.relevance_mass), "more"),
        "rank accuracy": Criterion(_of_region(metrics.rank_accuracy), "more"),
        "average precision": Criterion(_of_region(metrics.average_precision), "more"),
        "deletion area": Criterion(_of_network(metrics.deletion_curve), "more"),
        "insertion area": Criterion(_of_network(metrics.insertion_curve), "less"),
        "fidelity R2": Criterion(_of_network(metrics.fidelity_r2, n_draws=20), "more"),
        "average sensitivity": Criterion(_of_network(metrics.average_sensitivity, n_draws=3), "less"),
        "likeness at random weights": Criterion(_of_network(metrics.full_randomization, seeds=(0,)), "less"),
        "completeness gap": Criterion(_gap, "less"),
        "Gini sparseness": Criterion(_of_map(metrics.gini)),
    }


class ComparisonRow(NamedTuple):
    """One method by one criterion, over all cases.

    Args:
        method: its name.
        criterion: name of the criterion.
        n: number of cases with a value.
        mean: over these cases.
        low: lower end of its 95 % bootstrap interval; NaN below 5 cases.
        high: upper end.
        rank: mean rank among the methods, 1 the best, over cases where all have a value; NaN for what only describes.
        rank_low: lower end of its 95 % bootstrap interval.
        rank_high: upper end.
        p: paired sign-flip test against the method of the best mean rank, Holm-corrected; NaN for that method.
        not_available: why there is no value, with the number of cases.
    """

    method: str
    criterion: str
    n: int
    mean: float
    low: float
    high: float
    rank: float
    rank_low: float
    rank_high: float
    p: float
    not_available: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """Values of every method, criterion and case.

    Args:
        methods: names, in the order given.
        criteria: by name.
        cases: their names.
        values: by criterion, shape (methods, cases); NaN where undefined.
        reasons: why, by (criterion, method, case).
        seed: of the bootstrap.
    """

    methods: tuple[str, ...]
    criteria: Mapping[str, Criterion]
    cases: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]
    reasons: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    seed: int = 0

    def rows(self) -> list[ComparisonRow]:
        """Return one row per criterion and method."""
        return [row for name in self.criteria for row in self._rows(name)]

    def ranks(self, criterion: str) -> NDArray[np.float64]:
        """Return ranks of the methods, 1 the best, shape (methods, cases where all have a value)."""
        values = self.values[criterion]
        common = values[:, np.isfinite(values).all(0)]
        sign = {"more": -1.0, "less": 1.0, "": math.nan}[self.criteria[criterion].better]
        return np.asarray(rankdata(sign * common, axis=0)) if sign == sign else common * math.nan

    def _rows(self, name: str) -> Iterator[ComparisonRow]:
        values, ranks = self.values[name], self.ranks(name)
        known = ranks.shape[1] and not np.isnan(ranks).any()
        means = ranks.mean(1) if known else np.full(len(self.methods), math.nan)
        tests = self._tests(values, means) if known else [math.nan] * len(self.methods)
        for m, method in enumerate(self.methods):
            found = values[m][np.isfinite(values[m])]
            low, high = interval(found, self.seed)
            rank_low, rank_high = interval(ranks[m], self.seed) if known else (math.nan, math.nan)
            yield ComparisonRow(
                method, name, len(found), float(found.mean()) if len(found) else math.nan, low, high,
                float(means[m]), rank_low, rank_high, tests[m], self._reasons(name, method),
            )  # fmt: skip

    def _tests(self, values: NDArray[np.float64], means: NDArray[np.float64]) -> list[float]:
        """Return p-values against the method of the best mean rank."""
        common = values[:, np.isfinite(values).all(0)]
        best = int(means.argmin())
        others = [m for m in range(len(self.methods)) if m != best]
        corrected = holm([sign_flip_test(common[m] - common[best], self.seed) for m in others])
        found = dict(zip(others, corrected, strict=True))
        return [found.get(m, math.nan) for m in range(len(self.methods))]

    def _reasons(self, criterion: str, method: str) -> str:
        found = [r for (c, m, _), r in self.reasons.items() if (c, m) == (criterion, method)]
        return "; ".join(f"{reason} ({found.count(reason)})" for reason in dict.fromkeys(found))

    def case_rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row per case and method, with every criterion as a column."""
        for c, case in enumerate(self.cases):
            for m, method in enumerate(self.methods):
                yield {
                    "case": case,
                    "method": method,
                    **{name: float(self.values[name][m, c]) for name in self.criteria},
                }

    def as_markdown(self) -> str:
        """Return the table of means, with mean ranks in brackets; the best of each criterion is bold."""
        lines = ["| method | " + " | ".join(self.criteria) + " |", "|---" * (len(self.criteria) + 1) + "|"]
        rows = {(row.method, row.criterion): row for row in self.rows()}
        for method in self.methods:
            cells = [
                _cell(rows[method, name], [rows[m, name] for m in self.methods]) for name in self.criteria
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``comparison.csv`` (one row per case and method) and ``comparison.json`` (with the summary).

        Raises:
            OSError: if a file cannot be written; what was there before is left as it was.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        table, document = Path(folder, "comparison.csv"), Path(folder, "comparison.json")
        cases = list(self.case_rows())
        write_whole(table, as_csv(cases))
        summary = {"summary": [row._asdict() for row in self.rows()], "cases": cases}
        write_whole(document, as_json(summary))
        return table, document


def compare(
    explainers: Mapping[str, Explainer],
    network: nn.Module,
    cases: Sequence[GroundingCase],
    *,
    regions: Mapping[str, Tensor] | None = None,
    within: Mapping[str, Tensor] | None = None,
    criteria: Mapping[str, Criterion] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Explain every case by every method, and judge the maps by every criterion.

    Args:
        explainers: the methods by name; they should ask the same target.
        network: the network.
        cases: batches of one.
        regions: where the evidence should be, by case id, shape (1, 1, *spatial), bool; location criteria need it.
        within: the body, likewise; None: everywhere.
        criteria: by name; None takes :func:`default_criteria`. "seconds" and "peak GiB"
            of the explanations are added.
        seed: of the bootstrap.
        progress: whether a bar is shown.

    Raises:
        InputError: if there is no case or fewer than two methods.
    """
    if len(explainers) < 2 or not cases:
        raise InputError(
            f"compare() needs two explainers or more and a case, got {len(explainers)} and {len(cases)}."
        )
    chosen = {**(default_criteria() if criteria is None else criteria), **_COSTS}
    names, ids = list(explainers), [case.id for case in cases]
    values = {name: np.full((len(names), len(ids)), math.nan) for name in chosen}
    reasons: dict[tuple[str, str, str], str] = {}
    pairs = [(m, c) for c in range(len(ids)) for m in range(len(names))]
    for m, c in with_progress(pairs, "methods and cases", shown=progress):
        region, body = (given.get(ids[c]) if given else None for given in (regions, within))
        scores = _judge_all(explainers[names[m]], network, cases[c], chosen, region, body)
        for criterion, score in scores.items():
            values[criterion][m, c] = float(score.values[0])
            if score.reasons[0]:
                reasons[criterion, names[m], ids[c]] = score.reasons[0]
    return Comparison(tuple(names), chosen, tuple(ids), values, reasons, seed)


_COSTS = {
    "seconds": Criterion(lambda judged: _known(judged.explanation.seconds, "not measured"), "less", "s"),
    "peak GiB": Criterion(
        lambda judged: _known(judged.peak_gib, "not measured on this system"), "less", "GiB"
    ),
}


def _judge_all(
    explainer: Explainer,
    network: nn.Module,
    case: GroundingCase,
    criteria: Mapping[str, Criterion],
    region: Tensor | None,
    within: Tensor | None,
) -> dict[str, Scores]:
    """Explain a case once, and return every score of its explanation."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletenessWarning)  # the gap is a criterion of its own
        try:
            with PeakMemory(device) as peak:
                explanation = explainer(network, case.inputs, case.label)
        except XaiError as error:
            return dict.fromkeys(criteria, _undefined(str(error)))
        if not isinstance(explanation, Explanation):
            raise InputError("compare() needs explainers of one target each.")
        judged = Judged(explainer, network, case, explanation, region, within, peak.gib)
        return {name: _judge(criterion, judged) for name, criterion in criteria.items()}


def _judge(criterion: Criterion, judged: Judged) -> Scores:
    try:
        return criterion.judge(judged)
    except XaiError as error:
        return _undefined(str(error))


def _cell(row: ComparisonRow, rivals: Sequence[ComparisonRow]) -> str:
    if math.isnan(row.mean):
        return "n/a"
    if math.isnan(row.rank):
        return f"{row.mean:.3g}"
    text = f"{row.mean:.3g} ({row.rank:.1f})"
    return f"**{text}**" if row.rank == min(rival.rank for rival in rivals) else text
