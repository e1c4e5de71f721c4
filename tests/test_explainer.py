"""The explainer: targets in one call, inputs that cannot be explained, and what it leaves behind: nothing."""

from __future__ import annotations

import copy
import math
import random

import captum.attr
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.nets import DenseNet121, SegResNet
from networks import ImageAndVector, LinearImage, random_image, small_unet
from torch import nn

from monai_xai import (
    AttributionError,
    AttributionHandler,
    Auto,
    Blur,
    Box,
    ClassScore,
    CompletenessWarning,
    Component,
    Constant,
    DeepLift,
    Explainer,
    Explanation,
    FeatureAblation,
    FunctionTarget,
    GradCam,
    InputError,
    IntegratedGradients,
    Labeled,
    Noise,
    NoiseTunnel,
    OutputScore,
    Predicted,
    RegionScore,
    Saliency,
    Samples,
    UnsupportedNetworkError,
)
from monai_xai.attributors import Attribution
from monai_xai.attributors.choosing import attribute_from_first
from monai_xai.baselines import draw_baselines
from monai_xai.clock import Clock

BOX = Box((3, 2), (14, 9))


def test_the_sentence_of_the_design_runs():
    inputs = {"image": random_image(1, 1, 24, 24), "clinical": random_image(1, 3)}
    explanation = Explainer(
        target=RegionScore(channel=1, region=Predicted()),
        attributor=IntegratedGradients(n_steps=32, baseline=Blur(sigma=4.0)),
        inferer=SlidingWindowInferer(roi_size=(16, 16), overlap=0.5),
    )(ImageAndVector(), inputs)
    assert explanation.attributions["image"].shape == (1, 1, 24, 24)
    assert explanation.attributions["clinical"].shape == (1, 3)
    assert explanation.score.shape == explanation.baseline_score.shape == explanation.delta.shape == (1,)


def test_several_targets_share_the_clean_prediction():
    network, calls = small_unet(), []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    found = Explainer({"lesion": RegionScore(1), "rest": RegionScore(0)}, Saliency())(
        network, random_image(1, 2, 16, 16)
    )
    handle.remove()
    assert list(found) == ["lesion", "rest"]
    assert len(calls) == 1 + 2


def test_several_targets_share_the_baselines(monkeypatch):
    draws = []
    monkeypatch.setattr(Blur, "draws", lambda self, x: draws.append(self) or (torch.zeros_like(x),))
    targets = {name: RegionScore(c, BOX) for c, name in enumerate(("rest", "lesion"))}
    Explainer(targets, IntegratedGradients(4), tolerated_gap=100.0)(small_unet(), random_image(1, 2, 16, 16))
    assert len(draws) == 1


def test_every_lesion_is_explained_when_asked():
    class Threshold(nn.Module):
        def forward(self, x):
            return torch.cat([torch.zeros_like(x), x], 1)

    x = torch.full((1, 1, 12, 12), -1.0)
    x[..., 1:3, 1:3] = x[..., 6:10, 6:10] = 1.0
    found = Explainer({"lesion": RegionScore(1, Component(k=None))}, Saliency())(Threshold(), x)
    assert list(found) == ["lesion_component0", "lesion_component1"]
    assert [int((e.attributions["image"] != 0).sum()) for e in found.values()] == [16, 4]


def test_targets_that_look_at_no_prediction_cost_no_forward_pass():
    network, x, calls = LinearImage((2, 4, 4)), random_image(1, 2, 4, 4), []
    network.register_forward_hook(lambda *_: calls.append(1))
    Explainer({"output": OutputScore(), "class": ClassScore(0)}, Saliency())(network, x)
    assert len(calls) == 2


def test_a_given_prediction_spares_the_forward_pass_and_fixes_the_region():
    network, x, calls = small_unet(), random_image(1, 2, 16, 16), []
    with torch.no_grad():
        prediction = network(x)
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    given = Explainer(RegionScore(1), Saliency())(network, x, prediction=prediction)
    assert len(calls) == 1
    handle.remove()
    assert torch.equal(
        given.attributions["image"], Explainer(RegionScore(1), Saliency())(network, x).attributions["image"]
    )


