"""Metrics that call the network: closed forms, slow rewrites through MONAI's own inferer, Captum on the same draws."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient as CaptumInputXGradient
from captum.attr import Saliency as CaptumSaliency
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.networks.nets import ViT
from networks import ImageAndVector, LinearImage, random_image, small_unet
from scipy.stats import pearsonr, spearmanr
from skimage.metrics import structural_similarity
from torch import nn

from monai_xai import (
    Blocks,
    Blur,
    Box,
    ClassScore,
    Constant,
    DiceScore,
    Explainer,
    FeatureAblation,
    GradCam,
    InputError,
    InputXGradient,
    IntegratedGradients,
    LogOddsScore,
    MarginScore,
    OutputScore,
    Predicted,
    RegionScore,
    Saliency,
    Samples,
    UnsupportedNetworkError,
)
from monai_xai import metrics as m
from monai_xai.metrics.faithfulness import NO_CHANGE, SAME_EVERYWHERE, admissible_shifts
from monai_xai.metrics.perturbations import Disturbed, Perturbation, Players, chosen_in_turn
from monai_xai.metrics.questions import ask
from monai_xai.metrics.randomization import execution_order, tensors_of
from monai_xai.metrics.robustness import measured_noise
from monai_xai.perturbed import CachedScore

ZERO = Constant(0.0)
EXACT = Explainer(OutputScore(), InputXGradient())  # of a linear network: what each voxel contributes
GRADIENT = Explainer(OutputScore(), Saliency())
BLOCKS = Blocks(2)
AGAINST_ZERO = m.RandomRemoval(BLOCKS, ZERO, share=0.3)


def linear(*shape, n=2):
    """Return a linear network and its inputs."""
    return LinearImage(shape), random_image(n, *shape, seed=3)


each_linear = pytest.mark.parametrize("shape", [(1, 8, 8), (2, 4, 6, 4)], ids=["2D", "3D, two channels"])


def close(a, b, rtol=1e-6, atol=1e-9):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=rtol, atol=atol)


def weight_maps(network, x):
    return network.weight.detach().expand_as(x).clone()


@dataclass(frozen=True, eq=False)
class Given(Perturbation):
    """Draws that the test knows: what is taken from the inputs."""

    draws: tuple = ()

    def prepare(self, scoring):
        return lambda number: Disturbed(
            tuple(x - i for x, i in zip(scoring.values, self.draws[number], strict=True))
        )


class Counted(nn.Module):
    """Counts how many samples (windows) a network sees."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.seen = SimpleNamespace(count=0)  # a list would be restored

    def forward(self, x):
        self.seen.count += len(x)
        return self.network(x)


# ------------------------------------------------------------------------------------------- closed forms


@each_linear
def test_gradient_of_a_linear_network_has_no_infidelity(shape):
    network, x = linear(*shape)
    found = m.fidelity(
        GRADIENT, network, x, explanation=weight_maps(network, x), perturbation=m.GaussianPerturbation(0.5)
    )
    assert found.observed.abs().min() > 0
    close(found.infidelity.values, torch.zeros(2))
    close(found.normalized_infidelity.values, torch.zeros(2))
    close(found.r2.values, torch.ones(2))


@each_linear
def test_zero_map_has_the_mean_squared_effect_as_infidelity(shape):
    network, x = linear(*shape)
    draws = tuple((random_image(2, *shape, seed=seed),) for seed in range(7))
    expected = torch.stack([(i * network.weight).flatten(1).sum(1) ** 2 for (i,) in draws]).mean(0)
    options = {"explanation": torch.zeros_like(x), "perturbation": Given(draws), "n_draws": 7}
    close(m.infidelity(GRADIENT, network, x, **options).values, expected.detach())
    r2 = m.fidelity_r2(GRADIENT, network, x, **options)
    assert r2.values.isnan().all()
    assert "zero" in r2.reasons[0]


@pytest.mark.parametrize("factor", [1.0, 0.01, 1e4])
@pytest.mark.parametrize("explainer", [EXACT, GRADIENT], ids=["contributions", "gradient"])
def test_any_positive_multiple_of_the_exact_map_explains_all(explainer, factor):
    network, x = linear(1, 8, 8)
    exact = weight_maps(network, x) * (x if explainer is EXACT else 1)
    found = m.fidelity(explainer, network, x, explanation=exact * factor, perturbation=AGAINST_ZERO)
    close(found.r2.values, torch.ones(2))
    close(found.normalized_infidelity.values, torch.zeros(2))
    assert (found.infidelity.values > 1e-3).all() == (factor != 1.0)


def test_a_map_of_the_wrong_sign_explains_nothing():
    network, x = linear(1, 8, 8)
    wrong = -weight_maps(network, x) * x
    close(
        m.fidelity_r2(EXACT, network, x, explanation=wrong, perturbation=AGAINST_ZERO).values, torch.zeros(2)
    )


@each_linear
def test_sensitivity_n_of_the_exact_map_is_one_for_all_sizes(shape):
    network, x = linear(*shape)
    found = m.sensitivity_n(
        EXACT, network, x, features=BLOCKS, imputer=ZERO, sizes=(1, 2, 3, 5, 0.9), n_draws=12
    )
    assert set(found) == {1, 2, 3, 5, 0.9}
    for scores in found.values():
        close(scores.values, torch.ones(2))


def test_sensitivity_n_is_pearson_of_sums_and_effects():
    network, x = linear(1, 8, 8, n=1)
    maps = random_image(1, 1, 8, 8, seed=9)
    found = m.faithfulness_correlation(
        EXACT, network, x, explanation=maps, features=Blocks(4), imputer=ZERO, size=2, n_draws=40
    )
    sums = maps.unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2)).flatten()
    effects = (x * network.weight.detach()).unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2)).flatten()
    pairs = [(i, j) for i in range(4) for j in range(i)]
    chosen = []
    for number in range(40):
        generator = torch.Generator().manual_seed(number)
        chosen.append(sorted(torch.rand(4, generator=generator, dtype=torch.float64).argsort()[:2].tolist()))
    assert {tuple(c) for c in chosen} <= {(j, i) for i, j in pairs}
    expected = pearsonr([float(sums[c].sum()) for c in chosen], [float(effects[c].sum()) for c in chosen])[0]
    close(found.values[0], expected)


def test_set_of_all_features_has_no_correlation_but_a_reason():
    network, x = linear(1, 8, 8)
    found = m.sensitivity_n(EXACT, network, x, features=Blocks(4), imputer=ZERO, sizes=(4,), n_draws=5)[4]
    assert found.values.isnan().all()
    assert "only one set" in found.reasons[0]


def test_completeness_gap_of_a_linear_network_is_zero():
    network, x = linear(1, 8, 8)
    explainer = Explainer(OutputScore(), IntegratedGradients(n_steps=3, baseline=ZERO))
    close(m.completeness(explainer, network, x).values, torch.zeros(2))
    assert m.completeness(GRADIENT, network, x).reasons == ("Saliency does not promise to sum up",) * 2
    with pytest.raises(InputError, match="delta"):
        m.completeness(explainer, network, x, explanation=x)


