"""Targets, regions, baselines and features: what they select, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from networks import random_image
from scipy.ndimage import gaussian_filter

from monai_xai import (
    Blocks,
    Blur,
    Box,
    ChannelMinimum,
    Channels,
    ClassScore,
    Component,
    Constant,
    EmptyRegionError,
    FeatureMask,
    FunctionTarget,
    InputError,
    Labeled,
    MarginScore,
    Mask,
    Mean,
    Noise,
    OutputScore,
    Predicted,
    RegionScore,
    Samples,
    Voxel,
    channel_names,
)
from monai_xai.baselines import draw_baselines
from monai_xai.features import feature_masks

LOGITS = random_image(2, 3, 6, 5)


def select_and_score(target, output, label=None):
    return target.score(output, *target.select(output, label))


# ------------------------------------------------------------------------------------------------------- targets


def test_class_score_takes_the_predicted_class_of_each_sample_and_keeps_it():
    logits = torch.tensor([[1.0, 3.0], [5.0, 2.0]])
    target = ClassScore()
    selection = target.select(logits, None)
    torch.testing.assert_close(target.score(logits, *selection), torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(target.score(-logits, *selection), torch.tensor([-3.0, -5.0]))
    torch.testing.assert_close(
        select_and_score(ClassScore(0), logits[:, :, None, None]), torch.tensor([1.0, 5.0])
    )


def test_region_score_is_the_mean_or_sum_over_the_frozen_predicted_mask():
    target = RegionScore(1)
    selection = target.select(LOGITS, None)
    for sample in range(2):
        mask = LOGITS[sample].argmax(0) == 1
        moved = -LOGITS
        assert float(target.score(moved, *selection)[sample]) == pytest.approx(
            float(moved[sample, 1][mask].mean())
        )
        total = select_and_score(RegionScore(1, reduction="sum"), LOGITS)[sample]
        assert float(total) == pytest.approx(float(LOGITS[sample, 1][mask].sum()))


def test_margin_output_and_function_scores():
    torch.testing.assert_close(
        select_and_score(MarginScore(1, 0, Box((0, 0), (6, 5))), LOGITS),
        (LOGITS[:, 1] - LOGITS[:, 0]).mean((1, 2)),
    )
    torch.testing.assert_close(
        select_and_score(MarginScore(1, 0), LOGITS[:, :, 0, 0]), LOGITS[:, 1, 0, 0] - LOGITS[:, 0, 0, 0]
    )
    torch.testing.assert_close(
        select_and_score(OutputScore(), torch.tensor([4.0, 5.0])), torch.tensor([4.0, 5.0])
    )
    frozen = FunctionTarget(lambda o, m: (o * m).sum((1, 2, 3)), selector=lambda o, label: (o > 0,))
    selection = frozen.select(LOGITS, None)
    torch.testing.assert_close(frozen.score(2 * LOGITS, *selection), 2 * LOGITS.clamp(min=0).sum((1, 2, 3)))


def test_a_head_chooses_a_part_of_the_output_and_its_absence_is_named():
    output = {"seg": LOGITS, "class": LOGITS[:, :, 0, 0]}
    assert RegionScore(1, head="seg").pick(output) is LOGITS
    assert RegionScore(1, head=0).pick([LOGITS, None]) is LOGITS
    with pytest.raises(InputError, match=r"keys \['class', 'seg'\]"):
        RegionScore(1).pick(output)
    with pytest.raises(InputError, match="list of 1 parts"):
        RegionScore(1, head=3).pick([LOGITS])


@pytest.mark.parametrize(
    ("target", "output", "message"),
    [
        (RegionScore(3), LOGITS, r"needs at least 4 output channels, got shape \(2, 3, 6, 5\)"),
        (RegionScore(1), LOGITS[:, :, 0, 0], r"needs an output of shape \(N, C, \*spatial\), got \(2, 3\)"),
        (ClassScore(7), LOGITS[:, :, 0, 0], "needs at least 8 output channels"),
        (ClassScore(), LOGITS, r"needs an output of shape \(N, K\), got \(2, 3, 6, 5\)"),
        (OutputScore(3), LOGITS[:, :, 0, 0], "needs at least 4 output channels"),
        (RegionScore(1, Box((0, 0), (9, 9))), LOGITS, "does not lie within"),
        (RegionScore(1, Voxel((6, 0))), LOGITS, "does not lie within"),
        (RegionScore(1, Labeled()), LOGITS, "needs a label"),
        (RegionScore(1, Mask(torch.ones(2, 2))), LOGITS, r"got shape \(2, 2\)"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, torch.Tensor) else "",
)
def test_outputs_and_regions_that_do_not_fit_are_named(target, output, message):
    with pytest.raises(InputError, match=message):
        select_and_score(target, output)


@pytest.mark.parametrize("make", [lambda: Box((0, 0), 9), lambda: Box(0, (9, 9)), lambda: Voxel(3)])
def test_a_single_number_is_no_place(make):
    with pytest.raises(InputError, match="needs a number for each axis, such as"):
        make()


def test_an_empty_region_names_its_sample():
    logits = LOGITS.clone()
    logits[1, 1] = -100
    with pytest.raises(EmptyRegionError, match="empty in sample 1"):
        RegionScore(1).select(logits, None)


# ------------------------------------------------------------------------------------------------------- regions


def test_predicted_is_arg_max_or_threshold():
    assert torch.equal(Predicted().mask(LOGITS, None, 2), LOGITS.argmax(1, keepdim=True) == 2)
    assert torch.equal(Predicted(0.5).mask(LOGITS, None, 2), LOGITS[:, 2:3] > 0.5)
    assert torch.equal(Predicted().mask(LOGITS[:, :1], None, 0), LOGITS[:, :1] > 0)


def test_labeled_reads_indices_and_one_hot():
    label = torch.randint(0, 3, (2, 1, 6, 5), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1)
    expected = label == 2
    assert torch.equal(Labeled().mask(LOGITS, label, 2), expected)
    assert torch.equal(Labeled().mask(LOGITS, one_hot, 2), expected)
    assert torch.equal(Labeled(0).mask(LOGITS, label, 2), label == 0)
    assert torch.equal(Labeled().mask(LOGITS[:, :1], label, 0), label > 0)


def test_components_are_counted_from_the_largest():
    logits = torch.full((1, 2, 12, 12), -1.0)
    logits[:, 0] = 0
    logits[0, 1, 1:3, 1:3] = logits[0, 1, 5:10, 5:10] = logits[0, 1, 0, 11] = 1.0
    assert [int(Component(k).mask(logits, None, 1).sum()) for k in range(3)] == [25, 4, 1]
    each = RegionScore(1, Component(None, min_voxels=2)).each(logits, None)
    assert [target.region.k for target in each.values()] == [0, 1]
    with pytest.raises(EmptyRegionError, match="has 3 components"):
        Component(3).mask(logits, None, 1)


# ------------------------------------------------------------------------------------------------------ baselines


def test_baselines_are_what_they_say():
    x = random_image(2, 3, 10, 12)
    assert (Constant(2.0).draws(x)[0] == 2).all()
    torch.testing.assert_close(ChannelMinimum().draws(x)[0][1, 2, 0, 0], x[1, 2].min())
    torch.testing.assert_close(Mean().draws(x)[0][1, 2, 0, 0], x[1, 2].mean())
    torch.testing.assert_close(Mean(Box((2, 3), (5, 9))).draws(x)[0][1, 2, 0, 0], x[1, 2, 2:5, 3:9].mean())
    noise = Noise(seed=1).draws(random_image(1, 1, 200, 200) * 3 + 7)[0]
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((7, 3), abs=0.1)
    assert len(Samples(random_image(4, 3, 10, 12)).draws(x)) == 4
    assert all((b.draws(torch.ones(2, 5))[0] == 0).all() for b in (Blur(), ChannelMinimum(), Mean()))


@pytest.mark.parametrize("shape", [(20, 17), (12, 14, 9)])
def test_blur_equals_scipy(shape):
    x = random_image(1, 1, *shape)
    expected = torch.from_numpy(gaussian_filter(x[0, 0].numpy(), 2.0, mode="nearest", truncate=8))
    torch.testing.assert_close(Blur(2.0).draws(x)[0][0, 0], expected, rtol=0, atol=0.02)


def test_a_baseline_that_does_not_fit_is_named_with_both_shapes():
    inputs = {"image": random_image(1, 2, 4, 4), "clinical": random_image(1, 3)}
    with pytest.raises(InputError, match=r"\(5,\) does not broadcast to the input of shape \(1, 2, 4, 4\)"):
        draw_baselines(Constant(torch.zeros(5)), inputs)
    with pytest.raises(
        InputError, match=r"given for \['image'\], but the inputs are \['clinical', 'image'\]"
    ):
        draw_baselines({"image": Constant()}, inputs)


# ------------------------------------------------------------------------------------------------------- features


def test_feature_numbers_are_contiguous_and_unique_over_inputs():
    inputs = {"image": random_image(1, 2, 4, 4), "clinical": random_image(1, 3)}
    masks, count = feature_masks(Channels(), inputs)
    assert count == 5
    assert masks[0].unique().tolist() == [0, 1]
    assert masks[1].unique().tolist() == [2, 3, 4]
    sparse = FeatureMask({"image": torch.tensor([[5, 5, 900, 900]]), "clinical": torch.tensor([5, 7, 7])})
    masks, count = feature_masks(sparse, inputs)
    assert count == 4
    assert masks[1].tolist() == [[2, 3, 3]]


def test_blocks_tile_the_image():
    blocks = Blocks((3, 2)).mask(random_image(1, 2, 7, 4), "image")[0, 0]
    assert blocks.unique(return_counts=True)[1].tolist() == [6, 6, 6, 6, 2, 2]
    assert len(Blocks(4, per_channel=True).mask(random_image(1, 2, 8, 8), "image").unique()) == 8


def test_channel_names_come_from_the_bundles_metadata(tmp_path):
    assert channel_names(tmp_path) == {}
    (tmp_path / "configs").mkdir()
    inputs = {"image": {"channel_def": {"1": "T1", "0": "FLAIR"}}, "mask": {}}
    (tmp_path / "configs" / "metadata.json").write_text(
        json.dumps({"network_data_format": {"inputs": inputs}})
    )
    assert channel_names(tmp_path) == {"image": ("FLAIR", "T1")}
    for broken in ("{", '{"network_data_format": {"inputs": {"image": {"channel_def": {"FLAIR": 0}}}}}'):
        (tmp_path / "configs" / "metadata.json").write_text(broken)
        with pytest.raises(InputError, match=r"metadata\.json does not name the channels"):
            channel_names(tmp_path)


def test_one_output_channel_does_not_guess_the_channel_of_a_one_hot_label():
    label = torch.ones(1, 2, 4, 4)
    with pytest.raises(InputError, match="Labeled\\(value=1\\)"):
        Labeled().mask(torch.ones(1, 1, 4, 4), label, 0)
    assert Labeled(value=1).mask(torch.ones(1, 1, 4, 4), label, 0).all()
