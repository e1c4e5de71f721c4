"""Shapley values, interactions and Owen values of modalities against closed forms, Captum and slow rewrites."""

from __future__ import annotations

import itertools
import math

import captum.attr
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from networks import ImageAndVector, random_image, small_unet
from torch import nn

from monai_xai import (
    Blocks,
    Box,
    Constant,
    DiceScore,
    FunctionTarget,
    InputError,
    ModalityShapley,
    Noise,
    OutputScore,
    RegionScore,
    Samples,
    additive_projection,
    perceptual_score,
)
from monai_xai.modalities import shapley_interactions, shapley_values

ZERO = {"zero": 0.0, "half": 0.5}


class Formula(nn.Module):
    """A function of scalars, each an input of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def play(function, *values, baselines=None, **options):
    inputs = {f"x{i}": torch.tensor([[float(v)]], dtype=torch.float64) for i, v in enumerate(values)}
    shapley = ModalityShapley(OutputScore(), baselines or ZERO, **options)
    return shapley(Formula(function), inputs)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(
        found, torch.tensor([expected], dtype=found.dtype), rtol=0, atol=atol, check_dtype=False
    )


# ------------------------------------------------------------------------------------------------- closed forms


def test_the_polynomial_of_the_reference_has_its_values_interactions_and_intershap():
    found = play(lambda a, b, c, d: 2 * a + 3 * b * c + a * b * c - d, 1, 1, 1, 1)
    close(found.values["zero"], [7 / 3, 11 / 6, 11 / 6, -1])
    close(found.residual("zero"), 0.0)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[0, 1] = expected[1, 0] = expected[0, 2] = expected[2, 0] = 0.5
    expected[1, 2] = expected[2, 1] = 3.5
    torch.testing.assert_close(found.interactions["zero"][0], expected, rtol=0, atol=1e-12)
    assert found.intershap("zero").item() == pytest.approx(0.586957, abs=1e-6)
    close(found.shares("zero"), [1 / 3, 11 / 42, 11 / 42, 1 / 7])


@pytest.mark.parametrize(
    ("function", "count", "values", "interaction"),
    [
        (lambda a, b: a * b, 2, [0.5, 0.5], 1.0),
        (lambda a, b: a + b - 2 * a * b, 2, [0.0, 0.0], -2.0),
        (lambda a, b, c: ((a + b + c) >= 2).double(), 3, [1 / 3] * 3, 0.0),
        (lambda a, b, c: 0.5 + 0.4 * ((a + b + c) >= 1).double(), 3, [0.4 / 3] * 3, -0.2),
        (
            lambda left, other, right: torch.minimum(right, (left + other).clamp(max=1)),
            3,
            [1 / 6, 1 / 6, 2 / 3],
            None,
        ),
    ],
    ids=["product", "xor", "majority", "any", "gloves"],
)
def test_small_games_have_their_known_values(function, count, values, interaction):
    found = play(function, *[1] * count)
    close(found.values["zero"], values)
    if interaction is not None:
        pairs = found.interactions["zero"][0][~torch.eye(count, dtype=torch.bool)]
        torch.testing.assert_close(pairs, torch.full_like(pairs, interaction), rtol=0, atol=1e-12)


def test_redundant_inputs_are_not_missed_alone_but_are_worth_something_alone():
    found = play(lambda a, b, c: 0.5 + 0.4 * ((a + b + c) >= 1).double(), 1, 1, 1)
    close(found.leave_one_out["zero"], [0.0] * 3)
    close(found.single_gain["zero"], [0.4] * 3)


def test_exclusive_or_has_no_share_but_an_interaction():
    found = play(lambda a, b: a + b - 2 * a * b, 1, 1)
    assert torch.isnan(found.shares("zero")).all()
    assert found.intershap("zero").item() == pytest.approx(0.5)
    assert play(lambda a, b: a * b, 1, 1).intershap("zero").item() == pytest.approx(1.0)


class MultiLayer(nn.Module):
    """Captum's BasicModel_MultiLayer, whose exact Shapley values its tests state."""

    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.linear1.weight = nn.Parameter(torch.ones(4, 3))
        self.linear1.bias = nn.Parameter(torch.tensor([-10.0, 1.0, 1.0, 1.0]))
        self.linear0 = nn.Linear(3, 3)
        self.linear0.weight = nn.Parameter(torch.eye(3))
        self.linear0.bias = nn.Parameter(torch.zeros(3))
        self.linear2 = nn.Linear(4, 2)
        self.linear2.weight = nn.Parameter(torch.ones(2, 4))
        self.linear2.bias = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, x):
        return self.linear2(self.linear1(self.linear0(x)).relu())


