"""Robustness: does the map stay when the image changes as little as it does from one acquisition to the next?

Stability alone is no merit (a constant map is the most stable of all); it says how far a map may be read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from monai_xai.attributors.activations import interpolated
from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.forward import with_progress
from monai_xai.metrics.base import CONSTANT, NOT_FINITE, NOTHING, Scores, real, undefined_where
from monai_xai.metrics.faithfulness import correlation
from monai_xai.metrics.localization import relevance_mass
from monai_xai.metrics.perturbations import Perturbation, UniformNoise
from monai_xai.metrics.questions import (
    Explained,
    FrozenTarget,
    OpenQuestion,
    ask,
    asked_alone,
    explain_again,
    explanation_or_maps,
    named_maps,
)
from monai_xai.metrics.similarity import SimilarityKind, mean_similarity
from monai_xai.spelling import Spelled
from monai_xai.statistics import icc21
from monai_xai.tasks import Inputs, Label, like
from monai_xai.terms import Tensors

if TYPE_CHECKING:
    from typing_extensions import Unpack

# ------------------------------------------------------------------------------------- max and average sensitivity


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How far the map moves under small disturbances, relative to its norm; 0 is best.

    Args:
        maximum: over the draws.
        average: over the draws.
        changes: of each draw, ``|a(x + d) - a(x)| / |a(x)|``, shape (N, D).
    """

    maximum: Scores
    average: Scores
    changes: Tensor


def sensitivity(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    perturbation: Perturbation | None = None,
    n_draws: int = 10,
) -> Sensitivity:
    """Explain disturbed inputs, and measure how far the map moves: maximum and average from one run.

    The class or region stays the one of the input itself.

    Args:
        explainer: explains.
        network: the network.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs; None explains.
        perturbation: the disturbance; None is uniform noise of radius 0.02, which only fits inputs of about unit scale.
        n_draws: how many.

    Reference: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019 (arXiv:1901.09392),
    definition 2.2; the maximum equals ``captum.metrics.sensitivity_max`` on the same draws.
    """
    if n_draws < 1:
        raise InputError(f"sensitivity(n_draws={n_draws}) needs at least one draw.")
    perturbation = perturbation or UniformNoise()
    with ask(explainer, network, inputs, label) as asked:
        frozen = asked_alone(explainer, asked.target, progress=False)
        given = explanation_or_maps(explainer, asked, network, inputs, explanation)
        clean = _flat(named_maps(given, asked.names))
        disturb = asked.placed(perturbation).prepare(asked.scoring)
        changes = []
        for number in with_progress(range(n_draws), "sensitivity", shown=explainer.progress):
            found = explain_again(frozen, network, _as_inputs(asked, disturb(number).inputs))
            moved = _flat(named_maps(found, asked.names)) - clean
            changes.append(moved.norm(dim=1))
    norm = clean.norm(dim=1)
    relative = torch.stack(changes, 1) / norm[:, None]
    causes = (norm == 0, NOTHING), (~torch.isfinite(clean).all(1), NOT_FINITE)
    return Sensitivity(
        undefined_where(relative.amax(1), *causes), undefined_where(relative.mean(1), *causes), relative
    )


class SensitivityOptions(TypedDict, total=False):
    """Keyword arguments as :func:`sensitivity` describes them."""

    label: Label
    explanation: Explained | None
    perturbation: Perturbation | None
    n_draws: int


def max_sensitivity(
    explainer: Explainer, network: nn.Module, inputs: Inputs, **options: Unpack[SensitivityOptions]
) -> Scores:
    """Return the largest relative change of the map; arguments as for :func:`sensitivity`."""
    return sensitivity(explainer, network, inputs, **options).maximum


def average_sensitivity(
    explainer: Explainer, network: nn.Module, inputs: Inputs, **options: Unpack[SensitivityOptions]
) -> Scores:
    """Return the mean relative change of the map; arguments as for :func:`sensitivity`."""
    return sensitivity(explainer, network, inputs, **options).average


def _flat(maps: Mapping[str, Tensor]) -> Tensor:
    """Return the maps of all inputs side by side, shape (N, everything)."""
    return torch.cat([real(values).flatten(1) for values in maps.values()], 1)


def _as_inputs(asked: OpenQuestion, values: Tensors) -> dict[str, Tensor]:
    """Return changed values as inputs like those that were given.

    Raises:
        InputError: naming inputs of whole numbers, which cannot be changed a little.
    """
    if asked.scoring.embedded:
        raise InputError(
            f"Inputs of whole numbers cannot be changed a little: {sorted(asked.scoring.embedded)}. Judge robustness "
            "on a network that takes their embeddings."
        )
    given = asked.task.given
    return {name: like(x, given[name]) for name, x in zip(asked.names, values, strict=True)}


# ----------------------------------------------------------------------------------------- acquisition changes


