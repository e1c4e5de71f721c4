"""Features for medicine: supervoxels, atlases and lesions on their grids, and the table of what each is worth."""

from __future__ import annotations

import csv
from io import StringIO

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import LoadImage
from networks import LinearImage, random_image, small_unet
from scipy.ndimage import gaussian_filter, label
from torch import nn

from monai_xai import (
    Atlas,
    Blocks,
    Blur,
    Box,
    Components,
    Constant,
    EmptyRegionError,
    Explainer,
    FeatureAblation,
    FeatureMask,
    InputError,
    InputXGradient,
    Labeled,
    Mask,
    OutputScore,
    Predicted,
    RegionScore,
    ShapleyValues,
    Supervoxels,
    feature_table,
    read_names,
)
from monai_xai.features import feature_masks
from monai_xai.files import as_csv


def with_place(values, *spacing, origin=None):
    """Return an image with an affine of the spacing, away from the identity."""
    dims = len(spacing)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:dims, :dims] = torch.diag(torch.tensor(spacing, dtype=torch.float64))
    affine[:dims, 3] = torch.tensor(origin or (10.0, -20.0, 30.0)[:dims], dtype=torch.float64)
    return MetaTensor(values, affine=affine)


def textured(shape, spacing, seed=0):
    """Return an image whose texture has the same size in mm along every axis."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(gaussian_filter(noise, [6 / size for size in spacing]))[None, None].float()


def explain(network, x, attributor, target=None, **options):
    explainer = Explainer(target or OutputScore(), attributor, progress=False)
    return explainer(network, x, **options)


# ----------------------------------------------------------------------------------------------------- supervoxels


def elongation(mask, spacing):
    """Return, for each supervoxel, its extent in mm along the last axis over that along the others."""
    numbers = mask[0, 0].numpy()
    ratios = []
    for number in np.unique(numbers[numbers > 0]):
        extent = (np.argwhere(numbers == number) * spacing).std(0)
        extent = np.maximum(extent, np.array(spacing) / np.sqrt(12))
        ratios.append(extent[-1] / np.sqrt(np.prod(extent[:-1]) ** (2 / (len(extent) - 1))))
    return np.median(ratios), len(ratios)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((48, 48, 12), (1.0, 1.0, 4.0)), ((64, 16), (1.0, 4.0))], ids=["3D", "2D"]
)
def test_supervoxels_are_round_in_millimeters(shape, spacing):
    x = with_place(textured(shape, spacing), *spacing)
    in_mm, count = elongation(Supervoxels(40, within=None).mask(x, "image"), spacing)
    in_voxels, _ = elongation(
        Supervoxels(40, within=None, spacing=[1.0] * len(spacing)).mask(x, "image"), spacing
    )
    assert 0.75 < in_mm < 1.33
    assert in_voxels > 2
    assert 25 <= count <= 60


def test_supervoxels_take_the_spacing_from_the_affine():
    x = textured((24, 24, 8), (1, 1, 3))
    supervoxels = Supervoxels(20, within=None)
    from_affine = supervoxels.mask(with_place(x, 1, 1, 3), "image")
    assert torch.equal(from_affine, Supervoxels(20, within=None, spacing=(1, 1, 3)).mask(x, "image"))
    assert not torch.equal(from_affine, supervoxels.mask(x, "image"))
    assert torch.equal(
        from_affine, supervoxels.mask(with_place(x, 1, 1, 3), "image")
    )  # and the same each time


def test_supervoxels_follow_the_edges_of_all_channels_together():
    x = torch.zeros(1, 2, 32, 32)
    x[0, 0, :, 13:] = 1000.0  # an edge in each sequence, of very different units
    x[0, 1, 18:] = 0.001
    numbers = Supervoxels(16, within=None, compactness=0.01).mask(x, "image")[0, 0]
    quadrants = (x[0, 0] > 0).long() * 2 + (x[0, 1] > 0).long()
    for number in numbers.unique():
        assert len(quadrants[numbers == number].unique()) == 1


def test_supervoxels_do_not_depend_on_the_unit_of_a_channel():
    x = textured((24, 24, 8), (1, 1, 1))
    both = torch.cat([x, textured((24, 24, 8), (1, 1, 1), seed=1)], 1)
    scaled = both * torch.tensor([8.0, 0.25]).reshape(1, 2, 1, 1, 1)
    supervoxels = Supervoxels(20, within=None)
    assert torch.equal(supervoxels.mask(both, "image"), supervoxels.mask(scaled, "image"))


def test_supervoxels_leave_out_the_background():
    x = torch.full((1, 1, 32, 32), -1.0)
    x[..., 8:24, 6:26] = textured((16, 20), (1, 1))
    numbers = Supervoxels(20).mask(x, "image")
    assert torch.equal(numbers == 0, x == -1)
    assert 8 < len(numbers.unique()) <= 30
    inside = torch.zeros(32, 32)
    inside[10:20, 10:20] = 1
    masked = Supervoxels(6, within=inside).mask(x, "image")
    assert torch.equal(masked[0, 0] > 0, inside > 0)
    assert torch.equal(masked, Supervoxels(6, within=Box((10, 10), (20, 20))).mask(x, "image"))
    assert (Supervoxels(20).mask(textured((32, 32), (1, 1)), "image") > 0).all()  # one voxel is no background


def test_each_input_has_supervoxels_of_its_own_and_a_vector_one_feature_per_entry():
    inputs = {
        "ct": textured((24, 24), (1, 1)),
        "pet": textured((12, 10), (2, 2)),
        "clinical": torch.rand(1, 3),
    }
    masks, count = feature_masks(Supervoxels(9, within=None), inputs)
    assert [m.shape[2:] for m in masks[:2]] == [(24, 24), (12, 10)]
    assert masks[2].tolist() == [[count - 3, count - 2, count - 1]]
    assert len(torch.cat([m.flatten() for m in masks]).unique()) == count


BAD_SUPERVOXELS = {
    "more than voxels": (Supervoxels(300), torch.rand(1, 1, 16, 16), "more than the 256 voxels"),
    "nan": (Supervoxels(4), torch.full((1, 1, 8, 8), float("nan")), "finite image"),
    "batch": (Supervoxels(4), torch.rand(2, 1, 8, 8), "one sample at a time"),
    "1D": (Supervoxels(4), torch.rand(1, 1, 8), "2 or 3 spatial axes"),
    "spacing": (Supervoxels(4, spacing=(1.0, 0.0)), torch.rand(1, 1, 8, 8), "positive sizes"),
    "empty mask": (Supervoxels(4, within=torch.zeros(8, 8)), torch.rand(1, 1, 8, 8), "empty in sample 0"),
    "prediction": (Supervoxels(4, within=Predicted()), torch.rand(1, 1, 8, 8), "known to an explainer only"),
}


@pytest.mark.parametrize(("features", "x", "message"), BAD_SUPERVOXELS.values(), ids=BAD_SUPERVOXELS)
def test_supervoxels_that_cannot_be_are_refused(features, x, message):
    with pytest.raises(InputError, match=message):
        features.mask(x, "image")


@pytest.mark.parametrize("options", [{"n_segments": 0}, {"n_segments": 2.5}, {"compactness": 0.0}])
def test_settings_of_supervoxels_are_checked(options):
    with pytest.raises(InputError, match=r"Supervoxels\("):
        Supervoxels(**options)


def test_an_explainer_places_supervoxels_by_the_affine_of_its_input():
    x = with_place(textured((24, 24, 8), (1, 1, 3)).double(), 1, 1, 3)
    network = LinearImage((1, 24, 24, 8))
    explanation = explain(network, x, FeatureAblation(Supervoxels(12, within=None), Constant(0.0)))
    numbers = Supervoxels(12, within=None).mask(x, "image")[0, 0]
    found = explanation.attributions["image"].as_tensor()[0, 0]
    contributions = (network.weight * x.as_tensor())[0, 0].detach()
    for number in numbers.unique():
        here = numbers == number
        torch.testing.assert_close(found[here], contributions[here].sum().expand(int(here.sum())))
    assert "features=Supervoxels(keeps_background=False, n_segments=12" in explanation.method


# ------------------------------------------------------------------------------------------------------------ atlas


@pytest.fixture
def atlas_file(tmp_path):
    """A label map of 2 mm voxels, 20 x 20 x 20, whose label is 3 left of x = 0 and 7 right of it."""
    labels = np.full((20, 20, 20), 3, dtype=np.int16)
    labels[10:] = 7
    labels[:, :, :2] = 0
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-19.0, -19.0, -19.0)
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "atlas.nii.gz")
    return tmp_path / "atlas.nii.gz"


def expected_label(points):
    """Return what the atlas says at points in mm, shape (3, ...)."""
    inside = (np.abs(points) < 20).all(0)
    return np.where(inside & (points[2] > -16), np.where(points[0] > 0, 7, 3), 0)


ROTATED = [[0.0, -1.5, 0.0, 14.3], [1.5, 0.0, 0.0, -11.2], [0.0, 0.0, 3.0, -22.1], [0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("space", ["RAS", "LPS"])
def test_an_atlas_is_resampled_to_the_input_through_both_affines(atlas_file, space):
    affine = np.array(ROTATED)
    points = np.einsum("ij,jabc->iabc", affine, np.stack([*np.indices((18, 17, 11)), np.ones((18, 17, 11))]))[
        :3
    ]
    expected = torch.from_numpy(expected_label(points))
    given = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine if space == "LPS" else affine
    x = MetaTensor(torch.rand(1, 1, 18, 17, 11), affine=torch.from_numpy(given), meta={"space": space})
    found = Atlas(atlas_file).mask(x, "image")[0, 0]
    assert torch.equal(found, expected)
    assert set(found.unique().tolist()) == {0, 3, 7}


def test_an_atlas_in_template_space_is_reached_through_a_registration(atlas_file):
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = torch.tensor([100.0, 50.0, -30.0])
    x = with_place(torch.rand(1, 1, 10, 10, 10), 2, 2, 2, origin=(-109.0, -60.0, 25.0))
    registered = Atlas(atlas_file, to_atlas=shift).mask(x, "image")
    there = with_place(torch.rand(1, 1, 10, 10, 10), 2, 2, 2, origin=(-9.0, -10.0, -5.0))
    assert torch.equal(registered, Atlas(atlas_file).mask(there, "image"))
    with pytest.raises(InputError, match=r"does not overlap.*\[-19, 19\].*\[-109, -91\]"):
        Atlas(atlas_file).mask(x, "image")


def test_an_atlas_of_the_input_itself_is_taken_as_it_is(atlas_file):
    x = LoadImage(ensure_channel_first=True)(atlas_file)[None].float()
    assert torch.equal(Atlas(atlas_file).mask(x, "image"), x.as_tensor().long())
    assert torch.equal(Atlas(x[0]).mask(x, "image"), x.as_tensor().long())
    assert torch.equal(Atlas(x[0, 0].as_tensor()).mask(x, "image"), x.as_tensor().long())


def test_background_may_have_any_number():
    labels = torch.tensor([[0, 0, 4], [9, 9, 4]])
    atlas = Atlas(labels, {0: "liver", 4: "spleen", 9: "air"}, background=9)
    numbers = atlas.mask(torch.rand(1, 1, 2, 3), "image")[0, 0]
    names = [[atlas.feature_name(number) for number in row] for row in numbers.tolist()]
    assert names == [["liver", "liver", "spleen"], ["air", "air", "spleen"]]
    assert (numbers == 0).tolist() == (labels == 9).tolist()


BAD_ATLASES = {
    "fractions": (torch.full((4, 4), 0.5), "whole numbers from 0"),
    "negative": (torch.full((4, 4), -1), "whole numbers from 0"),
    "nan": (torch.full((4, 4), float("nan")), "whole numbers from 0"),
    "empty": (torch.zeros(4, 4), "holds no structure"),
    "other grid": (torch.ones(5, 4), r"\(5, 4\) is not on the grid of the input, \(4, 4\)"),
    "axes": (torch.ones(2, 4, 4), "one image of 2 spatial axes"),
    "no file": ("missing.nii.gz", "cannot read missing.nii.gz"),
    "other input": ({"pet": torch.ones(4, 4)}, "no labels for the input 'image'"),
}


@pytest.mark.parametrize(("labels", "message"), BAD_ATLASES.values(), ids=BAD_ATLASES)
def test_label_maps_that_are_none_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        Atlas(labels).mask(torch.rand(1, 1, 4, 4), "image")


def test_a_file_needs_an_input_with_a_place(atlas_file):
    for x in (torch.rand(1, 1, 4, 4, 4), MetaTensor(torch.rand(1, 1, 4, 4, 4))):
        with pytest.raises(InputError, match="place of the input in space is not known"):
            Atlas(atlas_file).mask(x, "image")


def test_samples_of_other_places_are_not_one_partition(atlas_file):
    affines = torch.stack([with_place(torch.zeros(1, 1, 4, 4, 4), 2, 2, 2, origin=o).affine for o in OFFSETS])
    x = MetaTensor(torch.rand(2, 1, 4, 4, 4), affine=affines)
    with pytest.raises(InputError, match="explain one sample at a time"):
        Atlas(atlas_file).mask(x, "image")


OFFSETS = ((-3.0, 0.0, 0.0), (5.0, 0.0, 0.0))

TABLES = {
    "names.csv": "index,name,color\n1,left hippocampus,red\n2,amygdala,blue\n",
    "names.tsv": "label\tstructure\n1\tleft hippocampus\n2\tamygdala\n",
    "numbers.json": '{"1": "left hippocampus", "2": "amygdala"}',
    "names.json": '{"left hippocampus": 1, "amygdala": 2}',
    "itksnap.txt": '# comment\n1  255 0 0  1 1 1 "left hippocampus"\n2 0 255 0 1 1 1 "amygdala"\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_names_of_structures_are_read(name, tmp_path):
    (tmp_path / name).write_text(TABLES[name])
    assert read_names(tmp_path / name) == {1: "left hippocampus", 2: "amygdala"}


def test_names_are_read_from_a_lookup_table_of_freesurfer(tmp_path):
    text = "#$Id: FreeSurferColorLUT.txt\n\n#No. Label Name:   R   G   B   A\n0   Unknown   0 0 0 0\n"
    (tmp_path / "FreeSurferColorLUT.txt").write_text(text + "17  Left-Hippocampus  220 216 20 0\n")
    atlas = Atlas(torch.tensor([[0, 17]]), tmp_path / "FreeSurferColorLUT.txt")
    assert [atlas.feature_name(number) for number in (0, 17, 18)] == [
        "Unknown",
        "Left-Hippocampus",
        "structure 18",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "x,y\n1,2\n"), ("a.json", "["), ("a.json", "[1]"), ("a.txt", "one\n"), ("a.txt", "")],
)
def test_tables_without_names_are_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=name):
        read_names(tmp_path / name)


# ------------------------------------------------------------------------------------------------------ components


def lesions():
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 1:3, 1:3] = 1
    mask[..., 6:10, 5:9] = 1
    mask[..., 10, 9] = 1  # touches at a corner
    mask[..., 1, 10] = 1
    return mask


def test_lesions_are_numbered_by_size_and_the_rest_is_one_feature():
    numbers = Components(lesions()).mask(torch.rand(1, 2, 12, 12), "image")[0, 0]
    assert numbers.unique(return_counts=True)[1].tolist() == [144 - 17 - 4 - 1, 17, 4, 1]
    assert Components(lesions(), min_voxels=4).mask(torch.rand(1, 2, 12, 12), "image").max() == 2
    labels, count = label(lesions()[0, 0].numpy(), np.ones((3, 3)))
    assert count == 3
    assert all(len(numbers[torch.from_numpy(labels == k)].unique()) == 1 for k in range(1, 4))


class Field(nn.Module):
    """A segmentation whose logit of class 1 is the image itself."""

    def forward(self, x):
        return torch.cat([torch.full_like(x[:, :1], 0.5), x[:, :1] ** 2], 1)


@pytest.mark.parametrize("of", [Predicted(), Labeled(1), Labeled(), "tensor"], ids=str)
def test_each_lesion_of_prediction_or_label_is_a_player(of):
    x = lesions().double() * 2
    features = Components(lesions() if of == "tensor" else of)
    target = RegionScore(1, Mask(lesions()), reduction="sum")
    explanation = explain(Field(), x, FeatureAblation(features, Constant(0.0)), target, label=lesions())
    rows = {row.feature: row for row in feature_table(explanation)}
    assert {name: (row.value, row.voxels) for name, row in rows.items()} == {
        "lesion 0": (68.0, 17),
        "lesion 1": (16.0, 4),
        "lesion 2": (4.0, 1),
        "rest": (0.0, 122),
    }
    assert rows["lesion 0"].share == pytest.approx(68 / 88)


def test_a_classifier_asks_which_lesion_of_the_label_drives_its_call():
    network, x = LinearImage((1, 12, 12)), random_image(1, 1, 12, 12)
    attributor = FeatureAblation(Components(Labeled(1)), Constant(0.0))
    with pytest.raises(InputError, match="has no meaning for OutputScore"):
        explain(network, x, attributor, label=lesions())
    explanation = explain(network, x, FeatureAblation(Components(lesions()), Constant(0.0)))
    contributions = (network.weight * x).detach()[0, 0]
    value = next(row.value for row in feature_table(explanation) if row.feature == "lesion 1")
    assert value == pytest.approx(float(contributions[1:3, 1:3].sum()))


def test_no_lesion_is_an_error():
    x = torch.rand(1, 1, 12, 12)
    with pytest.raises(EmptyRegionError, match="empty in sample 0"):
        Components(torch.zeros(1, 1, 12, 12)).mask(x, "image")
    with pytest.raises(EmptyRegionError, match="no component of at least 20 voxels"):
        Components(lesions(), min_voxels=20).mask(x, "image")
    with pytest.raises(InputError, match="known to an explainer only"):
        Components().mask(x, "image")


def test_a_background_that_is_kept_is_never_taken_away():
    network, x = small_unet(2, channels=1), random_image(1, 1, 16, 16)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 2:5, 3:7] = mask[..., 9:13, 9:13] = 1
    target = RegionScore(1, Box((2, 2), (14, 14)))
    attributor = ShapleyValues(Components(mask, keeps_background=True), Constant(0.0))
    explanation = explain(network, x, attributor, target)
    big, small = Mask(Components(mask).mask(x, "image") == 1), Mask(Components(mask).mask(x, "image") == 2)

    def score(*gone):
        kept = x.clone()
        for region in gone:
            kept[region.voxels] = 0
        with torch.no_grad():
            return float(network(kept)[0, 1, 2:14, 2:14].mean())

    whole, none, alone = score(), score(big, small), (score(small), score(big))
    expected = [0.5 * (alone[0] - none + whole - alone[1]), 0.5 * (alone[1] - none + whole - alone[0])]
    found = explanation.attributions["image"]
    assert float(found[0, 0, 9, 9]) == pytest.approx(expected[0], rel=1e-9)
    assert float(found[0, 0, 2, 3]) == pytest.approx(expected[1], rel=1e-9)
    assert float(found[0, 0, 0, 0]) == pytest.approx(0, abs=1e-12)
    assert float(explanation.baseline_score) == pytest.approx(none)


# ----------------------------------------------------------------------------------------------------------- table


def test_the_table_sums_contributions_over_structures_and_adds_up():
    network, x = LinearImage((2, 6, 5, 4)), with_place(random_image(1, 2, 6, 5, 4), 1, 2, 1.5)
    labels = torch.randint(0, 4, (6, 5, 4), generator=torch.Generator().manual_seed(0))
    explanation = explain(network, x, InputXGradient())
    rows = feature_table(explanation, Atlas(labels, {0: "outside", 2: "pons"}))
    contributions = (network.weight * x.as_tensor()).detach()[0].sum(0)
    assert {row.feature for row in rows} == {"outside", "structure 1", "pons", "structure 3"}
    pons = next(row for row in rows if row.feature == "pons")
    assert (pons.kind, pons.voxels, pons.volume_mm3) == ("sum", int((labels == 2).sum()), 3.0 * pons.voxels)
    assert pons.value == pytest.approx(float(contributions[labels == 2].sum()))
    assert sum(row.value for row in rows) == pytest.approx(float(explanation.score))
    assert sum(row.share for row in rows) == pytest.approx(1)
    magnitudes = [abs(row.value) for row in rows]
    assert magnitudes == sorted(magnitudes, reverse=True)
    read = list(csv.DictReader(StringIO(as_csv(row._asdict() for row in rows))))
    assert [float(row["value"]) for row in read] == [row.value for row in rows]


def test_the_table_takes_the_one_value_of_a_feature_and_the_mean_of_other_maps():
    network, x = LinearImage((2, 8, 8)), random_image(1, 2, 8, 8)
    explanation = explain(network, x, FeatureAblation(Blocks(4), Constant(0.0)))
    own = feature_table(explanation)
    contributions = (network.weight * x).detach()[0].sum(0)
    blocks = [float(contributions[i : i + 4, j : j + 4].sum()) for i in (0, 4) for j in (0, 4)]
    assert [row.value for row in own] == pytest.approx(sorted(blocks, key=abs, reverse=True))
    assert {(row.kind, row.voxels, row.volume_mm3) for row in own} == {("value", 16, None)}
    halves = torch.arange(8)[:, None].expand(8, 8) // 4
    other = {row.feature: row for row in feature_table(explanation, Atlas(halves + 1))}
    assert other["structure 1"].kind == "mean"
    assert other["structure 1"].value == pytest.approx(sum(blocks[:2]) / 2)


def test_a_table_needs_features_that_it_can_know():
    explanation = explain(LinearImage((1, 8, 8)), random_image(1, 1, 8, 8), InputXGradient())
    with pytest.raises(InputError, match="has no features"):
        feature_table(explanation)
    with pytest.raises(InputError, match="which an explanation does not hold"):
        feature_table(explanation, Supervoxels(4))
    with pytest.raises(InputError, match=r"no map of \['ct'\]"):
        feature_table(explanation, Blocks(4), "ct")


# ------------------------------------------------------------------------------------------------------- bad masks


BAD_MASKS = {
    "shape": (torch.zeros(5, 5, dtype=torch.long), r"\(5, 5\) does not expand to \(1, 1, 8, 8\)"),
    "fractions": (torch.full((8, 8), 0.5), "whole numbers"),
    "nan": (torch.full((8, 8), float("nan")), "whole numbers"),
    "negative": (torch.full((8, 8), -2), "numbers from 0, got -2"),
    "blocks": (Blocks(9), "the whole image would be a single feature"),
    "no size": (Blocks(0), "at least 1 voxel"),
    "axes": (Blocks((4, 4, 4)), "one size of"),
}


@pytest.mark.parametrize(("features", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_features_that_do_not_fit_are_refused_by_the_explainer(features, message):
    with pytest.raises(InputError, match=message):
        explain(LinearImage((1, 8, 8)), random_image(1, 1, 8, 8), FeatureAblation(features))


def test_numbers_with_gaps_are_as_good_as_any():
    network, x = LinearImage((1, 8, 8)), random_image(1, 1, 8, 8)
    dense = torch.arange(8)[:, None].expand(8, 8) // 2
    sparse = torch.tensor([7, 1000, 3, 10**12])[dense]
    maps = [
        explain(network, x, FeatureAblation(FeatureMask(mask), Blur(1.0))).attributions["image"]
        for mask in (dense, sparse)
    ]
    assert torch.equal(*maps)


def test_windows_see_placed_features_too():
    network, x = small_unet(2, channels=1), with_place(random_image(1, 1, 24, 24), 1, 1)
    target = RegionScore(1, Box((4, 4), (20, 20)))
    attributor = FeatureAblation(Supervoxels(6, within=None), Constant(0.0))
    sliding = SlidingWindowInferer((16, 16), overlap=0.5)
    found = Explainer(target, attributor, sliding, progress=False)(network, x)
    numbers = Supervoxels(6, within=None).mask(x, "image")

    def score(values):
        with torch.no_grad():
            return float(sliding(values, network)[0, 1, 4:20, 4:20].mean())

    for number in numbers.unique():
        change = score(x.as_tensor()) - score(torch.where(numbers == number, 0.0, x.as_tensor()))
        value = found.attributions["image"].as_tensor()[numbers == number]
        torch.testing.assert_close(value, torch.full_like(value, change), rtol=1e-9, atol=1e-12)
