"""Modalities: what whole inputs contribute to a score, alone and together, in units of the score.

The players of the game are whole modalities: a channel of a multi-sequence image, an image, a clinical table. The value
of a coalition is the score with every other modality at its baseline. For scores that are sums of window scores it is
found window by window, and a modality that equals its baseline in a window is a null player there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from monai.inferers import Inferer
from scipy.stats import kendalltau
from torch import Tensor, nn

from monai_xai.attributors.games import (
    Game,
    Value,
    all_values,
    marginals,
    shapley_interactions,
    shapley_values,
)
from monai_xai.baselines import Baseline, BaselineLike, Blur, Noise, as_baseline
from monai_xai.calls import CallForm
from monai_xai.errors import InputError
from monai_xai.features import Features, FeaturesLike, as_features, crossed, feature_masks
from monai_xai.forward import Scoring, guard
from monai_xai.perturbed import PerturbedScores
from monai_xai.tables import ClinicalVariables
from monai_xai.targets import Target
from monai_xai.tasks import Inputs, Label, TargetLike, Task, as_inferer, as_targets, like, open_task

MOST_EXACT = 10
"""Up to this many modalities, all coalitions are evaluated."""


@dataclass(frozen=True, eq=False)
class ModalityExplanation:
    """What each modality contributes to a score, for a batch.

    Args:
        modalities: names, in the order of the columns.
        values: signed Shapley values in units of the score, by baseline, shape (N, M).
        standard_errors: of the values, from draws of the baseline and of permutations, by baseline, shape (N, M);
            0 where nothing was drawn.
        interactions: Shapley interaction index of each pair, by baseline, shape (N, M, M) with a diagonal of 0; above
            0 for synergy, below for redundancy. None where coalitions were sampled.
        leave_one_out: how much the score falls when a modality alone goes to its baseline, by baseline, shape (N, M).
        single_gain: how much it rises when a modality alone comes, by baseline, shape (N, M).
        score: shape (N,).
        baseline_scores: the score with all modalities at their baseline, by baseline, shape (N,).
        agreement: the smallest Kendall's tau between the values under two baselines, shape (N,); below 0.67 the
            values depend on the baseline. NaN for a single modality.
        parts: where a drill-down was asked for: Owen values of the parts of each modality, by baseline and modality,
            shape (N, number of parts); they sum to the modality's value.
        maps: the Owen values painted on the inputs, by baseline and input.
        part_names: names of the parts by modality, for each sample; clinical variables with what they are in it.
        seconds: time it took.
        target: as written in code.
        seed: the seed of permutations.
        facts: further numbers, such as ``evaluations``.
        unit: of the score, such as "years"; empty if none was given.
    """

    modalities: tuple[str, ...]
    values: Mapping[str, Tensor]
    standard_errors: Mapping[str, Tensor]
    interactions: Mapping[str, Tensor] | None
    leave_one_out: Mapping[str, Tensor]
    single_gain: Mapping[str, Tensor]
    score: Tensor
    baseline_scores: Mapping[str, Tensor]
    agreement: Tensor
    parts: Mapping[str, Mapping[str, Tensor]]
    maps: Mapping[str, Mapping[str, Tensor]]
    part_names: Mapping[str, Sequence[Sequence[str]]]
    seconds: float
    target: str
    seed: int
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    unit: str = ""

    @property
    def attributions(self) -> Mapping[str, Tensor]:
        """Maps under the first baseline, by input; empty without a drill-down."""
        return next(iter(self.maps.values()), {})

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines."""
        return tuple(self.values)

    def residual(self, baseline: str) -> Tensor:
        """Return how far the values are from adding up to score minus baseline score, shape (N,)."""
        return self.values[baseline].sum(1) - (self.score - self.baseline_scores[baseline])

    def shares(self, baseline: str) -> Tensor:
        """Return ``|value| / sum |value|``, shape (N, M); NaN where the score does not change beyond its error.

        To be shown beside :attr:`interactions` only: of two modalities that count together and not alone, both have a
        share of nothing.
        """
        values = self.values[baseline].abs()
        change = (self.score - self.baseline_scores[baseline]).abs()
        error = self.standard_errors[baseline].square().sum(1).sqrt()
        floor = error.clamp(min=float(torch.finfo(change.dtype).eps) * 16 * float(self.score.abs().max()))
        total = values.sum(1, keepdim=True)
        return torch.where((change > floor)[:, None] & (total > 0), values / total, math.nan)

    def intershap(self, baseline: str) -> Tensor:
        """Return the share of interactions in everything that modalities do, in [0, 1], shape (N,).

        The local form: absolute values are taken for each case.

        Raises:
            InputError: if coalitions were sampled, so that interactions are not known.

        Reference: Wenderoth et al., "Measuring Cross-Modal Interactions in Multimodal Models", AAAI 2025
        (arXiv:2412.15828).
        """
        if self.interactions is None:
            raise InputError(f"Interactions are computed for up to {MOST_EXACT} modalities.")
        interactions = self.interactions[baseline]
        main = (self.values[baseline] - interactions.sum(2) / 2).abs().sum(1)
        together = interactions.abs().sum((1, 2)) / 2
        return together / (together + main)

    def synergies(self, baseline: str) -> Tensor:
        """Return interactions, above 0 for synergy and below for redundancy, shape (N, M, M).

        An interaction has the sign of the score: of two modalities that lower it, redundant ones have one above 0. It
        is counted here in the direction in which the two move the score, so that cases of either can be averaged.

        Raises:
            InputError: if coalitions were sampled, so that interactions are not known.
        """
        if self.interactions is None:
            raise InputError(f"Interactions are computed for up to {MOST_EXACT} modalities.")
        values = self.values[baseline]
        return self.interactions[baseline] * (values[:, :, None] + values[:, None]).sign()

    def rows(self, case: str = "") -> Iterator[dict[str, str | float]]:
        """Yield every number of the first sample as a row of a table, for CSV and JSON: modalities, then parts."""
        yield from self._modality_rows(case)
        for baseline, parts in self.parts.items():
            for modality, values in parts.items():
                for name, value in zip(self.part_names[modality][0], values[0].tolist(), strict=True):
                    yield {
                        "case": case,
                        "baseline": baseline,
                        "modality": modality,
                        "part": name,
                        "value": value,
                    }

    def _modality_rows(self, case: str) -> Iterator[dict[str, str | float]]:
        for baseline in self.baselines:
            shares = self.shares(baseline)[0]
            for m, modality in enumerate(self.modalities):
                yield {
                    "case": case,
                    "baseline": baseline,
                    "modality": modality,
                    "value": float(self.values[baseline][0, m]),
                    "standard_error": float(self.standard_errors[baseline][0, m]),
                    "share": float(shares[m]),
                    "leave_one_out": float(self.leave_one_out[baseline][0, m]),
                    "single_gain": float(self.single_gain[baseline][0, m]),
                    "score": float(self.score[0]),
                    "baseline_score": float(self.baseline_scores[baseline][0]),
                    "residual": float(self.residual(baseline)[0]),
                    "agreement": float(self.agreement[0]),
                    **{
                        f"interaction with {other}": float(self.interactions[baseline][0, m, i])
                        for i, other in enumerate(self.modalities)
                        if self.interactions is not None and i != m
                    },
                }


