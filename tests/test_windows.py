"""Sliding windows are attributed exactly: parity with MONAI's own inferer and autograd through it."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SliceInferer, SlidingWindowInferer, SlidingWindowInfererAdapt
from networks import ImageAndVector, random_image, small_unet

from monai_xai import (
    AttributionError,
    Box,
    DeepLift,
    Explainer,
    InputError,
    IntegratedGradients,
    Labeled,
    MarginScore,
    Predicted,
    RegionScore,
    Saliency,
    StitchedNetwork,
    UnsupportedInfererError,
)
from monai_xai.terms import InfererNetwork

SETTINGS = [
    {"roi_size": 16, "overlap": 0.25},
    {"roi_size": (16, 12), "overlap": 0.5, "mode": "gaussian"},
    {
        "roi_size": (16, 12),
        "overlap": (0.75, 0.0),
        "mode": "gaussian",
        "sigma_scale": (0.2, 0.1),
        "sw_batch_size": 3,
    },
    {"roi_size": (16, -1), "overlap": 0.6, "sw_batch_size": 4},
    {"roi_size": (16, 16), "overlap": 0.5, "buffer_steps": 2, "buffer_dim": 0},
    {"roi_size": (16, 16), "overlap": 0.5, "mode": "gaussian", "cache_roi_weight_map": True},
    {"roi_size": (48, 40), "cval": -1.5},
    {"roi_size": (32, 16), "overlap": 0.5, "padding_mode": "reflect", "mode": "gaussian"},
    {"roi_size": (40, 16), "overlap": 0.25, "padding_mode": "replicate"},
    {"roi_size": (40, 16), "overlap": 0.25, "padding_mode": "circular"},
    {"roi_size": (16, 16), "cpu_thresh": 10, "device": "cpu", "sw_device": "cpu"},
]
IDS = [", ".join(f"{key}={value}" for key, value in setting.items()) for setting in SETTINGS]


def gradient_through_monai(network, inferer, x, box, channel=1):
    """Return score and gradient by plain autograd through MONAI's own function."""
    leaf = x.clone().requires_grad_()
    (d0, d1), (e0, e1) = box.start, box.end
    score = inferer(leaf, network)[:, channel, d0:e0, d1:e1].mean((1, 2))
    return score.detach(), torch.autograd.grad(score.sum(), leaf)[0]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_both_routes_equal_autograd_through_the_inferer(setting, batch):
    network, x, box = small_unet(), random_image(batch, 2, 28, 24), Box((4, 6), (15, 13))
    inferer = SlidingWindowInferer(**setting)
    score, gradient = gradient_through_monai(network, inferer, x, box)
    window_route = Explainer(RegionScore(1, box), Saliency(), inferer)(network, x)
    stitched_route = Explainer(lambda o: o[:, 1, 4:15, 6:13].mean((1, 2)), Saliency(), inferer)(network, x)
    for explanation in (window_route, stitched_route):
        torch.testing.assert_close(explanation.attributions["image"], gradient, rtol=0, atol=1e-12)
        torch.testing.assert_close(explanation.score, score, rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_stitched_forward_is_the_inferer_itself(setting):
    network, x = small_unet(), random_image(2, 2, 28, 24)
    inferer = SlidingWindowInferer(**setting)
    with torch.no_grad():
        assert torch.equal(StitchedNetwork(network, inferer)(x), inferer(x, network))


def test_both_routes_in_three_dimensions():
    network, x, box = small_unet(3), random_image(1, 2, 20, 17, 18), Box((4, 6, 5), (12, 9, 10))
    inferer = SlidingWindowInferer((12, 12, 8), 2, overlap=0.5, mode="gaussian")
    leaf = x.clone().requires_grad_()
    score = inferer(leaf, network)[:, 1, 4:12, 6:9, 5:10].mean()
    (gradient,) = torch.autograd.grad(score, leaf)
    for target in (RegionScore(1, box), lambda o: o[:, 1, 4:12, 6:9, 5:10].mean((1, 2, 3))):
        explanation = Explainer(target, Saliency(), inferer)(network, x)
        torch.testing.assert_close(explanation.attributions["image"], gradient, rtol=0, atol=1e-12)


def test_a_target_that_is_not_linear_is_exact_through_the_stitched_route():
    network, x = small_unet(), random_image(2, 2, 28, 24)
    inferer = SlidingWindowInferer(16, 2, overlap=0.5, mode="gaussian")

    def soft_volume(output):
        return output.softmax(1)[:, 1].mean((1, 2))

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_volume(inferer(leaf, network)).sum(), leaf)
    explanation = Explainer(soft_volume, Saliency(), inferer)(network, x)
    torch.testing.assert_close(explanation.attributions["image"], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("linear", [True, False], ids=["window route", "stitched route"])
def test_several_images_and_a_vector_equal_windowing_by_hand(linear):
    network = ImageAndVector(images=2)
    inputs = {
        "ct": random_image(2, 1, 20, 18),
        "pet": random_image(2, 1, 20, 18, seed=1),
        "clinical": random_image(2, 3),
    }
    inferer = SlidingWindowInferer(12, 2, overlap=0.5, mode="gaussian")
    target = RegionScore(1, Box((3, 3), (11, 9))) if linear else lambda o: o[:, 1, 3:11, 3:9].mean((1, 2))
    explanation = Explainer(target, Saliency(), inferer)(network, inputs)
    for sample in range(2):
        ct, pet, clinical = (x[sample : sample + 1].clone().requires_grad_() for x in inputs.values())

        def predictor(window, clinical=clinical):
            return network(window[:, :1], window[:, 1:], clinical.expand(len(window), -1))

        score = inferer(torch.cat([ct, pet], 1), predictor)[:, 1, 3:11, 3:9].mean()
        for name, expected in zip(inputs, torch.autograd.grad(score, [ct, pet, clinical]), strict=True):
            torch.testing.assert_close(
                explanation.attributions[name][sample : sample + 1], expected, rtol=0, atol=1e-12
            )


def test_windows_without_region_are_skipped_and_voxels_outside_get_zero():
    network, x = small_unet(), random_image(1, 2, 64, 64)
    inferer = SlidingWindowInferer(16, overlap=0.0)
    explanation = Explainer(RegionScore(1, Box((2, 2), (14, 30))), Saliency(), inferer)(network, x)
    assert (explanation.facts["windows"], explanation.facts["active_windows"]) == (16, 2)
    attribution = explanation.attributions["image"]
    assert (attribution[:, :, 16:] == 0).all()
    assert (attribution[:, :, :16, 32:] == 0).all()
    assert (attribution[:, :, :16, :32] != 0).any()


def test_signals_have_windows_too():
    network = torch.nn.Conv1d(2, 2, 3, padding=1).double()
    x, inferer = random_image(1, 2, 40), SlidingWindowInferer((16,), overlap=0.5)
    found = Explainer(RegionScore(1, Box((3,), (30,))), Saliency(), inferer, progress=False)(network, x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(inferer(leaf, network)[:, 1, 3:30].mean(), leaf)
    torch.testing.assert_close(found.attributions["image"], expected, rtol=0, atol=1e-12)


def test_the_network_runs_once_per_active_window_and_no_more():
    network, x = small_unet(), random_image(1, 2, 64, 64)
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    Explainer(RegionScore(1, Box((2, 2), (14, 30))), Saliency(), SlidingWindowInferer(16, overlap=0.0))(
        network, x
    )
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("method", [IntegratedGradients(), DeepLift()], ids=lambda m: m.name)
@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[6], SETTINGS[7]], ids=[IDS[1], IDS[6], IDS[7]])
def test_complete_methods_add_up_through_windows(method, setting):
    network, x = small_unet(), random_image(2, 2, 28, 24)
    explanation = Explainer(RegionScore(1, Predicted()), method, SlidingWindowInferer(**setting))(network, x)
    assert (explanation.gap <= 0.01).all()
    expected = explanation.attributions["image"].flatten(1).sum(1) - (
        explanation.score - explanation.baseline_score
    )
    torch.testing.assert_close(explanation.delta, expected)


