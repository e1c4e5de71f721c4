"""Networks that are known to use the finding, or a tag in the corner: each verdict comes from its own situation."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from scipy import ndimage
from scipy.stats import bootstrap
from torch import nn

from monai_xai import (
    Blocks,
    Blur,
    ClassScore,
    Constant,
    Explainer,
    FeatureAblation,
    GivenImage,
    InputError,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    OutputScore,
    RegionScore,
    Supervoxels,
)
from monai_xai.attributors import Attribution, Attributor
from monai_xai.grounding import GroundingCase, GroundingSettings, GroundingTest, ground
from monai_xai.grounding.drafts import Cohort, Draft, settle
from monai_xai.grounding.evidence import Evidence, _rolled, open_case
from monai_xai.grounding.of_shortcuts import _moved, _on_confounders, reached
from monai_xai.grounding.places import BODY as BODY_REST
from monai_xai.grounding.places import FINDING, OUTSIDE, name_places, shares_of_places
from monai_xai.grounding.procedure import ORDER, decide
from monai_xai.metrics import Road, deletion_curve, insertion_curve
from monai_xai.statistics import interval

SIZE, N = 24, 8
SETTINGS = GroundingSettings.quick(min_cases=N, steps=5, n_disturbed=6, n_draws=999, n_cascade=0)
GRADIENTS = InputXGradient()


class Reader(nn.Module):
    """Looks for what is bright, with a weight for every place; the other class is the constant 0."""

    def __init__(self, places: torch.Tensor, seed: int = 0, channels: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(channels, 1, 3, padding=1)
        nn.init.constant_(self.conv.weight, 1 / 9)
        nn.init.constant_(self.conv.bias, -1.2)
        varied = places.float() * (1 + 0.2 * torch.rand(places.shape, generator=generator))
        self.places = nn.Parameter(varied)

    def forward(self, x):
        score = (torch.relu(self.conv(x)) * self.places).flatten(1).sum(1, keepdim=True)
        return torch.cat([torch.zeros_like(score), score], 1)


def disk(row, column, radius):
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


BODY = disk(11.5, 11.5, 10.5)
TAG = disk(1, 1, 1.5)
PARTNER = disk(11, 11, 2.5)
USES_LESION, USES_TAG = (Reader(BODY), Reader(BODY, seed=1)), (Reader(TAG), Reader(TAG, seed=1))
USES_BOTH = Reader(BODY | TAG), Reader(BODY | TAG, seed=1)


def make_cases(n=N, *, partner=False, channels=1, radius=2.2):
    generator = np.random.default_rng(0)
    cases, regions = [], {}
    for i in range(n):
        texture = ndimage.gaussian_filter(generator.normal(size=(SIZE, SIZE)), 1.5)
        image = torch.from_numpy(0.3 * texture / texture.std()).float() * BODY + 0.5 * BODY + 3.0 * TAG
        angle = 2 * math.pi * i / n
        way = min(6, 10.3 - radius)
        lesion = disk(11.5 + way * math.sin(angle), 11.5 + way * math.cos(angle), radius) & BODY
        image = image + 3.0 * lesion + (3.0 * PARTNER if partner else 0.0)
        other = torch.from_numpy(generator.normal(size=(channels - 1, SIZE, SIZE))).float()
        cases.append(GroundingCase(f"case{i}", torch.cat([image[None], other])[None]))
        regions[f"case{i}"] = lesion
    return cases, regions


CASES, REGIONS = make_cases()
WITHIN = dict.fromkeys(REGIONS, BODY)


def judge(networks=USES_LESION, attributor=GRADIENTS, cases=CASES, target=None, **given):
    options = {
        "regions": REGIONS,
        "within": WITHIN,
        "second_network": networks[1],
        "settings": SETTINGS,
        **given,
    }
    explainer = Explainer(target or ClassScore(1), attributor, progress=False)
    return ground(explainer, networks[0], cases, **options)


COMPLETE = {
    "attributor": IntegratedGradients(n_steps=8, baseline=Constant(0.0)),
    "settings": replace(SETTINGS, n_cascade=1, insertion=True),
}


@pytest.fixture(scope="module")
def grounded():
    return judge(**COMPLETE)


@dataclass(frozen=True)
class Edges(Attributor):
    def attribute(self, scoring):
        edges = [
            ndimage.generic_gradient_magnitude(x[0].numpy(), ndimage.sobel) for x in scoring.inputs["image"]
        ]
        return Attribution({"image": torch.from_numpy(np.stack(edges))[:, None]}, scoring.score())


@dataclass(frozen=True)
class NotTheFinding(Attributor):
    """The true map of all but the finding."""

    def attribute(self, scoring):
        found = GRADIENTS.attribute(scoring)
        shown = (scoring.inputs["image"] < 2.2) | disk(11, 11, 3.6)
        return replace(found, maps={"image": found.maps["image"] * shown})


def test_a_true_map_of_a_network_that_uses_the_finding_is_grounded(grounded):
    assert grounded.verdict == "GROUNDED", grounded.sentence
    passed = {test.id for test in grounded.tests if test.status == "PASS"}
    assert {"P1", "P2", "P3", "T1", "T2", "T5", "T6", "T7", "T8", "T9", "T10"} <= passed
    assert [test.id for test in grounded.tests] == list(ORDER)
    assert grounded.test("T7").value > 0.8
    assert grounded.test("T9").value == pytest.approx(np.mean(list(grounded.test("T9").per_case.values())))


def test_the_network_is_bit_for_bit_as_before_and_a_second_run_gives_the_same(grounded):
    network = USES_LESION[0]
    before = {name: x.clone() for name, x in network.state_dict().items()}
    state = torch.get_rng_state()
    again = judge(**COMPLETE).as_dict()
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    first = grounded.as_dict()
    for result in (first, again):
        result["configuration"].pop("mean_seconds")
    assert again == first


def test_the_result_is_json_without_nan(grounded):
    text = json.dumps(grounded.as_dict(), allow_nan=False)
    found = json.loads(text)
    assert found["verdict"] == "GROUNDED"
    assert found["tests"][0]["id"] == "P1"
    assert found["configuration"]["settings"]["alpha"] == 0.05
    assert next(t for t in found["tests"] if t["id"] == "T3")["p"] is None


def test_what_a_page_shows_is_there(grounded):
    (case, *_), names = grounded.cases, set(grounded.curves)
    assert case.image.shape == (1, SIZE, SIZE)
    assert case.attribution.shape == case.region.shape == (SIZE, SIZE)
    assert case.region.dtype == bool
    assert case.prediction is None
    assert case.spacing == (1.0, 1.0)
    assert case.values["T7"] == grounded.test("T7").per_case["case0"]
    assert {
        "deletion, imputed by mean: map", "insertion, imputed by blur: map shifted", "cascade: pearson"
    } <= names  # fmt: skip
    for curve in grounded.curves.values():
        assert len(curve["x"]) == len(curve["y"])
    fall = grounded.curves["deletion, imputed by mean: map"]["y"]
    assert fall[0] == 0
    assert fall[-1] < -0.5 * np.mean([c.score - c.baseline_score for c in grounded.cases])


def evidence_of(explainer: Explainer, network: torch.nn.Module, case: GroundingCase, *masks) -> Evidence:
    """Return what the tests of one case look at."""
    opened = open_case(explainer, network, case, *masks)
    return opened.with_map(opened.explained(network))


def test_curves_are_means_over_cases_with_bootstrap_bands(grounded):
    explainer = replace(Explainer(ClassScore(1), COMPLETE["attributor"], progress=False))
    settings = COMPLETE["settings"]
    rows = {deletion_curve: [], insertion_curve: []}
    for case in CASES:
        e = evidence_of(explainer, USES_LESION[0], case, REGIONS[case.id], BODY)
        for follow, found in rows.items():
            curve = follow(
                e.explainer, USES_LESION[0], e.inputs, explanation=e.maps, features=e.blocks(settings), imputer=Blur(),
                steps=settings.steps, until=e.until(settings),
            )  # fmt: skip
            found.append(curve.raw[0] - (curve.clean if follow is deletion_curve else curve.emptied))
    for kind, found in (("deletion", rows[deletion_curve]), ("insertion", rows[insertion_curve])):
        curve = grounded.curves[f"{kind}, imputed by blur: map"]
        values = torch.stack(found).detach().numpy()
        np.testing.assert_allclose(curve["y"], values.mean(0), atol=1e-4)
        options = {"method": "percentile", "n_resamples": 9999, "random_state": np.random.default_rng(1)}
        band = bootstrap((values,), np.mean, axis=0, **options).confidence_interval
        np.testing.assert_allclose(curve["low"], band.low, atol=0.05 * np.ptp(values))
        np.testing.assert_allclose(curve["high"], band.high, atol=0.05 * np.ptp(values))


def test_p_values_are_corrected_within_their_gate(grounded):
    for gate, count in (("Q1", 3), ("Q2", 3)):
        tests = [t for t in grounded.tests if t.gate == gate and not math.isnan(t.p)]
        assert len(tests) == count
        smallest = min(tests, key=lambda t: t.p)
        assert smallest.p_corrected == pytest.approx(count * smallest.p)


def test_a_network_that_uses_the_tag_is_off_target_and_the_place_is_named():
    tags = {"tag": dict.fromkeys(REGIONS, TAG)}
    found = judge(USES_TAG, confounders=tags, second_network=None)  # a shortcut is found without one, too
    assert found.test("T2").status == "PROVISIONAL"
    assert found.verdict == "FAITHFUL BUT OFF TARGET"
    assert "shortcut" in found.sentence
    assert "points at tag" in found.sentence
    assert "voxel (1, 1)" in found.sentence or "voxel (0, 0)" in found.sentence
    assert found.test("T9").status == "FAIL"
    assert found.test("T10").status == "FAIL"
    assert found.test("T10").value > 0.9


AIR = ~BODY & (torch.arange(SIZE) < SIZE // 2)


@dataclass(frozen=True)
class Spilling(Attributor):
    """The true map in the body, and a share of all evidence in the air, another one for each case."""

    summable: ClassVar[bool] = True
    shares: tuple[float, ...]

    def attribute(self, scoring):
        found, image = COMPLETE["attributor"].attribute(scoring), scoring.inputs["image"]
        share = self.shares[min(range(N), key=lambda i: float((CASES[i].inputs - image).abs().sum()))]
        values = found.maps["image"] * BODY
        spilt = share / (1 - share) * values.clamp(min=0).sum() / AIR.sum() * AIR
        return replace(found, maps={"image": values + spilt})


@pytest.mark.parametrize(
    ("shares", "networks", "status"),
    [
        ((0.01,) * N, USES_BOTH, "PASS"),
        ((0.3,) * N, USES_LESION, "FAIL"),
        ((0.3,) * N, USES_BOTH, "FAIL"),
        ((0.0, 0.3) * (N // 2), USES_LESION, "INCONCLUSIVE"),
        ((0.0, 0.3) * (N // 2), USES_BOTH, "INCONCLUSIVE"),
    ],
    ids=["little", "much", "much, and used", "perhaps much", "perhaps much, and used"],
)
def test_where_much_lies_outside_it_is_told_whether_the_network_surely_looks_there(shares, networks, status):
    found = judge(networks, Spilling(shares), settings=COMPLETE["settings"]).test("T10")
    assert (found.status, found.value) == (status, pytest.approx(np.mean(shares), rel=1e-6))
    assert ("Check for a shortcut" in found.message) == (status != "PASS")
    told = re.search(r"The network looks there.* by (\d+)% \((\d+)% to (\d+)%\)", found.message)
    assert (told is not None) == (status != "PASS" and networks is USES_BOTH)
    if told:
        images = torch.cat([case.inputs for case in CASES])
        even = torch.where(BODY, images, images[..., ~BODY].median(-1).values[..., None, None])
        with torch.no_grad():
            clean, without, gone = (networks[0](x)[:, 1] for x in (images, even, torch.zeros_like(images)))
        moved, lost = (clean - without).abs().numpy(), (clean - gone).abs().numpy()
        bounds = interval(moved / lost, seed=SETTINGS.seed, weights=lost)
        expected = [100 * moved.sum() / lost.sum(), 100 * bounds[0], 100 * bounds[1]]
        assert [float(part) for part in told.groups()] == pytest.approx(expected, abs=0.51)


def test_what_is_not_sure_to_move_the_score_is_not_told():
    """The interval must lie above the share that a map may have outside, and takes five cases."""
    spilling = Spilling((0.3,) * N)
    for settings, cases in ((replace(COMPLETE["settings"], outside=0.25), CASES), (SETTINGS, CASES[:4])):
        names = [case.id for case in cases]
        options = {"regions": {n: REGIONS[n] for n in names}, "within": dict.fromkeys(names, BODY)}
        found = judge(USES_BOTH, spilling, cases, settings=settings, **options).test("T10")
        assert "Check for a shortcut" in found.message
        assert "The network looks there" not in found.message


@dataclass(frozen=True)
class Against(Attributor):
    """A map in which all speaks against the score."""

    def attribute(self, scoring):
        found = COMPLETE["attributor"].attribute(scoring)
        return replace(found, maps={"image": -found.maps["image"].abs()})


def test_why_nothing_can_be_said_of_the_outside():
    everywhere = dict.fromkeys(REGIONS, torch.ones_like(BODY))
    for attributor, options, why in (
        (GRADIENTS, {"within": everywhere}, "The body fills the image, and there are no confounders."),
        (Against(), {}, "Nothing on the grid of 'image' speaks for the score, and there are no confounders."),
        (
            GRADIENTS,
            {"within": everywhere, "confounders": {"all": everywhere}},
            "The body fills the image, and confounders leave no other place to compare.",
        ),
    ):
        found = judge(attributor=attributor, **options).test("T10")
        assert (found.status, found.message) == ("NA", why)


class Two(nn.Module):
    """Sums up what lies in the air of the first image, squared, and all of the second."""

    def __init__(self, fails_at_even: bool = False) -> None:
        super().__init__()
        self.fails_at_even = fails_at_even

    def forward(self, x, y):
        air = x[..., ~BODY]
        if self.fails_at_even and bool(air.any() and (air == air[..., :1]).all()):
            raise RuntimeError("an even air")
        return air.square().flatten(1).sum(1, keepdim=True) + y.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["plain", "MetaTensor", "full", "fails"])
def test_what_lies_outside_is_taken_away_on_the_grid_of_the_body_alone(kind):
    images = torch.rand((1, 2, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = MetaTensor(images) if kind == "MetaTensor" else images
    other = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    body = torch.ones_like(BODY) if kind == "full" else BODY
    network = Two(kind == "fails")
    explainer = Explainer(OutputScore(0), COMPLETE["attributor"], progress=False)
    opened = open_case(explainer, network, GroundingCase("a", {"image": x, "other": other}), None, body)
    moved = _moved(opened.with_map(opened.explained(network)), network)
    air = images[0][:, ~BODY]
    even = air.shape[1] * air.median(-1).values.square().sum()
    expected = float((air.square().sum() - even).abs())
    assert (
        moved == pytest.approx(expected, rel=1e-9) if kind in ("plain", "MetaTensor") else math.isnan(moved)
    )


def test_a_network_that_uses_the_tag_is_off_target_and_the_structure_is_named():
    corner = disk(21, 21, 2)
    atlas = TAG.long() * 7 + corner.long() * 3
    given = {"structures": dict.fromkeys(REGIONS, atlas), "structure_names": {3: "corner", 7: "the tag"}}
    found = judge(USES_TAG, **COMPLETE, **given)
    assert found.verdict == "FAITHFUL BUT OFF TARGET"
    assert re.search(r"of the rest, most is in the tag: \d+% of all, highest around voxel", found.sentence)
    assert max(found.places, key=found.places.get) == "the tag"
    assert sum(found.places.values()) == pytest.approx(1.0)
    without = judge(USES_TAG, **COMPLETE)
    assert "most is in the outside of the body" in without.sentence
    assert [test.as_dict() for test in without.tests] == [test.as_dict() for test in found.tests]
    assert without.places["the outside of the body"] >= found.places["the tag"] - 1e-12


def test_a_confounder_in_the_body_is_held_against_places_in_the_body():
    """Any place in the body has more of a map that lies in the body than the air around it has."""
    generator, found = np.random.default_rng(0), []
    for _ in range(100):
        cases, marks = [], {}
        for i in range(8):
            noise = ndimage.gaussian_filter(generator.normal(size=(SIZE, SIZE)), 2)
            values = torch.from_numpy(noise)[None, None] * BODY
            angle = generator.uniform(0, 2 * math.pi)
            marks[f"case{i}"] = disk(11.5 + 6 * math.sin(angle), 11.5 + 6 * math.cos(angle), 2.2)
            cases.append(
                SimpleNamespace(id=f"case{i}", located=lambda values=values: values, body=BODY[None, None])
            )
        found += _on_confounders(Cohort(cases, SETTINGS), {"scar": marks}).values()
    assert np.mean(np.array(found) < 0.05) <= 0.09, "0.05 within two standard errors"


def test_a_confounder_is_found_in_a_small_body():
    generator, organ = np.random.default_rng(0), disk(11.5, 11.5, 4.0)[None, None]
    cases, marks = [], {}
    for i in range(8):
        marks[f"case{i}"] = disk(11.5 + 2 * math.sin(i), 11.5 + 2 * math.cos(i), 1.0)
        noise = torch.from_numpy(generator.random((SIZE, SIZE)))
        values = (noise + 50 * marks[f"case{i}"])[None, None] * organ
        cases.append(SimpleNamespace(id=f"case{i}", located=lambda values=values: values, body=organ))
    settings = replace(SETTINGS, min_places=5)
    assert float(organ.double().mean()) < 0.1
    assert _on_confounders(Cohort(cases, settings), {"scar": marks})["scar"] < 0.01


@dataclass(frozen=True, eq=False)
class OnlyWhere(Attributor):
    """A part of another map."""

    where: torch.Tensor
    attributor: Attributor

    def attribute(self, scoring):
        found = self.attributor.attribute(scoring)
        return replace(found, maps={"image": found.maps["image"] * self.where})


WEAKER = disk(11, 11, 3.6)
ONLY_THE_WEAKER = OnlyWhere(WEAKER, COMPLETE["attributor"])


def with_a_weaker(strength, n=N):
    """Return cases with a second finding, which is weaker than the marked one."""
    return [GroundingCase(case.id, case.inputs + strength * PARTNER) for case in CASES[:n]]


class Capped(Reader):
    """Has enough of the finding when a part of it is seen."""

    def forward(self, x):
        return super().forward(x).clamp(max=80.0)


class Breaking(Reader):
    """Gives no number for the first case without its finding."""

    def forward(self, x):
        finding = (x[:, 0] * REGIONS["case0"]).flatten(1).sum(1) / REGIONS["case0"].sum()
        breaks = (x[:, 0, -1, -1] == 7) & (finding < 2)
        return super().forward(x).masked_fill(breaks[:, None], math.nan)


@dataclass(frozen=True)
class Raised(Attributor):
    """Another map, and a constant."""

    attributor: Attributor
    by: float

    def attribute(self, scoring):
        found = self.attributor.attribute(scoring)
        return replace(found, maps={"image": found.maps["image"] + self.by})


def deletion(networks=USES_LESION, attributor=None, cases=CASES, **changes):
    """Judge by T5, whatever T2 says."""
    settings = replace(SETTINGS, stop_early=False, **changes)
    within = {case.id: BODY for case in cases}
    attributor = attributor or COMPLETE["attributor"]
    return judge(networks, attributor, cases, regions=None, within=within, settings=settings).test("T5")


@pytest.mark.parametrize(("n", "status"), [(N, "FAIL"), (N - 1, "INCONCLUSIVE")])
def test_a_gain_that_is_small_for_what_is_attainable_is_no_pass(n, status):
    test = deletion(attributor=ONLY_THE_WEAKER, cases=with_a_weaker(1.8, n))
    assert test.p < 0.05
    assert 0.2 < test.value < test.interval[1] < GroundingSettings().gain
    assert test.status == status
    assert "that is attainable" in test.message
    assert "At least 50% is asked" in test.message


@pytest.mark.parametrize("attributor", [COMPLETE["attributor"], ONLY_THE_WEAKER], ids=["true", "weaker"])
def test_a_constant_makes_no_map_better_or_worse(attributor):
    cases = with_a_weaker(1.8)
    plain = deletion(attributor=attributor, cases=cases)
    assert (plain.status == "PASS") == (attributor is not ONLY_THE_WEAKER)
    for by in (-10.0, 0.3, 10.0):
        raised = deletion(attributor=Raised(attributor, by), cases=cases)
        assert raised.status == plain.status
        assert raised.value == pytest.approx(plain.value, abs=0.1)  # ties are broken at random


class Adding(Reader):
    """Adds up the image, each place with its weight, up to a limit."""

    def __init__(self, *arguments, limit=math.inf, **options):
        super().__init__(*arguments, **options)
        self.limit = limit

    def forward(self, x):
        score = (x * self.places).flatten(1).sum(1, keepdim=True).clamp(max=self.limit)
        return torch.cat([torch.zeros_like(score), score], 1)


class Falling(Reader):
    """The score falls with the finding."""

    def forward(self, x):
        return -super().forward(x)


PLAIN = GivenImage(BODY.float()[None])


def textured(strength, finding):
    generator = torch.Generator().manual_seed(0)
    textures = torch.rand((N, 1, 1, SIZE, SIZE), generator=generator)
    lesions = [region & BODY for region in REGIONS.values()]
    return [
        GroundingCase(f"case{i}", (1 + strength * textures[i] + finding * (-1) ** i * lesions[i]) * BODY)
        for i in range(N)
    ]


@pytest.mark.parametrize(
    ("network", "cases", "baseline"),
    [(Adding, textured(0.1, 3.0), PLAIN), (Falling, CASES, Constant(0.0))],
    ids=["for and against", "against"],
)
def test_true_maps_take_most_of_what_is_attainable(network, cases, baseline):
    attributor = IntegratedGradients(n_steps=8, baseline=baseline)
    test = deletion((network(BODY), network(BODY, seed=1)), attributor, cases)
    assert test.status == "PASS", test.message
    assert test.value > 0.6


def test_where_no_order_takes_more_than_another_deletion_tells_nothing():
    networks = Adding(BODY, limit=200.0), Adding(BODY, seed=1, limit=200.0)
    test = deletion(networks, cases=textured(0.1, 0.0))
    assert test.status == "INCONCLUSIVE"
    assert "deletion tells nothing" in test.message


class WithoutGradients(Reader):
    """The same scores, through which nothing comes back."""

    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("networks", "changes"),
    [
        (USES_LESION, {"imputers": {"road": Road(), "road again": Road(noise=0.0)}}),
        ((WithoutGradients(BODY), WithoutGradients(BODY, seed=1)), {}),
    ],
    ids=["no path", "no gradients"],
)
def test_without_an_order_to_beat_a_part_of_the_change_of_the_score_is_asked(networks, changes):
    occlusion = Occlusion((1, 3, 3), (1, 2, 2), Constant(0.0))
    assert deletion(networks, occlusion, **changes).status == "PASS"
    impostor = OnlyWhere(WEAKER, occlusion)
    assert deletion(networks, impostor, with_a_weaker(1.2), **changes).status != "PASS"


def test_an_imputer_under_which_nothing_is_attainable_makes_no_map_fail():
    cases, _ = make_cases(radius=5.0)
    networks = Capped(BODY), Capped(BODY, seed=1)
    test = deletion(networks, cases=cases, imputers={"mean": "mean", "blur": Blur(1.0)})
    assert test.status == "INCONCLUSIVE"
    assert "nothing to tell imputed by blur" in test.message


def test_a_score_that_is_not_finite_on_the_way_leaves_its_case_out():
    marked = CASES[0].inputs.clone()
    marked[..., -1, -1] = 7.0
    broken = GroundingCase("case0", marked)
    test = deletion((Breaking(BODY), Breaking(BODY, seed=1)), cases=[broken, *CASES[1:]])
    assert test.status == "PASS"
    assert math.isnan(test.per_case["case0"])
    assert test.n == N - 1


def test_thresholds_are_printed_as_they_were_set():
    changed = replace(
        SETTINGS, met=0.705, errors=2.5, moves=0.002, gap=0.06, unchanged=0.85, little=0.75, same_class=0.95,
        gain=0.455, gain_steps=3, gain_alone=0.355, attainable=0.004, outside=0.205, outside_cases=4, top=0.305,
        residual=0.0004, collapse=0.005,
    )  # fmt: skip
    cases, regions = make_cases(channels=2)
    networks = AlikeForAll(BODY, channels=2), AlikeForAll(BODY, 1, channels=2)
    given = {"cases": cases, "regions": regions, "permuted_network": networks[1], "settings": changed}
    found = judge(networks, IntegratedGradients(n_steps=8), **given)
    printed = {test.id: f"{test.threshold}; {test.origin}" for test in found.tests}
    for name, figures in {
        "P1": ["70.5%"], "P2": ["2.5 standard errors", "70.5%"], "P3": ["0.002", "70.5%"],
        "T1": ["<= 0.06", "0.06 is [E]"], "T2": ["0.85", "0.75"], "T3": ["0.85 is [E]"], "T4": ["0.95 is [E]"],
        "T5": ["45.5%", "3 steps", "35.5%", "0.4%"], "T10": ["20.5%", "4 cases", "30.5%"],
        "T13": ["0.04%", "0.5%"],
    }.items():  # fmt: skip
        assert all(figure in printed[name] for figure in figures), printed[name]


def test_preconditions_hold_in_as_many_cases_as_asked():
    flat = GroundingCase("flat", torch.zeros(1, 1, SIZE, SIZE))
    status = {
        met: judge(cases=[*CASES, flat], settings=replace(SETTINGS, met=met)).test("P1").status
        for met in (0.5, 1.0)
    }
    assert status == {0.5: "PASS", 1.0: "FAIL"}


def test_random_weights_must_move_the_score_as_far_as_asked():
    status = {
        moves: judge(settings=replace(SETTINGS, moves=moves)).test("P3").status for moves in (1e-5, 1e5)
    }
    assert status == {1e-5: "PASS", 1e5: "FAIL"}


@pytest.mark.parametrize(("few", "status"), [(5, "FAIL"), (7, "INCONCLUSIVE")])
def test_evidence_outside_of_the_body_fails_from_as_many_cases_on_as_asked(few, status):
    cases, settings = CASES[:6], replace(SETTINGS, outside_cases=few)
    within = {case.id: BODY for case in cases}
    found = judge(USES_TAG, cases=cases, regions=None, within=within, settings=settings)
    assert found.test("T10").status == status


def test_the_order_to_beat_takes_as_many_steps_as_asked(monkeypatch):
    taken = []

    def spy(**options):
        taken.append(options["n_steps"])
        return IntegratedGradients(**options)

    monkeypatch.setattr("monai_xai.grounding.of_deletion.IntegratedGradients", spy)
    deletion(USES_LESION, gain_steps=3)
    assert set(taken) == {3}


def test_the_highest_voxels_that_are_held_against_a_confounder_are_as_many_as_asked():
    """Beside a bright spot a map has a fainter one: few voxels leave it out, more have it as well."""
    spot, beside = disk(11.5, 7, 3.0), disk(11.5, 16, 1.5)
    values = (2.0 * spot + beside + 0.01 * torch.rand(SIZE, SIZE))[None, None]
    case = SimpleNamespace(id="one", located=lambda: values, body=BODY[None, None])
    few, more = (
        _on_confounders(Cohort([case], replace(SETTINGS, top=top)), {"scar": {"one": beside}})["scar"]
        for top in (0.05, 0.11)
    )
    assert few > 0.5 > 0.05 > more


def test_without_gradients_a_share_of_the_change_of_the_score_stands_for_what_is_attainable():
    networks = WithoutGradients(BODY), WithoutGradients(BODY, seed=1)
    few, many = (
        deletion(networks, attributor=Occlusion((1, 1, 1), baseline=0.0), gain_alone=alone)
        for alone in (1.0, 0.1)
    )
    assert few.value < many.value


@pytest.mark.parametrize("name", ["met", "gain", "gain_alone", "top", "outside", "residual", "collapse"])
@pytest.mark.parametrize("wrong", [-0.1, 1.5])
def test_a_threshold_that_is_no_share_is_refused(name, wrong):
    with pytest.raises(InputError, match=rf"\({name}={wrong}\) is a share of .*, from 0 to 1"):
        GroundingSettings(**{name: wrong})


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"unchanged": math.nan}, "unchanged=nan.* finite"),
        ({"gap": math.inf}, "gap=inf.* finite"),
        ({"alpha": 1.0}, "between 0 and 1"),
        ({"gain_steps": 2.5}, "gain_steps=2.5.* whole number"),
        ({"n_random": 0}, "n_random=0.* 1 or more"),
        ({"top": 0.0}, "leaves no voxels"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_before_any_work(wrong, why):
    with pytest.raises(InputError, match=why):
        GroundingSettings(**wrong)


@pytest.mark.parametrize(("radius", "verdict"), [(2.2, "GROUNDED"), (6.0, "INCONCLUSIVE")])
def test_a_finding_that_fills_a_third_of_the_body_is_no_artifact(radius, verdict):
    cases, regions = make_cases(radius=radius)
    found = judge(**{**COMPLETE, "settings": SETTINGS}, cases=cases, regions=regions)
    assert found.test("T5").status == "PASS"
    assert found.test("T5").value == pytest.approx(1.0, abs=0.1)
    assert found.verdict == verdict


@pytest.mark.parametrize(("little", "status"), [(1.0, "PROVISIONAL"), (-1.0, "FAIL")])
def test_another_training_with_another_map_is_no_failure_where_weights_matter(little, status):
    settings = replace(SETTINGS, little=little)
    found = judge(**{**COMPLETE, "settings": settings}, second_network=USES_TAG[0])
    assert found.test("T2").value < SETTINGS.unchanged
    assert found.test("T2").p > SETTINGS.alpha
    assert found.test("T2").status == status
    assert found.verdict == {"PROVISIONAL": "INCONCLUSIVE", "FAIL": "ARTIFACT"}[status]


def test_copies_of_a_map_are_rolled_on_every_grid_and_in_vectors():
    fine, coarse, record = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 8, 8), torch.randn(1, 3)
    maps = {"image": fine, "pet": coarse, "record": record}
    found = _rolled(fine, (0.25, 0.5)), _rolled(coarse, (0.25, 0.5)), _rolled(record, (0.25, 0.5))
    assert torch.equal(found[0], fine.roll((4, 8), (2, 3)))
    assert torch.equal(found[1], coarse.roll((2, 4), (2, 3)))
    assert torch.equal(found[2], record.roll(2, 1))
    assert torch.equal(_rolled(record, (0.0, 0.01)), record.roll(1, 1)), "an entry at least"
    assert torch.equal(_rolled(coarse, (0.5, 0.98, 0.1)), coarse.roll((4, 4), (2, 3))), (
        "farthest, not largest"
    )
    assert torch.equal(_rolled(coarse[..., :2, :2], (0.25, 0.1)), coarse[..., :2, :2].roll((1, 0), (2, 3)))
    assert not any(torch.equal(a, b) for a, b in zip(found, maps.values(), strict=True))


def test_further_places_are_named_down_to_a_twentieth_of_the_evidence():
    shares = {FINDING: 0.34, "the cap": 0.22, BODY_REST: 0.40, OUTSIDE: 0.04}
    assert name_places([], shares) == (
        " Of it, most is in the body elsewhere: 40% of all, then the cap: 22%."
    )
    assert name_places([], {FINDING: 1.0}) == ""


def test_shares_of_places_are_the_masses_of_their_voxels():
    e = evidence_of(
        Explainer(ClassScore(1), GRADIENTS, progress=False), USES_LESION[0], CASES[0], REGIONS["case0"], BODY
    )
    atlas = torch.zeros(SIZE, SIZE, dtype=torch.long)
    atlas[:12], atlas[REGIONS["case0"]] = 2, 2  # the finding comes first
    shares = shares_of_places([e], {"case0": atlas}, {2: "upper half"})
    positive = e.located()[0, 0].clamp(min=0)
    places = {
        "upper half": (atlas == 2) & ~REGIONS["case0"],
        FINDING: REGIONS["case0"],
        BODY_REST: BODY & (atlas == 0),
        OUTSIDE: ~BODY & (atlas == 0),
    }
    expected = {name: float(positive[mask].sum() / positive.sum()) for name, mask in places.items()}
    assert shares == pytest.approx({name: share for name, share in expected.items() if share > 0})


@pytest.mark.parametrize(
    "atlas", [torch.zeros(3, 3), torch.full((SIZE, SIZE), -1)], ids=["shape", "negative"]
)
def test_a_label_map_that_does_not_fit_is_named(atlas):
    with pytest.raises(InputError, match=r"Case case0: structures need a label map of integers"):
        judge(structures={"case0": atlas})


@dataclass(frozen=True)
class FaintEdges(Attributor):
    """The true map over edges that are a millionth as strong: noise alters their order, another patient hardly does."""

    def attribute(self, scoring):
        found = GRADIENTS.attribute(scoring)
        image = scoring.inputs["image"]
        return replace(
            found,
            maps={"image": found.maps["image"] + 1e-6 * (image - image.roll(1, -1)).abs().round(decimals=1)},
        )


def test_what_noise_does_to_voxels_without_evidence_does_not_count():
    test = judge(attributor=FaintEdges()).test("T6")
    assert test.status == "PASS", test.message
    kept, others = (
        float(re.search(rf"{words} (-?[0-9.]+)", test.message)[1]) for words in ("alike by", "patients by")
    )
    assert kept > 0.95 > 0.5 > others


def test_edges_are_an_artifact_and_nothing_more_is_run():
    found = judge(attributor=Edges())
    assert found.verdict == "ARTIFACT"
    assert "destroying the weights" in found.sentence
    assert found.test("T2").value == pytest.approx(1.0)
    assert {test.status for test in found.tests if test.id in ("T5", "T7", "T9")} == {"NA"}
    assert judge(attributor=Edges(), cases=CASES[:1], regions=None, within=None).verdict != "GROUNDED"


def test_a_map_that_leaves_the_finding_out_is_misleading():
    cases, regions = make_cases(partner=True)
    networks = Reader(BODY), Reader(BODY, 1)
    for network in networks:
        nn.init.constant_(network.conv.bias, -0.3)
    found = judge(networks, NotTheFinding(), cases=cases, regions=regions)
    assert found.verdict == "MODEL OK BUT MAP MISLEADING", found.sentence
    assert found.test("T9").status == "PASS"
    assert found.test("T7").status == "FAIL"


def test_without_a_second_network_it_is_not_grounded_and_says_what_to_supply():
    found = judge(second_network=None)
    assert found.verdict == "INCONCLUSIVE"
    assert found.test("T2").status == "PROVISIONAL"
    assert any("second_network" in item for item in found.missing)


def test_one_case_is_inconclusive():
    found = judge(cases=CASES[:1], regions={"case0": REGIONS["case0"]}, within={"case0": BODY})
    assert found.verdict == "INCONCLUSIVE"
    assert any("at least 8 cases" in item for item in found.missing)
    assert {found.test(name).status for name in ("T2", "T5", "T6", "T8", "T9", "T12")} == {"INCONCLUSIVE"}


EMPTY = torch.zeros(SIZE, SIZE, dtype=torch.bool)


@pytest.mark.parametrize(
    "regions",
    [
        None,
        {name: EMPTY if i % 2 else ~EMPTY for i, name in enumerate(REGIONS)},
        dict.fromkeys(REGIONS, TAG),
    ],
    ids=["none", "empty or everything", "outside the body"],
)
def test_masks_that_say_nothing_are_inconclusive(regions):
    found = judge(regions=regions)
    assert found.verdict == "INCONCLUSIVE"
    for name in ("T7", "T8", "T9"):
        assert found.test(name).status == "INCONCLUSIVE", found.test(name).message
        assert found.test(name).message
        assert math.isnan(found.test(name).p)
    assert any("mask" in item for item in found.missing)


def test_cases_whose_finding_fills_the_body_are_counted_with_the_reason():
    found = judge(regions={**REGIONS, "case0": disk(11.5, 11.5, 9.5)}).test("T9")
    assert math.isnan(found.per_case["case0"]) and found.n == N - 1
    assert "Not decided in 1 of 8 cases (no shifted copy of the region fits" in found.message
    assert "Not decided" not in judge().test("T9").message


def test_a_prediction_that_does_not_move_is_nothing_to_explain():
    cases = [GroundingCase(f"case{i}", torch.zeros(1, 1, SIZE, SIZE)) for i in range(N)]
    found = judge(cases=cases)
    assert found.verdict == "INCONCLUSIVE"
    assert found.test("P1").status == "FAIL"
    assert found.configuration["left_out"]["case0"]
    assert {test.status for test in found.tests if test.gate != "P"} == {"NA"}


def test_cases_of_mixed_shapes_leave_open_what_needs_one_grid():
    sizes = [SIZE + 2 * i for i in range(N)]
    pad = {f"case{i}": (0, size - SIZE, 0, size - SIZE) for i, size in enumerate(sizes)}
    grown = [replace(c, inputs=nn.functional.pad(c.inputs * BODY, pad[c.id])) for c in CASES]
    masks = {name: nn.functional.pad(m, pad[name]) for name, m in REGIONS.items()}
    bodies = {name: nn.functional.pad(BODY, pad[name]) for name in REGIONS}

    class Anywhere(Reader):
        def forward(self, x):
            score = torch.relu(self.conv(x)).flatten(1).sum(1, keepdim=True) * self.places.mean()
            return torch.cat([torch.zeros_like(score), score], 1)

    found = judge((Anywhere(BODY), Anywhere(BODY, 1)), cases=grown, regions=masks, within=bodies)
    assert found.test("T7").status == "PASS"
    assert found.test("T8").status == "INCONCLUSIVE"
    assert found.verdict == "INCONCLUSIVE"


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"case0.*more than once"):
        judge(cases=[CASES[0], CASES[0]])
    with pytest.raises(InputError, match="regions has masks for"):
        judge(cases=CASES[:2])
    with pytest.raises(InputError, match=r"Case case0.*must have the shape"):
        judge(cases=CASES[:1], regions={"case0": EMPTY[1:]}, within=None)
    with pytest.raises(InputError, match=r"Case two.*batch of one"):
        judge(cases=[GroundingCase("two", torch.zeros(2, 1, SIZE, SIZE))], regions=None, within=None)
    with pytest.raises(InputError, match="judges maps of images"):
        judge(cases=[GroundingCase("vector", torch.zeros(1, 4))], regions=None, within=None)
    with pytest.raises(InputError, match="two or more"):
        GroundingSettings(imputers={"mean": "mean"})


def test_modalities_that_the_network_does_not_use_are_named():
    cases, regions = make_cases(channels=2)

    class First(Reader):
        def forward(self, x):
            return super().forward(x[:, :1])

    networks = First(BODY), First(BODY, 1)
    found = judge(networks, cases=cases, regions=regions).test("T13")
    assert found.status == "FAIL"
    assert "image 1 contribute" in found.message
    none = replace(SETTINGS, collapse=0.0)
    found = judge(networks, cases=cases, regions=regions, settings=none).test("T13")
    assert "contribute" not in found.message
    assert found.threshold.endswith("no modality below 0%")


class AlikeForAll(Reader):
    """Has the same picture for each of three classes."""

    def forward(self, x):
        two = super().forward(x)
        return torch.cat([2 * two[:, 1:], two[:, 1:], 3 * two[:, 1:]], 1)


class LevelAndTexture(nn.Module):
    """Uses how bright the first channel is as a whole, which a blur keeps, and the texture of the second."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([4.0, 1.0]) + 0.01 * seed)

    def forward(self, x):
        level, texture = x[:, 0].mean((1, 2)), x[:, 1].square().mean((1, 2))
        score = (self.weights[0] * level + self.weights[1] * texture)[:, None]
        return torch.cat([torch.zeros_like(score), score], 1)