@dataclass(frozen=True)
class Change(Spelled, ABC):
    """What another acquisition of the same patient does to an image. Vectors stay."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return the changed image, shape (N, C, *spatial) as given; the same change for every sample."""

    def undo(self, x: Tensor) -> Tensor:
        """Return a map of the changed image on the grid of the image itself."""
        return x

    @property
    def moves(self) -> bool:
        """Whether voxels lie elsewhere afterwards, and the region with them."""
        return False


@dataclass(frozen=True)
class MeasuredNoise(Change):
    """Gaussian noise as strong as what is there: the standard deviation is measured in each channel.

    It is the median absolute second difference over all axes, divided by 0.6745 and by the square root of 6; voxels
    where that is 0 (padding, a masked background) do not count.

    Args:
        scale: factor on the measured standard deviation.
        seed: seed of the noise.
    """

    scale: float = 1.0
    seed: int = 0

    def apply(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device)
        sigma = measured_noise(x).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        return x + self.scale * sigma.to(x) * noise


def measured_noise(x: Tensor) -> Tensor:
    """Return the standard deviation of the noise in each channel, shape (N, C); 0 where none is seen.

    Args:
        x: images, shape (N, C, *spatial).
    """
    differences = [x.diff(n=2, dim=axis).flatten(2) for axis in range(2, x.ndim) if x.shape[axis] > 2]
    if not differences:
        return torch.zeros_like(x[..., 0].reshape(*x.shape[:2], -1)[..., 0])
    values = torch.cat(differences, 2).abs()
    seen = values.masked_fill(values == 0, torch.nan)
    return seen.nanmedian(2).values.nan_to_num(0) / (0.6745 * math.sqrt(6))


@dataclass(frozen=True)
class VoxelShift(Change):
    """The image moves by whole voxels; the edge is replicated.

    Args:
        voxels: along every axis, or one number per axis.
    """

    voxels: int | Sequence[int] = 1

    @property
    def moves(self) -> bool:
        return True

    def apply(self, x: Tensor) -> Tensor:
        return self._move(x, 1)

    def undo(self, x: Tensor) -> Tensor:
        return self._move(x, -1)

    def _move(self, x: Tensor, sign: int) -> Tensor:
        steps = [self.voxels] * (x.ndim - 2) if isinstance(self.voxels, int) else list(self.voxels)
        if len(steps) != x.ndim - 2:
            raise InputError(f"{self} needs {x.ndim - 2} numbers for an image of shape {tuple(x.shape)}.")
        for axis, step in enumerate(steps, start=2):
            index = (torch.arange(x.shape[axis], device=x.device) - sign * step).clamp(0, x.shape[axis] - 1)
            x = x.index_select(axis, index)
        return x


