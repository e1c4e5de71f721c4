"""Small volumes by oneDNN while a network is explained: PyTorch's numbers, wherever PyTorch leaves it aside."""

from __future__ import annotations

import copy
import functools
import pickle
from contextlib import nullcontext

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from monai_xai import (
    LRP,
    Blur,
    Box,
    DeepLift,
    Explainer,
    GuidedBackprop,
    IntegratedGradients,
    RegionScore,
    Saliency,
)
from monai_xai.convolutions import conv3d
from monai_xai.undisturbed import undisturbed

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)
SHAPES = {
    "padded": ((1, 3, 9, 8, 10), (4, 3, 3, 3, 3), (1, 1, 1)),
    "valid": ((1, 4, 12, 12, 12), (2, 4, 3, 3, 3), (0, 0, 0)),
    "wide": ((1, 2, 8, 8, 8), (5, 2, 3, 3, 3), (2, 0, 2)),
    "flat kernel": ((1, 2, 10, 11, 12), (3, 2, 1, 3, 2), (0, 1, 0)),
    "one channel": ((1, 1, 16, 16, 16), (1, 1, 2, 2, 2), (0, 1, 0)),
}


class Calls(TorchDispatchMode):
    """Counts the convolutions that ask for oneDNN, and those that leave the choice to PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.quick = self.usual = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.quick += func is torch.ops.aten.mkldnn_convolution.default
        self.usual += func in (
            torch.ops.aten.convolution.default,
            torch.ops.aten.convolution_backward.default,
        )
        return func(*args, **(kwargs or {}))


def draw(shape, kernel):
    """An input, weights and biases."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in (shape, kernel, kernel[:1])]


def selected(x: Tensor, weight: Tensor, stride, padding, dilation, groups) -> str:
    """What PyTorch itself would take."""
    return torch._C._select_conv_backend(
        x, weight, None, stride, padding, dilation, False, (0, 0, 0), groups, None
    ).name


