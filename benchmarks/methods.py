"""Methods that Captum has as well, on networks on which its numbers are right, at the size of a window."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import captum.attr
import torch
from monai.networks.nets import DenseNet121, SegResNet, VNet
from torch import Tensor, nn

import monai_xai as xai
from benchmarks.measuring import seconds_in_turn
from benchmarks.results import Block, Table

SIDE = 64
ROUNDS = 5

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "SegResNet": (lambda: SegResNet(3, init_filters=8, in_channels=4, out_channels=2), 4),
    "VNet": (lambda: VNet(3, 1, 2, act=("relu", {"inplace": False})), 1),
    "DenseNet121": (lambda: DenseNet121(3, 1, 2, init_features=16, growth_rate=8), 1),
}
METHODS: dict[str, tuple[xai.Attributor, Callable[[nn.Module, Tensor], Tensor]]] = {
    "Saliency": (xai.Saliency(), lambda score, x: captum.attr.Saliency(score).attribute(x, abs=False)),
    "InputXGradient": (
        xai.InputXGradient(),
        lambda score, x: captum.attr.InputXGradient(score).attribute(x),
    ),
    "GuidedBackprop": (
        xai.GuidedBackprop(),
        lambda score, x: captum.attr.GuidedBackprop(score).attribute(x),
    ),
    "Deconvolution": (xai.Deconvolution(), lambda score, x: captum.attr.Deconvolution(score).attribute(x)),
    "DeepLift": (
        xai.DeepLift(baseline=xai.Constant(0.0)),
        lambda score, x: captum.attr.DeepLift(score).attribute(x, torch.zeros_like(x)),
    ),
}


class Score(nn.Module):
    """The mean logit of a class, over a box if there are voxels, as a module for Captum."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network(x)
        return output[:, 1] if output.ndim == 2 else output[:, 1, 16:48, 16:48, 16:48].mean((1, 2, 3))


def compare(network: str, method: str) -> tuple[float, float, float]:
    """Return medians of our seconds and Captum's, in turn, and how far the maps are apart, as a share of their norm."""
    build, channels = NETWORKS[network]
    torch.manual_seed(0)
    ours = build().eval()
    theirs = Score(build().eval())
    theirs.network.load_state_dict(ours.state_dict())
    x = torch.randn((1, channels, SIDE, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    is_class = network == "DenseNet121"
    target = xai.OutputScore(1) if is_class else xai.RegionScore(1, xai.Box((16,) * 3, (48,) * 3))
    attributor, by_captum = METHODS[method]
    explainer = xai.Explainer(target, attributor, progress=False, tolerated_gap=float("inf"))
    with torch.no_grad():
        prediction = ours(x)
    explanation = explainer(ours, x, prediction=prediction)
    map_ = by_captum(theirs, x.clone())
    assert isinstance(explanation, xai.Explanation)
    apart = float((explanation.attributions["image"] - map_).norm() / map_.norm())
    own, other = seconds_in_turn(
        [lambda: explainer(ours, x, prediction=prediction), lambda: by_captum(theirs, x.clone())], ROUNDS
    )
    return own, other, apart


def methods() -> Iterator[Block]:
    """The same map by us and by stock Captum, of one input of 64³: seconds (medians of five, in turn).

    Of networks on which Captum is right: where maps are apart, one of the two is wrong, and no time is compared. Ours
    includes what an explanation does besides: the check of the inputs, the state of the network kept and restored. The
    prediction, from which a region is frozen, is there already, as in an engine.
    """
    rows: list[tuple[str, str, float, float, float | None, float]] = []
    for network, method in itertools.product(NETWORKS, METHODS):
        if (network, method) == ("SegResNet", "DeepLift"):
            continue  # Captum refuses its shared ReLU
        ours, theirs, apart = compare(network, method)
        rows.append((network, method, ours, theirs, ours / theirs if apart < 1e-3 else None, apart))
    yield Table(["network", "method", "ours, s", "Captum, s", "ratio", "maps apart"], rows)