def test_region_does_not_move_while_the_input_is_perturbed():
    network, x = small_unet().requires_grad_(False), random_image(1, 2, 16, 16)
    mask = network(x).argmax(1, keepdim=True) == 1
    explanation = Explainer(RegionScore(1), FeatureAblation(baseline=0.0))(network, x)
    for channel in range(2):
        ablated = x.clone()
        ablated[:, channel] = 0
        effect = network(x)[:, 1:2][mask].mean() - network(ablated)[:, 1:2][mask].mean()
        assert float(explanation.attributions["image"][0, channel, 0, 0]) == pytest.approx(float(effect))


def test_maps_carry_the_space_of_their_input():
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    x = MetaTensor(random_image(1, 1, 8, 8, 8), affine=affine)
    found = Explainer(OutputScore(), IntegratedGradients(2, 0.0))(LinearImage((1, 8, 8, 8)), x).attributions[
        "image"
    ]
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, x.affine)
    assert found.applied_operations == x.applied_operations


@pytest.mark.parametrize(
    ("network", "size", "target"),
    [
        (lambda: DenseNet121(2, 1, 2), 32, ClassScore(1)),
        (
            lambda: SegResNet(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)),
            16,
            RegionScore(1, Box((4, 4), (9, 9))),
        ),
    ],
    ids=["DenseNet121", "SegResNet"],
)
def test_networks_of_monai_are_explained_as_they_come(network, size, target):
    torch.manual_seed(0)
    model, x = network().double().eval(), random_image(1, 1, size, size)
    explainer = Explainer(
        target, IntegratedGradients(n_steps=4, baseline=Noise()), SimpleInferer(), tolerated_gap=10.0
    )

    def score(image):
        output = model(image)
        return target.score(output, *target.select(output, None))

    expected = captum.attr.IntegratedGradients(score).attribute(x, Noise().draws(x)[0], n_steps=4)
    torch.testing.assert_close(explainer(model, x).attributions["image"], expected, rtol=0, atol=1e-7)


# ---------------------------------------------------------------------------------------------------- do no harm


def snapshot(network):
    """Return everything about a network and the generators that an explanation might change."""
    return {
        "state": copy.deepcopy(network.state_dict()),
        "training": [m.training for m in network.modules()],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in network.modules()
        ],
        "attributes": [hash(tuple(sorted(vars(m)))) for m in network.modules()],
        "inplace": [bool(getattr(m, "inplace", False)) for m in network.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_equal(before, after):
    for name, value in before.items():
        torch.testing.assert_close(
            after[name], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


class Failing(nn.Module):
    """Fails in the backward pass, as a network that is out of memory would."""

    def __init__(self):
        super().__init__()
        self.body = small_unet()

    def forward(self, x):
        self.note = x.shape
        output = self.body(x)
        if output.requires_grad:
            raise RuntimeError("broken on purpose")
        return output


@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
@pytest.mark.parametrize(
    "attributor", [Saliency(), DeepLift(), FeatureAblation(), IntegratedGradients(3)], ids=lambda a: a.name
)
@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer(12)], ids=["whole", "windows"])
def test_explaining_changes_nothing(attributor, inferer):
    network = small_unet().train()
    list(network.modules())[3].eval()
    next(network.parameters()).requires_grad_(False)
    network(random_image(2, 2, 16, 16)).sum().backward()
    before = snapshot(network)
    Explainer(RegionScore(1, BOX), attributor, inferer)(network, random_image(1, 2, 16, 16))
    assert_equal(before, snapshot(network))


def test_parameter_that_a_network_unfreezes_is_frozen_again():
    class Unfreezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_unet().requires_grad_(False)

        def forward(self, x):
            next(self.parameters()).requires_grad_(True)
            return self.body(x)

    network = Unfreezing()
    Explainer(RegionScore(1, BOX), Saliency())(network, random_image(1, 2, 16, 16))
    assert not any(p.requires_grad for p in network.parameters())


