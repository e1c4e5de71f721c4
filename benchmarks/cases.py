"""The pieces of work that are compared: made ready first, then run, each for a number on which two must agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import captum.attr
import torch
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.networks.nets import SegResNet, UNet
from torch import Tensor, nn

from monai_xai import Blur, Box, Explainer, Explanation, IntegratedGradients, Noise, RegionScore, Saliency
from monai_xai.windows import plan_windows

warnings.filterwarnings("ignore")


def segresnet() -> nn.Module:
    """Return a SegResNet with 8 initial filters, 4 channels in."""
    torch.manual_seed(0)
    return SegResNet(3, init_filters=8, in_channels=4, out_channels=2).eval()


def tiny_unet() -> nn.Module:
    """Return a U-Net small enough that autograd through 343 windows fits into memory."""
    torch.manual_seed(0)
    return UNet(3, 4, 2, (4, 8), (2,), norm="BATCH").eval()


def image(size: int) -> Tensor:
    """Return a volume of noise with 4 channels."""
    return torch.randn((1, 4, size, size, size), generator=torch.Generator().manual_seed(0))


def autograd(network: nn.Module, volume: Tensor, window: int) -> float:
    """Differentiate the mean logit over the volume through MONAI's own function."""
    x = volume.requires_grad_()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    output = sliding_window_inference(x, window, 1, network, overlap=0.5)
    (gradient,) = torch.autograd.grad(output[:, 1].mean(), x)
    return float(torch.linalg.vector_norm(gradient))


def ours(network: nn.Module, volume: Tensor, window: int, end: Sequence[int] | None = None) -> float:
    """Do the same by :class:`monai_xai.Saliency`; with ``end``, over the box from 0 to there."""
    region = Box((0, 0, 0), end or volume.shape[2:])
    explainer = Explainer(
        RegionScore(1, region), Saliency(), SlidingWindowInferer(window, overlap=0.5), progress=False
    )
    explanation = explainer(network, volume)
    assert isinstance(explanation, Explanation)
    return float(torch.linalg.vector_norm(explanation.attributions["image"]))


def stitched(network: nn.Module, volume: Tensor, window: int) -> float:
    """Do the same by the route for any differentiable target."""
    inferer = SlidingWindowInferer(window, overlap=0.5)
    explainer = Explainer(lambda o: o[:, 1].mean((1, 2, 3)), Saliency(), inferer, progress=False)
    explanation = explainer(network, volume)
    assert isinstance(explanation, Explanation)
    return float(torch.linalg.vector_norm(explanation.attributions["image"]))


def floor(network: nn.Module, volume: Tensor, window: int) -> float:
    """Do one forward and one backward of every window, and nothing else."""
    x = volume
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for place in plan_windows(SlidingWindowInferer(window, overlap=0.5), [x]).places:
        part = x[(..., *place)].clone().requires_grad_()
        torch.autograd.grad(network(part)[:, 1].mean(), part)
    return 0.0


PARTS = {
    (27, "128/64"): {1: (16, 16, 16), 4: (16, 40, 40), 8: (40, 40, 40), 18: (40, 80, 80)},
    (343, "128/32"): {
        1: (16, 16, 16), 8: (20, 20, 20), 27: (40, 40, 40), 64: (60, 60, 60), 125: (80, 80, 80), 216: (96, 96, 96),
    },
}  # fmt: skip
"""By the number of all windows, and the setting: how many of them a box from 0 to here meets."""

CASES: dict[str, Callable[[], Callable[[], float]]] = {
    "autograd 128/64": lambda: partial(autograd, segresnet(), image(128), 64),
    "ours 128/64": lambda: partial(ours, segresnet(), image(128), 64),
    "stitched 128/64": lambda: partial(stitched, segresnet(), image(128), 64),
    "floor 128/64": lambda: partial(floor, segresnet(), image(128), 64),
    "autograd 128/32": lambda: partial(autograd, segresnet(), image(128), 32),
    "ours 128/32": lambda: partial(ours, segresnet(), image(128), 32),
    "floor 128/32": lambda: partial(floor, segresnet(), image(128), 32),
    "autograd tiny 128/32": lambda: partial(autograd, tiny_unet(), image(128), 32),
    "ours tiny 128/32": lambda: partial(ours, tiny_unet(), image(128), 32),
    "floor tiny 128/32": lambda: partial(floor, tiny_unet(), image(128), 32),
    "ours tiny 96/48": lambda: partial(ours, tiny_unet(), image(96), 48),
    "ours tiny 192/48": lambda: partial(ours, tiny_unet(), image(192), 48),
} | {
    f"part {active} {setting}": lambda end=end, window=int(setting[-2:]): partial(
        ours, segresnet(), image(128), window, end=end
    )
    for (_, setting), parts in PARTS.items()
    for active, end in parts.items()
}


def warm_up() -> None:
    """Load what PyTorch loads on first use, so that it does not count as memory of the work."""
    ours(segresnet(), image(32), 32)


def integrated_gradients(norm: str, baseline: Blur | Noise, seed: int) -> dict[str, int | str]:
    """Return gaps and forward-backward passes of adaptive IG and of Captum's, on one network and baseline.

    Captum's gap goes up and down with the number of steps: it is asked when it is within 1 %, or the gap that ours has
    reached, for the first time, and from which number on it stays there.
    """
    torch.manual_seed(seed)
    network = UNet(2, 1, 2, (8, 16, 32), (2, 2), norm=norm).double().eval()
    x = torch.randn((1, 1, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = baseline.draws(x)[0]

    def score(inputs: Tensor) -> Tensor:
        return network(inputs)[:, 1, 20:44, 20:44].mean((1, 2))

    def captum_gap(n_steps: int) -> float:
        method = captum.attr.IntegratedGradients(score)
        maps = method.attribute(x, start, n_steps=n_steps, internal_batch_size=50)
        change = float((score(x) - score(start)).detach())
        return abs(float(maps.sum()) - change) / abs(change)

    def own(tolerance: float) -> tuple[float, float]:
        method = IntegratedGradients(baseline=baseline, tolerance=tolerance)
        explanation = Explainer(RegionScore(1, Box((20, 20), (44, 44))), method, tolerated_gap=10.0)(
            network, x
        )
        assert isinstance(explanation, Explanation) and explanation.gap is not None
        return float(explanation.gap), float(explanation.facts["passes"])

    steps = [*range(2, 50, 2), *range(50, 251, 10)]
    gaps = {n: captum_gap(n) for n in steps}
    gap, passes = own(0.01)

    def first(wanted: float) -> str:
        return next((str(n) for n in steps if gaps[n] <= wanted), f"> {steps[-1]}")

    def for_good(wanted: float) -> str:
        outside = [number for number, n in enumerate(steps) if gaps[n] > wanted]
        last = outside[-1] + 1 if outside else 0
        return str(steps[last]) if last < len(steps) else f"> {steps[-1]}"

    return {
        "our gap": f"{gap:.2%}",
        "our passes": int(passes),
        "Captum's steps to 1 % for good": for_good(0.01),
        "to our gap for good": for_good(gap),
        "to our gap first": first(gap),
        "Captum's gap at 50 steps": f"{gaps[50]:.2%}",
        "our passes to that": int(own(max(gaps[50], 1e-6))[1]),
    }
