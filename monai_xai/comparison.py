"""Several methods on the same cases and network: every metric, who is better beyond chance, and what it costs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import generic_gradient_magnitude, sobel
from scipy.stats import rankdata
from torch import Tensor, nn

from monai_xai import metrics
from monai_xai.attributors import Attribution, Attributor
from monai_xai.errors import InputError, XaiError
from monai_xai.explainer import CompletenessWarning, Explainer
from monai_xai.explanation import Explanation
from monai_xai.files import as_csv, as_json, write_whole
from monai_xai.forward import Scoring, with_progress
from monai_xai.grounding import GroundingCase
from monai_xai.grounding.together import together
from monai_xai.memory import PeakMemory
from monai_xai.metrics import Scores
from monai_xai.networks import device_of
from monai_xai.ranks import rank
from monai_xai.statistics import holm, interval, sign_flip_test


@dataclass(frozen=True)
class EdgeControl(Attributor):
    """The edges of the images, which know nothing of the network: a control, no explanation.

    Who does no better than this has shown anatomy. Vectors get zeros.

    Reference: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, section 5 (edge detectors).
    """

    def attribute(self, scoring: Scoring) -> Attribution:
        return _painted(scoring, lambda x: generic_gradient_magnitude(x, sobel))


@dataclass(frozen=True)
class NoiseControl(Attributor):
    """White noise, the same for every image of one shape: a control, no explanation. Vectors get zeros.

    Args:
        seed: of the noise.
    """

    seed: int = 0

    stochastic: ClassVar[bool] = True

    def attribute(self, scoring: Scoring) -> Attribution:
        generator = np.random.default_rng(self.seed)
        return _painted(scoring, lambda x: generator.random(x.shape))


def _painted(scoring: Scoring, paint: Callable[[NDArray[Any]], NDArray[Any]]) -> Attribution:
    """Return maps of images that are painted channel by channel."""
    maps = {}
    for name, x in scoring.inputs.items():
        values = torch.zeros_like(x, dtype=torch.float32)
        if x.ndim > 2:
            channels = x.detach().float().cpu().numpy().reshape(-1, *x.shape[2:])
            painted = np.stack([paint(channel) for channel in channels]).astype(np.float32)
            values = torch.from_numpy(painted).reshape(x.shape).to(x.device)
        maps[name] = values
    return Attribution(maps, scoring.score())


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


def quick_criteria() -> dict[str, Criterion]:
    """Return :func:`default_criteria` for large volumes.

    Of a case there are three maps in place of five, and 20 evaluations beside them in place of 70: the
    deletion curve has 10 points, no insertion is drawn beside it, about every block is taken away once for the
    fidelity, and maps are held against those of one noisy copy. Values are noisier; what they are of is the same.
    """
    quick = {
        "deletion area": Criterion(_of_network(metrics.deletion_curve, steps=10), "more"),
        "fidelity R2": Criterion(_of_network(metrics.fidelity_r2, n_draws=10), "more"),
        "average sensitivity": Criterion(_of_network(metrics.average_sensitivity, n_draws=1), "less"),
    }
    return {
        name: quick.get(name, criterion)
        for name, criterion in default_criteria().items()
        if name != "insertion area"
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
        rank: mean rank, 1 the best, among the methods that have any value, over the cases where all of these have one;
            NaN for what only describes.
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
        """Return ranks of the methods, 1 the best, shape (methods, cases).

        NaN for methods without any value, and in cases where one of the others has none.
        """
        values = self.values[criterion]
        ranks = np.full(values.shape, math.nan)
        sign = {"more": -1.0, "less": 1.0, "": math.nan}[self.criteria[criterion].better]
        present = np.flatnonzero(np.isfinite(values).any(1))
        common = np.flatnonzero(np.isfinite(values[present]).all(0))
        if len(present) > 1 and sign == sign:
            ranks[np.ix_(present, common)] = rankdata(sign * values[np.ix_(present, common)], axis=0)
        return ranks

    def overall(self) -> list[ComparisonRow]:
        """Return one row per method: its rank in a case, averaged over criteria, as ``rank`` and ``mean``.

        Costs do not count, nor do criteria that lack a value for a method that has others. Criteria weigh alike,
        however much they have in common: this is a summary, and no measure of what is best for a question.
        """
        quality = [
            self.ranks(name) for name in self.criteria if name not in _COSTS and self.criteria[name].better
        ]
        known = [np.isfinite(ranks).any(1) for ranks in quality]
        alive = np.any(known, axis=0) if known else np.zeros(len(self.methods), bool)
        counted = [ranks for ranks, have in zip(quality, known, strict=True) if (have == alive).all()]
        whole = np.full((len(self.methods), len(self.cases)), math.nan)
        if counted:
            whole = np.mean(counted, axis=0)
        return list(self._summarize("overall", whole, whole))

    def _rows(self, name: str) -> Iterator[ComparisonRow]:
        yield from self._summarize(name, self.values[name], self.ranks(name))

    def _summarize(
        self, name: str, values: NDArray[np.float64], ranks: NDArray[np.float64]
    ) -> Iterator[ComparisonRow]:
        tests = self._tests(values, ranks)
        for m, method in enumerate(self.methods):
            found, places = (row[np.isfinite(row)] for row in (values[m], ranks[m]))
            low, high = interval(found, self.seed)
            rank_low, rank_high = interval(places, self.seed)
            yield ComparisonRow(
                method, name, len(found), _mean(found), low, high, _mean(places), rank_low, rank_high,
                tests.get(m, math.nan), self._reasons(name, method),
            )  # fmt: skip

    def _tests(self, values: NDArray[np.float64], ranks: NDArray[np.float64]) -> dict[int, float]:
        """Return p-values against the method of the best mean rank, by method."""
        ranked = np.flatnonzero(np.isfinite(ranks).any(1))
        common = np.isfinite(ranks[ranked]).all(0) if len(ranked) else np.zeros(0, bool)
        if not common.any():
            return {}
        best = ranked[ranks[ranked][:, common].mean(1).argmin()]
        others = [int(m) for m in ranked if m != best]
        differences = [(values[m] - values[best])[common] for m in others]
        return dict(zip(others, holm([sign_flip_test(d, self.seed) for d in differences]), strict=True))

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

    def as_markdown(self, word: Callable[[str], str] = str) -> str:
        """Return the table of means, with mean ranks in brackets; the best of each criterion is bold.

        Criteria without any value are left out.

        Args:
            word: what makes a name safe where the table is shown.
        """
        known = [name for name in self.criteria if np.isfinite(self.values[name]).any()]
        columns = ["overall", *known]
        heads = ["method", "mean rank", *(_head(name, self.criteria[name]) for name in known)]
        lines = ["| " + " | ".join(map(word, heads)) + " |", "|---" * len(heads) + "|"]
        rows = {(row.method, row.criterion): row for row in [*self.overall(), *self.rows()]}
        for method in self.methods:
            cells = [_cell(rows[method, name], [rows[m, name] for m in self.methods]) for name in columns]
            lines.append(f"| {word(method)} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def save(self, folder: str | Path, name: str = "comparison") -> tuple[Path, Path]:
        """Write ``<name>.csv`` (one row per case and method) and ``<name>.json`` (with the summary and all reasons).

        Args:
            folder: is made where it is missing.
            name: of both files.

        Raises:
            OSError: if a file cannot be written; what was there before is left as it was.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        table, document = Path(folder, f"{name}.csv"), Path(folder, f"{name}.json")
        cases = list(self.case_rows())
        write_whole(table, as_csv(cases))
        summary = {
            "overall": [row._asdict() for row in self.overall()],
            "summary": [row._asdict() for row in self.rows()],
            "cases": cases,
            "reasons": [
                {"criterion": criterion, "method": method, "case": case, "reason": reason}
                for (criterion, method, case), reason in self.reasons.items()
            ],
        }
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
    spread: bool = False,
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
        spread: where there are several processes, whether they share the cases and methods, each every n-th of these
            pairs. All must call with the same cases, and all get the same result; seconds are those beside the others.

    Raises:
        InputError: if there is no case or fewer than two methods.
        OtherProcessError: if work is shared, and another process failed.
        OutOfStepError: if work is shared, and another process has other cases.
    """
    chosen = {**(default_criteria() if criteria is None else criteria), **_COSTS}
    explainers = {name: replace(explainer, spread=False) for name, explainer in explainers.items()}
    names, ids = list(explainers), [case.id for case in cases]
    what = f"comparison of {', '.join(names)} by {', '.join(chosen)}"

    def judge(pair: tuple[int, int]) -> dict[str, Scores]:
        m, c = pair
        region, body = (given.get(ids[c]) if given else None for given in (regions, within))
        return _judge_all(explainers[names[m]], network, cases[c], chosen, region, body)

    def shown(own: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
        return with_progress(own, "methods and cases", shown=progress and rank() == 0)

    with together(what, cases, [network], len(names) * len(ids), spread=spread) as crew:
        if len(names) < 2 or not ids:
            raise InputError(
                f"compare() needs two explainers or more and a case, got {len(names)} and {len(ids)}."
            )
        pairs = _pairs(len(names), len(ids), crew.size)
        found = crew.each(pairs, judge, what, along=shown)
    values = {name: np.full((len(names), len(ids)), math.nan) for name in chosen}
    reasons: dict[tuple[str, str, str], str] = {}
    for (m, c), scores in zip(pairs, found, strict=True):
        for criterion, score in scores.items():
            values[criterion][m, c] = float(score.values[0])
            if score.reasons[0]:
                reasons[criterion, names[m], ids[c]] = score.reasons[0]
    return Comparison(tuple(names), chosen, tuple(ids), values, reasons, seed)


def _pairs(methods: int, cases: int, processes: int) -> list[tuple[int, int]]:
    """Return method and case of each piece of work, so that no process, which takes every n-th, has its own methods."""
    turns = processes > 1 and methods % processes == 0
    return [((m + c * turns) % methods, c) for c in range(cases) for m in range(methods)]


_COSTS = {
    "seconds": Criterion(lambda judged: _known(judged.explanation.seconds, "not measured"), "less"),
    "peak GiB": Criterion(lambda judged: _known(judged.peak_gib, "not measured on this system"), "less"),
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletenessWarning)  # the gap is a criterion of its own
        try:
            with PeakMemory(device_of(network)) as peak:
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


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _head(name: str, criterion: Criterion) -> str:
    """Return a criterion with what is better, as a column has it."""
    unit = f", {criterion.unit}" if criterion.unit else ""
    arrow = {"more": "↑", "less": "↓", "": ""}[criterion.better]
    return f"{name}{unit} {arrow}".strip()


def _cell(row: ComparisonRow, rivals: Sequence[ComparisonRow]) -> str:
    if math.isnan(row.mean):
        return "n/a"
    if math.isnan(row.rank):
        return f"{row.mean:.3g}"
    text = f"{row.mean:.3g}" if row.criterion == "overall" else f"{row.mean:.3g} ({row.rank:.1f})"
    return f"**{text}**" if row.rank == min(r.rank for r in rivals if not math.isnan(r.rank)) else text
