"""What the tests look at: of every case its map, frozen question, body and region; and maps of controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor, nn

from monai_xai.baselines import Auto, BaselineLike, Blur, Mean
from monai_xai.errors import AttributionError, EmptyRegionError, InputError
from monai_xai.explainer import Explainer
from monai_xai.explanation import Explanation, rounding
from monai_xai.features import Blocks
from monai_xai.grounding.words import GroundingCase, GroundingSettings
from monai_xai.metrics.base import as_mask, as_one_map, foreground, real
from monai_xai.metrics.questions import FrozenTarget, ask, asked_alone, explain_again, try_again
from monai_xai.metrics.similarity import SimilarityKind, mean_similarity
from monai_xai.regions import Mask, Predicted
from monai_xai.targets import OutputScore
from monai_xai.tasks import name_inputs

Maps = Mapping[str, Tensor]
_WithBaseline = tuple[Explanation, float, float]
"""A map, the score at the baseline, and what that may be off by."""


@dataclass(eq=False)
class Opened:
    """One case, asked about and not explained yet.

    Args:
        case: what was handed in.
        inputs: by name, in call order.
        explainer: with what it selected from the clean prediction frozen.
        output: the clean prediction.
        grid: name of the first image, on whose grid body and region lie.
        body: where to look, shape (1, 1, *spatial).
        region: the marked finding, shape (1, 1, *spatial); None if there is none.
    """

    case: GroundingCase
    inputs: dict[str, Tensor]
    explainer: Explainer
    output: Tensor
    grid: str
    body: Tensor
    region: Tensor | None

    @property
    def id(self) -> str:
        return self.case.id

    def explained(self, network: nn.Module) -> _WithBaseline | str:
        """Return the map and the score at the baseline, or say why there is none."""
        try:
            explanation = explain_again(self.explainer, network, self.inputs)
            return explanation, *_baseline(self.explainer, network, self.inputs, explanation)
        except (EmptyRegionError, AttributionError) as reason:
            return str(reason)

    def with_map(self, explained: _WithBaseline) -> Evidence:
        """Return the evidence."""
        explanation, score, error = explained
        return Evidence(**vars(self), explanation=explanation, baseline_score=score, baseline_error=error)


@dataclass(eq=False)
class Evidence(Opened):
    """One case, explained.

    Args:
        explanation: the map that is judged.
        baseline_score: the score at the baseline.
        baseline_error: what that may be off by.
        per_case: what the tests found, by their id.
    """

    explanation: Explanation
    baseline_score: float
    baseline_error: float
    per_case: dict[str, float] = field(default_factory=dict)

    @property
    def frozen(self) -> FrozenTarget:
        """The frozen target."""
        assert isinstance(self.explainer.target, FrozenTarget)
        return self.explainer.target

    @property
    def is_unsigned(self) -> bool:
        """Whether the direction of the score says nothing: a regression may go up or down for a finding."""
        return isinstance(self.frozen.target, OutputScore)

    @property
    def score(self) -> float:
        return float(self.explanation.score[0])

    @property
    def maps(self) -> dict[str, Tensor]:
        """Maps by input name as they are judged: signed, for regressions their magnitude."""
        return self.judged(self.explanation)

    def judged(self, explanation: Explanation) -> dict[str, Tensor]:
        """Return the maps of an explanation as they are judged."""
        maps = signed_maps(explanation)
        return {name: values.abs() for name, values in maps.items()} if self.is_unsigned else maps

    def located(self, explanation: Explanation | None = None) -> Tensor:
        """Return the map of an explanation as :meth:`on_grid` does; None takes the one that is judged."""
        return self.on_grid(self.judged(explanation or self.explanation))

    def on_grid(self, maps: Maps) -> Tensor:
        """Return one map on the grid of the first image, the sum over channels and images, shape (1, 1, *spatial)."""
        shape = self.inputs[self.grid].shape[2:]
        parts = [as_one_map(m) for m in maps.values() if m.ndim > 2 and m.shape[2:] == shape]
        if not parts:
            raise InputError(f"{self.explanation.method} gives no map on the grid of {self.grid!r}.")
        return torch.stack(parts).sum(0).cpu()

    def spacing_of(self, name: str) -> tuple[float, ...]:
        """Return the size of a voxel of an image in millimeters; 1 where nothing tells."""
        image = self.inputs[name]
        if self.case.spacing is not None and name == self.grid:
            return self.case.spacing
        if isinstance(image, MetaTensor) and image.affine.shape[-1] == image.ndim - 1:
            return tuple(float(size) for size in image.affine[..., :-1, :-1].norm(dim=-2).reshape(-1))
        return (1.0,) * (image.ndim - 2)

    @property
    def prediction(self) -> Tensor | None:
        """The predicted mask of the explained channel, bool (*spatial); None for an output that is no mask."""
        channel = getattr(self.frozen.target, "channel", None)
        if channel is None or self.output.ndim < 3 or self.output.shape[2:] != self.body.shape[2:]:
            return None
        return Predicted().mask(self.output, None, channel)[0, 0].cpu()

    def imputer(self, given: BaselineLike | Literal["mean"]) -> BaselineLike:
        """Return what takes the place of what is taken away: the mean of the body where that was asked for."""
        if not isinstance(given, str):
            return given
        body = Mask(self.body)
        grid = self.body.shape[2:]
        return {
            name: Mean(body if x.ndim > 2 and x.shape[2:] == grid else None)
            for name, x in self.inputs.items()
        }

    def blocks(self, settings: GroundingSettings) -> Blocks:
        """Return what is taken away together."""
        return Blocks(settings.block or max(1, round(max(self.body.shape[2:]) / 16)))

    def until(self, settings: GroundingSettings) -> float:
        """Return which share of the image is taken away in the end."""
        return max(settings.until * float(self.body.double().mean()), 1.01 / self.body.numel())


def open_case(
    explainer: Explainer,
    network: nn.Module,
    case: GroundingCase,
    region: Tensor | None,
    within: Tensor | None,
) -> Opened | str:
    """Ask about a case and freeze the question, or say why it has no answer.

    Raises:
        InputError: if masks do not fit the image, naming the case.
    """
    inputs = name_inputs(case.inputs)
    grid = next((name for name, x in inputs.items() if x.ndim > 2), None)
    if grid is None:
        raise InputError(
            f"Case {case.id}: grounding judges maps of images, there is none among {list(inputs)}."
        )
    image = inputs[grid]
    if len(image) != 1:
        raise InputError(
            f"Case {case.id} must be a batch of one, got an image of shape {tuple(image.shape)}."
        )
    like = as_one_map(image).cpu()
    try:
        body = foreground(image).cpu() if within is None else as_mask(_batched(within, like), like, "within")
        mask = None if region is None else as_mask(_batched(region, like), like)
    except InputError as error:
        raise InputError(f"Case {case.id}: {error}") from error
    if within is None and not body.any():
        body = torch.ones_like(body)
    try:
        with ask(explainer, network, inputs, case.label) as asked:
            frozen = asked_alone(explainer, asked.target, progress=False, tolerated_gap=_tolerated(explainer))
            output = asked.task.prediction(asked.target)
    except (EmptyRegionError, AttributionError) as reason:
        return str(reason)
    return Opened(case, inputs, frozen, output, grid, body, mask)


def _tolerated(explainer: Explainer) -> float:
    """Gaps are what T1 tests: nothing is to be told about them, where they do not choose a baseline or precision."""
    chooses = isinstance(getattr(explainer.attributor, "baseline", None), Auto)
    return explainer.tolerated_gap if chooses or explainer.autocast is not None else math.inf


def _batched(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask with the axes of batch and channel, which a caller may leave out."""
    plain = torch.as_tensor(mask)
    for _ in range(max(like.ndim - plain.ndim, 0)):
        plain = plain[None]
    return plain.cpu()


