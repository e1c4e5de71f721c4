"""Integrated Gradients along curved paths, against closed forms and slow rewrites of the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.networks.layers.convutils import gaussian_1d
from networks import ImageAndVector, LinearImage, random_image, small_unet
from torch import nn

import monai_xai
from monai_xai import (
    BlurIntegratedGradients,
    Box,
    ChannelMinimum,
    ClassScore,
    Constant,
    Explainer,
    GuidedIntegratedGradients,
    InputError,
    IntegratedGradients,
    OutputScore,
    RegionScore,
    Samples,
)
from monai_xai.attributors.refinement import Node, StraightPiece, pieces_kept, refine
from monai_xai.baselines import Blur
from monai_xai.clock import Clock

pytestmark = pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")

SIDES = {2: (12, 10), 3: (8, 6, 8)}
BOXES = {2: Box((3, 2), (9, 7)), 3: Box((2, 1, 2), (6, 5, 5))}
WINDOWS = {2: 8, 3: (6, 4, 6)}
METHODS = [
    BlurIntegratedGradients(6, Blur(1.5)),
    BlurIntegratedGradients(baseline=Blur(1.5)),
    GuidedIntegratedGradients(6, baseline=Blur(1.5)),
    GuidedIntegratedGradients(8, baseline=Blur(1.5), tolerance=1e-3, max_steps=60),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
each_dims = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])
each_extent = pytest.mark.parametrize("windows", [False, True], ids=["whole", "windows"])


def explain(method, network, inputs, target=None, inferer=None):
    return Explainer(OutputScore() if target is None else target, method, inferer)(network, inputs)


def region_score(dims, network, windows=False):
    """Return the mean logit of channel 1 over the box as a plain function, with MONAI's own sliding windows."""
    inside = tuple(slice(a, b) for a, b in zip(BOXES[dims].start, BOXES[dims].end, strict=True))

    def score(x, *others):
        if windows:
            output = sliding_window_inference(x, WINDOWS[dims], 2, network, overlap=0.5, mode="gaussian")
        else:
            output = network(x, *others)
        return output[(slice(None), 1, *inside)].flatten(1).mean(1)

    return score


def inferer_of(dims, windows):
    return SlidingWindowInferer(WINDOWS[dims], 2, overlap=0.5, mode="gaussian") if windows else None


def gradient_of(score, points):
    leaves = [point.clone().requires_grad_() for point in points]
    return torch.autograd.grad(score(*leaves).sum(), leaves)


# ------------------------------------------------------------------------------------------ rewrites of the papers


def convolved(x, sigma):
    """Blur by one dense kernel over replicated edges."""
    if sigma == 0:
        return x
    line = gaussian_1d(torch.tensor(sigma)).double()
    dims, radius = x.ndim - 2, len(line) // 2
    kernel = line
    for _ in range(dims - 1):
        kernel = kernel[..., None] * line
    padded = nn.functional.pad(x.flatten(0, 1)[:, None], [radius] * 2 * dims, mode="replicate")
    convolve = nn.functional.conv2d if dims == 2 else nn.functional.conv3d
    return convolve(padded, kernel[None, None]).reshape(x.shape)


def blurred_rewrite(score, x, vector, vector_start, sigma, n_steps):
    """Sum the products of equation 5 over the scales: gradient at L(x, alpha), times what L(x, alpha) gains."""
    maps, ways = [0.0, 0.0], np.linspace(0, 1, n_steps + 1)
    inputs = [x] if vector is None else [x, vector]
    for before, after in pairwise(ways):
        ends = []
        for way in (before, after):
            ends.append([convolved(x, sigma * (1 - way) ** 2)])
            if vector is not None:
                ends[-1].append((1 - way) * vector_start + way * vector)
        middle = [(a + b) / 2 for a, b in zip(*ends, strict=True)]
        for i, gradient in enumerate(gradient_of(score, middle)):
            maps[i] = maps[i] + gradient * (ends[1][i] - ends[0][i])
    return maps[: len(inputs)]


