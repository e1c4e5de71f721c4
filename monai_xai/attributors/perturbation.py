"""Methods that take pieces of the input away and look at what becomes of the score.

A perturbation changes only the terms that see it: the effect of a piece is the sum of its effects on those, so that
over sliding windows every other window costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import ClassVar, NamedTuple

import torch
from scipy.ndimage import find_objects
from torch import Tensor

from monai_xai.attributors.base import Attribution, BaselineAttributor, average
from monai_xai.baselines import Baseline, BaselineLike, Blur
from monai_xai.features import Channels, FeaturesLike, as_features, feature_masks
from monai_xai.forward import Scoring, guard
from monai_xai.perturbed import CachedScore, PerturbedScores
from monai_xai.terms import Tensors, Term, WholeTerm
from monai_xai.trials import Patched, Trial


class Piece(NamedTuple):
    """A piece of one input, as one term sees it.

    Args:
        number: which piece.
        source: which input it lies in.
        box: the box of one sample of the part that it lies in.
        mask: where it is in the box, expandable to it; None if it fills the box.
    """

    number: int
    source: int
    box: tuple[slice, ...]
    mask: Tensor | None = None


class Plan(ABC):
    """The pieces of the inputs that are taken away, one after the other."""

    count: int

    @abstractmethod
    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        """Return the pieces that a term sees and that differ from the baseline in it.

        Args:
            term: the term.
            differs: for each input where its part differs from the baseline, shape of one sample, in main memory.
        """


class PaintedPlan(Plan):
    """A plan whose effects make maps."""

    @abstractmethod
    def paint(self, effects: Tensor) -> Tensors:
        """Return maps of every input from the effects of the pieces, shape (N, count)."""


class PerturbationAttributor(BaselineAttributor):
    """A method that attributes to each piece how much the score falls when the baseline takes its place."""

    paints: ClassVar[bool] = True
    imputes: ClassVar[bool] = True

    @abstractmethod
    def plan(self, scoring: Scoring) -> PaintedPlan:
        """Return the pieces."""

    def attribute(self, scoring: Scoring) -> Attribution:
        plan = self.plan(scoring)
        return average([self._perturb(scoring, baseline, plan) for baseline in self.draws(scoring)])

    def _perturb(self, scoring: Scoring, baseline: Tensors, plan: PaintedPlan) -> Attribution:
        effects = self.effects(scoring, baseline)
        maps = dict(zip(scoring.inputs, plan.paint(effects.of(plan)), strict=True))
        return effects.attribution(maps, {"pieces": plan.count})

    def effects(self, scoring: Scoring, baseline: Tensors) -> Effects:
        """Return what tells the effects of pieces when a drawn baseline takes their place."""
        imputers = self.imputers(scoring)
        if any(imputer.conditional for imputer in imputers):
            return ImputedEffects(self.name, scoring, baseline, imputers)
        return Effects(self.name, scoring, baseline)


class Effects:
    """How much the score falls when pieces are replaced by a baseline.

    Args:
        name: of the method.
        scoring: the score.
        baseline: what takes the place of pieces, for each input.
    """

    def __init__(self, name: str, scoring: Scoring, baseline: Tensors) -> None:
        self._name, self._scoring, self._baseline = name, scoring, baseline
        self._scores = PerturbedScores(scoring.memory_gib)
        self._terms: list[Term] = []
        self._clean: list[Tensor] = []

    def of(self, plan: Plan) -> Tensor:
        """Return the effects of the pieces of a plan, shape (N, count)."""
        first = self._scoring.values[0]
        effects = torch.zeros((first.shape[0], plan.count), dtype=first.dtype, device=first.device)
        with guard(self._name, self._scoring.values):
            for (number, piece), score in self._scores(self._trials(plan)):
                if piece is None:
                    self._clean.append(score)
                else:
                    effects[self._terms[number].samples, piece] += (self._clean[number] - score).to(effects)
        return effects

    def _trials(self, plan: Plan) -> Iterator[Trial[tuple[int, int | None]]]:
        """Yield each term as it is, once, and without each of the pieces that matter to it."""
        parts = self._scoring.parts(self._name, self._scoring.values, self._baseline)
        for number, (term, (inputs, start)) in enumerate(parts):
            if number == len(self._terms):
                self._terms.append(term.near(inputs))
                yield Trial((number, None), self._terms[number], inputs)
            differs = [(x != b).any(0).cpu() for x, b in zip(inputs, start, strict=True)]
            for piece in self._scoring.track_within(plan.pieces(term, differs), "pieces"):
                yield Trial((number, piece.number), self._terms[number], _replace(inputs, start, piece))

    @property
    def score(self) -> Tensor:
        """The clean score, shape (N,), once effects were asked for."""
        return self._scoring.sum_scores(self._clean)

    @property
    def passes(self) -> float:
        """How often the terms were computed without pieces, on average over them."""
        return (self._scores.evaluations - len(self._clean)) / max(len(self._clean), 1)

    def attribution(self, maps: Mapping[str, Tensor], facts: Mapping[str, int | float | str]) -> Attribution:
        """Return maps with the scores and the cost of finding them."""
        return Attribution(
            maps, self.score, self._scoring.score(self._baseline), {**facts, "passes": self.passes}
        )


class ImputedEffects(Effects):
    """Effects of pieces in whose place a baseline puts what depends on the piece: each is imputed in the whole input.

    Args:
        name: of the method.
        scoring: the score.
        baseline: for each input, what is left where nothing is known.
        imputers: the baseline of each input.
    """

    def __init__(self, name: str, scoring: Scoring, baseline: Tensors, imputers: Sequence[Baseline]) -> None:
        super().__init__(name, scoring, baseline)
        self._imputers = imputers
        self._cached = CachedScore(scoring)

    def of(self, plan: Plan) -> Tensor:
        clean = self.score
        effects = clean.new_zeros((len(clean), plan.count))
        with guard(self._name, self._scoring.values):
            for piece, score in self._cached.many(self._without(plan)):
                effects[:, piece] = clean - score
        return effects

    @cached_property
    def score(self) -> Tensor:
        return self._cached.pin(self._scoring.values)

    @property
    def passes(self) -> float:
        return self._cached.evaluations

    def _without(self, plan: Plan) -> Iterator[tuple[int, Tensors]]:
        """Yield the whole inputs without each of the pieces."""
        values = self._scoring.values
        whole = WholeTerm(self._scoring.terms[0].function, ())
        everywhere = [torch.ones(x.shape[1:], dtype=torch.bool) for x in values]
        for piece in self._scoring.track(plan.pieces(whole, everywhere), self._name, plan.count):
            removed = torch.zeros_like(everywhere[piece.source])
            removed[piece.box] = True if piece.mask is None else piece.mask
            x, draw = values[piece.source], self._baseline[piece.source]
            imputed = self._imputers[piece.source].impute(x, removed[None].to(x.device), draw)
            yield piece.number, (*values[: piece.source], imputed, *values[piece.source + 1 :])


@dataclass(frozen=True)
class FeatureAblation(PerturbationAttributor):
    """How much the score falls when a feature is replaced by the baseline, painted on all voxels of the feature.

    Args:
        features: ``Channels()``, ``Blocks(size)``, or integer masks; one tensor or one by input name.
        baseline: what takes a feature's place.

    The values of one feature repeat on its voxels and must not be added up.

    Reference: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv:1311.2901);
    values equal ``captum.attr.FeatureAblation``.
    """

    features: FeaturesLike = field(default_factory=Channels)
    baseline: BaselineLike = field(default_factory=Blur)

    by_window: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "features", as_features(self.features))

    def plan(self, scoring: Scoring) -> PaintedPlan:
        return _FeaturePlan(scoring.values, *feature_masks(as_features(self.features), scoring.inputs))


@dataclass(frozen=True, eq=False)
class _FeaturePlan(PaintedPlan):
    inputs: Tensors
    masks: list[Tensor]
    count: int

    def pieces(self, term: Term, differs: Sequence[Tensor]) -> Iterator[Piece]:
        for source, (mask, x, differ) in enumerate(zip(self.masks, self.inputs, differs, strict=True)):
            seen = see_features(mask[0], term.coordinates(x)).cpu()
            numbers = torch.unique(seen.expand(differ.shape)[differ])
            numbers = numbers[numbers >= 0]
            for number, box in zip(numbers.tolist(), _boxes_around(seen, numbers), strict=True):
                inside = seen[box] == number
                yield Piece(number, source, box, None if inside.all() else inside)

    def paint(self, effects: Tensor) -> Tensors:
        return paint_features(effects, self.masks, self.inputs)


def _boxes_around(labels: Tensor, numbers: Tensor) -> list[tuple[slice, ...]]:
    """Return the smallest box around each of some labels, ascending; whole axes where labels are to be expanded."""
    if not len(numbers):
        return []
    lowest = int(numbers[0])
    found = find_objects((labels - lowest + 1).numpy(), int(numbers[-1]) - lowest + 1)
    return [
        tuple(slice(None) if n == 1 else side for side, n in zip(found[number], labels.shape, strict=True))
        for number in (numbers - lowest).tolist()
    ]


def paint_features(values: Tensor, masks: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensors:
    """Return maps with the values of features, shape (N, count), on all of their voxels."""
    return tuple(values[:, mask[0]].expand_as(x).clone() for mask, x in zip(masks, inputs, strict=True))


def see_features(mask: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """Return what a term sees of feature numbers of one sample; -1 where it sees the fill value of padding.

    Shapes: mask (C or 1, *spatial or 1s); result likewise, expandable to the part.
    """
    seen = mask
    for axis, index in enumerate(axes):
        if mask.shape[axis] > 1:
            seen = seen.index_select(axis, index.clamp(min=0))
    inside = [index >= 0 for index in axes]
    return seen if all(side.all() for side in inside) else torch.where(outer(inside), seen, -1)


def outer(sides: Sequence[Tensor]) -> Tensor:
    """Return the box that lies within all of its sides, one boolean vector for each axis."""
    shaped = [
        side.reshape([-1 if i == axis else 1 for i in range(len(sides))]) for axis, side in enumerate(sides)
    ]
    return reduce(torch.logical_and, shaped)


def _replace(inputs: Tensors, baselines: Tensors, piece: Piece) -> Patched:
    """Return the inputs with the baseline in place of a piece."""
    x, b, place = inputs[piece.source], baselines[piece.source], (slice(None), *piece.box)
    patch = b[place] if piece.mask is None else torch.where(piece.mask.to(x.device), b[place], x[place])
    return Patched(inputs, piece.source, place, patch)