def test_completeness_is_the_relative_gap():
    network, x = linear(1, 8, 8)
    explainer = Explainer(OutputScore(), IntegratedGradients(n_steps=3, baseline=ZERO))
    explanation = explainer(network, x)
    wrong = replace(explanation, delta=explanation.score - explanation.baseline_score)
    close(m.completeness(explainer, network, x, explanation=wrong).values, torch.ones(2))
    unmoved = replace(explanation, baseline_score=explanation.score)
    assert "nothing to explain" in m.completeness(explainer, network, x, explanation=unmoved).reasons[0]


def test_gradient_of_a_linear_network_does_not_move():
    network, x = linear(1, 8, 8)
    close(m.max_sensitivity(GRADIENT, network, x).values, torch.zeros(2))
    zero = m.sensitivity(GRADIENT, network, x, explanation=torch.zeros_like(x), n_draws=2)
    assert zero.maximum.values.isnan().all()
    assert zero.average.values.isnan().all()


def test_sensitivity_of_input_times_gradient_has_a_closed_form():
    network, x = linear(1, 8, 8)
    draws = tuple((0.1 * random_image(2, 1, 8, 8, seed=seed),) for seed in range(4))
    w = network.weight.detach()
    changes = torch.stack(
        [(i * w).flatten(1).norm(dim=1) / (x * w).flatten(1).norm(dim=1) for (i,) in draws], 1
    )
    found = m.sensitivity(EXACT, network, x, perturbation=Given(draws), n_draws=4)
    close(found.maximum.values, changes.amax(1))
    close(found.average.values, changes.mean(1))


# ------------------------------------------------------------------------------------------------- Captum


class Classifier(nn.Module):
    def __init__(self, channels=1, dims=2):
        super().__init__()
        torch.manual_seed(1)
        conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if dims == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
        self.body = nn.Sequential(conv(channels, 4, 3, padding=1), nn.Tanh(), pool(2), nn.Flatten())
        self.head = nn.Linear(4 * 2**dims, 3)
        self.double().eval()

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity_equals_captums_on_the_same_draws(normalize):
    network, x = Classifier(), random_image(2, 1, 8, 8)
    draws = tuple((0.3 * random_image(2, 1, 8, 8, seed=seed),) for seed in range(6))
    explainer = Explainer(ClassScore(1), Saliency())
    explanation = explainer(network, x)

    def perturb(inputs):  # 6 repeats of each of two samples, one after the other
        noise = torch.stack([i for (i,) in draws], 1).flatten(0, 1)
        return noise, inputs - noise

    expected = captum_infidelity(
        network,
        perturb,
        x,
        explanation.attributions["image"],
        target=1,
        n_perturb_samples=6,
        normalize=normalize,
    )
    measure = m.normalized_infidelity if normalize else m.infidelity
    found = measure(explainer, network, x, explanation=explanation, perturbation=Given(draws), n_draws=6)
    assert (expected > 1e-8).all()
    close(found.values, expected)


def test_r2_is_one_minus_normalized_infidelity_over_the_squared_effect():
    network, x = Classifier(), random_image(2, 1, 8, 8)
    explainer = Explainer(ClassScore(1), InputXGradient())
    found = m.fidelity(explainer, network, x, perturbation=AGAINST_ZERO, n_draws=30)
    expected = 1 - found.normalized_infidelity.values / found.observed.square().mean(1)
    assert ((expected > 0.1) & (expected < 1)).all()
    close(found.r2.values, expected)


@pytest.mark.parametrize(
    ("attributor", "captum"),
    [(Saliency(), CaptumSaliency), (InputXGradient(), CaptumInputXGradient)],
    ids=["Saliency", "InputXGradient"],
)
def test_max_sensitivity_equals_captums_on_the_same_draws(attributor, captum):
    network, x = Classifier(), random_image(2, 1, 8, 8)
    draws = tuple((0.05 * random_image(2, 1, 8, 8, seed=seed),) for seed in range(5))

    def perturb(inputs):
        return inputs - torch.stack([i for (i,) in draws], 1).flatten(0, 1)

    explainer = Explainer(ClassScore(1), attributor)
    method = captum(network)
    signed = {"abs": False} if captum is CaptumSaliency else {}

    def attribute(inputs, target):  # Captum hands over, and wants back, a tuple the first time
        (x,) = inputs if isinstance(inputs, tuple) else (inputs,)
        maps = method.attribute(x.clone().requires_grad_(), target=target, **signed)
        return (maps,) if isinstance(inputs, tuple) else maps

    expected = sensitivity_max(attribute, x, perturb, n_perturb_samples=5, target=1)
    found = m.max_sensitivity(explainer, network, x, perturbation=Given(draws), n_draws=5)
    assert (expected > 1e-4).all()
    close(found.values, expected)


# -------------------------------------------------------------------------------------------------- curves


def test_deletion_of_a_linear_network_is_the_sum_of_what_went():
    network, x = linear(1, 8, 8)
    found = m.deletion_curve(EXACT, network, x, features=BLOCKS, imputer=ZERO, steps=8, until=1.0)
    effects = (x * network.weight.detach()).unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)).flatten(1)
    gone = torch.cat([torch.zeros(2, 1), effects.sort(1, descending=True).values.cumsum(1)], 1)[:, ::2]
    close(found.fractions, torch.linspace(0, 1, 9))
    close(found.raw, gone[:, -1:] - gone)
    close(found.scores, gone / gone[:, -1:])
    close(found.area, np.trapezoid((gone / gone[:, -1:]).numpy(), dx=1 / 8))
    least = m.deletion_curve(
        EXACT, network, x, features=BLOCKS, imputer=ZERO, steps=8, until=1.0, order="least"
    )
    close(least.scores, 1 - found.scores.flip(1))
    inserted = m.insertion_curve(EXACT, network, x, features=BLOCKS, imputer=ZERO, steps=8, until=1.0)
    close(inserted.scores, 1 - found.scores)
    aopc = m.region_perturbation(EXACT, network, x, features=BLOCKS, imputer=ZERO, steps=8, until=1.0)
    close(aopc.values, gone.mean(1))


INFERER = SlidingWindowInferer(roi_size=(16, 16), sw_batch_size=1, overlap=0.5, mode="gaussian")


@pytest.mark.parametrize("inserts", [False, True], ids=["deletion", "insertion"])
@pytest.mark.parametrize("imputer", [Blur(2.0), m.Road(noise=0.0)], ids=["blur", "road"])
@pytest.mark.parametrize("until", [0.25, 1.0])
def test_curves_equal_a_slow_loop_through_monais_inferer(inserts, imputer, until):
    network, x = small_unet(), random_image(2, 2, 32, 24)
    explainer = Explainer(RegionScore(1, Box((4, 4), (12, 14))), Saliency(), INFERER)
    maps = random_image(2, 2, 32, 24, seed=5)
    curve = m.insertion_curve if inserts else m.deletion_curve
    found = curve(
        explainer, network, x, explanation=maps, features=Blocks(4), imputer=imputer, steps=6, until=until
    )

    def score(image):
        with torch.no_grad():
            output = sliding_window_inference(image, (16, 16), 1, network, 0.5, "gaussian")
        return output[:, 1, 4:12, 4:14].mean((1, 2))

    def without(gone):
        if isinstance(imputer, m.Road):
            return imputer.impute(x, gone)
        return torch.where(gone, imputer.draws(x)[0], x)

    blocks = maps.sum(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)).flatten(1)  # (2, 48)
    rank = blocks.argsort(1, descending=True).argsort(1).reshape(2, 8, 6)
    rank = rank.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    expected = []
    for fraction in found.fractions.tolist():
        first = rank < math.floor(48 * fraction + 0.5)
        expected.append(score(without(~first if inserts else first)))
    clean, emptied = score(x), score(without(torch.ones_like(rank, dtype=torch.bool)))
    close(found.raw, torch.stack(expected, 1))
    close(found.scores, (clean[:, None] - torch.stack(expected, 1)) / (clean - emptied)[:, None])


