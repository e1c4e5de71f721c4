"""Clinical tables: encoding, reading, players, and what is refused."""

from __future__ import annotations

import pytest
import torch

from monai_xai import (
    ClinicalVariables,
    Explainer,
    FeatureAblation,
    InputError,
    OutputScore,
    ReferenceRecord,
    TableSchema,
    Variable,
)
from monai_xai.baselines import draw_baselines

SCHEMA = TableSchema(
    (
        Variable("age", unit="years", center=60, scale=10, reference_range=(20, 80)),
        {"name": "CRP", "column": "crp_mg_l", "unit": "mg/L", "reference_range": [0, 5], "missing": True},
        {"name": "sex", "kind": "categorical", "levels": ["f", "m"]},
        Variable("smoking", "ordinal", levels=("never", "former", "current"), encoding="code"),
        Variable("BMI", unit="kg/m²", player="age"),
    )
)
ROW = {"age": 70, "crp_mg_l": 12.5, "sex": "m", "smoking": "former", "BMI": 25}


def test_a_row_becomes_a_vector_and_is_read_back():
    vector = SCHEMA.encode(ROW)
    assert vector.tolist() == [1.0, 12.5, 0.0, 0.0, 1.0, 1.0, 25.0]
    readings = [str(reading) for reading in SCHEMA.read(vector)]
    assert readings == [
        "age = 70 years (20 to 80)",
        "CRP = 12.5 mg/L (0 to 5)",
        "sex = m",
        "smoking = former",
        "BMI = 25 kg/m²",
    ]


@pytest.mark.parametrize("missing", [None, "", float("nan")], ids=["none", "empty", "nan"])
def test_missing_is_a_value_where_the_schema_allows_it_and_named_where_not(missing):
    vector = SCHEMA.encode(ROW | {"crp_mg_l": missing})
    assert vector[1:3].tolist() == [0.0, 1.0]
    assert str(SCHEMA.read(vector)[1]) == "CRP = missing"
    with pytest.raises(InputError, match="age is missing, which its schema does not allow"):
        SCHEMA.encode(ROW | {"age": missing})


def test_columns_of_one_variable_and_what_is_derived_from_it_are_one_player():
    assert SCHEMA.players == {"age": (0, 6), "CRP": (1, 2), "sex": (3, 4), "smoking": (5,)}
    mask = ClinicalVariables(SCHEMA).mask(torch.zeros(1, 7), "clinical")
    assert mask.tolist() == [[0, 1, 1, 2, 2, 3, 0]]


@pytest.mark.parametrize(
    ("row", "units", "message"),
    [
        ({"Age": 70}, {}, "no column 'age'; is it 'Age' now"),
        (ROW | {"sex": "male"}, {}, r"sex = 'male' is none of its levels \['f', 'm'\]; did you mean 'm'"),
        (ROW | {"age": "old"}, {}, "age = 'old' is no number"),
        (ROW, {"crp_mg_l": "mg/dL"}, "'crp_mg_l' is in 'mg/dL', the schema says 'mg/L'"),
    ],
    ids=["renamed", "level", "number", "unit"],
)
def test_rows_that_do_not_fit_are_named(row, units, message):
    with pytest.raises(InputError, match=message):
        SCHEMA.encode(row, units)


def test_impossible_patients_are_named():
    vector = SCHEMA.encode(ROW)
    vector[3] = 1.0
    with pytest.raises(InputError, match=r"sex has the columns .*no such patient"):
        SCHEMA.read(vector)
    with pytest.raises(InputError, match="describes 7 columns"):
        SCHEMA.read(vector[:3])


def test_reference_records_are_possible_patients_in_the_middle_of_the_ranges():
    draws = draw_baselines(
        {"clinical": ReferenceRecord(SCHEMA, n_records=20)}, {"clinical": torch.zeros(2, 7)}
    )
    assert len(draws) == 20
    for (draw,) in draws:
        readings = SCHEMA.read(draw[0])
        assert (readings[0].value, readings[1].value) == (50, 2.5)
    assert {SCHEMA.read(draw[0])[2].value for (draw,) in draws} == {"f", "m"}
    (given,) = ReferenceRecord(SCHEMA, record={"sex": "f", "smoking": "never"}).draws(torch.zeros(1, 7))
    assert str(SCHEMA.read(given[0])[2]) == "sex = f"


def test_ablation_takes_whole_variables_away():
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, x):
            seen.extend(x.tolist())
            return x.sum(1, keepdim=True)

    vector = SCHEMA.encode(ROW)[None]
    baseline = ReferenceRecord(SCHEMA, record={"sex": "f", "smoking": "never"})
    Explainer(OutputScore(), FeatureAblation(ClinicalVariables(SCHEMA), baseline))(
        Watch(), {"clinical": vector}
    )
    for row in seen:
        SCHEMA.read(torch.tensor(row))


def test_a_schema_comes_from_a_file_and_its_errors_name_it(tmp_path):
    file = tmp_path / "schema.yaml"
    file.write_text(
        "variables:\n- {name: age, unit: years}\n- {name: sex, kind: categorical, levels: [f, m]}\n"
    )
    assert TableSchema.from_file(file).width == 3
    file.write_text("variables:\n- {name: age, units: years}\n")
    with pytest.raises(InputError, match=r"does not describe a variable.*units"):
        TableSchema.from_file(file)
    with pytest.raises(InputError, match=r"nothing\.yaml is no schema"):
        TableSchema.from_file(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="different names"):
        TableSchema((Variable("a"), Variable("a")))