def test_explaining_changes_nothing_when_it_fails():
    network = Failing().train()
    before = snapshot(network)
    with pytest.raises(
        AttributionError,
        match=r"gradient failed on inputs \[\(1, 2, 16, 16\)\]: RuntimeError: broken on purpose",
    ):
        Explainer(RegionScore(1, BOX), Saliency())(network, random_image(1, 2, 16, 16))
    assert_equal(before, snapshot(network))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_inside_every_gradient_mode(mode):
    network = small_unet()
    with mode():
        x = random_image(1, 2, 16, 16) * 1
        found = Explainer(RegionScore(1, BOX), Saliency())(network, x).attributions["image"]
    expected = Explainer(RegionScore(1, BOX), Saliency())(network, random_image(1, 2, 16, 16)).attributions[
        "image"
    ]
    assert torch.equal(found.clone(), expected)


# ------------------------------------------------------------------------------------------------------ bad input


def bad(value):
    x = random_image(2, 2, 16, 16)
    x[1, 0, 3, 3] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (bad(float("nan")), r"'image' has 1 NaN or infinite values in sample 1 .*nan_to_num"),
        (bad(float("inf")), r"1 NaN or infinite values in sample 1"),
        (random_image(16), r"must be a tensor of shape \(N, C, \*spatial\)"),
        (torch.zeros(1, 2, 16, 16, dtype=torch.int16), r"floating-point numbers, got torch.int16"),
        ({"a": random_image(1, 2, 16, 16), "b": random_image(2, 3)}, r"one batch size"),
        ({}, "no input"),
        (MetaTensor(random_image(1, 2, 8, 8, 8), affine=torch.zeros(4, 4)), "singular affine"),
    ],
    ids=["NaN", "infinite", "no batch", "integers", "batch sizes", "none", "singular affine"],
)
def test_inputs_that_cannot_be_explained_are_named(x, message):
    with pytest.raises(InputError, match=message):
        Explainer(RegionScore(1, BOX), Saliency())(small_unet(), x)


def test_weights_made_in_inference_mode_are_named():
    with torch.inference_mode():
        network = nn.Conv2d(2, 2, 1)
    with pytest.raises(UnsupportedNetworkError, match=r"weight was made under torch.inference_mode"):
        Explainer(RegionScore(1, BOX), Saliency())(network, torch.randn(1, 2, 16, 16))


def test_a_function_is_no_network_and_a_word_is_no_method():
    with pytest.raises(UnsupportedNetworkError, match=r"must be a torch\.nn\.Module"):
        Explainer(RegionScore(1, BOX), Saliency())(lambda x: x, random_image(1, 2, 16, 16))
    with pytest.raises(InputError, match="needs an attributor"):
        Explainer(RegionScore(1), "saliency")
    with pytest.raises(InputError, match="needs a target"):
        Explainer("lesion", Saliency())


def test_a_target_must_give_one_score_for_each_sample():
    with pytest.raises(InputError, match=r"one score per sample, shape \(2,\), got \(\)"):
        Explainer(lambda output: output.sum(), Saliency())(small_unet(), random_image(2, 2, 16, 16))


def test_a_large_gap_warns_with_the_number_and_the_cure():
    explainer = Explainer(RegionScore(1, BOX), IntegratedGradients(1, baseline=0.0))
    with pytest.warns(CompletenessWarning, match=r"miss the change of the score by .*%.*delta.*Likely cure"):
        explanation = explainer(small_unet(norm="INSTANCE"), random_image(1, 2, 16, 16))
    assert isinstance(explanation, Explanation)
    assert float(explanation.gap) > 0.05


def test_contributions_are_signed_sums_and_refused_where_they_mean_nothing():
    network, x = LinearImage((2, 4, 4)), random_image(1, 2, 4, 4)
    explanation = Explainer(OutputScore(), IntegratedGradients(baseline=0.0))(network, x)
    expected = (network.weight * x).sum((2, 3)).detach()
    torch.testing.assert_close(explanation.contributions()["image"], expected)
    with pytest.raises(InputError, match="must not be added up"):
        Explainer(OutputScore(), Saliency())(network, x).contributions()