def _baseline(
    frozen: Explainer, network: nn.Module, inputs: Mapping[str, Tensor], explanation: Explanation
) -> tuple[float, float]:
    """Return the score at the baseline, at a blur for methods without one, and how far off it may be."""
    if explanation.baseline_score is not None:
        floor = rounding(explanation.score, explanation.baseline_score)
        return float(explanation.baseline_score[0]), float(floor[0])
    with ask(frozen, network, inputs) as asked:
        scores = [asked.scoring.score(draw) for draw in asked.scoring.draw(Blur())]
    score = torch.stack(scores).mean(0)
    return float(score[0]), float(rounding(explanation.score, score.to(explanation.score))[0])


def plain_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask on the CPU, bool, without axes of one that the other tensor does not have."""
    plain = torch.as_tensor(mask).cpu()
    while plain.ndim > like.ndim and plain.shape[0] == 1:
        plain = plain[0]
    return plain > 0


# ---------------------------------------------------------------------------------------------- similarity


def signed_maps(explanation: Explanation) -> dict[str, Tensor]:
    """Return maps by input name as they are read, with what raises the score and what lowers it; rounding is none."""
    return {name: real(values) for name, values in explanation.beyond_rounding().items()}


def alike(a: Maps, b: Maps, kind: SimilarityKind = "pearson") -> float:
    """Return how alike two maps of one grid are, halved in every direction; NaN where that is undefined."""
    if {name: m.shape for name, m in a.items()} != {name: m.shape for name, m in b.items()}:
        return math.nan
    return float(mean_similarity(a, b, kind).values[0])


def between_patients(
    cohort: Sequence[Evidence], kind: SimilarityKind = "pearson", most: int = 10
) -> list[float]:
    """Return for each case the mean similarity of its map with those of up to so many others on its grid."""
    found = []
    for i, evidence in enumerate(cohort):
        others = [cohort[(i + step) % len(cohort)] for step in range(1, len(cohort))][:most]
        found.append(mean_of_known([alike(evidence.maps, other.maps, kind) for other in others]))
    return found


def mean_of_known(values: Sequence[float]) -> float:
    """Return the mean of what is known; NaN if nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def map_again(evidence: Evidence, network: nn.Module, inputs: Maps | None = None) -> Explanation | None:
    """Explain with another network, or at other inputs, what was explained; None where that has no answer."""
    found = try_again(evidence.explainer, network, dict(evidence.inputs if inputs is None else inputs))
    return found if isinstance(found, Explanation) else None