@pytest.mark.parametrize("until", [0.3, 1.0])
def test_25_steps_cost_at_most_25_evaluations_of_the_active_windows(until):
    network, x = Counted(small_unet(3, channels=1)), random_image(1, 1, 32, 32, 32)
    inferer = SlidingWindowInferer(roi_size=(16, 16, 16), sw_batch_size=1, overlap=0.5)
    explainer = Explainer(RegionScore(1, Box((2, 2, 2), (7, 7, 7))), Saliency(), inferer)
    explanation = explainer(network, x)
    active, windows = explanation.facts["active_windows"], explanation.facts["windows"]
    assert active < windows / 10
    network.seen.count = 0
    options = {"explanation": explanation, "features": Blocks(4), "steps": 25, "until": until}
    found = m.deletion_curve(explainer, network, x, **options)
    assert len(found.fractions) >= 25
    assert 0 < network.seen.count <= 25 * active + 1  # one look at a window tells how many channels there are
    assert found.evaluations <= 25
    assert found.areas.values.isfinite().all()


def test_windows_that_see_no_difference_are_not_computed_again():
    network, x = small_unet(), random_image(1, 2, 32, 32)
    explainer = Explainer(RegionScore(1, Box((0, 0), (32, 32))), Saliency(), INFERER)
    with ask(explainer, network, x) as asked:
        cached = CachedScore(asked.scoring)
        clean = cached.pin(asked.scoring.values)
        assert cached.evaluations * len(asked.scoring.terms) == 9 + 2  # whether windows influence each other
        changed = x.clone()
        changed[..., 0, 0] += 1  # only the first window sees the corner
        close(cached((changed,)), asked.scoring.score((changed,)))
        assert cached.evaluations * 9 == 9 + 2 + 1
        close(cached((x,)), clean)
        assert cached.evaluations * 9 == 9 + 2 + 1


def test_context_alone_is_deleted_where_a_mask_is_kept():
    network, x = linear(1, 8, 8)
    keep = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    keep[..., :4, :] = True
    found = m.deletion_curve(EXACT, network, x, features=BLOCKS, imputer=ZERO, steps=4, until=1.0, keep=keep)
    close(found.emptied, (x * network.weight.detach() * keep).flatten(1).sum(1))
    inside = m.deletion_curve(
        EXACT, network, x, features=BLOCKS, imputer=ZERO, steps=4, until=1.0, within=keep
    )
    close(inside.emptied, (x * network.weight.detach() * ~keep).flatten(1).sum(1))
    with pytest.raises(InputError, match="grid of none"):
        m.deletion_curve(EXACT, network, x, keep=torch.zeros(2, 1, 5, 5))
    nothing = m.deletion_curve(EXACT, network, x, features=BLOCKS, keep=torch.ones_like(keep))
    assert nothing.reasons == ("no feature may be taken away",) * 2


def test_curve_may_score_the_dice_of_the_predicted_mask():
    network, x = small_unet(), random_image(1, 2, 16, 16)
    explainer = Explainer(RegionScore(1), Saliency())
    found = m.deletion_curve(
        explainer, network, x, features=Blocks(4), imputer=ZERO, steps=5, score=DiceScore(1)
    )
    close(found.clean, torch.ones(1))
    with torch.no_grad():
        masks = [network(image).argmax(1) == 1 for image in (x, torch.zeros_like(x))]
    close(found.emptied, 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()).reshape(1))


def test_curve_without_order_or_effect_has_a_reason():
    network, x = linear(1, 8, 8)
    flat = m.deletion_curve(EXACT, network, x, explanation=torch.ones_like(x), features=BLOCKS, imputer=ZERO)
    assert flat.reasons == (SAME_EVERYWHERE,) * 2
    assert flat.areas.values.isnan().all()
    still = m.deletion_curve(
        EXACT, network, x, explanation=random_image(2, 1, 8, 8), features=BLOCKS, imputer=Constant(x)
    )
    assert still.reasons == (NO_CHANGE,) * 2


