"""Attributors against closed forms, slow rewrites of the papers, and Captum."""

from __future__ import annotations

import re
from dataclasses import replace

import captum.attr
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from networks import LinearImage, random_image, small_unet
from torch import nn

import monai_xai
from monai_xai import (
    AttributionError,
    Blocks,
    Box,
    ChannelMinimum,
    Channels,
    ClassScore,
    CompletenessWarning,
    Constant,
    DeepLift,
    Explainer,
    FeatureAblation,
    FeatureMask,
    GradCam,
    GradCamPlusPlus,
    GradientShap,
    GuidedBackprop,
    HiResCam,
    InputError,
    InputXGradient,
    IntegratedGradients,
    Noise,
    NoiseTunnel,
    Occlusion,
    OutputScore,
    Predicted,
    RegionScore,
    Saliency,
    Samples,
    UnsupportedNetworkError,
)
from monai_xai.attributors.base import add_up
from monai_xai.attributors.gradients import _error_of_sum
from monai_xai.attributors.integrated import gauss_legendre

SHAPE = (2, 6, 5)
SIDES = SlidingWindowInferer(12, overlap=0.5, mode="gaussian")
BOX = Box((3, 2), (14, 9))
ROUNDING_OF_CAPTUM = 1e-7  # it keeps quadrature nodes and counts in single precision


def explain(attributor, network=None, x=None, target=None, inferer=None):
    network = LinearImage(SHAPE) if network is None else network
    x = random_image(2, *SHAPE) if x is None else x
    return Explainer(OutputScore() if target is None else target, attributor, inferer)(network, x)


def window_score(network):
    """Return a Captum-style function of whole inputs: the region score of MONAI's own stitched prediction."""

    def score(x):
        return SIDES(x, network)[:, 1, 3:14, 2:9].mean((1, 2))

    return score


# ------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    "baseline", [Constant(0.5), ChannelMinimum(), Noise(seed=3)], ids=lambda b: type(b).__name__
)
@pytest.mark.parametrize("method", [IntegratedGradients, DeepLift, GradientShap], ids=lambda m: m.__name__)
def test_on_a_linear_network_complete_methods_give_weight_times_difference(method, baseline):
    network, x = LinearImage(SHAPE), random_image(2, *SHAPE)
    explanation = explain(method(baseline=baseline), network, x)
    expected = network.weight * (x - baseline.draws(x)[0])
    torch.testing.assert_close(explanation.attributions["image"], expected.detach(), rtol=0, atol=1e-12)
    assert explanation.delta.abs().max() < 1e-12


def test_on_a_linear_network_gradient_methods_give_the_weights():
    network, x = LinearImage(SHAPE), random_image(2, *SHAPE)
    weight = network.weight.detach().expand_as(x)
    torch.testing.assert_close(explain(Saliency(), network, x).attributions["image"], weight)
    torch.testing.assert_close(
        explain(Saliency(absolute=True), network, x).attributions["image"], weight.abs()
    )
    torch.testing.assert_close(explain(InputXGradient(), network, x).attributions["image"], weight * x)
    torch.testing.assert_close(explain(NoiseTunnel(Saliency()), network, x).attributions["image"], weight)
    squared = explain(NoiseTunnel(Saliency(), "smoothgrad_sq"), network, x).attributions["image"]
    torch.testing.assert_close(squared, weight.square())
    variance = explain(NoiseTunnel(Saliency(), "vargrad"), network, x).attributions["image"]
    assert variance.abs().max() < 1e-12


def test_on_a_linear_network_ablation_gives_the_sum_over_the_feature():
    network, x = LinearImage(SHAPE), random_image(2, *SHAPE)
    contributions = (network.weight * x).detach()
    channels = explain(FeatureAblation(Channels(), baseline=0.0), network, x).attributions["image"]
    torch.testing.assert_close(channels, contributions.sum((2, 3), keepdim=True).expand_as(x))
    boxes = explain(Occlusion((1, 1, 1), (1, 1, 1), baseline=0.0), network, x).attributions["image"]
    torch.testing.assert_close(boxes, contributions)


def test_integrated_gradients_of_a_product_splits_it_evenly():
    class Product(nn.Module):
        def forward(self, x):
            return x[:, :1] * x[:, 1:]

    explanation = explain(IntegratedGradients(baseline=0.0), Product(), torch.tensor([[3.0, 2.0]]))
    torch.testing.assert_close(explanation.attributions["input"], torch.tensor([[3.0, 3.0]]))


