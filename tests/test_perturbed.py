"""Many perturbed inputs at once: the same scores in any batch, each window no more often than needed."""

from __future__ import annotations

import itertools
import warnings

import captum.attr
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from networks import LinearImage, Rows, random_image, small_unet
from torch import nn

from monai_xai import (
    AttributionError,
    Blocks,
    Blur,
    Box,
    Constant,
    DiceScore,
    Explainer,
    FeatureAblation,
    InputError,
    KernelShap,
    Lime,
    Occlusion,
    OutputScore,
    Predicted,
    RegionScore,
    Rise,
    Road,
    ShapleyValues,
    ShapleyValueSampling,
    UnsupportedNetworkError,
    joined,
)
from monai_xai.joined import OutOfMemoryWarning
from monai_xai.memory import LiveTensors

INFERER = SlidingWindowInferer((16, 16), sw_batch_size=1, overlap=0.5)
REGION = RegionScore(1, Box((3, 5), (9, 14)))
BLOCKS = Blocks(8)
METHODS = {
    "Occlusion": Occlusion((2, 8, 8), (2, 4, 4), Blur()),
    "FeatureAblation": FeatureAblation(BLOCKS),
    "ShapleyValueSampling": ShapleyValueSampling(BLOCKS, n_samples=6),
    "ShapleyValues": ShapleyValues(Blocks((16, 12))),
    "KernelShap": KernelShap(BLOCKS, n_samples=40),
    "Lime": Lime(BLOCKS, n_samples=40),
    "Rise": Rise(n_samples=20, cells=4),
}


def explain(attributor, network, x, target=REGION, inferer=INFERER, **options):
    return Explainer(target, attributor, inferer, progress=False, **options)(network, x)


def memory_of_one(network, part):
    with torch.no_grad(), LiveTensors() as live:
        network(part.clone())
    return (live.peak + part.nbytes) / 2**30


@pytest.mark.parametrize("inferer", [INFERER, None], ids=["windows", "whole"])
@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_the_size_of_batches(method, inferer):
    network, x = Rows(small_unet(), batches := []), random_image(1, 2, 32, 24)
    least = memory_of_one(network, x) * 1.5
    one = explain(METHODS[method], network, x, inferer=inferer, memory_gib=least)
    assert max(batches) <= 1 + (inferer is not None) * 4
    many = explain(METHODS[method], network, x, inferer=inferer, memory_gib=1.0)
    assert max(batches) > 5
    torch.testing.assert_close(one.attributions["image"], many.attributions["image"], rtol=0, atol=1e-12)
    assert one.facts["passes"] <= many.facts["passes"]


