"""The report: one file that needs nothing else, holds everything, and tells no more than it may."""

from __future__ import annotations

import base64
import errno
import html
import json
import math
import os
import re
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grounded import CASES, GATES, a_case, a_test, grounding
from matplotlib.text import Text
from PIL import Image

from monai_xai import ModalityCohort
from monai_xai.errors import InputError
from monai_xai.figures import Line, Scene, draw_curves, draw_null, draw_planes, draw_spread, rasterize, stamp
from monai_xai.figures.evidence import rasterize_on_white
from monai_xai.modalities import ModalityExplanation
from monai_xai.report import figures_of_grounding, scalars_of_grounding, write_report
from monai_xai.report.lamps import lamps_of
from monai_xai.report.markup import Html, element, number
from monai_xai.report.names import Disguise
from monai_xai.report.pictures import figure_of_case, scene_of_case

HOSTILE = '<script>alert("x")</script> O\'Neil & Müller 患者 \x00\ud800'
BARE: dict[str, Any] = {"tests": (), "curves": {}}  # what makes a report large is left out
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page as a browser takes it apart: elements with their attributes, and all text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data + "\n"

    def of(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]


def written(folder: Path, results: Any, **options: Any) -> tuple[str, Page]:
    file = write_report(results, folder / "report.html", **options)
    source = file.read_text(encoding="utf-8")
    return source, Page(source)


def pictures(page: Page) -> list[Image.Image]:
    sources = [image["src"] for image in page.of("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return [Image.open(BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]


def cohort(*cases: str) -> ModalityCohort:
    """Return what two modalities contribute in every case."""
    found = ModalityCohort()
    for case in cases:
        one = {"zero": torch.tensor([[1.0, -0.25]])}
        pairs = {"zero": torch.tensor([[[0.0, 0.2], [0.2, 0.0]]])}
        explanation = ModalityExplanation(
            modalities=("FLAIR", "<b>T1</b>"),
            values=one,
            standard_errors={"zero": torch.tensor([[0.1, 0.05]])},
            interactions=pairs,
            leave_one_out=one,
            single_gain=one,
            score=torch.tensor([1.75]),
            baseline_scores={"zero": torch.tensor([1.0])},
            agreement=torch.tensor([1.0]),
            parts={},
            maps={},
            part_names={},
            seconds=0.1,
            target=f"target of {case}",
            seed=0,
        )
        found.add(case, explanation)
    return found


def test_every_test_and_every_case_is_on_the_page(tmp_path: Path) -> None:
    results = grounding()
    _, page = written(tmp_path, results)
    for test in results.tests:
        for words in (f"{test.id} {test.title}", test.message):
            assert page.words.count(words) >= 2, words  # in the table and on the engineer's page
    for case in CASES:
        assert f"Case {case}" in page.words
    assert {section["id"] for section in page.of("section")} == {
        "cohort", "engineer", "case-0", "case-1",
    }  # fmt: skip
    assert page.words.count("This tests the explanation, not the correctness of the prediction.") == 3
    assert "Masks of at least 20 patients, for T8." in page.words
    assert "3.25" in page.words
    assert "\N{MINUS SIGN}1.5" in page.words
    assert not page.open


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    hostile = grounding(cases=CASES[:1], sentence="see https://evil.example/x.png")
    source, page = written(tmp_path, hostile)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in page.elements
    }
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "action", "srcset", "data"):
                assert value.startswith(("data:", "#"))
    style = source.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)
    policy = next(tag["content"] for tag in page.of("meta") if "http-equiv" in tag)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link["href"][1:] for link in page.of("a")} <= targets