def test_draws_of_an_imputer_are_averaged():
    network, x = linear(1, 8, 8)
    others = random_image(3, 1, 8, 8, seed=8)
    found = m.deletion_curve(EXACT, network, x, features=BLOCKS, imputer=Samples(others), steps=4, until=1.0)
    close(found.emptied, (others * network.weight.detach()).flatten(1).sum(1).mean().expand(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps=1"),
        ({"until": 0.0}, "until=0.0"),
        ({"order": "best"}, "'best'"),
        ({"explanation": torch.zeros(2, 1, 4, 4)}, re.escape("(2, 1, 4, 4)")),
        ({"explanation": {"other": torch.zeros(2, 1, 8, 8)}}, "'image'"),
        ({"explanation": torch.full((2, 1, 8, 8), torch.nan)}, "NaN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_curve_that_cannot_be_is_refused(options, message):
    network, x = linear(1, 8, 8)
    with pytest.raises(InputError, match=message):
        m.deletion_curve(EXACT, network, x, **options)


def test_contributions_are_not_judged_by_noise():
    network, x = linear(1, 8, 8)
    with pytest.raises(InputError, match="RandomRemoval"):
        m.infidelity(EXACT, network, x, perturbation=m.GaussianPerturbation())


def test_removals_take_every_feature_before_one_comes_again():
    network, x = linear(1, 6, 12)
    with ask(GRADIENT, network, x, None) as asked:
        disturb = m.RandomRemoval(BLOCKS, ZERO, share=1 / 6).prepare(asked.scoring)  # 3 of 18 blocks
        rounds = [torch.stack([disturb(6 * turn + part).chosen[0] for part in range(6)]) for turn in range(3)]
    for chosen in rounds:
        assert (chosen.sum(1) == 3).all() and (chosen.sum(0) == 1).all()
    assert not torch.equal(rounds[0], rounds[1]) and not torch.equal(rounds[1], rounds[2])


def test_removals_of_a_number_that_does_not_divide_the_features_leave_none_out():
    present = torch.tensor([[True] * 10, [True, False] * 3 + [True] * 4])
    size = torch.tensor([3, 2])
    draws = torch.stack([chosen_in_turn(present, size, number, seed=1) for number in range(4)])
    assert (draws.sum(2) == size).all()
    assert ((draws.sum(0) > 0) == present).all() and draws.sum(0).max() == 2
    alone = [chosen_in_turn(present[1:], size[1:], number, seed=1)[0] for number in range(4)]
    assert torch.equal(torch.stack(alone), draws[:, 1])  # whatever is beside it


def test_several_targets_are_refused():
    network, x = small_unet(), random_image(1, 2, 16, 16)
    explainer = Explainer({"a": RegionScore(0), "b": RegionScore(1)}, Saliency())
    with pytest.raises(InputError, match="a, b"):
        m.infidelity(explainer, network, x)


def test_painted_values_predict_the_effect_of_their_feature_once():
    network, x = linear(1, 8, 8)
    explainer = Explainer(OutputScore(), FeatureAblation(BLOCKS, ZERO))
    found = m.fidelity(explainer, network, x, perturbation=AGAINST_ZERO, n_draws=8)
    close(found.predicted, found.observed)


def test_map_of_one_channel_speaks_about_all_channels():
    network, x = small_unet(), random_image(1, 2, 16, 16)
    explainer = Explainer(RegionScore(1, Box((0, 0), (8, 8))), GradCam("model.0"))
    maps = explainer(network, x).attributions["image"]
    assert maps.shape[1] == 1
    options = {"features": Blocks(4), "steps": 4}
    one = m.deletion_curve(explainer, network, x, **options)
    both = m.deletion_curve(explainer, network, x, explanation=maps.expand(-1, 2, -1, -1), **options)
    close(one.raw, both.raw)


# ------------------------------------------------------------------------------------------------------ ROAD


@pytest.mark.parametrize("dims", [2, 3])
def test_road_is_exact_on_a_linear_ramp(dims):
    axes = torch.meshgrid(*[torch.arange(7.0, dtype=torch.float64)] * dims, indexing="ij")
    ramp = sum(axis * 10.0 ** (dims - 1 - i) for i, axis in enumerate(axes))[None, None]
    center = (0, 0, *[3] * dims)
    for radius in (0, 1):
        removed = torch.zeros_like(ramp, dtype=torch.bool)
        removed[(0, 0, *[slice(3 - radius, 4 + radius)] * dims)] = True
        emptied = torch.where(removed, -99.0, ramp)
        found = m.Road(noise=0.0).impute(emptied, removed)
        assert float(found[center]) == pytest.approx(33.0 if dims == 2 else 333.0, abs=1e-9)
        close(found, ramp)


@pytest.mark.parametrize("dims", [2, 3])
def test_road_weights_neighbors_as_the_paper(dims):
    x = random_image(1, 1, *[3] * dims)
    removed = torch.zeros_like(x, dtype=torch.bool)
    removed[(0, 0, *[1] * dims)] = True
    weights = {2: {1: 1 / 6, 2: 1 / 12}, 3: {1: 1 / 14, 2: 1 / 28, 3: 1 / 56}}[dims]
    expected = sum(
        weights[distance] * float(x[(0, 0, *place)])
        for place in np.ndindex(*[3] * dims)
        if (distance := sum(abs(i - 1) for i in place))
    )
    found = m.Road(noise=0.0).impute(x, removed)
    assert float(found[(0, 0, *[1] * dims)]) == pytest.approx(expected, abs=1e-12)
    close(found[~removed], x[~removed])


def test_road_solves_the_system_of_the_paper():
    x = random_image(1, 2, 9, 8)
    removed = random_image(1, 2, 9, 8, seed=1) > -0.5
    removed[:, 1, :3] = True
    found = m.Road(noise=0.0).impute(x, removed)
    assert torch.equal(found[~removed], x[~removed])
    for channel in range(2):
        matrix, right = np.eye(72), x[0, channel].flatten().numpy().copy()
        for i, j in np.argwhere(removed[0, channel].numpy()):
            near = [(a, b) for a in (i - 1, i, i + 1) for b in (j - 1, j, j + 1) if 0 <= a < 9 and 0 <= b < 8]
            weights = {
                place: 1.0 / (abs(place[0] - i) + abs(place[1] - j)) for place in near if place != (i, j)
            }
            for (a, b), weight in weights.items():
                matrix[i * 8 + j, a * 8 + b] = -weight / sum(weights.values())
            right[i * 8 + j] = 0
        close(found[0, channel].flatten(), np.linalg.solve(matrix, right))


def test_road_where_nothing_is_left_gives_the_mean():
    x = random_image(2, 2, 6, 6)
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    close(m.Road(noise=0.0).impute(x, everything), x.mean((2, 3), keepdim=True).expand_as(x))
    close(m.Road().draws(x)[0], x.mean((2, 3), keepdim=True).expand_as(x))
    vector = random_image(2, 3)
    close(m.Road().impute(vector, torch.tensor([[True, False, True]])), vector * torch.tensor([0, 1, 0]))


def test_road_adds_noise_where_voxels_were_removed_only():
    x = random_image(2, 1, 8, 8)
    removed = torch.zeros_like(x, dtype=torch.bool)
    removed[..., 2:6, 2:6] = True
    quiet, loud = m.Road(noise=0.0).impute(x, removed), m.Road(noise=0.5, seed=1).impute(x, removed)
    assert torch.equal(quiet[~removed], loud[~removed])
    assert (quiet[removed] != loud[removed]).all()
    assert torch.equal(loud, m.Road(noise=0.5, seed=1).impute(x, removed))
    assert torch.equal(loud[:1], m.Road(noise=0.5, seed=1).impute(x[:1], removed[:1]))


# -------------------------------------------------------------------------- batches, inputs, innocence


UNET_EXPLAINER = Explainer(RegionScore(1, Predicted()), InputXGradient(), INFERER)
METRICS = {
    "deletion": lambda *a: m.deletion_curve(*a, features=Blocks(4), steps=5).areas,
    "insertion with road": lambda *a: (
        m.insertion_curve(*a, features=Blocks(4), imputer=m.Road(), steps=4).areas
    ),
    "region perturbation": lambda *a: m.region_perturbation(*a, features=Blocks(4), steps=4),
    "infidelity": lambda *a: m.infidelity(*a, n_draws=4),
    "r2": lambda *a: m.fidelity_r2(*a, n_draws=4),
    "faithfulness": lambda *a: m.faithfulness_correlation(*a, features=Blocks(4), n_draws=5),
    "max sensitivity": lambda *a: m.max_sensitivity(*a, n_draws=2),
    "stability": lambda *a: m.stability(*a, kind="pearson").worst(),
    "psc": lambda *a: m.prediction_saliency_correlation(
        *a, changes=[m.MeasuredNoise(scale, seed=i) for i, scale in enumerate((0.5, 1.0, 3.0))]
    ),
    "completeness": lambda e, *a: m.completeness(
        replace(e, attributor=IntegratedGradients(2, ZERO, tolerance=None), tolerated_gap=math.inf), *a
    ),
    "full randomization": lambda *a: m.full_randomization(*a, seeds=(0, 1)),
    "random logit": lambda *a: m.random_logit(*a),
}
each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


def snapshot(network):
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "flags": [(module.training, len(module._forward_pre_hooks)) for module in network.modules()],
        "graph": [(p.requires_grad, p.grad is None) for p in network.parameters()],
        "generator": torch.get_rng_state(),
    }


def same(a, b):
    return (
        all(torch.equal(a["values"][name], b["values"][name]) for name in a["values"])
        and a["flags"] == b["flags"]
        and a["graph"] == b["graph"]
        and torch.equal(a["generator"], b["generator"])
    )


@each_metric
def test_two_samples_at_once_equal_each_alone_and_the_network_is_untouched(metric):
    network, x = small_unet().train(), random_image(2, 2, 24, 16)
    before, given = snapshot(network), x.clone()
    together = metric(UNET_EXPLAINER, network, x)
    assert same(before, snapshot(network))
    assert torch.equal(x, given)
    assert together.values.isfinite().all(), together.reasons
    alone = [metric(UNET_EXPLAINER, network, x[i : i + 1]).values for i in range(2)]
    close(together.values, torch.cat(alone), rtol=1e-6)
    close(together.values, metric(UNET_EXPLAINER, network, x).values, rtol=0, atol=0)


SEVERAL = {
    "deletion": lambda *a: m.deletion_curve(*a, features=Blocks(4), steps=5).areas,
    "road": lambda *a: m.deletion_curve(*a, features=Blocks(4), imputer=m.Road(), steps=5).areas,
    "infidelity": lambda *a: m.infidelity(*a, n_draws=4),
    "faithfulness": lambda *a: m.faithfulness_correlation(*a, features=Blocks(4), n_draws=5),
    "sensitivity": lambda *a: m.average_sensitivity(*a, n_draws=2),
    "stability": lambda *a: m.stability(*a).worst(),
    "randomization": lambda *a: m.full_randomization(*a, seeds=(0,)),
}


@pytest.mark.parametrize("metric", SEVERAL.values(), ids=SEVERAL)
def test_several_inputs_image_and_vector(metric):
    network = ImageAndVector(images=2)
    inputs = {
        "ct": random_image(1, 1, 16, 16),
        "pet": random_image(1, 1, 16, 16, seed=1),
        "clinical": random_image(1, 3, seed=2),
    }
    explainer = Explainer(RegionScore(1, Box((2, 2), (9, 9))), InputXGradient(), INFERER)
    assert metric(explainer, network, inputs).values.isfinite().all()


def test_each_entry_of_a_vector_is_a_feature_among_those_of_images():
    network = ImageAndVector()
    inputs = {"ct": random_image(2, 1, 16, 16), "clinical": random_image(2, 3, seed=2)}
    explainer = Explainer(RegionScore(1, Box((2, 2), (9, 9))), InputXGradient())
    with ask(explainer, network, inputs) as asked:
        players = Players.of(Blocks(8), asked.scoring)
        assert players.count == 4 + 3
        close(players.sizes(), torch.tensor([[64.0] * 4 + [1.0] * 3] * 2))
        sums = players.sums(asked.scoring.values)
        close(sums[:, 4:], inputs["clinical"])
        close(sums[:, 0], inputs["ct"][..., :8, :8].sum((1, 2, 3)))


@pytest.mark.parametrize("dims", [2, 3])
def test_regression_and_classification(dims):
    network, x = Classifier(dims=dims), random_image(2, 1, *[8] * dims)
    for target in (OutputScore(2), ClassScore(), MarginScore(0, 1)):
        explainer = Explainer(target, InputXGradient())
        curve = m.deletion_curve(explainer, network, x, features=Blocks(2), imputer=ZERO, steps=5, until=0.5)
        assert curve.areas.values.isfinite().all()
        assert m.random_logit(explainer, network, x).values.isfinite().all()
        assert m.fidelity_r2(explainer, network, x, perturbation=AGAINST_ZERO).values.isfinite().all()


def test_predicted_class_stays_while_the_input_is_emptied():
    network, x = Classifier(), random_image(2, 1, 8, 8)
    with torch.no_grad():
        clean, emptied = network(x), network(torch.zeros_like(x))
    found = m.deletion_curve(
        Explainer(ClassScore(), InputXGradient()),
        network,
        x,
        features=BLOCKS,
        imputer=ZERO,
        steps=3,
        until=1.0,
    )
    close(found.clean, clean.amax(1))
    close(found.emptied, emptied.gather(1, clean.argmax(1)[:, None])[:, 0])


@pytest.mark.parametrize("index", [None, 2])
def test_curve_may_score_log_odds(index):
    network, x = Classifier(), random_image(2, 1, 8, 8)
    explainer = Explainer(ClassScore(index), InputXGradient())
    with torch.no_grad():
        p = network(x).softmax(1)
    own = p.argmax(1) if index is None else torch.tensor([index] * 2)
    p = p.gather(1, own[:, None])[:, 0]
    found = m.deletion_curve(
        explainer, network, x, features=BLOCKS, imputer=ZERO, steps=3, score=LogOddsScore(index)
    )
    close(found.clean, (p / (1 - p)).log())
    gradient = Explainer(LogOddsScore(index), Saliency())(network, x).attributions["image"]
    leaf = x.clone().requires_grad_()
    q = network(leaf).softmax(1).gather(1, own[:, None])
    close(gradient.abs(), torch.autograd.grad((q / (1 - q)).log().sum(), leaf)[0].abs())
    with pytest.raises(InputError, match="at least 2 output channels"):
        Explainer(LogOddsScore(0), Saliency())(*linear(1, 8, 8))


# ---------------------------------------------------------------------------- necessity and sufficiency


def test_necessity_and_sufficiency_of_a_linear_network():
    network, x = linear(1, 12, 12)
    region = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    region[..., 2:5, 3:6] = True
    found = m.necessity_and_sufficiency(OutputScore(), None, network, x, region, imputer=ZERO, n_shifts=5)
    effects = (x * network.weight.detach())[:, 0]
    drop = effects[:, 2:5, 3:6].sum((1, 2))
    close(found.drop, drop)
    for sample, shifts in enumerate(found.shifts):
        assert shifts.shape == (5, 2)
        moved = [effects[sample, 2 + i : 5 + i, 3 + j : 6 + j].sum() for i, j in shifts.tolist()]
        close(found.control_drops[sample], torch.stack(moved))
        close(found.necessity.values[sample], drop[sample] - torch.stack(moved).mean())
    close(found.sufficiency.values, drop / effects.sum((1, 2)))
    grown = m.necessity_and_sufficiency(OutputScore(), None, network, x, region, imputer=ZERO, margin=1)
    close(grown.sufficiency.values, effects[:, 1:6, 2:7].sum((1, 2)) / effects.sum((1, 2)))


def test_region_that_fills_the_body_or_is_empty_has_a_reason():
    network, x = linear(1, 12, 12)
    region = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    region[0, :, 2:11, 2:11] = True
    found = m.necessity_and_sufficiency(OutputScore(), None, network, x, region, imputer=ZERO)
    assert found.necessity.values.isnan().all()
    assert "fills" in found.necessity.reasons[0]
    assert "empty" in found.necessity.reasons[1]
    assert found.sufficiency.values.isfinite().tolist() == [True, False]
    with pytest.raises(InputError, match="none of the images"):
        m.necessity_and_sufficiency(OutputScore(), None, network, x, region[..., :5])


def test_admissible_shifts_are_those_that_fit():
    region, within = torch.zeros(10, 9, dtype=torch.bool), torch.zeros(10, 9, dtype=torch.bool)
    region[4:6, 4:7] = True
    within[1:9, :8] = True
    found = {tuple(shift) for shift in admissible_shifts(region, within, 1000).tolist()}
    expected = set()
    for i in range(-4, 5):
        for j in range(-4, 3):
            moved = torch.zeros_like(region)
            moved[4 + i : 6 + i, 4 + j : 7 + j] = True
            if moved.sum() == 6 and (moved & within).sum() >= 0.95 * 6 and not (moved & region).any():
                expected.add((i, j))
    assert found == expected
    assert len(admissible_shifts(region, within, 3)) == 3


def test_necessity_through_sliding_windows_asks_the_target():
    network, x = small_unet(), random_image(1, 2, 32, 24)
    region = torch.zeros(1, 1, 32, 24, dtype=torch.bool)
    region[..., 4:9, 4:9] = True
    target = RegionScore(1, Box((2, 2), (10, 12)))
    found = m.necessity_and_sufficiency(target, INFERER, network, x, region, imputer=Blur(2.0))

    def score(image):
        with torch.no_grad():
            return INFERER(image, network)[:, 1, 2:10, 2:12].mean((1, 2))

    blurred = Blur(2.0).draws(x)[0]
    close(found.drop, score(x) - score(torch.where(region, blurred, x)))
    alone, nothing = score(torch.where(region, x, blurred)), score(blurred)
    close(found.sufficiency.values, (alone - nothing) / (score(x) - nothing))


# --------------------------------------------------------------------------------------------- similarity


each_size = pytest.mark.parametrize("size", [(17, 20), (9, 14, 11), (30,)], ids=["2D", "3D", "1D"])


def pooled(maps):
    """Return absolute maps pooled by two, slowly."""
    values = maps.abs().numpy()
    for axis in range(2, values.ndim):
        starts = range(0, values.shape[axis], 2)
        pairs = [values.take(range(i, min(i + 2, values.shape[axis])), axis) for i in starts]
        values = np.stack([pair.mean(axis) for pair in pairs], axis)
    return values


@each_size
@pytest.mark.parametrize("kind", ["pearson", "spearman", "ssim", "dice"])
def test_similarity_equals_scipy_and_scikit_image(size, kind):
    a = random_image(2, 2, *size)
    b = a + random_image(2, 2, *size, seed=4)
    found = m.similarity(a, b, kind)
    for sample, (x, y) in enumerate(zip(pooled(a), pooled(b), strict=True)):
        if kind == "pearson":
            expected = pearsonr(x.ravel(), y.ravel())[0]
        elif kind == "spearman":
            expected = spearmanr(x.ravel(), y.ravel())[0]
        elif kind == "ssim":
            window = min(7, *(n - (n + 1) % 2 for n in x.shape[1:]))
            if any(n - (n + 1) % 2 < 7 for n in x.shape[1:]) and len(set(x.shape[1:])) > 1:
                pytest.skip("scikit-image has one window size for all axes")
            channels = zip(x / x.max(), y / y.max(), strict=True)
            expected = np.mean(
                [structural_similarity(p, q, win_size=window, data_range=1.0) for p, q in channels]
            )
        else:
            count = round(0.05 * x.size)
            tops = [set(np.argsort(-v.ravel())[:count].tolist()) for v in (x, y)]
            expected = len(tops[0] & tops[1]) / count
        assert float(found.values[sample]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["pearson", "spearman", "ssim", "dice"])
def test_a_map_is_like_itself_and_a_constant_one_has_a_reason(kind):
    a = random_image(3, 1, 16, 16)
    b = a.clone()
    b[1] = 4.0
    b[2, 0, 0, 0] = torch.nan
    found = m.similarity(a, b, kind)
    close(found.values[0], 1.0)
    assert found.values[1:].isnan().all()
    assert found.reasons[0] == ""
    assert "constant" in found.reasons[1]
    assert "finite" in found.reasons[2]


def test_spearman_shares_ranks_of_ties_as_quantus_tests():
    close(m.similarity(torch.tensor([[0.0, 1, 1]]), torch.tensor([[0.0, 0, 2]]), "spearman").values, [0.5])
    close(m.similarity(torch.tensor([[0.0, 1, 1]]), torch.tensor([[0.0, 0, 2]]), "pearson").values, [0.5])


def test_similarity_refuses_what_it_cannot_compare():
    with pytest.raises(InputError, match="one shape"):
        m.similarity(torch.zeros(1, 1, 4), torch.zeros(1, 1, 5))
    with pytest.raises(InputError, match="kendall"):
        m.similarity(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), "kendall")


# ------------------------------------------------------------------------------------------ randomization


class Raw(nn.Module):
    """Weights in all the places that a search for ``reset_parameters`` misses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("wave", torch.sin(torch.arange(8.0)))
        self.register_buffer("fleeting", torch.rand(3) + 1, persistent=False)
        self.register_buffer("index", torch.arange(8))
        self.register_buffer("halved", torch.randn(4).half())
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 2))
        self.eval()

    def forward(self, x):
        y = x[..., self.index] * self.scale + self.token + self.wave
        y = self.attention(y, y, y)[0]
        return self.head(self.norm(y.mean(1)) * self.fleeting.mean())


def every_tensor(network):
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def bits(tensor):
    return tensor.detach().contiguous().cpu().numpy().tobytes()


NETWORKS = {
    "raw parameters": Raw,
    "U-Net": lambda: small_unet(),
    "ViT": lambda: ViT(1, (16, 16), (8, 8), 16, 32, 1, 2, spatial_dims=2, classification=True, num_classes=2),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_every_parameter_and_buffer_is_random_and_comes_back_bit_for_bit(make):
    network = make()
    before = {name: bits(tensor) for name, tensor in every_tensor(network).items()}
    whole = {n for n, t in every_tensor(network).items() if not (t.is_floating_point() or t.is_complex())}
    with m.randomize(network, seed=3) as drawn:
        assert set(drawn) == set(before) - whole
        assert {
            name for name, tensor in every_tensor(network).items() if bits(tensor) == before[name]
        } == whole
        assert all(torch.isfinite(tensor).all() for tensor in every_tensor(network).values())
        first = {name: bits(tensor) for name, tensor in every_tensor(network).items()}
    assert {name: bits(tensor) for name, tensor in every_tensor(network).items()} == before
    with m.randomize(network, seed=3):
        assert {name: bits(tensor) for name, tensor in every_tensor(network).items()} == first
    with m.randomize(network, seed=4):
        assert all(bits(every_tensor(network)[name]) != first[name] for name in drawn)


def test_weights_come_back_after_an_exception_and_gradients_stay():
    network = small_unet().train()
    x = random_image(2, 2, 16, 16)
    loss = network(x).square().mean()
    before = {name: bits(tensor) for name, tensor in every_tensor(network).items()}
    state = torch.get_rng_state()
    with pytest.raises(KeyError), m.randomize(network):
        raise KeyError
    assert {name: bits(tensor) for name, tensor in every_tensor(network).items()} == before
    assert torch.equal(torch.get_rng_state(), state)
    loss.backward()  # a graph from before is still good
    assert all(p.grad is not None for p in network.parameters())


def test_not_a_number_comes_back_too():
    network = nn.Linear(3, 1)
    with torch.no_grad():
        network.weight[0, 0] = torch.nan
    before = bits(network.weight)
    with m.randomize(network):
        assert torch.isfinite(network.weight).all()
    assert bits(network.weight) == before


def test_random_variances_stay_positive_and_weights_keep_their_size():
    network = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64)).eval()
    size = network[0].weight.detach().square().mean().sqrt()
    with m.randomize(network):
        assert (network[1].running_var > 0).all()
        assert (network[1].weight > 0).all()
        assert float(network[0].weight.detach().square().mean().sqrt()) == pytest.approx(float(size), rel=0.1)
        assert abs(float(network[0].weight.detach().mean())) < 0.1 * float(size)


def test_names_choose_what_is_randomized():
    network = Raw()
    with m.randomize(network, names=["attention", "token"]) as drawn:
        assert set(drawn) == {
            "token",
            "attention.in_proj_weight",
            "attention.in_proj_bias",
            "attention.out_proj.weight",
            "attention.out_proj.bias",
        }
    with pytest.raises(InputError, match="'nose'"), m.randomize(network, names=["nose"]):
        pass


def test_shared_weights_are_drawn_once_and_quantized_ones_refused():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    with m.randomize(network, names=["1"]) as drawn:
        assert drawn == ["1.bias"]
    with m.randomize(network) as drawn:
        assert drawn == ["0.weight", "0.bias", "1.bias"]
    with torch.inference_mode():
        locked = nn.Linear(2, 2)
    with pytest.raises(UnsupportedNetworkError, match="inference_mode"), m.randomize(locked):
        pass


class Crossed(nn.Module):
    """Declares its parts in another order than it calls them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.bias = nn.Parameter(torch.ones(4))
        self.double().eval()

    def forward(self, x):
        y = self.first(x).flatten(2).transpose(1, 2) + self.bias
        return self.last(self.attention(y, y, y)[0].mean(1))


def test_stages_follow_the_order_of_execution():
    network, x = Crossed(), random_image(1, 1, 4, 4)
    order = execution_order(network, lambda: network(x))
    assert [name for name, _ in order] == ["", "first", "attention", "last"]
    assert set(dict(order)[""]) == {"bias", "unused.weight", "unused.bias"}
    assert "attention.out_proj.weight" in dict(order)["attention"]
    assert sorted(name for _, names in order for name in names) == sorted(tensors_of(network))


@pytest.mark.parametrize("direction", ["top_down", "bottom_up"])
def test_cascade_equals_a_slow_loop(direction):
    network, x = Crossed(), random_image(2, 1, 4, 4)
    explainer = Explainer(ClassScore(), InputXGradient())
    before = snapshot(network)
    found = m.cascading_randomization(explainer, network, x, direction=direction, n_stages=None, seeds=(0, 5))
    assert same(before, snapshot(network))
    stages = ["last", "attention", "first", "Crossed"]
    assert found.stages == tuple(stages if direction == "top_down" else stages[::-1])
    with torch.no_grad():
        classes = network(x).argmax(1)

    def explain():
        leaf = x.clone().requires_grad_()
        scores = network(leaf).gather(1, classes[:, None])[:, 0]
        return torch.autograd.grad(scores.sum(), leaf)[0] * x, scores.detach()

    clean, score = explain()
    for number in range(4):
        rows, moved = [], []
        for seed in (0, 5):
            own = [name if name != "Crossed" else "" for name in found.stages[: number + 1]]
            names = [n for n in tensors_of(network) if any(n.startswith(f"{name}.") for name in own if name)]
            names += ["bias", "unused.weight", "unused.bias"] if "" in own else []
            with m.randomize(network, seed, names):
                maps, changed = explain()
            rows.append(m.similarity(clean, maps).values)
            moved.append((changed - score).abs())
        close(found.similarity["pearson"][:, number], torch.stack(rows).mean(0))
        close(found.spread["pearson"][:, number], torch.stack(rows).std(0))
        close(found.score_change[:, number], torch.stack(moved).mean(0))
    full = m.full_randomization(explainer, network, x, seeds=(0, 5))
    close(full.values, found.similarity["pearson"][:, -1])


def test_independent_randomization_leaves_the_other_stages():
    network, x = small_unet(), random_image(1, 2, 16, 16)
    found = m.independent_randomization(UNET_EXPLAINER, network, x, n_stages=4)
    cascade = m.cascading_randomization(UNET_EXPLAINER, network, x, n_stages=4, direction="bottom_up")
    assert found.stages == cascade.stages
    assert len(found.stages) == 4
    close(found.similarity["pearson"][:, 0], cascade.similarity["pearson"][:, 0])
    assert (found.similarity["pearson"][:, 1:] != cascade.similarity["pearson"][:, 1:]).all()
    assert found.spread["pearson"].isnan().all()


def test_a_map_of_the_image_alone_survives_randomization():
    network, x = small_unet(), random_image(1, 2, 16, 16)
    explainer = Explainer(RegionScore(1), InputXGradient())
    ours = m.full_randomization(explainer, network, x)
    assert (ours.values < 0.9).all()

    @dataclass(frozen=True)
    class Edges(InputXGradient):
        def attribute(self, scoring):
            found = super().attribute(scoring)
            return replace(
                found,
                maps={
                    name: values.diff(dim=2, append=values[:, :, -1:])
                    for name, values in scoring.inputs.items()
                },
            )

    theirs = m.full_randomization(replace(explainer, attributor=Edges()), network, x)
    close(theirs.values, torch.ones(1))


def test_region_stays_though_the_random_network_predicts_none():
    network, x = small_unet(), random_image(1, 2, 16, 16)

    class Never(nn.Module):
        """Predicts class 1 only with the weight that it was given."""

        def __init__(self):
            super().__init__()
            self.body, self.gain = network, nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))

        def forward(self, x):
            y = self.body(x)
            return torch.cat([y[:, :1], y[:, 1:] if float(self.gain) == 1 else y[:, :1] - 1], 1)

    never = Never().eval()
    found = m.cascading_randomization(Explainer(RegionScore(1), InputXGradient()), never, x, n_stages=3)
    assert found.similarity["pearson"].isfinite().all()
    assert not found.reasons