@pytest.mark.parametrize(
    ("row", "baseline", "expected"),
    [
        ([20.0, 50.0, 30.0], 0.0, [76.66666, 196.66666, 116.66666]),
        ([2.0, 10.0, 3.0], 0.0, [7.0, 32.5, 10.5]),
        ([20.0, 50.0, 30.0], 4.0, None),
    ],
)
def test_values_are_those_that_captum_states_and_computes(row, baseline, expected):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = MultiLayer()

        def forward(self, *columns):
            return self.network(torch.cat(columns, 1))

    inputs = {f"x{i}": torch.tensor([[v]]) for i, v in enumerate(row)}
    found = ModalityShapley(OutputScore(0), {"one": baseline, "other": 1.0})(Split(), inputs)
    theirs = captum.attr.ShapleyValues(MultiLayer()).attribute(torch.tensor([row]), baseline, target=0)
    torch.testing.assert_close(found.values["one"], theirs, rtol=0, atol=1e-3)
    if expected is not None:
        close(found.values["one"], expected, atol=1e-3)


def test_values_of_a_random_game_equal_the_mean_over_all_orders():
    values = random_image(2, 2**4)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        present = 0
        for player in order:
            expected[:, player] += values[:, present | 1 << player] - values[:, present]
            present |= 1 << player
    torch.testing.assert_close(shapley_values(values), expected / math.factorial(4), rtol=0, atol=1e-12)
    interactions = shapley_interactions(values)
    slow = 0.0
    for size, players in [(0, ()), (1, (2,)), (1, (3,)), (2, (2, 3))]:
        s = sum(1 << p for p in players)
        slow = slow + (1 / (3 * math.comb(2, size))) * (
            values[:, s | 3] - values[:, s | 1] - values[:, s | 2] + values[:, s]
        )
    torch.testing.assert_close(interactions[:, 0, 1], slow, rtol=0, atol=1e-12)


def test_one_hot_columns_are_one_player():
    """The category toy of the reference: dummies as players would evaluate patients of two categories, or of none."""
    embedding = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)

    def function(u, category):
        return torch.tanh(u + (category * embedding).sum(1, keepdim=True))

    class Toy(nn.Module):
        def forward(self, u, category):
            return function(u, category)

    inputs = {
        "u": torch.tensor([[0.5]], dtype=torch.float64),
        "category": torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64),
    }
    baseline = {"u": -1.0, "category": torch.tensor([[0.0, 0.0, 1.0]])}
    found = ModalityShapley(OutputScore(), {"given": baseline, "zero": 0.0})(Toy(), inputs)
    score = lambda u, e: math.tanh(u + e)  # noqa: E731
    full, empty, u, c = score(0.5, 1), score(-1, -2), score(0.5, -2), score(-1, 1)
    close(found.values["given"], [(full - c + u - empty) / 2, (full - u + c - empty) / 2])


# ------------------------------------------------------------------------------------------- images and windows


INFERER = SlidingWindowInferer(12, overlap=0.5, mode="gaussian")


def test_sequences_are_players_and_windows_add_up_to_the_whole_game():
    network, x = small_unet(channels=3), random_image(2, 3, 20, 16)
    target, baselines = RegionScore(1, Box((3, 2), (8, 9))), {"a": Noise(), "b": 0.0}
    found = ModalityShapley(target, baselines, INFERER, channel_names={"image": ("FLAIR", "T1", "T2")})(
        network, x
    )
    assert found.modalities == ("FLAIR", "T1", "T2")
    assert found.facts["active_windows"] < found.facts["windows"]
    start = Noise().draws(x)[0]
    values = []
    for bits in range(8):
        kept = torch.tensor([bits >> c & 1 for c in range(3)], dtype=torch.bool).reshape(1, 3, 1, 1)
        output = INFERER(torch.where(kept, x, start), network)
        values.append(output[:, 1, 3:8, 2:9].mean((1, 2)))
    expected = shapley_values(torch.stack(values, 1))
    torch.testing.assert_close(found.values["a"], expected.detach(), rtol=0, atol=1e-12)
    assert found.residual("a").abs().max() < 1e-12