# ---------------------------------------------------------------------------------- what a first review brought up


def test_labeled_regions_know_how_many_channels_the_network_has():
    torch.manual_seed(0)
    network, x = nn.Conv2d(1, 3, 3, padding=1).double(), random_image(1, 1, 16, 16)
    label = torch.randint(0, 3, (1, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer(8, overlap=0.5)
    explanation = Explainer(RegionScore(2, Labeled()), Saliency(), inferer)(network, x, label=label)
    with torch.no_grad():
        expected = inferer(x, network)[:, 2][label[:, 0] == 2].mean()
    assert float(explanation.score) == pytest.approx(float(expected))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = small_unet(), small_unet(norm="INSTANCE")

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer(12, overlap=0.5)], ids=["whole", "windows"])
def test_targets_of_different_heads_are_not_mixed_up(inferer):
    network, x = TwoHeads(), random_image(1, 2, 16, 16)

    def soft(output):
        return output.softmax(1)[:, 1].mean((1, 2))

    targets = {
        "a": RegionScore(1, head="a"),
        "b": RegionScore(1, head="b"),
        "soft": FunctionTarget(soft, selector=lambda o, label: (), head="b"),
    }
    together = Explainer(targets, Saliency(), inferer)(network, x)
    for name, target in targets.items():
        alone = Explainer(target, Saliency(), inferer)(network, x)
        torch.testing.assert_close(together[name].score, alone.score)
    assert not torch.allclose(together["a"].score, together["b"].score)
    with pytest.raises(InputError, match="is one tensor"):
        Explainer(RegionScore(1, head="a"), Saliency(), inferer)(network.a, x)


class InPlaceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small_unet()

    def forward(self, x):
        return self.body(torch.relu_(x))


@pytest.mark.parametrize(
    "attributor", [Saliency(), FeatureAblation(), IntegratedGradients(3, 0.0), GradCam()], ids=str
)
@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer(12)], ids=["whole", "windows"])
@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
def test_a_network_that_works_in_place_on_its_input_spoils_nothing(attributor, inferer):
    network, x = InPlaceFirst(), random_image(1, 2, 16, 16)
    for target in (RegionScore(1, BOX), RegionScore(1)):
        kept = x.clone()
        Explainer(target, attributor, inferer)(network, x)
        assert torch.equal(x, kept)


def test_voxels_that_no_window_weights_do_not_spoil_the_others():
    network, x = small_unet(), random_image(1, 2, 24, 24)
    inferer = SlidingWindowInferer(12, overlap=0.0)
    inferer.roi_weight_map = torch.ones(12, 12, dtype=torch.float64)
    inferer.roi_weight_map[0] = 0
    explanation = Explainer(RegionScore(1, Box((1, 0), (12, 12))), Saliency(), inferer)(network, x)
    assert torch.isfinite(explanation.attributions["image"]).all()
    with pytest.raises(InputError, match="zero importance in every window"):
        Explainer(RegionScore(1, Box((0, 0), (12, 12))), Saliency(), inferer)(network, x)


def test_a_sample_is_refined_independently_of_its_batch():
    network, x = small_unet(), random_image(3, 2, 16, 16)
    explainer = Explainer(RegionScore(1, BOX), IntegratedGradients(tolerance=0.002, baseline=Noise()))
    together = explainer(network, x)
    for i in range(3):
        alone = explainer(network, x[i : i + 1])
        torch.testing.assert_close(
            together.attributions["image"][i], alone.attributions["image"][0], rtol=0, atol=1e-12
        )


def test_the_noise_of_two_inputs_is_independent_and_that_of_a_sample_is_its_own():
    inputs = {"ct": random_image(2, 1, 32, 32), "pet": random_image(2, 1, 32, 32)}
    ct, pet = draw_baselines(Noise(), inputs)[0]
    assert abs(float(torch.corrcoef(torch.stack([ct[0].flatten(), pet[0].flatten()]))[0, 1])) < 0.1
    torch.testing.assert_close(Noise().draws(inputs["ct"])[0][1:], Noise().draws(inputs["ct"][1:])[0])