def test_overflow_of_a_random_network_is_a_reason():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1, 8, 8, dtype=torch.float64) * 1e-3)

        def forward(self, x):
            total = (x * self.weight).flatten(1).sum(1, keepdim=True)
            return total if (self.weight > 0).all() else total / 0

    found = m.cascading_randomization(EXACT, Steep(), random_image(2, 1, 8, 8), kinds=["pearson"])
    assert found.similarity["pearson"].isnan().all()
    assert "not finite" in found.reasons["Steep", 1]
    full = m.full_randomization(EXACT, Steep(), random_image(2, 1, 8, 8))
    assert "not finite" in full.reasons[0]


def test_uncertainty_has_the_target_that_torchesegeta_forgot():
    network, x = Classifier(), random_image(2, 1, 8, 8)
    explainer = Explainer(ClassScore(1), Saliency())
    found = m.randomization_uncertainty(explainer, network, x, n_stages=2)
    assert set(found.measures) == {"infidelity", "sensitivity"}
    assert found.stages == ("head", "body.0")
    with m.randomize(network, 0, ["head"]):
        expected = m.infidelity(explainer, network, x).values
        average = m.average_sensitivity(explainer, network, x).values
    close(found.measures["infidelity"][:, 0], expected)
    close(found.measures["sensitivity"][:, 0], average)


