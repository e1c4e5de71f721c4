"""Networks that methods do not expect: each is explained rightly or refused by name, never by a silently wrong map."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from networks import LinearImage, random_image
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from monai_xai import (
    LRP,
    AttentionRollout,
    AttributionError,
    Constant,
    Deconvolution,
    DeepLift,
    EpsilonRule,
    ExcitationBackprop,
    Explainer,
    FeatureAblation,
    FullGrad,
    GradCam,
    GradientShap,
    GuidedBackprop,
    InputError,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerConductance,
    Noise,
    OutputScore,
    Saliency,
    SeveredGradientWarning,
    UnsupportedNetworkError,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*miss the change of the score"
)  # of two steps, or in half precision
NOISE = Noise(seed=1)  # that of seed 0 is the image itself, but for its mean and scale
WATCHING = [
    DeepLift(Constant(0.0)),
    LRP(),
    ExcitationBackprop(),
    GuidedBackprop(),
    Deconvolution(),
    FullGrad(),
    AttentionRollout(),
]
LOOKING_IN = [GradCam("body.0"), LayerActivation("body.0"), LayerConductance(layer="body.0", n_steps=2)]
DIFFERENTIATING = [Saliency(), IntegratedGradients(n_steps=2, baseline=Constant(0.0), tolerance=None)]
PERTURBING = [FeatureAblation()]
BY_NAME = pytest.mark.parametrize("method", WATCHING, ids=lambda m: m.name)


class Network(nn.Module):
    """A convolution, a function of its rectified result, and a linear head."""

    def __init__(self, function=None, part=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
        self.function = function
        self.part = part
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
        self.double().eval()

    def forward(self, x):
        y = self.body(x) - 0.3
        y = y if self.part is None else self.part(y)
        return self.head(y if self.function is None else self.function(y))


class Called(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.fixture
def x():
    return random_image(1, 1, 8, 8)


def explain(method, network, x):
    return Explainer(OutputScore(1), method)(network, x)


def the_map(method, network, x):
    return next(iter(explain(method, network, x).attributions.values()))


def gap(explanation):
    change = float(explanation.score - explanation.baseline_score)
    assert change
    return abs(float(explanation.delta) / change)


# ------------------------------------------------------------------------------------- hidden from the watch


def scripted(x):
    return torch.jit.script(Network().body)


def traced(x):
    return torch.jit.trace(Network().body, x)


@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.parametrize("where", ["whole", "part"])
@BY_NAME
def test_torch_script_is_refused_by_name(make, where, method, x):
    network = make(x) if where == "whole" else nn.Sequential(nn.Identity(), make(x), Network().head).double()
    name = r"The network" if where == "whole" else r"The submodule '1'"
    with pytest.raises(UnsupportedNetworkError, match=rf"{name} is in TorchScript.*load its state_dict\(\)"):
        Explainer(lambda output: output.flatten(1).sum(1), method)(network, x)


@pytest.mark.parametrize("method", LOOKING_IN, ids=lambda m: m.name)
def test_layers_of_torch_script_are_refused_by_name(method, x):
    with pytest.raises(UnsupportedNetworkError, match=r"in TorchScript.*nothing is seen of its layers"):
        explain(method, torch.jit.trace(Network(), x), x)
    with pytest.raises(UnsupportedNetworkError, match=r"in TorchScript.*nothing is seen of its layers"):
        explain(GradCam(), torch.jit.trace(Network(), x), x)


@pytest.mark.parametrize("method", DIFFERENTIATING + PERTURBING, ids=lambda m: m.name)
def test_torch_script_and_exported_programs_are_differentiated_and_perturbed(method, x):
    network = Network()
    expected = the_map(method, network, x)
    exported = torch.export.export(network, (x,)).module()
    for other in (torch.jit.trace(network, x), exported, nn.Sequential(exported)):
        torch.testing.assert_close(the_map(method, other, x), expected)


@BY_NAME
def test_exported_programs_are_refused_by_the_calls_they_make(method, x):
    network = torch.export.export(Network(), (x,)).module()
    with pytest.raises(UnsupportedNetworkError, match=r"aten\.conv2d.*Explain the network that was exported"):
        explain(method, network, x)
    with pytest.raises(UnsupportedNetworkError, match=r"got ExportedProgram. Take its \.module\(\)"):
        explain(method, torch.export.export(Network(), (x,)), x)


@torch.jit.script
def scripted_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * 2


@BY_NAME
def test_functions_of_torch_script_are_refused_from_the_first_call_on(method, x):
    network = Network(scripted_relu)
    for _ in range(3):  # TorchScript runs otherwise once it has profiled
        with pytest.raises(UnsupportedNetworkError, match=r"hidden from the method.*TorchScript"):
            explain(method, network, x)


class Block(nn.Module):
    """A part of one's own: the compiler passes over modules of torch that are compiled in place."""

    def __init__(self):
        super().__init__()
        self.convolution, self.activation = nn.Conv2d(3, 3, 3), nn.PReLU()

    def forward(self, y):
        return self.activation(self.convolution(y))


