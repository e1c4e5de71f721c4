"""Comparing methods inside real MONAI loops: what is written where, in what words, and what does not end the loop."""

from __future__ import annotations

import csv
import html
import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bundles import read_config
from monai_xai import (
    Blocks,
    Box,
    ComparisonHandler,
    EdgeControl,
    Explainer,
    FeatureAblation,
    GroundingCase,
    GuidedBackprop,
    InputError,
    InputXGradient,
    RegionScore,
    Saliency,
    TensorBoardComparisonHandler,
    overlays,
)
from monai_xai.comparison import Comparison, Criterion, compare, default_criteria, quick_criteria
from monai_xai.comparison_handler import figures_of_comparison, summary_of, text_of_comparison
from monai_xai.metrics import Scores

SIZE, N = 24, 6
METHODS = {
    name: Explainer(RegionScore(1), attributor, progress=False)
    for name, attributor in (
        ("input x gradient", InputXGradient()),
        ("gradient", Saliency()),
        ("edges", EdgeControl()),
    )
}
CHEAP = {name: default_criteria()[name] for name in ("relevance mass", "deletion area", "Gini sparseness")}


def scans() -> Dataset:
    """Return named scans of two channels with a bright square, which is marked."""
    items = []
    for i in range(N):
        lesion = torch.zeros(1, SIZE, SIZE)
        lesion[:, 3 + i : 9 + i, 4:10] = 1
        image = 0.2 * torch.rand(2, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) + lesion
        scan = MetaTensor(image, meta={"filename_or_obj": f"scans/patient{i}.nii.gz"})
        items.append({"image": scan, "label": lesion})
    return Dataset(items)


def evaluator(handlers: list[Any]) -> SupervisedEvaluator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(
            spatial_dims=2, in_channels=2, out_channels=2, channels=(4, 8), strides=(2,), act="RELU", norm="BATCH"
        )  # fmt: skip
    network.model[-1][0].bias.data = torch.tensor([-9.0, 9.0])  # so that class 1 is predicted
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(scans(), batch_size=4),
        network=network,
        inferer=SlidingWindowInferer(roi_size=(16, 16), overlap=0.5),
        val_handlers=handlers,
    )


def small(**options: Any) -> ComparisonHandler:
    given = {"criteria": CHEAP, "on_error": "raise", "progress": False, "region": "label", **options}
    return ComparisonHandler(METHODS, **given)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("comparison")
    engine = evaluator([small(output_dir=folder / "files", log_dir=folder / "events")])
    engine.run()
    return folder, engine.state.comparison


def test_values_are_those_of_the_explanations(run: tuple[Path, Comparison]) -> None:
    _, found = run
    assert found.cases == tuple(f"patient{i}" for i in range(N))
    assert found.methods == tuple(METHODS)
    engine = evaluator([])
    explainer = replace(METHODS["gradient"], inferer=engine.inferer)
    for i, item in enumerate(scans()):
        image = item["image"].as_tensor()[None]
        values = explainer(engine.network.eval(), image).attributions["image"].sum(1)[0].clamp(min=0)
        mass = float(values[item["label"][0] > 0].sum() / values.sum())
        assert found.values["relevance mass"][1, i] == pytest.approx(mass, rel=1e-5)


def test_quick_criteria_ask_the_same_at_about_half_of_the_evaluations() -> None:
    network = evaluator([]).network.eval()
    image = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    lesion = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    lesion[..., 10:20, 30:40] = True
    target = RegionScore(1, Box((10, 30), (20, 40)))
    methods = {
        "gradient": Explainer(target, Saliency(), progress=False),
        "ablation": Explainer(target, FeatureAblation(Blocks(8)), progress=False),
    }
    default, quick = default_criteria(), quick_criteria()
    evaluations, values = [], []
    for criteria in (default, quick):
        seen: list[int] = []
        handle = network.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(len(args[0]))
        )
        found = compare(
            methods, network, [GroundingCase("patient0", {"image": image + lesion})],
            regions={"patient0": lesion}, criteria=criteria, progress=False,
        )  # fmt: skip
        handle.remove()
        evaluations.append(sum(seen))
        values.append(found.values)
    assert 0.4 < evaluations[1] / evaluations[0] < 0.6
    assert set(default) - set(quick) == {"insertion area"}
    assert all(quick[name].better == default[name].better for name in quick)
    assert all(np.isfinite(values[1][name]).all() for name in quick if name != "completeness gap")
    for name in ("relevance mass", "likeness at random weights", "Gini sparseness"):
        assert (values[0][name] == values[1][name]).all()