def guided_path(gradient_at, start, end, fraction, n_steps):
    """Return the points at which Algorithm 1 of the paper takes gradients, and the end: one sample, NumPy vectors."""
    x, total = start.copy(), np.abs(end - start).sum()
    points = [x.copy()]
    for step in range(1, n_steps + 1):
        slopes = np.abs(gradient_at(x))
        target = total * (1 - step / n_steps)
        share = np.inf
        while share > 1:
            slopes[x == end] = np.inf
            threshold = np.quantile(slopes, fraction, method="lower")
            selected = [i for i in range(len(x)) if slopes[i] <= threshold and slopes[i] < np.inf]
            reach = sum(abs(end[i] - x[i]) for i in selected)
            open_distance = np.abs(end - x).sum() - target
            if open_distance < 1e-14 * total:
                break
            share = open_distance / reach
            for i in selected:
                x[i] = end[i] if share > 1 - 1e-12 else (1 - share) * x[i] + share * end[i]
        points.append(x.copy())
    return points


def guided_rewrite(score, inputs, starts, fraction, n_steps):
    """Walk with each sample by itself; the gradient of a step is the mean of its ends."""
    totals = [torch.zeros_like(x) for x in inputs]
    for row in range(len(inputs[0])):
        sizes = [x[row].numel() for x in inputs]

        def gradient_at(flat, sizes=sizes):
            parts = torch.from_numpy(flat).split(sizes)
            shaped = [p.reshape(1, *x.shape[1:]) for p, x in zip(parts, inputs, strict=True)]
            return torch.cat([g.flatten() for g in gradient_of(score, shaped)]).numpy()

        start, end = (torch.cat([x[row].flatten() for x in xs]).numpy() for xs in (starts, inputs))
        points = guided_path(gradient_at, start, end, fraction, n_steps)
        gradients = [gradient_at(point) for point in points]
        flat = sum(
            (b - a) * (g + h) / 2
            for (a, b), (g, h) in zip(pairwise(points), pairwise(gradients), strict=True)
        )
        for total, part in zip(totals, torch.from_numpy(flat).split(sizes), strict=True):
            total[row] = part.reshape(total.shape[1:])
    return totals


