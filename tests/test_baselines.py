"""Baselines as imputers: an organ's mean, another image, a region; what depends on what is taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from networks import LinearImage, random_image, small_unet

from monai_xai import (
    Atlas,
    Baseline,
    Blur,
    Box,
    Constant,
    EmptyRegionError,
    Explainer,
    FeatureAblation,
    GivenImage,
    InputError,
    IntegratedGradients,
    Labeled,
    Mask,
    Mean,
    ModalityShapley,
    Noise,
    NoiseTunnel,
    OutputScore,
    Predicted,
    RegionScore,
    Road,
    Samples,
    Within,
)
from monai_xai import metrics as m
from monai_xai.baselines import draw_baselines
from monai_xai.baselines.road import _impute

X = random_image(1, 2, 8, 10)
REMOVED = torch.zeros(1, 1, 8, 10, dtype=torch.bool)
REMOVED[..., 2:5, 3:8] = True


def explain(network, x, attributor, target=None, **options):
    return Explainer(target or OutputScore(), attributor, progress=False)(network, x, **options)


# ----------------------------------------------------------------------------------------------- the imputing part


@pytest.mark.parametrize(
    "baseline",
    [Blur(1.0), Constant(3.0), Noise(), Mean(), Samples(random_image(2, 2, 8, 10, seed=3))],
    ids=str,
)
def test_what_is_removed_becomes_the_baseline_and_all_else_stays(baseline):
    for draw in baseline.draws(X):
        assert torch.equal(baseline.impute(X, REMOVED, draw), torch.where(REMOVED, draw, X))
    assert torch.equal(baseline.impute(X, REMOVED), torch.where(REMOVED, baseline.draws(X)[0], X))


@dataclass(frozen=True)
class MeanOfTheRest(Baseline):
    """A user's own imputer that depends on what is removed."""

    conditional: ClassVar[bool] = True

    def draws(self, x):
        return (torch.zeros_like(x),)

    def impute(self, x, removed, draw=None):
        rest = torch.where(removed, 0, x).sum() / (~removed).expand_as(x).sum()
        return torch.where(removed, rest, x)


def test_curves_ask_an_imputer_of_ones_own_for_every_removed_part():
    network, x = LinearImage((1, 6, 6)), random_image(1, 1, 6, 6)
    maps = torch.arange(36.0, 0.0, -1).reshape(1, 1, 6, 6)
    pixels = torch.arange(36).reshape(6, 6)
    explainer = Explainer(OutputScore(), FeatureAblation(pixels), progress=False)
    curve = m.deletion_curve(
        explainer, network, x, explanation=maps, features=pixels, imputer=MeanOfTheRest(), steps=36, until=1.0
    )
    flat, weight = x.flatten(), network.weight.detach().flatten()
    expected = [
        float(weight[k:] @ flat[k:] + (weight[:k].sum() * flat[k:].mean() if 0 < k < 36 else 0.0))
        for k in range(36)
    ]
    torch.testing.assert_close(curve.raw[0, :36].double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    "baseline", [Road(), {"image": Road()}, Within(Road(), Mask(REMOVED))], ids=["road", "by name", "within"]
)
def test_methods_with_one_whole_baseline_refuse_one_that_depends_on_what_is_removed(baseline):
    with pytest.raises(InputError, match="depends on what is taken away, and IntegratedGradients"):
        explain(LinearImage((2, 8, 10)), X, IntegratedGradients(baseline=baseline))


# ------------------------------------------------------------------------------------------------------------ road


def test_road_is_a_baseline_among_others_and_still_one_of_the_metrics():
    assert m.Road is Road