@dataclass(frozen=True)
class BiasField(Change):
    """A smooth multiplicative field, as of a receive coil: intensities above the channel's minimum are scaled.

    Args:
        strength: largest relative change.
        seed: of the directions.
    """

    strength: float = 0.1
    seed: int = 0

    def apply(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        field = torch.zeros(x.shape[2:], dtype=x.dtype)
        for axis, length in enumerate(x.shape[2:]):
            place = torch.linspace(-1, 1, length, dtype=x.dtype)
            a, b = (torch.rand(2, generator=generator, dtype=torch.float64) * 2 - 1).tolist()
            profile = a * place + b * (place**2 - 1 / 3)
            field = field + profile.reshape([-1 if i == axis else 1 for i in range(field.ndim)])
        field = (field / field.abs().max().clamp(min=torch.finfo(x.dtype).tiny)).to(x.device)
        low = x.amin(tuple(range(2, x.ndim)), keepdim=True)
        return low + (x - low) * (1 + self.strength * field)


@dataclass(frozen=True)
class Resampling(Change):
    """The image on a coarser grid, and back: what a slightly thicker slice, or another reconstruction, leaves of it.

    Args:
        factor: spacing of the coarser grid, in voxels.
    """

    factor: float = 1.25

    def apply(self, x: Tensor) -> Tensor:
        if x.ndim not in (3, 4, 5):
            raise InputError(f"{self} knows images of one to three axes, got shape {tuple(x.shape)}.")
        coarse = tuple(max(round(length / self.factor), 1) for length in x.shape[2:])
        return interpolated(interpolated(x, coarse), tuple(x.shape[2:]))


CHANGES: Mapping[str, Change] = {
    "noise": MeasuredNoise(),
    "shift": VoxelShift(1),
    "bias field": BiasField(),
    "resampling": Resampling(),
}


@dataclass(frozen=True, eq=False)
class Stability:
    """How much a map changes from one acquisition to the next.

    Args:
        similarity: of the map to the one of the changed image, by change.
        score_change: score of the changed image minus score, by change, shape (N,).
        relevance_mass: share of the map inside the region: of the image itself first, then by change, shape (N, 1 + K);
            NaN without a region.
        names: of the changes.
    """

    similarity: Mapping[str, Scores]
    score_change: Mapping[str, Tensor]
    relevance_mass: Tensor
    names: tuple[str, ...]

    @property
    def icc(self) -> float:
        """ICC(2,1) of the relevance mass, patients against acquisitions; NaN for fewer than two patients.

        For more patients than fit one batch, put their ``relevance_mass`` together and call
        ``monai_xai.statistics.icc21``.
        """
        values = self.relevance_mass[~self.relevance_mass.isnan().any(1)]
        if len(values) < 2 or values.shape[1] < 2:
            return math.nan
        return float(icc21(values.cpu().numpy()))

    def worst(self) -> Scores:
        """Return the smallest similarity over the changes."""
        values = torch.stack([self.similarity[name].values for name in self.names], 1)
        reasons = zip(*(self.similarity[name].reasons for name in self.names), strict=True)
        return Scores(values.amin(1), tuple(next(filter(None, row), "") for row in reasons))


def stability(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    region: Tensor | None = None,
    changes: Mapping[str, Change] = CHANGES,
    kind: SimilarityKind = "spearman",
) -> Stability:
    """Change the images as another acquisition would, explain again, and compare the maps.

    The class or region that is explained stays; where the image moves, the region moves with it, and the map is moved
    back before it is compared.

    Args:
        explainer: explains.
        network: the network.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs; None explains.
        region: whose share of the map is followed, shape (N, 1, *spatial) on the grid of the first image; None: none.
        changes: by name.
        kind: of similarity, see :func:`~monai_xai.metrics.similarity`.

    Raises:
        InputError: if there is no image or no change.
    """
    if not changes:
        raise InputError("stability needs at least one change, such as MeasuredNoise().")
    with ask(explainer, network, inputs, label) as asked:
        image = next((name for name, x in asked.scoring.inputs.items() if x.ndim > 2), None)
        if image is None:
            raise InputError("Changes of the acquisition need an image, got vectors only.")
        given = explanation_or_maps(explainer, asked, network, inputs, explanation)
        clean = named_maps(given, asked.names)
        score = real(asked.scoring.score())
        shares, similar, moved = [_mass(clean[image], region)], {}, {}
        for name, change in with_progress(changes.items(), "stability", shown=explainer.progress):
            found, new_score = _explain_changed(explainer, asked, network, change)
            similar[name] = mean_similarity(clean, found, kind)
            moved[name] = new_score - score
            shares.append(_mass(found[image], region))
    return Stability(similar, moved, torch.stack(shares, 1), tuple(changes))


def _explain_changed(
    explainer: Explainer, asked: OpenQuestion, network: nn.Module, change: Change
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the maps of changed images, moved back, and their score."""
    values = tuple(change.apply(x) if x.ndim > 2 else x for x in asked.scoring.values)
    target = _moved_along(asked.target, change) if change.moves else asked.target
    frozen = asked_alone(explainer, target, progress=False)
    found = explain_again(frozen, network, _as_inputs(asked, values))
    maps = named_maps(found, asked.names)
    back = {name: change.undo(real(a)) if a.ndim > 2 else a for name, a in maps.items()}
    return back, real(found.score)


def _moved_along(target: FrozenTarget, change: Change) -> FrozenTarget:
    """Return the target with what it selected of the grid moved as the image is."""
    selection = tuple(
        change.apply(part.to(torch.float64)).to(part.dtype) if part.ndim > 2 else part
        for part in target.selection
    )
    return replace(target, selection=selection)


def _mass(maps: Tensor, region: Tensor | None) -> Tensor:
    if region is None:
        return torch.full((len(maps),), torch.nan, dtype=torch.float64)
    return relevance_mass(maps, region).values


def prediction_saliency_correlation(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    changes: Sequence[Change] | None = None,
    kind: SimilarityKind = "pearson",
) -> Scores:
    """Return the correlation, over changes of the image, of the change of the prediction and that of the map.

    Both are absolute: ``|f(x') - f(x)|`` and ``1 - similarity(a', a)``. A faithful map moves when the prediction does,
    and stays when it stays.

    Args:
        explainer: explains.
        network: the network.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs; None explains.
        changes: at least three; None is measured noise in ten strengths, from a quarter to eight times what is there.
        kind: of similarity.

    Reference: Zhang et al., "Revisiting the Trustworthiness of Saliency Methods in Radiology AI", Radiology: AI 2024
    (doi:10.1148/ryai.220221).
    """
    if changes is None:
        changes = [MeasuredNoise(float(2.0 ** (step / 2 - 2)), seed=step) for step in range(11)]
    if len(changes) < 3:
        raise InputError(f"A correlation over changes needs at least three of them, got {len(changes)}.")
    named = {f"{number} {change}": change for number, change in enumerate(changes)}
    found = stability(
        explainer, network, inputs, label=label, explanation=explanation, changes=named, kind=kind
    )
    maps = torch.stack([1 - found.similarity[name].values for name in found.names], 1)
    scores = torch.stack([found.score_change[name].abs() for name in found.names], 1).to(maps)
    return correlation(scores, maps, (maps.isnan().any(1), CONSTANT))