def compiled_part(network, backend):
    network.part = torch.compile(network.part, backend=backend)


def compiled_in_place(network, backend):
    network.part.compile(backend=backend)


def compiled_function(network, backend):
    network.function = torch.compile(network.function, backend=backend)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # that the compiler looks at
@pytest.mark.parametrize(
    "change", [compiled_part, compiled_in_place, compiled_function], ids=lambda f: f.__name__
)
def test_compiled_parts_run_as_they_were_written_and_are_not_compiled_again(change, x):
    compiled = []

    def backend(graph, examples):
        compiled.append(graph)
        return graph.forward

    def make():
        torch.manual_seed(1)
        return Network(lambda y: y.relu() * 2, Block())

    network = make()
    change(network, backend)
    network(x)
    before = len(compiled)
    assert before
    for method in [*WATCHING[:-1], *LOOKING_IN, *DIFFERENTIATING]:
        torch.testing.assert_close(the_map(method, network, x), the_map(method, make(), x))
    assert len(compiled) == before


class Reversed(torch.autograd.Function):
    """Made of moves alone, which no watch counts."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, coming):
        return -coming


class Clamped(torch.autograd.Function):
    """Made of a call with a rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, coming):
        return coming * (ctx.saved_tensors[0] > 0)


@pytest.mark.parametrize("function", [Reversed, Clamped], ids=lambda f: f.__name__)
@BY_NAME
def test_functions_with_a_backward_pass_of_their_own_are_refused_by_name(function, method, x):
    with pytest.raises(
        UnsupportedNetworkError, match=f"calls {function.__name__}, a torch.autograd.Function"
    ):
        explain(method, Network(function.apply), x)


@pytest.mark.parametrize("is_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@BY_NAME
def test_checkpoints_are_refused(is_reentrant, method, x):
    network = Network(
        lambda y: checkpoint(lambda z: z.relu() * z.new_ones(3, 1, 1), y, use_reentrant=is_reentrant)
    )
    with pytest.raises(UnsupportedNetworkError, match="use_checkpoint=False"):
        explain(method, network, x)


def test_gradients_go_through_checkpoints(x):
    def function(y):
        return y.relu() * 2

    network = Network(lambda y: checkpoint(function, y, use_reentrant=False))
    torch.testing.assert_close(the_map(Saliency(), network, x), the_map(Saliency(), Network(function), x))


@pytest.mark.parametrize("method", [LRP(), DeepLift(NOISE)], ids=lambda m: m.name)
def test_a_norm_with_its_arguments_in_another_order_is_refused(method):
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)

    def normalize(y):
        return torch.batch_norm(y, scale, scale, -scale, scale, False, 0.1, 1e-5, False)

    with pytest.raises(UnsupportedNetworkError, match=r"no rule for torch\.batch_norm"):
        explain(method, Called(normalize), random_image(1, 2))