@pytest.mark.parametrize("method", ["Occlusion", "FeatureAblation", "ShapleyValues"])
def test_equal_to_captum_over_the_whole_prediction(method):
    network, x = small_unet(), random_image(1, 2, 32, 24)
    start = Blur().draws(x)[0]
    ours = explain(METHODS[method], network, x)

    def score(inputs):
        return INFERER(inputs, network)[:, 1, 3:9, 5:14].mean((1, 2))

    reference = getattr(captum.attr, method)(score)
    options = {"sliding_window_shapes": (2, 8, 8), "strides": (2, 4, 4)} if method == "Occlusion" else {}
    if method != "Occlusion":
        options["feature_mask"] = METHODS[method].features.mask(x, "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference.attribute(x, baselines=start, **options)
    torch.testing.assert_close(ours.attributions["image"], expected.double(), rtol=0, atol=1e-6)


def test_only_windows_that_see_piece_and_region_are_computed():
    network, x = Rows(small_unet(), batches := []), random_image(1, 2, 48, 48)
    found = explain(FeatureAblation(BLOCKS, Constant(0.0)), network, x, RegionScore(1, Box((0, 0), (4, 4))))
    assert found.facts["active_windows"] == 1
    # One window: as it is, without each of the four blocks in it, two again for the check; and at the baseline.
    assert sum(batches) == 1 + 4 + 2 + 1


@pytest.mark.parametrize("shape", [(40, 32), (12, 64)], ids=["larger", "padded"])
def test_a_score_that_is_not_linear_costs_only_the_windows_that_see_the_piece(shape):
    network, x = Rows(small_unet(), batches := []), random_image(2, 2, *shape)

    def probability(output):
        return output.softmax(1)[:, 1].mean((1, 2))

    inferer = SlidingWindowInferer(
        (16, 16), sw_batch_size=1, overlap=0.5, mode="gaussian", padding_mode="reflect"
    )
    found = explain(FeatureAblation(BLOCKS), network, x, probability, inferer)
    start, mask = Blur().draws(x)[0], BLOCKS.mask(x, "image")
    clean = probability(inferer(x, network))
    spent = sum(batches)
    for number in mask.unique().tolist():
        without = probability(inferer(torch.where(mask == number, start, x), network))
        place = (mask == number).expand_as(x)
        torch.testing.assert_close(
            found.attributions["image"][place].reshape(2, -1)[:, 0], clean - without, rtol=0, atol=1e-12
        )
    assert spent < (sum(batches) - spent) * 0.7


def test_dice_is_updated_in_place():
    network, x = small_unet(), random_image(1, 2, 32, 32)
    found = explain(FeatureAblation(BLOCKS), network, x, DiceScore(1, Predicted()))
    start, mask = Blur().draws(x)[0], BLOCKS.mask(x, "image")
    frozen = INFERER(x, network).argmax(1) == 1
    for number in mask.unique().tolist():
        now = INFERER(torch.where(mask == number, start, x), network).argmax(1) == 1
        dice = 2 * (now & frozen).sum() / (now.sum() + frozen.sum())
        value = found.attributions["image"][(mask == number).expand_as(x)][0]
        assert float(value) == pytest.approx(1 - float(dice), abs=1e-12)


def test_a_network_whose_samples_influence_each_other_gets_one_at_a_time():
    class Centered(nn.Module):
        def forward(self, x):
            return (x - x.mean(0, keepdim=True) * (len(x) > 1)).sum(1, keepdim=True).repeat(1, 2, 1, 1)

    x = random_image(1, 2, 16, 16)
    found = explain(
        FeatureAblation(BLOCKS, Constant(0.0)), Centered(), x, RegionScore(1, Box((0, 0), (16, 16))), None
    )
    blocks = x.sum(1).reshape(2, 8, 2, 8).sum((1, 3)) / 256
    torch.testing.assert_close(found.attributions["image"][0, 0, ::8, ::8], blocks)


def test_a_network_that_remembers_is_refused():
    class Remembers(nn.Module):
        calls = 0.0

        def forward(self, x):
            self.calls = self.calls + 1.0
            return x * self.calls

    with pytest.raises(UnsupportedNetworkError, match="keeps something from call to call"):
        explain(FeatureAblation(BLOCKS), Remembers(), random_image(1, 2, 16, 16), inferer=None)


def test_memory_that_does_not_hold_one_part_is_refused_with_what_is_needed():
    network, x = small_unet(), random_image(1, 2, 32, 32)
    needed = memory_of_one(network, x)
    with pytest.raises(AttributionError, match=r"memory_gib=1e-06 .*Allow that much"):
        explain(FeatureAblation(BLOCKS), network, x, inferer=None, memory_gib=1e-6)
    explain(FeatureAblation(BLOCKS), network, x, inferer=None, memory_gib=needed * 1.05)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")]
)
def test_out_of_memory_halves_the_batch_and_goes_on(error):
    class Small(Rows):
        def forward(self, x):
            if len(x) > 3:
                raise error
            return super().forward(x)

    network, x = small_unet(), random_image(1, 2, 32, 32)
    with pytest.warns(OutOfMemoryWarning, match="going on with"):
        found = explain(FeatureAblation(BLOCKS), Small(network, []), x, inferer=None, memory_gib=1.0)
    expected = explain(FeatureAblation(BLOCKS), network, x, inferer=None)
    torch.testing.assert_close(
        found.attributions["image"], expected.attributions["image"], rtol=0, atol=1e-12
    )


def test_a_network_that_takes_no_batch_gets_one_at_a_time():
    class Single(nn.Module):
        def forward(self, x):
            return x.reshape(1, 2, 16, 16)

    x = random_image(1, 2, 16, 16)
    found = explain(
        FeatureAblation(BLOCKS, Constant(0.0)), Single(), x, RegionScore(1, Box((0, 0), (8, 8))), None
    )
    assert float(found.attributions["image"][0, 0, 0, 0]) == pytest.approx(float(x[0, 1, :8, :8].mean()))


def test_errors_of_the_network_are_not_taken_for_memory():
    class Broken(nn.Module):
        def forward(self, x):
            if (x == 0).any():
                raise RuntimeError("something else")
            return x

    with pytest.raises(AttributionError, match="something else"):
        explain(FeatureAblation(BLOCKS, Constant(0.0)), Broken(), random_image(1, 2, 16, 16), inferer=None)


