"""The command line says what there is, and names what there is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser

from monai_xai import attributors, overlays
from monai_xai.__main__ import (
    _COMMANDS,
    compare_methods,
    explain,
    judge,
    layers,
    main,
    methods,
    modalities,
    overlay,
)
from monai_xai.bundle_settings import merge_settings
from monai_xai.errors import InputError

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "ms_lesion_segmentation"


def test_methods_lists_every_method_with_the_facts_of_its_class():
    header, *rows = methods().splitlines()
    assert header.split()[:6] == ["method", "complete", "summable", "needs_layer", "stochastic", "by_hooks"]
    facts = {row.split()[0]: row.split()[1:6] for row in rows}
    rules = {name for name in attributors.__all__ if name.endswith("Rule")}
    assert set(facts) == set(attributors.__all__) - {"Attribution", "Attributor"} - rules
    assert facts["DeepLift"] == ["yes", "yes", "-", "-", "yes"]


def test_the_table_of_the_readme_is_the_table_of_the_code():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    rows = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("| `")]
    for names, adds_up, contributions, windows, random in rows:
        for name in set(attributors.__all__) & set(names.replace("`", " ").replace(",", " ").split()):
            method = getattr(attributors, name)
            assert method.complete == ("yes" in adds_up), name
            assert method.summable == ("yes" in contributions or name in contributions), name
            assert method.by_hooks == ("linear" in windows), name
            assert method.stochastic == ("seed" in random), name


def test_layers_lists_what_a_network_gives_and_marks_the_choice_of_cams(tmp_path):
    config = tmp_path / "inference.yaml"
    options = "spatial_dims: 2, in_channels: 1, out_channels: 2, channels: [4, 8], strides: [2]"
    config.write_text(f"network_def: {{_target_: UNet, {options}}}")
    rows = layers(str(config), (1, 16, 16)).splitlines()
    (chosen,) = [row for row in rows if row.startswith("*")]
    assert chosen.split()[1:] == [
        "model.1.submodule.conv",
        "Conv2d",
        *["1", "x", "8", "x", "8", "x", "8"],
    ]
    with pytest.raises(InputError, match="shape of each input"):
        layers(str(config))


@pytest.mark.parametrize("name", overlays.names())
def test_an_overlay_is_printed_to_be_edited_and_says_where_it_is(name, tmp_path):
    file = tmp_path / "xai.yaml"
    file.write_text(overlay(name))
    assert ConfigParser.load_config_file(file) == ConfigParser.load_config_file(overlay(name, path=True))


def test_an_overlay_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(
        InputError, match="no overlay 'inferrence'; there are comparison, explain, flat, grounding"
    ):
        overlay("inferrence")


def test_a_dry_run_prints_the_config_that_would_run():
    config = yaml.safe_load(
        explain(str(BUNDLE), case="patient3,5", target="lesion", method="Saliency", dry_run=True)
    )
    assert config["explain_target"] == {"_target_": "monai_xai.RegionScore", "channel": 1}
    assert config["explain_method"] == {"_target_": "monai_xai.Saliency"}
    assert config["initialize"][-3]["cases"] == ["patient3", 5]
    assert config["bundle_root"] == str(BUNDLE)


def test_all_cases_and_any_other_setting():
    config = yaml.safe_load(
        explain(
            str(BUNDLE),
            case="all",
            dry_run=True,
            overwrite=True,
            max_seconds=60,
            autocast="bfloat16",
            **{"explain_board::cases": 2},
        )
    )
    assert config["explain_handler"]["cases"] is None
    assert "choose_cases" not in str(config["initialize"])
    assert config["explain_saver"]["overwrite"] is True
    assert config["explainer"]["max_seconds"] == 60
    assert config["explainer"]["autocast"] == "bfloat16"
    assert config["explain_board"]["cases"] == 2


def test_setting_may_be_a_config_of_several_lines_in_one():
    settings = {"explain_board": "{_target_: monai_xai.TensorBoardAttributionHandler, log_dir: logs}"}
    config = yaml.safe_load(explain(str(BUNDLE), dry_run=True, **settings))
    assert config["explain_board"]["log_dir"] == "logs"
    salt = {"explain_saver::salt": "{as given}"}
    assert yaml.safe_load(explain(str(BUNDLE), dry_run=True, **salt))["explain_saver"]["salt"] == "{as given}"
    with pytest.raises(InputError, match=r"^explain_board is no config in YAML"):
        explain(str(BUNDLE), dry_run=True, explain_board="{_target_: [}")


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        ("", "datset_dir", "datset_dir sets nothing: .* Did you mean dataset_dir"),
        ("", "explaner::progress", "explaner::progress sets nothing: .* Did you mean explainer::progress"),
        ("evaluate", "inferer::overlap", "Did you mean .*validate::inferer::overlap"),
        ("", "evaluator::inferer::overlap", r"Did you mean inferer::overlap\?"),
        ("", "initialize::99", "initialize::99 cannot be set to 0"),
        ("", "+explainer", "[+]explainer cannot be set to 0"),
    ],
)
def test_setting_that_nothing_reads_is_refused(config, name, message):
    with pytest.raises(InputError, match=message):
        explain(str(BUNDLE), config=config, dry_run=True, **{name: 0})


def test_setting_takes_the_place_of_a_whole_entry():
    assert yaml.safe_load(explain(str(BUNDLE), dry_run=True, explainer=0))["explainer"] == 0


def test_setting_inside_of_something_is_for_it_to_know():
    config = yaml.safe_load(explain(str(BUNDLE), dry_run=True, **{"explainer#memory_gib": 0.5}))
    assert config["explainer"]["memory_gib"] == 0.5
    assert "explainer#memory_gib" not in config


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("word", ["@größe", "$@größe and True", "@::größe", "%größe"])
def test_setting_that_another_one_refers_to_is_taken(word, is_first):
    given = {"größe": False, "explainer::progress": word}
    given = given if is_first else dict(reversed(given.items()))
    parser = ConfigParser({"explainer": {"progress": True}})
    merge_settings(parser, given)
    assert parser["größe"] is False
    assert parser["explainer::progress"] == word


def test_names_are_hidden_under_a_secret_that_is_not_written(monkeypatch):
    monkeypatch.delenv("XAI_SALT", raising=False)
    with pytest.raises(InputError, match="XAI_SALT"):
        explain(str(BUNDLE), anonymize=True, dry_run=True)
    monkeypatch.setenv("XAI_SALT", "a secret")
    text = explain(str(BUNDLE), anonymize=True, dry_run=True)
    assert "a secret" not in text
    saver = ConfigParser(yaml.safe_load(text)["explain_saver"])
    assert saver["anonymize"] is True
    assert saver.get_parsed_content("salt") == "a secret"


@pytest.mark.parametrize(
    ("command", "name"), [(modalities, "modalities"), (compare_methods, "comparison"), (judge, "grounding")]
)
def test_other_questions_are_asked_of_a_bundle_in_the_same_way(command, name):
    config = yaml.safe_load(command(str(BUNDLE), case=1, target=1, output="out", dry_run=True))
    assert config["initialize"][-1 if name != "modalities" else -3].startswith("$@")
    assert config["output_dir"] == str(Path("out").resolve())
    assert "choose_cases" in str(config["initialize"])


def test_an_error_comes_without_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["monai_xai", "explain", "--bundle", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"UnsupportedBundleError: .* has no configs/inference"):
        main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "--bundle", "x"], "Interrupted. Cases that are explained are kept: the same command goes on.\n"),
        (["explain", "--bundle", "x", "--overlay=inference"], "Interrupted.\n"),
        (["ground", "--bundle", "x"], "Interrupted.\n"),
    ],
)  # fmt: skip
def test_an_interruption_is_no_error_and_says_what_is_kept(monkeypatch, capsys, words, said):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["monai_xai", *words])
    monkeypatch.setitem(_COMMANDS, words[0], interrupt)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("command", ["explain", "modalities", "compare", "ground", "overlay", "layers"])
def test_help_teaches(command):
    line = [sys.executable, "-m", "monai_xai", command, "--help"]
    result = subprocess.run(
        line, capture_output=True, text=True, check=True, env={"PAGER": "cat", "PATH": "/usr/bin"}
    )
    assert f"monai_xai {command} " in result.stdout + result.stderr
