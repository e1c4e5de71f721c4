"""Modalities over many cases: intervals, tests, the flag for collapse, and the files."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from networks import random_image
from torch import nn

from monai_xai import InputError, ModalityShapley, OutputScore
from monai_xai.cohorts import ModalityCohort, holm, interval, sign_flip_test


class Weighted(nn.Module):
    def forward(self, used, useless):
        return 2 * used + 1e-4 * useless + 0.5


SHAPLEY = ModalityShapley(OutputScore(), {"zero": 0.0, "one": 1.0})


def cohort(n=30):
    found = ModalityCohort()
    for i in range(n):
        inputs = {"used": 2 + random_image(1, 1, seed=i), "useless": random_image(1, 1, seed=100 + i)}
        found.add(f"case{i}", SHAPLEY(Weighted(), inputs))
    return found


def test_a_modality_that_is_hardly_used_has_collapsed_and_the_other_has_not():
    rows = {(row.baseline, row.modality): row for row in cohort().rows()}
    used, useless = rows["zero", "used"], rows["zero", "useless"]
    assert (used.collapsed, useless.collapsed) == (False, True)
    assert used.low < used.mean < used.high
    assert used.p < 0.001
    assert used.share > 0.99


class Product(nn.Module):
    def forward(self, one, other):
        return one * other


def test_a_cohort_of_both_directions_does_not_cancel():
    found, shapley = ModalityCohort(), ModalityShapley(OutputScore(), {"zero": 0.0, "half": 0.5})
    for i in range(8):
        sign = (-1.0) ** i
        inputs = {"one": torch.full((1, 1), 2.0 * sign), "other": torch.full((1, 1), 3.0 + i)}
        found.add(f"case{i}", shapley(Product(), inputs))
    row = next(row for row in found.rows() if (row.baseline, row.modality) == ("zero", "one"))
    mean = np.mean([2 * (3.0 + i) for i in range(8)])
    assert abs(row.mean) < row.along == pytest.approx(mean / 2)
    assert row.along_low < row.along < row.along_high
    (pair,) = [pair for pair in found.pairs() if pair["baseline"] == "zero"]
    assert pair["synergy"] == pytest.approx(mean)
    assert pair["low"] < pair["synergy"] < pair["high"]


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


def test_files_hold_every_number_and_are_replaced_whole(tmp_path):
    found = cohort(6)
    table, document = found.save(tmp_path)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 6 * 2 * 2
    first = found.cases["case0"]
    assert float(rows[0]["value"]) == float(first.values["zero"][0, 0])
    assert float(rows[0]["interaction with useless"]) == float(first.interactions["zero"][0, 0, 1])
    summary = json.loads(document.read_text())
    assert {row["modality"] for row in summary["cohort"]} == {"used", "useless"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["modalities.csv", "modalities.json"]


def test_cases_of_other_modalities_are_refused():
    found = cohort(1)
    with pytest.raises(InputError, match="the cases before have"):
        found.add("other", SHAPLEY(nn.Identity(), {"image": torch.ones(1, 1)}))