def test_modalities_are_weighed_against_the_baseline_that_the_map_has():
    cases, regions = make_cases(channels=2)
    networks = LevelAndTexture(), LevelAndTexture(1)
    found = judge(**{**COMPLETE, "networks": networks, "cases": cases, "regions": regions}).test("T13")
    assert found.value == 1.0, "under a blur the level is worth nothing"
    assert found.status == "PASS", found.message


def test_wrong_predictions_permuted_labels_and_a_third_class_are_looked_at():
    cases = [replace(c, correct=i % 2 == 0) for i, c in enumerate(CASES)]
    networks = AlikeForAll(BODY), AlikeForAll(BODY, 1)
    found = judge(networks, cases=cases, permuted_network=AlikeForAll(TAG))
    assert found.test("T3").status == "PASS"
    assert found.test("T11").n == N
    assert found.test("T7").n == N // 2
    assert found.test("T4").value == pytest.approx(1.0)
    assert "Weak: T4 failed" in found.sentence
    same = judge(networks, cases=cases, permuted_network=networks[0]).test("T3")
    assert same.status == "FAIL"
    assert same.value == pytest.approx(1.0)


def test_a_regression_may_fall_where_the_finding_is():
    class Falls(Reader):
        def forward(self, x):
            return -super().forward(x)[:, 1:]

    network = Falls(BODY)
    found = judge((network, Falls(BODY, 1)), target=OutputScore())
    assert found.verdict == "GROUNDED", found.sentence
    assert found.test("T9").value > 0
    own = Explainer(OutputScore(), GRADIENTS, progress=False)(network, CASES[0].inputs).attributions["image"]
    assert float(own.sum()) < 0
    assert np.allclose(
        found.cases[0].attribution, own[0, 0].numpy()
    )  # the page has what lowers the score as such