@pytest.mark.parametrize("method", [FeatureAblation(BLOCKS), Occlusion((2, 5, 7), stride=(1, 3, 4))], ids=str)
@pytest.mark.parametrize("inferer", [None, INFERER], ids=["whole", "windows"])
@pytest.mark.parametrize("behind", [False, True], ids=["in place", "in .data"])
def test_a_network_that_works_in_its_input_spoils_no_later_piece(method, inferer, behind, monkeypatch):
    """Rows of a batch are written in the place alone where the next piece differs."""
    monkeypatch.setattr(joined, "MOST_PARTS", 2)  # many batches of one window

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_unet()

        def forward(self, x):
            x = x.data if behind else x
            return self.body(x.mul_(0.5).add_(1.0))

    class OutOfPlace(InPlace):
        def forward(self, x):
            return self.body(x * 0.5 + 1.0)

    x = random_image(2, 2, 32, 24)
    spoiled, whole = (
        explain(method, n.requires_grad_(False), x, inferer=inferer) for n in (InPlace(), OutOfPlace())
    )
    torch.testing.assert_close(spoiled.attributions["image"], whole.attributions["image"], rtol=0, atol=1e-12)


def test_a_network_that_reads_the_first_of_a_batch_gets_one_at_a_time():
    class Scaled(nn.Module):
        def forward(self, image, age):
            return image * (1 + age[0, 0] + age[0, 1])

    inputs = {"image": random_image(1, 2, 16, 16), "age": random_image(1, 2)}
    target = RegionScore(1, Box((0, 0), (16, 16)))
    found = explain(FeatureAblation(BLOCKS, Constant(0.0)), Scaled(), inputs, target, None)
    expected = inputs["image"][:, 1].mean() * inputs["age"]
    torch.testing.assert_close(found.attributions["age"], expected)


@pytest.mark.parametrize(
    "target", [lambda o: o[:, 1, 5, 5], lambda o: o.sigmoid_()[:, 1].mean((1, 2))], ids=["view", "in place"]
)
def test_targets_that_give_a_view_or_work_in_place_leave_the_kept_prediction_alone(target):
    network, x = small_unet().requires_grad_(False), random_image(1, 2, 32, 24)
    found = explain(FeatureAblation(BLOCKS), network, x, target)
    start, mask = Blur().draws(x)[0], BLOCKS.mask(x, "image")
    clean = target(INFERER(x, network)).clone()
    for number in mask.unique().tolist():
        without = target(INFERER(torch.where(mask == number, start, x), network))
        value = found.attributions["image"][(mask == number).expand_as(x)][0]
        assert float(value) == pytest.approx(float(clean - without), abs=1e-12)


def test_scores_do_not_change_when_their_batch_is_filled_anew():
    x = random_image(1, 2, 16, 16)
    method = KernelShap(BLOCKS, Constant(0.0), n_samples=300)
    found = explain(method, nn.Identity(), x, lambda o: o[:, 0, 5, 5], None)
    expected = torch.zeros(2, 2, dtype=x.dtype)
    expected[0, 0] = x[0, 0, 5, 5]
    torch.testing.assert_close(found.attributions["image"][0, 0, ::8, ::8], expected)


def test_sampled_values_over_windows_lie_within_their_standard_error():
    network, x = small_unet(), random_image(1, 2, 40, 40)
    exact = explain(ShapleyValueSampling(Blocks(10), n_samples=4000), network, x)
    assert exact.facts["standard_error"] == 0  # every window sees few of the 16 blocks
    drawn = explain(ShapleyValueSampling(Blocks(4), n_samples=60, seed=1), network, x)
    longer = explain(ShapleyValueSampling(Blocks(4), n_samples=600, seed=2), network, x)
    se = drawn.facts["standard_error"]
    assert 0 < longer.facts["standard_error"] < se / 2
    off = (drawn.attributions["image"] - longer.attributions["image"]).abs().max()
    assert float(off) < 4 * se
    assert abs(drawn.facts["residual"]) < 1e-12


def test_drawing_ends_at_the_tolerance():
    network, x = small_unet(), random_image(1, 2, 40, 40)
    loose = explain(ShapleyValueSampling(Blocks(4), n_samples=400, tolerance=0.2), network, x)
    tight = explain(ShapleyValueSampling(Blocks(4), n_samples=400, tolerance=0.002), network, x)
    assert loose.facts["passes"] < tight.facts["passes"]
    change = abs(float(tight.score - tight.baseline_score))
    assert loose.facts["standard_error"] <= 0.2 * change


