"""Methods that ask what the score is with some features there and all others at their baseline."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_xai.attributors.activations import interpolated
from monai_xai.attributors.base import Attribution, Attributor, BaselineAttributor, average
from monai_xai.attributors.games import (
    Game,
    TermGame,
    all_values,
    exact_values,
    marginals,
    shapley_values,
)
from monai_xai.attributors.perturbation import paint_features
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.features import Blocks, FeaturesLike, as_features, crossed, feature_masks
from monai_xai.forward import Scoring, guard
from monai_xai.perturbed import CachedScore, PerturbedScores
from monai_xai.terms import Tensors

MOST_FEATURES = 14
"""Up to this many features, :class:`ShapleyValues` evaluates all coalitions."""


class Worth(NamedTuple):
    """What features are worth.

    Args:
        values: shape (N, number of features).
        facts: numbers worth keeping.
    """

    values: Tensor
    facts: dict[str, int | float | str]


@dataclass(frozen=True)
class CoalitionAttributor(BaselineAttributor):
    """A method that gives every feature a worth from the scores of coalitions, painted on its voxels.

    Args:
        features: ``Channels()``, ``Blocks(size)``, or integer masks; one tensor or one by input name.
        baseline: what takes the place of features that are not there.

    The values of one feature repeat on its voxels and must not be added up.
    """

    features: FeaturesLike = field(default_factory=Blocks)
    baseline: BaselineLike = field(default_factory=Blur)

    paints: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "features", as_features(self.features))

    def attribute(self, scoring: Scoring) -> Attribution:
        masks, count = feature_masks(as_features(self.features), scoring.inputs)
        clean = scoring.term_scores()
        return average(
            [self._play(part, start, masks, count, clean) for part, start in self.in_turn(scoring)]
        )

    def _play(
        self, scoring: Scoring, start: Tensors, masks: list[Tensor], count: int, clean: Sequence[Tensor]
    ) -> Attribution:
        scores = PerturbedScores(scoring.memory_gib)
        with guard(self.name, scoring.values):
            game = Game(scoring, start, masks, count, clean, scores)
            worth = self.solve(scoring, game, count)
        maps = scoring.named(paint_features(worth.values, masks, scoring.values))
        score = game(2**count - 1)
        change, total = score - game(0), worth.values.sum(1)
        facts: dict[str, int | float | str] = {
            "pieces": count,
            "passes": scores.evaluations / max(len(scoring.terms), 1),
            "residual": float((total - change).abs().max()),
            **worth.facts,
        }
        return Attribution(maps, score, game(0), facts)

    @abstractmethod
    def solve(self, scoring: Scoring, game: Game, count: int) -> Worth:
        """Return the worth of every feature."""


@dataclass(frozen=True)
class ShapleyValues(CoalitionAttributor):
    """What a feature adds to the score on average over all orders in which features come in: all coalitions.

    Reference: Shapley, "A Value for n-Person Games", 1953; values equal ``captum.attr.ShapleyValues``.
    """

    by_window: ClassVar[bool] = True

    def solve(self, scoring: Scoring, game: Game, count: int) -> Worth:
        if count > MOST_FEATURES:
            raise InputError(
                f"ShapleyValues needs 2^{count} coalitions for {count} features; it takes up to {MOST_FEATURES}. Use "
                "ShapleyValueSampling, or fewer features."
            )
        coalitions = scoring.track(range(2**count), self.name, 2**count)
        return Worth(shapley_values(all_values(game, count, coalitions)), {})


@dataclass(frozen=True)
class SampledCoalitions(CoalitionAttributor):
    """A method that draws coalitions.

    Args:
        n_samples: how many draws.
        seed: seed of the draws.
    """

    n_samples: int = 25
    seed: int = 0

    stochastic: ClassVar[bool] = True

    @property
    def ends_early(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples < 1:
            raise InputError(f"{type(self).__name__}(n_samples={self.n_samples}) needs at least one sample.")

    def _scores(self, scoring: Scoring, game: Game, rows: Iterable[np.ndarray], least: int) -> Tensor:
        """Return the scores of coalitions, shape (S, N), of as many as there is time for.

        Args:
            scoring: the score.
            game: of which the coalitions are.
            rows: which features are there, of each coalition.
            least: how many are needed in any case.
        """
        bits = [sum(1 << int(i) for i in np.flatnonzero(row)) for row in rows]
        asked = []

        def in_time() -> Iterator[int]:
            for coalition in scoring.clock.limit(scoring.track(bits, self.name), least):
                asked.append(coalition)
                yield coalition

        game.prepare(in_time())
        return torch.stack([game(coalition) for coalition in asked])


@dataclass(frozen=True)
class ShapleyValueSampling(SampledCoalitions):
    """What a feature adds on average over random orders, each walked forwards and backwards.

    Over sliding windows each window is a game of its own among the features that it sees: exact where these are few,
    drawn elsewhere, independently of the other windows.

    Args:
        n_samples: how many orders of each game at most.
        tolerance: drawing ends when the largest standard error, which is in ``facts``, is below this share of the
            change of the score; 0 draws all orders.
        coarse: larger features, of which only those are divided into ``features`` that together hold nine tenths of
            the sum of absolute values; the others stay one player each. ``facts`` say how many players there were, how
            many features there are, and the largest value that was not divided.

    Reference: Castro et al., "Polynomial calculation of the Shapley value based on sampling", 2009; antithetic pairs as
    in Mitchell et al., JMLR 2022 (arXiv:2104.12199).
    """

    tolerance: float = 0.0
    coarse: FeaturesLike | None = None

    by_window: ClassVar[bool] = True

    @property
    def spreads(self) -> bool:
        return self.coarse is None  # what is divided is decided from all windows

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "coarse", None if self.coarse is None else as_features(self.coarse))
        if not 0 <= self.tolerance < 1:
            raise InputError(f"ShapleyValueSampling(tolerance={self.tolerance}) must lie in [0, 1).")

    def _play(
        self, scoring: Scoring, start: Tensors, masks: list[Tensor], count: int, clean: Sequence[Tensor]
    ) -> Attribution:
        if self.coarse is None:
            return super()._play(scoring, start, masks, count, clean)
        coarse, n_coarse = feature_masks(as_features(self.coarse), scoring.inputs)
        begin, end = scoring.split(2)
        first = super()._play(begin, start, coarse, n_coarse, clean)
        worth = _worth_of(first, coarse, n_coarse)
        divided = _fewest_that_hold(worth, _DIVIDED)
        mixed, n_mixed = _divide(coarse, masks, divided)
        second = super()._play(end, start, mixed, n_mixed, clean)
        facts = {
            "passes": float(first.facts["passes"]) + float(second.facts["passes"]),
            "pieces_of_full_grid": count,
            "largest_not_divided": float(worth[~divided].max()) if not divided.all() else 0.0,
        }
        return replace(second, facts={**second.facts, **facts})

    def solve(self, scoring: Scoring, game: Game, count: int) -> Worth:
        change = game(2**count - 1) - game(0)
        allowed = torch.zeros_like(change)
        if self.tolerance:
            whole = scoring.crew.total(change, "the change of the score")
            allowed = self.tolerance * whole.abs() / math.sqrt(len(game.terms) / scoring.crew.share)
        values = allowed.new_zeros((len(allowed), count))
        variances = torch.zeros_like(values)
        terms = scoring.track(game.terms, self.name) if len(game.terms) > 1 else game.terms
        for number, (part, term) in enumerate(zip(scoring.split(len(game.terms)), terms, strict=True)):
            place = scoring.crew.place(number)
            samples = self._draw(part, term, count, place, allowed[term.samples])
            values[term.samples] += samples.mean(0).to(values)
            variances[term.samples] += _variance_of_mean(samples).to(values)
        return Worth(values, {"standard_error": float(variances.max().sqrt())})

    def _draw(self, scoring: Scoring, term: TermGame, count: int, number: int, allowed: Tensor) -> Tensor:
        """Return samples of the values in the game of one term, shape (S, n, count); equal ones if they are exact."""
        players = term.players
        if 2 ** len(players) <= max(self.n_samples * len(players), 1):
            return exact_values(term, count).expand(2, -1, -1)
        generator, samples = np.random.default_rng([self.seed, number]), []
        pairs = scoring.track_within(range(math.ceil(self.n_samples / 2)), self.name)
        for _ in scoring.clock.limit(pairs, least=2):
            order = generator.permutation(players).tolist()
            samples.append(
                torch.stack([marginals(term, 0, turn, count) for turn in (order, order[::-1])]).mean(0)
            )
            if self.tolerance and len(samples) >= _FEWEST_PAIRS:
                errors = _variance_of_mean(torch.stack(samples)).sqrt()
                if (errors <= allowed.to(errors)[:, None]).all():
                    break
        return torch.stack(samples)


_DIVIDED = 0.9
"""Share of the sum of absolute values whose coarse features are divided."""


def _worth_of(found: Attribution, masks: Sequence[Tensor], count: int) -> Tensor:
    """Return the largest absolute value of each feature over a batch, from painted maps, shape (count,)."""
    worth = torch.zeros(count)
    for values, mask in zip(found.maps.values(), masks, strict=True):
        painted = values.abs().amax(0).cpu()
        worth[mask[0].expand(painted.shape).cpu().flatten()] = painted.flatten().to(worth)
    return worth


def _fewest_that_hold(worth: Tensor, share: float) -> Tensor:
    """Return which features are the fewest that hold a share of the sum of their worth, bool."""
    order = worth.argsort(descending=True)
    before = worth[order].cumsum(0) - worth[order]
    return torch.zeros_like(worth, dtype=torch.bool).index_put((order,), before < share * worth.sum())


def _divide(coarse: Sequence[Tensor], fine: Sequence[Tensor], divided: Tensor) -> tuple[list[Tensor], int]:
    """Return masks in which some coarse features are divided into fine ones, and how many features there are."""
    mixed, count = [], 0
    for large, small in zip(coarse, fine, strict=True):
        pieces, owners = crossed(large, torch.where(divided.to(large.device)[large], small + 1, 0))
        mixed.append(pieces + count)
        count += len(owners)
    return mixed, count


_FEWEST_PAIRS = 8
"""Pairs of orders before their spread is believed."""


def _variance_of_mean(samples: Tensor) -> Tensor:
    """Return the variance of the mean of samples (S, ...); of a single one, NaN."""
    return samples.var(0) / len(samples) if len(samples) > 1 else torch.full_like(samples[0], math.nan)


def _least(n_samples: int, count: int) -> int:
    """Return how many coalitions a regression draws also where there is no time: it needs more than features."""
    return max(2 * count, min(8 * count, n_samples // 4))


@dataclass(frozen=True)
class KernelShap(SampledCoalitions):
    """Shapley values as the weighted regression of scores on coalitions, which add up exactly.

    Args:
        n_samples: how many coalitions, each with its complement.

    Reference: Lundberg & Lee, NeurIPS 2017 (arXiv:1705.07874), theorem 2; paired as in Covert & Lee, AISTATS 2021.
    """

    n_samples: int = 200

    by_window: ClassVar[bool] = True

    def solve(self, scoring: Scoring, game: Game, count: int) -> Worth:
        empty, full = game(0), game(2**count - 1)
        if count == 1:
            return Worth((full - empty)[:, None], {})
        members, scores = self._draw(scoring, game, count)
        # Eliminate the last player, so that the values add up to the change of the score.
        design = members[:, :-1] - members[:, -1:]
        goal = scores - empty - members[:, -1:] * (full - empty)
        solved = torch.linalg.lstsq(design, goal).solution.T
        last = (full - empty)[:, None] - solved.sum(1, keepdim=True)
        return Worth(torch.cat([solved, last], 1), {"samples": len(scores)})

    def _draw(self, scoring: Scoring, game: Game, count: int) -> tuple[Tensor, Tensor]:
        """Return coalitions, drawn in proportion to the kernel, and their scores."""
        generator = np.random.default_rng(self.seed)
        sizes = np.arange(1, count)
        odds = 1 / (sizes * (count - sizes))
        rows = []
        for size in generator.choice(sizes, math.ceil(self.n_samples / 2), p=odds / odds.sum()):
            row = np.zeros(count, dtype=bool)
            row[generator.choice(count, size, replace=False)] = True
            rows += [row, ~row]
        scores = self._scores(scoring, game, rows, least=_least(self.n_samples, count))
        return torch.from_numpy(np.stack(rows[: len(scores)])).to(scores), scores


@dataclass(frozen=True)
class Lime(SampledCoalitions):
    """A linear model of the score in the features, fitted around the input.

    Args:
        n_samples: how many random coalitions.
        kernel_width: how fast the weight of a coalition falls with the share of features that are away.
        ridge: penalty on the squares of the coefficients, relative to the number of samples; small, so that no effect
            is shrunk away.

    Reference: Ribeiro et al., "Why Should I Trust You?", KDD 2016 (arXiv:1602.04938), with ridge regression.
    """

    n_samples: int = 200
    kernel_width: float = 0.5
    ridge: float = 1e-4

    def solve(self, scoring: Scoring, game: Game, count: int) -> Worth:
        generator = np.random.default_rng(self.seed)
        rows = generator.random((self.n_samples, count)) < 0.5
        rows[0] = True
        scores = self._scores(scoring, game, rows, least=_least(self.n_samples, count))
        members = torch.from_numpy(rows[: len(scores)]).to(scores)
        weights = torch.exp(-((1 - members.mean(1)) ** 2) / self.kernel_width**2)[:, None]
        design = torch.cat([members, torch.ones_like(members[:, :1])], 1)
        penalty = self.ridge * len(scores) * torch.eye(count + 1).to(scores)
        penalty[-1, -1] = 0
        solved = torch.linalg.lstsq(
            design.T @ (weights * design) + penalty, design.T @ (weights * scores)
        ).solution
        fitted = design @ solved
        spread = (weights * (scores - scores.mean(0)) ** 2).sum()
        explained = (
            1 - float((weights * (scores - fitted) ** 2).sum() / spread) if float(spread) else math.nan
        )
        return Worth(solved[:-1].T, {"r_squared": explained, "samples": len(scores)})


@dataclass(frozen=True)
class Rise(BaselineAttributor):
    """The mean score of random soft masks that leave a voxel there, less the mean over all masks.

    Args:
        n_samples: how many masks.
        cells: how many cells a mask has along each axis, before it is smoothly scaled up.
        share: probability that a cell is there.
        baseline: what takes the place of what is masked; the paper takes 0.
        seed: seed of the masks.

    Vectors are masked entry by entry.

    Reference: Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018
    (arXiv:1806.07421), equation 6; the mean is taken off, so that 0 means that a voxel makes no difference.
    """

    n_samples: int = 500
    cells: int = 7
    share: float = 0.5
    baseline: BaselineLike = field(default_factory=Blur)
    seed: int = 0

    stochastic: ClassVar[bool] = True
    by_window: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples < 2 or self.cells < 2 or not 0 < self.share < 1:
            raise InputError(f"{self}: n_samples and cells must be at least 2, share lies between 0 and 1.")

    @property
    def ends_early(self) -> bool:
        return True

    def attribute(self, scoring: Scoring) -> Attribution:
        return average([self._mask(part, start) for part, start in self.in_turn(scoring)])

    def _mask(self, scoring: Scoring, start: Tensors) -> Attribution:
        generator, cached = np.random.default_rng(self.seed), CachedScore(scoring)
        sums = [torch.zeros_like(x) for x in scoring.values]
        masses = [torch.zeros_like(x[:1] if x.ndim == 2 else x[:1, :1]) for x in scoring.values]
        mean = torch.zeros(len(scoring.values[0])).to(scoring.values[0])

        def masked() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
            samples = scoring.track(range(self.n_samples), self.name)
            for _ in scoring.clock.limit(samples, least=_FEWEST_MASKS):
                masks = [self._draw(x, generator) for x in scoring.values]
                mixed = zip(scoring.values, start, masks, strict=True)
                yield masks, [b + m * (x - b) for x, b, m in mixed]

        score, taken = cached.pin(scoring.values), 0
        for masks, masked_score in cached.many(masked()):
            taken += 1
            mean += masked_score
            for total, mass, mask in zip(sums, masses, masks, strict=True):
                total += masked_score.reshape(-1, *(1,) * (total.ndim - 1)) * mask
                mass += mask
        maps = {
            name: total / mass - (mean / taken).reshape(-1, *(1,) * (total.ndim - 1))
            for name, total, mass in zip(scoring.inputs, sums, masses, strict=True)
        }
        return Attribution(maps, score, cached(start), {"passes": cached.evaluations, "samples": taken})

    def _draw(self, x: Tensor, generator: np.random.Generator) -> Tensor:
        """Return a mask of one input, shape (1, 1, *spatial) or (1, F)."""
        if x.ndim == 2:
            return torch.from_numpy(generator.random((1, x.shape[1])) < self.share).to(x)
        spatial = x.shape[2:]
        cells = [min(self.cells, n) for n in spatial]
        grid = torch.from_numpy(generator.random((1, 1, *(n + 1 for n in cells))) < self.share).to(x)
        sizes = [math.ceil(n / k) for n, k in zip(spatial, cells, strict=True)]
        fine = interpolated(grid, tuple((k + 1) * s for k, s in zip(cells, sizes, strict=True)))
        for axis, (size, length) in enumerate(zip(sizes, spatial, strict=True), start=2):
            fine = fine.narrow(axis, int(generator.integers(size)), length)
        return fine


_FEWEST_MASKS = 32
"""Masks that are drawn also where there is no time: with fewer, voxels would not be in any."""


@dataclass(frozen=True)
class FeaturePermutation(Attributor):
    """How much the score falls when a feature is exchanged between the samples of a batch.

    Args:
        features: ``Channels()``, ``Blocks(size)``, or integer masks.
        seed: seed of the exchange, in which no sample keeps its own.

    Needs a batch of two or more.

    Reference: Breiman, "Random Forests", 2001, section 10; Fisher et al., JMLR 2019 (arXiv:1801.01489).
    """

    features: FeaturesLike = field(default_factory=Blocks)
    seed: int = 0

    paints: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", as_features(self.features))

    def attribute(self, scoring: Scoring) -> Attribution:
        count = len(scoring.values[0])
        if count < 2:
            raise InputError(
                "FeaturePermutation exchanges features between samples and needs a batch of two or more, got one "
                "sample. Use FeatureAblation, or a larger batch."
            )
        order = self._exchange(count)
        start = tuple(x[order] for x in scoring.values)
        masks, pieces = feature_masks(as_features(self.features), scoring.inputs)
        everyone = 2**pieces - 1
        game = Game(scoring, start, masks, pieces, scoring.term_scores())
        without = [everyone ^ (1 << i) for i in range(pieces)]
        game.prepare(scoring.track(without, self.name))
        score = game(everyone)
        effects = score[:, None] - torch.stack([game(bits) for bits in without], 1)
        maps = scoring.named(paint_features(effects, masks, scoring.values))
        return Attribution(maps, score, facts={"pieces": pieces, "passes": pieces})

    def _exchange(self, count: int) -> Sequence[int]:
        """Return a cyclic exchange in random order: no sample keeps its own."""
        around = np.random.default_rng(self.seed).permutation(count)
        order = np.empty(count, dtype=int)
        order[around] = np.roll(around, 1)
        found: list[int] = order.tolist()
        return found