def test_hostile_words_are_only_ever_words(tmp_path: Path) -> None:
    name, attribute = f"{HOSTILE}a", '" onload="alert(1)" x="'
    tests = (
        a_test(
            "T7", (name,), title=HOSTILE, message=HOSTILE, threshold=HOSTILE, origin=HOSTILE, gate=HOSTILE
        ),
        a_test(f"T2{HOSTILE}", (attribute,)),
    )
    results = grounding(
        sentence=HOSTILE,
        tests=tests,
        missing=(HOSTILE,),
        cases=(a_case(name), a_case(attribute)),
        curves={f"deletion: {HOSTILE}": {"x": (0.0,), "y": (1.0,)}, f"{HOSTILE}$x^{{$: a": {"x": (0.0,), "y": (1.0,)}},
        configuration={HOSTILE: HOSTILE, "target": HOSTILE, "nested": {HOSTILE: [HOSTILE]}, "unit": HOSTILE},
    )  # fmt: skip
    source, page = written(tmp_path, results, title=HOSTILE, modalities=cohort(name, attribute))
    assert "<script" not in source
    assert "<b>T1" not in source
    assert not any("onload" in attributes for _, attributes in page.elements)
    assert not {"\x00", "\ud800"} & set(source)
    shown = HOSTILE.replace("\x00", "\N{REPLACEMENT CHARACTER}").replace(
        "\ud800", "\N{REPLACEMENT CHARACTER}"
    )
    assert page.words.count(shown) > 10
    assert any(attribute in image["alt"] for image in page.of("img"))
    assert not page.open


def test_element_escapes_all_but_its_own() -> None:
    inner = element("b", "<i>")
    assert element("p", inner, "<", title='"<') == '<p title="&quot;&lt;"><b>&lt;i&gt;</b>&lt;</p>'
    assert isinstance(inner, Html)
    assert not isinstance(inner + "<", Html)


def test_anonymized_report_holds_no_name_of_a_case(tmp_path: Path) -> None:
    names = ("patient26", "José_Müller", "7", 'a<b>"c')
    tests = tuple(
        a_test(id_, names, message=f"worst: {', '.join(names)}; PATIENT26 too", title="of patient26")
        for id_ in ("T5", "T7")
    )
    results = grounding(
        cases=tuple(a_case(name) for name in names),
        tests=tests,
        sentence="José_Müller fails",
        missing=("a second scan of patient26",),
        curves={"deletion: patient26": {"x": (0.0, 1.0), "y": (1.0, 0.0)}},
        configuration={
            "files": [Path("/data/patient26_flair.nii.gz")],
            "patient26": {"José_Müller": 1.0},
            "seed": 0,
            "left_out": {"never shown": "its map is constant"},
        },
    )
    source, page = written(
        tmp_path, results, anonymize=True, title="Report on patient26", modalities=cohort(*names)
    )
    text = html.unescape(source).casefold()
    for name in ("patient26", "josé_müller", 'a<b>"c', "josé", "never shown"):
        assert name not in text
    assert "Case 7\n" not in page.words
    assert not any(picture.info or picture.getexif() for picture in pictures(page))
    headings = re.findall(r"Case ([0-9a-f]{8})\n", page.words)
    assert len(set(headings)) == 4
    for (
        heading
    ) in headings:  # one name for a case on all pages: its page, the list of pages, the table, the messages
        assert page.words.count(heading) >= 5


def test_hashes_agree_under_one_salt_and_not_without_it() -> None:
    one, same, other = (Disguise(["patient26"], salt) for salt in ("a", "a", "b"))
    assert one.names == same.names != other.names
    assert Disguise(["patient26"]).names != Disguise(["patient26"]).names
    assert sha256(b"patient26").hexdigest()[:8] not in one.names["patient26"]


def test_disguise_leaves_words_that_only_hold_a_short_name() -> None:
    disguise = Disguise(["7", "26", "patient7"], "salt")
    names = disguise.names
    assert (
        disguise.words("7 of 26, 0.76, 17, patient7x")
        == f"{names['7']} of {names['26']}, 0.76, 17, {names['patient7']}x"
    )


def test_procedure_keeps_its_words_where_cases_are_called_like_tests(tmp_path: Path) -> None:
    results = grounding(cases=("P1", "T7"), curves={})
    _, page = written(tmp_path, results, anonymize=True)
    assert "P1 Title of " in page.words
    assert "Case P1" not in page.words


