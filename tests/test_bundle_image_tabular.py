"""The bundle image_tabular_classification: its phantom tells the truth, bad tables are refused, and it runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
from PIL import Image
from torch import nn

from bundles import SCHEMA, read_config, run_bundle, scripts_of
from monai_xai import TableSchema

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "image_tabular_classification"
CONFIGS = BUNDLE / "configs"
SCHEMAS = ("clinical.yaml", "clinical_covid19.yaml", "clinical_chestxray14.yaml")
PLANTS = ("image", "table", "redundant", "xor", "shortcut")
FACTS = {
    "image": {"opacity"},
    "table": {"high_crp"},
    "redundant": {"opacity", "high_crp"},
    "shortcut": {"marker"},
}
BALANCED = 120  # patients, of whom every fact has half, in training and in what is held out
CASES = 160  # their films

pytestmark = [
    # MONAI warns of every config that it runs, because a config is code.
    pytest.mark.filterwarnings("ignore::UserWarning:monai"),
    pytest.mark.filterwarnings("ignore::FutureWarning:monai"),
]


@pytest.fixture(scope="module")
def scripts() -> Iterator[ModuleType]:
    with scripts_of(BUNDLE) as package:
        yield package


# --- the phantom -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(scripts: ModuleType) -> dict[str, list[Any]]:
    """All films of a balanced phantom, by plant."""
    return {plant: list(scripts.make_films(scripts.Phantom(plant, BALANCED))) for plant in PLANTS}


def _labels(films: list[Any]) -> np.ndarray:
    return np.array([film.record["pneumonia"] == "1" for film in films])


def _facts(films: list[Any]) -> dict[str, np.ndarray]:
    return {
        name: np.array([bool(film.truth[name]) for film in films])
        for name in ("opacity", "high_crp", "marker")
    }


def _is_held_out(films: list[Any]) -> np.ndarray:
    return np.array([int(film.record["patient_id"][1:]) % 5 == 0 for film in films])


def test_same_phantom_twice_is_equal(scripts: ModuleType, films: dict[str, list[Any]]) -> None:
    again = list(scripts.make_films(scripts.Phantom("xor", BALANCED)))
    assert len(again) == CASES
    for one, other in zip(films["xor"], again, strict=True):
        assert np.array_equal(one.image, other.image)
        assert (one.record, one.truth) == (other.record, other.truth)


def test_every_film_is_another(scripts: ModuleType, films: dict[str, list[Any]]) -> None:
    first, second, other = films["image"][:3]
    reseeded = next(iter(scripts.make_films(scripts.Phantom("image", BALANCED, seed=1))))
    assert first.record["patient_id"] == second.record["patient_id"] != other.record["patient_id"]
    for film in (second, other, reseeded):
        assert not np.array_equal(first.image, film.image)


@pytest.mark.parametrize("plant", PLANTS)
def test_plants_share_pictures_and_records(films: dict[str, list[Any]], plant: str) -> None:
    changes = {"pneumonia", "crp"} if plant == "redundant" else {"pneumonia"}
    for one, other in zip(films["image"], films[plant], strict=True):
        assert np.array_equal(one.image, other.image)
        differ = {column for column in one.record if one.record[column] != other.record[column]}
        assert differ <= changes


@pytest.mark.parametrize("plant", PLANTS)
def test_label_is_what_was_planted_and_nothing_else(films: dict[str, list[Any]], plant: str) -> None:
    labels, facts = _labels(films[plant]), _facts(films[plant])
    for part in (_is_held_out(films[plant]), ~_is_held_out(films[plant])):
        assert labels[part].mean() == 0.5
        for name, fact in facts.items():
            agreement = (fact[part] == labels[part]).mean()
            assert agreement == (1.0 if name in FACTS.get(plant, ()) else 0.5), name
    if plant == "xor":
        assert np.array_equal(labels, facts["opacity"] != facts["high_crp"])


@pytest.mark.parametrize("plant", PLANTS)
def test_other_variables_know_nothing_of_the_label(films: dict[str, list[Any]], plant: str) -> None:
    labels = _labels(films[plant])
    noise = ["age", "temperature", "heart_rate", "oxygen_saturation", "sex", "smoking", "view_position"]
    for column in noise:
        values = [film.record[column] for film in films[plant]]
        numbers = np.array([float(v) if re.fullmatch(r"[\d.]+", v) else hash_of(v) for v in values])
        assert abs(np.corrcoef(numbers, labels)[0, 1]) < 4 / np.sqrt(CASES), column


def hash_of(level: str) -> float:
    return {"F": 0, "M": 1, "never": 0, "former": 1, "current": 2, "PA": 0, "AP": 1}[level]


def test_crp_is_high_or_low_and_only_a_low_one_is_missing(films: dict[str, list[Any]]) -> None:
    high = _facts(films["table"])["high_crp"]
    crp = np.array([float(film.record["crp"] or "nan") for film in films["table"]])
    assert (crp[high] >= 60).all()
    assert not (crp[~high] > 20).any()
    assert 0.15 < np.isnan(crp[~high]).mean() < 0.45


def test_opacity_is_seen_where_the_mask_says(scripts: ModuleType, films: dict[str, list[Any]]) -> None:
    with_opacity = [film for film in films["image"] if film.truth["opacity"]]
    mean = np.mean([film.image for film in films["image"] if not film.truth["opacity"]], axis=0)
    for film in with_opacity:
        mask = film.mask == 1
        assert 15 < mask.sum() < 300
        truth = film.truth["opacity"]
        assert mask[truth["row"], truth["column"]]
    contrast = [float((film.image - mean)[film.mask == 1].mean()) for film in with_opacity]
    assert np.mean(contrast) > 30, "gray values of 255"


def test_marker_is_bright_and_in_the_corner(films: dict[str, list[Any]]) -> None:
    for film in films["image"]:
        rows, columns = np.nonzero(film.mask == 2)
        assert bool(len(rows)) == film.truth["marker"]
        if len(rows):
            assert rows.max() < 12
            assert columns.min() > 50
            assert film.image[rows, columns].min() > 170
            assert np.median(film.image[:12, 52:]) < 80


@pytest.mark.parametrize("wrong", [{"plant": "age"}, {"n_patients": 7}], ids=str)
def test_phantom_refuses_what_it_cannot_make(scripts: ModuleType, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        scripts.Phantom(**wrong)


@pytest.fixture(scope="module")
def phantoms(scripts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty patients on disk."""
    return Path(scripts.write_phantom(tmp_path_factory.mktemp("phantoms"), scripts.Phantom("image", 40)))