def _default_baselines() -> dict[str, BaselineLike]:
    return {"blur": Blur(), "noise": Noise()}


@dataclass(frozen=True, eq=False)
class ModalityShapley:
    """Shapley values of whole modalities, with their interactions, under at least two baselines.

    Called as an :class:`~monai_xai.Explainer` is. Up to ten modalities, all coalitions are evaluated and the values are
    exact; above, permutations are drawn in antithetic pairs until the largest standard error is small.

    Args:
        target: what is explained, one or several by name.
        baselines: at least two by name, each a baseline or one by input; how far the values agree is reported. For
            networks trained with modality dropout, what stood for a missing modality is the natural one
            (``Constant(0.0)``).
        inferer: how the network is applied to whole inputs, as for an ``Explainer``.
        modalities: "channels": each channel of an image and each vector is one; "inputs": each input is one.
        parts: features into which modalities are taken apart, such as ``Blocks(16)`` or
            ``ClinicalVariables(schema)``; their Owen values sum to the value of their modality.
        channel_names: names of the channels by input name.
        max_permutations: how many permutations are drawn at most: above ten modalities, and for parts.
        tolerance: drawing ends when the largest standard error is below this share of the change of the score.
        seed: seed of permutations.
        progress: whether long work shows a bar.
        call: how the network takes several inputs, as for an ``Explainer``.
        embeddings: as for an ``Explainer``.
        memory_gib: what a batch of coalitions may take, as for an ``Explainer``.

    Reference: Shapley, "A Value for n-Person Games", 1953; Grabisch & Roubens, "An axiomatic approach to the concept of
    interaction among players in cooperative games", 1999, definition 1; Owen, "Values of Games with a Priori Unions",
    1977; Jin et al., "Evaluating Explainable AI on a Multi-Modal Medical Imaging Task", AAAI 2022.

    Example:
        >>> import torch
        >>> from monai_xai import ModalityShapley, OutputScore
        >>> class Product(torch.nn.Module):
        ...     def forward(self, ct, pet):
        ...         return ct * pet
        >>> ones = torch.ones(1, 1)
        >>> shapley = ModalityShapley(OutputScore(), {"zero": 0.0, "half": 0.5})
        >>> found = shapley(Product(), {"ct": ones, "pet": ones})
        >>> found.values["zero"], found.interactions["zero"][0, 0, 1]
        (tensor([[0.5000, 0.5000]]), tensor(1.))
    """

    target: TargetLike | Mapping[str, TargetLike]
    baselines: Mapping[str, BaselineLike] = field(default_factory=_default_baselines)
    inferer: Inferer | None = None
    modalities: Literal["channels", "inputs"] = "channels"
    parts: FeaturesLike | None = None
    channel_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    max_permutations: int = 128
    tolerance: float = 0.02
    seed: int = 0
    progress: bool = True
    call: CallForm = "arguments"
    embeddings: Mapping[str, str] = field(default_factory=dict)
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_targets(self.target))
        object.__setattr__(self, "inferer", as_inferer(self.inferer))
        if not isinstance(self.baselines, Mapping) or len(self.baselines) < 2:
            raise InputError(
                "ModalityShapley needs at least two baselines by name, such as {'blur': Blur(), 'noise': Noise()}: "
                "values under a single one say as much about the baseline as about the network."
            )
        coerced = {name: as_baseline(baseline) for name, baseline in self.baselines.items()}
        object.__setattr__(self, "baselines", coerced)
        if self.modalities not in ("channels", "inputs"):
            raise InputError(f"modalities={self.modalities!r}: choose 'channels' or 'inputs'.")
        if self.parts is not None:
            object.__setattr__(self, "parts", as_features(self.parts))
        if self.max_permutations < 2 or self.tolerance <= 0:
            raise InputError("ModalityShapley needs max_permutations >= 2 and tolerance > 0.")

    def __call__(
        self, network: nn.Module, inputs: Inputs, label: Label = None, prediction: Any = None
    ) -> ModalityExplanation | dict[str, ModalityExplanation]:
        """Explain a batch; see :meth:`monai_xai.Explainer.__call__` for arguments and errors."""
        explanations = self.explain(network, inputs, label=label, prediction=prediction)
        return explanations[""] if set(explanations) == {""} else explanations

    def explain(
        self, network: nn.Module, inputs: Inputs, *, label: Label = None, prediction: Any = None
    ) -> dict[str, ModalityExplanation]:
        """Explain a batch, and return explanations by target name ("" for a single one)."""
        with open_task(self, network, inputs, label, prediction) as task:
            targets = task.targets()
            placed = {name: self._placed(task, target) for name, target in targets.items()}
            return {
                name: placed[name]._explain(task.scoring(target), target, task)
                for name, target in targets.items()
            }

    def _placed(self, task: Task, target: Target) -> ModalityShapley:
        """Return the same with parts and baselines as they lie on a batch."""
        baselines = {name: task.placed(baseline, target) for name, baseline in self.baselines.items()}
        return replace(self, parts=task.placed(self.parts, target), baselines=baselines)

    def _explain(self, scoring: Scoring, target: Target, task: Task) -> ModalityExplanation:
        start = time.perf_counter()
        with guard("ModalityShapley", scoring.values):
            table, clean = self._players(scoring), scoring.term_scores()
            scores = PerturbedScores(scoring.memory_gib)
            results = {
                name: self._play(scoring, table, baseline, clean, scores)  # type: ignore[arg-type]
                for name, baseline in self.baselines.items()
            }
        found = next(iter(results.values()))
        values = {name: result.values for name, result in results.items()}
        return ModalityExplanation(
            modalities=table.names,
            values=values,
            standard_errors={name: result.errors for name, result in results.items()},
            interactions=(
                None
                if found.interactions is None
                else {name: r.interactions for name, r in results.items() if r.interactions is not None}
            ),
            leave_one_out={name: result.leave_one_out for name, result in results.items()},
            single_gain={name: result.single_gain for name, result in results.items()},
            score=found.score,
            baseline_scores={name: result.baseline_score for name, result in results.items()},
            agreement=_agreement(list(values.values())),
            parts={name: result.parts for name, result in results.items() if result.parts},
            maps={
                name: table.paint(result.parts, task.given)
                for name, result in results.items()
                if result.parts
            },
            part_names=self._part_names(table, task.given) if self.parts is not None else {},
            seconds=time.perf_counter() - start,
            target=str(target),
            seed=self.seed,
            facts={
                **task.facts(scoring),
                "evaluations": len(scoring.terms) + scores.evaluations,
                "method": f"ModalityShapley({self.modalities})",
            },
            unit=target.unit,
        )

    def _part_names(self, players: _Players, inputs: Mapping[str, Tensor]) -> dict[str, list[list[str]]]:
        """Return the names of the parts of each modality, for each sample."""
        size = len(next(iter(inputs.values())))
        found = {
            name: [[f"{name} part {i}" for i in range(len(parts))]] * size
            for name, parts in zip(players.names, players.members, strict=True)
        }
        if isinstance(self.parts, ClinicalVariables):
            for name, x in inputs.items():
                if name in found and x.ndim == 2 and (schema := self.parts.schema(name)):
                    found[name] = [list(schema.read_players(row).values()) for row in x]
        return found

    def _players(self, scoring: Scoring) -> _Players:
        whole = set(scoring.embedded) if self.modalities == "channels" else set(scoring.inputs)
        masks, count = feature_masks(_Modalities(frozenset(whole)), scoring.inputs)
        names = [
            name
            for key, x in scoring.inputs.items()
            for name in _names(key, 1 if key in whole or x.ndim == 2 else x.shape[1], self.channel_names)
        ]
        assert len(names) == count
        names = names if len(set(names)) == count else [f"{name} {i}" for i, name in enumerate(names)]
        if self.parts is None:
            return _Players(tuple(names), masks, [[m] for m in range(count)])
        assert isinstance(self.parts, Features)
        finer, _ = feature_masks(self.parts, scoring.inputs)
        return _Players.split(tuple(names), masks, finer)

    def _play(
        self,
        scoring: Scoring,
        players: _Players,
        baseline: Baseline | Mapping[str, Baseline],
        clean: Sequence[Tensor],
        scores: PerturbedScores,
    ) -> _Result:
        draws = [
            Game(scoring, start, players.masks, sum(map(len, players.members)), clean, scores)
            for start in scoring.draw(baseline)
        ]
        generator = np.random.default_rng(self.seed)
        results = [self._solve(scoring, players, game, generator) for game in draws]
        return _Result.mean(results)

    def _solve(
        self, scoring: Scoring, players: _Players, game: Game, generator: np.random.Generator
    ) -> _Result:
        coarse = game.among(players.members)
        count = len(players.names)
        if count <= MOST_EXACT:
            table = all_values(coarse, count, scoring.track(range(2**count), "coalitions", 2**count))
            values, errors = shapley_values(table), torch.zeros_like(table[:, :count])
            interactions: Tensor | None = shapley_interactions(table)
        else:
            values, errors = self._sample(scoring, coarse, count, generator)
            interactions = None
        full, empty = 2**count - 1, 0
        score, least = coarse(full), coarse(empty)
        parts = self._divide(scoring, players, game, generator) if self.parts is not None else {}
        return _Result(
            values,
            errors,
            interactions,
            torch.stack([score - coarse(full ^ (1 << m)) for m in range(count)], 1),
            torch.stack([coarse(1 << m) - least for m in range(count)], 1),
            score,
            least,
            parts,
        )

    def _sample(
        self, scoring: Scoring, value: Value, count: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return values and standard errors from antithetic pairs of permutations, until the errors are small."""
        change = (value(2**count - 1) - value(0)).abs()
        samples: list[Tensor] = []
        for _ in scoring.track(range(self.max_permutations // 2), "permutations"):
            order = generator.permutation(count).tolist()
            pair = [marginals(value, 0, turn, count) for turn in (order, order[::-1])]
            samples.append((pair[0] + pair[1]) / 2)
            if len(samples) >= 8:
                error = torch.stack(samples).std(0) / math.sqrt(len(samples))
                if (error.amax(1) <= self.tolerance * change).all():
                    break
        drawn = torch.stack(samples)
        errors = (
            drawn.std(0) / math.sqrt(len(samples))
            if len(samples) > 1
            else torch.full_like(drawn[0], math.nan)
        )
        return drawn.mean(0), errors

    def _divide(
        self, scoring: Scoring, players: _Players, game: Game, generator: np.random.Generator
    ) -> dict[str, Tensor]:
        """Return the Owen values of the parts of every modality, shape (N, number of parts), by its name.

        Coalitions of the other modalities are enumerated; orders of the parts are enumerated where they are few, and
        drawn elsewhere. Each walk through the parts adds up, so that the values sum to that of the modality.
        """
        count = len(players.names)
        if count > MOST_EXACT:
            raise InputError(f"Parts are given for up to {MOST_EXACT} modalities, there are {count}.")
        found: dict[str, Tensor] = {}
        for m, name in enumerate(scoring.track(players.names, "parts")):
            own, others = players.members[m], [g for i, g in enumerate(players.members) if i != m]
            total = torch.zeros((len(scoring.values[0]), len(own)), dtype=scoring.values[0].dtype)
            for size in range(count):
                weight = 1 / (count * math.comb(count - 1, size))
                for chosen in combinations(others, size):
                    present = sum(1 << player for group in chosen for player in group)
                    walks = self._walks(game, present, own, generator)
                    total += weight * walks.to(total)
            found[name] = total.to(scoring.values[0])
        return found

    def _walks(self, game: Game, present: int, own: Sequence[int], generator: np.random.Generator) -> Tensor:
        local, n = game.among([[player] for player in own], present), max(self.max_permutations // 16, 1)
        if len(own) <= 4:
            return shapley_values(all_values(local, len(own)))
        orders = [generator.permutation(len(own)).tolist() for _ in range(n)]
        turns = [turn for order in orders for turn in (order, order[::-1])]
        return torch.stack([marginals(local, 0, turn, len(own)) for turn in turns]).mean(0)


@dataclass(frozen=True)
class _Modalities(Features):
    """Each channel of an image is one feature; vectors, and inputs in ``whole``, are one as they are."""

    whole: frozenset[str]

    def mask(self, x: Tensor, name: str) -> Tensor:
        count = 1 if name in self.whole or x.ndim == 2 else x.shape[1]
        return torch.arange(count, device=x.device).reshape(1, -1, *[1] * (x.ndim - 2))


class _Players(NamedTuple):
    """The players of the game: modalities, and the parts that they consist of.

    Args:
        names: of the modalities.
        masks: number of the part that each voxel belongs to, for each input, expandable to it.
        members: numbers of the parts of each modality.
    """

    names: tuple[str, ...]
    masks: list[Tensor]
    members: list[list[int]]

    @classmethod
    def split(cls, names: tuple[str, ...], masks: list[Tensor], finer: list[Tensor]) -> _Players:
        """Return modalities taken apart by the features of a finer partition."""
        members: list[list[int]] = [[] for _ in names]
        found, first = [], 0
        for mask, fine in zip(masks, finer, strict=True):
            pieces, owners = crossed(mask, fine)
            for i, owner in enumerate(owners.tolist()):
                members[owner].append(first + i)
            found.append(pieces + first)
            first += len(owners)
        return cls(names, found, members)

    def paint(self, parts: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return maps of every input with the value of its part on each voxel."""
        first = next(iter(parts.values()))
        values = first.new_zeros((len(first), sum(map(len, self.members))))
        for name, members in zip(self.names, self.members, strict=True):
            values[:, members] = parts[name]
        painted = {}
        for (name, x), mask in zip(inputs.items(), self.masks, strict=True):
            own = values[:, mask[0]]
            own = (
                own.squeeze(-1) if own.ndim > x.ndim else own
            )  # tokens, whose mask has the axis of the embedding
            painted[name] = like(own.expand(x.shape), x)
        return painted


class _Result(NamedTuple):
    """What a game gives, under one draw of one baseline or their mean."""

    values: Tensor
    errors: Tensor
    interactions: Tensor | None
    leave_one_out: Tensor
    single_gain: Tensor
    score: Tensor
    baseline_score: Tensor
    parts: dict[str, Tensor]

    @classmethod
    def mean(cls, results: Sequence[_Result]) -> _Result:
        """Return the mean over draws, with the standard error that their spread adds."""
        if len(results) == 1:
            return results[0]
        k = len(results)

        def mean(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(tensors)).mean(0)

        spread = torch.stack([r.values for r in results]).std(0) / math.sqrt(k)
        inner = mean(r.errors.square() for r in results) / k
        return cls(
            mean(r.values for r in results),
            (spread.square() + inner).sqrt(),
            None
            if results[0].interactions is None
            else mean(r.interactions for r in results if r.interactions is not None),
            mean(r.leave_one_out for r in results),
            mean(r.single_gain for r in results),
            results[0].score,
            mean(r.baseline_score for r in results),
            {name: mean(r.parts[name] for r in results) for name in results[0].parts},
        )


def _names(key: str, count: int, given: Mapping[str, Sequence[str]]) -> list[str]:
    names = list(given.get(key, ()))
    if len(names) == count:
        return names
    return [key] if count == 1 else [f"{key} {i}" for i in range(count)]


def _agreement(values: Sequence[Tensor]) -> Tensor:
    """Return the smallest Kendall's tau-b between values under two baselines, shape (N,)."""
    found = []
    for rows in zip(*(v.tolist() for v in values), strict=True):
        taus = [kendalltau(a, b).statistic if len(a) > 1 else math.nan for a, b in combinations(rows, 2)]
        found.append(min(taus) if not any(map(math.isnan, taus)) else math.nan)
    return torch.tensor(found)


def perceptual_score(
    predict: Callable[[Mapping[str, Tensor]], Tensor],
    cases: Sequence[Mapping[str, Tensor]],
    labels: Sequence[Any],
    *,
    metric: Callable[[Tensor, Sequence[Any]], float],
    n_permutations: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Return for each input by how much the metric falls, relative to itself, when it comes from other patients.

    Args:
        predict: returns the network's output for one case, shape (1, ...).
        cases: inputs by name, batches of one.
        labels: ground truth of each case.
        metric: of stacked outputs and labels; higher is better, such as accuracy.
        n_permutations: over how many shuffles the mean is taken.
        seed: seed of the shuffles.

    Reference: Gat et al., "Perceptual Score: What Data Modalities Does Your Model Perceive?", NeurIPS 2021
    (arXiv:2110.14375), definition 1 normalized by the metric.
    """
    if len(cases) < 2:
        raise InputError(
            f"perceptual_score exchanges inputs between cases and needs 2 or more, got {len(cases)}."
        )
    generator = np.random.default_rng(seed)

    def measure(exchanged: Sequence[Mapping[str, Tensor]]) -> float:
        with torch.no_grad():
            return float(metric(torch.cat([predict(case) for case in exchanged]), labels))

    whole = measure(cases)
    if whole == 0:
        raise InputError(
            "The metric is 0 on the cases as they are: there is nothing that an input could take away."
        )
    found = {}
    for name in cases[0]:
        shuffled = []
        for _ in range(n_permutations):
            order = generator.permutation(len(cases))
            mixed = [{**case, name: cases[other][name]} for case, other in zip(cases, order, strict=True)]
            shuffled.append(measure(mixed))
        found[name] = (whole - float(np.mean(shuffled))) / whole
    return found


def additive_projection(
    predict: Callable[[Mapping[str, Tensor]], Tensor], cases: Sequence[Mapping[str, Tensor]], name: str
) -> tuple[Tensor, Tensor]:
    """Return outputs, and the outputs of the additive model nearest to the network (EMAP), both shape (n, K).

    The additive model is a function of the input ``name`` plus a function of all others. If its accuracy is that of
    the network, interactions do not help.

    Args:
        predict: returns the network's output for one case, shape (1, K).
        cases: inputs by name, batches of one; n of them cost n² predictions.
        name: the input that is held against all others.

    Reference: Hessel & Lee, "Does my multimodal model learn cross-modal interactions?", EMNLP 2020
    (arXiv:2010.06572), section 4.
    """
    if name not in cases[0]:
        raise InputError(f"There is no input {name!r}; there are {sorted(cases[0])}.")
    with torch.no_grad():
        table = torch.stack(
            [torch.cat([predict({**rest, name: own[name]}) for rest in cases]) for own in cases]
        )  # (own, rest, K)
    rows, columns, mean = table.mean(1), table.mean(0), table.mean((0, 1))
    return table.diagonal(dim1=0, dim2=1).mT, rows + columns - mean
