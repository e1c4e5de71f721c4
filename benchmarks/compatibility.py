"""Every method on every kind of MONAI network, each checked against something independent, next to stock Captum.

``python -m benchmarks.compatibility`` writes ``docs/compatibility.md``. Networks are small, in double precision, with
random weights and batch statistics that were calibrated on noise.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import captum.attr
import torch
from monai.networks import nets
from torch import Tensor, nn
from tqdm import tqdm

import monai_xai as xai
from benchmarks.measuring import seconds_in_turn
from monai_xai.files import write_whole

TABLE = Path(__file__).parents[1] / "docs" / "compatibility.md"
CLOSE = 1e-3
TOLERATED = 0.05


@dataclass(frozen=True)
class Subject:
    """A network that is explained.

    Args:
        make: builds it.
        shapes: of its inputs without the batch, by name.
        is_segmentation: whether a region is explained; else a class or an output.
        head: the part of its output that is explained.
        ablated: layer for AblationCam, where the one that it would choose has thousands of channels.
    """

    make: Callable[[], nn.Module]
    shapes: Mapping[str, tuple[int, ...]]
    is_segmentation: bool = True
    head: int | None = None
    ablated: str = ""

    def build(self) -> nn.Module:
        """Return the network in evaluation mode, with batch statistics of noise."""
        torch.manual_seed(0)
        network = self.make().double()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
            for _ in range(2):
                network.train()(
                    *(x.repeat(4, *(1,) * (x.ndim - 1)) + torch.randn(1) for x in self.inputs().values())
                )
        return network.eval()

    def inputs(self) -> dict[str, Tensor]:
        """Return noise, one sample."""
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randn((1, *shape), generator=generator, dtype=torch.float64)
            for name, shape in self.shapes.items()
        }

    def target(self) -> xai.Target:
        """Return a score in the middle of the prediction, or of a class."""
        if not self.is_segmentation:
            return xai.OutputScore(0, head=self.head)
        spatial = next(iter(self.shapes.values()))[1:]
        start, end = [n // 4 for n in spatial], [3 * n // 4 for n in spatial]
        return xai.RegionScore(1, xai.Box(start, end), head=self.head)


class ImageAndTable(nn.Module):
    """A radiograph and a record, fused late."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nets.DenseNet(2, 1, 6, init_features=8, growth_rate=4, block_config=(2, 2))
        self.table = nn.Sequential(nn.Linear(5, 6), nn.GELU())
        self.head = nn.Linear(12, 2)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), self.table(table)], 1))


class TwoGrids(nn.Module):
    """CT and PET on grids of their own, with a gate between them."""

    def __init__(self) -> None:
        super().__init__()
        self.ct = nets.ResNet(
            "basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=3, n_input_channels=1, num_classes=6
        )
        self.pet = nets.ResNet(
            "basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=3, n_input_channels=1, num_classes=6
        )
        self.head = nn.Linear(6, 2)

    def forward(self, ct: Tensor, pet: Tensor) -> Tensor:
        return self.head(self.ct(ct) * self.pet(pet).sigmoid())