def test_phantom_is_written_once_with_the_truth_beside_it(scripts: ModuleType, phantoms: Path) -> None:
    assert sorted(child.name for child in phantoms.iterdir()) == [
        "images",
        "masks",
        "metadata.csv",
        "truth.json",
    ]
    truth = json.loads((phantoms / "truth.json").read_text())
    assert truth["decides"] == {"image": "opacity"}
    assert {f"{name}.png" for name in truth["cases"]} == {
        file.name for file in (phantoms / "images").iterdir()
    }
    written = {file: file.stat().st_mtime_ns for file in phantoms.rglob("*") if file.is_file()}
    assert scripts.write_phantom(phantoms.parent, scripts.Phantom("image", 40)) == str(phantoms)
    assert written == {file: file.stat().st_mtime_ns for file in phantoms.rglob("*") if file.is_file()}
    assert [child.name for child in phantoms.parent.iterdir()] == [phantoms.name]


# --- the schema ---------------------------------------------------------------------------------------------------


ROW = {
    "age": "75", "temperature": "38.5", "heart_rate": "100", "crp": "150", "oxygen_saturation": "91",
    "sex": "M", "smoking": "former", "view_position": "PA",
}  # fmt: skip


@pytest.fixture(scope="module")
def schema(scripts: ModuleType) -> Any:
    return scripts.read_schema(CONFIGS / "clinical.yaml")


