"""Layers, neurons, class activation maps and coalitions: against closed forms, slow rewrites, and Captum."""

from __future__ import annotations

import itertools
import math

import captum.attr
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import ViT
from networks import LinearImage, random_image, small_unet
from torch import nn
from torch.nn import functional

from monai_xai import (
    AblationCam,
    AttentionRollout,
    Blocks,
    Box,
    Channels,
    ClassScore,
    Constant,
    Deconvolution,
    DeepLift,
    EigenCam,
    Explainer,
    FeatureAblation,
    FeatureMask,
    FeaturePermutation,
    FullGrad,
    GradCam,
    GuidedBackprop,
    GuidedGradCam,
    HiResCam,
    InputError,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    KernelShap,
    Layer,
    LayerActivation,
    LayerCam,
    LayerConductance,
    Lime,
    Neuron,
    Noise,
    OutputScore,
    RegionScore,
    Rise,
    Saliency,
    ScoreCam,
    SegXResCam,
    ShapleyValues,
    ShapleyValueSampling,
    UnsupportedInfererError,
    UnsupportedNetworkError,
    XGradCam,
)

pytestmark = pytest.mark.filterwarnings("ignore:Setting", "ignore:Input Tensor", "ignore:.*gradient hook")
BOX = RegionScore(1, Box((3, 2), (14, 9)))
LAYER = "model.1.submodule"
SIDES = SlidingWindowInferer(12, overlap=0.5, mode="gaussian")


def explain(method, network, x, target=BOX, inferer=None):
    return Explainer(target, method, inferer)(network, x)


def image_map(method, network, x, target=BOX, inferer=None):
    return explain(method, network, x, target, inferer).attributions["image"]


@pytest.fixture
def network():
    return small_unet(channels=2)


@pytest.fixture
def x():
    return random_image(1, 2, 16, 16)


def scores(network):
    return lambda z: network(z)[:, 1, 3:14, 2:9].mean((1, 2))