class Counting(nn.Module):
    """Counts its calls in a buffer, beside others of its type that are told in ``buffers``."""

    def __init__(self, **buffers):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.register_buffer("calls", torch.zeros(1))
        for name, values in buffers.items():
            self.register_buffer(name, values)

    def forward(self, x):
        self.calls += 1
        return self.norm(self.layer(x)).mean((2, 3))


@pytest.mark.parametrize(
    "other",
    [torch.ones(1).expand(3), torch.tensor([math.nan, -0.0]), torch.ones(2, 2).t(), torch.ones(2).half()],
    ids=["expanded", "not a number", "turned", "half"],
)
def test_of_many_buffers_only_those_that_changed_are_written_back(other):
    network = Counting(other=other).eval()
    x = random_image(1, 1, 8, 8).float()
    before = {name: values.clone() for name, values in network.state_dict().items()}
    loss = network(x).square().sum()  # whose backward pass asks that buffers are what they were
    before["calls"] += 1
    explanation = Explainer(OutputScore(), Saliency(), progress=False)(network, x)
    loss.backward()
    assert explanation.attributions["image"].any()
    for name, values in network.state_dict().items():
        assert values.numpy().tobytes() == before[name].numpy().tobytes()


class Resizing(Counting):
    """Gives one of its buffers another shape."""

    def forward(self, x):
        self.other.data = torch.ones(7)
        return super().forward(x)


class Keeping(Counting):
    """Writes what it computes into a buffer."""

    def forward(self, x):
        self.other[:] = x[0, 0, 0, :2]
        return super().forward(x) + self.other.sum()


@pytest.mark.parametrize("kind", [Resizing, Keeping])
def test_a_buffer_has_its_shape_and_no_graph_afterwards(kind):
    network = kind(other=torch.zeros(2)).eval()
    Explainer(OutputScore(), Saliency(), progress=False)(network, random_image(1, 1, 8, 8).float())
    assert network.other.tolist() == [0.0, 0.0]
    assert network.calls.tolist() == [0.0]
    assert network.other.grad_fn is None and not network.other.requires_grad
    copy.deepcopy(network)


def test_a_scripted_network_keeps_its_training_flags():
    network = torch.jit.script(
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)).double()
    ).train()
    Explainer(RegionScore(1, BOX), Saliency())(network, random_image(1, 2, 16, 16))
    assert all(module.training for module in network.modules())


def test_passes_of_all_baselines_are_counted():
    network, rows = small_unet(), []
    method = IntegratedGradients(4, Samples(random_image(5, 2, 16, 16)))
    network.register_forward_hook(lambda _, args, __: rows.append(torch.is_grad_enabled() * len(args[0])))
    explanation = Explainer(RegionScore(1, BOX), method, tolerated_gap=100.0)(
        network, random_image(1, 2, 16, 16) + 1
    )
    assert explanation.facts["passes"] == 20 == sum(rows) - 2  # two are repeated to check their batch


def test_a_score_that_does_not_change_has_no_gap():
    ones = torch.ones(1, 2, 16, 16, dtype=torch.float64)
    explanation = Explainer(RegionScore(1, BOX), IntegratedGradients(baseline=1.0))(small_unet(), ones)
    assert float(explanation.gap) == 0


