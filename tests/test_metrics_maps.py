"""Metrics of maps and masks: closed forms, slow rewrites, Quantus's own numbers, and a metric in a MONAI evaluator."""

from __future__ import annotations

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler
from monai.transforms import AsDiscreted, Compose
from networks import random_image, small_unet
from scipy import ndimage
from skimage.filters import threshold_otsu

from monai_xai import (
    AttributionHandler,
    Box,
    Explainer,
    FlattenAttributionsd,
    InputError,
    RegionScore,
    Saliency,
)
from monai_xai import metrics as m
from monai_xai.metrics.base import spacing_of
from monai_xai.metrics.localization import components, otsu, widened

each_size = pytest.mark.parametrize("size", [(9, 11), (5, 6, 7)], ids=["2D", "3D"])
REGION_METRICS = {
    "relevance_mass": m.relevance_mass,
    "enrichment": m.enrichment,
    "rank_accuracy": m.rank_accuracy,
    "average_precision": m.average_precision,
    "roc_auc": m.roc_auc,
    "pointing_game": m.pointing_game,
    "lesion_hit_rate": m.lesion_hit_rate,
    "overlap": m.overlap,
    "inside": lambda *a: m.shares(
        a[0], a[1], 1.5, (1.0,) * (a[0].ndim - 2), within=a[2] if len(a) > 2 else None
    )[0],
}
MAP_METRICS = {"gini": m.gini, "entropy": m.entropy}
each_region_metric = pytest.mark.parametrize("metric", REGION_METRICS.values(), ids=REGION_METRICS)
each_map_metric = pytest.mark.parametrize("metric", MAP_METRICS.values(), ids=MAP_METRICS)


def phantom(size, n=3, seed=0):
    """Return signed maps of two channels, a region of about a fifth, and a body of about four fifths."""
    maps = random_image(n, 2, *size, seed=seed)
    region = random_image(n, 1, *size, seed=seed + 1) > 0.8
    within = random_image(n, 1, *size, seed=seed + 2) > -0.8
    return maps, region, within


def samples(maps, region, within):
    """Yield the map, region and body of each sample as flat lists over the body."""
    for a, r, v in zip(maps.sum(1), region[:, 0], within[:, 0], strict=True):
        yield a[v].tolist(), (r & v)[v].tolist()


def close(scores, expected, **tolerance):
    torch.testing.assert_close(scores.values, torch.tensor(expected, dtype=torch.float64), **tolerance)
    assert scores.reasons == ("",) * len(scores)


# --------------------------------------------------------------------------------------------------- slow rewrites


@each_size
@pytest.mark.parametrize("part", ["positive", "negative", "absolute"])
def test_relevance_mass_is_the_share_that_a_loop_counts(size, part):
    take = {"positive": lambda x: max(x, 0), "negative": lambda x: max(-x, 0), "absolute": abs}[part]
    expected = []
    for values, inside in samples(*phantom(size)):
        mass = [take(x) for x in values]
        expected.append(sum(x for x, here in zip(mass, inside, strict=True) if here) / sum(mass))
    close(m.relevance_mass(*phantom(size), part=part), expected)


@each_size
def test_enrichment_is_the_mass_over_the_share_of_voxels(size):
    mass = m.relevance_mass(*phantom(size)).values.tolist()
    sizes = [sum(inside) / len(inside) for _, inside in samples(*phantom(size))]
    close(m.enrichment(*phantom(size)), [a / b for a, b in zip(mass, sizes, strict=True)])
    close(m.prevalence(*phantom(size)[1:]), sizes)


@each_size
@pytest.mark.parametrize("k", [None, 1, 10])
def test_rank_accuracy_counts_the_highest_voxels(size, k):
    expected = []
    for values, inside in samples(*phantom(size)):
        highest = sorted(range(len(values)), key=lambda i: -values[i])[: k or sum(inside)]
        expected.append(sum(inside[i] for i in highest) / len(highest))
    close(m.rank_accuracy(*phantom(size), k=k), expected)


def test_ties_for_the_last_places_count_as_if_places_were_drawn():
    maps, region = (
        torch.tensor([[[3.0, 1.0, 1.0, 1.0, 0.0]]]),
        torch.tensor([[[True, True, False, False, True]]]),
    )
    close(m.rank_accuracy(maps, region), [(1 + 2 / 3) / 3])


@each_size
def test_average_precision_sums_precision_over_steps_of_recall(size):
    maps, region, within = phantom(size)
    maps = (maps * 2).round()  # many ties
    expected = []
    for values, inside in samples(maps, region, within):
        area, recall = 0.0, 0.0
        for threshold in sorted(set(values), reverse=True):
            marked = [here for x, here in zip(values, inside, strict=True) if x >= threshold]
            area += (sum(marked) / sum(inside) - recall) * sum(marked) / len(marked)
            recall = sum(marked) / sum(inside)
        expected.append(area)
    close(m.average_precision(maps, region, within), expected)


def test_average_precision_of_the_example_of_scikit_learn():
    # sklearn.metrics.average_precision_score, docstring: y_true, y_scores -> 0.83...
    scores, truth = torch.tensor([[[0.1, 0.4, 0.35, 0.8]]]), torch.tensor([[[0, 0, 1, 1]]])
    close(m.average_precision(scores, truth), [0.5 * 1 + 0.5 * 2 / 3], atol=1e-7, rtol=0)
    close(m.roc_auc(scores, truth), [0.75])  # sklearn.metrics.roc_auc_score, docstring


