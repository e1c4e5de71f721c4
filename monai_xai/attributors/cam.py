"""Class activation maps: where one layer is active, weighted by what that means to the score.

For a target over a region they are Seg-Grad-CAM (Vinogradova et al. 2020). Through sliding windows a map is defined
per window, for the window's own part of the score, and blended as predictions are: ``sum_w a_w CAM_w / A``. The blended
map is not the map of an imagined network on the whole volume; that does not exist.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from monai_xai.attributors.activations import activation_and_gradient, hooked, inputs_of_layer, interpolated
from monai_xai.attributors.backprop import GuidedBackprop
from monai_xai.attributors.base import Attribution, Attributor, refuse_repeated_calls
from monai_xai.errors import InputError, UnsupportedNetworkError
from monai_xai.forward import Scoring
from monai_xai.networks import choose_layer, with_grid
from monai_xai.terms import Tensors, Term


@dataclass(frozen=True)
class ClassActivationAttributor(Attributor):
    """A map from the activations of one layer.

    Args:
        layer: dotted name of the layer in the network; None takes the last convolution at the coarsest resolution
            (the bottleneck of a U-shaped network). Of a network with several encoders, it names the branch.

    The map has one channel on the grid of the image that the layer sees (the first of several on one grid), is never
    negative, and has no unit.
    """

    layer: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str | None):
            raise InputError(f"{self.name}(layer=...) needs the dotted name of a layer, got {self.layer!r}.")

    linear: ClassVar[bool] = False
    needs_layer: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def attribute(self, scoring: Scoring) -> Attribution:
        refuse_repeated_calls(self, scoring)
        layer = self.layer or self._choose(scoring)
        name = self._image_of(scoring, layer)
        place = list(scoring.inputs).index(name)
        scores: list[Tensor] = []
        total = torch.zeros_like(scoring.padding.pad(scoring.inputs[name][:, :1]))
        for term, (inputs,) in scoring.parts(self.name, scoring.values):
            score, cam = self.term_map(term, inputs, layer, place)
            scores.append(score)
            term.add([total], [cam.to(total) * term.blending()])
        return Attribution(
            {name: scoring.padding.crop(total)}, scoring.sum_scores(scores), facts={"layer": layer}
        )

    def _choose(self, scoring: Scoring) -> str:
        term, (inputs,) = next(scoring.parts(self.name, scoring.values))
        return choose_layer(term.network, lambda: term(inputs))

    def _image_of(self, scoring: Scoring, layer: str) -> str:
        """Return the name of the image that a layer sees."""
        images = {name: tuple(x.shape[2:]) for name, x in scoring.inputs.items() if x.ndim > 2}
        if not images:
            raise InputError(f"{self.name} needs an image among the inputs {list(scoring.inputs)}.")
        if len(images) == 1:
            return next(iter(images))
        term, (inputs,) = next(scoring.parts(self.name, scoring.values))
        seen = [
            name
            for name, is_seen in zip(scoring.inputs, inputs_of_layer(term, inputs, layer), strict=True)
            if is_seen and name in images
        ]
        if len({images[name] for name in seen}) != 1:
            raise InputError(
                f"The layer {layer!r} sees {seen or 'none'} of the images {images}, so that its map has no grid: "
                f"choose a layer of one branch, {self.name}(layer='...')."
            )
        return seen[0]

    @abstractmethod
    def term_map(self, term: Term, inputs: Tensors, layer: str, place: int) -> tuple[Tensor, Tensor]:
        """Return the score of one term and its map, shape (n, 1, *part).

        Args:
            term: the term.
            inputs: what it sees.
            layer: name of the layer.
            place: which of the inputs is the image that the layer sees.
        """


@dataclass(frozen=True)
class GradientWeightedCam(ClassActivationAttributor):
    """A map from the activations of one layer and the gradient of the score there."""

    def term_map(self, term: Term, inputs: Tensors, layer: str, place: int) -> tuple[Tensor, Tensor]:
        score, activation, gradient = activation_and_gradient(term, inputs, layer)
        require_grid(self, activation, term, inputs, layer, place)
        return score, interpolated(self.combine(activation, gradient).relu(), _grid(inputs[place]))

    @abstractmethod
    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the map on the layer's grid, shape (n, 1, *grid), from tensors of shape (n, K, *grid)."""