def test_the_fixed_rule_integrates_polynomials_exactly():
    for power in range(10):
        value = sum(w * node**power for node, w in zip(*gauss_legendre(5), strict=True))
        assert value == pytest.approx(1 / (power + 1), abs=1e-13)


def test_var_grad_does_not_cancel_in_single_precision():
    class Steep(nn.Module):
        def forward(self, x):
            return (100 * x + x.square()).flatten(1).sum(1, keepdim=True)

    method = NoiseTunnel(Saliency(), "vargrad", n_samples=200, stdev_spread=1e-3)
    x = random_image(1, 1, 8, 8)
    single, double = (explain(method, Steep(), image).attributions["image"] for image in (x.float(), x))
    assert float(single.mean()) == pytest.approx(float(4 * (1e-3 * (x.max() - x.min())) ** 2), rel=0.1)
    assert float(double.mean()) == pytest.approx(float(single.mean()), rel=0.1)


def test_smooth_grad_of_a_square_is_the_mean_of_its_gradient_at_the_noisy_points():
    class Square(nn.Module):
        def forward(self, x):
            return x.square().flatten(1).sum(1, keepdim=True)

    x = random_image(1, 1, 8, 8)
    many = explain(NoiseTunnel(Saliency(), n_samples=2000, stdev_spread=0.1), Square(), x).attributions[
        "image"
    ]
    torch.testing.assert_close(many, 2 * x, rtol=0, atol=0.15)
    spread = 0.1 * (x.max() - x.min())
    variance = explain(NoiseTunnel(Saliency(), "vargrad", n_samples=2000, stdev_spread=0.1), Square(), x)
    assert float(variance.attributions["image"].mean()) == pytest.approx(4 * float(spread) ** 2, rel=0.08)


# --------------------------------------------------------------------------------------------------- against Captum


@pytest.mark.parametrize("n_steps", [8, 33])
def test_fixed_steps_equal_captum_also_through_windows(n_steps):
    network, x = small_unet(), random_image(1, 2, 20, 16)
    mine = explain(IntegratedGradients(n_steps=n_steps, baseline=0.0), network, x, RegionScore(1, BOX), SIDES)
    theirs = captum.attr.IntegratedGradients(window_score(network)).attribute(
        x, n_steps=n_steps, internal_batch_size=1
    )
    torch.testing.assert_close(mine.attributions["image"], theirs.double(), rtol=0, atol=ROUNDING_OF_CAPTUM)


@pytest.mark.parametrize("features", [Channels(), Blocks(7), Blocks(8, per_channel=True)], ids=str)
def test_feature_ablation_equals_captum_also_through_windows(features):
    network, x = small_unet(), random_image(1, 2, 20, 16)
    mine = explain(FeatureAblation(features, baseline=0.3), network, x, RegionScore(1, BOX), SIDES)
    mask = features.mask(x, "image").expand_as(x)
    theirs = captum.attr.FeatureAblation(window_score(network)).attribute(x, baselines=0.3, feature_mask=mask)
    torch.testing.assert_close(mine.attributions["image"], theirs.double(), rtol=0, atol=ROUNDING_OF_CAPTUM)


@pytest.mark.parametrize(
    ("window", "stride"), [((1, 8, 8), (1, 8, 8)), ((2, 7, 5), (2, 4, 3)), ((2, 6, 6), (1, 5, 5))]
)
def test_occlusion_equals_captum_also_through_windows(window, stride):
    network, x = small_unet(), random_image(1, 2, 20, 16)
    mine = explain(Occlusion(window, stride, baseline=0.3), network, x, RegionScore(1, BOX), SIDES)
    theirs = captum.attr.Occlusion(window_score(network)).attribute(x, window, stride, baselines=0.3)
    torch.testing.assert_close(mine.attributions["image"], theirs.double(), rtol=0, atol=ROUNDING_OF_CAPTUM)


@pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
def test_perturbation_is_exact_where_the_image_is_smaller_than_the_window(padding_mode):
    network, x = small_unet(), random_image(1, 2, 12, 10)
    inferer = SlidingWindowInferer(
        16, padding_mode=padding_mode, cval=0.7 if padding_mode == "constant" else 0.0
    )

    def score(image):
        return inferer(image, network)[:, 1, 3:9, 2:8].mean((1, 2))

    target = RegionScore(1, Box((3, 2), (9, 8)))
    mine = explain(FeatureAblation(Blocks(4), baseline=0.3), network, x, target, inferer)
    mask = Blocks(4).mask(x, "image").expand_as(x)
    theirs = captum.attr.FeatureAblation(score).attribute(x, baselines=0.3, feature_mask=mask)
    torch.testing.assert_close(mine.attributions["image"], theirs.double(), rtol=0, atol=ROUNDING_OF_CAPTUM)
    mine = explain(Occlusion((2, 5, 4), (2, 3, 4), baseline=0.3), network, x, target, inferer)
    theirs = captum.attr.Occlusion(score).attribute(x, (2, 5, 4), (2, 3, 4), baselines=0.3)
    torch.testing.assert_close(mine.attributions["image"], theirs.double(), rtol=0, atol=ROUNDING_OF_CAPTUM)


def test_guided_backprop_equals_a_rewrite_with_its_own_rule():
    class GuidedRelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)

    class Guided(nn.Module):
        def forward(self, x):
            return GuidedRelu.apply(x)

    network, x = small_unet(), random_image(2, 2, 16, 16)
    mine = explain(GuidedBackprop(), network, x, RegionScore(1, BOX)).attributions["image"]
    rewritten = small_unet()
    for parent in list(rewritten.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, Guided())
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rewritten(leaf)[:, 1, 3:14, 2:9].mean((1, 2)).sum(), leaf)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
    plain = explain(Saliency(), network, x, RegionScore(1, BOX)).attributions["image"]
    assert not torch.allclose(mine, plain)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, 2, 1)
        )
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.head(self.act(self.features(x)).mean((2, 3)))


def test_grad_cam_equals_captum_and_hires_cam_is_the_gradient_times_activation():
    network, x = Classifier(), random_image(2, 2, 32, 32)
    mine = explain(GradCam("features.0"), network, x, ClassScore(1)).attributions["image"]
    theirs = captum.attr.LayerGradCam(network, network.features[0]).attribute(x, 1, relu_attributions=True)
    theirs = captum.attr.LayerAttribution.interpolate(theirs, (32, 32), "bilinear").detach()
    torch.testing.assert_close(mine, theirs)
    mine = explain(HiResCam("features.2"), network, x, ClassScore(1)).attributions["image"]
    theirs = (
        captum.attr.LayerGradientXActivation(network, network.features[2])
        .attribute(x, 1)
        .sum(1, keepdim=True)
    )
    theirs = captum.attr.LayerAttribution.interpolate(theirs.relu(), (32, 32), "bilinear").detach()
    torch.testing.assert_close(mine, theirs)


def test_grad_cam_plus_plus_equals_a_slow_rewrite_of_the_paper():
    network, x = Classifier(), random_image(1, 2, 16, 16)
    mine = explain(GradCamPlusPlus("features.2"), network, x, ClassScore(2)).attributions["image"]
    activation = network.features(x).detach().requires_grad_()
    score = network.head(activation.relu().mean((2, 3)))[0, 2]
    (g,) = torch.autograd.grad(score, activation)
    cam = torch.zeros(4, 4, dtype=torch.float64)
    for k in range(activation.shape[1]):
        weight = 0.0
        for i in range(4):
            for j in range(4):
                denominator = 2 * g[0, k, i, j] ** 2 + (activation[0, k] * g[0, k, i, j] ** 3).sum()
                alpha = g[0, k, i, j] ** 2 / denominator if denominator != 0 else 0.0
                weight = weight + alpha * max(g[0, k, i, j], 0)
        cam += weight * activation[0, k].detach()
    expected = nn.functional.interpolate(cam.relu()[None, None], (16, 16), mode="bilinear")
    torch.testing.assert_close(mine, expected)


def test_the_layer_of_class_activation_maps_is_chosen_and_named():
    explanation = explain(GradCam(), Classifier(), random_image(1, 2, 32, 32), ClassScore(0))
    assert explanation.facts["layer"] == "features.2"
    with pytest.raises(InputError, match=r"Similar names: .*features\.0"):
        explain(GradCam("featurs.0"), Classifier(), random_image(1, 2, 32, 32), ClassScore(0))