@each_size
def test_roc_auc_counts_pairs(size):
    maps, region, within = phantom(size)
    maps = (maps * 2).round()
    expected = []
    for values, inside in samples(maps, region, within):
        true = [x for x, here in zip(values, inside, strict=True) if here]
        false = [x for x, here in zip(values, inside, strict=True) if not here]
        pairs = [(x > y) + 0.5 * (x == y) for x, y in product(true, false)]
        expected.append(sum(pairs) / len(pairs))
    close(m.roc_auc(maps, region, within), expected)


@each_size
def test_gini_is_half_the_relative_mean_difference_and_entropy_a_sum_of_p_log_p(size):
    maps, region, within = phantom(size)
    sparseness, complexity = [], []
    for values, _ in samples(maps, region, within):
        a = np.abs(values)
        sparseness.append(float(np.abs(a[:, None] - a[None]).mean() / (2 * a.mean())))
        p = a / a.sum()
        complexity.append(float(-(p * np.log(p)).sum()))
    close(m.gini(maps, within), sparseness)
    close(m.entropy(maps, within), complexity)


@each_size
@pytest.mark.parametrize("radius", [0.0, 1.0, 2.5, 7.0])
def test_widened_marks_what_the_exact_distance_transform_finds_close(size, radius):
    spacing = (1.0, 2.5, 0.7)[: len(size)]
    mask = random_image(2, 1, *size, seed=3) > 1.8
    distance = [ndimage.distance_transform_edt(~part[0].numpy(), sampling=spacing) for part in mask]
    expected = torch.from_numpy(np.stack(distance)[:, None] <= radius + 1e-9)
    assert expected.any() and torch.equal(widened(mask, radius, [spacing] * 2), expected)


@pytest.mark.parametrize("kind", ["normal", "two heaps", "sparse"])
def test_otsu_equals_that_of_scikit_image(kind):
    values = random_image(1000, seed=5)
    values = {
        "normal": values,
        "two heaps": torch.cat([values, values[:200] / 2 + 6]),
        "sparse": values.clamp(min=1),
    }[kind]
    assert float(otsu(values)) == pytest.approx(float(threshold_otsu(values.numpy())), abs=1e-12)


@each_size
def test_overlap_is_intersection_over_union_of_what_is_above_the_threshold(size):
    maps, region, within = phantom(size)
    expected, at_half = [], []
    for values, inside in samples(maps, region, within):
        a = np.maximum(values, 0)
        for found, threshold in ((expected, threshold_otsu(a)), (at_half, a.max() / 2)):
            marked = a > threshold
            found.append(float((marked & inside).sum() / (marked | inside).sum()))
    close(m.overlap(maps, region, within), expected)
    close(m.overlap(maps, region, within, threshold=0.5), at_half)


