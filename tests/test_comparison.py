"""Comparing methods: ranks, tests, costs, files, and what has no value."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from networks import LinearImage, random_image
from scipy.ndimage import sobel

from monai_xai import (
    Constant,
    Explainer,
    FullGrad,
    GuidedBackprop,
    InputError,
    InputXGradient,
    IntegratedGradients,
    OutputScore,
    Saliency,
)
from monai_xai.comparison import Comparison, Criterion, EdgeControl, NoiseControl, compare
from monai_xai.grounding import GroundingCase
from monai_xai.metrics import Scores
from monai_xai.report.markup import plain_words

ZERO = Constant(0.0)


def planted(n=3, size=12):
    """A network that reads a square of the image, cases, and the square."""
    weights = torch.zeros(1, 1, size, size, dtype=torch.float64)
    weights[..., 2:6, 3:7] = 1
    cases = [GroundingCase(f"case-{i}", random_image(1, 1, size, size, seed=i).abs() + 1) for i in range(n)]
    network = LinearImage((1, size, size))
    network.weight.data.copy_(weights)
    return network, cases, {case.id: weights != 0 for case in cases}


def explainer(method):
    return Explainer(OutputScore(), method, progress=False)


METHODS = {
    "ig": explainer(IntegratedGradients(2, baseline=ZERO)),
    "ixg": explainer(InputXGradient()),
    "gradient": explainer(Saliency()),
}


def test_exact_methods_of_a_linear_network_get_full_marks():
    network, cases, regions = planted()
    found = compare(METHODS, network, cases, regions=regions, progress=False)
    assert found.methods == ("ig", "ixg", "gradient")
    for name in ("relevance mass", "rank accuracy", "average precision", "fidelity R2"):
        np.testing.assert_allclose(found.values[name][:2], 1.0, atol=1e-6, err_msg=name)
    assert found.values["completeness gap"][0] == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(found.values["completeness gap"][1:]).all()
    assert (found.values["deletion area"] > 0).all()
    row = next(r for r in found.rows() if (r.method, r.criterion) == ("ixg", "completeness gap"))
    assert (row.n, row.not_available) == (0, "the method does not promise to add up (3)")


def comparison(values, better="more"):
    values = np.asarray(values, dtype=float)
    ids = tuple(f"c{i}" for i in range(values.shape[1]))
    criterion = Criterion(lambda judged: Scores(torch.zeros(1)), better)
    return Comparison(("a", "b", "c"), {"x": criterion}, ids, {"x": values})


def test_ranks_follow_the_direction_and_ties_share_theirs():
    values = [[3, 3, 1], [2, 3, 2], [1, 0, np.nan]]
    nan = np.nan
    np.testing.assert_array_equal(comparison(values).ranks("x"), [[1, 1.5, nan], [2, 1.5, nan], [3, 3, nan]])
    np.testing.assert_array_equal(comparison(values, "less").ranks("x")[:, :2], [[3, 2.5], [2, 2.5], [1, 1]])
    assert np.isnan(comparison(values, "").ranks("x")).all()


def test_a_method_without_any_value_takes_no_rank_from_the_others():
    values = [[3, 1], [2, 2], [np.nan, np.nan]]
    np.testing.assert_array_equal(comparison(values).ranks("x"), [[1, 2], [2, 1], [np.nan, np.nan]])
    rows = comparison(values).rows()
    assert [row.rank for row in rows[:2]] == [1.5, 1.5]
    assert math.isnan(rows[2].rank)
    assert math.isnan(rows[2].p)


def test_the_overall_rank_is_the_mean_over_criteria_that_all_have():
    more, less = (Criterion(lambda judged: Scores(torch.zeros(1)), better) for better in ("more", "less"))
    values = {
        "x": np.array([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]),  # ranks 1, 2, 3
        "y": np.array([[1.0, 9.0], [2.0, 3.0], [3.0, 2.0]]),  # less is better: 1, 2, 3 and 3, 2, 1
        "gap": np.array([[1.0, 1.0], [0.0, 0.0], [np.nan, np.nan]]),  # one method has none: does not count
        "seconds": np.array([[9.0, 9.0], [5.0, 5.0], [1.0, 1.0]]),  # a cost: does not count
    }
    criteria = {"x": more, "y": less, "gap": less, "seconds": less}
    found = Comparison(("a", "b", "c"), criteria, ("c0", "c1"), values)
    assert [row.rank for row in found.overall()] == [1.5, 2.0, 2.5]
    assert found.overall()[0].n == 2
    table = found.as_markdown().splitlines()
    assert table[0] == "| method | mean rank | x ↑ | y ↓ | gap ↓ | seconds ↓ |"
    assert table[2] == "| a | **1.5** | **3 (1.0)** | **5 (2.0)** | 1 (2.0) | 9 (3.0) |"


def test_controls_know_nothing_of_the_network():
    network, cases, _ = planted(1, size=8)
    other = LinearImage((1, 8, 8))
    for control in (EdgeControl(), NoiseControl()):
        maps = [explainer(control)(net, cases[0].inputs).attributions["image"] for net in (network, other)]
        assert torch.equal(*maps)
    image = cases[0].inputs.double().numpy()[0, 0]
    edges = explainer(EdgeControl())(network, cases[0].inputs).attributions["image"][0, 0]
    expected = np.hypot(sobel(image, 0), sobel(image, 1))
    np.testing.assert_allclose(edges, expected, rtol=1e-5)


def test_names_of_methods_are_only_words_in_the_table():
    found = Comparison(("<b>|x", "y"), {}, ("c",), {})
    assert "&#60;b&#62;&#124;x" in found.as_markdown(plain_words)


def test_a_better_method_is_told_from_a_worse_one_and_not_from_an_equal_one():
    generator = np.random.default_rng(0)
    base = generator.normal(size=12)
    found = comparison([base + 1, base + 1 + 0.01 * generator.normal(size=12), base]).rows()
    assert found[2].p < 0.01
    assert math.isnan(min(found[:2], key=lambda row: row.rank).p)
    assert max(found[:2], key=lambda row: row.rank).p > 0.05
    assert found[2].rank == found[2].rank_low == found[2].rank_high == 3


def test_a_refused_method_and_a_missing_region_have_reasons_and_no_value():
    network, cases, _ = planted(2)
    found = compare(
        {"ixg": METHODS["ixg"], "guided": explainer(GuidedBackprop())}, network, cases, progress=False
    )
    assert np.isnan(found.values["seconds"][1]).all()
    assert "calls none" in found.reasons["seconds", "guided", "case-0"]
    assert found.reasons["relevance mass", "ixg", "case-0"] == "no region is given"
    assert "n/a" in found.as_markdown()


def test_every_number_is_in_the_files(tmp_path):
    network, cases, regions = planted(2)
    criteria = {"mass": Criterion(lambda judged: Scores(torch.tensor([0.5])), "more")}
    found = compare(METHODS, network, cases, regions=regions, criteria=criteria, progress=False)
    table, document = found.save(tmp_path)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 6
    assert {row["mass"] for row in rows} == {"0.5"}
    summary = json.loads(document.read_text())["summary"]
    assert {row["criterion"] for row in summary} == {"mass", "seconds", "peak GiB"}


def test_memory_and_time_are_measured():
    network, cases, _ = planted(1)
    found = compare(METHODS, network, cases, criteria={}, progress=False)
    assert (found.values["seconds"] > 0).all()
    assert (found.values["peak GiB"] >= 0).all()


@pytest.mark.parametrize(
    ("explainers", "count"), [({"ig": METHODS["ig"]}, 1), (METHODS, 0)], ids=["one method", "no case"]
)
def test_there_must_be_something_to_compare(explainers, count):
    network, cases, _ = planted(1)
    with pytest.raises(InputError, match="two explainers or more and a case"):
        compare(explainers, network, cases[:count])


def test_a_network_is_left_as_it_was():
    network, cases, regions = planted(1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    compare({"a": METHODS["ig"], "b": explainer(FullGrad())}, network, cases, regions=regions, progress=False)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