def test_a_target_that_is_not_linear_is_played_on_the_stitched_prediction():
    network, x = small_unet(), random_image(1, 2, 20, 16)
    target = FunctionTarget(lambda o: o.softmax(1)[:, 1].mean((1, 2)))
    found = ModalityShapley(target, {"a": Noise(), "b": 0.0}, INFERER)(network, x)
    kept = torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1)
    expected = target.function(INFERER(kept, network)) - target.function(INFERER(0 * x, network))
    torch.testing.assert_close(found.single_gain["b"][:, 0], expected.detach(), rtol=0, atol=1e-12)


def test_dice_to_the_frozen_prediction_is_played_on_the_stitched_prediction():
    network, x = small_unet(), random_image(1, 2, 20, 16)
    found = ModalityShapley(DiceScore(1), {"a": Noise(), "b": 0.0}, INFERER)(network, x)
    assert found.score.item() == 1.0
    clean, other = (INFERER(y, network).argmax(1) == 1 for y in (x, torch.cat([x[:, :1], 0 * x[:, 1:]], 1)))
    dice = 2 * (clean & other).sum() / (clean.sum() + other.sum())
    assert found.leave_one_out["b"][0, 1].item() == pytest.approx(1 - dice.item())
    assert found.residual("a").abs().max() < 1e-6


def test_two_samples_at_once_equal_each_alone():
    network, inputs = ImageAndVector(), {"image": random_image(2, 1, 20, 16), "clinical": random_image(2, 3)}
    shapley = ModalityShapley(RegionScore(1, Box((3, 2), (8, 9))), {"a": Noise(), "b": 0.0}, INFERER)
    both = shapley(network, inputs)
    for i in range(2):
        alone = shapley(network, {name: x[i : i + 1] for name, x in inputs.items()})
        torch.testing.assert_close(both.values["a"][i], alone.values["a"][0], rtol=0, atol=1e-12)


def test_four_modalities_take_sixteen_forward_passes():
    calls = []

    def function(*x):
        calls.append(len(x[0]))
        return sum(x)

    play(function, 1, 2, 3, 4, baselines={"zero": 0.0, "again": 0.0})
    assert sum(calls) == 1 + 2 * 15 + 2  # the last: whether the samples of a batch influence each other


def test_a_modality_that_is_its_baseline_costs_nothing():
    calls = []

    def function(*x):
        calls.append(len(x[0]))
        return sum(x)

    found = play(function, 1, 0, 3, baselines={"zero": 0.0, "again": 0.0})
    close(found.values["zero"], [1.0, 0.0, 3.0])
    assert sum(calls) == 1 + 2 * 3  # of the two that differ; the third is a null player


def test_draws_of_a_baseline_give_a_standard_error():
    samples = Samples(torch.tensor([[0.0], [1.0], [2.0], [5.0]], dtype=torch.float64))
    found = play(lambda a, b: a + b, 3, 4, baselines={"patients": samples, "zero": 0.0})
    close(found.values["patients"], [3 - 2.0, 4 - 2.0])
    expected = torch.tensor([0.0, 1.0, 2.0, 5.0]).std() / 2
    assert found.standard_errors["patients"][0, 0].item() == pytest.approx(expected.item(), abs=1e-6)
    assert found.standard_errors["zero"].abs().max() == 0


def test_agreement_is_kendalls_tau_between_baselines():
    found = play(
        lambda a, b, c: a + b + c, 1, 2, 3, baselines={"zero": 0.0, "other": -5.0, "turned": Constant(7.0)}
    )
    assert found.agreement.item() == pytest.approx(1.0)
    baseline = {f"x{i}": float(v) for i, v in enumerate((0, 2, 6))}
    found = play(lambda a, b, c: a + b + c, 1, 2, 3, baselines={"zero": 0.0, "turned": baseline})
    assert found.agreement.item() == pytest.approx(-1.0)


def test_a_single_baseline_is_refused():
    with pytest.raises(InputError, match="at least two baselines"):
        ModalityShapley(OutputScore(), {"zero": 0.0})


# ----------------------------------------------------------------------------------------------------- sampling


def sigmoid_game(count):
    weights = torch.linspace(-1, 1.5, count, dtype=torch.float64)
    return weights, lambda *x: torch.sigmoid((torch.cat(x, 1) * weights).sum(1, keepdim=True))