@each_size
def test_shares_part_the_attribution_by_distance(size):
    maps, _, within = phantom(size)
    region = torch.zeros_like(within)
    region[(slice(None), slice(None), *[slice(2, 4)] * len(size))] = True
    spacing, ring_mm = (1.0, 2.0, 1.0)[: len(size)], 2.0
    zones = m.shares(maps, region, ring_mm, spacing, within=within)
    distance = torch.from_numpy(ndimage.distance_transform_edt(~region[0, 0].numpy(), sampling=spacing))
    expected = []
    for values, body in zip(maps.sum(1).clamp(min=0), within[:, 0], strict=True):
        parts = (distance == 0, (distance > 0) & (distance <= ring_mm), distance > ring_mm)
        expected.append([float(values[body & part].sum() / values[body].sum()) for part in parts])
    for zone, column in zip(zones, zip(*expected, strict=True), strict=True):
        close(zone, column)
    torch.testing.assert_close(sum(zone.values for zone in zones), torch.ones(3, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------- closed forms


@each_size
def test_a_map_that_is_equal_everywhere_gets_what_chance_gives(size):
    _, region, within = phantom(size)
    flat, chance = torch.full((3, 1, *size), 2.0), m.prevalence(region, within).values.tolist()
    close(m.relevance_mass(flat, region, within), chance)
    close(m.rank_accuracy(flat, region, within), chance)
    close(m.average_precision(flat, region, within), chance)
    close(m.enrichment(flat, region, within), [1.0] * 3)
    close(m.roc_auc(flat, region, within), [0.5] * 3)
    close(m.gini(flat, within), [0.0] * 3)
    close(m.entropy(flat, within), [math.log(int(body.sum())) for body in within])


@each_size
def test_a_single_voxel_is_as_sparse_as_a_map_can_be(size):
    one = torch.zeros(1, 1, *size)
    one[(0, 0, *[1] * len(size))] = -3.0
    close(m.gini(one), [1 - 1 / one.numel()])
    close(m.entropy(one), [0.0])


@each_size
def test_the_region_itself_is_the_best_map_and_its_opposite_the_worst(size):
    _, region, _ = phantom(size)
    best, worst = region.double(), (~region).double()
    for name in (
        "relevance_mass",
        "rank_accuracy",
        "average_precision",
        "roc_auc",
        "pointing_game",
        "overlap",
    ):
        close(REGION_METRICS[name](best, region), [1.0] * 3)
    for name in ("relevance_mass", "roc_auc", "pointing_game", "overlap", "lesion_hit_rate"):
        close(REGION_METRICS[name](worst, region), [0.0] * 3)


# Quantus, tests/metrics/test_localisation_metrics.py at 85bc29d: name of the data, metric, k, and the number it
# expects. Every map has the value 1 in a box; outside it is 0 ("zeros") or drawn from U(0, 0.1). 224 voxels a side.
BOXES = {  # region, map
    "all_in_gt": ((50, 150), (50, 150)),
    "none_in_gt": ((0, 100), (100, 200)),
    "none_in_gt_fourth": ((0, 112), (112, 224)),
    "half_in_gt": ((50, 100), (0, 100)),
}
QUANTUS = [
    ("all_in_gt_1d", m.rank_accuracy, 100, 1.0),
    ("all_in_gt_2d", m.rank_accuracy, 10000, 1.0),
    ("all_in_gt_1d", m.rank_accuracy, 200, 0.5),
    ("all_in_gt_2d", m.rank_accuracy, 40000, 0.25),
    ("none_in_gt_1d", m.rank_accuracy, 100, 0.0),
    ("none_in_gt_2d", m.rank_accuracy, 10000, 0.0),
    ("half_in_gt_zeros_1d", m.rank_accuracy, 125, 0.4),
    ("half_in_gt_zeros_2d", m.rank_accuracy, 2500, 0.5),
    ("all_in_gt_2d", m.enrichment, 10000, 5.0176),  # concept influence
    ("half_in_gt_zeros_1d", m.enrichment, 100, 2.24),
    ("all_in_gt_zeros_1d", m.relevance_mass, None, 1.0),
    ("all_in_gt_zeros_2d", m.relevance_mass, None, 1.0),
    ("none_in_gt_zeros_1d", m.relevance_mass, None, 0.0),
    ("none_in_gt_zeros_2d", m.relevance_mass, None, 0.0),
    ("half_in_gt_zeros_1d", m.relevance_mass, None, 0.5),
    ("half_in_gt_zeros_2d", m.relevance_mass, None, 0.5),
    ("all_in_gt_1d", m.rank_accuracy, None, 1.0),
    ("all_in_gt_2d", m.rank_accuracy, None, 1.0),
    ("none_in_gt_1d", m.rank_accuracy, None, 0.0),
    ("none_in_gt_2d", m.rank_accuracy, None, 0.0),
    ("half_in_gt_1d", m.rank_accuracy, None, 0.5),
    ("all_in_gt_1d", m.roc_auc, None, 1.0),
    ("all_in_gt_2d", m.roc_auc, None, 1.0),
    ("none_in_gt_fourth_zeros_1d", m.roc_auc, None, 0.0),
    ("none_in_gt_fourth_zeros_2d", m.roc_auc, None, 1 / 3),
    ("all_in_gt_1d", m.pointing_game, None, 1.0),
    ("all_in_gt_2d", m.pointing_game, None, 1.0),
    ("none_in_gt_1d", m.pointing_game, None, 0.0),
    ("none_in_gt_2d", m.pointing_game, None, 0.0),
]


@pytest.mark.parametrize(
    ("data", "metric", "k", "expected"), QUANTUS, ids=[f"{q[0]}-{q[1].__name__}-{q[2]}" for q in QUANTUS]
)
def test_the_numbers_of_quantus(data, metric, k, expected):
    name, dims = data.removesuffix("_1d").removesuffix("_2d"), int(data[-2])
    region_box, map_box = BOXES[name.removesuffix("_zeros")]
    size = (224,) * dims
    region = torch.zeros(1, 1, *size, dtype=torch.bool)
    region[(..., *[slice(*region_box)] * dims)] = True
    maps = torch.zeros(1, 1, *size) if "zeros" in name else torch.rand(1, 1, *size) / 10
    if name == "half_in_gt_zeros" and dims == 2:
        maps[..., 0:100, 75:100] = 1.0
    else:
        maps[(..., *[slice(*map_box)] * dims)] = 1.0
    close(metric(maps, region, **({} if k is None else {"k": k})), [expected], rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- points


def test_the_pointing_game_measures_millimeters():
    maps, region = torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    maps[0, 0, 4, 4] = 1.0
    region[0, 0, 1, 8] = True  # 3 voxels up, 4 to the right
    hits = [
        float(m.pointing_game(maps, region, tolerance_mm=reach, spacing=spacing).values)
        for spacing, reach in [((1, 1), 5.0), ((1, 1), 4.99), ((2, 0.5), 6.33), ((2, 0.5), 6.32)]
    ]
    assert hits == [1.0, 0.0, 1.0, 0.0]  # distances 5 and sqrt(6 ** 2 + 2 ** 2) = 6.3246
    affine = torch.diag(torch.tensor([2.0, 0.5, 1.0, 1.0]))
    placed = MetaTensor(maps, affine=affine)
    assert float(m.pointing_game(placed, region, tolerance_mm=6.33).values) == 1.0
    assert float(m.pointing_game(placed, region, tolerance_mm=6.32).values) == 0.0
    with pytest.raises(InputError, match="give the size of a voxel"):
        m.pointing_game(maps, region, tolerance_mm=5.0)
    with pytest.raises(InputError, match="2 positive sizes"):
        m.pointing_game(maps, region, tolerance_mm=5.0, spacing=(1.0,))
    with pytest.raises(InputError, match="0 mm or more"):
        m.pointing_game(maps, region, tolerance_mm=-1.0, spacing=(1.0, 1.0))


def test_samples_of_a_batch_have_voxels_of_their_own():
    affine = torch.stack([torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])), torch.eye(4)])
    turned = torch.tensor([[0.0, -3.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert spacing_of(MetaTensor(torch.zeros(2, 1, 4, 4), affine=affine), None) == [(2.0, 3.0), (1.0, 1.0)]
    assert spacing_of(MetaTensor(torch.zeros(2, 1, 4, 4), affine=turned), None) == [(2.0, 3.0)] * 2


def test_equally_high_points_count_by_the_share_that_hits():
    maps, region = torch.tensor([[[2.0, 2.0, 0.0, 2.0]]]), torch.tensor([[[True, False, False, False]]])
    close(m.pointing_game(maps, region), [1 / 3])


@each_size
def test_a_lesion_is_hit_if_it_stands_out_against_all_that_is_no_lesion(size):
    maps = random_image(4, 1, *size, seed=7)
    region = random_image(4, 1, *size, seed=8) > 1.5
    maps = maps + 2.5 * region * random_image(4, 1, *size, seed=10).abs()
    expected = []
    for a, r in zip(maps[:, 0].numpy(), region[:, 0].numpy(), strict=True):
        labels, count = ndimage.label(r, structure=np.ones((3,) * r.ndim))
        assert count > 1
        expected.append(np.mean([a[labels == i].max() > a[~r].max() for i in range(1, count + 1)]))
    assert len(set(expected)) > 1
    close(m.lesion_hit_rate(maps, region), expected)
    table = m.lesion_table(maps, region)
    for i in range(4):
        rows = [row for row in table if row.sample == i]
        assert np.mean([row.hit for row in rows]) == pytest.approx(expected[i])
        assert [row.voxels for row in rows] == sorted((row.voxels for row in rows), reverse=True)
        assert sum(row.voxels for row in rows) == int(region[i].sum())
        mass = float(m.relevance_mass(maps, region).values[i])
        assert sum(row.mass for row in rows) == pytest.approx(mass)


@each_size
def test_lesions_with_a_tolerance_stand_against_what_is_close_to_none(size):
    maps, _, within = phantom(size, seed=11)
    region = random_image(3, 1, *size, seed=8) > 1.7
    maps = maps + 3 * region * random_image(3, 1, *size, seed=12)
    spacing, reach = (1.0, 0.6, 2.0)[: len(size)], 1.0
    expected, centers = [], []
    for a, r, v in zip(maps.sum(1).numpy(), region[:, 0].numpy(), within[:, 0].numpy(), strict=True):
        labels, count = ndimage.label(r, structure=np.ones((3,) * r.ndim))
        near = [
            ndimage.distance_transform_edt(labels != i, sampling=spacing) <= reach + 1e-9
            for i in range(1, count + 1)
        ]
        away = a[v & ~np.any(near, 0)].max()
        seen = [i for i in range(count) if (v & (labels == i + 1)).any()]
        expected.append(np.mean([a[near[i] & v].max() > away for i in seen]))
        centers += sorted(ndimage.center_of_mass(labels == i) for i in range(1, count + 1))
    assert any(0 < rate < 1 for rate in expected)
    options = {"tolerance_mm": reach, "spacing": spacing}
    torch.testing.assert_close(
        m.lesion_hit_rate(maps, region, within, **options).values, torch.tensor(np.array(expected))
    )
    table = m.lesion_table(maps, region, within, **options)
    for i in range(3):
        hits = [row.hit for row in table if row.sample == i]
        assert np.nanmean(hits) == pytest.approx(expected[i])
    found = [center for i in range(3) for center in sorted(row.center for row in table if row.sample == i)]
    np.testing.assert_allclose(found, centers)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_lesions_of_a_map_without_values_have_none(value):
    region = torch.tensor([[[True, False, False, True]]])
    maps = torch.tensor([[[1.0, 0.5, value, -1.0]]]) if value != -1.0 else torch.full((1, 1, 4), value)
    table = m.lesion_table(maps, region)
    assert len(table) == 2 and all(math.isnan(row.hit) and math.isnan(row.mass) for row in table)


def test_one_lesion_plays_the_pointing_game_also_with_a_tolerance():
    maps = random_image(6, 1, 9, 9, seed=4)
    region = torch.zeros(6, 1, 9, 9, dtype=torch.bool)
    region[..., 2:5, 3:5] = True
    options = {"tolerance_mm": 3.0, "spacing": (1.5, 1.0)}
    games = m.pointing_game(maps, region, **options).values
    assert 0 < games.mean() < 1
    torch.testing.assert_close(m.lesion_hit_rate(maps, region, **options).values, games)


def test_components_touch_at_corners_and_come_by_size():
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    labels, boxes = components(mask)
    assert torch.equal(labels > 0, mask)
    assert labels.flatten().bincount().tolist()[1:] == [2, 1, 1]
    assert boxes[0] == (slice(2, 4), slice(1, 3))
    assert components(torch.zeros(3, 3, dtype=torch.bool))[1] == []


# ------------------------------------------------------------------------------------------- modalities, structures


def test_modality_specific_importance_weighs_masses_by_importance():
    maps = torch.tensor([[[[3.0, 1.0]], [[0.0, 5.0]], [[1.0, 1.0]]]])
    region = torch.tensor([[[[True, False]]]])
    phi = torch.tensor([[4.0, 1.0, -2.0]])
    close(m.modality_specific_importance(maps, region, phi), [(1.0 * 0.75 + 0.25 * 0.0) / 1.25])
    # to [0, 1]: (4 + 2) / 6, (1 + 2) / 6 and 0, so that the weakest counts for nothing
    close(m.modality_specific_importance(maps, region, phi, mode="jin"), [(1.0 * 0.75 + 0.5 * 0.0) / 1.5])
    own = torch.tensor([[[[True, False]], [[False, True]], [[False, True]]]])
    close(m.modality_specific_importance(maps, own, phi), [(1.0 * 0.75 + 0.25 * 1.0) / 1.25])


def test_a_modality_that_matters_and_gets_nothing_counts_as_missed():
    maps = torch.tensor([[[[0.0, -1.0]], [[1.0, 0.0]]]])
    region = torch.tensor([[[[True, False]]]])
    close(m.modality_specific_importance(maps, region, torch.tensor([[3.0, 1.0]])), [(0 + 1 / 3) / (4 / 3)])


@pytest.mark.parametrize(
    ("phi", "mode", "maps", "region", "reason"),
    [
        ((0.0, -1.0), "max", 1.0, (True, False), "no modality matters"),
        ((2.0, 2.0), "jin", 1.0, (True, False), "all modalities matter alike"),
        ((math.nan, 2.0), "max", 1.0, (True, False), "the importance of a modality is not finite"),
        ((1.0, 2.0), "max", -1.0, (True, False), "the map holds nothing positive"),
        ((1.0, 2.0), "max", 1.0, (False, False), "in a modality that matters the region is empty"),
        ((1.0, 2.0), "max", 1.0, (True, True), "in a modality that matters the region fills all"),
        ((1.0, 2.0), "max", math.nan, (True, False), "in a modality that matters the sample has not been"),
    ],
)
def test_undefined_modality_specific_importance_says_why(phi, mode, maps, region, reason):
    maps, region = torch.full((1, 2, 1, 2), maps), torch.tensor(region).reshape(1, 1, 1, 2)
    scores = m.modality_specific_importance(maps, region, torch.tensor([phi]), mode=mode)
    assert scores.values.isnan().all() and scores.reasons[0].startswith(reason)


def test_modality_specific_importance_refuses_what_does_not_fit():
    maps, region = torch.ones(1, 2, 3, 3), torch.ones(1, 1, 3, 3)
    with pytest.raises(InputError, match=r"importance must have shape \(1, 2\)"):
        m.modality_specific_importance(maps, region, torch.ones(1, 3))
    with pytest.raises(InputError, match="1 or 2 channels"):
        m.modality_specific_importance(maps, torch.ones(1, 3, 3, 3), torch.ones(1, 2))
    with pytest.raises(InputError, match="choose 'max' or 'jin'"):
        m.modality_specific_importance(maps, region, torch.ones(1, 2), mode="min")


@each_size
def test_the_table_of_structures_adds_up(size):
    maps, _, within = phantom(size)
    atlas = (random_image(1, 1, *size, seed=6) * 2).abs().round().clamp(max=4)
    names = {1: "cortex", 3: "thalamus", 9: "absent"}
    rows = m.structure_table(maps, atlas, names, within)
    assert [row.structure for row in rows] == ["cortex", "thalamus", "absent", "elsewhere"] * 3
    for i in range(3):
        table = {row.structure: row for row in rows if row.sample == i}
        values, body = maps[i].sum(0), within[i, 0]
        here = (atlas[0, 0] == 1) & body
        share = float(values[here].clamp(min=0).sum() / values[body].clamp(min=0).sum())
        cortex, absent = table["cortex"], table["absent"]
        assert cortex.voxels == int(here.sum()) and cortex.total == pytest.approx(float(values[here].sum()))
        assert cortex.share == pytest.approx(share) and cortex.reason == ""
        assert cortex.enrichment == pytest.approx(share / (int(here.sum()) / int(body.sum())))
        assert sum(row.share for row in table.values() if row.voxels) == pytest.approx(1.0)
        assert math.isnan(absent.share) and "does not occur" in absent.reason
    labels = [row.structure for row in m.structure_table(maps[:1], atlas)]
    assert labels == [str(int(i)) for i in atlas.unique()]


def test_the_table_of_structures_is_undefined_with_a_reason():
    atlas = torch.tensor([[[[0, 1]]]])
    for maps, reason in [
        (-1.0, "nothing positive"),
        (math.nan, "not been explained"),
        (math.inf, "not finite"),
    ]:
        rows = m.structure_table(torch.full((1, 1, 1, 2), maps), atlas)
        assert all(math.isnan(row.share) and reason in row.reason for row in rows) and len(rows) == 2
    with pytest.raises(InputError, match="integers from 0"):
        m.structure_table(torch.ones(1, 1, 1, 2), torch.tensor([[[[0.5, 1]]]]))
    with pytest.raises(InputError, match="The atlas must have shape"):
        m.structure_table(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 2, 2))


def test_the_mean_mask_leaves_out_the_sample_that_it_is_held_against():
    region = random_image(4, 1, 8, 8, seed=2) > 0.5
    expected = []
    for i in range(4):
        others = torch.stack([region[j] for j in range(4) if j != i]).double().mean(0)
        expected.append(float(m.average_precision(others[None], region[i : i + 1]).values))
    close(m.mean_mask_precision(region), expected)
    mean = region.double().mean(0, keepdim=True)
    close(
        m.mean_mask_precision(region, mean_mask=mean),
        m.average_precision(mean.expand(4, 1, 8, 8), region).values.tolist(),
    )
    alone = m.mean_mask_precision(region[:1])
    assert alone.values.isnan().all() and alone.reasons == ("a mean mask needs other samples, or mean_mask",)


# --------------------------------------------------------------------------------------------- undefined, and errors


CASES = {  # value of the map, region, body
    "the region is empty": ("random", "empty", "all"),
    "the region fills all there is to look within": ("random", "all", "all"),
    "the region does not overlap the mask to look within": ("random", "left", "right"),
    "the mask to look within is empty": ("random", "left", "empty"),
    "the map holds values that are not finite": ("one NaN", "left", "all"),
    "the sample has not been explained": ("NaN", "left", "all"),
}


def made(kind, size):
    masks = {"empty": 0.0, "all": 1.0}
    if kind in masks:
        return torch.full((1, 1, *size), masks[kind]).bool()
    side = torch.zeros(1, 1, *size, dtype=torch.bool)
    side[..., slice(0, 2) if kind == "left" else slice(2, None)] = True
    return side


@each_size
@each_region_metric
@pytest.mark.parametrize("reason", CASES)
def test_what_is_undefined_has_a_reason_and_leaves_other_samples_alone(metric, size, reason):
    maps, region, within = phantom(size)
    map_kind, region_kind, body_kind = CASES[reason]
    region[1], within[1] = made(region_kind, size)[0], made(body_kind, size)[0]
    if map_kind == "NaN":
        maps[1] = math.nan
    elif map_kind == "one NaN":
        maps[(1, 0, *[1] * len(size))] = math.nan
    scores = metric(maps, region, within)
    assert scores.reasons == ("", reason, "") and scores.values.isnan().tolist() == [False, True, False]
    assert scores.not_available() == {reason: 1}
    others = metric(*(x[[0, 2]] for x in (maps, region, within)))
    assert torch.equal(scores.values[[0, 2]], others.values)


@each_size
@each_region_metric
def test_what_lies_outside_of_the_body_does_not_matter(metric, size):
    maps, region, within = phantom(size)
    elsewhere = maps.masked_fill(~within, math.nan)
    torch.testing.assert_close(metric(elsewhere, region, within).values, metric(maps, region, within).values)


@each_size
@each_map_metric
def test_complexity_is_undefined_for_a_map_of_nothing(metric, size):
    maps, _, within = phantom(size, n=5)
    maps[1] = 0.0
    maps[(2, 0, *[0] * len(size))] = math.inf
    maps[3], within[4] = math.nan, False
    within[(2, 0, *[0] * len(size))] = True
    reasons = metric(maps, within).reasons
    assert reasons == (
        "",
        "the map is zero everywhere",
        "the map holds values that are not finite",
        "the sample has not been explained",
        "the mask to look within is empty",
    )
    alone = metric(maps[:1], within[:1]).values
    assert torch.equal(metric(maps, within).values[:1], alone)


@pytest.mark.parametrize(
    "name", ["relevance_mass", "enrichment", "pointing_game", "lesion_hit_rate", "overlap", "inside"]
)
def test_a_map_without_positive_evidence_points_nowhere(name):
    maps, region, _ = phantom((9, 11))
    scores = REGION_METRICS[name](-maps.abs(), region)
    assert scores.reasons == ("the map holds nothing positive",) * 3


@pytest.mark.parametrize("name", ["pointing_game", "lesion_hit_rate", "overlap"])
def test_a_constant_map_points_nowhere(name):
    _, region, _ = phantom((9, 11))
    scores = REGION_METRICS[name](torch.ones(3, 1, 9, 11), region)
    assert scores.reasons == ("the map is constant",) * 3


def test_a_tolerance_that_reaches_everywhere_makes_no_hit():
    maps, region, _ = phantom((9, 11))
    for metric in (m.pointing_game, m.lesion_hit_rate):
        scores = metric(maps, region, tolerance_mm=50.0, spacing=(1.0, 1.0))
        assert scores.values.isnan().all() and "with its tolerance fills all" in scores.reasons[0]
    table = m.lesion_table(maps, region, tolerance_mm=50.0, spacing=(1.0, 1.0))
    assert table and all(math.isnan(row.hit) for row in table)


def test_a_ring_without_voxels_has_no_share():
    maps, region, _ = phantom((9, 11))
    inside, ring, context = m.shares(maps, region, 0.5, (1.0, 1.0))
    assert inside.defined.all() and context.defined.all() and not ring.defined.any()
    assert "the ring holds no voxel" in ring.reasons[0]


@each_region_metric
def test_masks_that_are_no_masks_are_refused(metric):
    maps, region, within = phantom((9, 11))
    with pytest.raises(InputError, match=r"must hold only 0 and 1|hold only 0 and 1, got \[0, 2\]"):
        metric(maps, region.int() * 2, within)
    with pytest.raises(
        InputError, match=r"shape of the map with one channel, \(3, 1, 9, 11\), got \(3, 1, 9, 9\)"
    ):
        metric(maps, region[..., :9], within)
    with pytest.raises(InputError, match="The within must have"):
        metric(maps, region, within[:2])


def test_wrong_arguments_are_named():
    maps, region, _ = phantom((9, 11))
    with pytest.raises(InputError, match="choose one of positive, negative, absolute"):
        m.relevance_mass(maps, region, part="signed")
    with pytest.raises(InputError, match="at least"):
        m.rank_accuracy(maps, region, k=0)
    with pytest.raises(InputError, match=r"in \[0, 1\)"):
        m.overlap(maps, region, threshold=1.0)
    with pytest.raises(InputError, match="above 0 mm"):
        m.shares(maps, region, 0.0, (1.0, 1.0))
    with pytest.raises(InputError, match="Maps must be real"):
        m.gini(torch.ones(3))
    with pytest.raises(InputError, match="one value and one reason per sample"):
        m.Scores(torch.ones(2), ("",))
    with pytest.raises(InputError, match="one value and one reason per sample"):
        m.Scores(torch.ones(2, 1))


def test_too_few_voxels_for_k_is_undefined():
    maps, region, _ = phantom((9, 11))
    assert m.rank_accuracy(maps, region, k=100).not_available() == {
        "there are fewer voxels than k to look within": 3
    }


def test_nan_without_a_reason_gets_one():
    scores = m.Scores(torch.tensor([math.nan, 1.0]))
    assert scores.reasons == ("not a number", "") and float(scores.mean()) == 1.0 and len(scores) == 2


@each_region_metric
def test_float32_maps_are_judged_in_float64(metric):
    maps, region, within = phantom((9, 11))
    assert metric(maps.float(), region, within).values.dtype == torch.float64
    assert torch.equal(
        metric(maps.float(), region, within).values, metric(maps.float().double(), region, within).values
    )


def test_a_map_is_the_signed_sum_of_its_channels():
    maps = torch.tensor([[[1.0, -2.0]], [[-1.0, 5.0]]]).transpose(0, 1)
    assert m.as_one_map(maps).tolist() == [[[0.0, 3.0]]]
    assert m.as_one_map(torch.ones(2, 5)).shape == (2, 1, 5)
    tagged = m.as_one_map(MetaTensor(maps.requires_grad_()))
    assert type(tagged) is torch.Tensor and not tagged.requires_grad


def test_the_foreground_is_what_differs_from_the_corner():
    image = torch.tensor([[[[-1.0, 0.0], [-1.0, -1.0]], [[5.0, 5.0], [6.0, 5.0]]]])
    assert m.foreground(image).tolist() == [[[[False, True], [True, False]]]]
    assert m.foreground(image[:, 1:], background=6.0).tolist() == [[[[True, True], [False, True]]]]


@pytest.mark.gpu
@each_size
@each_region_metric
def test_maps_on_a_gpu_stay_there(metric, size):
    maps, region, within = phantom(size)
    found = metric(*(x.cuda() for x in (maps, region, within))).values
    assert found.is_cuda
    torch.testing.assert_close(
        found.cpu().double(), metric(maps, region, within).values, atol=1e-6, rtol=1e-5
    )


# ------------------------------------------------------------------------------------------------------ accumulators


ACCUMULATORS = {
    "RelevanceMass": (m.RelevanceMass("absolute"), lambda *a: m.relevance_mass(*a, part="absolute")),
    "Enrichment": (m.Enrichment(k=5), lambda *a: m.enrichment(*a, k=5)),
    "RankAccuracy": (m.RankAccuracy(4), lambda *a: m.rank_accuracy(*a, k=4)),
    "LocalizationPrecision": (m.LocalizationPrecision(), m.average_precision),
    "PointingGame": (
        m.PointingGame(1.0, (1.0, 1.0)),
        lambda *a: m.pointing_game(*a, tolerance_mm=1.0, spacing=(1.0, 1.0)),
    ),
    "LesionHitRate": (
        m.LesionHitRate(1.0, (1.0, 1.0)),
        lambda *a: m.lesion_hit_rate(*a, tolerance_mm=1.0, spacing=(1.0, 1.0)),
    ),
    "RegionOverlap": (m.RegionOverlap(0.3), lambda *a: m.overlap(*a, threshold=0.3)),
    "ZoneShare": (
        m.ZoneShare("ring", 1.0, (1.0, 1.0), part="negative"),
        lambda a, r, v: m.shares(a, r, 1.0, (1.0, 1.0), within=v, part="negative").ring,
    ),
    "Sparseness": (m.Sparseness(), lambda a, r, v: m.gini(a, v)),
    "Complexity": (m.Complexity(), lambda a, r, v: m.entropy(a, v)),
}


@pytest.mark.parametrize(("metric", "function"), ACCUMULATORS.values(), ids=ACCUMULATORS)
def test_an_accumulator_gathers_what_its_function_gives(metric, function):
    maps, region, within = phantom((9, 11), n=5)
    maps[3] = math.nan
    expected = function(maps, region, within)
    metric.reset()
    metric(maps[:2], torch.cat([region, within], 1)[:2])  # a batch
    metric(list(maps[2:]), list(torch.cat([region, within], 1)[2:]))  # decollated
    assert metric([], []).shape == (0, 1)
    torch.testing.assert_close(metric.get_buffer()[:, 0], expected.values, equal_nan=True)
    torch.testing.assert_close(metric.aggregate(), expected.values[[0, 1, 2, 4]].mean())
    assert metric.not_available() == {"the sample has not been explained": 1}
    without = function(maps, region, torch.ones_like(within)).values
    metric.reset()
    assert metric.not_available() == {} and metric.aggregate().isnan()
    torch.testing.assert_close(metric(maps, region)[:, 0], without, equal_nan=True)


def test_accumulators_refuse_what_they_cannot_compare():
    maps, region, _ = phantom((9, 11))
    with pytest.raises(InputError, match="needs the region"):
        m.RelevanceMass()(maps)
    with pytest.raises(InputError, match="RelevanceMass needs the region in one channel"):
        m.RelevanceMass()(maps, region.expand(-1, 3, -1, -1))
    with pytest.raises(InputError, match="choose 'inside', 'ring' or 'context'"):
        m.ZoneShare("outside", 1.0)
    assert m.Sparseness()(maps).shape == (3, 1)


EXPLAINER = Explainer(RegionScore(1, Box((2, 2), (9, 9))), Saliency())


def scans(n=3, *, healthy=()):
    """Return cases with an image of two channels on a grid of 2 x 1 mm, and a label with a lesion of class 2."""
    affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    items = []
    for i in range(n):
        label = torch.zeros(1, 16, 16)
        label[:, 3:8, 4:9] = 0 if i in healthy else 2
        label[:, 12:, 12:] = 1
        image = MetaTensor(
            random_image(2, 16, 16, seed=i), affine=affine, meta={"filename_or_obj": f"scans/case-{i}.nii.gz"}
        )
        items.append({"image": image, "label": label})
    return items


def evaluated(items, metrics, *, explainer=EXPLAINER, cases=10, batch_size=2, **options):
    """Run a real evaluator with an AttributionHandler and metrics of its maps."""
    first, *others = metrics.items()
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=batch_size),
        network=small_unet(),
        key_val_metric=dict([first]),
        additional_metrics=dict(others),
        val_handlers=[AttributionHandler(explainer, cases, on_error="raise")],
        **options,
    )
    evaluator.run()
    return evaluator.state