# ------------------------------------------------------------------------------------------------ controls


def shifted_maps(evidence: Evidence, count: int, seed: int) -> list[Maps]:
    """Return copies of the maps rolled around, by a quarter or more of an axis.

    Of many rolls those are taken that leave most of the map in the body: beating a map of the air would prove nothing.
    Images on other grids are rolled by the same share of theirs, and vectors by an entry or more.
    """
    generator = np.random.default_rng([seed, *evidence.id.encode()])
    shape = evidence.body.shape[2:]
    positive = evidence.located().clamp(min=0)[0, 0]
    axes = tuple(range(len(shape)))
    candidates = []
    for _ in range(8 * count):
        roll = tuple(int(generator.integers(0, n)) for n in shape)
        if max(min(r, n - r) / n for r, n in zip(roll, shape, strict=True)) < 0.25:
            continue
        inside = float(positive.roll(roll, axes)[evidence.body[0, 0]].sum())
        candidates.append((-inside, roll))
    candidates = sorted(candidates)[:count] or [(0.0, tuple(n // 2 for n in shape))]
    shares = [tuple(r / n for r, n in zip(roll, shape, strict=True)) for _, roll in candidates]
    return [{name: _rolled(values, share) for name, values in evidence.maps.items()} for share in shares]


def _rolled(values: Tensor, share: Sequence[float]) -> Tensor:
    """Return a map rolled by a share of each axis, by one place at least; on other axes by the share that is farthest.

    A vector has one axis of its own.
    """
    own = values.shape[2:] if values.ndim > 2 else values.shape[1:]
    farthest = max(share, key=lambda part: min(part, 1 - part))
    shares = share if len(own) == len(share) else [farthest] * len(own)
    steps = [round(part * n) for part, n in zip(shares, own, strict=True)]
    axis = max(range(len(own)), key=lambda i: (min(shares[i], 1 - shares[i]), own[i]))
    steps[axis] = min(max(steps[axis], 1), max(own[axis] - 1, 0))
    return values.roll(steps, tuple(range(values.ndim - len(own), values.ndim)))


def edges(evidence: Evidence) -> Maps:
    """Return the magnitude of the Sobel gradient of every image."""
    return _per_channel(evidence, lambda x: ndimage.generic_gradient_magnitude(x, ndimage.sobel))


def intensity(evidence: Evidence) -> Maps:
    """Return the magnitude of every image."""
    return _per_channel(evidence, np.abs)


def noise(evidence: Evidence, seed: int) -> Maps:
    """Return white noise: a random order of blocks."""
    generator = np.random.default_rng(seed)
    return _per_channel(evidence, lambda x: generator.random(x.shape))


def _per_channel(evidence: Evidence, function) -> Maps:  # type: ignore[no-untyped-def]
    found = {}
    for name, x in evidence.inputs.items():
        values = real(x).cpu()
        if x.ndim > 2:
            parts = [torch.from_numpy(np.asarray(function(channel.numpy()))) for channel in values[0]]
            values = torch.stack(parts)[None]
        else:
            values = torch.zeros_like(values)
        found[name] = values
    return found


def noised(evidence: Evidence, share: float, seed: int) -> dict[str, Tensor]:
    """Return the images as another acquisition might give them: with noise."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, x in evidence.inputs.items():
        if x.ndim > 2 and x.is_floating_point():
            sigma = share * x.std(tuple(range(2, x.ndim)), keepdim=True, correction=0)
            x = x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        found[name] = x
    return found