@pytest.mark.parametrize("shape", [(9, 12), (8, 9, 10)], ids=["2D", "3D"])
def test_road_on_the_surroundings_alone_equals_road_on_the_whole_image(shape):
    x = random_image(1, 1, *shape)
    inner = (0, 0, *[slice(2, 6)] * len(shape))
    edge = (0, 0, *[slice(0, 3)] * len(shape))
    for places in ([inner], [edge], [inner, edge]):
        removed = torch.zeros_like(x, dtype=torch.bool)
        for place in places:
            removed[place] = True
        found = Road(noise=0.0).impute(x, removed)[0, 0]
        torch.testing.assert_close(found, _impute(x[0, 0], removed[0, 0], 1e-11), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ mean


def test_the_mean_of_an_organ_is_taken_over_its_mask():
    organ = torch.zeros(8, 10)
    organ[1:4, 2:9] = 4  # any number but 0
    expected = X[:, :, 1:4, 2:9].mean((2, 3), keepdim=True).expand_as(X)
    for region in (organ, organ.bool(), organ[None], organ[None, None], Box((1, 2), (4, 9)), Mask(organ)):
        torch.testing.assert_close(Mean(region).draws(X)[0], expected)


def test_the_mean_of_an_organ_may_come_from_the_prediction_or_the_label():
    network = small_unet(2, channels=2).eval()
    x = random_image(1, 2, 8, 12)
    target = RegionScore(1, Box((2, 2), (6, 6)))
    with torch.no_grad():
        predicted = network(x).argmax(1, keepdim=True) == 1
    label = torch.zeros(1, 1, 8, 12)
    label[..., 4:, 3:] = 1
    for region, mask in ((Predicted(), predicted), (Labeled(1), label == 1)):
        found = explain(network, x, FeatureAblation(baseline=Mean(region)), target, label=label)
        values = torch.stack([x[0, c][mask[0, 0]].mean() for c in range(2)]).reshape(1, 2, 1, 1)
        expected = explain(network, x, FeatureAblation(baseline=Constant(values)), target)
        torch.testing.assert_close(found.attributions["image"], expected.attributions["image"])
    with pytest.raises(InputError, match="known to an explainer only"):
        Mean(Predicted()).draws(x)


def test_an_empty_organ_is_an_error():
    with pytest.raises(EmptyRegionError, match="Mean: the region of shape"):
        Mean(torch.zeros(8, 10)).draws(X)
    with pytest.raises(InputError, match="not on the grid of the input"):
        Mean(torch.ones(8, 11)).draws(X)


# ---------------------------------------------------------------------------------------------------- another image


def save(tmp_path, name, values, affine):
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / name)
    return tmp_path / name


def ramp(points):
    """Return a value linear in the position in mm."""
    return 1.0 + 0.5 * points[0] - 0.25 * points[1] + 2.0 * points[2]


def points_of(affine, shape):
    grid = np.stack([*np.indices(shape), np.ones(shape)])
    return np.einsum("ij,jabc->iabc", affine, grid)[:3]


FINE = np.array([[0.0, 1.5, 0.0, -7.0], [-1.0, 0.0, 0.0, 6.0], [0.0, 0.0, 2.0, -5.0], [0.0, 0.0, 0.0, 1.0]])
COARSE = np.array(
    [[3.0, 0.0, 0.0, -15.0], [0.0, 3.0, 0.0, -15.0], [0.0, 0.0, 4.0, -16.0], [0.0, 0.0, 0.0, 1.0]]
)


def test_another_image_is_resampled_to_the_input_through_both_affines(tmp_path):
    file = save(tmp_path, "earlier.nii.gz", ramp(points_of(COARSE, (12, 12, 9))), COARSE)
    x = MetaTensor(random_image(1, 1, 9, 8, 6), affine=torch.from_numpy(FINE))
    found = GivenImage(file).draws(x)[0]
    torch.testing.assert_close(
        torch.as_tensor(found.as_tensor())[0, 0], torch.from_numpy(ramp(points_of(FINE, (9, 8, 6))))
    )


def test_another_image_has_a_file_for_each_channel(tmp_path):
    x = MetaTensor(random_image(1, 2, 9, 8, 6), affine=torch.from_numpy(FINE))
    ones, twos = (save(tmp_path, f"{v}.nii.gz", np.full((9, 8, 6), float(v)), FINE) for v in (1, 2))
    assert GivenImage([ones, twos]).draws(x)[0].mean((0, 2, 3, 4)).tolist() == [1, 2]
    with pytest.raises(InputError, match="has 3 channels, the input of shape"):
        GivenImage([ones, twos, ones]).draws(x)


@pytest.mark.parametrize("lead", [0, 1], ids=["channels first", "batch of one"])
def test_another_image_as_a_tensor_is_taken_as_it_is(lead):
    image = random_image(2, 8, 10, seed=5)
    assert torch.equal(GivenImage(image if lead == 0 else image[None]).draws(X)[0], image[None])


def test_an_explainer_places_another_image_and_gives_vectors_zeros(tmp_path):
    file = save(tmp_path, "sound.nii.gz", ramp(points_of(COARSE, (12, 12, 9))), COARSE)
    x = MetaTensor(random_image(1, 1, 9, 8, 6), affine=torch.from_numpy(FINE))
    network = LinearImage((1, 9, 8, 6))
    difference = x.as_tensor() - torch.from_numpy(ramp(points_of(FINE, (9, 8, 6))))
    expected = float((network.weight.detach() * difference).sum())
    alone = explain(network, x, IntegratedGradients(n_steps=2, baseline=GivenImage(file)))
    assert float(alone.attributions["image"].sum()) == pytest.approx(expected)
    wrapped = NoiseTunnel(
        IntegratedGradients(n_steps=2, baseline=GivenImage(file)), n_samples=2, stdev_spread=1e-9
    )
    assert float(explain(network, x, wrapped).attributions["image"].sum()) == pytest.approx(
        expected, rel=1e-4
    )
    inputs = {"image": x, "clinical": random_image(1, 3)}
    for baseline in (GivenImage(file), {"image": GivenImage(file), "clinical": Constant(0.0)}):
        both = Explainer(OutputScore(), IntegratedGradients(n_steps=2, baseline=baseline), progress=False)
        found = both(_Both(network), inputs).attributions
        assert float(found["image"].sum()) == pytest.approx(expected)
        torch.testing.assert_close(found["clinical"], inputs["clinical"])