def test_random_logit_is_the_map_of_another_class():
    network, x = Classifier(), random_image(2, 1, 8, 8)
    explainer = Explainer(ClassScore(0), InputXGradient())
    clean = explainer(network, x).attributions["image"]
    others = [
        m.similarity(
            clean, Explainer(ClassScore(k), InputXGradient())(network, x).attributions["image"]
        ).values
        for k in (1, 2)
    ]
    found = {tuple(m.random_logit(explainer, network, x, seed=seed).values.tolist()) for seed in range(8)}
    expected = {tuple(values.tolist()) for values in others}
    assert len(found) == 2
    close(sorted(found), sorted(expected))


def test_random_logit_of_a_segmentation_keeps_the_region_and_of_one_output_is_undefined():
    network, x = small_unet(), random_image(1, 2, 16, 16)
    explainer = Explainer(RegionScore(1), InputXGradient(), INFERER)
    with torch.no_grad():
        mask = network(x).argmax(1, keepdim=True) == 1
    maps = [
        Explainer(RegionScore(k, mask), InputXGradient(), INFERER)(network, x).attributions["image"]
        for k in (0, 1)
    ]
    close(m.random_logit(explainer, network, x).values, m.similarity(*maps).values)
    single, y = linear(1, 8, 8)
    assert (
        m.random_logit(EXACT, single, y).reasons
        == ("the network has one output: there is no other class",) * 2
    )


