"""Nulls against every place one by one, closed forms, foreign references, and p-values that are uniform by chance."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_xai import InputError
from monai_xai.statistics import (
    benjamini_hochberg,
    cohort_p,
    exchange_test,
    holm,
    icc21,
    interval,
    rank_sum_test,
    region_densities,
    shift_null,
    sign_flip_test,
    signed_rank_test,
    swap_null,
)


def smooth_map(shape, fwhm, seed):
    """A Gaussian field of this smoothness; 0 is white noise."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(ndimage.gaussian_filter(noise, fwhm / 2.355, mode="wrap"))


def ball(shape, center, radius):
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return torch.from_numpy(sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True)) <= radius**2)


def brute_force(values, region, body, inside):
    """The share in the region at every place, one by one."""
    positive = values.clamp(min=0) * body
    voxels, size = region.nonzero(), int(region.sum())
    found = []
    for shift in product(*(range(-n, n + 1) for n in region.shape)):
        moved = voxels + torch.tensor(shift)
        kept = moved[((moved >= 0) & (moved < torch.tensor(region.shape))).all(1)]
        within = kept[body[tuple(kept.T)]]
        if len(within) >= inside * size:
            found.append(float(positive[tuple(within.T)].sum() / positive.sum()))
    return np.sort(found)