@dataclass(frozen=True)
class GradCam(GradientWeightedCam):
    """Activations weighted by the spatial mean of their gradient.

    Reference: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    ICCV 2017, equations 1 and 2 (arXiv:1610.02391); for regions: Vinogradova et al., AAAI 2020 (arXiv:2002.11434).
    """

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        weights = gradient.mean(_grid_axes(gradient), keepdim=True)
        return (weights * activation).sum(1, keepdim=True)


@dataclass(frozen=True)
class GradCamPlusPlus(GradientWeightedCam):
    """Activations weighted by their positive gradients, each in proportion to its share in the score.

    Reference: Chattopadhay et al., "Grad-CAM++: Generalized Gradient-Based Visual Explanations for Deep Convolutional
    Networks", WACV 2018, equations 5, 11 and 19 with the exponential of the score as class score (arXiv:1710.11063).
    """

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        axes = _grid_axes(gradient)
        denominator = 2 * gradient.square() + activation.sum(axes, keepdim=True) * gradient**3
        alpha = torch.where(denominator != 0, gradient.square() / denominator, 0)
        weights = (alpha * gradient.relu()).sum(axes, keepdim=True)
        return (weights * activation).sum(1, keepdim=True)


@dataclass(frozen=True)
class HiResCam(GradientWeightedCam):
    """Activations times their gradients, voxel by voxel: does not blur what the gradient says by its mean.

    Reference: Draelos & Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural
    networks", 2020 (arXiv:2011.08891).
    """

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (activation * gradient).sum(1, keepdim=True)


@dataclass(frozen=True)
class XGradCam(GradientWeightedCam):
    """Activations weighted by their gradients, averaged in proportion to the activations.

    Reference: Fu et al., "Axiom-based Grad-CAM", BMVC 2020, equation 8 (arXiv:2008.02312).
    """

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        axes = _grid_axes(gradient)
        total = activation.sum(axes, keepdim=True)
        mean = (activation * gradient).sum(axes, keepdim=True) / torch.where(total == 0, 1, total)
        return (mean * activation).sum(1, keepdim=True)


@dataclass(frozen=True)
class LayerCam(GradientWeightedCam):
    """Activations times their positive gradients, voxel by voxel.

    Reference: Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP 2021,
    equations 6 and 7 (doi:10.1109/TIP.2021.3089943).
    """

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (activation * gradient.relu()).sum(1, keepdim=True)


@dataclass(frozen=True)
class EigenCam(GradientWeightedCam):
    """The first principal component of the activations: where the layer reacts most, whatever the score.

    Its sign, which is arbitrary, is that of the mean activation. Says nothing of the target: compare with another.

    Reference: Muhammad & Yeasin, "Eigen-CAM: Class Activation Map using Principal Components", IJCNN 2020
    (arXiv:2008.00299).
    """

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        flat = activation.flatten(2)
        _, _, rows = torch.linalg.svd(flat, full_matrices=False)
        component = rows[:, :1]
        sign = torch.sign((component * flat.mean(1, keepdim=True)).sum(2, keepdim=True))
        strength = torch.linalg.vector_norm(flat @ component.mT, dim=1, keepdim=True)
        return (component * sign * strength).reshape(len(flat), 1, *activation.shape[2:])


@dataclass(frozen=True)
class SegXResCam(GradientWeightedCam):
    """Activations weighted by gradients that are pooled nearby, not over the whole grid: between Grad-CAM and HiResCAM.

    Args:
        pool_size: edge of the pooling window in voxels of the layer.
        pool_mode: "mean" or "max".

    Reference: Hasany et al., "Seg-XRes-CAM: Explaining Spatially Local Regions in Image Segmentation", CVPR workshop
    2023.
    """

    pool_size: int = 2
    pool_mode: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool_size < 1 or self.pool_mode not in ("mean", "max"):
            raise InputError(f"{self}: pool_size must be at least 1, pool_mode 'mean' or 'max'.")

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        grid, dims = tuple(gradient.shape[2:]), gradient.ndim - 2
        pool = getattr(functional, f"{'avg' if self.pool_mode == 'mean' else 'max'}_pool{dims}d")
        pooled = pool(gradient, tuple(min(self.pool_size, n) for n in grid), ceil_mode=True)
        weights = interpolated(pooled, tuple(grid))
        return (activation * weights).sum(1, keepdim=True)