# ----------------------------------------------------------------------------------------- rules of the verdict

PASSED = {**dict.fromkeys(ORDER, "PASS"), "T3": "NA", "T4": "NA", "T11": "NA", "T13": "NA"}


def verdict_of(n=N, **changed):
    tests = [
        GroundingTest(name, "", "P" if name[0] == "P" else "Q1" if int(name[1:]) < 7 else "Q2", status=status)
        for name, status in {**PASSED, **changed}.items()
    ]
    return decide(tests, n, SETTINGS)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "GROUNDED"),
        ({"T10": "NA"}, "GROUNDED"),
        ({"T6": "FAIL"}, "GROUNDED"),
        ({"n": N - 1}, "INCONCLUSIVE"),
        ({"T2": "PROVISIONAL"}, "INCONCLUSIVE"),
        ({"T2": "FAIL"}, "ARTIFACT"),
        ({"T5": "FAIL"}, "ARTIFACT"),
        ({"T5": "FAIL", "T9": "FAIL"}, "ARTIFACT"),
        ({"T5": "INCONCLUSIVE", "T9": "FAIL"}, "INCONCLUSIVE"),
        ({"T9": "FAIL"}, "FAITHFUL BUT OFF TARGET"),
        ({"T10": "FAIL"}, "FAITHFUL BUT OFF TARGET"),
        ({"T2": "PROVISIONAL", "T10": "FAIL", "T7": "FAIL"}, "FAITHFUL BUT OFF TARGET"),
        ({"T7": "FAIL"}, "MODEL OK BUT MAP MISLEADING"),
        ({"T8": "FAIL"}, "MODEL OK BUT MAP MISLEADING"),
        ({"T8": "FAIL", "T9": "INCONCLUSIVE"}, "INCONCLUSIVE"),
        ({"T10": "INCONCLUSIVE"}, "INCONCLUSIVE"),
        ({"P2": "FAIL", "T2": "FAIL"}, "INCONCLUSIVE"),
    ],
    ids=str,
)
def test_the_verdict_follows_the_rules(changed, verdict):
    found, sentence, _ = verdict_of(**changed)
    assert found == verdict
    assert sentence