@pytest.mark.parametrize("dimensions", [2, 3])
def test_artifact_is_stamped_on_every_map_and_nothing_else_is(dimensions: int) -> None:
    good, bad = (grounding(verdict, tests=(), dimensions=dimensions) for verdict in ("GROUNDED", "ARTIFACT"))
    for case in good.cases:
        plain, stamped = (figure_of_case(results, case) for results in (good, bad))
        assert not [text for text in plain.findobj(Text) if text.get_text() == "ARTIFACT"]
        before, after = (rasterize(figure).astype(int) for figure in (plain, stamped))
        changed = np.abs(before - after).max(-1) > 40
        height, width = changed.shape
        maps = [axes for axes in stamped.axes if axes.images and axes.get_position().width * width > 60]
        assert len(maps) == (1 if dimensions == 2 else 3)
        inside = np.zeros_like(changed)
        for axes in maps:
            left, bottom, wide, tall = axes.get_position().bounds
            box = (
                slice(int((1 - bottom - tall) * height), int((1 - bottom) * height) + 1),
                slice(int(left * width), int((left + wide) * width) + 1),
            )
            assert changed[box].mean() > 0.02
            inside[box] = True
        assert not changed[~inside].any()


def test_stamp_reaches_the_file(tmp_path: Path) -> None:
    sizes = {}
    for verdict in ("GROUNDED", "ARTIFACT"):
        _, page = written(tmp_path, grounding(verdict, **BARE))
        found = zip(pictures(page), page.of("img"), strict=True)
        (image,) = [seen for seen, tag in found if "Map of case patient26" in tag["alt"]]
        pixels = np.asarray(image).astype(int)
        sizes[verdict] = ((pixels[..., 0] > 230) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)).sum()
        assert ("ARTIFACT: this map does not describe the model" in page.words) == (verdict == "ARTIFACT")
    assert sizes["ARTIFACT"] > 1000 > 10 >= sizes["GROUNDED"]


