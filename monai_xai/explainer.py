"""The explainer: *what* is explained, *how*, and *over what extent*."""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_xai.attributors import Attribution, Attributor
from monai_xai.attributors.base import add_up
from monai_xai.attributors.choosing import attribute_from_first
from monai_xai.baselines import Auto
from monai_xai.calls import CallForm, ReplayedInferer
from monai_xai.clock import Clock
from monai_xai.errors import AttributionError, InputError, XaiError
from monai_xai.explanation import Explanation
from monai_xai.features import Features
from monai_xai.forward import Scoring, guard
from monai_xai.ranks import Crew, agree, in_step, meet, numbers_of, world_size
from monai_xai.targets import Target
from monai_xai.tasks import Inputs, Label, TargetLike, Task, as_inferer, as_targets, like, open_task
from monai_xai.terms import count_not_finite


class CompletenessWarning(UserWarning):
    """The attributions of a method that promises to sum up miss the change of the score by a large share."""


class PrecisionWarning(UserWarning):
    """Lower precision was not enough for a case, which was explained in single precision instead."""


_LOWERED = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Explainer:
    """What is explained (target), how (attributor), over what extent (inferer). Pure configuration.

    Args:
        target: what is explained; a function of the output is coerced to ``FunctionTarget``. A mapping of names to
            targets explains each of them from one clean prediction.
        attributor: the method.
        inferer: how the network is applied to whole inputs; None calls it on them. Sliding windows are attributed
            exactly, see :mod:`monai_xai.windows`; any other inferer is differentiated or perturbed as a whole.
        channel_names: names of the channels (modalities) by input name.
        call: how the network takes several inputs: "arguments" by position, "mapping" as one dict by name, "sequence"
            as one tuple, or the names of those that go by keyword.
        embeddings: dotted name of the embedding, by input, for inputs of whole numbers (tokens, category codes; shape
            (N, L)) that more than one embedding sees; their attributions are summed over the embedding.
        progress: whether long work shows a progress bar.
        tolerated_gap: relative completeness gap above which a :class:`CompletenessWarning` is given. The first one of
            an explainer says which other setting of the method closes the gap on this network and case, as measured,
            where one attribution takes less than half a minute.
        on_gap: "raise" makes an :class:`~monai_xai.AttributionError` of it. No map is ever rescaled to add up.
        memory_gib: what a batch of windows or perturbed inputs may take. None: a quarter of what is free on a GPU; on a
            CPU, as many as it takes to fill what is quickest, 64 MiB with a graph and 32 MiB without. Results do not
            depend on it but for rounding. Gradients of a window that takes more go through the network alone.
        max_seconds: after which an explanation ends with the best it has, where the method can end early: path methods
            that are refined until they add up, and methods that draw samples. Its error is reported as ever (``delta``,
            ``standard_error``), and ``facts["ended_after"]`` says that it was cut. The time is that of one call, over
            all targets, and is overrun by what a method needs at least, such as three passes of each window, or the 101
            of a guided path.
        spread: whether the windows of a case are shared out among the processes that ``torchrun`` has started, all of
            which must explain the same cases and get the same explanation. For methods that find each window's part by
            itself (``by_window``), and targets linear in the output; others are computed in every process.
        autocast: "bfloat16" or "float16" lets the network compute in it, where ``torch.autocast`` sees fit; targets and
            everything else stay in single precision. Whether that is enough is for the completeness gap to say, so this
            is for methods that integrate until they add up, here to half of ``tolerated_gap`` in at most 31 steps. A
            case whose gap stays above ``tolerated_gap`` is explained again without, unless ``max_seconds`` are over; a
            :class:`PrecisionWarning` says so. ``facts["precision"]`` is what a map was computed in.

    Example:
        >>> import torch
        >>> from monai_xai import Constant, DeepLift, Explainer, OutputScore
        >>> network = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(network.weight)
        >>> explainer = Explainer(OutputScore(), DeepLift(baseline=Constant(0.0)))
        >>> explainer(network, torch.tensor([[2.0, 3.0]])).attributions["input"]
        tensor([[2., 3.]])
    """

    target: TargetLike | Mapping[str, TargetLike]
    attributor: Attributor
    inferer: Inferer | None = None
    channel_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    progress: bool = True
    tolerated_gap: float = 0.05
    call: CallForm = "arguments"
    embeddings: Mapping[str, str] = field(default_factory=dict)
    on_gap: Literal["warn", "raise"] = "warn"
    memory_gib: float | None = None
    max_seconds: float | None = None
    spread: bool = False
    autocast: Literal["bfloat16", "float16"] | None = None
    _measured: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.on_gap not in ("warn", "raise"):
            raise InputError(f"Explainer(on_gap={self.on_gap!r}): choose 'warn' or 'raise'.")
        if not isinstance(self.attributor, Attributor):
            raise InputError(
                f"Explainer(attributor=...) needs an attributor such as Saliency(), got {self.attributor!r}."
            )
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise InputError(f"Explainer(max_seconds={self.max_seconds}) must be positive.")
        if self.max_seconds is not None and not self.attributor.ends_early:
            raise InputError(
                f"Explainer(max_seconds={self.max_seconds}): {self.attributor} is whole or nothing and cannot end "
                "early. Take a path that is refined, such as IntegratedGradients(), or a method that draws samples, "
                "such as ShapleyValueSampling(); or make it cheaper: a smaller region, larger blocks."
            )
        if self.autocast is not None:
            self._require_gap(self.autocast)
        object.__setattr__(self, "inferer", as_inferer(self.inferer))
        object.__setattr__(self, "target", as_targets(self.target))

    def _require_gap(self, autocast: str) -> None:
        """Refuse lower precision where nothing would tell whether it is enough."""
        if autocast not in _LOWERED:
            raise InputError(f"Explainer(autocast={autocast!r}): choose {' or '.join(map(repr, _LOWERED))}.")
        if self.attributor.by_hooks or not self.attributor.complete:
            raise InputError(
                f"Explainer(autocast={autocast!r}): {self.attributor} has no completeness gap that tells whether "
                f"{autocast} is enough. Take a path method, such as IntegratedGradients(), or leave it in float32."
            )

    def __call__(
        self, network: nn.Module, inputs: Inputs, label: Label = None, prediction: Any = None
    ) -> Explanation | dict[str, Explanation]:
        """Explain a batch.

        Args:
            network: called with the inputs by position, in the order of the mapping. Not changed in any way.
            inputs: one tensor (named "image", or "input" if it has no spatial axes) or tensors by name, shape
                (N, C, *spatial) or (N, F).
            label: ground truth for regions that need one, shape (N, 1, *spatial) or (N, C, *spatial); or a mapping,
                from which a target takes what has the name of its ``head``.
            prediction: the network's clean output through the inferer, if it is there already; spares a forward pass.

        Returns:
            One explanation; a dict of them if the target is a mapping or stands for several (``Component(k=None)``).

        Raises:
            InputError: if inputs, label, target and output do not fit each other.
            UnsupportedNetworkError: if the method is not defined on this network.
            UnsupportedInfererError: if the inferer cannot be attributed exactly.
            AttributionError: if the method fails while it runs.
            OtherProcessError: if it fails in another process that shares the windows.
            OutOfStepError: if another process that should share them explains something else.
        """
        explanations = self.explain(network, inputs, label=label, prediction=prediction)
        return explanations[""] if set(explanations) == {""} else explanations

    def explain(
        self, network: nn.Module, inputs: Inputs, *, label: Label = None, prediction: Any = None
    ) -> dict[str, Explanation]:
        """Explain a batch as :meth:`__call__` does, and return explanations by target name ("" for a single one)."""
        with self._together(inputs):
            clock = Clock.of(self.max_seconds)
            with open_task(self, network, inputs, label, prediction) as task:
                self._require_single(task)
                targets = task.targets()
                return {
                    name: self._explain(task, target, part.anew())
                    for (name, target), part in zip(targets.items(), clock.split(len(targets)), strict=True)
                }

    def _together(self, inputs: Inputs) -> AbstractContextManager[None]:
        """Explain in step with the processes that share the windows, if any do."""
        if not self.spread or world_size() == 1:
            return nullcontext()
        given = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
        values = [x for x in given if isinstance(x, Tensor)]
        shapes = ", ".join(str(tuple(x.shape)) for x in values)
        asked = re.sub(r" at 0x[0-9a-f]+", "", f"{self.attributor} of {self.target}")
        return in_step(f"{asked} on inputs of shape {shapes}", [n for x in values for n in numbers_of(x)])

    def _explain(self, task: Task, target: Target, clock: Clock) -> Explanation:
        start = time.perf_counter()
        scoring = replace(task.scoring(target), clock=clock)
        attributor = task.placed(self.attributor, target)
        with guard(attributor.name, scoring.values):
            attribution = self._attribute_lowered(attributor, scoring, task)
        self._require_finite(attribution, target)
        explanation = Explanation(
            attributions={
                name: self._as_given(name, values, task) for name, values in attribution.maps.items()
            },
            score=attribution.score,
            baseline_score=attribution.baseline_score,
            delta=attribution.delta if self.attributor.complete else None,
            seconds=time.perf_counter() - start,
            method=str(self.attributor),
            target=str(target),
            seed=_seed(self.attributor),
            summable=self.attributor.summable,
            channels={
                name: tuple(self.channel_names[name]) for name in task.given if name in self.channel_names
            },
            facts={**task.facts(scoring), **attribution.facts, **self._cut(clock)},
            unit=target.unit,
            features=_features(attributor),
        )
        self._judge(explanation, scoring)
        return explanation

    def _require_single(self, task: Task) -> None:
        """Refuse what autocast does not lower, if that is asked for."""
        if self.autocast is None:
            return
        if isinstance(self.inferer, ReplayedInferer):
            raise InputError(
                f"Explainer(autocast={self.autocast!r}): this engine calls its inferer in a way of its own, which is "
                "replayed as it is. Leave autocast out."
            )
        for name, x in task.inputs.items():
            if x.is_floating_point() and x.dtype != torch.float32:
                raise InputError(
                    f"Explainer(autocast={self.autocast!r}) lowers float32, the input {name!r} is {x.dtype}: give "
                    f"{name!r}.float(), or leave autocast out."
                )

    def _attribute_lowered(self, attributor: Attributor, scoring: Scoring, task: Task) -> Attribution:
        """Attribute in lower precision, if that is asked for, and in single precision after all where it is too coarse.

        The target has selected before, in single precision.
        """
        if self.autocast is None:
            return self._attribute(attributor, scoring)
        task.network.autocast = _LOWERED[self.autocast]
        try:
            found = self._attribute(attributor.coarser(self.tolerated_gap / 2), scoring)
        finally:
            task.network.autocast = None
        precision: str = self.autocast
        if not scoring.clock.is_cut and self._is_too_coarse(found):
            found, precision = self._attribute(attributor, task.again(scoring)), "float32"
        return replace(found, facts={**found.facts, "precision": precision})

    def _is_too_coarse(self, attribution: Attribution) -> bool:
        """Tell, with a warning, whether a map of lower precision does not add up."""
        gap = attribution.largest_gap
        if gap <= self.tolerated_gap:
            return False
        warnings.warn(
            f"{self.attributor.name} in {self.autocast}: attributions miss the change of the score by {gap:.1%}; "
            "explained again in float32.",
            PrecisionWarning,
            stacklevel=5,
        )
        return True

    def _attribute(self, attributor: Attributor, scoring: Scoring) -> Attribution:
        baseline = getattr(attributor, "baseline", None)
        if not isinstance(baseline, Auto) or not attributor.complete:
            return self._run(attributor, scoring)
        wanted = min(self.tolerated_gap, attributor.wanted_gap)
        return attribute_from_first(
            attributor, wanted, scoring.clock, lambda method: self._run(method, scoring)
        )

    def _run(self, attributor: Attributor, scoring: Scoring) -> Attribution:
        """Return what a method gives, from this process or from all that share the work."""
        crew = Crew.among(len(scoring.terms))
        if not self.spread or crew.size == 1 or not attributor.spreads:
            return attributor.attribute(scoring)
        agree(f"windows {_digest(scoring)}")
        if len(scoring.terms) < crew.size:
            return attributor.attribute(scoring)
        found = attributor.attribute(replace(scoring, terms=crew.own(scoring.terms), crew=crew))
        met = meet("facts", (dict(found.facts), crew.share, scoring.clock.is_cut))
        facts, shares, cut = zip(*met, strict=True)
        scoring.clock.notes.is_cut = any(cut)
        return Attribution(
            {name: crew.total(values, f"map {name}") for name, values in found.maps.items()},
            crew.total(found.score, "score"),
            None if found.baseline_score is None else crew.total(found.baseline_score, "baseline score"),
            {**add_up(facts, shares), "processes": crew.size},
        )

    def _cut(self, clock: Clock) -> dict[str, float]:
        """Return after how many seconds a method was to end, if it would have gone on."""
        return {"ended_after": float(self.max_seconds or 0.0)} if clock.is_cut else {}

    def _as_given(self, name: str, values: Tensor, task: Task) -> Tensor:
        """Return a map like its input; the map of a layer, which has no place in the scan, as it is."""
        if name not in task.given:
            return values
        return like(self._per_token(values) if name in task.network.embedded else values, task.given[name])

    def _per_token(self, values: Tensor) -> Tensor:
        """Return one value for each token from those of its embedding, shape (N, L, D) to (N, L)."""
        return values.mean(-1) if self.attributor.paints else values.sum(-1)

    def _require_finite(self, attribution: Attribution, target: Target) -> None:
        """Refuse results with NaN or infinite values, whichever part of the work they come from."""
        if not torch.isfinite(attribution.score).all():
            raise AttributionError(
                f"The score of {target} is not finite, {attribution.score.tolist()}: the network's output holds NaN or "
                "infinite values there. Look at its weights (diverged training?) and at the intensities of the input."
            )
        baseline_score = attribution.baseline_score
        if baseline_score is not None and not torch.isfinite(baseline_score).all():
            raise AttributionError(
                f"The score of {target} is not finite at the baseline, {baseline_score.tolist()}: this network is not "
                f"defined on what {self.attributor} holds the input against. Choose another baseline, such as Blur()."
            )
        for name, values in attribution.maps.items():
            if bad := count_not_finite(values):
                raise AttributionError(
                    f"{self.attributor.name} gave {bad} NaN or infinite attributions for the input {name!r} of "
                    f"{values.numel()}: the network has no finite gradient there (a square root or division at 0?). "
                    "Use a perturbation method such as FeatureAblation, or mend the operation in the network."
                )

    def _judge(self, explanation: Explanation, scoring: Scoring) -> None:
        """Warn of attributions that do not add up."""
        gap = explanation.gap
        if gap is None or (gap <= self.tolerated_gap).all():
            return
        worst = int(gap.argmax())
        assert explanation.delta is not None and explanation.baseline_score is not None
        change = float(explanation.score[worst] - explanation.baseline_score[worst])
        cure = (
            f"allow more than max_seconds={self.max_seconds}"
            if scoring.clock.is_cut
            else self.attributor.cause_of_gap
        )
        message = (
            f"{self.attributor.name}: attributions of sample {worst} miss the change of the score by "
            f"{float(gap[worst]):.1%} (delta {float(explanation.delta[worst]):.4g}, score minus baseline score "
            f"{change:.4g}). Likely cure: {cure}.{self._remedy(explanation.seconds, scoring)}"
        )
        if self.on_gap == "raise":
            raise AttributionError(message)
        warnings.warn(message, CompletenessWarning, stacklevel=4)

    def _remedy(self, seconds: float, scoring: Scoring) -> str:
        """Say what closes the gap, as measured once."""
        if self.max_seconds is not None or self.spread:
            return ""
        if not self._measured and seconds < _QUICK:
            with guard(self.attributor.name, scoring.values):
                self._measured.append(self._measure_remedies(scoring))
        return "".join(self._measured)

    def _measure_remedies(self, scoring: Scoring) -> str:
        tried = []
        for other in self.attributor.remedies():
            try:
                gap = other.attribute(scoring).largest_gap
            except XaiError:
                continue  # a baseline that does not fit these inputs
            tried.append(f"{_difference(self.attributor, other)} leaves {gap:.1%}")
            if gap <= self.tolerated_gap:
                break
        return f" Measured on this network: {', '.join(tried)}." if tried else ""


_QUICK = 30.0
"""Seconds of an attribution up to which a warning is worth some more of them."""


def _difference(one: Attributor, other: Attributor) -> str:
    """Name the settings in which two of a kind differ."""
    pairs = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in fields(other))
    return ", ".join(f"{name}={new}" for name, old, new in pairs if str(old) != str(new))


def _digest(scoring: Scoring) -> str:
    """Return what tells the windows of a score from those of another: how many, and where they lie."""
    places = [(term.samples, getattr(term, "place", ())) for term in scoring.terms]
    return f"{len(places)}, {hashlib.sha256(repr(places).encode()).hexdigest()[:8]}"


def _features(attributor: Attributor) -> Features | None:
    features = getattr(attributor, "features", None)
    return features if isinstance(features, Features) else None


def _seed(attributor: Attributor) -> int | None:
    baseline = getattr(attributor, "baseline", None)
    baselines = baseline.values() if isinstance(baseline, Mapping) else [baseline]
    seeds = (getattr(owner, "seed", None) for owner in (attributor, *baselines))
    return next((int(seed) for seed in seeds if seed is not None), None)
