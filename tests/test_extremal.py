"""Extremal perturbations: against slow rewrites of the paper's equations, planted boxes, and autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from networks import ImageAndVector, LinearImage, random_image, small_unet
from torch import nn

from monai_xai import (
    Box,
    Constant,
    Explainer,
    ExtremalPerturbation,
    InputError,
    OutputScore,
    Predicted,
    RegionScore,
    Samples,
    UnsupportedNetworkError,
)
from monai_xai.attributors.extremal import SeedBed, nearest

SIDES = SlidingWindowInferer(12, overlap=0.5, mode="gaussian")
BOX = RegionScore(1, Box((3, 2), (12, 9)))
FAST = ExtremalPerturbation(0.1, step=3, sigma=4.0, n_steps=12)


def explain(method, network, inputs, target=BOX, inferer=None):
    return Explainer(target, method, inferer)(network, inputs)


# -------------------------------------------------------------------------------------------- the smooth mask


def positions(length, step):
    """The centers of cells of ``step`` voxels that cover an axis, with what is too much on both sides."""
    count = math.ceil(length / step)
    first = -((count * step - length) // 2) + (step - 1) / 2
    return [first + step * i for i in range(count)]


def slow_mask(seeds, spatial, step, sigma):
    """The smooth max-convolution, voxel by voxel and seed by seed."""
    axes = [positions(n, step) for n in spatial]
    mask = torch.zeros(spatial, dtype=torch.float64)
    for voxel in itertools.product(*map(range, spatial)):
        above = below = 0.0
        for cell in itertools.product(*(range(len(axis)) for axis in axes)):
            distance = math.dist(voxel, [axis[i] for axis, i in zip(axes, cell, strict=True)]) / sigma
            if distance <= 1.5:
                value = math.exp(-2 * max(0.0, distance - 0.5) ** 2) * float(seeds[cell])
                above += value * math.exp(20 * value)
                below += math.exp(20 * value)
        mask[voxel] = above / below
    return mask


@pytest.mark.parametrize(
    ("spatial", "step", "sigma"),
    [((11,), 3, 4.0), ((9, 12), 4, 5.0), ((10, 7), 1, 1.5), ((5, 7, 6), 3, 3.0), ((4, 6, 5), 2, 3.0)],
    ids=str,
)
def test_a_mask_is_the_smooth_maximum_of_its_seeds(spatial, step, sigma):
    bed = SeedBed(spatial, step, sigma)
    assert bed.cells == tuple(len(positions(n, step)) for n in spatial)
    seeds = random_image(2, *bed.cells).sigmoid()
    slow = torch.stack([slow_mask(s, spatial, step, sigma) for s in seeds])
    torch.testing.assert_close(bed.grow(seeds), slow)


def test_a_mask_is_the_same_whatever_fits_in_memory(monkeypatch):
    bed, seeds = SeedBed((9, 12), 2, 3.0), random_image(2, 5, 6).sigmoid().requires_grad_()
    whole = bed.grow(seeds)
    (gradient,) = torch.autograd.grad(whole.square().sum(), seeds)
    monkeypatch.setattr("monai_xai.attributors.extremal._CHUNK", 1)
    torch.testing.assert_close(bed.grow(seeds), whole)
    torch.testing.assert_close(torch.autograd.grad(bed.grow(seeds).square().sum(), seeds)[0], gradient)


def test_the_nearest_mask_of_an_area_has_the_distance_of_sorted_vectors():
    mask = random_image(2, 6, 5).sigmoid()
    ideal = nearest(mask, 0.3, torch.randperm(30))
    reference = torch.cat([torch.zeros(21), torch.ones(9)])
    assert torch.equal(ideal.flatten(1).sum(1), torch.full((2,), 9.0, dtype=torch.float64))
    slow = (mask.flatten(1).sort(1)[0] - reference).square().sum(1)
    torch.testing.assert_close((mask - ideal).square().flatten(1).sum(1), slow)


# -------------------------------------------------------------------------------------------------- the games


@pytest.mark.parametrize("variant", ["preserve", "delete"])
def test_a_step_follows_the_gradient_of_the_objective(variant):
    network, x, baseline = small_unet(), random_image(1, 2, 16, 16), 0.3
    bed = SeedBed((16, 16), 4, 6.0)
    seeds = torch.full((1, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)

    def score(z):
        return network(z)[:, 1, 3:12, 2:9].mean()

    change = (score(x) - score(torch.full_like(x, baseline))).abs().detach()
    mask = bed.grow(seeds)
    kept = mask if variant == "preserve" else 1 - mask
    sign = 1 if variant == "preserve" else -1
    reference = torch.cat([torch.zeros(230), torch.ones(26)])
    area = (mask.flatten().sort()[0] - reference).square().mean()
    objective = sign * score(kept * x + (1 - kept) * baseline) / change - area
    (gradient,) = torch.autograd.grad(objective, seeds)
    expected = bed.grow((seeds + 16 * gradient).clamp(0, 1).detach())
    method = ExtremalPerturbation(0.1, step=4, sigma=6.0, baseline=baseline, variant=variant, n_steps=1)
    torch.testing.assert_close(explain(method, network, x).attributions["image"][:, 0], expected)


def planted(shape, box):
    """A network whose score is the mean of a box, and where that is."""
    network = LinearImage((1, *shape))
    network.weight.data[:] = 0
    network.weight.data[(0, 0, *(slice(*side) for side in box))] = 1
    inside = network.weight[0, 0].detach() > 0
    network.weight.data /= inside.sum()
    return network, inside


PLANTED = {
    "2d": ((24, 20), ((6, 14), (9, 17)), {"step": 1, "sigma": 1.5, "n_steps": 60}),
    "3d": ((10, 11, 12), ((2, 7), (4, 10), (5, 11)), {"step": 1, "sigma": 1.5, "n_steps": 40}),
}


@pytest.mark.parametrize("variant", ["preserve", "delete"])
@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_box_is_found(case, variant):
    shape, box, options = PLANTED[case]
    network, inside = planted(shape, box)
    area = float(inside.double().mean())
    method = ExtremalPerturbation(area, baseline=0.0, variant=variant, **options)
    x = torch.ones(1, 1, *shape, dtype=torch.float64)
    explanation = explain(method, network, x, OutputScore())
    found = explanation.attributions["image"][0, 0] > 0.5
    assert float((found & inside).sum() / (found | inside).sum()) > 0.8
    score = explanation.facts[f"score_{area:g}"]
    assert score > 0.85 if variant == "preserve" else score < 0.15
    assert explanation.facts[f"area_{area:g}"] == pytest.approx(area, abs=0.02)
    assert explanation.facts["passes"] == options["n_steps"] + 1


def test_the_unit_of_the_score_makes_no_difference():
    network, _ = planted((16, 16), ((4, 9), (5, 11)))
    x = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    method = ExtremalPerturbation(0.15, step=2, sigma=3.0, baseline=0.0, n_steps=20)
    one = explain(method, network, x, OutputScore())
    thousand = explain(method, network, 1000 * x, OutputScore())
    torch.testing.assert_close(one.attributions["image"], thousand.attributions["image"])
    assert thousand.facts["score_0.15"] == pytest.approx(1000 * one.facts["score_0.15"])


def test_maps_of_several_areas_are_summed_and_each_keeps_to_its_own():
    network, x = small_unet(), random_image(1, 2, 20, 20)
    options, areas = {"step": 2, "sigma": 3.0, "n_steps": 40}, (0.1, 0.3)
    together = explain(ExtremalPerturbation(areas, **options), network, x)
    single = [explain(ExtremalPerturbation(area, **options), network, x) for area in areas]
    torch.testing.assert_close(
        together.attributions["image"], sum(e.attributions["image"] for e in single), rtol=0, atol=1e-9
    )
    for area in areas:
        assert together.facts[f"area_{area}"] == pytest.approx(area, abs=0.03)
    assert together.facts["area_gap"] < 0.03
    assert together.attributions["image"].shape == (1, 1, 20, 20)
    assert together.delta is None


def test_several_images_have_a_mask_each_and_vectors_are_left():
    network = ImageAndVector(images=2)
    inputs = {
        "ct": random_image(1, 1, 16, 16),
        "pet": random_image(1, 1, 16, 16, seed=1),
        "vector": random_image(1, 3, seed=2),
    }
    method = ExtremalPerturbation(0.2, step=2, sigma=3.0, n_steps=40)
    explanation = explain(method, network, inputs)
    for name in ("ct", "pet"):
        assert float(explanation.attributions[name].mean()) == pytest.approx(0.2, abs=0.04)
    assert not torch.equal(explanation.attributions["ct"], explanation.attributions["pet"])
    assert torch.equal(explanation.attributions["vector"], torch.zeros(1, 3, dtype=torch.float64))


def test_maps_and_facts_are_averaged_over_baselines():
    network, x, values = small_unet(), random_image(1, 2, 16, 16), random_image(2, 2, 16, 16, seed=5)
    method = {"step": 3, "sigma": 4.0, "n_steps": 8}
    together = explain(ExtremalPerturbation(0.1, baseline=Samples(values), **method), network, x)
    single = [
        explain(ExtremalPerturbation(0.1, baseline=Constant(v[None]), **method), network, x) for v in values
    ]
    torch.testing.assert_close(
        together.attributions["image"], sum(e.attributions["image"] for e in single) / 2
    )
    for name in ("area_0.1", "score_0.1"):
        assert together.facts[name] == pytest.approx(sum(e.facts[name] for e in single) / 2)
    assert together.facts["passes"] == 18


# ------------------------------------------------------------------------------------------------------ hosts


class Stitched(nn.Module):
    """A network behind MONAI's own sliding windows, to be differentiated as a whole."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return SIDES(x, self.network)


