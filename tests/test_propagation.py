"""Methods that change backpropagation: against closed forms, slow rewrites of papers, and Captum where it is right."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule
from captum.attr._utils.lrp_rules import EpsilonRule as CaptumEpsilonRule
from monai.inferers import SlidingWindowInferer
from monai.networks.blocks.activation import Mish, Swish
from monai.networks.nets import BasicUNet, DenseNet, DynUNet, ResNet, SegResNet
from networks import random_image, small_unet
from torch import nn
from torch.nn import functional

from monai_xai import (
    LRP,
    AlphaBetaRule,
    Box,
    BoxRule,
    ClassScore,
    Constant,
    Deconvolution,
    DeepLift,
    EpsilonRule,
    ExcitationBackprop,
    Explainer,
    FlatRule,
    FunctionTarget,
    GammaRule,
    GuidedBackprop,
    InputXGradient,
    Noise,
    OutputScore,
    RegionScore,
    Saliency,
    UnsupportedNetworkError,
    ZPlusRule,
)
from monai_xai.operations import Watch, watched

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting", "ignore:Input Tensor", "ignore:.*gradient hook"
)  # of Captum, which is a reference here
BOX = RegionScore(1, Box((3, 2), (14, 9)))


class Called(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def weigh(values):
    return values @ torch.arange(1.0, values.shape[1] + 1, dtype=values.dtype)[:, None]


def attribute(method, network, x, target=None, **options):
    return Explainer(target or OutputScore(), method, **options)(network, x)


def maps(method, network, x, target=None, **options):
    return attribute(method, network, x, target, **options).attributions["image" if x.ndim > 2 else "input"]


def calibrated(network, shape):
    torch.manual_seed(0)
    network = network.double()
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.randn(4, *shape, dtype=torch.float64))
    return network.eval()


def make_resnet():
    torch.manual_seed(0)
    network = ResNet("basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=2, n_input_channels=1, num_classes=3)
    return calibrated(network, (1, 32, 32))


def make_densenet():
    torch.manual_seed(0)
    network = DenseNet(2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2))
    return calibrated(network, (1, 32, 32))


NETWORKS = {
    "unet": lambda: small_unet(channels=1),
    "unet prelu instance": lambda: small_unet(channels=1, act="PRELU", norm="INSTANCE"),
    "unet gelu group": lambda: small_unet(channels=1, act="GELU", norm=("GROUP", {"num_groups": 2})),
    "unet swish": lambda: small_unet(channels=1, act="SWISH"),
    "unet mish": lambda: small_unet(channels=1, act="MISH"),
    "pooling and skips, in place": lambda: BasicUNet(2, 1, 2, (4, 4, 8, 8, 8, 4)).double().eval(),
    "one activation for all": lambda: SegResNet(2, init_filters=8, in_channels=1, out_channels=2).double().eval(),
    "deep supervision": lambda: DynUNet(
        2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 4, 8], deep_supervision=True
    ).double().eval(),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- DeepLift


@pytest.mark.parametrize("baseline", [Constant(0.0), Noise()], ids=["constant", "noise"])
@pytest.mark.parametrize("name", NETWORKS)
def test_deep_lift_adds_up_on_every_segmentation_network(name, baseline):
    torch.manual_seed(0)
    explanation = attribute(DeepLift(baseline), NETWORKS[name](), random_image(2, 1, 32, 32), BOX)
    change = explanation.score - explanation.baseline_score
    assert (explanation.delta.abs() <= 1e-9 * change.abs() + 1e-13 * explanation.score.abs()).all()


@pytest.mark.parametrize("baseline", [Constant(0.0), Noise()], ids=["constant", "noise"])
@pytest.mark.parametrize("make", [make_resnet, make_densenet])
def test_deep_lift_adds_up_on_classification_networks(make, baseline):
    explanation = attribute(DeepLift(baseline), make(), random_image(1, 1, 32, 32), ClassScore(1))
    assert abs(float(explanation.delta)) <= 1e-9 * abs(float(explanation.score - explanation.baseline_score))


@pytest.mark.parametrize("act", ["RELU", "ELU", "LEAKYRELU"])
def test_deep_lift_equals_captum_where_that_adds_up(act):
    network, x = small_unet(channels=1, act=act), random_image(1, 1, 16, 16)
    wrapped = Called(lambda z: network(z)[:, 1, 3:14, 2:9].mean((1, 2)))
    wrapped.network = network
    theirs = captum.attr.DeepLift(wrapped).attribute(x, torch.full_like(x, 0.3))
    torch.testing.assert_close(maps(DeepLift(Constant(0.3)), network, x, BOX), theirs, rtol=1e-6, atol=1e-9)


def test_deep_lift_equals_captum_through_max_pooling():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(50, 2)
    )
    network, x = network.double(), random_image(1, 1, 16, 16)
    theirs = captum.attr.DeepLift(network).attribute(x, torch.zeros_like(x), target=1)
    torch.testing.assert_close(maps(DeepLift(0.0), network, x, OutputScore(1)), theirs, rtol=1e-6, atol=1e-9)


def test_deep_lift_shares_a_product_by_the_middle_of_each_factor():
    x = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    found = maps(DeepLift(1.0), Called(lambda z: z[:, :1] * z[:, 1:]), x)
    torch.testing.assert_close(found, torch.tensor([[1.0 * 3.0, 4.0 * 1.5]], dtype=torch.float64))


def test_deep_lift_of_a_quotient_is_that_of_a_product_with_the_inverse():
    x = torch.tensor([[2.0, 4.0]], dtype=torch.float64)
    found = maps(DeepLift(1.0), Called(lambda z: z[:, :1] / z[:, 1:]), x)
    torch.testing.assert_close(found, torch.tensor([[1.0 * 0.625, -0.75 * 1.5]], dtype=torch.float64))


def test_deep_lift_of_the_softmax_is_its_closed_form():
    x, start = random_image(1, 4), random_image(1, 4, seed=1)
    network = Called(lambda z: functional.softmax(z, 1)[:, 2:3])
    p, q = x.softmax(1)[0], start.softmax(1)[0]
    mean = (p - q) / (p.log() - q.log())
    change = (x - start)[0]
    slow = torch.stack([-mean[2] * mean[j] / mean.sum() * change[j] for j in range(4)])
    slow[2] += mean[2] * change[2]
    found = maps(DeepLift(Constant(start)), network, x)[0]
    torch.testing.assert_close(found, slow)
    assert float(found.sum()) == pytest.approx(float(p[2] - q[2]))


def test_deep_lift_of_a_norm_is_its_closed_form():
    x, start = random_image(1, 5), random_image(1, 5, seed=1)
    network = Called(lambda z: functional.layer_norm(z, (5,))[:, 1:2])
    c1, c0 = x[0] - x.mean(), start[0] - start.mean()
    s1, s0 = (c1.square().mean() + 1e-5).sqrt(), (c0.square().mean() + 1e-5).sqrt()
    middle = (s1**2 * c0[1] + s0**2 * c1[1]) / (s1**2 + s0**2)
    slow = torch.zeros(5, dtype=torch.float64)
    for j in range(5):
        for k in range(5):  # voxel j moves every centered value k
            moved = (float(j == k) - 0.2) * float(x[0, j] - start[0, j])
            secant = (1 / s1 - 1 / s0) / (s1**2 - s0**2)
            slow[j] += float(k == 1) * moved * (s1 + s0) / (s1**2 + s0**2)
            slow[j] += middle * secant * (c1[k] + c0[k]) * moved / 5
    torch.testing.assert_close(maps(DeepLift(Constant(start)), network, x)[0], slow)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: functional.adaptive_max_pool2d(z, 2),
        lambda z: z.amax((2, 3)),
        lambda z: functional.scaled_dot_product_attention(z, z, z),
        lambda z: torch.einsum("nchw,ndhw->ncd", z, z),
        lambda z: z.relu_().mul_(2).add_(1),
        lambda z: z**2 + 1 / (2 + z.sigmoid()),
        lambda z: functional.log_softmax(z, 1),
        lambda z: functional.group_norm(z, 2),
        lambda z: z.std((2, 3)) + z.var((2, 3), correction=0),
        lambda z: functional.rms_norm(z, (6,)),
    ],
    ids=[
        "adaptive max",
        "amax",
        "attention",
        "einsum",
        "in place",
        "arithmetic",
        "log-softmax",
        "group",
        "deviation",
        "rms",
    ],
)
def test_deep_lift_adds_up_through(function):
    network = Called(lambda z: weigh(function(z * 1.0).flatten(1) ** 2))
    explanation = attribute(DeepLift(Noise()), network, random_image(1, 2, 6, 6))
    change = float(explanation.score - explanation.baseline_score)
    assert float(explanation.delta) == pytest.approx(0, abs=1e-9 * abs(change))


def test_deep_lift_adds_up_through_multi_head_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    network = Called(lambda z: attention(z, z, z, need_weights=False)[0].flatten(1).sum(1, keepdim=True))
    network.attention = attention
    explanation = attribute(DeepLift(Noise()), network, random_image(1, 3, 4))
    assert abs(float(explanation.delta)) < 1e-9
    direct = attention(*[random_image(1, 3, 4)] * 3, need_weights=False)[0].detach().sum()
    assert float(explanation.score) == pytest.approx(float(direct))


def test_deep_lift_through_sliding_windows_adds_up():
    network = small_unet(channels=1, act="PRELU", norm="INSTANCE")
    inferer = SlidingWindowInferer(16, overlap=0.5, mode="gaussian")
    explanation = attribute(DeepLift(Noise()), network, random_image(2, 1, 24, 24), BOX, inferer=inferer)
    change = explanation.score - explanation.baseline_score
    assert (explanation.delta.abs() <= 1e-9 * change.abs()).all()


def test_deep_lift_explains_probabilities():
    target = FunctionTarget(lambda output: output.softmax(1)[:, 1, 3:14, 2:9].mean((1, 2)))
    explanation = attribute(DeepLift(Noise()), small_unet(channels=1), random_image(1, 1, 16, 16), target)
    assert abs(float(explanation.delta)) < 1e-9


def test_deep_lift_refuses_what_it_has_no_rule_for_and_says_where():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.LSTM(2, 2, batch_first=True).double()

        def forward(self, x):
            return self.memory(x)[0].flatten(1)

    with pytest.raises(UnsupportedNetworkError, match=r"no rule for lstm in 'memory'.*IntegratedGradients"):
        attribute(DeepLift(), Recurrent(), random_image(1, 3, 2))


def test_a_division_that_rounds_is_not_taken_for_a_linear_one():
    network = Called(lambda z: (torch.div(z, 0.5, rounding_mode="floor") + z).sum(1, keepdim=True))
    with pytest.raises(UnsupportedNetworkError, match="no rule for div"):
        attribute(DeepLift(Constant(-1.0)), network, random_image(1, 2))


def test_deep_lift_refuses_a_path_that_depends_on_the_data():
    network = Called(
        lambda z: z.relu().sum(1, keepdim=True) if z.sum() > 0 else z.sigmoid().sum(1, keepdim=True)
    )
    with pytest.raises(UnsupportedNetworkError, match="another path"):
        attribute(DeepLift(Constant(-1.0)), network, random_image(1, 2).abs())


def test_deep_lift_refuses_gradient_checkpointing():
    network = Called(
        lambda z: torch.utils.checkpoint.checkpoint(
            lambda y: y.relu().sum(1, keepdim=True), z, use_reentrant=True
        )
    )
    with pytest.raises(UnsupportedNetworkError, match="use_checkpoint=False"):
        attribute(DeepLift(), network, random_image(1, 2))


# --------------------------------------------------------------------------------------------------- guided


@pytest.mark.parametrize(
    ("method", "theirs"),
    [(GuidedBackprop(), captum.attr.GuidedBackprop), (Deconvolution(), captum.attr.Deconvolution)],
    ids=["guided", "deconvolution"],
)
def test_rectified_gradients_equal_captum_on_relu_modules(method, theirs):
    network, x = small_unet(channels=1), random_image(1, 1, 16, 16)
    wrapped = Called(lambda z: network(z)[:, 1, 3:14, 2:9].mean((1, 2)))
    wrapped.network = network
    torch.testing.assert_close(maps(method, network, x, BOX), theirs(wrapped).attribute(x))


RECTIFIED = {
    "relu": (functional.relu, lambda x: (x > 0).to(x)),
    "in place": (torch.relu_, lambda x: (x > 0).to(x)),
    "leaky": (functional.leaky_relu, lambda x: torch.where(x > 0, 1.0, 0.01).to(x)),
    "silu": (functional.silu, lambda x: x.sigmoid() * (1 + x * (1 - x.sigmoid()))),
    "elu": (functional.elu, lambda x: torch.where(x > 0, 1.0, x.exp())),
    "swish": (Swish(), lambda x: x.sigmoid() * (1 + x * (1 - x.sigmoid()))),
}


@pytest.mark.parametrize("name", RECTIFIED)
def test_rectified_gradients_are_their_definition(name):
    function, slope = RECTIFIED[name]
    first, second, x = random_image(4, 3), random_image(4, 4, seed=1), random_image(1, 3, seed=2)
    network = Called(lambda z: function(function(z @ first.T) @ second.T).sum(1, keepdim=True))
    if isinstance(function, nn.Module):
        network.activation = function
    hidden = x @ first.T
    above = function(hidden.clone()) @ second.T
    guided = (slope(above) @ second).relu() * slope(hidden) @ first
    deconvolved = (torch.ones_like(above) @ second).relu() @ first
    torch.testing.assert_close(maps(GuidedBackprop(), network, x), guided)
    torch.testing.assert_close(maps(Deconvolution(), network, x), deconvolved)


@pytest.mark.parametrize("act", ["PRELU", "LEAKYRELU", "ELU", "GELU", "SWISH", "MEMSWISH", "MISH"])
def test_guided_backprop_is_not_the_gradient_silently(act):
    network, x = small_unet(channels=1, act=act), random_image(1, 1, 16, 16)
    guided, plain = maps(GuidedBackprop(), network, x, BOX), maps(Saliency(), network, x, BOX)
    assert float((guided - plain).norm()) > 0.1 * float(plain.norm())


def _part_in_place(h):
    h[:, :2].relu_()
    return h


def _twice_in_place(h):
    h.relu_().sub_(0.2)
    return functional.leaky_relu_(h, 0.3)


def _alias(h):
    other = h
    h.relu_()
    return h * 2 + other


IN_PLACE = {
    "part": (_part_in_place, lambda h: torch.cat([h[:, :2].relu(), h[:, 2:]], 1)),
    "twice": (_twice_in_place, lambda h: functional.leaky_relu(h.relu() - 0.2, 0.3)),
    "alias": (_alias, lambda h: h.relu() * 3),
    "negative slope": (lambda h: functional.leaky_relu_(h, -0.2), lambda h: functional.leaky_relu(h, -0.2)),
    "silu": (lambda h: functional.silu(h, inplace=True), functional.silu),
}


@pytest.mark.parametrize("form", IN_PLACE)
@pytest.mark.parametrize("method", [GuidedBackprop(), Deconvolution()], ids=lambda m: m.name)
def test_rectifiers_in_place_are_as_those_that_are_not(method, form):
    torch.manual_seed(0)
    weights, x = torch.randn(5, 4, dtype=torch.float64), random_image(1, 5)
    found, wanted = (
        maps(method, Called(lambda z, act=act: act(z @ weights + 0).square().sum(1, keepdim=True)), x)
        for act in IN_PLACE[form]
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", [GuidedBackprop(), Deconvolution()], ids=lambda m: m.name)
def test_rectified_gradients_refuse_a_network_without_rectifiers(method):
    with pytest.raises(UnsupportedNetworkError, match=r"calls none.*plain gradient"):
        attribute(method, nn.Linear(3, 1).double(), random_image(1, 3))
    with pytest.raises(UnsupportedNetworkError, match="maximum"):
        attribute(method, Called(lambda z: torch.maximum(z, z * 0).sum(1, keepdim=True)), random_image(1, 3))


class Written(nn.Module):
    """What comes after a convolution, as it is written in place or not."""

    def __init__(self, form, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 2, 3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        self.register_buffer("padded", torch.zeros(1, 3, 10, 10))
        self.form, self.in_place = form, in_place

    def forward(self, x):
        return self.last(WRITTEN[self.form](self, self.first(x), self.in_place)).mean((2, 3))


def _product_then_rectified(net, h, in_place):
    return functional.leaky_relu(h * torch.sigmoid(h.flip(3)), 0.2, inplace=in_place)


def _sigmoid_then_scaled(net, h, in_place):
    gate = torch.sigmoid(h)
    h = h.mul_(2).add_(1) if in_place else h * 2 + 1
    return gate * 3 + torch.tanh(h)


def _part_then_set(net, h, in_place):
    gate = torch.sigmoid(h)
    if in_place:
        h[:, :1] = 0.5
    else:
        h = torch.cat([torch.full_like(h[:, :1], 0.5), h[:, 1:]], 1)
    return gate * 3 + torch.tanh(h)


def _product_then_data(net, h, in_place):
    product = h * torch.sigmoid(h.flip(3))
    if in_place:
        h.data.mul_(2)
        return product + h
    return product + h * 2


def _constant_then_zeroed(net, h, in_place):
    mask = torch.linspace(0, 1, h.shape[-1], dtype=h.dtype).expand_as(h).clone()
    weighted = h * mask
    if in_place:
        mask.zero_()
    return weighted


def _constant_divided(net, h, in_place):
    one = torch.ones_like(h)
    gate = h.square() + 1
    return (one.div_(gate) if in_place else one / gate) + h


def _written_into_a_buffer(net, h, in_place):
    h = torch.sigmoid(h)
    if in_place:
        net.padded[:, :, 1:-1, 1:-1] = h
        h = net.padded
    else:
        h = functional.pad(h, (1, 1, 1, 1))
    return torch.tanh(functional.avg_pool2d(h, 3, 1)) * 2


def _added_before_norm(net, h, in_place):
    skip = h.flip(2)
    h = net.first(h[:, :1])
    h = h.add_(skip) if in_place else h + skip
    return net.norm(h).relu()


WRITTEN = {
    "norm, leaky": lambda net, h, in_place: functional.leaky_relu(
        net.norm(functional.avg_pool2d(h, 2)), 0.2, inplace=in_place
    ),
    "sum, leaky": lambda net, h, in_place: functional.leaky_relu(h + h.flip(2), 0.2, inplace=in_place),
    "product, leaky": _product_then_rectified,
    "sigmoid, scaled": _sigmoid_then_scaled,
    "sigmoid, set": _part_then_set,
    "pooled, scaled": lambda net, h, in_place: (
        functional.max_pool2d(h, 2).mul_(-2) if in_place else functional.max_pool2d(h, 2) * -2
    ),
    "convolution, sum, norm": _added_before_norm,
    "constant, divided": _constant_divided,
    "buffer": _written_into_a_buffer,
    "by keyword": lambda net, h, in_place: torch.relu_(input=h) if in_place else torch.relu(h),
}


# What autograd does not see, or refuses.
UNSEEN = {"data": _product_then_data, "constant": _constant_then_zeroed}
WRITTEN |= UNSEEN


@pytest.mark.parametrize("form", [form for form in WRITTEN if form not in UNSEEN])
@pytest.mark.parametrize("method", [LRP(), LRP(addition="signed"), DeepLift(Constant(0.0))], ids=str)
def test_what_a_network_writes_later_changes_no_rule(method, form):
    x = random_image(1, 1, 8, 8)
    found, wanted = (
        Explainer(OutputScore(1), method, progress=False)(Written(form, in_place).double().eval(), x)
        for in_place in (True, False)
    )
    torch.testing.assert_close(found.score, wanted.score, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.attributions["image"], wanted.attributions["image"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", UNSEEN)
def test_what_a_network_writes_past_autograd_changes_no_relevance(form):
    x = random_image(1, 1, 8, 8)
    found, wanted = (
        Explainer(OutputScore(1), LRP(), progress=False)(Written(form, in_place).double().eval(), x)
        for in_place in (True, False)
    )
    torch.testing.assert_close(
        found.attributions["image"], wanted.attributions["image"], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("act", [Swish(), Mish()], ids=["swish", "mish"])
def test_nothing_stays_on_the_network(act):
    network = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 1)).double()
    for method in (GuidedBackprop(), DeepLift(), LRP()):
        attribute(method, network, random_image(1, 3))
    for module in network.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks


# --------------------------------------------------------------------------------------------------- LRP


def test_lrp_with_a_vanishing_epsilon_is_input_times_gradient_on_networks_of_relu():
    method = LRP(EpsilonRule(1e-13), EpsilonRule(1e-13), addition="signed")
    for network in (make_resnet(), small_unet(channels=1)):
        x = random_image(1, 1, 32, 32)
        target = BOX if network(x).ndim > 2 else ClassScore(1)
        torch.testing.assert_close(
            maps(method, network, x, target), maps(InputXGradient(), network, x, target), rtol=1e-4, atol=1e-7
        )


def slow_dense(x, weight, bias, relevance, share):
    """Relevance of the inputs of one linear layer, product by product."""
    found = torch.zeros_like(x)
    for j in range(len(relevance)):
        products = [float(x[i] * weight[j, i]) for i in range(len(x))]
        for i, part in enumerate(share(products, float(bias[j]), x, weight[j])):
            found[i] += part * relevance[j]
    return found


def epsilon_share(products, bias, x, weight):
    total = sum(products) + bias
    return [p / total for p in products]


def gamma_share(products, bias, x, weight):
    sign = 1 if sum(products) + bias >= 0 else -1
    raised = [p * (1.25 if p * sign > 0 else 1) for p in products]
    total = sum(raised) + bias * (1.25 if bias * sign > 0 else 1)
    return [p / total for p in raised]


def alpha_beta_share(products, bias, x, weight):
    up, down = sum(max(p, 0) for p in [*products, bias]), sum(min(p, 0) for p in [*products, bias])
    return [2 * max(p, 0) / up - (min(p, 0) / down if down else 0) for p in products]


def z_plus_share(products, bias, x, weight):
    up = sum(max(p, 0) for p in [*products, bias])
    return [max(p, 0) / up for p in products]


def flat_share(products, bias, x, weight):
    return [1 / len(products)] * len(products)


def box_share(products, bias, x, weight):
    parts = [p + 2 * max(float(w), 0) - 2 * min(float(w), 0) for p, w in zip(products, weight, strict=True)]
    return [p / sum(parts) for p in parts]


RULES = {
    "epsilon": (EpsilonRule(1e-13), epsilon_share),
    "gamma": (GammaRule(0.25), gamma_share),
    "alpha-beta": (AlphaBetaRule(2.0), alpha_beta_share),
    "z-plus": (ZPlusRule(), z_plus_share),
    "flat": (FlatRule(), flat_share),
    "box": (BoxRule(-2.0, 2.0), box_share),
}


@pytest.mark.parametrize("name", RULES)
def test_lrp_rules_equal_a_slow_rewrite(name):
    rule, share = RULES[name]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = random_image(1, 4).clamp(-2, 2)
    above = torch.zeros(3, dtype=torch.float64)
    above[1] = network(x)[0, 1].detach()
    for layer, values in ((network[2], network[:2](x)[0]), (network[0], x[0])):
        above = slow_dense(values.detach(), layer.weight.detach(), layer.bias.detach(), above, share)
    found = maps(LRP(dense=rule), network, x, OutputScore(1))
    torch.testing.assert_close(found[0], above, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_a_convolution_hands_down_as_the_linear_layer_that_it_is(name):
    rule, _ = RULES[name]
    torch.manual_seed(0)
    for layer in (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2)):
        layer, x = layer.double(), random_image(1, 2, 5, 5).clamp(-2, 2)
        units = torch.eye(50, dtype=torch.float64).reshape(50, 2, 5, 5)
        bias = layer(torch.zeros_like(x)).flatten()
        linear = nn.Linear(50, len(bias)).double()
        linear.weight.data = (layer(units).flatten(1) - bias).T
        linear.bias.data = bias
        one = nn.Sequential(layer, nn.Flatten(), nn.ReLU())
        other = nn.Sequential(nn.Flatten(), linear, nn.ReLU())
        if name == "flat":
            linear.weight.data = torch.where(linear.weight.abs() > 0, 1.0, 0.0).double()
            other = None  # its field of view is not that of the matrix
        target = FunctionTarget(lambda output: output.sum(1))
        mine = maps(LRP(convolution=rule, dense=rule), one, x, target)
        if other is not None:
            torch.testing.assert_close(mine, maps(LRP(dense=rule), other, x, target), rtol=1e-5, atol=1e-8)
        else:
            assert float(mine.sum()) == pytest.approx(float(one(x).detach().sum()))


def test_batch_norm_is_folded_into_the_convolution_before_it():
    torch.manual_seed(0)
    body = [
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 2, 2, stride=2),
        nn.BatchNorm2d(2),
    ]
    network = calibrated(nn.Sequential(*body), (1, 8, 8))
    fused = nn.Sequential(
        nn.utils.fuse_conv_bn_eval(body[0], body[1]),
        nn.ReLU(),
        nn.utils.fuse_conv_bn_eval(body[3], body[4], transpose=True),
    )
    x, target = random_image(1, 1, 8, 8), RegionScore(1, Box((2, 2), (9, 9)))
    torch.testing.assert_close(maps(LRP(), network, x, target), maps(LRP(), fused, x, target))


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [(EpsilonRule(1e-13), CaptumEpsilonRule(1e-13)), (ZPlusRule(), Alpha1_Beta0_Rule())],
    ids=["epsilon", "alpha 1 beta 0"],
)
def test_lrp_equals_captum_where_that_has_rules(rule, theirs):
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(1, 3, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 3, bias=False),
        nn.ReLU(),
    ]
    network = nn.Sequential(*parts).double()
    wrapped = nn.Sequential(network, nn.AdaptiveAvgPool2d(1))
    x = random_image(
        1, 1, 16, 16
    ).abs()  # for values of one sign its rule for alpha and beta is that of the paper
    for module in network:
        if isinstance(module, nn.Conv2d):
            module.rule = theirs
    expected = captum.attr.LRP(wrapped).attribute(x, target=(1, 0, 0))
    for module in network:
        vars(module).pop("rule", None)
        vars(module).pop("activations", None)
    found = maps(LRP(convolution=rule), wrapped, x, FunctionTarget(lambda output: output[:, 1, 0, 0]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_lrp_says_what_became_of_the_relevance(name):
    torch.manual_seed(0)
    explanation = attribute(LRP(), NETWORKS[name](), random_image(1, 1, 32, 32), BOX)
    conserved = float(explanation.attributions["image"].sum() / explanation.score)
    assert explanation.facts["conserved"] == pytest.approx(conserved)
    assert explanation.facts["conserved"] + explanation.facts["absorbed_by_biases"] == pytest.approx(
        1, abs=1e-3
    )


@pytest.mark.parametrize(
    "method",
    [LRP(), LRP(EpsilonRule(), EpsilonRule()), DeepLift(Noise()), GuidedBackprop()],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("make", [make_resnet, NETWORKS["unet gelu group"]], ids=["resnet", "unet"])
def test_two_samples_at_once_are_each_alone(method, make):
    network = make()
    x = torch.cat([random_image(1, 1, 32, 32), 5 * random_image(1, 1, 32, 32, seed=3)])
    target = BOX if network(x).ndim > 2 else ClassScore(1)
    alone = torch.cat([maps(method, network, row[None], target) for row in x])
    torch.testing.assert_close(maps(method, network, x, target), alone, rtol=1e-6, atol=1e-10)


def test_lrp_conserves_where_there_are_no_biases():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.PReLU(), nn.InstanceNorm2d(3), nn.Conv2d(3, 2, 3, bias=False)
    )
    explanation = attribute(
        LRP(), network.double(), random_image(1, 1, 12, 12), RegionScore(1, Box((2, 2), (6, 6)))
    )
    assert explanation.facts["conserved"] == pytest.approx(1, abs=1e-6)


def test_lrp_splits_sums_by_absolute_values_and_products_in_halves():
    x = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    sums = maps(LRP(), Called(lambda z: z[:, :1] + z[:, 1:]), x)
    torch.testing.assert_close(sums, torch.tensor([[1.5, 0.5]], dtype=torch.float64))
    signed = maps(LRP(addition="signed"), Called(lambda z: z[:, :1] + z[:, 1:]), x)
    torch.testing.assert_close(signed, x, rtol=1e-6, atol=0)
    products = maps(LRP(), Called(lambda z: z[:, :1] * z[:, 1:]), x)
    torch.testing.assert_close(products, torch.tensor([[-1.5, -1.5]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_excitation_backprop_equals_a_slow_rewrite_and_its_contrast():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = random_image(1, 4).abs()
    hidden = network[:2](x)[0].detach()

    def walk(values, weight, coming):
        products = values * weight.clamp(min=0)
        total = products.sum(1, keepdim=True)
        return (products / total.where(total > 0, 1) * coming[:, None]).sum(0)

    score = network(x)[0, 1].detach()
    last, first = network[2].weight.detach()[1:2], network[0].weight.detach()
    plain = walk(x[0], first, walk(hidden, last, score[None]))
    torch.testing.assert_close(maps(ExcitationBackprop(), network, x, OutputScore(1))[0], plain)
    opposite = walk(x[0], first, walk(hidden, -last, score[None]))
    found = maps(ExcitationBackprop(is_contrastive=True), network, x, OutputScore(1))[0]
    torch.testing.assert_close(found, plain - opposite)


def test_the_first_layer_may_have_a_rule_of_its_own():
    torch.manual_seed(0)
    network, x = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3)).double(),
        random_image(1, 1, 8, 8),
    )
    target = FunctionTarget(lambda output: output.mean((1, 2, 3)))
    assert not torch.equal(maps(LRP(first=FlatRule()), network, x, target), maps(LRP(), network, x, target))
    everywhere = LRP(convolution=FlatRule(), first=FlatRule())
    torch.testing.assert_close(
        maps(LRP(convolution=FlatRule()), network, x, target), maps(everywhere, network, x, target)
    )
    padded = Called(lambda z: network(functional.pad(z.permute(0, 1, 3, 2), (1, 1, 1, 1))))
    padded.network = network
    moved = maps(LRP(first=FlatRule()), padded, x, target)
    assert not torch.equal(moved, maps(LRP(), padded, x, target))


def test_operations_know_the_module_that_calls_them():
    """In modules within modules, shared ones and such with hooks, and nowhere once the watch is left."""

    class Places(Watch):
        def __init__(self):
            super().__init__()
            self.found = []

        def handle(self, operation):
            self.found.append((operation.name, operation.place))
            return operation.run()

    shared = nn.Sequential(nn.ReLU())
    network = nn.Sequential(nn.Sequential(nn.Tanh(), shared), shared, nn.Sigmoid(), Called(lambda z: z.exp()))
    network[2].register_forward_pre_hook(lambda module, arguments: None)
    network[2].register_forward_hook(lambda module, arguments, output: output.square())
    watch, x = Places(), random_image(1, 2).requires_grad_()
    with watched(network, watch):
        (network(x) + 1).cos()
    assert watch.found == [
        ("tanh", "0.0"), ("relu", "0.1.0"), ("relu", "0.1.0"), ("sigmoid", "2"), ("square", "2"), ("exp", "3"),
        ("add", ""), ("cos", ""),
    ]  # fmt: skip
    with pytest.raises(RuntimeError), watched(network, watch):
        network(x @ x)
    assert (watch.place, watch.names) == ("", {})