@pytest.mark.parametrize("method", [LRP(), DeepLift(NOISE)], ids=lambda m: m.name)
def test_batch_statistics_and_grids_of_the_input_are_refused(method, x):
    by_batch = Called(lambda y: functional.batch_norm(y, None, None, training=True))
    with pytest.raises(UnsupportedNetworkError, match="no rule for batch_norm"):
        explain(method, by_batch, random_image(2, 3))

    def sample(y):
        grid = torch.stack([y[:, 0], y[:, 0]], -1).tanh()
        return functional.grid_sample(random_image(1, 2, 8, 8), grid, align_corners=False).flatten(1)

    with pytest.raises(UnsupportedNetworkError, match="no rule for grid_sample"):
        explain(method, Called(sample), x)


# ------------------------------------------------------------------------------------- convolutions of all kinds

CONVOLUTIONS = {
    "same": lambda: nn.Conv2d(2, 4, 4, padding="same"),
    "valid": lambda: nn.Conv2d(2, 4, 3, padding="valid"),
    "dilated in groups": lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2),
    "reflected": lambda: nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(2, 4, (3, 5), padding="same", padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3, stride=3, output_padding=(1, 2), padding=1, groups=2),
}


def convolve(name):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[name]()
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return layer.double(), norm.double().eval()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_deep_lift_adds_up_on_convolutions_of_all_kinds(name):
    layer, norm = convolve(name)
    network = nn.Sequential(layer, norm, nn.SiLU(), nn.Flatten()).eval()
    target = lambda output: (output**2).mean(1)  # noqa: E731
    explanation = Explainer(target, DeepLift(NOISE))(network, random_image(2, 2, 6, 6))
    change = explanation.score - explanation.baseline_score
    assert (explanation.delta.abs() <= 1e-9 * change.abs()).all()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_lrp_of_a_convolution_equals_that_of_the_linear_layer_that_it_is(name):
    layer, norm = convolve(name)
    both, x = nn.Sequential(layer, norm).eval(), random_image(1, 2, 6, 6)
    units = torch.eye(72, dtype=torch.float64).reshape(72, 2, 6, 6)
    bias = both(torch.zeros_like(x)).detach().flatten()
    linear = nn.Linear(72, len(bias)).double()
    linear.weight.data, linear.bias.data = (both(units).detach().flatten(1) - bias).T, bias
    target = lambda output: output.relu().sum(1)  # noqa: E731
    method = LRP(EpsilonRule(1e-9), EpsilonRule(1e-9))
    mine = Explainer(target, method)(nn.Sequential(both, nn.Flatten()), x)
    theirs = Explainer(target, method)(nn.Sequential(nn.Flatten(), linear), x)
    torch.testing.assert_close(mine.attributions["image"], theirs.attributions["image"], rtol=1e-4, atol=1e-7)
    kept = float(mine.attributions["image"].sum() / mine.score)
    assert mine.facts["conserved"] == pytest.approx(kept)
    assert kept + mine.facts["absorbed_by_biases"] == pytest.approx(1, abs=1e-6)