def test_a_weak_explanation_keeps_its_verdict_with_a_warning():
    assert "Weak: T1, T6 failed" in verdict_of(T1="FAIL", T6="FAIL")[1]


def test_a_test_that_finds_nothing_fails_with_enough_cases_only():
    def status(p, n, **kinds):
        draft = Draft(GroundingTest("T5", "", "Q1", p=p, n=n), "found", "missed", **kinds)
        tests, missing = settle([draft], SETTINGS)
        return tests[0].status, tests[0].message, missing

    assert status(0.01, 5)[:2] == ("PASS", "found")
    assert status(0.2, N)[:2] == ("FAIL", "missed")
    assert status(0.2, 5)[0] == "INCONCLUSIVE"
    assert status(0.2, 5)[2] == ["at least 8 cases (T5 has 5)"]
    assert status(math.nan, N)[0] == "INCONCLUSIVE"
    assert status(0.2, 1)[1].startswith("Not decided by 1 case (p = 0.2).")


def test_what_is_asked_for_is_said_once():
    drafts = [
        Draft(GroundingTest(name, "", "Q1", p=0.5, n=n)) for name, n in (("T5", 2), ("T6", 2), ("T9", 1))
    ]
    assert settle(drafts, SETTINGS)[1] == ["at least 8 cases (T5, T6 have 2; T9 has 1)"]