@each_dims
@each_extent
def test_the_blurred_path_equals_a_slow_rewrite(dims, windows):
    network, x = small_unet(dims, norm="INSTANCE"), random_image(2, 2, *SIDES[dims])
    mine = explain(
        BlurIntegratedGradients(5, Blur(1.5)),
        network,
        x,
        RegionScore(1, BOXES[dims]),
        inferer_of(dims, windows),
    )
    score = region_score(dims, network, windows)
    (expected,) = blurred_rewrite(score, x, None, None, 1.5, 5)
    torch.testing.assert_close(mine.attributions["image"], expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        change = score(x) - score(convolved(x, 1.5))
    torch.testing.assert_close(mine.delta, expected.flatten(1).sum(1) - change, rtol=0, atol=1e-10)


@each_dims
@each_extent
@pytest.mark.parametrize("fraction", [0.1, 0.25, 1.0])
def test_the_guided_path_equals_a_slow_rewrite(dims, windows, fraction):
    network, x = small_unet(dims), random_image(2, 2, *SIDES[dims])
    mine = explain(
        GuidedIntegratedGradients(4, fraction, baseline=0.25),
        network,
        x,
        RegionScore(1, BOXES[dims]),
        inferer_of(dims, windows),
    )
    score, start = region_score(dims, network, windows), torch.full_like(x, 0.25)
    (expected,) = guided_rewrite(score, [x], [start], fraction, 4)
    torch.testing.assert_close(mine.attributions["image"], expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        change = score(x) - score(start)
    torch.testing.assert_close(mine.delta, expected.flatten(1).sum(1) - change, rtol=0, atol=1e-10)


def test_both_paths_equal_their_rewrites_with_an_image_and_a_vector():
    network = ImageAndVector()
    inputs = {"image": random_image(2, 1, *SIDES[2]), "vector": random_image(2, 3, seed=2)}
    target, score = RegionScore(1, BOXES[2]), region_score(2, network)
    blurred = BlurIntegratedGradients(5, {"image": Blur(1.5), "vector": Constant(0.5)})
    mine = explain(blurred, network, inputs, target).attributions
    expected = blurred_rewrite(score, *inputs.values(), torch.full((2, 3), 0.5).double(), 1.5, 5)
    torch.testing.assert_close(dict(mine), dict(zip(inputs, expected, strict=True)), rtol=0, atol=1e-10)
    mine = explain(GuidedIntegratedGradients(5, baseline=0.25), network, inputs, target).attributions
    starts = [torch.full_like(x, 0.25) for x in inputs.values()]
    expected = guided_rewrite(score, list(inputs.values()), starts, 0.25, 5)
    torch.testing.assert_close(dict(mine), dict(zip(inputs, expected, strict=True)), rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------- closed forms


@each_method
def test_on_a_linear_network_every_path_gives_weight_times_difference(method):
    network, x = LinearImage((2, 6, 5)), random_image(2, 2, 6, 5)
    explanation = explain(method, network, x)
    expected = (network.weight * (x - convolved(x, 1.5))).detach()
    torch.testing.assert_close(explanation.attributions["image"], expected, rtol=0, atol=1e-12)
    assert explanation.delta.abs().max() < 1e-12


@each_method
def test_of_a_sum_of_squares_every_path_gives_each_its_own_change(method):
    class Squares(nn.Module):
        def forward(self, x):
            return x.square().flatten(1).sum(1, keepdim=True)

    x = random_image(2, 2, 6, 5)
    maps = explain(method, Squares(), x).attributions["image"]
    expected = x.square() - convolved(x, 1.5).square()
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-12)


def test_of_a_product_the_factor_that_moves_last_gets_all():
    """At (0.5, 0.1) the gradient is (0.1, 0.5): the first moves while the other is 0.1, then the other."""

    class Product(nn.Module):
        def forward(self, x):
            return x[:, :1] * x[:, 1:]

    x, start = torch.tensor([[3.0, 2.0]]).double(), torch.tensor([[0.5, 0.1]]).double()
    maps = explain(GuidedIntegratedGradients(100, baseline=start), Product(), x).attributions["input"]
    first, second = 0.1 * 2.5, 3.0 * 1.9
    torch.testing.assert_close(maps, torch.tensor([[first, second]]).double(), rtol=0, atol=0.1)
    straight = explain(GuidedIntegratedGradients(100, 1.0, baseline=start), Product(), x).attributions[
        "input"
    ]
    reference = explain(IntegratedGradients(8, baseline=start), Product(), x).attributions["input"]
    torch.testing.assert_close(straight, reference, rtol=0, atol=1e-6)
    assert (maps - reference).abs().max() > 1


# ------------------------------------------------------------------------------------------ what the paths promise


@each_dims
@pytest.mark.parametrize("norm", ["BATCH", "INSTANCE"])
def test_twice_the_steps_leave_a_quarter_of_the_gap_of_the_blurred_path(dims, norm):
    network, x = small_unet(dims, act="TANH", norm=norm), random_image(1, 2, *SIDES[dims])
    coarse, fine = (
        explain(BlurIntegratedGradients(n, Blur(2.0)), network, x, RegionScore(1, BOXES[dims])).gap
        for n in (64, 128)
    )
    assert float(coarse / fine) == pytest.approx(4, rel=0.05)
    assert fine < 0.01


def test_the_gap_of_the_guided_path_shrinks_with_steps():
    network, x = small_unet(act="TANH"), random_image(1, 2, *SIDES[2])
    coarse, fine = (
        explain(GuidedIntegratedGradients(n), network, x, RegionScore(1, BOXES[2])) for n in (2, 200)
    )
    assert fine.gap < 0.02
    assert fine.gap < 0.1 * coarse.gap


@each_dims
@each_extent
@pytest.mark.parametrize("method", [BlurIntegratedGradients, GuidedIntegratedGradients])
def test_a_path_is_refined_until_it_adds_up(method, dims, windows):
    network, x = small_unet(dims), random_image(1, 2, *SIDES[dims])
    target, inferer = RegionScore(1, BOXES[dims]), inferer_of(dims, windows)
    refined = explain(method(baseline=Blur(2.0), tolerance=0.002), network, x, target, inferer)
    assert float(refined.gap) <= 0.002
    loose = explain(method(baseline=Blur(2.0), tolerance=0.1), network, x, target, inferer)
    assert float(loose.gap) <= 0.1
    assert loose.facts["passes"] < refined.facts["passes"]


@each_dims
def test_the_refined_blurred_path_is_that_of_many_equal_steps(dims):
    network, x = small_unet(dims, act="TANH"), random_image(2, 2, *SIDES[dims])
    many, refined = (
        explain(method, network, x, RegionScore(1, BOXES[dims])).attributions["image"]
        for method in (
            BlurIntegratedGradients(1000, Blur(2.0)),
            BlurIntegratedGradients(baseline=Blur(2.0), tolerance=1e-5),
        )
    )
    assert (refined - many).norm() < 1e-3 * many.norm()


def test_the_steps_of_a_refined_guided_path_are_those_of_the_algorithm():
    """Only how they are integrated differs: not at all where the gradient is linear, and to the end where it jumps."""
    network, x = small_unet(), random_image(1, 2, *SIDES[2])
    start = torch.full_like(x, 0.25)
    score = region_score(2, network)

    def gradient_at(flat):
        return gradient_of(score, [torch.from_numpy(flat).reshape(x.shape)])[0].flatten().numpy()

    points = guided_path(gradient_at, start.flatten().numpy(), x.flatten().numpy(), 0.25, 6)
    expected = torch.zeros_like(x)
    for a, b in pairwise(points):
        a, b = (torch.from_numpy(p).reshape(x.shape) for p in (a, b))
        middles = [(a + (k + 0.5) / 2000 * (b - a)) for k in range(2000)]
        expected += (b - a) * gradient_of(score, [torch.cat(middles)])[0].mean(0)
    method = GuidedIntegratedGradients(6, baseline=0.25, tolerance=1e-3, max_steps=2000)
    mine = explain(method, network, x, RegionScore(1, BOXES[2])).attributions["image"]
    assert (mine - expected).norm() < 0.01 * expected.norm()
    steps = explain(replace(method, tolerance=None), network, x, RegionScore(1, BOXES[2])).attributions[
        "image"
    ]
    assert (steps - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize(
    "method",
    [
        BlurIntegratedGradients(tolerance=1e-12, max_steps=9),
        *(GuidedIntegratedGradients(tolerance=1e-12, max_steps=n) for n in (30, 100, 301)),
        GuidedIntegratedGradients(20, tolerance=1e-12, max_steps=60),
    ],
    ids=str,
)
def test_refinement_ends_at_its_last_step_and_says_what_is_missing(method):
    network, x = small_unet(norm="INSTANCE"), random_image(1, 2, *SIDES[2])
    explanation = explain(method, network, x, RegionScore(1, BOXES[2]))
    assert method.max_steps - 2 <= explanation.facts["passes"] <= method.max_steps
    assert explanation.gap > 1e-12


class Staircase(nn.Module):
    """Flat for most features, and steep and full of edges for the last, which move last."""

    def forward(self, x):
        last = x[:, -10:]
        return (0.01 * x[:, :-10].sum(1) + (last[..., None] - torch.linspace(0, 1, 30)).relu().sum((1, 2)))[
            :, None
        ]


def test_the_last_legs_of_the_guided_path_keep_their_part_of_the_passes():
    x = torch.linspace(0.5, 1.0, 100)[None].double()
    loose, strict = (
        explain(GuidedIntegratedGradients(baseline=0.0, tolerance=t), Staircase(), x) for t in (1e-4, 1e-9)
    )
    assert float(loose.gap) <= 1e-4
    assert strict.facts["passes"] <= 500
    assert float(strict.gap) <= 1e-4


def test_an_easy_sample_keeps_its_passes_beside_a_hard_one():
    class Mixed(nn.Module):
        """Edges at many places for the second sample alone, which has a mark in its first feature."""

        def forward(self, x):
            edges = torch.sin(300 * x[:, 1:]).relu().sum(1)
            smooth = x[:, 1:].square().sum(1) + (x[:, 1:] - 0.4).relu().sum(1)
            return (smooth + 5 * x[:, 0].clamp(0, 1) * edges)[:, None]

    x = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)).double()
    x[:, 0] = torch.tensor([0.0, 1.0])
    method = GuidedIntegratedGradients(10, baseline=0.0, tolerance=1e-3, max_steps=80)
    both, alone = explain(method, Mixed(), x), explain(method, Mixed(), x[:1])
    torch.testing.assert_close(
        both.attributions["input"][:1], alone.attributions["input"], rtol=0, atol=1e-12
    )
    assert both.gap[1] > 1e-3 > both.gap[0]


def test_little_memory_costs_passes_and_changes_no_more():
    def integrate(kept):
        def node(way):
            slope = 1 + 18 * math.cos(60 * way)
            return Node(way, way + 0.3 * math.sin(60 * way), (torch.tensor(slope).double(),), slope)

        refinement, taken = refine(StraightPiece, 0.01, 1, 1000, Clock(), kept=kept), 0
        ways = next(refinement)
        while True:
            taken += len(ways)
            try:
                ways = refinement.send([node(way) for way in ways])
            except StopIteration as end:
                return float(end.value[0]), taken

    (much, enough), (little, more) = integrate(10**6), integrate(4)
    assert abs(much - (1 + 0.3 * math.sin(60))) <= 0.01
    assert little == pytest.approx(much, abs=1e-9)
    assert enough < more < 3 * enough


@pytest.mark.parametrize(
    ("node", "pieces"), [(8 * 32**2, 128), (16 * 64**3, 16), (16 * 182 * 218 * 182, 4), (16 * 128**3, 10)]
)
def test_pieces_hold_their_gradients_as_far_as_memory_goes(node, pieces):
    assert pieces_kept(node) == pieces


def test_a_path_that_is_steep_at_its_end_alone_is_refined_there():
    class Late(nn.Module):
        def forward(self, x):
            mean = x.mean(1)
            return ((mean - 0.97).relu() * torch.sin(9000 * mean) * 5 + mean)[:, None]

    x = torch.ones(1, 20).double()
    method = IntegratedGradients(baseline=0.0, tolerance=1e-3, max_steps=1000)
    assert float(explain(method, Late(), x).gap) <= 1e-3


def test_a_piece_is_taken_back_by_the_rule_by_which_it_was_added():
    """Both rules miss as much as each other, and rounding decides between them."""

    def nodes(error):
        slopes = ((0.0, 0.0), (0.5, 0.0), (1.0, 1.0))
        return [Node(w, (5 / 24 + error) * w, (torch.tensor([g]).double(),), g) for w, g in slopes]

    added, again = StraightPiece(*nodes(1e-7)), StraightPiece(*nodes(-1e-7))
    assert added.rule != again.rule
    again.rule = added.rule
    totals = [torch.zeros(1).double()]
    added.add_to(totals)
    assert totals[0].any()
    again.add_to(totals, -1.0)
    assert not totals[0].any()


def test_a_long_path_ends_when_its_time_is_over():
    network, x = small_unet(), random_image(1, 2, *SIDES[2])
    for method, passes in (
        (BlurIntegratedGradients(tolerance=1e-12), 3),
        (GuidedIntegratedGradients(tolerance=1e-12), 101),
    ):
        explainer = Explainer(
            RegionScore(1, BOXES[2]), method, max_seconds=1e-9, progress=False, tolerated_gap=10.0
        )
        explanation = explainer(network, x)
        assert explanation.facts["ended_after"] == 1e-9
        assert explanation.facts["passes"] == passes


@each_method
@each_extent
def test_two_samples_at_once_equal_each_alone(method, windows):
    network, x = small_unet(norm="INSTANCE"), random_image(2, 2, *SIDES[2])
    target, inferer = RegionScore(1, BOXES[2]), inferer_of(2, windows)
    both = explain(method, network, x, target, inferer)
    for i in range(2):
        alone = explain(method, network, x[i : i + 1], target, inferer)
        torch.testing.assert_close(
            both.attributions["image"][i], alone.attributions["image"][0], rtol=0, atol=1e-10
        )
        torch.testing.assert_close(both.delta[i], alone.delta[0], rtol=0, atol=1e-10)


@each_method
def test_paths_are_averaged_over_the_samples_of_a_vector(method):
    network, values = ImageAndVector(), random_image(3, 3, seed=5)
    inputs = {"image": random_image(1, 1, *SIDES[2]), "vector": random_image(1, 3, seed=2)}

    def maps(baseline):
        own = replace(method, baseline={"image": Blur(1.5), "vector": baseline})
        return explain(own, network, inputs, RegionScore(1, BOXES[2]))

    together, single = maps(Samples(values)), [maps(Constant(value[None])) for value in values]
    for name in inputs:
        expected = torch.stack([s.attributions[name] for s in single]).mean(0)
        torch.testing.assert_close(together.attributions[name], expected)
    assert together.facts["passes"] == sum(s.facts["passes"] for s in single)


def test_the_guided_path_ends_where_nothing_has_to_move():
    network, x = small_unet(), random_image(1, 2, *SIDES[2])
    explanation = explain(GuidedIntegratedGradients(3, baseline=x), network, x, RegionScore(1, BOXES[2]))
    assert not explanation.attributions["image"].any()
    assert explanation.delta == 0


def test_the_guided_path_ends_with_an_error_where_the_gradient_is_nan():
    class Root(nn.Module):
        def forward(self, x):
            return (x.sqrt() * 0).flatten(1).sum(1, keepdim=True)

    with pytest.raises(monai_xai.AttributionError, match="no finite gradient"):
        explain(GuidedIntegratedGradients(3, baseline=0.0), Root(), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(("method", "passes"), [(IntegratedGradients, 3), (GuidedIntegratedGradients, 101)])
def test_a_gradient_that_is_nan_is_not_refined(method, passes):
    calls = 0

    class Root(nn.Module):
        def forward(self, x):
            nonlocal calls
            calls += torch.is_grad_enabled()
            return (x.sqrt() * 0).flatten(1).sum(1, keepdim=True) + x.mean((1, 2, 3))[:, None]

    with pytest.raises(monai_xai.AttributionError, match="no finite gradient"):
        explain(method(baseline=0.0), Root(), torch.ones(1, 1, 4, 4))
    assert calls <= passes + 1


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlurIntegratedGradients(0), r"BlurIntegratedGradients\(n_steps=0\)"),
        (lambda: IntegratedGradients(8, max_steps=None), r"max_steps=None.*whole number"),
        (lambda: IntegratedGradients(tolerance=float("nan")), r"tolerance=nan.*positive"),
        (lambda: GuidedIntegratedGradients(300, tolerance=0.01), "takes 601 gradients at least"),
        (lambda: GuidedIntegratedGradients(2.5), r"n_steps=2.5.*whole number"),
        (lambda: GuidedIntegratedGradients(fraction=0.0), r"fraction=0.0.*\(0, 1\]"),
        (lambda: GuidedIntegratedGradients(fraction=25), "fraction=25"),
        (lambda: BlurIntegratedGradients(baseline=0.0), r"got Constant\(0.0\).*IntegratedGradients"),
        (lambda: BlurIntegratedGradients(baseline="auto"), r"needs a Blur\(sigma\)"),
        (lambda: BlurIntegratedGradients(baseline={"image": ChannelMinimum()}), r"needs a Blur\(sigma\)"),
    ],
)
def test_bad_arguments_are_refused_with_the_cure(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_blurred_path_needs_an_image():
    with pytest.raises(InputError, match=r"needs an image to blur.*\(1, 4\).*IntegratedGradients\(\)"):
        explain(BlurIntegratedGradients(), nn.Linear(4, 2), torch.randn(1, 4), ClassScore(0))