def test_lrp_of_a_kernel_that_the_input_makes_is_in_proportion(x):
    image = random_image(1, 1, 8, 8, seed=1)
    network = Called(lambda y: functional.conv2d(image, y).flatten(1).repeat(1, 2))
    torch.testing.assert_close(the_map(LRP(), network, x), x * image, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------- masks of the input

RECTIFIERS = {
    "product": lambda y: y * (y > 0),
    "where": lambda y: torch.where(y > 0, y, 0.0),
    "filled": lambda y: y.masked_fill(y < 0, 0),
    "filled in place": lambda y: y.clone().masked_fill_(y.lt(0), 0),
    "sign": lambda y: y * (y.sign() + 1) / 2,
    "by index": lambda y: torch.zeros_like(y).index_put((y > 0).nonzero(as_tuple=True), y[y > 0]),
    "data": lambda y: y * (y.data > 0),
    "no gradient": lambda y: y * positive(y),
}


@torch.no_grad()
def positive(y):
    return y.clone().relu().div(y).round()


@pytest.mark.parametrize("name", RECTIFIERS)
def test_deep_lift_refuses_masks_that_are_others_at_the_baseline(name, x):
    with pytest.raises(UnsupportedNetworkError, match=r"another path|no rule for index_put"):
        explain(DeepLift(NOISE), Network(RECTIFIERS[name]), x)


@pytest.mark.parametrize("function", [lambda y: y * (y > -9), lambda y: y[:, y.isfinite().all((0, 2, 3))]])
def test_deep_lift_adds_up_where_masks_are_the_same_at_the_baseline(function, x):
    assert gap(explain(DeepLift(NOISE), Network(function), x)) < 1e-9


@pytest.mark.parametrize("name", [name for name in RECTIFIERS if name != "by index"])
def test_masks_of_the_input_are_constants_to_lrp_and_full_grad(name, x):
    for method in (LRP(), LRP(EpsilonRule(), EpsilonRule()), ExcitationBackprop(), FullGrad()):
        expected = the_map(method, Network(torch.relu), x)
        torch.testing.assert_close(
            the_map(method, Network(RECTIFIERS[name]), x), expected, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("method", [GuidedBackprop(), Deconvolution()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", RECTIFIERS)
def test_rectified_gradients_refuse_masks_that_may_rectify(name, method, x):
    with pytest.raises(UnsupportedNetworkError, match=r"cannot tell whether \w+ rectifies"):
        explain(method, Network(RECTIFIERS[name]), x)


def test_a_sum_over_a_mask_is_that_of_a_rectifier(x):
    chosen, rectified = (
        Called(lambda y, f=f: f(y).sum().expand(1, 2)) for f in (lambda y: y[y > 0], torch.relu)
    )
    for method in (LRP(), Saliency(), InputXGradient(), FullGrad()):
        torch.testing.assert_close(the_map(method, chosen, x), the_map(method, rectified, x))
    with pytest.raises(UnsupportedNetworkError, match="another path"):
        explain(DeepLift(NOISE), chosen, x)


@BY_NAME
def test_a_bound_that_is_made_of_the_input_is_refused(method, x):
    with pytest.raises(UnsupportedNetworkError, match=r"clamp|has no attention"):
        explain(method, Network(lambda y: y.clamp(min=y.flip(1))), x)


@pytest.mark.parametrize(
    "bound", [0.1, torch.full((3, 1, 1), 0.1, dtype=torch.float64)], ids=["number", "tensor"]
)
def test_deep_lift_adds_up_through_a_constant_bound(bound, x):
    assert gap(explain(DeepLift(NOISE), Network(lambda y: y.clamp(min=bound)), x)) < 1e-9


def test_full_gradients_sum_to_the_score_or_refuse_what_is_written_by_index(x):
    def write(y):
        y = y * 1
        y[:, 0] = 1.5
        return y

    def collect(y):
        found = torch.zeros_like(y)
        found[:, 1:] = y[:, 1:]
        return found

    with pytest.raises(UnsupportedNetworkError, match="written by index, setitem"):
        explain(FullGrad(), Network(write), x)
    explanation = explain(FullGrad(), Network(collect), x)
    total = float(explanation.attributions["image"].sum()) + explanation.facts["without_place"]
    assert total == pytest.approx(float(explanation.score))


@pytest.mark.parametrize(
    "decide", [lambda y: y.sum() > 0, lambda y: bool((y > 0).all())], ids=["tensor", "truth value"]
)
def test_deep_lift_refuses_control_flow_that_takes_another_path(decide, x):
    network = Called(lambda y: (y.relu() if decide(y.sum(1)) else 2 * y).flatten(1))
    with pytest.raises(
        UnsupportedNetworkError, match=r"another path.*IntegratedGradients\(\) or FeatureAblation"
    ):
        explain(DeepLift(Constant(-1.0)), network, x.abs())
    assert gap(explain(DeepLift(Constant(2.0)), network, x.abs())) < 1e-9


def test_deep_lift_refuses_numbers_that_are_read_from_the_input(x):
    with pytest.raises(UnsupportedNetworkError, match=r"another path.*at item"):
        explain(DeepLift(NOISE), Called(lambda y: (y * y.mean().item()).flatten(1)), x)


# ------------------------------------------------------------------------------------- types of numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method", DIFFERENTIATING + WATCHING[:1] + LOOKING_IN + PERTURBING, ids=lambda m: m.name
)
def test_half_precision_is_explained_as_far_as_it_is_precise(method, dtype, x):
    expected, found = the_map(method, Network(), x), the_map(method, Network().to(dtype), x.to(dtype))
    assert found.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    assert float((found.double() - expected).norm()) < tolerance * float(expected.norm())


@pytest.mark.parametrize("method", [LRP(), ExcitationBackprop()], ids=lambda m: m.name)
def test_relevance_needs_more_than_float16(method, x):
    with pytest.raises(UnsupportedNetworkError, match=r"too coarse.*network\.float\(\)"):
        explain(method, Network().half(), x.half())
    expected, found = the_map(method, Network(), x), the_map(method, Network().bfloat16(), x.bfloat16())
    assert float((found.double() - expected).norm()) < 0.05 * float(expected.norm())


@pytest.mark.parametrize(
    "method", DIFFERENTIATING + WATCHING[:-1] + LOOKING_IN + PERTURBING, ids=lambda m: m.name
)
def test_inputs_of_another_type_than_the_weights_are_named_with_the_cure(method, x):
    message = (
        r"weights are torch\.float16, the inputs \{'image': torch\.float32\}: explain network\.float\(\)"
    )
    with pytest.raises(AttributionError, match=message):
        explain(method, Network().half(), x.float())


@pytest.fixture
def quantized():
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
        return torch.ao.quantization.quantize_dynamic(Network().float(), {nn.Linear}, torch.qint8)


@pytest.mark.filterwarnings("ignore:.*(TypedStorage|quantize)")
def test_quantized_modules_are_refused_by_name_where_gradients_are_needed(quantized, x):
    conductance = LayerConductance(layer="body.0", n_steps=2)
    for method in [*DIFFERENTIATING, *WATCHING, GradCam("body.0"), conductance]:
        with pytest.raises(
            UnsupportedNetworkError, match=r"modules 'head\.2' are quantized.*FeatureAblation"
        ):
            explain(method, quantized, x.float())


@pytest.mark.filterwarnings("ignore:.*(TypedStorage|quantize)")
def test_quantized_modules_are_perturbed(quantized, x):
    image = x.float()
    change = quantized(image)[0, 1] - quantized(torch.zeros_like(image))[0, 1]
    found = the_map(FeatureAblation(baseline=Constant(0.0)), quantized, image)
    torch.testing.assert_close(found[0, 0, 0, 0], change)
    torch.testing.assert_close(the_map(LayerActivation("body.0"), quantized, image), quantized.body[0](image))


# ------------------------------------------------------------------------------------- train mode, ties, layers


@pytest.mark.parametrize(
    "method", DIFFERENTIATING + WATCHING[:-1] + LOOKING_IN + PERTURBING, ids=lambda m: m.name
)
def test_a_network_in_train_mode_is_explained_in_evaluation_mode_and_left_as_it_was(method, x):
    part = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU())
    network = Network(part=part).train()
    network.head.eval()
    with torch.no_grad():
        network(torch.cat([x, 2 * x]))
    before = (
        copy.deepcopy(network.state_dict()),
        [m.training for m in network.modules()],
        torch.get_rng_state(),
    )
    found = the_map(method, network, x)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert [m.training for m in network.modules()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.testing.assert_close(found, the_map(method, copy.deepcopy(network).eval(), x), rtol=0, atol=0)


class Tied(nn.Module):
    """One block called twice, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.SiLU())
        self.one, self.other = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.other.weight = self.one.weight
        self.double().eval()

    def forward(self, x):
        y = self.body(self.body(x) - 0.1)
        return self.other(self.one(y.flatten(1)).relu()).tanh()


class Untied(nn.Module):
    """The same with copies."""

    def __init__(self):
        super().__init__()
        tied = Tied()
        self.first, self.second = tied.body, copy.deepcopy(tied.body)
        self.one, self.other = tied.one, copy.deepcopy(tied.other)

    def forward(self, x):
        y = self.second(self.first(x) - 0.1)
        return self.other(self.one(y.flatten(1)).relu()).tanh()


@pytest.mark.parametrize("method", [*DIFFERENTIATING, *WATCHING[:-1]], ids=lambda m: m.name)
def test_tied_weights_are_as_good_as_copies(method, x):
    torch.testing.assert_close(the_map(method, Tied(), x), the_map(method, Untied().eval(), x))


def test_tied_weights_add_up_and_have_the_gradient_of_finite_differences(x):
    network = Tied()
    assert gap(explain(DeepLift(NOISE), network, x)) < 1e-9
    found, step = the_map(Saliency(), network, x), torch.zeros_like(x)
    for place in ((0, 0, 1, 2), (0, 0, 7, 7)):
        step.zero_()
        step[place] = 1e-6
        slope = (network(x + step) - network(x - step)).detach()[0, 1] / 2e-6
        assert float(found[place]) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("method", LOOKING_IN, ids=lambda m: m.name)
def test_a_layer_that_is_called_twice_is_refused_by_name(method, x):
    with pytest.raises(UnsupportedNetworkError, match=r"'body\.0' must give one tensor and be called once"):
        explain(method, Tied(), x)


@pytest.mark.parametrize(
    "make",
    [GradCam, LayerActivation, lambda name: LayerConductance(layer=name)],
    ids=["cam", "layer", "path"],
)
def test_a_layer_that_does_not_exist_is_answered_with_near_names(make, x):
    with pytest.raises(InputError, match=r"no layer 'boddy\.0'. Similar names: .*body\.0"):
        explain(make("boddy.0"), Network(), x)


def test_a_layer_without_a_grid_is_named_with_those_that_have_one(x):
    message = r"'head\.2' gives \(1, 2\).*Layers with a grid: 'body\.0', 'body\.1', 'body', 'head\.0'\."
    with pytest.raises(UnsupportedNetworkError, match=message):
        explain(GradCam("head.2"), Network(), x)
    with pytest.raises(UnsupportedNetworkError, match=re.escape("no convolution with a spatial output")):
        explain(GradCam(), nn.Sequential(LinearImage((1, 8, 8)), nn.Linear(1, 2).double()), x)
    pooled = nn.Sequential(nn.Identity(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)).double()
    with pytest.raises(UnsupportedNetworkError, match=r"name the layer.*Layers with a grid: '0', '1'\."):
        explain(GradCam(), pooled, x)


@pytest.mark.parametrize("cut", [lambda y: y.data, lambda y: y.detach()], ids=["data", "detach"])
def test_a_network_that_cuts_its_own_graph_is_told_of_once(cut, x):
    network = Network(lambda y: y.relu() + cut(y), nn.Conv2d(3, 3, 3))
    with pytest.warns(SeveredGradientWarning, match="out of its graph") as caught:
        explain(GradientShap(4, Constant(0.0)), network, x)
    assert len([w for w in caught if w.category is SeveredGradientWarning]) == 1


def test_a_whole_graph_is_not_warned_of(x, recwarn):
    explain(Saliency(), Network(lambda y: y.relu(), nn.Conv2d(3, 3, 3)), x)
    assert not [w for w in recwarn if w.category is SeveredGradientWarning]
