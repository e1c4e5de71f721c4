"""Games: the score as a function of which parts of the inputs are there, and what each part is worth in it.

For scores that are sums of window scores every window is a game of its own, in which parts that do not meet it, or
equal their baseline there, are null players: coalitions that look alike in a window are computed once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, combinations

import torch
from torch import Tensor

from monai_xai.attributors.perturbation import see_features
from monai_xai.errors import AttributionError
from monai_xai.forward import Scoring
from monai_xai.perturbed import PerturbedScores
from monai_xai.terms import Tensors, Term
from monai_xai.trials import Trial


class Value(ABC):
    """The value of coalitions, whose members are the bits of a number."""

    @abstractmethod
    def __call__(self, bits: int) -> Tensor:
        """Return the value of one coalition, shape (N,)."""

    @abstractmethod
    def prepare(self, coalitions: Iterable[int]) -> None:
        """Find the values of coalitions that will be asked for: together, which is quicker than one by one."""

    def among(self, groups: Sequence[Sequence[int]], present: int = 0) -> Value:
        """Return the game among groups of players, each of which comes as a whole, with others present."""
        return _Among(self, [sum(1 << player for player in group) for group in groups], present)


@dataclass(frozen=True)
class _Among(Value):
    value: Value
    groups: Sequence[int]
    present: int

    def __call__(self, bits: int) -> Tensor:
        return self.value(self._outside(bits))

    def prepare(self, coalitions: Iterable[int]) -> None:
        self.value.prepare(map(self._outside, coalitions))

    def _outside(self, bits: int) -> int:
        return self.present | sum(group for i, group in enumerate(self.groups) if bits >> i & 1)


class Game(Value):
    """The score as a function of which parts of the inputs are there and which are at their baseline.

    Terms that a coalition leaves as they were for another are not computed again.

    Args:
        scoring: the score.
        baseline: what takes the place of missing parts, for each input.
        masks: number of the part that each voxel belongs to, for each input, expandable to it.
        count: how many parts there are.
        clean: the score of every term when all of them are there.
        scores: what asks the network, if several games share it.
    """

    def __init__(
        self,
        scoring: Scoring,
        baseline: Tensors,
        masks: Sequence[Tensor],
        count: int,
        clean: Sequence[Tensor],
        scores: PerturbedScores | None = None,
    ) -> None:
        self._scoring = scoring
        self._scores = scores or PerturbedScores(scoring.memory_gib)
        self._known = {2**count - 1: scoring.sum_scores(clean)}
        self.terms = [
            TermGame(
                term.near(inputs),
                inputs,
                start,
                [
                    see_features(mask[0], term.coordinates(x))
                    for mask, x in zip(masks, scoring.values, strict=True)
                ],
                count,
                self._scores,
            )
            for term, (inputs, start) in scoring.parts("baseline", scoring.values, baseline)
        ]
        for game, own in zip(self.terms, clean, strict=True):
            game.learn(2**count - 1, own)

    def __call__(self, bits: int) -> Tensor:
        if bits not in self._known:
            self._known[bits] = self._scoring.sum_scores([term(bits) for term in self.terms])
            if not torch.isfinite(self._known[bits]).all():
                raise AttributionError(
                    "The score is not finite with some inputs at their baseline: choose other baselines."
                )
        return self._known[bits]

    def prepare(self, coalitions: Iterable[int]) -> None:
        keep(self._scores(chain.from_iterable(self._trials(bits) for bits in coalitions)))

    def _trials(self, bits: int) -> Iterator[Trial[tuple[TermGame, int]]]:
        if bits not in self._known:
            for term in self.terms:
                yield from term.trials([bits])


class TermGame(Value):
    """The game of one term, in which parts that equal their baseline there, or are not there, are null players.

    Args:
        term: the term.
        inputs: what it sees of the inputs.
        start: what it sees of the baseline.
        parts: number of the part that each voxel belongs to, as it sees them; -1 for padding.
        count: how many parts there are.
        scores: what asks the network.

    Attributes:
        samples: the rows of the batch that it is about.
    """

    def __init__(
        self,
        term: Term,
        inputs: Tensors,
        start: Tensors,
        parts: Sequence[Tensor],
        count: int,
        scores: PerturbedScores,
    ) -> None:
        self.samples = term.samples
        self._term = term
        self._known: dict[int, Tensor] = {}
        self._inputs, self._start, self._parts, self._count = inputs, start, parts, count
        self._scores = scores
        self._asked: set[int] = set()

    @cached_property
    def players(self) -> tuple[int, ...]:
        """The parts that are not null players."""
        found: set[int] = set()
        for x, b, parts in zip(self._inputs, self._start, self._parts, strict=True):
            differs = (x != b).any(0)
            found |= set(torch.unique(parts.expand(differs.shape)[differs.to(parts.device)]).tolist())
        return tuple(sorted(part for part in found if part >= 0))

    @cached_property
    def _active(self) -> int:
        return sum(1 << part for part in self.players)

    def __call__(self, bits: int) -> Tensor:
        if bits & self._active not in self._known:
            self.prepare([bits])
        return self._known[bits & self._active]

    def prepare(self, coalitions: Iterable[int]) -> None:
        keep(self._scores(self.trials(coalitions)))

    def learn(self, bits: int, score: Tensor) -> None:
        """Take the score of a coalition that is known already."""
        self._asked.add(bits & self._active)
        self._known[bits & self._active] = score

    def trials(self, coalitions: Iterable[int]) -> Iterator[Trial[tuple[TermGame, int]]]:
        """Yield what the network has to be asked for coalitions: those that look alike here, once."""
        for key in (bits & self._active for bits in coalitions):
            if key not in self._asked:
                self._asked.add(key)
                yield Trial((self, key), self._term, self._mix(key))

    def _mix(self, bits: int) -> Tensors:
        """Return the part with all that is not in a coalition at its baseline."""
        table = torch.tensor([bits >> part & 1 for part in range(self._count)] + [0], dtype=torch.bool)
        return tuple(
            torch.where(table.to(parts.device)[parts].to(x.device), x, b)
            for x, b, parts in zip(self._inputs, self._start, self._parts, strict=True)
        )


def keep(found: Iterable[tuple[tuple[TermGame, int], Tensor]]) -> None:
    """Keep scores in the games that asked for them."""
    for (game, key), score in found:
        game.learn(key, score)


def all_values(value: Value, count: int, coalitions: Iterable[int] | None = None) -> Tensor:
    """Return the values of all coalitions of some players, shape (N, 2^count).

    Args:
        value: the game.
        count: how many players there are.
        coalitions: all of their numbers, with a progress bar, say.
    """
    value.prepare(range(2**count) if coalitions is None else coalitions)
    return torch.stack([value(bits) for bits in range(2**count)], 1)


def exact_values(term: TermGame, count: int) -> Tensor:
    """Return the Shapley values in the game of one term, from all of its coalitions, shape (n, count)."""
    players = list(term.players)
    if not players:
        return term(0).new_zeros((len(term(0)), count))
    found = shapley_values(all_values(term.among([[player] for player in players]), len(players)))
    values = found.new_zeros((len(found), count))
    values[:, players] = found
    return values


def marginals(value: Value, start: int, order: Sequence[int], count: int) -> Tensor:
    """Return what each player adds on its way into the coalition, shape (N, count)."""
    walk = list(accumulate(order, lambda present, player: present | 1 << player, initial=start))
    value.prepare(walk)
    before = value(start)
    gains = before.new_zeros((len(before), count))
    for player, present in zip(order, walk[1:], strict=True):
        after = value(present)
        gains[:, player] = after - before
        before = after
    return gains


def shapley_values(values: Tensor) -> Tensor:
    """Return the Shapley values of a game.

    Args:
        values: of all coalitions, shape (N, 2^M); bit m of a column's number says whether player m is in it.

    Shapes: result (N, M).

    Reference: Shapley, "A Value for n-Person Games", 1953.
    """
    count = values.shape[1].bit_length() - 1
    columns = torch.arange(values.shape[1], device=values.device)
    found = []
    for m in range(count):
        without = columns[(columns >> m & 1) == 0]
        weights = values.new_tensor(
            [1 / (count * math.comb(count - 1, int(column).bit_count())) for column in without]
        )
        found.append(((values[:, without | 1 << m] - values[:, without]) * weights).sum(1))
    return torch.stack(found, 1)


def shapley_interactions(values: Tensor) -> Tensor:
    """Return the Shapley interaction index of each pair of players, shape (N, M, M), 0 on the diagonal.

    Args:
        values: of all coalitions, shape (N, 2^M), see :func:`shapley_values`.

    Reference: Grabisch & Roubens, "An axiomatic approach to the concept of interaction among players in cooperative
    games", International Journal of Game Theory 1999, definition 1.
    """
    count = values.shape[1].bit_length() - 1
    columns = torch.arange(values.shape[1], device=values.device)
    found = values.new_zeros((len(values), count, count))
    for i, j in combinations(range(count), 2):
        a, b = 1 << i, 1 << j
        without = columns[(columns & (a | b)) == 0]
        sizes = [int(column).bit_count() for column in without]
        weights = values.new_tensor([1 / ((count - 1) * math.comb(count - 2, size)) for size in sizes])
        together = values[:, without | a | b] + values[:, without]
        apart = values[:, without | a] + values[:, without | b]
        found[:, i, j] = found[:, j, i] = ((together - apart) * weights).sum(1)
    return found
