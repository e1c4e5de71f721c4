"""What an attributor is: a frozen dataclass per method, its options as fields, one method."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from monai_xai.baselines import Auto, Baseline, BaselineLike, as_baseline
from monai_xai.errors import InputError, UnsupportedInfererError
from monai_xai.explanation import relative_gap
from monai_xai.forward import Scoring
from monai_xai.spelling import Spelled
from monai_xai.terms import Tensors


@dataclass(frozen=True, eq=False)
class Attribution:
    """What an attributor returns.

    Args:
        maps: attributions by input name.
        score: the score at the inputs, shape (N,).
        baseline_score: the score at the baseline, shape (N,), if the method has one.
        facts: numbers worth keeping.
    """

    maps: Mapping[str, Tensor]
    score: Tensor
    baseline_score: Tensor | None = None
    facts: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def delta(self) -> Tensor:
        """By how much the maps miss the change of the score, shape (N,)."""
        assert self.baseline_score is not None
        return sum_over(self.maps.values()) - (self.score - self.baseline_score)

    @property
    def largest_gap(self) -> float:
        """The same relative to the change of the score, the largest of the batch."""
        assert self.baseline_score is not None
        return float(relative_gap(self.delta, self.score, self.baseline_score).max())


@dataclass(frozen=True)
class Attributor(Spelled, ABC):
    """A method that attributes a score to the inputs.

    Facts, declared on the class, from which the method table is generated:

    - ``complete``: the maps sum to score minus baseline score; the gap is always reported as ``delta``.
    - ``summable``: values are contributions in units of the score and may be added up over voxels.
    - ``paints``: the value of a feature repeats on all of its voxels.
    - ``needs_layer``: looks at one layer, the field ``layer``.
    - ``stochastic``: draws random numbers, from the field ``seed``.
    - ``by_hooks``: needs each module to be called once for a score, so that sliding windows need a linear target.
    - ``linear``: the map of a sum of scores is the sum of the maps.
    - ``by_window``: the map is the sum of what each window gives by itself, so that processes may share the windows.
    - ``ends_early``: gives the best it has when ``Explainer(max_seconds=...)`` are over, with an error that it reports.
    - ``cause_of_gap``: what to do about a large delta.
    """

    complete: ClassVar[bool] = False
    summable: ClassVar[bool] = False
    paints: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    needs_layer: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    by_hooks: ClassVar[bool] = False
    by_window: ClassVar[bool] = False
    cause_of_gap: ClassVar[str] = ""

    @property
    def ends_early(self) -> bool:
        """Whether the method, as it is set, can end before it is done."""
        return False

    @property
    def spreads(self) -> bool:
        """Whether the method, as it is set, gives maps of some of the windows that add up to those of all."""
        return self.by_window

    @property
    def wanted_gap(self) -> float:
        """The relative completeness gap at which the method, as it is set, is done; infinite where none is."""
        return math.inf

    @property
    def name(self) -> str:
        """The method's name."""
        return type(self).__name__

    @abstractmethod
    def attribute(self, scoring: Scoring) -> Attribution:
        """Attribute a score to its inputs."""

    def remedies(self) -> Iterator[Attributor]:
        """Yield the method set otherwise, as it may add up where it does not now."""
        yield from ()

    def coarser(self, gap: float) -> Attributor:
        """Return the method for a network of few digits, content with this relative gap; others are as they are."""
        return self

    def briefly(self) -> Attributor:
        """Return the method with few steps, as it is tried from each of several baselines; itself if all are few."""
        return self


class BaselineAttributor(Attributor):
    """A method with a field ``baseline``, which is coerced: a number or tensor means ``Constant``.

    ``imputes`` tells whether it asks :meth:`~monai_xai.Baseline.impute` for each part that it takes away, and so can
    use a conditional baseline such as :class:`~monai_xai.Road`.
    """

    baseline: BaselineLike
    imputes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "baseline", as_baseline(self.baseline))

    def draws(self, scoring: Scoring) -> list[Tensors]:
        """Return the baselines, one tuple in call order for each draw."""
        assert isinstance(self.baseline, Baseline | Mapping)
        for part in self.imputers(scoring):
            if part.conditional and not self.imputes:
                raise InputError(
                    f"{part} depends on what is taken away, and {self.name} holds the input against one whole "
                    "baseline. Use it in FeatureAblation, Occlusion or deletion_curve, or take Blur(), say, here."
                )
        return scoring.draw(self.baseline)  # type: ignore[arg-type]

    def in_turn(self, scoring: Scoring) -> Iterator[tuple[Scoring, Tensors]]:
        """Iterate over the baselines, with the score that is to be held against each in its part of the time."""
        draws = self.draws(scoring)
        return zip(scoring.split(len(draws)), draws, strict=True)

    def imputers(self, scoring: Scoring) -> list[Baseline]:
        """Return the baseline of each input, in call order."""
        assert isinstance(self.baseline, Baseline | Mapping)
        given = (
            self.baseline
            if isinstance(self.baseline, Mapping)
            else dict.fromkeys(scoring.inputs, self.baseline)
        )
        return [part.for_input(i) for i, part in enumerate(given[name] for name in scoring.inputs)]  # type: ignore[union-attr]

    def remedies(self) -> Iterator[Attributor]:
        for candidate in Auto().candidates:
            if str(candidate) != str(self.baseline):
                yield replace(self, baseline=candidate)  # type: ignore[call-arg]


def refuse_repeated_calls(attributor: Attributor, scoring: Scoring) -> None:
    """Refuse a method by hooks where the network is called several times for one score.

    Raises:
        UnsupportedInfererError: saying which targets and inferers it works with.
    """
    if scoring.repeats_calls:
        raise UnsupportedInfererError(
            f"{attributor.name} needs each module to be called once, but this inferer calls the network several times "
            "for one score. Use a SlidingWindowInferer with a target linear in the output (RegionScore, or MarginScore "
            "with a region), explain without an inferer, or use IntegratedGradients()."
        )


def sum_over(maps: Iterable[Tensor]) -> Tensor:
    """Return the sum of maps over all inputs, for each sample, shape (N,)."""
    first, *others = (values.flatten(1).sum(1) for values in maps)
    return sum(others, first)


def average(parts: Sequence[Attribution]) -> Attribution:
    """Return the mean over several baselines; their passes are summed."""
    if len(parts) == 1:
        return parts[0]

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        return sum(tensors[1:], tensors[0]) / len(tensors)

    first, baselines = parts[0], [part.baseline_score for part in parts if part.baseline_score is not None]
    return replace(
        first,
        maps={name: mean([part.maps[name] for part in parts]) for name in first.maps},
        baseline_score=mean(baselines) if baselines else None,
        facts={
            **first.facts,
            "passes": sum(float(part.facts.get("passes", 1)) for part in parts),
            "baselines": len(parts),
        },
    )


def add_up(parts: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> dict[str, Any]:
    """Return the facts of a whole from those of parts with some of its terms each; what cannot be said is left out.

    Args:
        parts: facts.
        shares: how much of all terms each part had.
    """
    combined: dict[str, Callable[[list[float]], float]] = {
        "passes": lambda values: sum(v * share for v, share in zip(values, shares, strict=True)),
        "standard_error": lambda values: math.hypot(*values),
        "error_of_sum": sum,  # of samples that all parts share
        "residual": sum,
    }
    found: dict[str, Any] = {}
    for name in parts[0]:
        values = [part.get(name) for part in parts]
        if name in combined:
            if None not in values:
                found[name] = combined[name](values)  # type: ignore[arg-type]
        elif all(value == values[0] for value in values):
            found[name] = values[0]
    return found