def test_every_value_is_in_the_files(run: tuple[Path, Comparison]) -> None:
    folder, found = run
    rows = list(csv.DictReader((folder / "files" / "comparison-1.csv").read_text().splitlines()))
    assert len(rows) == N * len(METHODS)
    for row in rows:
        m, c = found.methods.index(row["method"]), found.cases.index(row["case"])
        for name in CHEAP:
            assert float(row[name]) == found.values[name][m, c]
    told = json.loads((folder / "files" / "comparison-1.json").read_text())
    assert [row["method"] for row in told["overall"]] == list(METHODS)
    assert {row["criterion"] for row in told["summary"]} == {*CHEAP, "seconds", "peak GiB"}


def test_tensorboard_has_table_plots_and_curves(run: tuple[Path, Comparison]) -> None:
    folder, found = run
    events = read(folder / "events")
    tags = events.Tags()
    assert {f"comparison/by/{name.replace(' ', '_')}" for name in CHEAP} <= set(tags["images"])
    assert "comparison/ranks" in tags["images"]
    (event,) = events.Scalars("comparison/edges/relevance_mass")
    assert event.value == pytest.approx(found.values["relevance mass"][2].mean(), rel=1e-6)
    (event,) = events.Scalars("comparison/gradient/rank")
    assert event.value == pytest.approx(found.overall()[1].rank, rel=1e-6)
    (event,) = events.Tensors("comparison/text_summary")
    page = markdown.markdown(
        event.tensor_proto.string_val[0].decode(), extensions=["markdown.extensions.tables"]
    )
    assert page.count("<tr>") == 1 + len(METHODS)
    assert "patient" not in page


def test_plots_show_the_numbers(run: tuple[Path, Comparison]) -> None:
    _, found = run
    figures = dict(figures_of_comparison(found))
    axes = figures["by/relevance_mass"].axes[0]
    marks = sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o")
    assert marks == pytest.approx(sorted(found.values["relevance mass"].mean(1)))
    points = [line.get_xdata() for line in axes.lines if line.get_marker() == "."]
    np.testing.assert_allclose(
        np.sort(np.concatenate(points)), np.sort(found.values["relevance mass"].ravel())
    )
    row = min(found.overall(), key=lambda row: row.rank)
    bars = [line.get_xdata() for line in figures["ranks"].axes[0].lines if line.get_linewidth() == 2]
    assert any(bar == pytest.approx([row.rank_low, row.rank_high]) for bar in bars)


def test_attributors_are_asked_about_the_target(run: tuple[Path, Comparison]) -> None:
    methods = {name: explainer.attributor for name, explainer in METHODS.items()}
    options = {"criteria": CHEAP, "on_error": "raise", "progress": False, "region": "label"}
    engine = evaluator([ComparisonHandler(methods, target=RegionScore(1), **options)])
    engine.run()
    for name in CHEAP:
        np.testing.assert_array_equal(engine.state.comparison.values[name], run[1].values[name])


def test_cases_without_a_mask_are_not_judged_by_location() -> None:
    engine = evaluator([small(region=None)])
    engine.run()
    found = engine.state.comparison
    assert np.isnan(found.values["relevance mass"]).all()
    assert np.isfinite(found.values["deletion area"]).all()


def test_names_are_hashed_in_files(tmp_path: Path) -> None:
    criteria = {
        "names": Criterion(lambda judged: Scores(torch.tensor([math.nan]), (f"{judged.case.id} fails",)))
    }
    handler = small(output_dir=tmp_path, log_dir=tmp_path, anonymize=True, salt="secret", criteria=criteria)
    engine = evaluator([handler])
    engine.run()
    assert engine.state.comparison.cases[0] == "patient0"
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert not re.search(rb"patient\d", everything)
    told = json.loads((tmp_path / "comparison-1.json").read_text())
    assert len({row["case"] for row in told["reasons"]}) == N