class Gated(nn.Module):
    """A segmentation whose channels a clinical vector scales."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nets.UNet(2, 2, 4, (8, 16), (2,))
        self.scale, self.last = nn.Linear(3, 4), nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor, record: Tensor) -> Tensor:
        return self.last(self.body(image) * self.scale(record).tanh()[:, :, None, None])


IMAGE, LARGE = {"image": (1, 32, 32)}, {"image": (1, 64, 64)}
CUBE, VOLUME = {"image": (1, 16, 16, 16)}, {"image": (1, 32, 32, 32)}
SUBJECTS: dict[str, Subject] = {
    "UNet 2D (PReLU, instance norm)": Subject(lambda: nets.UNet(2, 1, 2, (8, 16, 32), (2, 2)), IMAGE),
    "UNet 2D (ReLU, batch norm)": Subject(
        lambda: nets.UNet(2, 1, 2, (8, 16, 32), (2, 2), act="RELU", norm="BATCH"), IMAGE
    ),
    "UNet 3D (PReLU, instance norm)": Subject(lambda: nets.UNet(3, 1, 2, (4, 8), (2,)), CUBE),
    "BasicUNet 2D": Subject(lambda: nets.BasicUNet(2, 1, 2, (8, 8, 16, 16, 16, 8)), IMAGE),
    "BasicUNet 3D": Subject(lambda: nets.BasicUNet(3, 1, 2, (2, 2, 4, 4, 4, 2)), VOLUME),
    "BasicUNet++ 2D": Subject(lambda: nets.BasicUNetPlusPlus(2, 1, 2, (8, 8, 8, 8, 8, 8)), IMAGE, head=0),
    "DynUNet 2D": Subject(
        lambda: nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 8, 16]), IMAGE
    ),
    "DynUNet 2D (deep supervision)": Subject(
        lambda: nets.DynUNet(
            2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 8, 16], deep_supervision=True, deep_supr_num=1
        ),
        IMAGE,
    ),
    "SegResNet 2D": Subject(lambda: nets.SegResNet(2, init_filters=8, in_channels=1, out_channels=2), IMAGE),
    "SegResNet 3D": Subject(lambda: nets.SegResNet(3, init_filters=8, in_channels=1, out_channels=2), CUBE),
    "SegResNetVAE 2D": Subject(
        lambda: nets.SegResNetVAE((32, 32), spatial_dims=2, init_filters=8, in_channels=1, out_channels=2),
        IMAGE,
        head=0,
    ),
    "SegResNetDS 2D": Subject(
        lambda: nets.SegResNetDS(2, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1, 1)),
        IMAGE,
    ),
    "VNet 2D": Subject(lambda: nets.VNet(2, 1, 2), IMAGE),
    "AttentionUnet 2D": Subject(lambda: nets.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)), IMAGE),
    "UNETR 2D": Subject(
        lambda: nets.UNETR(
            1, 2, (32, 32), feature_size=8, hidden_size=24, mlp_dim=48, num_heads=3, spatial_dims=2
        ),
        IMAGE,
    ),
    "SwinUNETR 2D": Subject(
        lambda: nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2), LARGE
    ),
    "HighResNet 2D": Subject(lambda: nets.HighResNet(2, 1, 2), IMAGE),
    "FlexibleUNet 2D (EfficientNet)": Subject(
        lambda: nets.FlexibleUNet(1, 2, "efficientnet-b0", spatial_dims=2, pretrained=False), LARGE
    ),
    "FlexibleUNet 2D (ResNet)": Subject(
        lambda: nets.FlexibleUNet(1, 2, "resnet18", spatial_dims=2, pretrained=False), LARGE
    ),
    "MedNeXt 2D": Subject(
        lambda: nets.MedNeXt(spatial_dims=2, init_filters=8, in_channels=1, out_channels=2), IMAGE
    ),
    "AHNet 2D": Subject(
        lambda: nets.AHNet(spatial_dims=2, in_channels=1, out_channels=2, upsample_mode="bilinear"),
        {"image": (1, 128, 128)},
        ablated="up3.conv",
    ),
    "DenseNet121 2D": Subject(lambda: nets.DenseNet121(2, 1, 3), LARGE, False),
    "ResNet18 2D": Subject(
        lambda: nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=3), LARGE, False
    ),
    "ResNet 3D": Subject(
        lambda: nets.ResNet(
            "basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=3, n_input_channels=1, num_classes=3
        ),
        CUBE,
        False,
    ),
    "SEResNet50 2D": Subject(
        lambda: nets.SEResNet50(spatial_dims=2, in_channels=1, num_classes=3), LARGE, False
    ),
    "EfficientNet 2D": Subject(
        lambda: nets.EfficientNetBN(
            "efficientnet-b0", spatial_dims=2, in_channels=1, num_classes=3, pretrained=False
        ),
        LARGE,
        False,
    ),
    "ViT 2D": Subject(
        lambda: nets.ViT(
            *(1, (32, 32), (8, 8)),
            **{"hidden_size": 24, "mlp_dim": 48, "num_layers": 3, "num_heads": 3, "spatial_dims": 2},
            **{"classification": True, "num_classes": 3},
        ),
        IMAGE,
        False,
        head=0,
    ),
    "Regressor 2D": Subject(lambda: nets.Regressor((1, 32, 32), (1,), (8, 16), (2, 2)), IMAGE, False),
    "Classifier 2D": Subject(lambda: nets.Classifier((1, 32, 32), 3, (8, 16), (2, 2)), IMAGE, False),
    "UNet 2D (residual units, dropout)": Subject(
        lambda: nets.UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2, dropout=0.1), IMAGE
    ),
    "UNet 2D (GELU, group norm)": Subject(
        lambda: nets.UNet(2, 1, 2, (8, 16, 32), (2, 2), act="GELU", norm=("GROUP", {"num_groups": 2})), IMAGE
    ),
    "DynUNet 3D": Subject(
        lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 4, 8]), CUBE
    ),
    "SegResNetVAE 3D": Subject(
        lambda: nets.SegResNetVAE((16, 16, 16), init_filters=8, in_channels=1, out_channels=2), CUBE, head=0
    ),
    "SegResNetDS 3D": Subject(
        lambda: nets.SegResNetDS(3, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1, 1)),
        CUBE,
    ),
    "VNet 3D": Subject(lambda: nets.VNet(3, 1, 2), CUBE),
    "AttentionUnet 3D": Subject(lambda: nets.AttentionUnet(3, 1, 2, (4, 8), (2,)), CUBE),
    "UNETR 3D": Subject(
        lambda: nets.UNETR(1, 2, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3),
        VOLUME,
    ),
    "HighResNet 3D": Subject(lambda: nets.HighResNet(3, 1, 2), {"image": (1, 12, 12, 12)}),
    "MedNeXt 3D": Subject(
        lambda: nets.MedNeXt(
            *(3, 4, 1, 2),
            **{
                "encoder_expansion_ratio": 1,
                "decoder_expansion_ratio": 1,
                "bottleneck_expansion_ratio": 1,
                "kernel_size": 3,
            },
            **{"blocks_down": (1, 1, 1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1, 1, 1)},
        ),
        VOLUME,
    ),
    "DenseNet 3D": Subject(
        lambda: nets.DenseNet(3, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2)), VOLUME, False
    ),
    "SEResNext50 2D": Subject(
        lambda: nets.SEResNext50(spatial_dims=2, in_channels=1, num_classes=3), LARGE, False
    ),
    "ResNet50 2D": Subject(
        lambda: nets.resnet50(spatial_dims=2, n_input_channels=1, num_classes=3), LARGE, False
    ),
    "ViT 3D": Subject(
        lambda: nets.ViT(
            *(1, (16, 16, 16), (8, 8, 8)),
            **{"hidden_size": 24, "mlp_dim": 48, "num_layers": 3, "num_heads": 3},
            **{"classification": True, "num_classes": 3},
        ),
        CUBE,
        False,
        head=0,
    ),
    "Regressor 3D": Subject(lambda: nets.Regressor((1, 16, 16, 16), (1,), (4, 8), (2, 2)), CUBE, False),
    "Classifier 3D": Subject(lambda: nets.Classifier((1, 16, 16, 16), 3, (4, 8), (2, 2)), CUBE, False),
    "image + table": Subject(ImageAndTable, {"image": (1, 32, 32), "table": (5,)}, False),
    "CT + PET, two grids": Subject(TwoGrids, {"ct": (1, 24, 24, 24), "pet": (1, 16, 16, 16)}, False),
    "image + record, segmentation": Subject(Gated, {"image": (2, 32, 32), "record": (3,)}),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a method on a network.

    Args:
        kind: "right", "approximate", "wrong", "refused" or "failed".
        note: the number that decided, or the reason.
        seconds: time it took.
    """

    kind: str
    note: str
    seconds: float = 0.0


