"""Faithfulness: does what the map says about an input agree with what the network does when it is disturbed?

All functions take the explainer, so that the question is the same (target, frozen region, sliding windows, several
inputs), and either its explanation or maps of any origin, such as those of a control. Over sliding windows only windows
that see a difference are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
from monai.inferers import Inferer
from scipy.signal import fftconvolve
from torch import Tensor, nn

from monai_xai.attributors import Attributor
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.calls import CallForm
from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.explanation import Explanation, rounding
from monai_xai.features import Blocks, FeaturesLike
from monai_xai.forward import Scoring
from monai_xai.metrics.base import Scores, as_mask, grown, moved, real, undefined_where
from monai_xai.metrics.perturbations import (
    Disturbed,
    Imputation,
    Perturbation,
    Players,
    RandomRemoval,
    chosen_at_random,
    usual_imputer,
)
from monai_xai.metrics.questions import Explained, OpenQuestion, ask, explanation_or_maps, maps_of
from monai_xai.perturbed import CachedScore
from monai_xai.tasks import Inputs, Label, TargetLike
from monai_xai.terms import Tensors

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BLOCKS, _BLUR = Blocks(8), Blur()
NO_CHANGE = "the score does not change when all of it is taken away"
SAME_EVERYWHERE = "the map is the same on all features, so that it gives no order"
NOT_FINITE = "the score is not finite on the way"
NO_FEATURE = "no feature may be taken away"
_NO_EFFECT = "the score did not change in any draw"
_NO_PREDICTION = "the map is zero wherever the input was disturbed"
_NO_VARIANCE = "the map, or the score, does not vary over the draws"


@dataclass(frozen=True, eq=False)
class Curve:
    """The score while features are taken away (deletion) or put back (insertion), in the order of a map.

    Args:
        fractions: share of the features, shape (S,).
        scores: 0 is the score of the input, 1 that with all features taken away, shape (N, S).
        area: mean height over the fractions, shape (N,); NaN where undefined.
        reasons: for each sample "" or why it is undefined.
        raw: the scores in units of the target, shape (N, S).
        clean: the score of the input, shape (N,).
        emptied: the score with all features taken away, shape (N,).
        evaluations: how often the network was evaluated on all (active) windows, on average.
    """

    fractions: Tensor
    scores: Tensor
    area: Tensor
    reasons: tuple[str, ...]
    raw: Tensor
    clean: Tensor
    emptied: Tensor
    evaluations: float

    @property
    def areas(self) -> Scores:
        """The areas with their reasons."""
        return Scores(self.area, self.reasons)


Order = Literal["most", "least"]


def deletion_curve(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    features: FeaturesLike = _BLOCKS,
    imputer: BaselineLike = _BLUR,
    steps: int = 25,
    until: float = 0.3,
    order: Order = "most",
    within: Tensor | None = None,
    keep: Tensor | None = None,
    score: TargetLike | None = None,
    seed: int = 0,
) -> Curve:
    """Take features away, the most relevant first, and look at what becomes of the score.

    The larger the area, the sooner the score went, and the better the map. Two imputers, and controls such as the map
    shifted against itself, belong to every claim: deletion leaves the distribution that the network was trained on.

    Args:
        explainer: asks the question.
        network: the network.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs, or maps alone (of a control); None explains.
        features: what is taken away together. They are ranked by the sum of the map where values may be added up, else
            by its mean; ties at random.
        imputer: what takes their place: a baseline, such as :class:`~monai_xai.Road`.
        steps: how often the score is computed, besides that of the input. The last time is with all features taken
            away, which the curve is normalized by.
        until: the curve ends with this share of the features.
        order: "most" or "least" relevant first.
        within: features outside of this mask (the body) stay, shape (N, 1, *spatial).
        keep: voxels of this mask stay, such as the predicted mask for a curve of the context alone.
        score: what is scored; None is the explainer's own target. ``DiceScore`` gives the Dice drop.
        seed: of the order of ties.

    Raises:
        InputError: if the map is not on the grid of the input, or steps and until make no curve.

    Reference: Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", TNNLS 2017
    (doi:10.1109/TNNLS.2016.2599820); Petsiuk et al., "RISE", BMVC 2018 (arXiv:1806.07421).
    """
    options = _CurveOptions(
        label, explanation, features, imputer, steps, until, order, within, keep, score, seed
    )
    return _curve(explainer, network, inputs, options, inserts=False)


class CurveOptions(TypedDict, total=False):
    """Keyword arguments of curves, as :func:`deletion_curve` describes them."""

    label: Label
    explanation: Explained | None
    features: FeaturesLike
    imputer: BaselineLike
    steps: int
    until: float
    order: Order
    within: Tensor | None
    keep: Tensor | None
    score: TargetLike | None
    seed: int


def insertion_curve(
    explainer: Explainer, network: nn.Module, inputs: Inputs, **options: Unpack[CurveOptions]
) -> Curve:
    """Start with all features taken away and put them back, the most relevant first.

    The curve starts at 1 and falls to 0 when all are back: the smaller the area, the better the map. Arguments as for
    :func:`deletion_curve`.
    """
    return _curve(explainer, network, inputs, _CurveOptions(**options), inserts=True)


def region_perturbation(
    explainer: Explainer, network: nn.Module, inputs: Inputs, **options: Unpack[CurveOptions]
) -> Scores:
    """Return the area over the perturbation curve in units of the score: ``mean_k (f(x) - f(x^k))``, k from 0.

    Arguments as for :func:`deletion_curve`.

    Reference: Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", TNNLS 2017,
    equation 12 (doi:10.1109/TNNLS.2016.2599820).
    """
    curve = _curve(explainer, network, inputs, _CurveOptions(**options), inserts=False)
    reasons = tuple("" if reason == NO_CHANGE else reason for reason in curve.reasons)
    values = (curve.raw[:, :1] - curve.raw).mean(1)
    undefined = torch.tensor([bool(reason) for reason in reasons], device=values.device)
    return Scores(values.masked_fill(undefined, torch.nan), reasons)


@dataclass(frozen=True, eq=False)
class _CurveOptions:
    label: Label = None
    explanation: Explained | None = None
    features: FeaturesLike = _BLOCKS
    imputer: BaselineLike = _BLUR
    steps: int = 25
    until: float = 0.3
    order: Order = "most"
    within: Tensor | None = None
    keep: Tensor | None = None
    score: TargetLike | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.until <= 1 or self.order not in ("most", "least"):
            raise InputError(
                f"A curve needs steps >= 2, 0 < until <= 1 and order 'most' or 'least', got steps={self.steps}, "
                f"until={self.until}, order={self.order!r}."
            )

    def fractions(self) -> Tensor:
        """Return the fractions on the curve: one fewer than evaluations where the last is beyond its end."""
        return torch.linspace(0, self.until, self.steps + (self.until == 1), dtype=torch.float64)


def _curve(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    options: _CurveOptions,
    *,
    inserts: bool,
) -> Curve:
    with ask(explainer, network, inputs, options.label) as asked:
        explained = explanation_or_maps(explainer, asked, network, inputs, options.explanation)
        scoring, own_score = asked.scoring, options.score is None
        if options.score is not None:
            with ask(explainer, network, inputs, options.label, score=options.score) as other:
                scoring = other.scoring
        options = replace(
            options, features=asked.placed(options.features), imputer=asked.placed(options.imputer)
        )
        players = Players.of(options.features, scoring, options.within, options.keep)
        values, present = _worth(explainer.attributor, maps_of(explained, scoring), players)
        ranks = _ranks(values if options.order == "most" else -values, present, options.seed)
        cached = CachedScore(scoring)
        clean = _known_score(explained, asked) if own_score else None
        clean = cached.pin(scoring.values) if clean is None else clean
        raw, emptied = _walk(cached, players, ranks, present, clean, options, inserts)
    return _normalize(options, raw, clean, emptied, values, present, cached.evaluations)


def _known_score(explained: Explained, asked: OpenQuestion) -> Tensor | None:
    """Return the clean score, if the explanation is of this very question."""
    if isinstance(explained, Explanation) and explained.target == str(asked.target):
        return explained.score.to(asked.scoring.values[0].device)
    return None


def _walk(
    cached: CachedScore,
    players: Players,
    ranks: Tensor,
    present: Tensor,
    clean: Tensor,
    options: _CurveOptions,
    inserts: bool,
) -> tuple[Tensor, Tensor]:
    """Return scores along the curve (N, S), and with all features taken away (N,)."""
    counts = present.sum(1, keepdim=True)
    fractions = options.fractions().tolist()
    taken = [ranks < (fraction * counts + 0.5).floor() for fraction in fractions]
    steps = [present & ~before if inserts else present & before for before in taken]
    known = [fraction == (1 if inserts else 0) for fraction in fractions]
    asked = [step for step, is_clean in zip(steps, known, strict=True) if not is_clean]
    # Without all features stands beside the step that equals it, so that it is found once.
    removals = [present, *asked] if inserts else [*asked, present]
    found = _mean_scores(cached, Imputation(options.imputer, cached.scoring), players, removals)
    emptied = found.pop(0 if inserts else -1)
    scores = iter(found)
    return torch.stack([clean.to(emptied) if is_clean else next(scores) for is_clean in known], 1), emptied


def _mean_scores(
    cached: CachedScore, impute: Imputation, players: Players, removals: Sequence[Tensor]
) -> list[Tensor]:
    """Return the scores without chosen features, each the mean over the draws of the imputer."""
    wholes = (
        (number, inputs) for number, chosen in enumerate(removals) for inputs in impute(players.where(chosen))
    )
    found: list[list[Tensor]] = [[] for _ in removals]
    for number, score in cached.many(wholes):
        found[number].append(real(score))
    return [torch.stack(draws).mean(0) for draws in found]


def _normalize(
    options: _CurveOptions,
    raw: Tensor,
    clean: Tensor,
    emptied: Tensor,
    values: Tensor,
    present: Tensor,
    evaluations: float,
) -> Curve:
    floor = rounding(clean, emptied.to(clean))
    clean = clean.to(emptied)
    scores = (clean[:, None] - raw) / (clean - emptied)[:, None]
    area = torch.trapezoid(scores, options.fractions().to(scores), dim=1) / options.until
    largest = values.masked_fill(~present, -torch.inf).amax(1)
    smallest = values.masked_fill(~present, torch.inf).amin(1)
    found = undefined_where(
        area,
        (~present.any(1), NO_FEATURE),
        (~torch.isfinite(raw).all(1) | ~torch.isfinite(emptied), NOT_FINITE),
        ((clean - emptied).abs() <= floor.to(clean), NO_CHANGE),
        (largest == smallest, SAME_EVERYWHERE),
    )
    scores = scores.masked_fill(found.values.isnan()[:, None], torch.nan)
    fractions = options.fractions().to(scores.device)
    return Curve(fractions, scores, found.values, found.reasons, raw, clean, emptied, evaluations)


def _worth(attributor: Attributor, maps: Tensors, players: Players) -> tuple[Tensor, Tensor]:
    """Return what a map says each feature is worth, and which features there are, both (N, K)."""
    sizes = players.sizes()
    values = players.sums(maps)
    values = values if attributor.summable else values / sizes.clamp(min=1).to(values)
    return values, sizes > 0


def _ranks(values: Tensor, present: Tensor, seed: int) -> Tensor:
    """Return the place of each feature, from 0 for the largest value; absent ones come last, ties at random."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randperm(values.shape[1], generator=generator).to(values.device)
    keys = torch.where(present, values, -torch.inf)[:, mixed]
    order = mixed[keys.argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


# ---------------------------------------------------------------------------------------------- infidelity


@dataclass(frozen=True, eq=False)
class Fidelity:
    """How far the effects that a map predicts are from those that the network shows, from one set of draws.

    Args:
        predicted: what the map predicts for each draw, ``I . a``, shape (N, D).
        observed: how much the score fell, ``f(x) - f(x - I)``, shape (N, D).
        evaluations: how often the network was evaluated on all (active) windows, on average.
    """

    predicted: Tensor
    observed: Tensor
    evaluations: float

    @property
    def infidelity(self) -> Scores:
        """``E[(I . a - (f(x) - f(x - I)))^2]``, in squared units of the score; 0 is best."""
        return self._defined((self.predicted - self.observed).square().mean(1))

    @property
    def normalized_infidelity(self) -> Scores:
        """The infidelity of the best multiple of the map, ``E[(b I . a - (f(x) - f(x - I)))^2]``."""
        products, squares = (self.predicted * self.observed).mean(1), self.predicted.square().mean(1)
        best = torch.where(squares > 0, products / squares, 0)
        return self._defined((best[:, None] * self.predicted - self.observed).square().mean(1))

    @property
    def r2(self) -> Scores:
        """Share of the effects that the best multiple of the map, none below 0, explains, in [0, 1]; 1 is best.

        ``E[(I . a)(Df)]^2 / (E[(I . a)^2] E[Df^2])``, and 0 where the map has the wrong sign.
        """
        products, squares = (self.predicted * self.observed).mean(1), self.predicted.square().mean(1)
        effects = self.observed.square().mean(1)
        values = products.clamp(min=0).square() / (squares * effects)
        return self._defined(values, (squares == 0, _NO_PREDICTION), (effects == 0, _NO_EFFECT))

    def _defined(self, values: Tensor, *causes: tuple[Tensor, str]) -> Scores:
        return undefined_where(values, (~torch.isfinite(self.observed).all(1), NOT_FINITE), *causes)


def fidelity(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    perturbation: Perturbation | None = None,
    n_draws: int = 50,
) -> Fidelity:
    """Compare what a map predicts for disturbed inputs with what the network does.

    What a map predicts depends on what its values are. For sensitivities (gradients) it is ``I . a``, with
    ``I = x - x'``. For contributions (methods whose values may be added up) it is the sum of the map over what was
    taken away, and for methods that paint the value of a feature on its voxels the sum of these values; both need a
    perturbation that takes features away.

    Args:
        explainer: asks the question.
        network: the network.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs, or maps that are to be read as those of the explainer's method.
        perturbation: what is done to the inputs; None takes blocks away at random, for the method's own baseline.
        n_draws: how many times.

    Raises:
        InputError: if contributions are to be judged by noise.

    Reference: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019 (arXiv:1901.09392),
    definition 2.1; equal to ``captum.metrics.infidelity`` on the same draws.
    """
    if n_draws < 1:
        raise InputError(f"fidelity(n_draws={n_draws}) needs at least one draw.")
    perturbation = perturbation or RandomRemoval(imputer=usual_imputer(explainer.attributor))
    with ask(explainer, network, inputs, label) as asked:
        scoring = asked.scoring
        maps = maps_of(
            explanation_or_maps(explainer, asked, network, inputs, explanation),
            scoring,
            paints=explainer.attributor.paints,
        )
        cached = CachedScore(scoring)
        clean = cached.pin(scoring.values)
        disturb = asked.placed(perturbation).prepare(scoring)

        def predictions() -> Iterator[tuple[Tensor, Tensors]]:
            for number in scoring.track(range(n_draws), "fidelity", n_draws):
                disturbed = disturb(number)
                yield _predict(explainer.attributor, maps, scoring, disturbed), disturbed.inputs

        predicted, observed = [], []
        for prediction, score in cached.many(predictions()):
            predicted.append(prediction)
            observed.append(real(clean) - real(score))
    return Fidelity(torch.stack(predicted, 1), torch.stack(observed, 1), cached.evaluations)


def _predict(attributor: Attributor, maps: Tensors, scoring: Scoring, disturbed: Disturbed) -> Tensor:
    """Return by how much a map says that the score falls, shape (N,)."""
    if not (attributor.summable or attributor.paints):
        changes = zip(maps, scoring.values, disturbed.inputs, strict=True)
        return sum((a * (x - y).to(a)).flatten(1).sum(1) for a, x, y in changes)  # type: ignore[return-value]
    if disturbed.players is None or disturbed.chosen is None:
        raise InputError(
            f"{attributor} gives contributions of parts of the input, which say nothing of noise: judge it with "
            "RandomRemoval(features, imputer), which takes parts away."
        )
    worth, _ = _worth(attributor, maps, disturbed.players)
    return torch.where(disturbed.chosen, worth, 0).sum(1)


class FidelityOptions(TypedDict, total=False):
    """Keyword arguments as :func:`fidelity` describes them."""

    label: Label
    explanation: Explained | None
    perturbation: Perturbation | None
    n_draws: int


def infidelity(
    explainer: Explainer, network: nn.Module, inputs: Inputs, **options: Unpack[FidelityOptions]
) -> Scores:
    """Return ``E[(I . a - (f(x) - f(x - I)))^2]``; arguments as for :func:`fidelity`."""
    return fidelity(explainer, network, inputs, **options).infidelity


def normalized_infidelity(
    explainer: Explainer, network: nn.Module, inputs: Inputs, **options: Unpack[FidelityOptions]
) -> Scores:
    """Return the infidelity of the best multiple of the map; arguments as for :func:`fidelity`."""
    return fidelity(explainer, network, inputs, **options).normalized_infidelity


def fidelity_r2(
    explainer: Explainer, network: nn.Module, inputs: Inputs, **options: Unpack[FidelityOptions]
) -> Scores:
    """Return the share of the effects that the map explains, see :attr:`Fidelity.r2`; as for :func:`fidelity`."""
    return fidelity(explainer, network, inputs, **options).r2


# --------------------------------------------------------------------------------------------- correlations


def sensitivity_n(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    features: FeaturesLike = _BLOCKS,
    imputer: BaselineLike | None = None,
    sizes: Sequence[int | float] = (0.05, 0.1, 0.2, 0.4, 0.8),
    n_draws: int = 50,
    within: Tensor | None = None,
    seed: int = 0,
) -> dict[int | float, Scores]:
    """Return, for each size, the correlation over random sets of features of map and effect, in [-1, 1].

    Pearson's correlation, over sets S of n features, of ``sum_S a`` and ``f(x) - f(x with S taken away)``.

    Args:
        explainer: asks the question.
        network: the network.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs, or maps alone.
        features: what is taken away together.
        imputer: what takes their place; None is the method's own baseline, or else a blur.
        sizes: how many features a set has (whole numbers), or which share of them.
        n_draws: how many sets of each size.
        within: features outside of this mask stay.
        seed: of the draws.

    Reference: Ancona et al., "Towards better understanding of gradient-based attribution methods for deep neural
    networks", ICLR 2018 (arXiv:1711.06104), definition 1.
    """
    if n_draws < 2:
        raise InputError(f"A correlation needs at least two draws, got n_draws={n_draws}.")
    imputer = usual_imputer(explainer.attributor) if imputer is None else imputer
    with ask(explainer, network, inputs, label) as asked:
        scoring = asked.scoring
        maps = maps_of(
            explanation_or_maps(explainer, asked, network, inputs, explanation),
            scoring,
            paints=explainer.attributor.paints,
        )
        players = Players.of(asked.placed(features), scoring, within)
        worth, present = _worth(explainer.attributor, maps, players)
        impute, cached = Imputation(asked.placed(imputer), scoring), CachedScore(scoring)
        clean = real(cached.pin(scoring.values))
        return {
            size: _correlate_sets(
                worth,
                present,
                lambda sets: [clean - score for score in _mean_scores(cached, impute, players, sets)],
                _set_size(size, present),
                range(number * n_draws, (number + 1) * n_draws),
                seed,
            )
            for number, size in enumerate(sizes)
        }


def faithfulness_correlation(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    features: FeaturesLike = _BLOCKS,
    imputer: BaselineLike | None = None,
    size: int | float = 0.2,
    n_draws: int = 100,
    within: Tensor | None = None,
    seed: int = 0,
) -> Scores:
    """Return the correlation of map and effect over random sets of features; arguments as for :func:`sensitivity_n`.

    Reference: Bhatt et al., "Evaluating and Aggregating Feature-based Model Explanations", IJCAI 2020
    (arXiv:2005.00631), equation 1; the players are groups of voxels.
    """
    return sensitivity_n(
        explainer,
        network,
        inputs,
        label=label,
        explanation=explanation,
        features=features,
        imputer=imputer,
        sizes=[size],
        n_draws=n_draws,
        within=within,
        seed=seed,
    )[size]


def _set_size(size: int | float, present: Tensor) -> Tensor:
    """Return how many features a set has, shape (N,)."""
    if not isinstance(size, int) and not 0 < size < 1:
        raise InputError(
            f"The size of a set must be a whole number of features or a share in (0, 1), got {size}."
        )
    counts = present.sum(1)
    return torch.full_like(counts, size) if isinstance(size, int) else (counts * size).round().clamp(min=1)


def _correlate_sets(
    worth: Tensor,
    present: Tensor,
    effects: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    size: Tensor,
    numbers: Sequence[int],
    seed: int,
) -> Scores:
    sets = [chosen_at_random(present, size, number, seed) for number in numbers]
    predicted = [torch.where(chosen, worth, 0).sum(1) for chosen in sets]
    observed = effects(sets)
    impossible = (size < 1) | (size >= present.sum(1))
    return correlation(
        torch.stack(predicted, 1),
        torch.stack(list(observed), 1),
        (impossible, "there is only one set of this size: fewer features must be taken than there are"),
    )


def correlation(a: Tensor, b: Tensor, *causes: tuple[Tensor, str]) -> Scores:
    """Return Pearson's correlation of each row, shape (N,); undefined where a row does not vary beyond rounding."""
    centered = [x - x.mean(1, keepdim=True) for x in (a, b)]
    norms = [x.norm(dim=1) for x in centered]
    floors = [32 * torch.finfo(x.dtype).eps * x.norm(dim=1) for x in (a, b)]
    values = (centered[0] * centered[1]).sum(1) / (norms[0] * norms[1])
    flat = (norms[0] <= floors[0]) | (norms[1] <= floors[1])
    finite = torch.isfinite(a).all(1) & torch.isfinite(b).all(1)
    return undefined_where(values.clamp(-1, 1), *causes, (~finite, NOT_FINITE), (flat, _NO_VARIANCE))


# ---------------------------------------------------------------------------------------------- completeness


def completeness(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explanation | None = None,
) -> Scores:
    """Return the completeness gap ``|sum(a) - (f(x) - f(b))| / |f(x) - f(b)|``; 0 is best.

    Args:
        explainer: asks the question.
        network: the network.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs; None explains.

    Reference: Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017 (arXiv:1703.01365).
    """
    if explanation is None:
        with ask(explainer, network, inputs, label) as asked:
            found = explanation_or_maps(explainer, asked, network, inputs, None)
            assert isinstance(found, Explanation)
            explanation = found
    if not isinstance(explanation, Explanation):
        raise InputError(
            "completeness needs an explanation with its delta, maps alone have no baseline score."
        )
    gap, baseline_score = explanation.gap, explanation.baseline_score
    if gap is None or baseline_score is None:
        nothing = torch.full_like(real(explanation.score), torch.nan)
        return Scores(nothing, (f"{explainer.attributor.name} does not promise to sum up",) * len(nothing))
    unmoved = (explanation.score - baseline_score).abs() <= rounding(explanation.score, baseline_score)
    return undefined_where(real(gap), (unmoved, "the score equals the baseline score: nothing to explain"))


# ------------------------------------------------------------------------- the model itself, without a map


@dataclass(frozen=True, eq=False)
class RegionUse:
    """What a network makes of a region, without any map.

    Args:
        drop: how much the score falls when the region is taken away, shape (N,).
        control_drops: the same for shifted copies of the region, shape (N, n_shifts); NaN where there is none.
        necessity: drop beyond the mean of the controls.
        sufficiency: share of the score that the region alone gives back: 0 as with nothing, 1 as with all of it.
        shifts: the shifts in voxels, for each sample, shape (n, number of spatial axes).
    """

    drop: Tensor
    control_drops: Tensor
    necessity: Scores
    sufficiency: Scores
    shifts: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _RegionQuestion:
    target: TargetLike | Mapping[str, TargetLike]
    inferer: Inferer | None
    call: CallForm = "arguments"
    embeddings: Mapping[str, str] = field(default_factory=dict)
    progress: bool = False
    memory_gib: float | None = None


def necessity_and_sufficiency(
    target: TargetLike,
    inferer: Inferer | None,
    network: nn.Module,
    inputs: Inputs,
    region: Tensor,
    *,
    label: Label = None,
    imputer: BaselineLike = _BLUR,
    n_shifts: int = 4,
    margin: int = 0,
    within: Tensor | None = None,
    call: CallForm = "arguments",
    seed: int = 0,
) -> RegionUse:
    """Take a region away, then the same volume elsewhere, then all but the region: does the network use it?

    ``necessity = [F(x) - F(x without R)] - mean_s [F(x) - F(x without R shifted by s)]`` and
    ``sufficiency = (F(only R) - F(nothing)) / (F(x) - F(nothing))``. No explainer takes part, so that a network that
    does not use a finding is told from a map that does not show it.

    Args:
        target: what is scored.
        inferer: how the network is applied.
        network: the network.
        inputs: as for an explainer.
        region: what is taken away (with the same voxels in all images of its grid), shape (N, 1, *spatial), bool.
        label: as for an explainer.
        imputer: what takes the place of what is taken away; several draws are averaged.
        n_shifts: how many shifted copies, which do not meet the region and lie to 95 % within ``within``.
        margin: voxels by which the region grows before it alone is kept.
        within: the body, shape (N, 1, *spatial); None: everywhere.
        call: how the network takes several inputs.
        seed: of the shifts.

    Raises:
        InputError: if the region has the grid of no image, or other values than 0 and 1.
    """
    question = _RegionQuestion(target, inferer, call)
    with ask(question, network, inputs, label) as asked:
        scoring = asked.scoring
        image = _image_of(scoring, region)
        mask = as_mask(region, image)
        body = torch.ones_like(mask) if within is None else as_mask(within, image, "mask to look within")
        impute, cached = Imputation(asked.placed(imputer), scoring), CachedScore(scoring)
        clean = real(cached.pin(scoring.values))

        def score_without(removed: Tensor) -> Tensor:
            draws = impute([_on_grid(removed, x) for x in scoring.values])
            return torch.stack([real(cached(draw)) for draw in draws]).mean(0)

        drop = clean - score_without(mask)
        shifts = tuple(
            admissible_shifts(m[0], b[0], n_shifts, seed=seed) for m, b in zip(mask, body, strict=True)
        )
        control_drops = []
        for number in range(n_shifts):
            shifted = torch.stack(
                [
                    _shifted(m, s[number] if number < len(s) else None)
                    for m, s in zip(mask, shifts, strict=True)
                ]
            )
            missing = torch.tensor([number >= len(s) for s in shifts], device=clean.device)
            control_drops.append((clean - score_without(shifted)).masked_fill(missing, torch.nan))
        alone = score_without(body & ~grown(mask, [margin] * (mask.ndim - 2)))
        nothing = score_without(body)
    controls = torch.stack(control_drops, 1) if control_drops else drop.new_full((len(drop), 0), torch.nan)
    empty = ~mask.flatten(1).any(1)
    necessity = undefined_where(
        drop - controls.nanmean(1),
        (empty, "the region is empty"),
        (controls.isnan().all(1), "no shifted copy of the region fits beside it: it fills the organ"),
    )
    change = clean - nothing
    sufficiency = undefined_where(
        (alone - nothing) / change,
        (empty, "the region is empty"),
        (change.abs() <= rounding(clean, nothing), NO_CHANGE),
    )
    return RegionUse(drop, controls, necessity, sufficiency, shifts)


def _image_of(scoring: Scoring, region: Tensor) -> Tensor:
    for x in scoring.values:
        if x.ndim == region.ndim > 2 and x.shape[2:] == region.shape[2:]:
            return x[:, :1]
    shapes = {name: tuple(x.shape) for name, x in scoring.inputs.items()}
    raise InputError(
        f"The region of shape {tuple(region.shape)} is on the grid of none of the images {shapes}."
    )


def _on_grid(removed: Tensor, x: Tensor) -> Tensor:
    """Return what is removed of an input: nothing of those on another grid."""
    if x.ndim > 2 and x.shape[2:] == removed.shape[2:]:
        return removed
    return torch.zeros((1,) * x.ndim, dtype=torch.bool, device=x.device)


def _shifted(mask: Tensor, shift: Tensor | None) -> Tensor:
    """Return the mask of one sample (1, *spatial), shifted; nothing if there is no shift."""
    if shift is None:
        return torch.zeros_like(mask)
    for axis, step in enumerate(shift.tolist(), start=1):
        mask = moved(mask, axis, step)
    return mask


def admissible_shifts(region: Tensor, within: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Return shifts by which a region stays in the image and to 95 % in the body, and does not meet itself.

    Args:
        region: shape (*spatial), bool.
        within: the body, likewise.
        count: how many at most, drawn at random.
        seed: of the draw.

    Shapes: result (n, number of spatial axes) in voxels, n at most ``count``.
    """
    r = region.cpu().numpy().astype(np.float64)
    if not r.any():
        return torch.zeros((0, r.ndim), dtype=torch.long)
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(r))
    piece = np.flip(r[box])
    inside = fftconvolve(within.cpu().numpy().astype(np.float64), piece, mode="valid").round()
    itself = fftconvolve(r, piece, mode="valid").round()
    places = np.argwhere((inside >= 0.95 * r.sum()) & (itself == 0)) - [side.start for side in box]
    chosen = np.random.default_rng(seed).permutation(len(places))[:count]
    return torch.from_numpy(places[chosen])