class _Both(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image, clinical):
        return self.network(image) + clinical.sum(1, keepdim=True)


def test_another_image_that_lies_elsewhere_is_refused(tmp_path):
    far = COARSE.copy()
    far[0, 3] = 500.0
    file = save(tmp_path, "far.nii.gz", np.ones((12, 12, 9)), far)
    x = MetaTensor(random_image(1, 1, 9, 8, 6), affine=torch.from_numpy(FINE))
    with pytest.raises(InputError, match=r"does not overlap the input in space\. It lies in \[500, 533\]"):
        GivenImage(file).draws(x)
    with pytest.raises(InputError, match="place of the input in space is not known"):
        GivenImage(file).draws(x.as_tensor())
    with pytest.raises(InputError, match="NaN or infinite"):
        GivenImage(torch.full((2, 8, 10), float("inf"))).draws(X)


# ----------------------------------------------------------------------------------------------------------- within


def test_outside_of_its_region_a_baseline_is_the_input():
    within = Within(Blur(1.0), Mask(REMOVED))
    assert torch.equal(within.draws(X)[0], torch.where(REMOVED, Blur(1.0).draws(X)[0], X))
    more = REMOVED.roll(2, 3)
    both = torch.where(REMOVED & more, Blur(1.0).draws(X)[0], X)
    assert torch.equal(within.impute(X, more), both)
    assert within.draws(torch.ones(1, 3))[0].tolist() == [[0, 0, 0]]
    road = Within(Road(noise=0.0), Mask(REMOVED))
    assert road.conditional
    assert torch.equal(road.impute(X, more), Road(noise=0.0).impute(X, REMOVED & more))


def test_within_a_region_of_the_prediction_only_that_is_attributed():
    network, x = small_unet(2, channels=2), random_image(1, 2, 8, 12)
    with torch.no_grad():
        predicted = (network(x).argmax(1, keepdim=True) == 1).expand(1, 2, 8, 12)
    attributor = IntegratedGradients(n_steps=64, baseline=Within(Blur(1.0), Predicted()))
    found = explain(network, x, attributor, RegionScore(1, Box((2, 2), (6, 6)))).attributions["image"]
    assert (found[~predicted] == 0).all()
    assert (found[predicted] != 0).any()


def test_each_input_has_noise_of_its_own_also_within_a_region():
    inputs = {"ct": X, "pet": X}
    ct, pet = draw_baselines(Within(Noise(), Box((0, 0), (8, 10))), inputs)[0]
    assert not torch.equal(ct, pet)
    assert torch.equal(pet, Noise(seed=1).draws(X)[0])


# -------------------------------------------------------------------------------------- beyond the explainer itself


def test_metrics_and_modalities_place_features_and_imputers_too(tmp_path):
    file = save(tmp_path, "sound.nii.gz", ramp(points_of(COARSE, (12, 12, 9))), COARSE)
    image = torch.from_numpy(ramp(points_of(FINE, (9, 8, 6))))[None, None]
    labels = save(
        tmp_path, "atlas.nii.gz", np.arange(54, dtype=np.int16).reshape(3, 3, 6), COARSE * [4, 4, 1, 1]
    )
    x = MetaTensor(random_image(1, 1, 9, 8, 6), affine=torch.from_numpy(FINE))
    network = LinearImage((1, 9, 8, 6))
    explainer = Explainer(OutputScore(), IntegratedGradients(n_steps=2, baseline=0.0), progress=False)
    mask = Atlas(labels).mask(x, "image")
    assert len(mask.unique()) > 4

    def both(measure):
        return measure(Atlas(labels), GivenImage(file)), measure(mask, Constant(image))

    found, expected = both(
        lambda f, b: m.deletion_curve(explainer, network, x, features=f, imputer=b, steps=4, until=1.0).raw
    )
    torch.testing.assert_close(found, expected)
    found, expected = both(
        lambda f, b: (
            m.fidelity(
                explainer, network, x, perturbation=m.RandomRemoval(f, b, share=0.3), n_draws=3
            ).infidelity.values
        )
    )
    torch.testing.assert_close(found, expected)
    found, expected = both(
        lambda f, b: ModalityShapley(
            OutputScore(), {"one": b, "two": Constant(1.0)}, parts=f, progress=False
        )(network, x).maps["one"]["image"]
    )
    torch.testing.assert_close(found, expected)