def test_deep_lift_through_windows_is_the_sum_of_captum_on_every_window():
    from captum.attr import DeepLift as CaptumDeepLift

    network, x = small_unet(), random_image(1, 2, 24, 24)
    inferer = SlidingWindowInferer(16, overlap=0.5)
    explanation = Explainer(RegionScore(1, Box((0, 0), (24, 24))), DeepLift(0.0), inferer)(network, x)
    counts = inferer(torch.ones_like(x[:, :1]), lambda w: w * 0 + 1)
    total, covered = torch.zeros_like(x), torch.zeros_like(counts)
    for i in (0, 8):
        for j in (0, 8):
            covered[..., i : i + 16, j : j + 16] += 1
    for i in (0, 8):
        for j in (0, 8):
            place = (..., slice(i, i + 16), slice(j, j + 16))

            class Score(torch.nn.Module):
                def __init__(self, weights):
                    super().__init__()
                    self.network, self.weights = network, weights

                def forward(self, window):
                    return (self.network(window)[:, 1:2] * self.weights).flatten(1).sum(1)

            window = x[place].clone().requires_grad_()
            with pytest.warns(UserWarning, match="forward, backward hooks"):
                part = CaptumDeepLift(Score(1 / covered[place] / 24**2)).attribute(window, window * 0)
            total[place] += part.detach()
    torch.testing.assert_close(explanation.attributions["image"], total, rtol=0, atol=1e-12)