def test_holm_may_turn_a_pass_over():
    drafts = [Draft(GroundingTest(f"T{i}", "", "Q1", p=0.03, n=N)) for i in (2, 5)]
    assert [test.status for test in settle(drafts, SETTINGS)[0]] == ["FAIL", "FAIL"]
    apart = [drafts[0], Draft(GroundingTest("T7", "", "Q2", p=0.03, n=N))]
    assert [test.status for test in settle(apart, SETTINGS)[0]] == ["PASS", "PASS"]


def test_a_segmentation_over_sliding_windows_with_two_channels_is_judged():
    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    torch.manual_seed(0)
    networks = [Segments().eval() for _ in range(2)]
    inferer = SlidingWindowInferer(roi_size=(8, 8, 8), overlap=0.25)
    explainer = Explainer(RegionScore(1), GRADIENTS, inferer, progress=False)
    generator = torch.Generator().manual_seed(1)
    cases = [GroundingCase(f"scan{i}", torch.randn(1, 2, 12, 12, 12, generator=generator)) for i in range(2)]
    region = torch.zeros(12, 12, 12, dtype=torch.bool)
    region[3:6, 3:6, 3:6] = True
    regions = {"scan0": region, "scan1": region.roll(3, 0)}
    found = ground(
        explainer, networks[0], cases, regions=regions, second_network=networks[1], settings=SETTINGS
    )
    assert found.verdict == "INCONCLUSIVE"
    assert found.cases[0].prediction.shape == (12, 12, 12)
    assert 0 < found.cases[0].prediction.mean() < 1
    with torch.no_grad():
        output = inferer(cases[0].inputs, networks[0])
    mask = output.argmax(1, keepdim=True) == 1
    assert found.cases[0].score == pytest.approx(float(output[:, 1:][mask].mean()), rel=1e-5)
    for name in ("T5", "T6", "T7", "T9", "T12"):
        assert not math.isnan(found.test(name).value), found.test(name).message


def test_a_painted_map_is_no_finer_than_its_windows_or_features():
    masked = [replace(case, inputs=case.inputs * BODY) for case in CASES[:1]]
    inside = {"case0": REGIONS["case0"]}

    def body_of(attributor, case=masked[0]):
        explainer = Explainer(ClassScore(1), attributor, progress=False)
        found = evidence_of(explainer, USES_LESION[0], case, inside["case0"], BODY)
        return reached(found)[0, 0]

    assert torch.equal(body_of(GRADIENTS), BODY)
    windows = body_of(Occlusion((1, 3, 2), (1, 3, 2), Constant(0.0)))
    expected = ndimage.binary_dilation(BODY.numpy(), np.ones((5, 3)))
    assert np.array_equal(windows.numpy(), expected)
    blocks = body_of(FeatureAblation(Blocks(6), Constant(0.0)))
    count = BODY.reshape(4, 6, 4, 6).any(3).any(1)
    assert torch.equal(blocks, count.repeat_interleave(6, 0).repeat_interleave(6, 1))
    supervoxels = body_of(FeatureAblation(Supervoxels(20), Constant(0.0)), CASES[0])
    assert (supervoxels | ~BODY).all()
    assert BODY.sum() < supervoxels.sum() < BODY.numel()