@pytest.mark.parametrize("method", [GradCam(), GradCamPlusPlus(), HiResCam()], ids=lambda m: m.name)
def test_class_activation_maps_of_windows_are_blended_as_predictions_are(method):
    network, x = small_unet(), random_image(1, 2, 20, 16)
    mine = explain(method, network, x, RegionScore(1, BOX), SIDES)
    layer = mine.facts["layer"]
    weights = torch.zeros(1, 1, 20, 16, dtype=torch.float64)
    weights[..., 3:14, 2:9] = 1 / (11 * 7)
    total = SIDES(torch.ones_like(weights), lambda w: w * 0 + 1)
    assert torch.allclose(total, torch.ones_like(total))
    from monai.data.utils import compute_importance_map

    importance = compute_importance_map((12, 12), mode="gaussian", dtype=torch.float64)[None, None]
    places = [(slice(i, i + 12), slice(j, j + 12)) for i in (0, 6, 8) for j in (0, 4)]
    a = torch.zeros_like(weights)
    for place in places:
        a[(..., *place)] += importance
    expected = torch.zeros_like(weights)
    for place in places:
        w = weights[(..., *place)] * importance / a[(..., *place)]
        if w.any():
            part = explain(
                type(method)(layer), network, x[(..., *place)], lambda o, w=w: (o[:, 1:2] * w).sum((1, 2, 3))
            )
            expected[(..., *place)] += part.attributions["image"] * importance / a[(..., *place)]
    torch.testing.assert_close(mine.attributions["image"], expected)


@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
def test_gradient_shap_states_the_error_of_its_sum():
    """Over many seeds, the gap is within one and three errors about as often as a normal variable."""
    network, x = small_unet(act="TANH"), random_image(2, 2, 20, 16)
    baseline = Samples(random_image(5, 2, 20, 16, seed=3))
    found = [explain(GradientShap(32, baseline, seed), network, x, RegionScore(1, BOX)) for seed in range(60)]
    sizes = torch.stack([e.delta.abs().max() / e.facts["error_of_sum"] for e in found])
    assert (sizes <= 1).double().mean() > 0.55
    assert (sizes <= 3).double().mean() > 0.95
    assert sizes.median() > 0.1
    assert "error_of_sum" not in explain(GradientShap(1), network, x, RegionScore(1, BOX)).facts


def test_facts_that_some_parts_lack_are_left_out():
    whole = add_up([{"passes": 2, "error_of_sum": 0.1, "kind": "a"}, {"passes": 1, "kind": "a"}], [0.5, 0.5])
    assert whole == {"passes": 1.5, "kind": "a"}
    both = add_up([{"error_of_sum": 0.1, "kind": "a"}, {"error_of_sum": 0.2, "kind": "b"}], [0.5, 0.5])
    assert both == {"error_of_sum": pytest.approx(0.3)}


def test_the_error_of_a_sum_that_was_cut_counts_what_differs_between_parts():
    """Of samples that rise along the way, a random few differ more than neighbors of all."""
    rising = [torch.tensor([float(i)]) for i in range(64)]
    assert _error_of_sum(rising, is_whole=True)["error_of_sum"] == pytest.approx((1 / 2 / 64) ** 0.5)
    few = rising[::8]
    assert _error_of_sum(few, is_whole=False)["error_of_sum"] == pytest.approx(
        float(torch.cat(few).std()) / 8**0.5
    )


# ----------------------------------------------------------------------------------------- adaptive integration


def test_adaptive_integration_meets_its_tolerance_and_reports_the_gap():
    network, x = small_unet(norm="INSTANCE"), random_image(2, 2, 20, 16)
    for tolerance in (0.05, 0.001):
        method = IntegratedGradients(tolerance=tolerance, baseline=Noise(), max_steps=2047)
        explanation = explain(method, network, x, RegionScore(1, BOX), SIDES)
        assert (explanation.gap <= tolerance).all()