def test_labels_and_folds_compare_two_networks_about_one_question():
    network, other, x = Classifier(), Classifier(), random_image(2, 1, 8, 8)
    explainer = Explainer(ClassScore(), InputXGradient())
    close(m.repeatability(explainer, network, other, x).values, torch.ones(2))
    with torch.no_grad():
        classes = network(x).argmax(1)
    with m.randomize(other, 1):
        found = m.label_randomization(explainer, network, other, x)
        maps = [
            Explainer(ClassScore(int(classes[i])), InputXGradient())(net, x[i : i + 1]).attributions["image"]
            for net in (network, other)
            for i in range(2)
        ]
    close(found.values, m.similarity(torch.cat(maps[:2]), torch.cat(maps[2:])).values)


# ------------------------------------------------------------------------------------ acquisition changes


@each_size
def test_noise_is_measured_as_it_was_made(size):
    smooth = sum(
        torch.linspace(0, 5, n, dtype=torch.float64).reshape([-1 if i == k else 1 for i in range(len(size))])
        for k, n in enumerate(size)
    )
    sigma = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    many = [
        measured_noise(smooth + sigma.reshape(1, 2, *[1] * len(size)) * random_image(1, 2, *size, seed=seed))
        for seed in range(40)
    ]
    close(torch.stack(many).mean(0), sigma, rtol=0.05)
    padded = torch.zeros(1, 1, *[4 * n for n in size], dtype=torch.float64)
    assert float(measured_noise(padded)) == 0


