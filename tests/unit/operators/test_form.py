"""The trigger form is PipelineParams, and nothing else."""

import html
import re
from typing import Any

import pytest
from airflow.sdk.exceptions import ParamValidationError
from jsonschema import Draft7Validator

from operators.form import _form, form_values, trigger_form
from stages.config.forms import PipelineParams, RunOutline
from stages.config.graph import Alignment, pipeline_stages
from stages.config.help import field_help
from stages.config.pipeline import PipelineConfig
from stages.config.recipes import RECIPES
from stages.config.resolve import parse_params, resolve

FORM = trigger_form()
DEFAULTS = PipelineParams.model_validate({})


def param(name: str) -> Any:
    return FORM.get_param(name)


@pytest.mark.parametrize("name", PipelineParams.model_fields)
def test_every_field_has_title_help_section_and_a_valid_default(name: str):
    field, shown = PipelineParams.model_fields[name], param(name)
    Draft7Validator.check_schema(shown.schema)
    assert shown.schema["title"] == field.title
    assert words(shown.schema["description_md"]).startswith(words(field_help(PipelineParams)[name] or "no docstring"))
    assert shown.schema["section"]
    assert shown.resolve() == shown.value


def words(text: str) -> str:
    """Without what is Markdown's."""
    return html.unescape(re.sub(r"[\\`*]", "", text))


def test_what_is_code_in_the_help_is_bold_because_the_form_draws_boxes_over_the_next_line():
    assert "`" not in "".join(param(name).schema["description_md"] for name in FORM)
    assert "**models\\:/name@alias**" in param("base_model").schema["description_md"]


def test_the_form_has_no_other_fields_and_shows_them_by_section():
    assert set(FORM) == set(PipelineParams.model_fields)
    assert list(FORM)[:3] == ["recipe", "run_name", "documents"]
    assert list(dict.fromkeys(param(name).schema["section"] for name in FORM)) == [
        "Run",
        "Data",
        "Model and alignment",
        "AI feedback",
        "Synthesis",
        "Reward model",
        "Judges",
        "Course of the run",
        "Gates",
        "Changes to the recipe",
    ]


def test_a_field_without_a_section_is_refused():
    with pytest.raises(ValueError, match=r"PipelineParams: no section has the fields .*seed"):
        _form(PipelineParams, {"Run": ("recipe", "run_name")})


def test_the_fields_that_the_configuration_keeps_are_documented_once():
    for name in RunOutline.model_fields:
        assert name not in PipelineParams.__annotations__
        assert name not in PipelineConfig.__annotations__
        assert field_help(PipelineConfig)[name] == field_help(PipelineParams)[name] != ""


def test_the_untouched_form_is_the_default_run():
    assert parse_params(form_values(FORM.validate())) == DEFAULTS


def test_a_form_whose_empty_fields_come_as_null_is_the_default_run():
    emptied = {name: value or None for name, value in FORM.validate().items() if isinstance(value, str | list | dict)}
    for name, value in emptied.items():
        param(name).resolve(value)
    assert parse_params(form_values(emptied)) == DEFAULTS


def test_choices_are_the_values_of_the_enums():
    assert param("alignment").schema["enum"] == [choice.value for choice in Alignment]
    assert param("last_stage").schema["enum"] == [stage.value for stage in pipeline_stages()]


@pytest.mark.parametrize("name", ["alignment", "last_stage", "promotion"])
def test_every_choice_has_a_label_that_says_more_than_its_value(name: str):
    shown = param(name)
    assert list(shown.schema["values_display"]) == shown.schema["enum"]
    for value, label in shown.schema["values_display"].items():
        assert len(label) > len(value) + 3, f"{value!r} has no label; write it beside the value in its class"


def test_what_the_recipes_set_is_read_off_the_recipes():
    shown, demo, llama = param("recipe").schema["description_md"], RECIPES["demo"](), RECIPES["llama_1b"]()
    rows = {row.split("|")[1].strip(): row for row in shown.splitlines() if row.startswith("|")}
    assert [words(cell).strip() for cell in rows[""].split("|")[2:-1]] == list(RECIPES)
    assert f"| {demo.ppo.num_rollouts} rollouts of {demo.ppo.rollout_size} responses" in rows["ppo"]
    assert "2.16 M parameters: 4 layers of 192" in rows["model"]
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in words(rows["model"])
    assert f"{llama.execution.pretrain.num_workers} of 1 GPU, fsdp" in rows["workers"]
    assert len({row.count("|") for row in rows.values()}) == 1


def test_a_dry_run_is_a_switch():
    assert (param("dry_run").schema["type"], param("dry_run").value) == ("boolean", False)
    assert resolve(form_values(FORM.validate() | {"dry_run": True})).dry_run


def test_recipes_are_proposed_and_not_enforced_so_that_resolve_can_say_which_one_was_meant():
    assert param("recipe").schema["examples"] == list(RECIPES)
    assert param("recipe").resolve("dmeo") == "dmeo"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", "seven"),
        ("alignment", "rlhf"),
        ("last_stage", "deploy"),
        ("documents", "installed-docs"),
        ("documents", [1]),
        ("overrides", "sft.seed=1"),
        ("run_name", ""),
    ],
)
def test_airflow_refuses_values_of_the_wrong_kind_before_the_run_starts(name: str, value: object):
    with pytest.raises(ParamValidationError):
        param(name).resolve(value)


def test_a_filled_in_form_reaches_the_configuration():
    filled = FORM.validate() | {"recipe": "tiny", "seed": 7, "overrides": {"sft.num_epochs": 2}, "base_model": None}
    config = resolve(form_values(filled))
    assert (config.recipe, config.sft.seed, config.sft.num_epochs) == ("tiny", 7, 2)
