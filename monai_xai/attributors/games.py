"""Games: the score as a function of which parts of the inputs are there, and what each part is worth in it.

For scores that are sums of window scores every window is a game of its own, in which parts that do not meet it, or
equal their baseline there, are null players: coalitions that look alike in a window are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from monai_xai.attributors.perturbation import see_features
from monai_xai.errors import AttributionError
from monai_xai.forward import Scoring, Tensors, Term

Value = Callable[[int], Tensor]
"""The value of a coalition, whose members are the bits of a number, shape (N,)."""


class Game:
    """The score as a function of which parts of the inputs are there and which are at their baseline.

    Terms that a coalition leaves as they were for another are not computed again.

    Args:
        scoring: the score.
        baseline: what takes the place of missing parts, for each input.
        masks: number of the part that each voxel belongs to, for each input, expandable to it.
        count: how many parts there are.
        score: the score when all of them are there.
    """

    def __init__(
        self, scoring: Scoring, baseline: Tensors, masks: Sequence[Tensor], count: int, score: Tensor
    ) -> None:
        self._scoring = scoring
        self._count = count
        self._known = {2**self._count - 1: score}
        self._terms = [
            TermGame(
                term,
                inputs,
                start,
                [
                    see_features(mask[0], term.coordinates(x))
                    for mask, x in zip(masks, scoring.values, strict=True)
                ],
            )
            for term, (inputs, start) in scoring.parts("baseline", scoring.values, baseline)
        ]

    def __call__(self, bits: int) -> Tensor:
        """Return the score when the parts whose bits are set are there, shape (N,)."""
        if bits not in self._known:
            table = torch.tensor([bits >> part & 1 for part in range(self._count)] + [0], dtype=torch.bool)
            scores = [term.score(bits, table) for term in self._terms]
            self._known[bits] = self._scoring.sum_scores(scores)
            if not torch.isfinite(self._known[bits]).all():
                raise AttributionError(
                    "The score is not finite with some inputs at their baseline: choose other baselines."
                )
        return self._known[bits]

    def of_groups(self, groups: Sequence[Sequence[int]]) -> Value:
        """Return the game among groups of parts."""
        members = [sum(1 << part for part in group) for group in groups]
        return lambda bits: self(sum(group for i, group in enumerate(members) if bits >> i & 1))

    @property
    def evaluations(self) -> int:
        """How many calls of a term's network were made."""
        return sum(len(term.known) for term in self._terms)


class TermGame:
    """The game of one term, in which parts that equal their baseline there, or are not there, are null players."""

    def __init__(self, term: Term, inputs: Tensors, start: Tensors, parts: Sequence[Tensor]) -> None:
        self._term, self._inputs, self._start, self._parts = term, inputs, start, parts
        self.known: dict[int, Tensor] = {}

    @cached_property
    def _active(self) -> int:
        found: set[int] = set()
        for x, b, parts in zip(self._inputs, self._start, self._parts, strict=True):
            differs = (x != b).any(0)
            found |= set(torch.unique(parts.expand(differs.shape)[differs.to(parts.device)]).tolist())
        return sum(1 << part for part in found if part >= 0)

    def score(self, bits: int, table: Tensor) -> Tensor:
        """Return the score of the term; ``table`` says for each part whether it is there (last: padding)."""
        key = bits & self._active
        if key not in self.known:
            mixed = tuple(
                torch.where(table.to(parts.device)[parts], x, b)
                for x, b, parts in zip(self._inputs, self._start, self._parts, strict=True)
            )
            self.known[key] = self._term(mixed)
        return self.known[key]


def marginals(value: Value, start: int, order: Iterable[int], count: int) -> Tensor:
    """Return what each player adds on its way into the coalition, shape (N, count)."""
    present, before = start, value(start)
    gains = before.new_zeros((len(before), count))
    for player in order:
        present |= 1 << player
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