Check = Callable[["Trial"], Outcome]


@dataclass(frozen=True, eq=False)
class Trial:
    """A method on a network, with what an independent check needs.

    Args:
        subject: which network, and what of it.
        network: the network.
        method: the method.
        explanation: what came.
    """

    subject: Subject
    network: nn.Module
    method: xai.Attributor
    explanation: xai.Explanation

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs by name."""
        return self.subject.inputs()

    def score(self, *inputs: Tensor) -> Tensor:
        """The score as plain PyTorch, without this package's machinery."""
        return plain_score(self.subject, self.network, *inputs)


def plain_score(subject: Subject, network: nn.Module, *inputs: Tensor) -> Tensor:
    """Return the score that the target stands for, written by hand."""
    output = network(*inputs)
    if subject.head is not None:
        output = output[subject.head]
    if not subject.is_segmentation:
        return output.flatten(1)[:, 0]
    places = tuple(slice(n // 4, 3 * n // 4) for n in next(iter(subject.shapes.values()))[1:])
    return output[(slice(None), 1, *places)].flatten(1).mean(1)


def by_finite_differences(trial: Trial) -> Outcome:
    """The gradient along a random direction, at the step that serves best.

    Rectifiers turn within large steps, and within small ones a score that hardly changes is lost in rounding. A wrong
    gradient is wrong at every step.
    """
    generator = torch.Generator().manual_seed(2)
    inputs = list(trial.inputs.values())
    ways = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]

    def slope(step: float) -> float:
        with torch.no_grad():
            ahead = trial.score(*(x + step * w for x, w in zip(inputs, ways, strict=True)))
            back = trial.score(*(x - step * w for x, w in zip(inputs, ways, strict=True)))
        return float(ahead - back) / (2 * step)

    maps = trial.explanation.attributions
    if isinstance(trial.method, xai.InputXGradient):
        maps = {name: m / trial.inputs[name] for name, m in maps.items()}
    found = sum(float((maps[name] * w).sum()) for name, w in zip(trial.inputs, ways, strict=True))
    size = math.sqrt(
        sum(float((maps[name] * w).square().sum()) for name, w in zip(trial.inputs, ways, strict=True))
    )
    error = min(abs(found - slope(step)) for step in (1e-1, 1e-3, 1e-5, 1e-7, 1e-9)) / max(size, 1e-300)
    return Outcome("right" if error < CLOSE else "wrong", f"finite difference {error:.0e}")


def by_completeness(trial: Trial) -> Outcome:
    """The sum of all maps against scores that were computed by hand."""
    explanation = trial.explanation
    assert explanation.baseline_score is not None
    total = sum(float(m.sum()) for m in explanation.attributions.values())
    with torch.no_grad():
        score = float(trial.score(*trial.inputs.values()))
    change = score - float(explanation.baseline_score)
    rounding = 1e-12 * max(abs(score), 1e-300)
    gap = max(abs(total - change) - rounding, 0.0) / max(abs(change), 1e-300)
    limit = 1e-6 if isinstance(trial.method, xai.DeepLift) else TOLERATED
    passes = explanation.facts.get("passes")
    note = f"gap {gap:.0e}" + (f", {passes:.0f} passes" if passes else "")
    if gap < limit:
        return Outcome("right", note)
    return Outcome(
        "approximate", f"{note} (said: {float(explanation.gap):.0e})" if explanation.gap is not None else note
    )


def by_sampling_error(trial: Trial) -> Outcome:
    """The gap of a sampled expectation, against the standard error that it states: no more than three of them."""
    outcome = by_completeness(trial)
    if outcome.kind == "right":
        return outcome
    delta, error = trial.explanation.delta, float(trial.explanation.facts["error_of_sum"])
    assert delta is not None
    within = float(delta.abs().max()) / error
    return Outcome("right" if within <= 3 else "approximate", f"{outcome.note}, {within:.1f} standard errors")


def by_conservation(trial: Trial) -> Outcome:
    """Relevance on the map and relevance of biases against the score."""
    total = sum(float(m.sum()) for m in trial.explanation.attributions.values())
    with torch.no_grad():
        score = float(trial.score(*trial.inputs.values()))
    facts = trial.explanation.facts
    if isinstance(trial.method, xai.FullGrad):
        gap = abs(total + float(facts["without_place"]) - score) / abs(score)
        return Outcome("right" if gap < 1e-6 else "wrong", f"gap {gap:.0e}")
    is_stated = math.isclose(float(facts["conserved"]), total / score, rel_tol=1e-6, abs_tol=1e-9)
    size = sum(float(m.abs().sum()) for m in trial.explanation.attributions.values()) / abs(score)
    note = f"conserves {float(facts['conserved']):.2g}, biases {float(facts['absorbed_by_biases']):.2g}"
    return Outcome("right" if is_stated and size < 1e3 else "approximate", note)


def by_difference_from_the_gradient(trial: Trial) -> Outcome:
    """A guided method must not silently be the gradient."""
    inputs = [x.requires_grad_() for x in trial.inputs.values()]
    gradients = torch.autograd.grad(trial.score(*inputs).sum(), inputs)
    maps = trial.explanation.attributions.values()
    away = sum(float((m - g).norm()) for m, g in zip(maps, gradients, strict=True))
    size = sum(float(g.norm()) for g in gradients)
    return Outcome("right" if away > 1e-3 * size else "wrong", f"{away / size:.0%} from the gradient")


def by_masking(trial: Trial) -> Outcome:
    """The effect of one feature against a network that is called by hand."""
    inputs = trial.inputs
    name, x = next(iter(inputs.items()))
    box = (slice(None), slice(None), *(slice(0, n) for n in trial.method.features.size))  # type: ignore[attr-defined]
    changed = x.clone()
    changed[box] = 0
    with torch.no_grad():
        first = trial.score(*inputs.values())
        effect = float(first - trial.score(*({**inputs, name: changed}).values()))
    found = float(trial.explanation.attributions[name][(0, 0, *(0 for _ in x.shape[2:]))])
    error = abs(found - effect) / max(abs(effect), 1e-12)
    return Outcome("right" if error < CLOSE else "wrong", f"effect {error:.0e}")


def by_efficiency(trial: Trial) -> Outcome:
    """Shapley values sum to the change of the score."""
    residual = float(trial.explanation.facts["residual"])
    change = abs(float(trial.explanation.score - trial.explanation.baseline_score))
    gap = residual / max(change, 1e-12)
    return Outcome("right" if gap < 1e-6 else "wrong", f"residual {gap:.0e}")


def by_form(trial: Trial) -> Outcome:
    """Finite and not zero; the formula itself is tested against a slow rewrite in tests/."""
    maps = list(trial.explanation.attributions.values())
    if not all(torch.isfinite(m).all() for m in maps):
        return Outcome("wrong", "not finite")
    return Outcome("right", "" if any(m.any() for m in maps) else "nothing positive")


ZERO, NOISE = xai.Constant(0.0), xai.Noise()
METHODS: dict[str, tuple[xai.Attributor, Check]] = {
    "Saliency": (xai.Saliency(), by_finite_differences),
    "InputXGradient": (xai.InputXGradient(), by_finite_differences),
    "IntegratedGradients": (xai.IntegratedGradients(baseline=NOISE, tolerance=0.01), by_completeness),
    "IntegratedGradients (auto)": (
        xai.IntegratedGradients(baseline="auto", max_steps=4095),
        by_completeness,
    ),
    "BlurIntegratedGradients": (xai.BlurIntegratedGradients(), by_completeness),
    "GuidedIntegratedGradients": (
        xai.GuidedIntegratedGradients(baseline="auto", tolerance=0.03, max_steps=600),
        by_completeness,
    ),
    "GradientShap": (xai.GradientShap(n_samples=64, baseline=NOISE), by_sampling_error),
    "NoiseTunnel": (xai.NoiseTunnel(n_samples=4), by_form),
    "GuidedBackprop": (xai.GuidedBackprop(), by_difference_from_the_gradient),
    "Deconvolution": (xai.Deconvolution(), by_difference_from_the_gradient),
    "FullGrad": (xai.FullGrad(), by_conservation),
    "DeepLift (noise)": (xai.DeepLift(NOISE), by_completeness),
    "DeepLift (zero)": (xai.DeepLift(ZERO), by_completeness),
    "LRP": (xai.LRP(), by_conservation),
    "ExcitationBackprop": (xai.ExcitationBackprop(), by_conservation),
    "LRP (z-plus)": (xai.LRP(xai.ZPlusRule(), xai.ZPlusRule()), by_conservation),
    "GradCam": (xai.GradCam(), by_form),
    "GradCamPlusPlus": (xai.GradCamPlusPlus(), by_form),
    "HiResCam": (xai.HiResCam(), by_form),
    "XGradCam": (xai.XGradCam(), by_form),
    "LayerCam": (xai.LayerCam(), by_form),
    "EigenCam": (xai.EigenCam(), by_form),
    "SegXResCam": (xai.SegXResCam(), by_form),
    "AblationCam": (xai.AblationCam(), by_form),
    "GuidedGradCam": (xai.GuidedGradCam(), by_form),
}


FEATURE_METHODS: dict[str, tuple[Callable[[xai.Features], xai.Attributor], Check]] = {
    "FeatureAblation": (lambda features: xai.FeatureAblation(features, ZERO), by_masking),
    "ShapleyValues": (lambda features: xai.ShapleyValues(xai.Channels(), ZERO), by_efficiency),
    "ShapleyValueSampling": (
        lambda features: xai.ShapleyValueSampling(features, ZERO, n_samples=4),
        by_efficiency,
    ),
    "KernelShap": (lambda features: xai.KernelShap(features, ZERO, n_samples=32), by_efficiency),
    "Lime": (lambda features: xai.Lime(features, ZERO, n_samples=32), by_form),
    "Rise": (lambda features: xai.Rise(16, baseline=ZERO), by_form),
}
NAMES = (*METHODS, *FEATURE_METHODS)


def method_for(subject: Subject, name: str) -> tuple[xai.Attributor, Check]:
    """Return a method and its check; features are halves of the image along each axis."""
    if name == "AblationCam" and subject.ablated:
        return xai.AblationCam(subject.ablated), by_form
    if name in METHODS:
        return METHODS[name]
    make, check = FEATURE_METHODS[name]
    spatial = next(iter(subject.shapes.values()))[1:]
    return make(xai.Blocks(tuple(n // 2 for n in spatial))), check


class _Score(nn.Module):
    """The score as a module, for Captum, with every help that a user could give it."""

    def __init__(self, subject: Subject, network: nn.Module) -> None:
        super().__init__()
        self.subject, self.network = subject, network

    def forward(self, *inputs: Tensor) -> Tensor:
        return plain_score(self.subject, self.network, *inputs)


def explaining(subject: Subject, network: nn.Module, name: str) -> Callable[[], xai.Explanation]:
    """Return the work of explaining one network by one method.

    The prediction is there, as in an engine, and as it is for Captum: its wrapper knows the region.
    """
    method, _ = method_for(subject, name)
    with torch.no_grad():
        prediction = network(*subject.inputs().values())
    is_auto = isinstance(getattr(method, "baseline", None), xai.Auto)  # which looks at the tolerated gap
    tolerated = TOLERATED if is_auto else math.inf

    def explain() -> xai.Explanation:
        explainer = xai.Explainer(subject.target(), method, progress=False, tolerated_gap=tolerated)
        explanation = explainer(network, subject.inputs(), prediction=prediction)
        assert isinstance(explanation, xai.Explanation)
        return explanation

    return explain


def judge(subject: Subject, network: nn.Module, name: str) -> Outcome:
    """Explain one network by one method, and check what comes."""
    explain = explaining(subject, network, name)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", xai.SeveredGradientWarning)
            explanation = explain()
    except (xai.UnsupportedNetworkError, xai.UnsupportedInfererError, xai.InputError) as error:
        return Outcome("refused", str(error), time.perf_counter() - start)
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}", time.perf_counter() - start)
    seconds = time.perf_counter() - start
    method, check = method_for(subject, name)
    outcome = check(Trial(subject, network, method, explanation))
    said = [str(w.message) for w in caught if w.category is xai.SeveredGradientWarning]
    if said and outcome.kind != "right":
        return Outcome("approximate", f"{outcome.note}, and said: {said[0]}", seconds)
    return Outcome(outcome.kind, outcome.note, seconds)


CAPTUM = (
    "DeepLift (noise)",
    "DeepLift (zero)",
    "GuidedBackprop",
    "Deconvolution",
    "LRP",
    "IntegratedGradients",
)


def attributing(subject: Subject, network: nn.Module, name: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return the work of doing the same by stock Captum."""
    score, baseline = _Score(subject, network), _baseline(subject, name)

    def attribute() -> tuple[Tensor, ...]:
        inputs = tuple(x.clone() for x in subject.inputs().values())
        found: tuple[Tensor, ...]
        if name.startswith("DeepLift"):
            found = captum.attr.DeepLift(score).attribute(inputs, baseline)
        elif name == "IntegratedGradients":
            found = captum.attr.IntegratedGradients(score).attribute(inputs, baseline, internal_batch_size=1)
        else:
            found = getattr(captum.attr, name)(score).attribute(inputs)
        return found

    return attribute


def _baseline(subject: Subject, name: str) -> tuple[Tensor, ...]:
    if "noise" in name:
        return tuple(xai.Noise().draws(x)[0] for x in subject.inputs().values())
    return tuple(torch.zeros_like(x) for x in subject.inputs().values())


def judge_captum(subject: Subject, network: nn.Module, name: str) -> Outcome:
    """Attribute by stock Captum, and check what comes."""
    attribute = attributing(subject, network, name)
    start = time.perf_counter()
    try:
        maps = attribute()
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}", time.perf_counter() - start)
    seconds = time.perf_counter() - start
    if name in ("GuidedBackprop", "Deconvolution"):
        explanation: Any = type("Maps", (), {"attributions": dict(zip(subject.inputs(), maps, strict=True))})
        outcome = by_difference_from_the_gradient(Trial(subject, network, METHODS[name][0], explanation))
        return Outcome(outcome.kind, outcome.note, seconds)
    score, inputs = _Score(subject, network), subject.inputs().values()
    with torch.no_grad():
        change = float(score(*inputs) - (0 if name == "LRP" else score(*_baseline(subject, name))))
    gap = abs(sum(float(m.sum()) for m in maps) - change) / max(abs(change), 1e-12)
    return Outcome("right" if gap < TOLERATED else "wrong", f"gap {gap:.0e}", seconds)


def _in_turn(subject: Subject, network: nn.Module, name: str, own: Outcome, other: Outcome) -> list[Outcome]:
    """Return outcomes of us and of Captum with seconds that compare: of quick work, medians of rounds in turn."""
    if not _are_timed(own, other):
        return [own, other]
    works = [explaining(subject, network, name), attributing(subject, subject.build(), name)]
    seconds = seconds_in_turn(works, _ROUNDS)
    return [replace(outcome, seconds=taken) for outcome, taken in zip((own, other), seconds, strict=True)]


def _are_timed(own: Outcome, other: Outcome) -> bool:
    """Tell whether both are right, and quick enough to be run some more times."""
    return own.kind == other.kind == "right" and own.seconds + other.seconds < _LONG


_LONG = 20.0  # seconds
_ROUNDS = 3

Cell = tuple[str, str, str, Outcome]


def run(subjects: Sequence[str], processes: int = 1, kept: Path | None = None) -> list[Cell]:
    """Return who, network, method and outcome of every pair; each process takes one network after the other.

    Args:
        subjects: names of networks.
        processes: how many.
        kept: folder where the row of each network is kept: those that are there already are not run again.
    """
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        rows = pool.map(partial(run_or_read, kept=kept), subjects)
        return [cell for row in tqdm(rows, total=len(subjects), desc="networks") for cell in row]


def run_or_read(name: str, kept: Path | None) -> list[Cell]:
    """Return the row of a network, as it was kept or from a run."""
    if kept is None:
        return run_network(name)
    file = kept / f"{name}.json"
    if not file.is_file():
        write_whole(file, json.dumps([(*who, asdict(outcome)) for *who, outcome in run_network(name)]))
    return [(*who, Outcome(**outcome)) for *who, outcome in json.loads(file.read_text())]


def run_network(name: str) -> list[Cell]:
    """Return the row of a network, on one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    subject = SUBJECTS[name]
    network = subject.build()
    ours = {method: judge(subject, network, method) for method in NAMES}
    theirs = {method: judge_captum(subject, subject.build(), method) for method in CAPTUM}
    for method in CAPTUM:
        ours[method], theirs[method] = _in_turn(subject, network, method, ours[method], theirs[method])
    return [
        (who, name, method, outcome)
        for who, outcomes in (("ours", ours), ("captum", theirs))
        for method, outcome in outcomes.items()
    ]


MARKS = {"right": "✓", "approximate": "≈", "refused": "-", "wrong": "✗", "failed": "!"}


def table(outcomes: Sequence[tuple[str, str, str, Outcome]]) -> str:
    """Return the page."""
    ours = {(network, method): outcome for who, network, method, outcome in outcomes if who == "ours"}
    theirs = {(network, method): outcome for who, network, method, outcome in outcomes if who == "captum"}
    networks = list(dict.fromkeys(network for network, _ in ours))
    counts = {kind: sum(outcome.kind == kind for outcome in ours.values()) for kind in MARKS}
    lines = [
        "# Every method on every kind of network",
        "",
        f"Written by `python -m benchmarks.compatibility`: {len(networks)} networks, {len(NAMES)} methods, "
        f"torch {torch.__version__}, captum {captum.__version__}, double precision, random weights.",
        "",
        f"Of {len(ours)} pairs **{counts['right']} right** ({counts['right'] / len(ours):.1%}), "
        f"{counts['approximate']} approximate, {counts['refused']} refused by name, {counts['failed']} failed, "
        f"**{counts['wrong']} silently wrong**.",
        "",
        "Checked by: finite differences (gradients), scores computed by hand (methods that add up; DeepLift to 1e-6, "
        "sampled and integrated ones to 5 %), relevance on the map plus that of biases (LRP, FullGrad), a masked call "
        "by hand (ablation), efficiency (Shapley), distance from the plain gradient (guided methods). Class activation "
        "maps, LIME and RISE are finite here; their formulas are tested against slow rewrites. A sampled "
        "expectation (GradientShap) is right within 5 %, or within three of the standard errors that it states. "
        "*Approximate* has a larger gap, and says so.",
        "",
        "## Stock Captum in the same run",
        "",
        "With a wrapper module that picks the output and freezes the region, which is more than a user has. Times are "
        "of networks where both are right, within 20 s, in turn: the median of the ratios, and the range.",
        "",
        "| method | Captum right | silently wrong | exception | ours right | our time / Captum's |",
        "|---|---|---|---|---|---|",
    ]
    for name in CAPTUM:
        found = [theirs[network, name] for network in networks]
        own = [ours[network, name] for network in networks]
        ratios = [o.seconds / t.seconds for t, o in zip(found, own, strict=True) if _are_timed(o, t)]
        theirs_by = {kind: sum(o.kind == kind for o in found) for kind in MARKS}
        right = sum(o.kind == "right" for o in own)
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        lines.append(
            f"| {name} | {theirs_by['right']} | {theirs_by['wrong']} | {theirs_by['failed']} | "
            f"{right} of {len(networks)} | {ratio} |"
        )
    lines += ["", "## The table", "", "✓ right, ≈ approximate, - refused, ✗ wrong, ! failed", ""]
    lines += ["| network | " + " | ".join(NAMES) + " |", "|---" * (len(NAMES) + 1) + "|"]
    for network in networks:
        cells = [MARKS[ours[network, method].kind] for method in NAMES]
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    lines += ["", "## What is not right, and why", ""]
    for (network, method), outcome in ours.items():
        if outcome.kind != "right":
            lines.append(f"- {method} on {network}: {outcome.kind}. {outcome.note.splitlines()[0][:300]}")
    lines += ["", "## Gaps and conservation", ""]
    adding = [name for name, (_, check) in METHODS.items() if check in (by_completeness, by_conservation)]
    lines += ["| network | " + " | ".join(adding) + " |", "|---" * (len(adding) + 1) + "|"]
    for network in networks:
        lines.append(
            f"| {network} | " + " | ".join(ours[network, method].note[:60] for method in adding) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all pairs, or those of some networks, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--networks", nargs="*", default=list(SUBJECTS), help="names of networks; default: all"
    )
    parser.add_argument("--output", type=Path, default=TABLE, help="the page to write")
    parser.add_argument(
        "--processes", type=int, default=1, help="networks at a time; times are then less even"
    )
    parser.add_argument(
        "--results", type=Path, help="folder where rows are kept, from which a run goes on that was ended"
    )
    arguments = parser.parse_args()
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
    page = table(run(arguments.networks, arguments.processes, arguments.results))
    arguments.output.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