class Wrapped(nn.Module):
    """The region score as a module, for Captum."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z):
        return scores(self.network)(z)


def layer_of(network, name=LAYER):
    return dict(network.named_modules())[name]


def activation_and_gradient(network, x):
    found = []
    handle = layer_of(network).register_forward_hook(lambda m, a, output: found.append(output))
    score = scores(network)(x)
    handle.remove()
    return found[0].detach(), torch.autograd.grad(score.sum(), found[0])[0]


# --------------------------------------------------------------------------------------------------- maps of classes


def slow_cam(kind, activation, gradient):
    """The formula of each paper, channel by channel."""
    total = torch.zeros_like(activation[:, 0])
    for k in range(activation.shape[1]):
        a, g = activation[:, k], gradient[:, k]
        if kind is XGradCam:
            total += a * (a * g).sum() / a.sum()
        elif kind is LayerCam:
            total += a * g.clamp(min=0)
        elif kind is HiResCam:
            total += a * g
    return total.clamp(min=0)[:, None]


@pytest.mark.parametrize("kind", [XGradCam, LayerCam, HiResCam])
def test_maps_equal_their_formulas(kind, network, x):
    slow = functional.interpolate(
        slow_cam(kind, *activation_and_gradient(network, x)), (16, 16), mode="bilinear"
    )
    torch.testing.assert_close(image_map(kind(LAYER), network, x), slow)


def test_eigen_cam_is_the_first_component_whatever_the_score(network, x):
    activation, _ = activation_and_gradient(network, x)
    flat = activation[0].flatten(1)
    values, vectors = torch.linalg.eigh(flat.T @ flat)
    component = vectors[:, -1] * values[-1].sqrt()
    component = component * torch.sign((component * flat.mean(0)).sum())
    slow = functional.interpolate(
        component.reshape(1, 1, *activation.shape[2:]).relu(), (16, 16), mode="bilinear"
    )
    torch.testing.assert_close(image_map(EigenCam(LAYER), network, x), slow, rtol=1e-6, atol=1e-9)
    other = RegionScore(0, Box((0, 0), (4, 4)))
    torch.testing.assert_close(image_map(EigenCam(LAYER), network, x, other), slow, rtol=1e-6, atol=1e-9)


def test_pooled_gradients_lie_between_grad_cam_and_hires_cam(network, x):
    torch.testing.assert_close(
        image_map(SegXResCam(LAYER, pool_size=1), network, x), image_map(HiResCam(LAYER), network, x)
    )
    torch.testing.assert_close(
        image_map(SegXResCam(LAYER, pool_size=64), network, x), image_map(GradCam(LAYER), network, x)
    )
    with pytest.raises(InputError, match="pool_mode"):
        SegXResCam(LAYER, pool_mode="median")


def test_ablation_cam_equals_a_slow_rewrite(network, x):
    activation, _ = activation_and_gradient(network, x)
    score = scores(network)(x)
    total = torch.zeros_like(activation[:, 0])
    for k in range(activation.shape[1]):
        without = activation.clone()
        without[:, k] = 0
        handle = layer_of(network).register_forward_hook(lambda m, a, o, new=without: new)
        total += activation[:, k] * ((score - scores(network)(x)) / score).detach()
        handle.remove()
    slow = functional.interpolate(total.clamp(min=0)[:, None], (16, 16), mode="bilinear")
    torch.testing.assert_close(image_map(AblationCam(LAYER), network, x), slow)


def test_score_cam_equals_a_slow_rewrite(network, x):
    activation, _ = activation_and_gradient(network, x)
    fine = functional.interpolate(activation, (16, 16), mode="bilinear")
    gains = []
    for k in range(fine.shape[1]):
        mask = (fine[:, k : k + 1] - fine[:, k].min()) / (fine[:, k].max() - fine[:, k].min())
        gains.append(float((scores(network)(x * mask) - scores(network)(x * 0)).detach()))
    weights = torch.tensor(gains, dtype=torch.float64).softmax(0)
    total = sum(w * activation[:, k : k + 1] for k, w in enumerate(weights)).relu()
    slow = functional.interpolate(total, (16, 16), mode="bilinear")
    torch.testing.assert_close(image_map(ScoreCam(LAYER), network, x), slow)


def test_guided_grad_cam_is_the_product(network, x):
    product = image_map(GradCam(LAYER), network, x) * image_map(GuidedBackprop(), network, x)
    torch.testing.assert_close(image_map(GuidedGradCam(LAYER), network, x), product)


@pytest.mark.parametrize(
    "method", [XGradCam(), LayerCam(), EigenCam(), SegXResCam(), AblationCam(), ScoreCam()]
)
def test_maps_are_blended_over_windows(method, network, x):
    found = image_map(method, network, x, inferer=SIDES)
    assert found.shape == (1, 1, 16, 16)
    assert (found >= 0).all()
    assert found.any()


# --------------------------------------------------------------------------------------------------- layers and neurons

LAYER_METHODS = {
    "gradient x activation": (InputXGradient(), captum.attr.LayerGradientXActivation, {}),
    "integrated gradients": (
        IntegratedGradients(n_steps=50, baseline=Constant(0.3)),
        captum.attr.LayerIntegratedGradients,
        {"baselines": 0.3, "n_steps": 200},
    ),
    "deep lift": (DeepLift(Constant(0.3)), captum.attr.LayerDeepLift, {"baselines": 0.3}),
}


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_a_method_at_a_layer_equals_captum(name, network, x):
    method, theirs, options = LAYER_METHODS[name]
    options = {k: torch.full_like(x, v) if k == "baselines" else v for k, v in options.items()}
    explanation = explain(Layer(LAYER, method), network, x)
    expected = theirs(Wrapped(network), layer_of(network)).attribute(x, **options)
    torch.testing.assert_close(explanation.attributions[LAYER], expected.detach(), rtol=1e-3, atol=1e-5)


def test_layer_activations_are_what_the_layer_gives(network, x):
    activation, _ = activation_and_gradient(network, x)
    explanation = explain(LayerActivation(LAYER), network, x)
    torch.testing.assert_close(explanation.attributions[LAYER], activation)


def test_complete_methods_at_a_cut_of_the_network_add_up():
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 3, 3), nn.SiLU(), nn.Conv2d(3, 2, 3), nn.SiLU()]
    network, target = nn.Sequential(*parts).double(), RegionScore(1, Box((2, 2), (9, 9)))
    for method in (
        Layer("1", DeepLift(Noise())),
        Layer("1", IntegratedGradients(baseline=Noise(), tolerance=1e-4)),
        LayerConductance(layer="1", n_steps=200, baseline=Noise()),
    ):
        explanation = explain(method, network, random_image(1, 2, 14, 14), target)
        change = float(explanation.score - explanation.baseline_score)
        total = float(explanation.attributions["1"].sum())
        assert total == pytest.approx(change, rel=2e-3)
        assert explanation.attributions["1"].shape == (1, 3, 12, 12)


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=0.02, atol=float(theirs.abs().max()) / 50)


def test_conductance_and_influence_equal_captum(network, x):
    start = torch.full_like(x, 0.3)
    layer = layer_of(network)
    mine = explain(LayerConductance(layer=LAYER, n_steps=400, baseline=Constant(0.3)), network, x)
    theirs = captum.attr.LayerConductance(Wrapped(network), layer).attribute(x, start, n_steps=800)
    close(mine.attributions[LAYER], theirs.detach())
    mine = explain(InternalInfluence(layer=LAYER, n_steps=400, baseline=Constant(0.3)), network, x)
    theirs = captum.attr.InternalInfluence(Wrapped(network), layer).attribute(x, start, n_steps=800)
    close(mine.attributions[LAYER], theirs.detach())


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        (Saliency(), captum.attr.NeuronGradient),
        (GuidedBackprop(), captum.attr.NeuronGuidedBackprop),
        (Deconvolution(), captum.attr.NeuronDeconvolution),
    ],
    ids=["gradient", "guided", "deconvolution"],
)
def test_a_method_for_a_neuron_equals_captum(method, theirs, network, x):
    neuron = (2, 3, 4)
    expected = theirs(Wrapped(network), layer_of(network)).attribute(x, neuron)
    torch.testing.assert_close(image_map(Neuron(LAYER, neuron, method), network, x), expected)


def test_a_neuron_is_explained_by_complete_methods(network, x):
    explanation = explain(Neuron(LAYER, 2, DeepLift(Noise())), network, x)
    activation, _ = activation_and_gradient(network, x)
    assert float(explanation.score) == pytest.approx(float(activation[0, 2].mean()))
    assert abs(float(explanation.delta)) < 1e-9


def test_layers_that_do_not_fit_are_named(network, x):
    with pytest.raises(InputError, match=r"no layer 'model.1.submodul'.*model\.1\.submodule"):
        explain(Layer("model.1.submodul"), network, x)
    with pytest.raises(InputError, match=r"index=\(9,\).*\(8, 8, 8\)"):
        explain(Neuron(LAYER, 9), network, x)
    with pytest.raises(UnsupportedInfererError, match="every window"):
        explain(Layer(LAYER), network, x, inferer=SIDES)
    with pytest.raises(InputError, match="dotted name"):
        Layer()


# --------------------------------------------------------------------------------------------------- full gradients


@pytest.mark.parametrize(
    "options",
    [{}, {"act": "PRELU", "norm": "INSTANCE"}, {"act": "SWISH", "norm": ("GROUP", {"num_groups": 2})}],
    ids=["relu", "prelu instance", "swish group"],
)
def test_full_gradients_sum_to_the_score(options, x):
    for inferer in (None, SIDES):
        explanation = explain(FullGrad(), small_unet(channels=2, **options), x, inferer=inferer)
        total = float(explanation.attributions["image"].sum()) + explanation.facts["without_place"]
        assert total == pytest.approx(float(explanation.score), rel=1e-9)


def test_full_gradients_know_of_tokens_and_borders_that_do_not_depend_on_the_input(transformer):
    x = random_image(1, 1, 32, 32)
    explanation = explain(FullGrad(), transformer, x, ClassScore(1, head=0))
    total = float(explanation.attributions["image"].sum()) + explanation.facts["without_place"]
    assert total == pytest.approx(float(explanation.score), rel=1e-9)
    network = nn.Sequential(nn.ConstantPad2d(1, 3.0), nn.Conv2d(1, 1, 3)).double()
    explanation = explain(FullGrad(), network, x, RegionScore(0, Box((0, 0), (6, 6))))
    total = float(explanation.attributions["image"].sum()) + explanation.facts["without_place"]
    assert total == pytest.approx(float(explanation.score), rel=1e-9)


def test_rise_masks_vectors_entry_by_entry():
    class Both(nn.Module):
        def forward(self, image, vector):
            return image.mean((1, 2, 3))[:, None] + vector[:, 1:2]

    inputs = {
        "image": random_image(1, 1, 8, 8),
        "vector": torch.tensor([[5.0, 5.0, 5.0]], dtype=torch.float64),
    }
    found = Explainer(OutputScore(), Rise(300, baseline=0.0))(Both(), inputs).attributions["vector"][0]
    assert float(found[1]) > 5 * max(abs(float(found[0])), abs(float(found[2])))


def test_full_gradients_put_a_bias_where_it_is():
    layer = nn.Conv2d(1, 1, 1).double()
    layer.weight.data[:], layer.bias.data[:] = 2.0, 3.0
    x, target = random_image(1, 1, 6, 6), RegionScore(0, Box((1, 1), (3, 4)))
    slow = torch.zeros_like(x)
    slow[..., 1:3, 1:4] = (2 * x[..., 1:3, 1:4] + 3) / 6
    torch.testing.assert_close(image_map(FullGrad(), layer, x, target), slow)


# --------------------------------------------------------------------------------------------------- attention


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return ViT(
        *(1, (32, 32), (8, 8)),
        **{"hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 3, "spatial_dims": 2},
        **{"classification": True, "num_classes": 3, "save_attn": True},
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
def test_attention_rollout_equals_a_slow_rewrite(is_weighted, transformer):
    x = random_image(1, 1, 32, 32)
    found = image_map(AttentionRollout(is_weighted), transformer, x, ClassScore(1, head=0))
    maps = []
    original = torch.softmax

    class Keep(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") == "softmax":
                maps.append(result)
            return result

    assert original is torch.softmax
    with Keep():
        score = transformer(x)[0][0, 1]
    flow = torch.eye(17, dtype=torch.float64)
    for attention, gradient in zip(maps, torch.autograd.grad(score, maps), strict=True):
        step = (attention * gradient).clamp(min=0).mean(1)[0] if is_weighted else attention.mean(1)[0]
        step = step.detach() + torch.eye(17)
        flow = (step if is_weighted else step / step.sum(1, keepdim=True)) @ flow
    slow = flow[0, 1:].reshape(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(found, slow)


def test_attention_rollout_refuses_networks_without_attention(network, x):
    with pytest.raises(UnsupportedNetworkError, match="no attention"):
        explain(AttentionRollout(), network, x)


# --------------------------------------------------------------------------------------------------- coalitions

QUARTERS = Blocks(8)


def game(network, x, start):
    """Return the score by coalition of the four quarters of an image of 16 x 16."""

    def value(members):
        mixed = start.clone()
        for i, (r, c) in enumerate(itertools.product((0, 8), (0, 8))):
            if i in members:
                mixed[..., r : r + 8, c : c + 8] = x[..., r : r + 8, c : c + 8]
        return float(scores(network)(mixed).detach())

    return value


def slow_shapley(value, count):
    found = []
    for i in range(count):
        others, total = [j for j in range(count) if j != i], 0.0
        for size in range(count):
            for members in itertools.combinations(others, size):
                weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
                total += weight * (value({*members, i}) - value(set(members)))
        found.append(total)
    return found


def quarters(found):
    return [float(found[0, 0, r, c]) for r, c in itertools.product((0, 8), (0, 8))]


@pytest.mark.parametrize(
    "method",
    [
        ShapleyValues(QUARTERS, Constant(0.3)),
        ShapleyValueSampling(QUARTERS, Constant(0.3), n_samples=3000),
        KernelShap(QUARTERS, Constant(0.3), n_samples=4000),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("inferer", [None, SIDES], ids=["whole", "windows"])
def test_shapley_values_equal_a_slow_rewrite(method, inferer, network, x):
    stitched = network if inferer is None else lambda z: inferer(z, network)
    slow = slow_shapley(game(stitched, x, torch.full_like(x, 0.3)), 4)
    explanation = explain(method, network, x, inferer=inferer)
    tolerance = 1e-9 if isinstance(method, ShapleyValues) else 0.02 * max(map(abs, slow))
    assert quarters(explanation.attributions["image"]) == pytest.approx(slow, abs=tolerance)
    assert explanation.facts["residual"] < 1e-9


def test_shapley_values_equal_captum(network, x):
    mask = torch.arange(4).reshape(2, 2).repeat_interleave(8, 0).repeat_interleave(8, 1)[None, None]
    theirs = captum.attr.ShapleyValues(scores(network)).attribute(
        x, torch.full_like(x, 0.3), feature_mask=mask
    )
    torch.testing.assert_close(
        image_map(ShapleyValues(QUARTERS, 0.3), network, x), theirs.detach().double(), rtol=1e-5, atol=1e-7
    )
    with pytest.raises(InputError, match="2\\^256"):
        explain(ShapleyValues(Blocks(1)), network, x)


@pytest.mark.parametrize(
    "method",
    [
        ShapleyValues(Channels(), 0.0),
        ShapleyValueSampling(Channels(), 0.0),
        KernelShap(Channels(), 0.0, n_samples=20),
    ],
    ids=lambda m: m.name,
)
def test_coalitions_on_a_linear_network_give_its_contributions(method):
    network, x = LinearImage((2, 6, 5)), random_image(2, 2, 6, 5)
    found = image_map(method, network, x, OutputScore())
    contributions = (network.weight * x).sum((2, 3)).detach()
    torch.testing.assert_close(found[:, :, 0, 0], contributions)


def test_lime_on_a_linear_network_does_not_shrink():
    network, x = LinearImage((2, 6, 5)), random_image(2, 2, 6, 5)
    explanation = explain(Lime(Channels(), 0.0, ridge=1e-12), network, x, OutputScore())
    contributions = (network.weight * x).sum((2, 3)).detach()
    torch.testing.assert_close(
        explanation.attributions["image"][:, :, 0, 0], contributions, rtol=1e-6, atol=1e-6
    )
    assert explanation.facts["r_squared"] == pytest.approx(1)


def test_rise_finds_the_voxels_of_a_linear_network():
    network, x = LinearImage((1, 16, 16)), torch.ones(1, 1, 16, 16, dtype=torch.float64)
    network.weight.data[:] = 0
    network.weight.data[..., 2:6, 9:14] = 1
    explanation = explain(Rise(2000, cells=8, baseline=0.0), network, x, OutputScore())
    found = explanation.attributions["image"][0, 0]
    assert float(found[2:6, 9:14].mean()) > 5 * float(found.abs().mean())
    again = explain(Rise(2000, cells=8, baseline=0.0), network, x, OutputScore())
    torch.testing.assert_close(found, again.attributions["image"][0, 0], rtol=0, atol=0)


def test_feature_permutation_needs_a_batch_and_exchanges_every_sample():
    network, x = LinearImage((2, 6, 5)), random_image(3, 2, 6, 5)
    method = FeaturePermutation(Channels())
    order = torch.tensor(method._exchange(3))
    assert (order != torch.arange(3)).all()
    contributions = (network.weight * (x - x[order])).sum((2, 3)).detach()
    torch.testing.assert_close(image_map(method, network, x, OutputScore())[:, :, 0, 0], contributions)
    with pytest.raises(InputError, match="batch of two"):
        explain(method, network, x[:1], OutputScore())


def test_sparse_feature_numbers_cost_nothing(network, x):
    numbers = torch.zeros(1, 1, 16, 16, dtype=torch.long)
    numbers[..., 8:, :] = 700
    explanation = explain(ShapleyValues(FeatureMask(numbers), 0.3), network, x)
    assert explanation.facts["pieces"] == 2
    assert explanation.facts["passes"] <= 5  # three of four coalitions at most, and two again for the check


def test_windows_that_do_not_see_a_feature_are_not_computed_again(network):
    x = random_image(1, 2, 32, 32)
    whole = explain(ShapleyValues(Blocks(16), 0.3), network, x, inferer=SIDES)
    passes = whole.facts["passes"]
    assert passes < 8  # of 16 coalitions
    ablated = explain(FeatureAblation(Blocks(16), 0.3), network, x, inferer=SIDES)
    assert ablated.facts["pieces"] == 4