def test_sliding_windows_equal_the_stitched_network():
    network, x = small_unet(), random_image(1, 2, 20, 16)
    windows = explain(FAST, network, x, inferer=SIDES)
    stitched = explain(FAST, Stitched(network), x)
    torch.testing.assert_close(
        windows.attributions["image"], stitched.attributions["image"], rtol=0, atol=1e-9
    )
    assert windows.facts["score_0.1"] == pytest.approx(stitched.facts["score_0.1"], rel=1e-9)


@pytest.mark.parametrize("inferer", [None, SIDES], ids=["whole", "windows"])
def test_two_samples_at_once_equal_each_alone(inferer):
    network, x, target = small_unet(), random_image(2, 2, 20, 16), RegionScore(1, Predicted())
    both = explain(FAST, network, x, target, inferer).attributions["image"]
    for i in range(2):
        alone = explain(FAST, network, x[i : i + 1], target, inferer).attributions["image"]
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-9)


def test_the_seed_decides_between_voxels_that_are_equal():
    network, _ = planted((16, 16), ((4, 7), (5, 8)))
    x = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    first, again, other = (
        explain(
            ExtremalPerturbation(0.3, step=2, sigma=3.0, baseline=0.0, n_steps=20, seed=seed),
            network,
            x,
            OutputScore(),
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.attributions["image"], again.attributions["image"])
    assert not torch.equal(first.attributions["image"], other.attributions["image"])
    assert (first.seed, other.seed) == (0, 1)


def test_single_precision_and_a_score_that_does_not_change():
    x = torch.ones(1, 1, 8, 8)
    explanation = explain(
        FAST, LinearImage((1, 8, 8)).float(), x, OutputScore()
    )  # a blurred constant is itself
    assert explanation.attributions["image"].dtype == torch.float32
    assert torch.isfinite(explanation.attributions["image"]).all()


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"areas": ()}, "between 0 and 1"),
        ({"areas": (0.1, 1.0)}, "between 0 and 1"),
        ({"areas": 0.0}, "between 0 and 1"),
        ({"step": 0}, "whole number of voxels"),
        ({"step": 4, "sigma": 2.0}, "sigma at least as large"),
        ({"n_steps": 0}, "at least one step"),
        ({"variant": "both"}, "'preserve' or 'delete'"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ExtremalPerturbation(**options)


class Rounded(nn.Module):
    """A network without a gradient."""

    def forward(self, x):
        return x.detach().round().mean((2, 3))


def test_what_cannot_be_masked_or_differentiated_is_named():
    with pytest.raises(InputError, match=r"masks images.*FeatureAblation"):
        explain(FAST, nn.Linear(3, 1).double(), random_image(2, 3), OutputScore())
    with pytest.raises(UnsupportedNetworkError, match="does not depend on the inputs through autograd"):
        explain(FAST, Rounded(), random_image(1, 1, 16, 16), OutputScore())
