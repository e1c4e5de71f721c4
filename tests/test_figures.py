"""Pictures of attributions: what is where, in which color, with which words."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import matplotlib
import nibabel as nib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from PIL import Image

from monai_xai.errors import InputError
from monai_xai.figures import (
    Scene,
    animate,
    draw_bars,
    draw_cohort,
    draw_montage,
    draw_planes,
    encode_png,
    rasterize,
)
from monai_xai.figures.colors import LABEL, PREDICTION, blend, overlay_colors
from monai_xai.figures.geometry import geometry_of
from monai_xai.figures.overlays import pick_slices

SHAPE = (20, 24, 16)
RAS = np.array([[2.0, 0, 0, -20], [0, 3.0, 0, -30], [0, 0, 4.0, -10], [0, 0, 0, 1]])


def head(shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    """Return an ellipsoid of value 1 in air of value 0."""
    grid = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    return (sum(axis**2 for axis in grid) < 0.8).astype(np.float32)


def block(value: float, *where: slice, shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    """Return a map that is zero outside of one block."""
    values = np.zeros(shape, np.float32)
    values[where] = value
    return values


LESION = (slice(12, 15), slice(6, 10), slice(9, 12))


def scene(**changes: object) -> Scene:
    """Return two modalities, the first evidence for and the second against, with a lesion off center."""
    values = {
        "attribution": np.stack([block(2.0, *LESION), block(-1.0, *LESION)]),
        "image": np.stack([head(), head() * 0.5]),
        "channels": ("FLAIR", "T1"),
        "prediction": block(1.0, *LESION) > 0,
        "label": block(1.0, slice(11, 14), *LESION[1:]) > 0,
        "affine": RAS,
    }
    return Scene(**(values | changes))  # type: ignore[arg-type]


def words(figure: Figure) -> str:
    """Return everything that is written on a figure."""
    texts = list(figure.texts) + [text for axes in figure.axes for text in axes.texts]
    return "\n".join(text.get_text() for text in texts)


def pictures(figure: Figure) -> list[Axes]:
    """Return the pictures of anatomy on a figure, without color bar and legend."""
    return [axes for axes in figure.axes if axes.images and axes.images[0].get_array().shape[1] > 1]


def is_red(color: NDArray[np.float32]) -> bool:
    return bool(color[0] > 1.5 * color[2])


def is_blue(color: NDArray[np.float32]) -> bool:
    return bool(color[2] > 1.5 * color[0])


def is_grey(color: NDArray[np.float32]) -> bool:
    return bool(np.ptp(color) < 1e-6)


# ---- colors


def test_zero_leaves_the_anatomy_as_it_is() -> None:
    grey = np.linspace(0, 1, 11)
    np.testing.assert_allclose(blend(grey, np.zeros(11), 1.0), grey[:, None].repeat(3, 1), atol=1e-7)


def test_positive_is_red_and_negative_is_blue_over_any_anatomy() -> None:
    for grey in (0.0, 0.5, 0.9):
        plus, minus = blend(np.full(2, grey), np.array([1.0, -1.0]), 1.0)
        assert is_red(plus)
        assert is_blue(minus)


def test_opacity_grows_with_size_alike_for_both_signs() -> None:
    values = np.linspace(0, 1.5, 40)
    _, opacity = overlay_colors(values, 1.0)
    _, opposite = overlay_colors(-values, 1.0)
    np.testing.assert_array_equal(opacity, opposite)
    assert (np.diff(opacity) >= 0).all()
    assert (opacity[values <= 0.05] == 0).all()
    assert opacity.max() < 1


def test_values_that_are_not_finite_are_clear() -> None:
    _, opacity = overlay_colors(np.array([np.nan, np.inf, -np.inf]), 1.0)
    assert (opacity == 0).all()


# ---- geometry


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "LPI", "ASR", "SPL", "IRP"])
def test_the_same_body_looks_the_same_however_the_array_lies(codes: str) -> None:
    right_front_top = block(1.0, slice(17, 19), slice(20, 23), slice(13, 15))
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(tuple(codes)))
    array = nib.orientations.apply_orientation(right_front_top, turn)
    affine = RAS @ inv_ornt_aff(turn, SHAPE)
    geometry = geometry_of(affine, 3)

    assert [plane.name for plane in geometry.planes] == ["axial", "coronal", "sagittal"]
    assert geometry.spacing == (2.0, 3.0, 4.0)
    axial, coronal, sagittal = geometry.planes
    assert axial.letters == ("R", "L", "A", "P")
    assert coronal.letters == ("R", "L", "S", "I")
    assert sagittal.letters == ("A", "P", "S", "I")
    # Displayed axes run to the left, the back and the feet: the marker is at the beginning of each.
    shown = geometry.show(array)
    assert shown.shape == SHAPE
    assert np.argwhere(shown).max(0).tolist() == [2, 3, 2]
    # A displayed voxel is traced back to the array and the world.
    index = tuple(np.argwhere(shown)[0].tolist())
    voxel = geometry.voxel(index, shown.shape)
    assert array[voxel] == 1.0
    np.testing.assert_allclose(geometry.millimeters(voxel), nib.affines.apply_affine(affine, voxel))


def test_pictures_show_right_on_the_left_and_the_nose_up() -> None:
    marker = block(1.0, slice(17, 19), slice(20, 23), slice(13, 15))
    figure = draw_planes(scene(attribution=marker[None], image=head()[None]))
    axial = pictures(figure)[0].images[0].get_array()
    rows, columns = np.nonzero(axial[..., 0] > 1.5 * axial[..., 2] + 1e-6)
    assert rows.size
    assert rows.max() < axial.shape[0] / 2
    assert columns.max() < axial.shape[1] / 2


def test_place_is_told_in_voxels_and_millimeters() -> None:
    geometry = geometry_of(RAS, 3)
    assert geometry.describe((3, 12, 5)) == "voxel (3, 12, 5), L 14.0 A 6.0 S 10.0 mm"
    assert geometry_of(None, 3).describe((3, 12, 5)) == "voxel (3, 12, 5)"


def test_nothing_is_claimed_without_an_affine() -> None:
    shown = scene(affine=None)
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    np.testing.assert_array_equal(shown.geometry.show(array), array)
    said = words(draw_planes(shown))
    assert "axis 2, slice 10" in said
    assert " mm" not in said
    assert not {"R", "L", "A", "P"} & set(said.split("\n"))


@pytest.mark.parametrize(
    "affine", [np.diag([1.0, 0, 1, 1]), np.full((4, 4), np.nan)], ids=["singular", "nan"]
)
def test_an_affine_that_places_nothing_is_said_and_not_used(affine: NDArray[np.float64]) -> None:
    shown = scene(affine=affine)
    assert shown.geometry.affine is None
    assert "cannot be inverted" in " ".join(shown.notes)


def test_tilted_planes_are_called_so() -> None:
    angle = np.deg2rad(18)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = RAS.copy()
    affine[:3, :3] = tilt @ RAS[:3, :3]
    assert any("18°" in note for note in scene(affine=affine).notes)
    assert not any("tilted" in note for note in scene().notes)


@pytest.mark.parametrize(
    ("columns", "name", "letters"),
    [
        ([0, 1], "axial", ("R", "L", "A", "P")),
        ([0, 2], "coronal", ("R", "L", "S", "I")),
        ([2, 1], "sagittal", ("A", "P", "S", "I")),
    ],
)
def test_a_single_slice_knows_its_plane(columns: list[int], name: str, letters: tuple[str, ...]) -> None:
    affine = np.eye(4)
    affine[:3, :2] = RAS[:3, columns]
    (plane,) = geometry_of(affine, 2).planes
    assert (plane.name, plane.letters) == (name, letters)


def test_voxels_keep_their_shape_in_mm() -> None:
    figure = draw_planes(scene())
    axial = pictures(figure)[0]
    inches = figure.get_size_inches() * (axial.get_position().width, axial.get_position().height)
    rows, columns = axial.images[0].get_array().shape[:2]
    assert inches[1] / inches[0] == pytest.approx(3.0 * rows / (2.0 * columns), rel=1e-6)


def test_thick_slices_are_paged_through_as_they_were_taken() -> None:
    thick = np.diag([6.0, 1, 1, 1])
    assert scene(affine=thick).scrolling.name == "sagittal"
    assert scene().scrolling.name == "axial"


# ---- what all pictures of a scene share


def slow_limit(values: NDArray[np.float64]) -> float:
    """Go up from the smallest size until 98 % of the sum is reached."""
    sizes, reached = sorted(np.abs(values.ravel())), 0.0
    for size in sizes:
        reached += size
        if reached >= 0.98 * sum(sizes):
            return size
    raise AssertionError


def test_scale_ends_where_98_percent_of_the_attribution_lies_below() -> None:
    values = np.random.default_rng(0).normal(size=(2, 9, 8, 7))
    assert scene_of(values).limit == pytest.approx(slow_limit(values))


def scene_of(values: NDArray[np.float64], **changes: object) -> Scene:
    return Scene(values, np.random.default_rng(1).normal(size=values.shape), **changes)  # type: ignore[arg-type]


def test_one_extreme_voxel_does_not_set_the_scale() -> None:
    values = np.random.default_rng(0).normal(size=(1, 20, 20, 20))
    before = scene_of(values).limit
    values[0, 3, 3, 3] = 60.0
    assert scene_of(values).limit < 1.5 * before


def test_voxels_that_were_never_computed_do_not_change_the_scale() -> None:
    values = np.random.default_rng(0).normal(size=(1, 6, 6, 6))
    assert scene_of(np.pad(values, ((0, 0), (8, 8), (8, 8), (8, 8)))).limit == scene_of(values).limit


def test_strongest_point_is_the_planted_one() -> None:
    shown = scene()
    voxel = shown.geometry.voxel(shown.strongest, shown.shape)
    assert voxel[0] == 13
    assert voxel[1] in (7, 8)
    assert voxel[2] == 10
    assert f"voxel {voxel}" in words(draw_planes(shown))


def test_strongest_point_counts_both_signs_of_all_channels() -> None:
    one = block(3.0, slice(2, 5), slice(2, 5), slice(2, 5))
    two = block(2.0, *LESION)
    shown = scene(attribution=np.stack([one + two, -two]), affine=None)
    assert shown.strongest[0] == 13


def test_a_lone_spike_does_not_decide_where_to_look() -> None:
    values = block(1.0, *LESION)
    values[2, 2, 2] = 5.0
    assert scene(attribution=values[None], image=head()[None], affine=None).strongest[0] == 13


def test_air_is_cropped_but_not_what_happens_in_it() -> None:
    inside = block(1.0, *LESION)[None]
    wide = [(0, 0), (10, 10), (0, 0), (0, 0)]
    image = np.pad(head()[None], wide)
    plain = Scene(np.pad(inside, wide), image)
    assert plain.box[0].start >= 8
    marker = np.pad(inside, wide)
    marker[0, 1, 3, 3] = 1.0
    assert Scene(marker, image).box[0].start == 0


def test_no_pixel_of_the_marker_outside_the_head_is_lost_in_the_picture() -> None:
    marker = block(1.0, slice(0, 1), slice(0, 1), slice(10, 11))
    shown = scene(attribution=marker[None], image=head()[None], prediction=None, label=None)
    picture = shown.picture(0, shown.geometry.planes[0], shown.strongest[2])
    assert sum(is_red(color) for color in picture.reshape(-1, 3)) == 1


def test_only_the_strongest_of_many_channels_are_drawn() -> None:
    values = np.ones((11, 5, 5, 5)) * np.arange(11)[:, None, None, None]
    shown = scene_of(values)
    assert shown.rows == tuple(range(3, 11))
    assert "The 8 strongest of 11 channels." in shown.notes


@pytest.mark.parametrize(
    "changes",
    [
        {"image": np.zeros((2, 5, 5, 5))},
        {"attribution": np.zeros((3, *SHAPE))},
        {"attribution": np.zeros(SHAPE[:1])},
        {"label": np.zeros((5, 5, 5), bool)},
    ],
    ids=["grid", "channels", "rank", "label"],
)
def test_shapes_that_do_not_fit_are_named(changes: dict[str, NDArray[np.float64]]) -> None:
    with pytest.raises(InputError, match=r"\(.*\)"):
        scene(**changes)


# ---- planes and montage


def test_planes_have_a_row_per_modality_in_its_own_colors() -> None:
    shown = scene()
    figure = draw_planes(shown)
    said = words(figure)
    for name in ("FLAIR", "T1", "axial, ", "coronal, ", "sagittal, "):
        assert name in said
    row, column = shown.strongest[1] - shown.box[1].start, shown.strongest[0] - shown.box[0].start
    first, second = (axes.images[0].get_array() for axes in pictures(figure)[:2])
    assert is_red(first[row, column])
    assert is_blue(second[row, column])
    assert is_grey(first[row - 5, column])


def test_color_bar_is_symmetric_and_says_values() -> None:
    shown = scene()
    axes = draw_planes(shown).axes[-1]
    assert axes.get_ylim() == pytest.approx((-shown.limit, shown.limit))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["-2", "-1", "0", "+1", "+2"]
    bar = axes.images[0].get_array()[:, 0]
    assert is_red(bar[0])
    assert is_grey(bar[128])
    assert is_blue(bar[-1])


def test_small_values_keep_their_digits() -> None:
    axes = draw_planes(scene(attribution=np.stack([block(3e-5, *LESION)] * 2), unit="score per voxel")).axes[
        -1
    ]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["-3", "-1.5", "0", "+1.5", "+3"]
    assert axes.texts[0].get_text() == "score per voxel, in 10⁻⁵"


def test_outlines_run_along_the_voxels_in_two_styles() -> None:
    shown = scene(affine=None)
    axes = pictures(draw_planes(shown))[0]
    prediction, label = axes.collections[:2]
    assert to_rgb(prediction.get_edgecolor()[0]) == pytest.approx(PREDICTION)
    assert to_rgb(label.get_edgecolor()[0]) == pytest.approx(LABEL)
    assert prediction.get_linestyle() != label.get_linestyle()
    corners = prediction.get_paths()[0].get_extents().get_points()
    offset = [shown.box[1].start, shown.box[0].start]
    np.testing.assert_allclose(corners + offset, [[5.5, 11.5], [9.5, 14.5]], atol=0.2)


@pytest.mark.parametrize("draw", [draw_planes, draw_montage], ids=["planes", "montage"])
def test_odd_maps_are_drawn_and_named(draw: Callable[[Scene], Figure]) -> None:
    broken = np.stack([block(2.0, *LESION)] * 2)
    broken[0, :2] = np.nan
    empty = np.zeros(SHAPE, bool)
    for changes, note in (
        ({"attribution": np.zeros((2, *SHAPE))}, "The attribution is 0 everywhere, to rounding."),
        ({"attribution": np.full((2, *SHAPE), 3.0)}, "The attribution is constant: 3."),
        ({"attribution": broken}, f"{2 * 24 * 16} of {2 * 20 * 24 * 16} attributions are not finite"),
        ({"attribution": np.full((2, *SHAPE), np.nan)}, "not finite"),
        ({"image": np.full((2, *SHAPE), np.nan)}, "The image has voxels that are not finite."),
        ({"image": np.zeros((2, *SHAPE))}, "strongest" if draw is draw_planes else "axial"),
        ({"label": None}, "no label given"),
        ({"prediction": empty}, "prediction (empty)"),
        ({"attribution": np.zeros((2, *SHAPE)), "label": empty, "prediction": empty}, "label (empty)"),
    ):
        figure = draw(scene(**changes))
        assert note in words(figure)
        assert rasterize(figure).any()
    assert "given" not in " ".join(words(draw(scene(label=None, prediction=None))))


def test_layer_map_of_one_channel_lies_over_the_first() -> None:
    said = words(draw_planes(scene(attribution=block(1.0, *LESION)[None])))
    assert "all channels, over FLAIR" in said


def test_montage_pages_from_feet_to_head_and_has_the_strongest_slice() -> None:
    shown = scene()
    picks = pick_slices(shown, 3)
    assert shown.strongest[2] in picks
    assert picks == sorted(picks, reverse=True)
    said = words(draw_montage(shown, 3))
    assert [f"S {height} mm" in said for height in (26, 30, 34)] == [True] * 3
    assert "3 slices hold 100% of the absolute attribution" in said


def test_slices_of_a_montage_spread_over_the_attribution() -> None:
    values = np.ones((1, 6, 6, 50), np.float32)
    values[..., 20] = 3
    picks = pick_slices(Scene(values, values), 5)
    assert len(picks) == 5
    assert 20 in picks
    assert min(picks) <= 1
    assert max(picks) >= 48


def test_image_of_two_dimensions_has_its_channels_side_by_side() -> None:
    values = np.zeros((3, 30, 40), np.float32)
    values[0, 10:15, 20:30] = 1
    figure = draw_planes(Scene(values, values, channels=("red", "green", "blue")))
    assert len(pictures(figure)) == 3
    assert len({axes.get_position().y0 for axes in pictures(figure)}) == 1
    assert all(name in words(figure) for name in ("red", "green", "blue"))


def test_title_and_long_method_are_on_the_picture() -> None:
    figure = draw_planes(scene(title="patient26 · image", about=("method  " + "very " * 60,)))
    assert "patient26 · image" in words(figure)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    assert all(text.get_window_extent(renderer).x1 <= figure.bbox.width for text in figure.texts)


# ---- bars


def test_bars_equal_the_contributions() -> None:
    values = np.array([1.5, -0.5, 0.25, 0.0])
    figure = draw_bars(values, ["FLAIR", "T1", "T1POST", "T2"])
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == values.tolist()
    assert is_red(np.array(bars[0].get_facecolor()))
    assert is_blue(np.array(bars[1].get_facecolor()))
    said = words(figure)
    assert "+1.5  (67%)" in said
    assert "-0.5  (22%)" in said
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["FLAIR", "T1", "T1POST", "T2"]
    assert figure.axes[0].get_xlim()[0] == -figure.axes[0].get_xlim()[1]


def test_no_percentages_where_values_do_not_add_up() -> None:
    assert "%" not in words(draw_bars(np.array([1.0, 2.0]), ["a", "b"], shares=False))


def test_many_features_keep_their_order_and_the_rest_is_summed() -> None:
    values = np.arange(40.0)
    figure = draw_bars(values, [f"f{i}" for i in range(40)])
    assert [bar.get_width() for bar in figure.axes[0].patches] == values[10:].tolist()
    assert "The 30 largest of 40; 10 others with a sum of +45 are not drawn." in words(figure)


@pytest.mark.parametrize("values", [np.zeros(2), np.array([np.nan, 1.0])], ids=["zero", "nan"])
def test_odd_bars_are_drawn(values: NDArray[np.float64]) -> None:
    figure = draw_bars(values, ["a", "b"])
    assert rasterize(figure).any()
    assert ("not finite" in words(figure)) == np.isnan(values).any()


def test_bars_need_a_name_each() -> None:
    with pytest.raises(InputError, match=r"\(3,\) and 2 names"):
        draw_bars(np.zeros(3), ["a", "b"])
    with pytest.raises(InputError, match="0 names"):
        draw_bars(np.zeros(0), [])


# ---- animation


def test_animation_is_a_color_gif_without_loss() -> None:
    moving = animate(scene(), frames=6)
    gif = Image.open(BytesIO(moving.encode()))
    assert gif.n_frames == len(moving.frames) == 6
    for number, frame in enumerate(moving.frames):
        gif.seek(number)
        np.testing.assert_array_equal(np.asarray(gif.convert("RGB")), moving.palette[frame])


def test_animation_colors_the_lesion_in_its_slices_only() -> None:
    shown = scene(prediction=None, label=None, affine=None)
    moving = animate(shown, frames=100)
    first, last = shown.box[2].start, shown.box[2].stop
    assert len(moving.frames) == last - first
    for index, frame in zip([*range(10, last), *range(first, 10)], moving.frames, strict=True):
        colors = moving.palette[frame][40:-30, :-70].astype(int)
        red = (colors[..., 0] - colors[..., 2] > 60).any()
        blue = (colors[..., 2] - colors[..., 0] > 60).any()
        assert red == blue == (9 <= index < 12)


@pytest.mark.parametrize("affine", [None, RAS], ids=["by-number", "in-the-body"])
def test_animation_begins_at_the_strongest_slice_even_if_its_neighbors_are_skipped(
    affine: NDArray[np.float64] | None,
) -> None:
    shown = scene(prediction=None, label=None, affine=affine)
    whole = animate(shown, frames=100)
    for frames in [1, 2, 3, *range(4, len(whole.frames), 3)]:
        few = animate(shown, frames)
        assert len(few.frames) == frames
        np.testing.assert_array_equal(few.frames[0], whole.frames[0])
        assert len(np.unique(few.frames, axis=0)) == frames
    colors = whole.palette[whole.frames[0]][40:-30, :-70].astype(int)
    assert (colors[..., 0] - colors[..., 2] > 60).any()


def test_animation_of_a_large_volume_stays_small() -> None:
    shape = (20, 600, 500)
    large = np.broadcast_to(np.float32(1), (1, *shape)).copy()
    large[0, 9] = 2
    moving = animate(Scene(large, large), frames=3, side=100)
    assert len(moving.frames) == 3
    assert max(moving.frames.shape[1:]) < 300


# ---- pixels and innocence


def test_png_keeps_what_can_be_seen() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    back = np.asarray(Image.open(BytesIO(encode_png(pixels))))
    assert back.shape == pixels.shape
    assert np.abs(back.astype(int) - pixels).max() < 4
    assert np.asarray(Image.open(BytesIO(encode_png(np.full((2, 2, 3), 255, np.uint8))))).min() == 255


def test_drawing_touches_nothing_global() -> None:
    settings = dict(matplotlib.rcParams)
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    shown = scene()
    maps = shown.attribution.copy()
    for figure in (draw_planes(shown), draw_montage(shown), draw_bars(np.ones(2), ["a", "b"])):
        rasterize(figure)
    animate(shown).encode()
    assert not Gcf.figs
    assert dict(matplotlib.rcParams) == settings
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    np.testing.assert_array_equal(shown.attribution, maps)


# ---- modalities


def test_numbers_of_a_cohort_fit_onto_the_sheet() -> None:
    values, intervals = (
        np.array([[0.00237, 3.1], [0.00237, -2.9]]),
        np.array([[-0.00027, 0.0051], [-3.0, 3.2]]),
    )
    figure = draw_cohort(values, ["film", "record"], intervals)
    rasterize(figure)
    boxes = [text.get_window_extent() for text in figure.texts]
    assert max(box.x1 for box in boxes) <= figure.bbox.width
    assert "+0.00237  [-0.00027, +0.0051]" in words(figure)