def test_a_method_that_is_refused_takes_nothing_from_the_others() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1))  # no ReLU to guide through
    guided = {**METHODS, "guided": Explainer(RegionScore(1), GuidedBackprop(), progress=False)}
    handler = ComparisonHandler(
        guided, criteria=CHEAP, network=network, on_error="raise", progress=False, cases=2
    )
    engine = evaluator([handler])
    network[0].bias.data = torch.tensor([-9.0, 9.0])
    engine.run()
    found = engine.state.comparison
    ranks = {row.method: row.rank for row in found.overall()}
    assert math.isnan(ranks["guided"])
    assert all(math.isfinite(ranks[name]) for name in METHODS)
    assert "guided; deletion area" in html.unescape(text_of_comparison(found))


def test_what_fails_does_not_end_the_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "full").write_text("no folder")
    handler = small(on_error="log", output_dir=tmp_path / "full", cases=1)
    lost = small(on_error="log", region="nothing")
    engine = evaluator([handler, lost])
    with caplog.at_level(logging.WARNING):
        engine.run()
    assert handler.failures == 1
    assert lost.failures == 2
    assert "Not saved: comparison, epoch 1" in caplog.text
    assert "needs masks of shape (4, C, *spatial) in 'nothing'" in caplog.text
    with pytest.raises(InputError, match="needs masks"):
        evaluator([small(region="nothing")]).run()


@pytest.mark.parametrize(
    ("methods", "options", "words"),
    [
        (METHODS, {"every_n_epochs": 0}, "1 or more"),
        (METHODS, {"on_error": "ignore"}, "choose 'log'"),
        ({"gradient": METHODS["gradient"]}, {}, "two explainers or more"),
        (
            {"gradient": Saliency(), "edges": EdgeControl()},
            {},
            "Explainer for 'gradient', or an attributor and target",
        ),
    ],
    ids=["epochs", "on_error", "one method", "no target"],
)
def test_settings_that_make_no_sense(methods: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ComparisonHandler(methods, **options)


def test_hostile_names_are_only_words(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | [x](javascript:alert(1)) **b**\n# \ud800"
    criterion = Criterion(lambda judged: Scores(torch.zeros(1)), "more")
    values = {hostile: np.array([[1.0, 2.0], [3.0, np.nan]])}
    reasons = {(hostile, "b", "c1"): hostile}
    found = Comparison((hostile, "b"), {hostile: criterion}, ("c0", "c1"), values, reasons)
    page = markdown.markdown(text_of_comparison(found), extensions=["markdown.extensions.tables"])
    tags = {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert set(re.findall(r"<(\w+)", page)) <= tags
    handler = TensorBoardComparisonHandler(str(tmp_path))
    handler.write(found, 1)
    assert "comparison/ranks" in read(tmp_path).Tags()["images"]


def test_the_summary_names_the_best_and_those_that_are_not_told_apart() -> None:
    base = np.random.default_rng(0).normal(size=12)
    values = {"x": np.stack([base + 2, base + 2 + 1e-3 * np.array([-1, 1] * 6), base])}
    criterion = Criterion(lambda judged: Scores(torch.zeros(1)), "more")
    cases = tuple(f"c{i}" for i in range(12))
    found = Comparison(("a", "b", "c"), {"x": criterion}, cases, values)
    assert re.match(
        r"[ab] has the best mean rank, 1.50 of 3, over 12 cases; not told apart .*: [ab]\.$",
        summary_of(found),
    )


BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
OWN = ("ct_pet_classification", "image_tabular_classification", "multisequence_regression")


@pytest.mark.parametrize("kind", ["comparison", "grounding"])
@pytest.mark.parametrize("bundle", [*OWN, "ms_lesion_segmentation"])
def test_every_bundle_can_be_compared_and_judged(bundle: str, kind: str) -> None:
    configs = BUNDLES / bundle / "configs"
    own = configs / f"{kind}.yaml"
    assert own.is_file() == (bundle in OWN)  # the others take what is shipped
    merged = read_config(configs / "inference.yaml", own if own.is_file() else overlays.path(kind))
    assert merged["initialize"][-1] == f"$@{kind}_handler.attach(@evaluator)"
    assert set(merged[f"{kind}_handler"]) <= {
        "_target_", "explainer", "explainers", "target", "region", "criteria", "cases", "settings", "output_dir",
        "log_dir", "spread",
    }  # fmt: skip
    if kind == "comparison":
        methods = merged.get_parsed_content("comparison_methods")
        assert len([name for name in methods if not name.endswith("Control")]) >= 6
        assert {"EdgeControl", "NoiseControl"} <= set(methods)
        assert set(merged.get_parsed_content("comparison_criteria")) == set(default_criteria())