def test_a_baseline_may_be_a_scan():
    scan = MetaTensor(random_image(1, 2, 16, 16))
    explainer = Explainer(RegionScore(1, BOX), IntegratedGradients(4, baseline=scan), tolerated_gap=100.0)
    assert type(explainer(small_unet(), random_image(1, 2, 16, 16)).attributions["image"]) is torch.Tensor
    assert "tensor of shape (1, 2, 16, 16)" in explainer(small_unet(), random_image(1, 2, 16, 16)).method


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegionScore(1, reduction="avg"), "choose 'mean' or 'sum'"),
        (lambda: RegionScore(1, "predicted"), "A region such as"),
        (lambda: RegionScore("1"), "whole number"),
        (lambda: Explainer(RegionScore(1), Saliency(), 16), "MONAI inferer object"),
        (lambda: Explainer(RegionScore(1), Saliency(), SlidingWindowInferer), "MONAI inferer object"),
        (lambda: Explainer({}, Saliency()), "names no target"),
        (lambda: IntegratedGradients(baseline="blur"), "A baseline such as"),
        (lambda: IntegratedGradients(baseline=None), "A baseline such as"),
        (lambda: Blur(0), "positive number"),
        (lambda: Blur((1, 2)), "positive number"),
        (lambda: ClassScore(-1), "whole number from 0"),
        (lambda: OutputScore(-1), "whole number from 0"),
        (lambda: IntegratedGradients(300, tolerance=0.01), "more steps than max_steps=255"),
        (lambda: Samples.from_dataset([]), "one shape under 'image', got none"),
        (
            lambda: Samples.from_dataset([{"image": torch.zeros(n)} for n in (1, 2)]),
            "one shape under 'image'",
        ),
        (lambda: Samples(torch.zeros(0, 2, 4, 4)), "K at least 1"),
        (lambda: FeatureAblation(16), "Features such as"),
        (lambda: GradCam(1), "dotted name"),
        (lambda: NoiseTunnel(Saliency), "needs an attributor"),
        (lambda: AttributionHandler(Saliency()), "needs an Explainer"),
        (lambda: AttributionHandler(Explainer(RegionScore(1), Saliency()), 1.5), "needs a number"),
    ],
)
def test_configuration_is_checked_where_it_is_made(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, n: e(n, np.zeros((1, 2, 16, 16))), "got ndarray"),
        (lambda e, n: e(n, [random_image(1, 2, 16, 16)]), "got list"),
        (lambda e, n: e(n, random_image(1, 2, 16, 16), label=[1]), "label must be a tensor"),
        (
            lambda e, n: e(n, random_image(1, 2, 16, 16), prediction=random_image(3, 2, 16, 16)),
            "batch size 3",
        ),
        (
            lambda e, n: e(
                n, MetaTensor(random_image(1, 2, 8, 8, 8), affine=torch.full((4, 4), float("nan")))
            ),
            "singular",
        ),
    ],
    ids=["array", "list", "label", "prediction", "affine"],
)
def test_what_a_call_gets_is_checked(call, message):
    with pytest.raises(InputError, match=message):
        call(Explainer(RegionScore(1), Saliency()), small_unet())


def test_a_diverged_network_is_named():
    network = small_unet()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(AttributionError, match="not finite"):
        Explainer(RegionScore(1, BOX), Saliency())(network, random_image(1, 2, 16, 16))


class Standardized(nn.Module):
    """Divides by the deviation of its input, which a constant baseline does not have."""

    def forward(self, x):
        return ((x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)).flatten(1)[:, :1]


@pytest.mark.parametrize(
    "attributor",
    [IntegratedGradients(baseline=0.0), DeepLift(baseline=0.0), FeatureAblation(baseline=0.0)],
    ids=lambda a: a.name,
)
def test_a_baseline_without_a_score_is_named(attributor):
    with pytest.raises(AttributionError, match=r"not finite at the baseline.*Choose another baseline"):
        Explainer(OutputScore(), attributor)(Standardized(), random_image(1, 1, 8, 8))


def test_gradients_that_are_not_finite_are_named():
    class Root(nn.Module):
        def forward(self, x):
            return x.square().sum((1, 2, 3)).sqrt()[:, None]

    with pytest.raises(AttributionError, match="16 NaN or infinite attributions for the input 'image'"):
        Explainer(OutputScore(), Saliency())(Root(), torch.zeros(1, 1, 4, 4))


def test_a_network_whose_samples_depend_on_their_neighbors_is_refused():
    network = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(UnsupportedNetworkError, match="track_running_stats"):
        Explainer(RegionScore(1, BOX), Saliency())(network.double(), random_image(1, 2, 16, 16))