def expected_of(items, function):
    """Return what a function gives for maps that are computed outside of any engine."""
    image = torch.stack([item["image"] for item in items])
    maps = EXPLAINER(small_unet(), image).attributions["image"]
    return function(maps, torch.stack([item["label"] == 2 for item in items])).values


@pytest.mark.parametrize(
    ("decollate", "flatten"), [(True, False), (False, False), (True, True)], ids=["samples", "batch", "flat"]
)
def test_maps_of_a_handler_are_judged_in_an_evaluator(decollate, flatten):
    items = scans(healthy=[1])
    mass, game = m.RelevanceMass(), m.PointingGame(tolerance_mm=4.0)
    take = m.MapsAndRegions(label=2)
    state = evaluated(
        items,
        {
            "mass": IgniteMetricHandler(mass, output_transform=take),
            "game": IgniteMetricHandler(game, output_transform=take),
        },
        decollate=decollate,
        postprocessing=Compose([FlattenAttributionsd()]) if flatten else None,
    )
    alone = expected_of(items, m.relevance_mass)
    torch.testing.assert_close(state.metric_details["mass"][:, 0], alone, equal_nan=True)
    assert state.metrics["mass"] == pytest.approx(float(alone.nanmean())) and 0 < state.metrics["mass"] < 1
    games = expected_of(items, lambda *a: m.pointing_game(*a, tolerance_mm=4.0, spacing=(2.0, 1.0)))
    torch.testing.assert_close(state.metric_details["game"][:, 0], games, equal_nan=True)
    assert mass.not_available() == {"the region is empty": 1}