def test_refinement_goes_where_the_gradient_jumps_and_equals_the_integral():
    """Of relu(x - 0.9) on the way from 0 to 2, all is decided at 0.45 of the path."""

    class Kink(nn.Module):
        def forward(self, x):
            return (x - torch.tensor([0.9, 0.3], dtype=x.dtype)).relu().sum(1, keepdim=True)

    x = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    explanation = explain(IntegratedGradients(baseline=0.0, tolerance=1e-4), Kink(), x)
    expected = torch.tensor([[1.1, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(explanation.attributions["input"], expected, rtol=0, atol=1e-3)
    assert explanation.facts["passes"] < 60


def test_a_gap_that_vanishes_by_cancellation_alone_does_not_end_refinement():
    """Seven periods add up at three nodes by luck, while each half of the path is far off."""

    class Wave(nn.Module):
        def forward(self, x):
            return x[:, :1] + torch.sin(14 * torch.pi * x[:, :1]) * 0.1 * x[:, 1:]

    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    explanation = explain(IntegratedGradients(baseline=0.0, tolerance=0.01), Wave(), x)
    points = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None].expand(-1, 2).clone().requires_grad_()
    (gradients,) = torch.autograd.grad(Wave()(points).sum(), points)
    expected = torch.trapezoid(gradients, dx=1 / 20000, dim=0)
    torch.testing.assert_close(explanation.attributions["input"][0], expected, rtol=0, atol=0.02)


def test_many_pieces_are_summed_up_on_the_way():
    network, x = small_unet(norm="INSTANCE"), random_image(1, 2, 20, 16)
    method = IntegratedGradients(tolerance=1e-9, baseline=Noise(), max_steps=201)
    fine = explain(IntegratedGradients(1001, baseline=Noise()), network, x, RegionScore(1, BOX))
    explanation = explain(method, network, x, RegionScore(1, BOX))
    assert explanation.facts["passes"] > 100
    error = (explanation.attributions["image"] - fine.attributions["image"]).norm()
    assert error < 0.01 * fine.attributions["image"].norm()


def test_a_smaller_tolerance_takes_more_passes_and_max_steps_ends_them():
    network, x = small_unet(), random_image(1, 2, 20, 16)
    passes = [
        explain(IntegratedGradients(tolerance=tolerance), network, x, RegionScore(1, BOX)).facts["passes"]
        for tolerance in (0.04, 0.0001)
    ]
    assert passes[0] < passes[1]
    with pytest.warns(CompletenessWarning, match=r"miss the change of the score by .*%.*Blur"):
        stopped = explain(
            IntegratedGradients(max_steps=3, baseline=0.0),
            small_unet(norm="INSTANCE"),
            x,
            RegionScore(1, BOX),
        )
    assert stopped.facts["passes"] == 3


def test_a_warning_says_what_was_measured_to_close_the_gap_and_it_does():
    network, x = small_unet(norm="INSTANCE"), random_image(1, 2, 20, 16)
    target = RegionScore(1, BOX)
    explainer = Explainer(target, IntegratedGradients(n_steps=3, baseline=0.0), progress=False)
    with pytest.warns(CompletenessWarning, match="Measured on this network: ") as caught:
        explainer(network, x)
    said = re.findall(r"(n_steps|baseline)=(.+?) leaves ([\d.]+)%", str(caught[0].message))
    setting, value, percent = said[-1]
    assert float(percent) <= 5.0
    cured = replace(explainer.attributor, **{setting: eval(value, vars(monai_xai))})
    assert float(explain(cured, network, x, target).gap) == pytest.approx(float(percent) / 100, abs=6e-4)


def test_a_gap_raises_on_request():
    network, x = small_unet(norm="INSTANCE"), random_image(1, 2, 20, 16)
    method = IntegratedGradients(n_steps=3, baseline=0.0)
    explainer = Explainer(RegionScore(1, BOX), method, progress=False, on_gap="raise")
    with pytest.raises(AttributionError, match="miss the change of the score"):
        explainer(network, x)
    with pytest.raises(InputError, match="choose 'warn' or 'raise'"):
        Explainer(RegionScore(1, BOX), method, on_gap="stop")


@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
def test_samples_are_averaged_over():
    network, x, values = small_unet(), random_image(1, 2, 16, 16), random_image(3, 2, 16, 16, seed=5)
    together = explain(IntegratedGradients(8, Samples(values)), network, x, RegionScore(1, BOX))
    single = [
        explain(IntegratedGradients(8, Constant(v[None])), network, x, RegionScore(1, BOX)) for v in values
    ]
    expected = torch.stack([s.attributions["image"] for s in single]).mean(0)
    torch.testing.assert_close(together.attributions["image"], expected)
    torch.testing.assert_close(
        together.baseline_score, torch.stack([s.baseline_score for s in single]).mean(0)
    )


# ------------------------------------------------------------------------------------- what methods have in common

METHODS = [
    Saliency(),
    InputXGradient(),
    IntegratedGradients(n_steps=4),
    GradientShap(n_samples=4),
    NoiseTunnel(Saliency(), n_samples=3),
    DeepLift(),
    GuidedBackprop(),
    FeatureAblation(Blocks(8)),
    Occlusion((2, 8, 8), (2, 8, 8)),
    GradCam(),
    GradCamPlusPlus(),
    HiResCam(),
]
DETERMINISTIC = [m for m in METHODS if not m.stochastic]


@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
@pytest.mark.parametrize("inferer", [None, SIDES], ids=["whole", "windows"])
@pytest.mark.parametrize("method", DETERMINISTIC, ids=lambda m: m.name)
def test_two_samples_at_once_equal_each_alone(method, inferer):
    network, x = small_unet(), random_image(2, 2, 20, 16)
    both = explain(method, network, x, RegionScore(1, Predicted()), inferer).attributions["image"]
    for i in range(2):
        alone = explain(method, network, x[i : i + 1], RegionScore(1, Predicted()), inferer).attributions[
            "image"
        ]
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
@pytest.mark.parametrize("method", [m for m in METHODS if m.stochastic], ids=lambda m: m.name)
def test_the_seed_decides_a_stochastic_method(method):
    from dataclasses import replace

    network, x = small_unet(), random_image(1, 2, 16, 16)
    first, again, other = (
        explain(m, network, x, RegionScore(1, BOX)) for m in (method, method, replace(method, seed=1))
    )
    assert torch.equal(first.attributions["image"], again.attributions["image"])
    assert not torch.equal(first.attributions["image"], other.attributions["image"])
    assert (first.seed, other.seed) == (0, 1)


@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_delta_is_reported_by_complete_methods_and_by_no_other(method):
    explanation = explain(method, small_unet(), random_image(1, 2, 16, 16), RegionScore(1, BOX))
    assert (explanation.delta is not None) == method.complete
    assert not explanation.attributions["image"].requires_grad


# --------------------------------------------------------------------------------------------------- refusals


class TwoEncoders(nn.Module):
    """CT and PET on two grids, fused late."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.ct, self.pet = nn.Conv2d(1, 3, 3, padding=1).double(), nn.Conv2d(1, 3, 3, padding=1).double()

    def forward(self, ct, pet):
        return (self.ct(ct).relu().mean((2, 3)) * self.pet(pet).relu().mean((2, 3))).sum(1, keepdim=True)


@pytest.mark.parametrize("branch", ["ct", "pet"])
@pytest.mark.parametrize("method", [GradCam, GradCamPlusPlus, HiResCam], ids=lambda m: m.__name__)
def test_the_map_of_a_branch_belongs_to_its_image(method, branch):
    inputs = {"ct": random_image(1, 1, 12, 10), "pet": random_image(1, 1, 6, 5)}
    explanation = Explainer(OutputScore(), method(branch))(TwoEncoders(), inputs)
    assert list(explanation.attributions) == [branch]
    assert explanation.attributions[branch].shape == inputs[branch].shape


def test_a_layer_that_sees_two_grids_is_refused():
    class Late(TwoEncoders):
        def __init__(self):
            super().__init__()
            self.last = nn.Identity()

        def forward(self, ct, pet):
            return self.last(super().forward(ct, pet)[..., None, None]).flatten(1)

    inputs = {"ct": random_image(1, 1, 12, 10), "pet": random_image(1, 1, 6, 5)}
    with pytest.raises(InputError, match=r"sees \['ct', 'pet'\].*layer of one branch"):
        Explainer(OutputScore(), GradCam("last"))(Late(), inputs)


def test_class_activation_maps_refuse_layers_of_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(2)

        def forward(self, x):
            return self.norm(x.flatten(2).mT).mT.reshape(x.shape)

    with pytest.raises(UnsupportedNetworkError, match="spatial activations"):
        explain(GradCam("norm"), Tokens().double(), random_image(1, 2, 16, 16), RegionScore(1, BOX))


def test_gradients_refuse_a_score_that_does_not_depend_on_the_input():
    class Frozen(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1).sum(1, keepdim=True)

    with pytest.raises(UnsupportedNetworkError, match="FeatureAblation"):
        explain(Saliency(), Frozen())
    assert explain(FeatureAblation(baseline=0.0), Frozen()).attributions["image"].any()


def test_a_feature_mask_need_not_be_contiguous_and_zero_effort_where_nothing_changes():
    network, x = LinearImage(SHAPE), random_image(1, *SHAPE)
    sparse = torch.zeros(1, 1, 6, 5, dtype=torch.long)
    sparse[..., 3:, :] = 700
    mine = explain(FeatureAblation(FeatureMask(sparse), baseline=0.0), network, x)
    contributions = (network.weight * x).detach()
    assert float(mine.attributions["image"][0, 0, 5, 0]) == pytest.approx(
        float(contributions[:, :, 3:].sum())
    )
    assert mine.facts["pieces"] == 2
    assert explain(FeatureAblation(baseline=x), network, x).facts["passes"] == 0
