"""Class activation maps: Grad-CAM, Grad-CAM++ and HiResCAM of one layer.

For a target over a region they are Seg-Grad-CAM (Vinogradova et al. 2020). Through sliding windows a map is defined
per window, for the window's own part of the score, and blended as predictions are: ``sum_w a_w CAM_w / A``. The blended
map is not the map of an imagined network on the whole volume; that does not exist.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from monai_xai.attributors.base import Attribution, Attributor, refuse_repeated_calls
from monai_xai.errors import InputError, UnsupportedNetworkError
from monai_xai.forward import Scoring, Tensors, Term
from monai_xai.networks import choose_layer, find_layer


@dataclass(frozen=True)
class ClassActivationAttributor(Attributor):
    """A map from the activations of one layer and the gradient of the score there.

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
            score, cam = self._term_map(term, inputs, layer, place)
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

    def _term_map(self, term: Term, inputs: Tensors, layer: str, place: int) -> tuple[Tensor, Tensor]:
        """Return the score of one term and its map, shape (n, 1, *part)."""
        score, activation, gradient = activation_and_gradient(term, inputs, layer)
        image = inputs[place]
        if activation.ndim != image.ndim:
            raise UnsupportedNetworkError(
                f"{self.name} needs a layer with spatial activations (n, K, *spatial) as the image "
                f"{tuple(image.shape)} has, {layer!r} gives {tuple(activation.shape)}. Choose another by layer='...'."
            )
        cam = self.combine(activation, gradient).relu()
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[image.ndim - 2]
        return score, LayerAttribution.interpolate(cam, tuple(image.shape[2:]), interpolate_mode=mode)

    @abstractmethod
    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the map on the layer's grid, shape (n, 1, *grid), from tensors of shape (n, K, *grid)."""


@dataclass(frozen=True)
class GradCam(ClassActivationAttributor):
    """Activations weighted by the spatial mean of their gradient.

    Reference: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    ICCV 2017, equations 1 and 2 (arXiv:1610.02391); for regions: Vinogradova et al., AAAI 2020 (arXiv:2002.11434).
    """

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        weights = gradient.mean(_grid_axes(gradient), keepdim=True)
        return (weights * activation).sum(1, keepdim=True)


@dataclass(frozen=True)
class GradCamPlusPlus(ClassActivationAttributor):
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
class HiResCam(ClassActivationAttributor):
    """Activations times their gradients, voxel by voxel: does not blur what the gradient says by its mean.

    Reference: Draelos & Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural
    networks", 2020 (arXiv:2011.08891).
    """

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (activation * gradient).sum(1, keepdim=True)


def activation_and_gradient(term: Term, inputs: Tensors, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the score of a term, the activation of a layer in it, and the gradient of the score there.

    Raises:
        UnsupportedNetworkError: if the layer is not called once with one tensor, or the score does not depend on it.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or outputs:
            raise UnsupportedNetworkError(
                f"The layer {layer!r} must give one tensor and be called once; choose another by layer='...'."
            )
        outputs.append(output if output.requires_grad else output.requires_grad_())
        return outputs[0].clone()

    handle = find_layer(term.network, layer).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            score = term.function(*(x.clone() for x in inputs), *term.selection())
    finally:
        handle.remove()
    if not outputs or not score.requires_grad:
        raise UnsupportedNetworkError(f"The score does not depend on the layer {layer!r}; choose another.")
    (gradient,) = torch.autograd.grad(score.sum(), outputs, allow_unused=True)
    activation = outputs[0].detach()
    return score.detach(), activation, torch.zeros_like(activation) if gradient is None else gradient


def inputs_of_layer(term: Term, inputs: Tensors, layer: str) -> list[bool]:
    """Return for each input of a term whether a layer's activation depends on it."""
    activations: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
        activations.append(output)

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    handle = find_layer(term.network, layer).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            term.function(*(x.clone() for x in leaves), *term.selection())
    finally:
        handle.remove()
    if not activations or not isinstance(activations[0], Tensor) or not activations[0].requires_grad:
        return [False] * len(inputs)
    gradients = torch.autograd.grad(activations[0].sum(), leaves, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def _grid_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))
