"""Explanations that end when their time is over, with the best there is by then."""

from __future__ import annotations

import time

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from networks import Rows, random_image, small_unet

from monai_xai import (
    Blocks,
    BlurIntegratedGradients,
    Box,
    CompletenessWarning,
    Explainer,
    GradientShap,
    GuidedIntegratedGradients,
    InputError,
    IntegratedGradients,
    KernelShap,
    Lime,
    Noise,
    NoiseTunnel,
    RegionScore,
    Rise,
    Saliency,
    Samples,
    ShapleyValueSampling,
)
from monai_xai.clock import Clock

TARGET = RegionScore(1, Box((0, 0), (30, 30)))
INFERER = SlidingWindowInferer((16, 16), overlap=0.5)
MANY = {
    "adaptive": IntegratedGradients(baseline=Noise(), tolerance=1e-9, max_steps=255),
    "baselines": IntegratedGradients(baseline=Samples(random_image(3, 2, 32, 32)), tolerance=1e-9),
    "blurred": BlurIntegratedGradients(tolerance=1e-9, max_steps=10**4 - 1),
    "guided": GuidedIntegratedGradients(1000, tolerance=1e-9, max_steps=10**4),
    "GradientShap": GradientShap(4000),
    "NoiseTunnel": NoiseTunnel(Saliency(), n_samples=4000),
    "VarGrad": NoiseTunnel(Saliency(), kind="vargrad", n_samples=4000),
    "Shapley": ShapleyValueSampling(Blocks(2), n_samples=40000),
    "KernelShap": KernelShap(Blocks(4), n_samples=4000),
    "Lime": Lime(Blocks(4), n_samples=4000),
    "RISE": Rise(n_samples=40000),
}


def explain(method, seconds, network=None, **options):
    explainer = Explainer(TARGET, method, INFERER, progress=False, max_seconds=seconds, **options)
    return explainer(network or small_unet(), random_image(1, 2, 32, 32))


@pytest.mark.parametrize("method", MANY)
@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
def test_a_method_ends_with_finite_maps_and_says_so(method):
    rows: list[int] = []
    found = explain(MANY[method], 0.3, Rows(small_unet(), rows))
    assert found.facts["ended_after"] == 0.3
    assert torch.isfinite(found.attributions["image"]).all()
    assert found.attributions["image"].abs().sum() > 0
    assert sum(rows) < 20000


@pytest.mark.parametrize(
    "method", [MANY["adaptive"], GradientShap(3), ShapleyValueSampling(Blocks(8), n_samples=6)]
)
@pytest.mark.filterwarnings("ignore::monai_xai.CompletenessWarning")
def test_time_enough_changes_nothing(method):
    with_limit, without = explain(method, 1e6), explain(method, None)
    assert torch.equal(with_limit.attributions["image"], without.attributions["image"])
    assert "ended_after" not in with_limit.facts


def test_what_ended_early_still_converges():
    """The mean of fewer samples, not a sum that some are missing from."""
    few, many = (explain(KernelShap(Blocks(16), n_samples=n), s) for n, s in ((40000, 0.1), (400, None)))
    assert few.facts["samples"] < 40000
    torch.testing.assert_close(few.attributions["image"], many.attributions["image"], rtol=0.05, atol=0)
    few, many = (
        explain(GradientShap(n, stdev_spread=0.0), s, tolerated_gap=9.0) for n, s in ((4000, 0.5), (64, None))
    )
    assert few.facts["passes"] < 4000
    difference = (few.attributions["image"] - many.attributions["image"]).norm()
    assert difference < 0.5 * many.attributions["image"].norm()


def test_every_window_is_refined_at_least_once_and_the_gap_is_reported():
    with pytest.warns(CompletenessWarning, match=r"allow more than max_seconds=1e-06") as warned:
        found = explain(MANY["adaptive"], 1e-6, tolerated_gap=1e-9)
    assert "Measured" not in str(warned[0].message)
    assert found.facts["passes"] == 3
    change = found.score - found.baseline_score
    torch.testing.assert_close(
        found.delta, found.attributions["image"].sum().reshape(1) - change, rtol=0, atol=1e-12
    )


def test_what_cannot_end_early_is_refused():
    for method in (Saliency(), IntegratedGradients(8)):
        with pytest.raises(InputError, match="cannot end early"):
            Explainer(TARGET, method, max_seconds=5)
    with pytest.raises(InputError, match="must be positive"):
        Explainer(TARGET, IntegratedGradients(), max_seconds=0)


def test_parts_of_a_clock_follow_each_other_from_when_it_is_split(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 10.0)  # half of the time from 0 to 20 is over
    clock = Clock(20.0)
    assert [part.ends for part in clock.split(4)] == [12.5, 15.0, 17.5, 20.0]
    assert [part.ends for part in clock.split(4)[-1].split(2)] == [15.0, 20.0]
    assert [part.ends for part in Clock().split(3)] == [float("inf")] * 3
    assert clock.split(0) == []


def test_a_clock_that_is_over_leaves_the_least():
    clock = Clock.of(0.0)
    assert list(clock.limit(range(9), 3)) == [0, 1, 2]
    assert clock.is_cut
    clock = Clock.of(0.05)
    time.sleep(0.06)
    assert list(clock.split(2)[0].limit(range(9), 0)) == []
    assert clock.is_cut and not clock.anew().is_cut