def test_undefined_numbers_are_not_available(tmp_path: Path) -> None:
    undefined = dict.fromkeys(("value", "p"), math.nan) | {
        "interval": (math.nan, 1.0),
        "p_corrected": math.inf,
    }
    nothing = a_test("T5", CASES, per_case=dict.fromkeys(CASES, math.nan), **undefined)
    case = a_case("patient26", score=math.nan, baseline_score=math.inf, values={"T5": math.nan})
    _, page = written(tmp_path, grounding(tests=(nothing,), cases=(case,)))
    assert not re.search(r"\b(nan|NaN|inf|None)\b", page.words)
    assert page.words.count("n/a") >= 12
    assert "T5: n/a here, n/a in the cohort" in page.words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "n/a"),
        (None, "n/a"),
        (-math.inf, "n/a"),
        (0.0, "0"),
        (-0.00123456, "\N{MINUS SIGN}0.00123"),
        (12, "12"),
        (1e-12, "1e-12"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers(value: Any, words: str) -> None:
    assert number(value) == words


def test_maps_that_cannot_be_drawn_take_nothing_from_the_report(tmp_path: Path) -> None:
    cases = (
        a_case("flat", attribution=np.zeros((32, 40))),
        a_case("broken", attribution=np.full((32, 40), np.nan)),
        a_case("torn", attribution=np.zeros((3, 3))),
        a_case("bare", region=None, prediction=None),
    )
    _, page = written(tmp_path, grounding(cases=cases, **BARE))
    assert "The map is not drawn: A picture needs maps of shape" in page.words
    assert "(none was given)" in page.words
    assert len([tag for tag in page.of("img") if tag["alt"].startswith("Map of case")]) == 3


def test_every_image_of_a_case_has_its_map(tmp_path: Path) -> None:
    pet = replace(a_case("", number=1), name="pet")
    case = replace(a_case("patient26"), further=(pet,))
    _, page = written(tmp_path, grounding(tests=(), cases=(case,), curves={}))
    seen = [tag["alt"] for tag in page.of("img") if tag["alt"].startswith("Map of case")]
    assert seen == ["Map of case patient26, image", "Map of case patient26, pet"]


def test_the_picture_of_a_case_keeps_its_orientation() -> None:
    case = replace(a_case("a", 3), affine=np.diag([-1.0, -1.0, 2.0, 1.0]))
    assert scene_of_case(case).geometry.affine is not None
    assert scene_of_case(a_case("a", 3)).geometry.affine is None


def test_nothing_at_all_is_still_a_report(tmp_path: Path) -> None:
    empty = grounding("INCONCLUSIVE", tests=(), cases=(), curves={}, configuration={}, missing=())
    _, page = written(tmp_path, empty)
    assert "No test was done." in page.words
    assert [lamp.color for lamp in lamps_of(empty)] == ["grey"] * 4


@pytest.mark.parametrize(
    ("statuses", "colors"),
    [
        ({}, ["grey"] * 4),
        ({"T2": "PASS", "T5": "FAIL", "T7": "PASS", "T8": "PASS", "T6": "PASS"}, ["green", "red", "green", "green"]),
        ({"T2": "PROVISIONAL", "T7": "PASS", "T8": "NA", "T12": "FAIL"}, ["amber", "grey", "amber", "grey"]),
        ({"T6": "PASS", "T12": "FAIL", "T8": "PASS"}, ["grey", "grey", "amber", "amber"]),
        ({"T2": "PASS", "T4": "FAIL", "T7": "PASS", "T5": "INCONCLUSIVE"}, ["amber", "amber", "amber", "grey"]),
        ({"T2": "PASS", "T3": "NA", "T8": "FAIL", "T7": "PASS", "T6b": "PASS"}, ["green", "grey", "red", "green"]),
    ],
    ids=["none", "deletion fails", "provisional", "retest", "class", "prior"],
)  # fmt: skip
def test_lamps(statuses: dict[str, Any], colors: list[str]) -> None:
    results = grounding(tests=tuple(a_test(id_, CASES, status=status) for id_, status in statuses.items()))
    lamps = lamps_of(results)
    assert [lamp.color for lamp in lamps] == colors
    assert len({lamp.sentence for lamp in lamps}) == 4
    for lamp in lamps:  # what is open says why
        assert lamp.color != "amber" or any(test.id in lamp.sentence for test in lamp.tests)


def test_cases_on_the_wrong_side_come_first_and_are_marked(tmp_path: Path) -> None:
    tests = (
        a_test("T2", CASES, per_case={"good": 0.85, "bad": 0.8, "worst": 0.95}),
        a_test("T5", CASES, per_case={"good": 0.6, "bad": 0.4, "worst": -0.2}),
        a_test("T12", CASES, status="FAIL", per_case={"good": -9.0, "bad": math.nan}),
    )
    results = grounding(tests=tests, cases=("good",), curves={})
    source, _ = written(tmp_path, results)
    rows = re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", source.split("those that fail most first")[1])
    assert [name for name, _ in rows[:3]] == ["worst", "bad", "good"]
    assert [row.count("number bad") for _, row in rows[:3]] == [2, 1, 0]
    assert "<td>T2, T5</td>" in rows[0][1]
    strict = {"settings": {"unchanged": 0.5}}
    source, _ = written(tmp_path, grounding(tests=tests, cases=("good",), curves={}, configuration=strict))
    assert source.count("number bad") == 5  # the thresholds are those of the result


def test_modalities_have_their_bars(tmp_path: Path) -> None:
    _, page = written(tmp_path, grounding(**BARE), modalities=cohort(*CASES))
    alts = [tag["alt"] for tag in page.of("img")]
    assert sum(alt.startswith("Contribution of each modality") for alt in alts) == 2
    assert sum(alt.startswith("Modalities, zero") for alt in alts) == 2
    assert "Not computed" not in page.words


def test_configuration_is_hashed_as_it_is_printed(tmp_path: Path) -> None:
    results = grounding(cases=(), tests=(), curves={})
    text = json.dumps(
        results.as_dict()["configuration"], sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    _, page = written(tmp_path, results)
    assert sha256(text.encode()).hexdigest() in page.words


def test_report_is_the_same_when_written_again(tmp_path: Path) -> None:
    results = grounding(cases=CASES[:1], tests=(a_test("T2", CASES), a_test("T7", CASES)))
    assert written(tmp_path, results)[0] == written(tmp_path, results)[0]


def test_old_file_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    file.write_text("old")

    def full(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"report\.html is not written .*No space left.*free disk space"):
        write_report(grounding(cases=(), tests=()), file)
    assert file.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError, match=r"folder/report\.html is not written"):
        write_report(grounding(cases=(), tests=()), tmp_path / "folder" / "report.html")


def test_figures_and_scalars_of_all_results() -> None:
    results = grounding()
    names = [name for name, _ in figures_of_grounding(results)]
    tests = [f"test/{id_}" for id_ in GATES if id_ != "T12"]
    assert names == [*tests, "curves/deletion", "curves/cascade", *(f"case/{i}" for i in range(2))]
    scalars = dict(scalars_of_grounding(results))
    assert scalars["verdict"] == 4
    assert scalars["T5/passed"] == 1
    assert scalars["T8/passed"] == 0.5
    assert not any(name.startswith("T12") for name in scalars)
    assert all(math.isfinite(value) for value in scalars.values())


@pytest.mark.parametrize("null", [(0.5,) * 20, (0.5,), (math.nan, 0.5), tuple(range(2000))], ids=len)
def test_null_marks_the_value_where_it_is(null: tuple[float, ...]) -> None:
    figure = draw_null(null, 0.7)
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata()[0] == 0.7
    low, high = axes.get_xlim()
    assert low < 0.7 < high
    assert sum(bar.get_height() for bar in axes.patches) == np.isfinite(null).sum()


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InputError, match="finite value of the null"):
        draw_null((math.nan,), 0.0)
    with pytest.raises(InputError, match="finite value"):
        draw_spread((), 0.0, (0.0, 1.0))
    with pytest.raises(InputError, match="one curve"):
        draw_curves({})