@pytest.mark.parametrize("shape", [(17, 14), (9, 8, 10)], ids=["2D", "3D"])
@pytest.mark.parametrize("inside", [0.95, 0.7])
def test_shift_null_equals_every_place_one_by_one(shape, inside):
    values, region = smooth_map(shape, 2.0, 0), ball(shape, [n // 2 + 1 for n in shape], 2.2)
    region[tuple(n // 2 for n in shape)] = False  # not convex
    body = ball(shape, [n // 2 for n in shape], max(shape) / 2)
    found = shift_null(values, region, body, inside=inside, min_places=10)
    expected = brute_force(values, region, body, inside)
    assert np.sort(found.null) == pytest.approx(expected, abs=1e-12)
    assert found.value == pytest.approx(
        float((values.clamp(min=0) * body)[region].sum() / (values.clamp(min=0) * body).sum())
    )
    assert found.p == (expected >= found.value - 1e-9).mean()


def test_shift_null_does_not_wrap_around():
    values = torch.zeros(20, 20)
    values[0, 0] = values[-1, -1] = 1.0
    region = torch.zeros(20, 20, dtype=torch.bool)
    region[4:7, 5:9] = True
    found = shift_null(values, region)
    assert len(found.null) == (20 - 3 + 1) * (20 - 4 + 1)
    assert found.null.max() == pytest.approx(0.5)  # no place sees both corners


@pytest.mark.parametrize("fwhm", [0, 4])
def test_shift_p_values_are_uniform_where_map_and_region_know_nothing_of_each_other(fwhm):
    generator = np.random.default_rng(1)
    p_values = []
    for seed in range(300):
        region = ball((32, 32), generator.integers(5, 27, size=2), 3)
        p_values.append(shift_null(smooth_map((32, 32), fwhm, seed), region).p)
    p_values = np.array(p_values)
    assert 0.02 < (p_values < 0.05).mean() < 0.085
    assert np.quantile(p_values, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.08)


def test_a_map_of_the_region_is_beyond_chance():
    region = ball((32, 32), (10, 20), 3)
    found = shift_null(region.double() + 0.01, region)
    assert found.p == 1 / len(found.null)
    assert found.value == pytest.approx(found.null.max())


EMPTY = torch.zeros(16, 16, dtype=torch.bool)
SQUARE = EMPTY.clone()
SQUARE[4:8, 4:8] = True
CORNER = EMPTY.clone()
CORNER[:6, :6] = True


@pytest.mark.parametrize(
    ("values", "region", "within", "reason"),
    [
        (torch.ones(16, 16), EMPTY, None, "the region is empty"),
        (torch.ones(16, 16), ~EMPTY, None, "the region fills the body"),
        (torch.ones(16, 16), SQUARE, SQUARE, "the region fills the body"),
        (torch.ones(16, 16), SQUARE, EMPTY, "the body is empty"),
        (torch.ones(16, 16), SQUARE, SQUARE.roll(8, 0), "does not overlap"),
        (-torch.ones(16, 16), SQUARE, None, "nothing positive"),
        (torch.full((16, 16), math.nan), SQUARE, None, "not finite"),
    ],
    ids=["empty", "all", "body", "no body", "beside", "negative", "nan"],
)
def test_undefined_has_a_reason_and_no_p_value(values, region, within, reason):
    for found in (shift_null(values, region, within), swap_null(values, region, [SQUARE.roll(2, 1)], within)):
        assert math.isnan(found.value)
        assert math.isnan(found.p)
        assert reason in found.reason


def test_a_region_half_outside_or_with_few_places_has_no_p_value():
    assert "only 25% of the region" in shift_null(torch.ones(16, 16), SQUARE, CORNER).reason
    few = shift_null(torch.ones(16, 16), CORNER.roll(1, 0), CORNER | CORNER.roll(3, 0))
    assert math.isnan(few.p)
    assert "fits in 4 places only" in few.reason


def test_a_constant_map_is_no_evidence():
    assert shift_null(torch.ones(16, 16), SQUARE).p == 1.0
    assert swap_null(torch.ones(16, 16), SQUARE, [CORNER]).p == 1.0


def test_maps_and_masks_of_different_shapes_are_refused():
    with pytest.raises(InputError, match="must have one shape"):
        shift_null(torch.ones(16, 16), SQUARE[1:])
    with pytest.raises(InputError, match="must have one shape"):
        swap_null(torch.ones(16, 16), SQUARE, [SQUARE[1:]])


def test_shift_null_of_a_large_volume_takes_seconds():
    import time

    region = ball((128, 128, 128), (40, 60, 64), 8)
    start = time.perf_counter()
    found = shift_null(torch.rand(128, 128, 128), region)
    assert time.perf_counter() - start < 20  # about 1 s on an idle core
    assert len(found.null) > 1_000_000


def test_swap_null_compares_densities_so_that_sizes_do_not_matter():
    values = torch.full((16, 16), 0.5)
    values[SQUARE] = 2.0
    found = swap_null(values, SQUARE, [CORNER, SQUARE.roll(8, 0), SQUARE.roll(8, 1), EMPTY])
    mean = float(values.mean())
    inside = (4 * 2.0 + 32 * 0.5) / 36  # a corner of 36 voxels, 4 of them in the square
    assert found.null == pytest.approx(np.array([2.0, inside, 0.5, 0.5]) / mean)
    assert found.p == 1 / 4
    assert "no region of another patient" in swap_null(values, SQUARE, [EMPTY]).reason


def test_only_the_swap_null_holds_where_maps_and_regions_share_a_prior():
    """Both crowd around the center: not beyond chance, though far from what a shifted region would meet."""
    generator = np.random.default_rng(0)
    regions = [ball((32, 32), np.clip(generator.normal(16, 3, size=2), 5, 27), 3) for _ in range(40)]
    prior = torch.exp(-((torch.arange(32) - 16.0) ** 2) / 50)
    shifted, swapped = [], []
    for seed in range(40):
        values = (smooth_map((32, 32), 3, seed).abs() + 0.2) * prior[:, None] * prior
        shifted.append(shift_null(values, regions[seed]))
        swapped.append(swap_null(values, regions[seed], regions[:seed] + regions[seed + 1 :]))
    assert cohort_p(shifted)[1] < 0.001
    assert cohort_p(swapped)[1] > 0.05


def test_cohort_p_is_uniform_by_chance_and_ignores_undefined_cases():
    generator = np.random.default_rng(2)
    p_values = []
    for seed in range(100):
        tests = []
        for case in range(6):
            region = ball((24, 24), generator.integers(4, 20, size=2), 2)
            tests.append(shift_null(smooth_map((24, 24), 3, 1000 * seed + case), region))
        p_values.append(cohort_p(tests, seed=seed, n_draws=999)[1])
    assert (np.array(p_values) < 0.05).mean() < 0.12
    assert np.median(p_values) == pytest.approx(0.5, abs=0.15)
    undefined = shift_null(torch.ones(16, 16), EMPTY)
    known = shift_null(torch.rand(16, 16), SQUARE)
    assert cohort_p([known, undefined], seed=3)[1] == cohort_p([known], seed=3)[1]
    assert math.isnan(cohort_p([undefined])[1])


def test_the_exchange_test_equals_all_permutations():
    table = np.random.default_rng(0).normal(size=(4, 5))
    table[1, 3] = math.nan
    own = np.nanmean(table.diagonal())
    every = [np.nanmean(table[range(4), list(chosen)]) for chosen in permutations(range(5), 4)]
    found = exchange_test(table, n_draws=20_000)
    assert found[1] == pytest.approx(np.mean(np.array(every) >= own - 1e-12), abs=0.01)
    assert set(found[0].round(9)) == set(np.round(every, 9))


def test_the_exchange_test_needs_two_regions():
    assert math.isnan(exchange_test([[1.0]])[1])
    assert math.isnan(exchange_test([[math.nan, 1.0]])[1])
    assert math.isnan(exchange_test(np.zeros((0, 3)))[1])
    with pytest.raises(InputError, match="at least as many regions"):
        exchange_test(np.zeros((3, 2)))


def test_exchange_p_values_are_honest_in_small_cohorts_with_a_common_prior():
    generator, p_values = np.random.default_rng(5), []
    prior = torch.exp(-((torch.arange(24) - 12.0) ** 2) / 30)
    for seed in range(200):
        regions = [ball((24, 24), np.clip(generator.normal(12, 3, size=2), 4, 20), 2) for _ in range(7)]
        maps = [smooth_map((24, 24), 3, 10 * seed + i).abs() * prior[:, None] * prior for i in range(7)]
        p_values.append(exchange_test([region_densities(m, regions) for m in maps], n_draws=199)[1])
    assert (np.array(p_values) < 0.05).mean() < 0.09
    assert np.median(p_values) == pytest.approx(0.5, abs=0.12)


RATINGS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


def test_icc_equals_the_worked_example_of_shrout_and_fleiss():
    assert icc21(RATINGS) == pytest.approx(0.29, abs=0.005)  # table 4 of the paper


def test_icc_of_two_variances_has_a_closed_form():
    """Subjects (1, 2, 3) and a rater who adds d: between = 2, rest = 0, judges = 1.5 d², so 1 / (1 + d²/2)."""
    for d in (0.0, 1.0, 2.0):
        subjects = np.array([1.0, 2.0, 3.0])
        assert icc21(np.stack([subjects, subjects + d], 1)) == pytest.approx(1 / (1 + d**2 / 2), abs=1e-12)


def test_icc_is_undefined_without_variance_or_pairs():
    for ratings in (np.ones((4, 3)), np.ones((1, 3)), np.arange(4.0)[:, None], [[1.0, math.nan], [2.0, 3.0]]):
        assert math.isnan(icc21(ratings))
    with pytest.raises(InputError, match="subjects, raters"):
        icc21(np.ones(4))


def test_benjamini_hochberg_equals_the_step_up_of_the_paper():
    p_values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
                0.6528, 0.7590, 1.0]  # fmt: skip
    assert [p < 0.05 for p in benjamini_hochberg(p_values)] == [True] * 4 + [False] * 11  # section 3.2
    m = len(p_values)
    slow = [min(p_values[j] * m / (j + 1) for j in range(i, m)) for i in range(m)]
    assert benjamini_hochberg(p_values) == pytest.approx(slow)
    known = benjamini_hochberg([0.01, math.nan, 0.04])
    assert known[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(known[1])


def test_the_signed_rank_test_counts_all_signs():
    """Three differences above 0: 1 of 8 choices of signs is as high."""
    assert signed_rank_test([0.1, 2.0, 3.0]) == 1 / 8
    assert signed_rank_test([0.1, math.nan, -2.0]) == 3 / 4
    assert signed_rank_test([0.0, 0.0]) == 1.0
    assert math.isnan(signed_rank_test([math.nan]))


def test_the_rank_sum_test_counts_all_orders():
    assert rank_sum_test([3.0, 4.0], [1.0, 2.0]) == pytest.approx(1 / 6)
    assert math.isnan(rank_sum_test([3.0], [1.0, 2.0]))


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        low, high = interval(generator.exponential(size=60), seed)
        hits += low <= 1.0 <= high
    assert 86 <= hits <= 100


def test_error_that_all_cases_share_widens_the_interval():
    covered = {0.0: 0, 1.0: 0}
    for seed in range(60):
        generator = np.random.default_rng(seed)
        values = generator.normal() + 0.1 * generator.normal(size=20)
        for error in covered:
            low, high = interval(values, seed, error)
            covered[error] += low < 0 < high
    assert covered[0.0] < 15
    assert 52 <= covered[1.0] <= 60


def test_few_or_equal_values_have_no_or_a_point_interval():
    assert np.isnan(interval(np.array([1.0, 2.0]))).all()
    assert interval(np.full(9, 3.0)) == (3.0, 3.0)


def test_the_sign_flip_test_enumerates_small_samples_and_is_uniform_under_the_null():
    assert sign_flip_test(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert sign_flip_test(np.zeros(4)) == 1.0
    generator = np.random.default_rng(0)
    p_values = [sign_flip_test(generator.normal(size=20), seed, 499) for seed in range(200)]
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.1


def test_holm_equals_the_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_interval_of_a_weighted_mean():
    generator = np.random.default_rng(0)
    values = generator.random(30)
    even = interval(values, weights=np.full(30, 7.0))
    np.testing.assert_allclose(even, interval(values), atol=0.02)
    rest = np.concatenate([values, np.full(30, 1e6)])
    ignored = interval(rest, weights=np.repeat([1.0, 1e-12], 30))
    np.testing.assert_allclose(ignored, even, atol=0.02)
    assert interval(np.full(6, 0.25), weights=np.arange(1.0, 7.0)) == (0.25, 0.25)