def test_cases_that_are_not_explained_are_not_available():
    mass = m.RelevanceMass()
    handler = IgniteMetricHandler(mass, output_transform=m.MapsAndRegions(label=2))
    state = evaluated(scans(4), {"mass": handler}, cases=[1])
    values = expected_of(scans(2), m.relevance_mass)
    assert state.metrics["mass"] == pytest.approx(float(values[1]))
    assert state.metric_details["mass"].isnan()[:, 0].tolist() == [True, False, True, True]
    assert mass.not_available() == {"the sample has not been explained": 3}


def test_the_overlay_of_the_documents_attaches_a_metric(repository):
    blocks = re.findall(
        r"code-block:: yaml\n\n(.*?)\n\n(?=\S)", (repository / "docs/metrics.rst").read_text(), re.DOTALL
    )
    config = next(block for block in map(yaml.safe_load, blocks) if "explained_mass" in block)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(scans()), batch_size=2),
        network=small_unet(),
        val_handlers=[AttributionHandler(EXPLAINER, 10, on_error="raise")],
    )
    parser = ConfigParser({"explained_mass": config["explained_mass"], "initialize": config["+initialize"]})
    parser["evaluator"] = evaluator
    parser["explained_mass"]["output_transform"]["label"] = 2
    parser.get_parsed_content("initialize")
    evaluator.run()
    expected = float(expected_of(scans(), m.relevance_mass).mean())
    assert evaluator.state.metrics["relevance_mass"] == pytest.approx(expected)


