"""Transforms and the inferer: explanations in a pipeline, and files that are whole or absent."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Compose,
    DivisiblePadd,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    SaveImaged,
    Spacingd,
)
from networks import ImageAndVector, random_image, small_unet

from monai_xai import (
    AtomicNibabelWriter,
    AttributionInferer,
    Box,
    Component,
    Explain,
    Explaind,
    Explainer,
    InputError,
    Labeled,
    RegionScore,
    Saliency,
)

EXPLAINER = Explainer(RegionScore(1, Box((2, 2), (9, 9))), Saliency(), SlidingWindowInferer(8, overlap=0.5))


def test_a_transform_explains_one_image_and_several():
    network, image = small_unet(), random_image(2, 16, 16)
    expected = EXPLAINER(network, image[None]).attributions["image"][0]
    torch.testing.assert_close(Explain(EXPLAINER, network)(image), expected)
    data = Explaind("image", EXPLAINER, network)({"image": image, "name": "a"})
    torch.testing.assert_close(data["attribution_image"], expected)
    both = {"image": random_image(1, 16, 16), "clinical": random_image(3)}
    data = Explaind(["image", "clinical"], EXPLAINER, ImageAndVector(), prefix="why")(both)
    assert (data["why_image"].shape, data["why_clinical"].shape) == ((1, 16, 16), (3,))


def test_missing_keys_are_named():
    with pytest.raises(KeyError, match="image"):
        Explaind("image", EXPLAINER, small_unet())({"scan": random_image(2, 16, 16)})
    with pytest.raises(KeyError, match=r"label_key='truth'.*\['image'\]"):
        Explaind("image", EXPLAINER, small_unet(), label_key="truth")({"image": random_image(2, 16, 16)})


def test_a_label_reaches_the_region_and_several_targets_are_refused():
    label = torch.zeros(1, 16, 16)
    label[..., 3:5, 3:5] = 1
    explainer = Explainer(RegionScore(1, Labeled()), Saliency())
    image = random_image(2, 16, 16)
    found = Explaind("image", explainer, small_unet(), label_key="label")({"image": image, "label": label})
    expected = Explainer(RegionScore(1, Box((3, 3), (5, 5))), Saliency())(
        small_unet(), image[None]
    ).attributions["image"]
    torch.testing.assert_close(found["attribution_image"], expected[0])
    with pytest.raises(InputError, match="one target"):
        Explain(Explainer(RegionScore(1, Component(None)), Saliency()), small_unet())(image)


def test_the_inferer_returns_maps_in_place_of_predictions():
    network, image = small_unet(), random_image(1, 2, 16, 16)
    inferer = AttributionInferer(EXPLAINER)
    assert torch.equal(inferer(image, network), EXPLAINER(network, image).attributions["image"])
    assert inferer(random_image(1, 1, 16, 16), ImageAndVector(), random_image(1, 3)).shape == (1, 1, 16, 16)
    with pytest.raises(InputError, match="'condition'"):
        inferer(image, network, condition=image)


def test_maps_return_to_the_scans_own_space(tmp_path):
    affine = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
    scan = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(14, 12, 8)).astype(np.float32), affine)
    nibabel.save(scan, tmp_path / "scan.nii.gz")
    network = small_unet(3, channels=1).float()
    explainer = Explainer(RegionScore(1, Box((2, 2, 2), (9, 9, 7))), Saliency())
    before = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Spacingd("image", (2.0, 2.0, 2.0)),
            DivisiblePadd("image", 2),
        ]
    )
    saver = SaveImaged(
        "attribution_image",
        output_dir=tmp_path,
        writer=AtomicNibabelWriter,
        separate_folder=False,
        print_log=False,
    )
    invert = Invertd("attribution_image", before, "image", nearest_interp=False)
    Compose([Explaind("image", explainer, network), invert, saver])(
        before({"image": tmp_path / "scan.nii.gz"})
    )
    saved = nibabel.load(tmp_path / "scan_trans.nii.gz")
    np.testing.assert_allclose(saved.affine, affine)
    assert saved.shape == (14, 12, 8)
    assert not list(tmp_path.glob(".partial*"))
    assert np.abs(saved.get_fdata()).max() > 0


def writer(affine):
    made = AtomicNibabelWriter()
    made.set_data_array(np.ones((1, 24, 24, 24), np.float32))
    made.set_metadata({"affine": affine, "original_affine": affine, "spatial_shape": (24, 24, 24)})
    return made


@pytest.mark.parametrize("shape", [(1, 8, 6), (2, 8, 6), (1, 8, 6, 4)], ids=str)
def test_maps_are_written_as_they_are_in_2d_and_3d_with_one_channel_and_more(tmp_path, shape):
    values = MetaTensor(random_image(*shape).float())
    made = AtomicNibabelWriter()
    made.set_data_array(values, channel_dim=0)
    made.set_metadata(values.meta, resample=False)
    made.write(tmp_path / "map.nii.gz")
    saved = np.asarray(nibabel.load(tmp_path / "map.nii.gz").dataobj).reshape(*shape[1:], shape[0])
    assert np.array_equal(np.moveaxis(saved, -1, 0), values.numpy())


def test_a_singular_affine_is_refused_before_anything_is_written(tmp_path):
    made = writer(np.eye(4))
    made.affine = np.diag([1.0, 0.0, 1.0, 1.0])
    with pytest.raises(InputError, match=r"map.nii.gz is not written: its affine is singular"):
        made.write(tmp_path / "map.nii.gz")
    assert not list(tmp_path.iterdir())


def test_small_voxels_have_a_place_and_what_is_not_a_number_has_none(tmp_path):
    small = writer(np.diag([5e-5, 5e-5, 5e-5, 1.0]))
    small.write(tmp_path / "small.nii.gz")
    broken = writer(np.eye(4))
    broken.affine = np.full((4, 4), np.nan)
    with pytest.raises(InputError, match="affine is singular"):
        broken.write(tmp_path / "broken.nii.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["small.nii.gz"]


def test_a_folder_that_is_missing_is_no_full_disk(tmp_path, caplog):
    with pytest.raises(OSError, match="check that the folder exists"):
        writer(np.eye(4)).write(tmp_path / "nowhere" / "map.nii.gz")
    assert "map.nii.gz is not written" in caplog.text


def test_where_save_image_speaks_of_missing_writers_the_log_tells_the_cause(tmp_path, caplog):
    (tmp_path / "scan_trans.nii.gz").mkdir()
    image = MetaTensor(torch.ones(1, 4, 4, 4), meta={"filename_or_obj": "scan.nii.gz"})
    save = SaveImaged("map", output_dir=tmp_path, writer=AtomicNibabelWriter, separate_folder=False)
    with pytest.raises(RuntimeError, match="cannot find a suitable writer"):
        save({"map": image})
    (line,) = (record.message for record in caplog.records if record.name == "monai_xai.transforms")
    assert f"{tmp_path / 'scan_trans.nii.gz'} is not written (Is a directory)" in line


def test_a_full_disk_leaves_the_old_file_and_no_half_of_a_new_one(tmp_path):
    writer(np.eye(4)).write(tmp_path / "map.nii")
    before = (tmp_path / "map.nii").read_bytes()
    script = f"""
        import resource, signal
        import numpy as np
        from monai_xai import AtomicNibabelWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        made = AtomicNibabelWriter()
        made.set_data_array(np.zeros((1, 24, 24, 24), np.float32))
        made.set_metadata({{"affine": np.eye(4), "original_affine": np.eye(4)}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        made.write({str(tmp_path / "map.nii")!r})
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "map.nii is not written" in result.stderr
    assert "free disk space" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["map.nii"]
    assert (tmp_path / "map.nii").read_bytes() == before


def test_maps_of_a_transform_keep_the_meta_data():
    image = MetaTensor(
        random_image(2, 16, 16),
        affine=torch.eye(4, dtype=torch.float64) * 2,
        meta={"filename_or_obj": "a.nii"},
    )
    found = Explain(EXPLAINER, small_unet())(image)
    assert isinstance(found, MetaTensor)
    assert found.meta["filename_or_obj"] == "a.nii"
    assert torch.equal(found.affine, image.affine)