def test_row_becomes_a_vector(schema: Any) -> None:
    vector = schema.encode(ROW)
    assert vector.dtype == torch.float32
    torch.testing.assert_close(vector, torch.tensor([1.0, 1, 1, 2, 0, -1, 0, 1, 0, 1, 0, 1, 0]))


@pytest.mark.parametrize("missing", ["", " ", "NaN", "NA"], ids=repr)
def test_missing_value_is_zero_with_its_indicator(schema: Any, missing: str) -> None:
    assert schema.encode({**ROW, "crp": missing})[3:5].tolist() == [0, 1]


def test_each_variable_has_its_columns(schema: Any) -> None:
    assert schema.columns == {
        "age": [0], "temperature": [1], "heart rate": [2], "CRP": [3, 4], "oxygen saturation": [5],
        "sex": [6, 7], "smoking": [8, 9, 10], "view position": [11, 12],
    }  # fmt: skip


def test_every_column_of_the_vector_has_a_name(schema: Any) -> None:
    assert schema.column_names == [
        "age", "temperature", "heart rate", "CRP", "CRP: missing", "oxygen saturation", "sex: F", "sex: M",
        "smoking: never", "smoking: former", "smoking: current", "view position: PA", "view position: AP",
    ]  # fmt: skip


@pytest.mark.parametrize("file", SCHEMAS)
def test_explanations_read_the_same_schema(scripts: ModuleType, file: str) -> None:
    mine, theirs = scripts.read_schema(CONFIGS / file), TableSchema.from_file(CONFIGS / file)
    assert theirs.players == {name: tuple(columns) for name, columns in mine.columns.items()}
    row = {
        v.column: ("" if v.missing else v.levels[-1] if v.levels else str(v.center + v.scale))
        for v in mine.variables
    }
    torch.testing.assert_close(theirs.encode(row), mine.encode(row))