def test_nothing_explained_is_nan_and_no_failure():
    state = evaluated(
        scans(2),
        {"mass": IgniteMetricHandler(m.RelevanceMass(), output_transform=m.MapsAndRegions(label=2))},
        cases=["another"],
    )
    assert math.isnan(state.metrics["mass"])


def test_the_body_comes_from_the_image_and_the_label_may_be_one_hot():
    items = scans()
    take = m.MapsAndRegions(label=2, within=lambda image: image[:1] > 0)
    state = evaluated(
        items,
        {"mass": IgniteMetricHandler(m.RelevanceMass(), output_transform=take)},
        postprocessing=AsDiscreted("label", to_onehot=3),
    )
    body = torch.stack([item["image"][:1] > 0 for item in items]).as_tensor()
    expected = expected_of(items, lambda maps, region: m.relevance_mass(maps, region, body))
    torch.testing.assert_close(state.metric_details["mass"][:, 0], expected)


def test_several_maps_are_chosen_by_name():
    explainers = {"one": EXPLAINER, "two": Explainer(RegionScore(0, Box((0, 0), (4, 4))), Saliency())}
    metrics = {
        name: IgniteMetricHandler(
            m.RelevanceMass(), output_transform=m.MapsAndRegions(f"{name}_image", label=2)
        )
        for name in explainers
    }
    state = evaluated(scans(), metrics, explainer=explainers)
    assert state.metrics["one"] == pytest.approx(float(expected_of(scans(), m.relevance_mass).mean()))
    assert state.metrics["two"] != pytest.approx(state.metrics["one"])
    output = [{"attribution": {"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, "label": torch.ones(1, 2)}]
    with pytest.raises(InputError, match="choose one of the maps a, b"):
        m.MapsAndRegions()(output)
    with pytest.raises(InputError, match="choose one of the maps a, b"):
        m.MapsAndRegions("c")(output)


def test_labels_become_regions():
    label = torch.tensor([[0.0, 1.0, 2.0]])
    output = [{"attribution": {"image": torch.ones(1, 3)}, "label": label}]
    assert m.MapsAndRegions()(output)[1][0].tolist() == [[False, True, True]]
    assert m.MapsAndRegions(label=2)(output)[1][0].tolist() == [[False, False, True]]
    assert m.MapsAndRegions(label=lambda x: x == 0)(output)[1][0].tolist() == [[True, False, False]]
    with pytest.raises(InputError, match="the label has 2 channels"):
        m.MapsAndRegions(label=2)([{"label": torch.ones(2, 3)}])
    with pytest.raises(InputError, match="no tensor 'label' in the output of the engine, only attribution"):
        m.MapsAndRegions()([{"attribution": {}}])