def test_above_ten_modalities_values_are_sampled_within_their_error_and_add_up():
    weights, function = sigmoid_game(12)
    found = play(function, *[1] * 12, max_permutations=400, tolerance=1e-6)
    bits = torch.arange(2**12)
    members = (bits[:, None] >> torch.arange(12) & 1).double()
    exact = shapley_values(torch.sigmoid(members @ weights)[None])
    error, se = (found.values["zero"] - exact)[0].abs(), found.standard_errors["zero"][0]
    assert (error < 4 * se + 1e-12).all()
    assert found.residual("zero").abs().max() < 1e-12
    assert found.interactions is None
    with pytest.raises(InputError, match="up to 10 modalities"):
        found.intershap("zero")


def test_sampling_ends_when_its_error_is_small_and_the_seed_decides():
    _, function = sigmoid_game(12)
    loose = play(function, *[1] * 12, tolerance=0.5)
    again, other = play(function, *[1] * 12, tolerance=0.5), play(function, *[1] * 12, tolerance=0.5, seed=1)
    assert loose.facts["evaluations"] < play(function, *[1] * 12, tolerance=1e-6).facts["evaluations"]
    assert torch.equal(loose.values["zero"], again.values["zero"])
    assert not torch.equal(loose.values["zero"], other.values["zero"])


# ------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("block", [16, 5], ids=["enumerated", "drawn"])
def test_owen_values_of_parts_sum_exactly_to_their_modality(block):
    network, inputs = ImageAndVector(), {"image": random_image(1, 1, 20, 16), "clinical": random_image(1, 3)}
    target = RegionScore(1, Box((3, 2), (14, 9)))
    found = ModalityShapley(target, {"a": Noise(), "b": 0.0}, INFERER, parts=Blocks(block))(network, inputs)
    for m, name in enumerate(found.modalities):
        total = found.parts["a"][name].sum(1)
        torch.testing.assert_close(total, found.values["a"][:, m], rtol=0, atol=1e-12)
    assert found.maps["a"]["image"].shape == inputs["image"].shape
    assert found.maps["a"]["clinical"].shape == inputs["clinical"].shape


def test_owen_values_equal_the_definition():
    weights = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)

    class Pair(nn.Module):
        def forward(self, image, table):
            return torch.tanh(image.sum((1, 2, 3))[:, None] + (table * weights).sum(1, keepdim=True))

    inputs = {
        "image": torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64),
        "table": torch.ones(1, 3, dtype=torch.float64),
    }
    found = ModalityShapley(OutputScore(), ZERO, parts=Blocks(1))(Pair(), inputs)
    expected = torch.zeros(3, dtype=torch.float64)
    for present in (0.0, 0.7):
        for order in itertools.permutations(range(3)):
            total = present
            for player in order:
                after = total + float(weights[0, player])
                expected[player] += (math.tanh(after) - math.tanh(total)) / 2 / 6
                total = after
    torch.testing.assert_close(found.parts["zero"]["table"][0], expected, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------- over a data set


def dataset(n=12):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "a": torch.randint(0, 2, (1, 1), generator=generator).double(),
            "b": torch.rand(1, 1, generator=generator).double(),
        }
        for _ in range(n)
    ]


def test_perceptual_score_is_large_for_what_is_used_and_zero_for_what_is_not():
    cases = dataset()
    labels = [int(case["a"]) for case in cases]
    accuracy = lambda output, truth: (output[:, 0] > 0.5).float().eq(torch.tensor(truth)).float().mean()  # noqa: E731
    found = perceptual_score(lambda case: case["a"], cases, labels, metric=accuracy, n_permutations=20)
    assert found["b"] == 0
    assert 0.3 < found["a"] < 0.7


def test_additive_projection_is_the_network_if_it_is_additive_and_nothing_for_a_centered_product():
    cases = dataset()
    outputs, projected = additive_projection(lambda c: 2 * c["a"] - c["b"].square(), cases, "a")
    torch.testing.assert_close(outputs, projected, rtol=0, atol=1e-12)
    mean = {key: torch.cat([case[key] for case in cases]).mean() for key in ("a", "b")}
    product = lambda c: (c["a"] - mean["a"]) * (c["b"] - mean["b"])  # noqa: E731
    outputs, projected = additive_projection(product, cases, "a")
    assert projected.abs().max() < 1e-12 < outputs.abs().max()