def _broken_schema(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = yaml.safe_load((CONFIGS / "clinical.yaml").read_text())
    change(content)
    file = tmp_path / "clinical.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("table"), "'table' is missing"),
        (lambda c: c["variables"][0].update(kind="number"), "'age': kind='number' must be one of continuous"),
        (lambda c: c["variables"][0].update(centre=1), "'age' has centre.*did you mean 'center'"),
        (lambda c: c["variables"][0].update(levels=["a"]), "'age' is continuous: levels are for"),
        (lambda c: c["variables"][0].update(scale=0), "'age': scale must not be 0"),
        (lambda c: c["variables"][5].update(levels=[True, False]), "truth value.*quotes"),
        (lambda c: c["variables"][1].update(reference_range=[37, 36]), "from low to high"),
        (lambda c: c["variables"].append(c["variables"][0]), "different names"),
        (lambda c: c["possible"].update(crp=[0, 1]), "`possible` names .*crp"),
    ],
    ids=["table", "kind", "unknown key", "levels", "scale", "yes and no", "range", "names", "possible"],
)
def test_broken_schema_is_refused(
    scripts: ModuleType, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scripts.read_schema(_broken_schema(tmp_path, change))


# --- data ---------------------------------------------------------------------------------------------------------


def _patients(cases: list[dict[str, Any]]) -> set[str]:
    return {case["case_id"].split("_")[0] for case in cases}


def test_patients_are_on_one_side_of_the_split(scripts: ModuleType, schema: Any, phantoms: Path) -> None:
    train, held_out = scripts.training_cases(phantoms, schema), scripts.held_out_cases(phantoms, schema)
    assert not _patients(train) & _patients(held_out)
    assert _patients(held_out) == {f"p{number:03d}" for number in range(0, 40, 5)}
    assert len(train) + len(held_out) == 54
    assert set(train[0]) == {"case_id", "image", "clinical", "label"}


def test_named_patients_replace_the_split(scripts: ModuleType, schema: Any, phantoms: Path) -> None:
    held_out = scripts.held_out_cases(phantoms, schema, test=["p001", "p003"], exclude="p003_b")
    assert [case["case_id"] for case in held_out] == ["p001_a", "p003_a"]
    train = scripts.training_cases(phantoms, schema, test=["p001", "p003"], exclude="p003_b")
    assert _patients(train) == {f"p{number:03d}" for number in range(40)} - {"p001", "p003"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test": ["p77"]}, r"no patient p77 \(did you mean"),
        ({"test": []}, "names no patient"),
        ({"exclude": ["p001"]}, r"no case p001 \(did you mean 'p001_a'"),
        ({"test": [f"p{number:03d}" for number in range(1, 40)]}, "2 cases .*all of them no pneumonia"),
    ],
    ids=["patient", "nobody", "case", "nothing left"],
)
def test_impossible_splits_are_refused(
    scripts: ModuleType, schema: Any, phantoms: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scripts.training_cases(phantoms, schema, **settings)


def test_folder_without_table_is_refused_with_the_cure(
    scripts: ModuleType, schema: Any, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no metadata\.csv.*docs/README.md"):
        scripts.training_cases(tmp_path, schema)


@pytest.fixture
def broken(phantoms: Path, tmp_path: Path) -> Path:
    """Phantoms that a test may break."""
    return Path(shutil.copytree(phantoms, tmp_path / "broken"))


Table = list[dict[str, str]]


def _edit(root: Path, change: Callable[[Table], Any]) -> None:
    """Change the rows of the table; those of line 4 are of p001_a."""
    path = root / "metadata.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _rename(old: str, new: str) -> Callable[[Table], None]:
    def change(rows: Table) -> None:
        for row in rows:
            row[new] = row.pop(old)

    return change


def _set(column: str, value: str) -> Callable[[Table], None]:
    return lambda rows: rows[2].update({column: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _rename("crp", "CRP"),
            r"no column 'crp' \(did you mean 'CRP'\?\), set by `column` of the variable 'CRP'",
        ),
        (_rename("pneumonia", "diagnosis"), "no column 'pneumonia'.*`table: label`.*Rename"),
        (_set("sex", "Female"), r"line 4 \(p001_a\): column 'sex': 'Female' is none of the levels F, M"),
        (_set("smoking", "Current"), r"column 'smoking': 'Current' .*did you mean 'current'"),
        (
            _set("temperature", "101.3"),
            r"column 'temperature': 101.3 °C is impossible .*such as °F\? Convert",
        ),
        (_set("oxygen_saturation", "0.97"), r"column 'oxygen_saturation': 0.97 % .*a share of 1"),
        (
            _set("temperature_unit", "°F"),
            r"column 'temperature_unit': 'temperature' is in '°F', the schema says '°C'",
        ),
        (
            _set("CRP_unit", "mg/dL"),
            r"column 'CRP_unit': 'crp' is in 'mg/dL', the schema says 'mg/L'. Convert",
        ),
        (
            _set("age", ""),
            r"line 4 \(p001_a\): column 'age': is missing, which the schema does not allow. Fill it in",
        ),
        (_set("age", "nan"), "column 'age': is missing"),
        (_set("age", "058Y"), "column 'age': '058Y' is no number"),
        (
            _set("pneumonia", "2"),
            r"line 4 \(p001_a\): column 'pneumonia': '2' is no label, expected 0 .* or 1",
        ),
        (_set("pneumonia", ""), r"column 'pneumonia': has no label in line 4 \(p001_a\)"),
        (_set("image", "p000_a.png"), r"line 4 \(p000_a\): line 2 has this name already"),
        (_set("image", ""), "line 4 .*no file name"),
        (_set("patient_id", ""), r"line 4 \(p001_a\): has no patient"),
    ],
    ids=lambda value: None if callable(value) else re.sub(r"\W+", "-", value)[:40],
)
def test_bad_table_is_refused_by_row_and_column(
    scripts: ModuleType, schema: Any, broken: Path, change: Callable[[Table], Any], message: str
) -> None:
    _edit(broken, change)
    with pytest.raises(ValueError, match=message):
        scripts.training_cases(broken, schema)


def test_many_bad_rows_are_counted(scripts: ModuleType, schema: Any, broken: Path) -> None:
    _edit(broken, lambda rows: [row.update(temperature="310") for row in rows])
    with pytest.raises(ValueError, match=r"(?s)line 2 .*line 6 .*and 49 more rows like these") as caught:
        scripts.training_cases(broken, schema)
    assert "line 7" not in str(caught.value)


def test_unquoted_comma_is_refused(scripts: ModuleType, schema: Any, broken: Path) -> None:
    table = broken / "metadata.csv"
    table.write_text(table.read_text().replace("never", "never, ever", 1))
    with pytest.raises(ValueError, match="line 2: has more cells than the table has columns"):
        scripts.training_cases(broken, schema)


def test_missing_and_unreadable_images_are_refused(scripts: ModuleType, schema: Any, broken: Path) -> None:
    image = broken / "images" / "p001_a.png"
    image.write_text("not found")
    with pytest.raises(ValueError, match=r"line 4 \(p001_a\): .*no readable image .*--exclude_cases"):
        scripts.training_cases(broken, schema)
    image.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"line 4 \(p001_a\): there is no image .*p001_a\.png\. Put it there"
    ):
        scripts.training_cases(broken, schema)


def test_truncated_image_is_an_error_that_names_the_case(
    scripts: ModuleType, schema: Any, broken: Path
) -> None:
    image = broken / "images" / "p001_a.png"
    image.write_bytes(image.read_bytes()[:1500])
    case = next(case for case in scripts.training_cases(broken, schema) if case["case_id"] == "p001_a")
    with pytest.raises(RuntimeError, match=r"p001_a: cannot read .*p001_a\.png .*fetch it again"):
        scripts.LoadRadiographd(keys="image")(case)


def test_constant_image_is_refused(scripts: ModuleType, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 7).save(tmp_path / "blank.png")
    with pytest.raises(ValueError, match=r"blank: .*constant gray"):
        scripts.LoadRadiographd(keys="image")({"image": str(tmp_path / "blank.png")})


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_pictures_of_any_mode_are_one_channel_with_rows_first(
    scripts: ModuleType, tmp_path: Path, mode: str
) -> None:
    gray = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    picture = (
        Image.fromarray(gray.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(gray).convert(mode)
    )
    picture.save(tmp_path / "film.png")
    loaded = scripts.LoadRadiographd(keys="image")({"image": str(tmp_path / "film.png")})["image"]
    assert loaded.shape == (1, 4, 6)
    scale = 257 if mode == "I;16" else 1
    np.testing.assert_allclose(loaded[0].numpy(), gray.astype(float) * scale, atol=1)


def test_label_is_only_needed_to_train_and_to_evaluate(
    scripts: ModuleType, schema: Any, broken: Path
) -> None:
    _edit(broken, lambda rows: [row.update(pneumonia="") for row in rows])
    for cases in (scripts.held_out_cases, scripts.training_cases):
        assert "label" not in cases(broken, schema, with_label=False)[0]
    with pytest.raises(ValueError, match=r"line 2 .* and 6 more rows. Fill it in"):
        scripts.held_out_cases(broken, schema)


# The columns of the public sets, with made-up rows.
COVID19 = """patientid,offset,sex,age,finding,temperature,pO2_saturation,leukocyte_count,\
view,modality,folder,filename,license,
2,0,M,65,Pneumonia/Viral/COVID-19,,,,PA,X-ray,images,a.jpg,,
3,0,F,,Pneumonia,38.6,97,7.4,AP Supine,X-ray,images,b.jpg,CC BY-SA,
4,0,,40,No Finding,,,,AP,X-ray,images,c.jpg,,
5,0,M,40,Tuberculosis,,,,AP,X-ray,images,d.jpg,,
6,0,M,40,Pneumonia,,,,L,X-ray,images,e.jpg,,
7,0,M,40,Pneumonia,,,,Axial,CT,volumes,f.nii.gz,,
"""
CHESTXRAY14 = """Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,\
View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],
00000001_000.png,Cardiomegaly|Effusion,0,1,57,M,PA,2682,2749,0.143,0.143,
00000002_000.png,Infiltration|Pneumonia,0,2,61,F,AP,2500,2048,0.171,0.171,
00000003_000.png,No Finding,0,3,74,F,PA,2500,2048,0.168,0.168,
"""


@pytest.mark.parametrize(
    ("table", "file", "labels", "vector"),
    [
        (
            COVID19,
            "clinical_covid19.yaml",
            {"a": 1, "b": 1, "c": 0},
            [0.5, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0],
        ),
        (
            CHESTXRAY14,
            "clinical_chestxray14.yaml",
            {"00000001_000": 0, "00000002_000": 1, "00000003_000": 0},
            [0.35, 0, 1, 1, 0],
        ),
    ],
    ids=["covid19", "chestxray14"],
)
def test_tables_of_public_sets_are_read_as_they_are(
    scripts: ModuleType, tmp_path: Path, table: str, file: str, labels: dict[str, int], vector: list[float]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "metadata.csv").write_text(table)
    schema = scripts.read_schema(CONFIGS / file)
    for name in re.findall(r"[\w.]+\.(?:jpg|png)", table):
        Image.new("L", (4, 4)).save(tmp_path / "images" / name)
    cases = scripts.training_cases(tmp_path, schema, test=["3"]) + scripts.held_out_cases(
        tmp_path, schema, test=["3"]
    )
    assert {case["case_id"]: case["label"] for case in cases} == labels
    torch.testing.assert_close(cases[0]["clinical"], torch.tensor(vector))


def test_renamed_column_of_a_public_set_is_named(scripts: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(CHESTXRAY14.replace("Patient Gender", "Patient Sex"))
    with pytest.raises(
        ValueError, match=r"no column 'Patient Gender' .*variable 'sex'.* It has Image Index.*Patient Sex"
    ):
        scripts.training_cases(tmp_path, scripts.read_schema(CONFIGS / "clinical_chestxray14.yaml"))


# --- the network --------------------------------------------------------------------------------------------------


def test_every_activation_is_a_module_used_once(scripts: ModuleType) -> None:
    network = scripts.ImageTableNet(clinical_features=13).eval()
    calls: dict[str, int] = {}
    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    assert network(torch.rand(2, 1, 64, 64), torch.rand(2, 13)).shape == (2, 2)
    assert set(calls.values()) == {1}
    assert not any(isinstance(module, nn.ReLU) and module.inplace for module in network.modules())


def test_inputs_go_missing_one_by_one_and_together(scripts: ModuleType) -> None:
    drop = scripts.RandDropInputsd(keys=["image", "clinical"], prob=0.6).set_random_state(0)
    counts: dict[tuple[bool, bool], int] = {}
    for _ in range(600):
        dropped = drop({"image": torch.ones(1, 4, 4), "clinical": torch.ones(3)})
        there = (bool(dropped["image"].any()), bool(dropped["clinical"].any()))
        counts[there] = counts.get(there, 0) + 1
    assert 200 < counts[True, True] < 280
    assert all(90 < counts[there] < 150 for there in ((True, False), (False, True), (False, False)))


def test_network_is_independent_of_the_batch(scripts: ModuleType) -> None:
    network = scripts.ImageTableNet(clinical_features=13).eval()
    image, clinical = torch.rand(3, 1, 40, 64), torch.rand(3, 13)
    alone = torch.cat([network(image[i : i + 1], clinical[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(image, clinical), alone)


# --- the bundle ---------------------------------------------------------------------------------------------------


def test_metadata_passes_verify_metadata(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"  # MONAI downloads it only if it is not there
    schema.write_text(json.dumps(SCHEMA))
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema))


def test_metadata_names_inputs_classes_and_the_current_version(scripts: ModuleType, schema: Any) -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    formats = metadata["network_data_format"]
    assert list(formats["inputs"]) == ["image", "clinical"], "in the order of the network's arguments"
    assert formats["inputs"]["image"]["channel_def"] == {"0": "radiograph"}
    assert formats["inputs"]["clinical"]["num_channels"] == schema.width
    assert formats["outputs"]["pred"]["channel_def"] == dict(zip("01", scripts.CLASSES, strict=True))
    assert metadata["version"] in metadata["changelog"]


def test_network_maps_what_the_metadata_promises(scripts: ModuleType, phantoms: Path, schema: Any) -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.yaml"),
        device="cpu",
        n=64,
        extra_forward_args={"clinical": torch.zeros(1, schema.width)},
        bundle_root=str(BUNDLE),
        dataset_dir=str(phantoms),
    )


@pytest.mark.parametrize(
    ("kind", "files"),
    [("train", ["train.yaml"]), ("train", ["train.yaml", "evaluate.yaml"]), ("infer", ["inference.yaml"])],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)
def test_workflow_has_all_standard_properties(
    scripts: ModuleType, phantoms: Path, tmp_path: Path, kind: str, files: list[str]
) -> None:
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS / file) for file in files],
        workflow_type=kind,
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(phantoms),
        output_dir=str(tmp_path),
        ckpt_dir=str(tmp_path),
        device="$torch.device('cpu')",
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_training_and_inference_agree() -> None:
    train, inference = read_config(CONFIGS / "train.yaml"), read_config(CONFIGS / "inference.yaml")
    for name in (
        "network_def", "channels", "prepare_batch", "phantom", "plant", "n_patients", "dataset_dir", "schema_file",
        "schema", "test_patients", "exclude_cases", "image_size", "seed",
    ):  # fmt: skip
        assert train[name] == inference[name], name
    assert train["train::deterministic_transforms"] == inference["preprocessing::transforms"]


# --- end to end, through MONAI's own command line -------------------------------------------------------------------


_run = partial(run_bundle, BUNDLE)


def _scalars(folder: Path) -> set[str]:
    """The tags of all curves that TensorBoard finds in a folder."""
    return _tags(folder, "scalars")


def _tags(folder: Path, kind: str) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: set[str] = set()
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        found |= set(events.Tags()[kind])
    return found


def _predictions(output: Path) -> dict[str, dict[str, str]]:
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Settings and output folder of a short training."""
    root = tmp_path_factory.mktemp("trained")
    settings = {"dataset_dir": phantoms, "ckpt_dir": root / "models", "output_dir": root / "eval"}
    _run(["configs/train.yaml"], epochs=2, val_interval=1, **settings)
    return settings, root / "eval"


@pytest.mark.slow
def test_training_saves_weights_and_curves(trained: tuple[dict[str, Any], Path]) -> None:
    settings, output = trained
    assert (settings["ckpt_dir"] / "model.pt").is_file()
    assert {"train_loss", "val_accuracy", "val_auc"} <= _scalars(output)


@pytest.mark.slow
def test_inference_writes_a_table_of_predictions(
    trained: tuple[dict[str, Any], Path], phantoms: Path
) -> None:
    settings, output = trained
    _run(["configs/inference.yaml"], **settings)
    rows = _predictions(output)
    truth = json.loads((phantoms / "truth.json").read_text())["cases"]
    assert set(rows) == {name for name in truth if int(name[1:4]) % 5 == 0}
    for name, row in rows.items():
        negative, positive = float(row["probability of no pneumonia"]), float(row["probability of pneumonia"])
        assert negative + positive == pytest.approx(1, abs=2e-4)
        assert row["predicted"] == ("pneumonia" if positive > negative else "no pneumonia")
        assert row["label"] == ("pneumonia" if truth[name]["opacity"] else "no pneumonia")


EXPLAIN = ["configs/inference.yaml", "configs/explain.yaml"]


def _values(output: Path, explainer: str) -> list[dict[str, str]]:
    with (output / "modalities" / explainer / "modalities.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_explanation_asks_every_case_and_draws_variables_and_maps_of_the_first(
    trained: tuple[dict[str, Any], Path], phantoms: Path, tmp_path: Path
) -> None:
    _run(EXPLAIN, **trained[0] | {"output_dir": tmp_path}, detailed_cases=2, n_others=3)
    rows = _values(tmp_path, "sources")
    cases = sorted(_predictions(tmp_path))
    assert sorted({row["case"] for row in rows}) == cases
    assert {(row["baseline"], row["modality"]) for row in rows} == {
        (baseline, modality) for baseline in ("missing", "others") for modality in ("radiograph", "clinical")
    }
    assert max(abs(float(row["residual"])) for row in rows) < 1e-5
    pictures = _tags(tmp_path / "attribution", "images")
    for baseline in ("others", "normal_record"):
        assert {tag.split("/")[1] for tag in pictures if tag.endswith(f"{baseline}/waterfall")} >= set(
            cases[:2]
        )
    drawn = {tag.split("/")[1] for tag in pictures if tag.startswith(("map/", "variables/"))} - {"cohort"}
    assert drawn == set(cases[:2])
    assert f"map/{cases[0]}/image/planes" in pictures
    assert f"map/{cases[0]}/clinical/features" in pictures


@pytest.mark.slow
def test_evaluation_reports_accuracy_and_auc(trained: tuple[dict[str, Any], Path]) -> None:
    settings, output = trained
    said = _run(["configs/train.yaml", "configs/evaluate.yaml"], **settings)
    rows = _predictions(output).values()
    accuracy = np.mean([row["predicted"] == row["label"] for row in rows])
    assert f"Accuracy: {accuracy:.3f}, AUC: " in said
    assert (output / "metrics.csv").is_file()


@pytest.mark.slow
def test_inference_without_a_trained_network_says_what_to_do(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"There is no trained network in .*Train one first"):
        _run(["configs/inference.yaml"], dataset_dir=phantoms, ckpt_dir=tmp_path, output_dir=tmp_path)


@pytest.mark.slow
def test_network_learns_what_neither_input_tells_alone(tmp_path: Path) -> None:
    settings = {
        "plant": "xor",
        "phantom_dir": tmp_path,
        "ckpt_dir": tmp_path / "models",
        "output_dir": tmp_path,
    }
    said = _run(["configs/train.yaml"], **settings, val_interval=25)
    accuracy = float(re.findall(r"val_accuracy: ([\d.]+)", said)[-1])
    assert accuracy >= 0.9

    _run(EXPLAIN, **settings, detailed_cases=1)
    rows = [row for row in _values(tmp_path, "sources") if row["modality"] == "radiograph"]
    way = [float(row["score"]) - float(row["baseline_score"]) for row in rows]
    alone = np.mean([float(row["single_gain"]) * np.sign(w) for row, w in zip(rows, way, strict=True)])
    together = np.mean(
        [float(row["interaction with clinical"]) * np.sign(w) for row, w in zip(rows, way, strict=True)]
    )
    assert abs(alone) < 0.1 * np.mean(np.abs(way)), "the film alone tells nothing"
    assert together > 0.9 * np.mean(np.abs(way)), "what it does, it does together with the record"