def test_margin_is_the_difference_of_two_regions_scores():
    network, x, box = small_unet(), random_image(1, 2, 28, 24), Box((4, 6), (15, 13))
    inferer = SlidingWindowInferer(16, overlap=0.5)
    margin, one, zero = (
        Explainer(target, Saliency(), inferer)(network, x).attributions["image"]
        for target in (MarginScore(1, 0, box), RegionScore(1, box), RegionScore(0, box))
    )
    torch.testing.assert_close(margin, one - zero)


def test_adaptive_inferer_is_a_sliding_window_and_slice_inferer_is_replayed():
    network, box = small_unet(), Box((4, 6), (15, 13))
    x = random_image(1, 2, 28, 24)
    adaptive = SlidingWindowInfererAdapt(16, overlap=0.5)
    _, gradient = gradient_through_monai(network, adaptive, x, box)
    explanation = Explainer(RegionScore(1, box), Saliency(), adaptive)(network, x)
    torch.testing.assert_close(explanation.attributions["image"], gradient, rtol=0, atol=1e-12)
    assert explanation.facts["windows"] > 0

    volume = random_image(1, 2, 28, 24, 3).requires_grad_()
    slices = SliceInferer(roi_size=(16, 16), spatial_dim=2, overlap=0.5)
    score = slices(volume, network)[:, 1, 4:9, 4:9, 1:2].mean()
    (gradient,) = torch.autograd.grad(score, volume)
    explanation = Explainer(RegionScore(1, Box((4, 4, 1), (9, 9, 2))), Saliency(), slices)(
        network, volume.detach()
    )
    torch.testing.assert_close(explanation.attributions["image"], gradient, rtol=0, atol=1e-12)
    assert isinstance(InfererNetwork(network, slices)(volume), torch.Tensor)


class HalfResolution(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 2)


@pytest.mark.parametrize("target", [RegionScore(0, Box((0, 0), (4, 4))), lambda o: o[:, 0].mean((1, 2))])
def test_outputs_of_another_resolution_are_refused_by_name(target):
    from monai_xai import XaiError

    with pytest.raises(XaiError, match=r"resolution|one grid"):
        Explainer(target, Saliency(), SlidingWindowInferer(8))(HalfResolution(), random_image(1, 1, 16, 16))


def with_weights(inferer, weights):
    inferer.roi_weight_map = weights
    return inferer


@pytest.mark.parametrize(
    ("inferer", "message"),
    [
        (SlidingWindowInferer(8, overlap=(0.5, 0.5, 0.5)), "overlap.*needs 2 numbers"),
        (SlidingWindowInferer((8, 8, 8)), "roi_size.*needs 2 numbers"),
        (with_weights(SlidingWindowInferer(8), torch.ones(4, 4)), r"shape of a window, \(8, 8\)"),
    ],
    ids=["overlap", "roi_size", "roi_weight_map"],
)
def test_settings_that_do_not_fit_the_image_are_named(inferer, message):
    with pytest.raises(InputError, match=message):
        Explainer(RegionScore(1, Box((0, 0), (4, 4))), Saliency(), inferer)(
            small_unet(), random_image(1, 2, 24, 24)
        )


def test_a_network_that_does_not_take_the_window_is_named_with_the_shapes():
    target = RegionScore(1, Labeled())
    with pytest.raises(AttributionError, match=r"one window failed on inputs \[\(1, 3, 16, 16\)\]"):
        Explainer(target, Saliency(), SlidingWindowInferer(8))(
            small_unet(), random_image(1, 3, 16, 16), label=torch.ones(1, 1, 16, 16)
        )


def test_window_coordinates_are_refused_by_name():
    with pytest.raises(UnsupportedInfererError, match="with_coord"):
        Explainer(RegionScore(1, Box((0, 0), (4, 4))), Saliency(), SlidingWindowInferer(16, with_coord=True))(
            small_unet(), random_image(1, 2, 24, 24)
        )


def test_grids_that_differ_are_refused_with_their_shapes():
    inputs = {"ct": random_image(1, 1, 20, 18), "pet": random_image(1, 1, 10, 9)}
    with pytest.raises(ValueError, match=r"share grid.*\(1, 1, 10, 9\)"):
        Explainer(RegionScore(1, Box((0, 0), (4, 4))), Saliency(), SlidingWindowInferer(8))(
            small_unet(), inputs
        )


def test_methods_by_hooks_refuse_a_stitched_target_and_say_what_works():
    explainer = Explainer(lambda o: o[:, 1].mean((1, 2)), DeepLift(), SlidingWindowInferer(16))
    with pytest.raises(UnsupportedInfererError, match="RegionScore"):
        explainer(small_unet(), random_image(1, 2, 24, 24))