def test_each_head_takes_its_own_label():
    class TwoHeads(nn.Module):
        def forward(self, x):
            return {"seg": torch.cat([-x, x], 1), "cls": x.mean((2, 3))}

    x = random_image(1, 1, 8, 8)
    label = {"seg": (x > 1).long(), "cls": torch.ones(1, 1)}
    lesion = Explainer(RegionScore(1, Labeled(), head="seg"), Saliency())(TwoHeads(), x, label=label)
    torch.testing.assert_close(lesion.score, x[x > 1].mean()[None])
    box = Explainer(RegionScore(1, Box((0, 0), (2, 2)), head="seg"), Saliency())
    assert torch.isfinite(box(TwoHeads(), x, label=label).score).all()


def test_a_tensor_that_a_network_counts_in_is_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = torch.zeros(1)

        def forward(self, x):
            self.seen += 1
            return x.flatten(1)[:, :1]

    network = Counting()
    Explainer(OutputScore(), Saliency())(network, random_image(1, 1, 4, 4))
    assert network.seen.item() == 0


def test_a_small_spacing_is_no_singular_affine():
    affine = torch.diag(torch.tensor([1e-5, 1e-5, 1e-5, 1.0], dtype=torch.float64))
    x = MetaTensor(random_image(1, 1, 4, 4, 4), affine=affine)
    Explainer(OutputScore(), Saliency())(LinearImage((1, 4, 4, 4)), x)


def test_an_automatic_baseline_is_the_first_from_which_the_method_adds_up_and_is_named():
    torch.manual_seed(0)
    network = small_unet(channels=1, act="PRELU", norm="INSTANCE")
    x, target = random_image(1, 1, 16, 16), RegionScore(1, Box((3, 2), (14, 9)))
    method = IntegratedGradients(n_steps=4, baseline=Auto((Constant(0.0), Noise())), tolerance=None)
    explanation = Explainer(target, method)(network, x)
    assert explanation.facts["baseline"] == str(Noise())
    assert float(explanation.gap) <= 0.05
    assert Explainer(target, DeepLift(baseline="auto"))(network, x).facts["baseline"] == str(Blur())
    with pytest.raises(InputError, match="name a baseline"):
        Explainer(target, FeatureAblation(baseline="auto"))(network, x)


@pytest.mark.parametrize(
    ("gaps", "tried", "taken"),
    [
        ({(0.0, 255): 0.5, (1.0, 255): 0.01}, [(0.0, 255), (1.0, 255)], 1.0),
        ({(0.0, 255): 0.5, (1.0, 255): 0.2, (1.0, 999): 0.01}, [(0.0, 255), (1.0, 255), (1.0, 999)], 1.0),
        (
            {(0.0, 255): 0.5, (1.0, 255): 0.2, (1.0, 999): 0.1, (0.0, 999): 0.3},
            [(0.0, 255), (1.0, 255), (1.0, 999), (0.0, 999)],
            1.0,
        ),
    ],
    ids=["with few steps", "the nearest with all", "none"],
)
def test_many_steps_are_spent_on_the_candidate_that_came_nearest(gaps, tried, taken):
    runs = []

    def run(method):
        runs.append((method.baseline.value, method.max_steps))
        return Attribution({"image": torch.tensor([[1 + gaps[runs[-1]]]])}, torch.ones(1), torch.zeros(1))

    method = IntegratedGradients(baseline=Auto((Constant(0.0), Constant(1.0))), max_steps=999)
    found = attribute_from_first(method, 0.05, Clock(), run)
    assert runs == tried
    assert found.facts["baseline"] == str(Constant(taken))
    assert found.largest_gap == pytest.approx(min(gaps.values()), rel=1e-4)


def test_a_region_above_the_threshold_of_otsu_is_frozen():
    output = torch.cat([torch.zeros(1, 1, 4, 4), torch.arange(16.0).reshape(1, 1, 4, 4) ** 3], 1)
    mask = Predicted("otsu").mask(output, None, 1)
    assert mask.flatten().tolist() == [False] * 11 + [True] * 5
    with pytest.raises(InputError, match="'otsu' or None"):
        Predicted("best")