def test_curves_keep_their_numbers_and_bands() -> None:
    figure = draw_curves(
        {"map": Line((0, 1), (1, 0)), "random": Line((0, 1), (1, 0.5), (0.9, 0.4), (1, 0.6))}
    )
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1, 0], [1, 0.5]]
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().y0 == pytest.approx(0.4)


def test_white_paper_keeps_anatomy_and_turns_the_rest() -> None:
    scene = Scene(np.zeros((1, 8, 8)), np.linspace(0, 1, 64).reshape(1, 8, 8))
    figure = draw_planes(scene)
    turned = rasterize_on_white(figure, keep_pictures=True)
    dark = rasterize(figure)
    assert dark[0, 0].max() < 30
    assert turned[0, 0].tolist() == [255, 255, 255]
    left, bottom, wide, tall = figure.axes[0].get_position().bounds
    height, width = dark.shape[:2]
    middle = round((1 - bottom - tall / 2) * height), round((left + wide / 2) * width)
    assert turned[middle].tolist() == dark[middle].tolist()


def test_the_legend_is_on_white_paper() -> None:
    case = a_case("a", region=None)
    figure = figure_of_case(
        grounding(tests=(), cases=(case,)), case
    )  # "no label given", and a line for the prediction
    chips = [axes for axes in figure.axes if not axes.images]
    assert [len(axes.lines) for axes in chips] == [1, 0]
    pixels = rasterize_on_white(figure, keep_pictures=True)
    height, width = pixels.shape[:2]
    for axes in chips:
        left, bottom, wide, tall = axes.get_position().bounds
        assert (
            pixels[round((1 - bottom - tall / 2) * height) - 8, round((left + wide) * width) - 2] > 195
        ).all()


def test_voxel_size_stretches_a_picture_without_an_affine() -> None:
    arrays = np.zeros((1, 8, 8, 4)), np.random.default_rng(0).normal(size=(1, 8, 8, 4))
    scene = Scene(*arrays, spacing=(1.0, 2.0, 5.0))
    assert scene.geometry.spacing == (1.0, 2.0, 5.0)
    assert scene.geometry.planes[0].name == "axis 2"  # no letters are made up
    with pytest.raises(InputError, match="positive voxel size"):
        Scene(*arrays, spacing=(1.0, 0.0, 5.0))


def test_stamp_needs_no_font_for_math() -> None:
    figure = figure_of_case(grounding(), a_case("a"))
    stamp(figure, "NOT $\\frac")
    rasterize(figure)