def is_quick(*arguments) -> bool:
    with Calls() as calls:
        conv3d(*arguments)
    return calls.quick > 0


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_value_gradient_second_gradient_and_tangent_are_those_of_pytorch(name, biased):
    shape, kernel, padding = SHAPES[name]
    x, weight, bias = draw(shape, kernel)
    bias = bias if biased else None

    def everything(function, x, weight, bias):
        x = x.clone().requires_grad_()
        y = function(x, weight, bias, (1, 1, 1), padding)
        coming = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).requires_grad_()
        (first,) = torch.autograd.grad(y, x, coming, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), coming)
        apply = functools.partial(function, weight=weight, bias=bias, padding=padding)
        tangent = torch.func.jvp(apply, (x.detach(),), (x.detach().cos(),))[1]
        return y, first, second, tangent

    assert is_quick(x, weight, bias, (1, 1, 1), padding)
    found = everything(conv3d, x, weight, bias)
    exact = everything(torch.conv3d, x.double(), weight.double(), None if bias is None else bias.double())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-6 * float(other.detach().abs().max()))


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((1, 8, 32, 32, 32), (8, 8, 3, 3, 3), {}),
        ((1, 40, 16, 32, 2), (8, 40, 3, 3, 3), {}),
        ((1, 41, 16, 32, 2), (8, 41, 3, 3, 3), {}),
        ((2, 8, 16, 16, 16), (8, 8, 3, 3, 3), {}),
        ((1, 8, 16, 16, 16), (8, 8, 5, 5, 5), {"padding": (2, 2, 2)}),
        ((1, 8, 16, 16, 16), (8, 8, 3, 3, 5), {"padding": (1, 1, 2)}),
        ((1, 8, 16, 16, 16), (8, 8, 3, 3, 3), {"dilation": (2, 2, 2)}),
        ((1, 8, 16, 16, 16), (8, 1, 3, 3, 3), {"groups": 8}),
    ],
)
def test_it_steps_in_where_pytorch_would_unfold_and_never_where_it_has_onednn(shape, kernel, options):
    x, weight, _ = draw(shape, kernel)
    options = {"stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1), "groups": 1, **options}
    assert is_quick(x, weight, None, *options.values()) == (selected(x, weight, **options) == "Slow3d")


def test_what_is_not_quicker_or_asks_for_more_is_left_to_pytorch(monkeypatch):
    x, weight, bias = draw((1, 4, 8, 8, 8), (4, 4, 3, 3, 3))
    assert is_quick(x, weight, bias)
    assert not is_quick(x[..., :7], weight, bias)
    assert not is_quick(x, weight[..., :1, :1, :1], bias)
    assert not is_quick(x, weight, bias, (2, 2, 2))
    assert not is_quick(x, weight, bias, (1, 1, 1), (3, 3, 3))
    assert not is_quick(x.double(), weight.double(), bias.double())
    assert not is_quick(x, weight.clone().requires_grad_(), bias)
    assert not is_quick(x, weight, bias.clone().requires_grad_())
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not is_quick(x, weight, bias)
    assert torch.equal(conv3d(Subclass(x), weight, bias), torch.conv3d(x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv3d(x, weight, bias).dtype == torch.bfloat16
    assert torch.equal(conv3d(x[..., :7], weight, bias), torch.conv3d(x[..., :7], weight, bias))


def test_a_network_is_quick_while_it_is_explained_and_as_it_was_before_and_after():
    torch.manual_seed(0)
    network, x = SegResNet(3, 8, 4, 2).eval().requires_grad_(False), torch.randn(1, 4, 16, 16, 16)
    attributes = [{**vars(module)} for module in network.modules()]
    with torch.no_grad():
        before = network(x)
    with undisturbed(network), Calls() as calls:
        leaf = x.clone().requires_grad_()
        score = network(leaf)[:, 1].mean()
        passes = calls.quick
        (gradient,) = torch.autograd.grad(score, leaf)
        for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            convolution = next(m for m in copied.modules() if isinstance(m, nn.Conv3d))
            assert convolution._conv_forward.args[0] is convolution
        with undisturbed(network):
            pass
        assert network(x).equal(network(x)) and calls.quick == 4 * passes
    assert passes > 10
    with undisturbed(network.double()):
        leaf = x.double().requires_grad_()
        (exact,) = torch.autograd.grad(network(leaf)[:, 1].mean(), leaf)
    assert (gradient.double() - exact).norm() <= 1e-3 * exact.norm()
    assert all(
        vars(module) == kept for module, kept in zip(network.float().modules(), attributes, strict=True)
    )
    with torch.no_grad(), Calls() as calls:
        assert torch.equal(network(x), before)
    assert not calls.quick


@pytest.mark.parametrize("of", ["x", "weight", "both"])
def test_results_lie_in_memory_as_those_of_pytorch(of):
    x, weight, bias = draw((1, 4, 9, 8, 8), (6, 4, 3, 3, 3))
    x = x.to(memory_format=torch.channels_last_3d) if of != "weight" else x
    weight = weight.to(memory_format=torch.channels_last_3d) if of != "x" else weight
    assert is_quick(x, weight, bias)
    assert conv3d(x, weight, bias).is_contiguous()


def test_tangents_of_weights_count_and_functions_may_be_mapped():
    drawn = draw((1, 4, 9, 8, 8), (6, 4, 3, 3, 3))
    tangents = tuple(x.cos() for x in drawn)
    found = torch.func.jvp(conv3d, tuple(drawn), tangents)[1]
    exact = torch.func.jvp(
        torch.conv3d, tuple(x.double() for x in drawn), tuple(t.double() for t in tangents)
    )[1]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    several = torch.stack([drawn[0], 2 * drawn[0]])
    mapped = torch.vmap(lambda x: conv3d(x, *drawn[1:]))(several)
    torch.testing.assert_close(mapped, torch.stack([torch.conv3d(x, *drawn[1:]) for x in several]))


class Subclass(Tensor):
    """Another class of tensors, which may know functions of torch alone."""


def circular(module: nn.Conv3d) -> nn.Conv3d:
    """A convolution that its owner has changed by hand."""
    module._conv_forward = lambda x, weight, bias: torch.conv3d(x.roll(1, 2), weight, bias, padding=1)
    return module


class OwnConvolution(nn.Conv3d):
    """Convolves as its author wants it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.abs(), bias)


@pytest.mark.parametrize(
    "module",
    [
        OwnConvolution(2, 2, 3),
        nn.Conv3d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(2, 2, 3, padding="same"),
        nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 2, 3, padding=1)),
        circular(nn.Conv3d(2, 2, 3, padding=1)),
    ],
    ids=["own", "reflected", "same", "weight norm", "changed by hand"],
)
def test_modules_of_other_kinds_give_what_they_gave(module):
    x = draw((1, 2, 9, 9, 9), (2, 2, 3, 3, 3))[0]
    with torch.no_grad():
        before = module(x)
    with undisturbed(module), torch.no_grad():
        torch.testing.assert_close(module(x), before, rtol=0, atol=1e-6)


NETWORKS = {
    "UNet": lambda: UNet(3, 2, 2, (4, 8), (2,), num_res_units=2, norm="BATCH"),
    "SegResNet": lambda: SegResNet(3, 8, 2, 2),
    "DynUNet": lambda: DynUNet(3, 2, 2, (3, 3, 3), (1, 2, 1), (2, 1), filters=(4, 8, 8), norm_name="batch"),
}


@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer(16, overlap=0.25)], ids=["whole", "windows"])
@pytest.mark.parametrize(
    "method",
    [Saliency(), IntegratedGradients(8, Blur()), DeepLift(Blur()), LRP(), GuidedBackprop()],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_in_single_precision_are_those_of_double(name, method, inferer):
    """Rules of propagation see the convolution all the same."""
    torch.manual_seed(0)
    network, x = NETWORKS[name]().eval(), torch.randn(1, 2, 16, 16, 24)
    explainer = Explainer(
        RegionScore(1, Box((2, 3, 4), (14, 12, 13))), method, inferer, progress=False, tolerated_gap=9.0
    )
    with Calls() if method == Saliency() else nullcontext() as calls:
        single = explainer(network, x)
    exact = explainer(network.double(), x.double())
    difference = single.attributions["image"].double() - exact.attributions["image"]
    # Where ReLU switches, rounding moves single voxels far.
    assert difference.norm() <= 0.01 * exact.attributions["image"].norm()
    assert calls is None or calls.quick