def test_coarse_to_fine_finds_the_strongest_boxes_of_the_full_grid():
    network, x = LinearImage((1, 64, 64)), random_image(1, 1, 64, 64)
    with torch.no_grad():
        network.weight.zero_()
        network.weight[..., 20:36, 40:52] = 1.0  # what matters lies in few boxes
    full = explain(Occlusion((1, 4, 4), baseline=Constant(0.0)), network, x.abs(), OutputScore(), None)
    found = explain(
        Occlusion((1, 4, 4), baseline=Constant(0.0), top_k=5), network, x.abs(), OutputScore(), None
    )
    boxes, expected = (e.attributions["image"][0, 0, ::4, ::4].flatten() for e in (found, full))
    assert set(boxes.topk(5).indices.tolist()) == set(expected.topk(5).indices.tolist())
    torch.testing.assert_close(boxes.topk(5).values, expected.topk(5).values)
    assert found.facts["pieces_of_full_grid"] == full.facts["pieces"] == 256
    assert found.facts["pieces"] <= 64
    assert found.facts["largest_not_divided"] <= float(boxes.topk(5).values[-1])
    assert float(boxes.sum()) == pytest.approx(float(expected.sum()))  # what was not divided is shared out


def test_coarse_to_fine_through_windows_and_over_the_end_of_the_input():
    network, x = small_unet(), random_image(1, 2, 44, 38)
    full = explain(Occlusion((2, 5, 5)), network, x)
    found = explain(Occlusion((2, 5, 5), top_k=3), network, x)
    a, b = (e.attributions["image"][0, 0, ::5, ::5].flatten() for e in (found, full))
    strongest = b.abs().topk(3).indices
    torch.testing.assert_close(a[strongest], b[strongest])
    assert found.facts["pieces"] < full.facts["pieces"]


def test_coarse_to_fine_refuses_strides():
    with pytest.raises(InputError, match="side by side"):
        Occlusion((1, 4, 4), (1, 2, 2), top_k=5)


def test_shapley_values_refined_only_where_it_matters():
    network, x = small_unet(), random_image(1, 2, 40, 40)
    options = {"n_samples": 200, "seed": 1}
    full = explain(ShapleyValueSampling(Blocks(4), **options), network, x)
    found = explain(ShapleyValueSampling(Blocks(4), coarse=Blocks(12), **options), network, x)
    change = float(full.score - full.baseline_score)
    assert abs(found.facts["residual"]) < 1e-12
    assert found.facts["pieces"] < full.facts["pieces"] == found.facts["pieces_of_full_grid"]
    a, b = (e.attributions["image"][0, 0, ::4, ::4].flatten() for e in (found, full))
    strongest = b.abs().topk(5).indices
    torch.testing.assert_close(a[strongest], b[strongest], rtol=0, atol=0.1 * abs(change))
    assert found.facts["largest_not_divided"] < float(b.abs().max())


def test_coarse_features_that_cut_across_fine_ones_are_refined_within_both():
    network, x = LinearImage((1, 12, 12)), random_image(1, 1, 12, 12)
    method = ShapleyValueSampling(Blocks(5), Constant(0.0), n_samples=4, coarse=Blocks(6))
    found = explain(method, network, x, OutputScore(), None)
    total = float((network.weight.detach() * x).sum())
    assert float(found.score - found.baseline_score) == pytest.approx(total)
    assert abs(found.facts["residual"]) < 1e-12


@pytest.mark.parametrize("inferer", [INFERER, None], ids=["windows", "whole"])
@pytest.mark.parametrize("method", [FeatureAblation, Occlusion])
def test_a_conditional_baseline_is_imputed_for_each_piece(method, inferer):
    network, x, road = small_unet(), random_image(1, 2, 32, 24), Road(noise=0.0)
    options = {"features": Blocks(8)} if method is FeatureAblation else {"window": (2, 8, 8)}
    found = explain(method(baseline=road, **options), network, x, inferer=inferer)

    def score(inputs):
        output = network(inputs) if inferer is None else INFERER(inputs, network)
        return output[:, 1, 3:9, 5:14].mean((1, 2))

    for i, j in itertools.product(range(4), range(3)):
        removed = torch.zeros(1, 1, 32, 24, dtype=torch.bool)
        removed[..., 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = True
        effect = score(x) - score(road.impute(x, removed))
        torch.testing.assert_close(
            found.attributions["image"][:, 0, 8 * i, 8 * j], effect, rtol=0, atol=1e-12
        )