@dataclass(frozen=True)
class ScoreCam(ClassActivationAttributor):
    """Activations weighted by the score that the input keeps when each of them, scaled up, masks it. Needs no gradient.

    Takes one forward pass for each channel of the layer.

    Reference: Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks", CVPR
    workshop 2020, equations 3 to 6 (arXiv:1910.01279).
    """

    def term_map(self, term: Term, inputs: Tensors, layer: str, place: int) -> tuple[Tensor, Tensor]:
        score, activation, _ = activation_and_gradient(term, inputs, layer)
        image = inputs[place]
        require_grid(self, activation, term, inputs, layer, place)
        masks = interpolated(activation, _grid(image))
        low, high = (f(masks, _grid_axes(masks), keepdim=True) for f in (torch.amin, torch.amax))
        masks = (masks - low) / torch.where(high > low, high - low, 1)
        kept = [term(_replace_one(inputs, place, image * masks[:, k : k + 1])) for k in range(masks.shape[1])]
        gain = torch.stack(kept, 1) - term(_replace_one(inputs, place, torch.zeros_like(image)))[:, None]
        weights = gain.softmax(1).reshape(*gain.shape, *(1,) * (activation.ndim - 2))
        return score, interpolated((weights * activation).sum(1, keepdim=True).relu(), _grid(image))


@dataclass(frozen=True)
class AblationCam(ClassActivationAttributor):
    """Activations weighted by the share of the score that is lost without each of them. Needs no gradient.

    Takes one forward pass for each channel of the layer.

    Reference: Desai & Ramaswamy, "Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free
    Localization", WACV 2020, equations 4 and 5.
    """

    def term_map(self, term: Term, inputs: Tensors, layer: str, place: int) -> tuple[Tensor, Tensor]:
        score, activation, _ = activation_and_gradient(term, inputs, layer)
        require_grid(self, activation, term, inputs, layer, place)
        lost = []
        for k in range(activation.shape[1]):
            without = activation.clone()
            without[:, k] = 0
            with hooked(term.network, layer, lambda *_, replacement=without: replacement.clone()):
                lost.append(score - term(inputs))
        whole = torch.where(score == 0, 1, score)[:, None]
        weights = (torch.stack(lost, 1) / whole).reshape(*activation.shape[:2], *(1,) * (activation.ndim - 2))
        return score, interpolated((weights * activation).sum(1, keepdim=True).relu(), _grid(inputs[place]))


@dataclass(frozen=True)
class GuidedGradCam(Attributor):
    """Guided backpropagation times Grad-CAM.

    Args:
        layer: of Grad-CAM, see :class:`GradCam`.

    Reference: Selvaraju et al., ICCV 2017, section 3.2 (arXiv:1610.02391).
    """

    layer: str | None = None

    linear: ClassVar[bool] = False
    needs_layer: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True

    def attribute(self, scoring: Scoring) -> Attribution:
        coarse, fine = GradCam(self.layer).attribute(scoring), GuidedBackprop().attribute(scoring)
        maps = {name: cam * fine.maps[name] for name, cam in coarse.maps.items()}
        return Attribution(maps, coarse.score, facts=coarse.facts)


def _replace_one(inputs: Tensors, place: int, value: Tensor) -> Tensors:
    """Return the inputs with another one in one place."""
    return (*inputs[:place], value, *inputs[place + 1 :])


def require_grid(
    method: Attributor, activation: Tensor, term: Term, inputs: Tensors, layer: str, place: int
) -> None:
    """Refuse a layer whose activations have no grid.

    Raises:
        UnsupportedNetworkError: with the shapes, and the layers that have one.
    """
    image = inputs[place]
    if activation.ndim != image.ndim:
        raise UnsupportedNetworkError(
            f"{method.name} needs a layer with spatial activations (n, K, *spatial) as the image "
            f"{tuple(image.shape)} has, {layer!r} gives {tuple(activation.shape)}. Choose another by layer='...'. "
            f"{with_grid(term.network, lambda: term(inputs), image.ndim)}"
        )


def _grid(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[2:])


def _grid_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))