def test_changes_do_what_they_say():
    x = random_image(2, 2, 9, 8)
    moved = m.VoxelShift((1, -2)).apply(x)
    assert torch.equal(moved[..., 1:, :-2], x[..., :-1, 2:])
    assert torch.equal(m.VoxelShift((1, -2)).undo(moved)[..., :-1, 2:], x[..., :-1, 2:])
    field = m.BiasField(0.1).apply(x)
    low = x.amin((2, 3), keepdim=True)
    ratio = ((field - low) / (x - low))[x > low]
    assert float((ratio - 1).abs().max()) == pytest.approx(0.1, rel=1e-6)
    flat = torch.full_like(x, 3.0)
    close(m.Resampling(1.3).apply(flat), flat)
    assert not torch.equal(m.Resampling(1.3).apply(x), x)
    assert torch.equal(m.MeasuredNoise(seed=1).apply(x), m.MeasuredNoise(seed=1).apply(x))
    for change in (m.MeasuredNoise(), m.BiasField(), m.Resampling(), m.VoxelShift()):
        close(change.apply(x)[:1], change.apply(x[:1]))


def test_stability_of_a_convolution_under_a_shift_is_perfect():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1)).double()
    x = torch.zeros(2, 1, 16, 16, dtype=torch.float64)
    x[..., 5:10, 5:10] = random_image(2, 1, 5, 5)
    region = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    region[..., 6:9, 6:9] = True
    explainer = Explainer(RegionScore(1, region), InputXGradient())
    found = m.stability(
        explainer, network, x, region=region, changes={"shift": m.VoxelShift(1)}, kind="pearson"
    )
    close(found.similarity["shift"].values, torch.ones(2))
    close(found.score_change["shift"], torch.zeros(2))
    close(found.relevance_mass[:, 0], found.relevance_mass[:, 1])
    close(found.icc, 1.0)


def test_stability_counts_the_change_of_the_score_and_the_mass():
    network, x = small_unet(), random_image(3, 2, 16, 16)
    explainer = Explainer(RegionScore(1, Box((0, 0), (8, 8))), InputXGradient())
    region = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    region[..., :8, :8] = True
    change = m.BiasField(0.3)
    found = m.stability(explainer, network, x, region=region, changes={"field": change})
    clean, after = explainer(network, x), explainer(network, change.apply(x))
    close(found.score_change["field"], after.score - clean.score)
    maps = [e.attributions["image"] for e in (clean, after)]
    close(found.similarity["field"].values, m.similarity(*maps, "spearman").values)
    close(found.relevance_mass, torch.stack([m.relevance_mass(a, region).values for a in maps], 1))
    assert -1 <= found.icc <= 1
    assert math.isnan(m.stability(explainer, network, x, changes={"field": change}).icc)
    with pytest.raises(InputError, match="at least one change"):
        m.stability(explainer, network, x, changes={})


def test_prediction_saliency_correlation_is_pearson_over_changes():
    network, x = small_unet(), random_image(2, 2, 16, 16)
    explainer = Explainer(RegionScore(1, Box((0, 0), (8, 8))), InputXGradient())
    changes = [m.MeasuredNoise(s, seed=i) for i, s in enumerate((0.5, 1.0, 2.0, 4.0))]
    found = m.prediction_saliency_correlation(explainer, network, x, changes=changes)
    clean = explainer(network, x)
    after = [explainer(network, change.apply(x)) for change in changes]
    for sample in range(2):
        moved = [abs(float(e.score[sample] - clean.score[sample])) for e in after]
        differ = [
            1 - float(m.similarity(clean.attributions["image"], e.attributions["image"]).values[sample])
            for e in after
        ]
        close(found.values[sample], pearsonr(moved, differ)[0])
    with pytest.raises(InputError, match="at least three"):
        m.prediction_saliency_correlation(explainer, network, x, changes=changes[:2])


def test_noise_keeps_its_radius_and_takes_one_for_each_input():
    network = ImageAndVector()
    inputs = {"ct": random_image(2, 1, 16, 16), "clinical": random_image(2, 3, seed=2)}
    explainer = Explainer(RegionScore(1, Box((2, 2), (9, 9))), InputXGradient())
    with ask(explainer, network, inputs) as asked:
        draw = m.UniformNoise({"ct": 0.5, "clinical": 0.0}).prepare(asked.scoring)(0)
        assert 0.45 < float((draw.inputs[0] - inputs["ct"]).abs().max()) <= 0.5
        close(draw.inputs[1], inputs["clinical"])
        with pytest.raises(InputError, match="clinical"):
            m.UniformNoise({"ct": 0.5}).prepare(asked.scoring)


@pytest.mark.gpu
def test_metrics_stay_on_the_gpu():
    network, x = small_unet().float().cuda(), random_image(1, 2, 24, 16).float().cuda()
    for name, metric in METRICS.items():
        values = metric(UNET_EXPLAINER, network, x).values
        expected = metric(UNET_EXPLAINER, network.cpu(), x.cpu()).values
        network.cuda()
        torch.testing.assert_close(values.cpu().double(), expected.double(), rtol=0.05, atol=0.05, msg=name)
