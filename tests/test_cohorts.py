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
from monai_xai.cohorts import ModalityCohort


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
