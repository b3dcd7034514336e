"""One rule for names wherever they enter, and no way around the form: overrides, other forms, stored settings."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from stages.config.closing import PromoteConfig
from stages.config.errors import ConfigError
from stages.config.forms import CollectParams, EvaluationParams, PipelineParams, RetrainParams
from stages.config.mlflow_limits import EXPERIMENT_NAME
from stages.config.nested import dotted
from stages.config.resolve import resolve
from stages.config.validation import validated

HOSTILE = ("../../evil", "a/b", "a b", "a\nb", "", ".", "-a", "a" * 65, "{{ x }}", "a\0", "é")


def refused(overrides: dict[str, Any], **values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        resolve({"recipe": "tiny", **values, "overrides": overrides})
    return error.value


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", [PipelineParams, CollectParams, RetrainParams])
def test_every_form_has_the_same_rule_for_run_names(form: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="run_name"):
        validated(form, {"run_name": name})


@pytest.mark.parametrize("name", HOSTILE)
def test_the_settings_of_promote_hold_no_other_name_than_a_form_could(name: str) -> None:
    with pytest.raises(ValidationError, match="run_name"):
        PromoteConfig(run_name=name)


@pytest.mark.parametrize(
    ("path", "filled_by"),
    [
        ("run_name", "field run_name of the form"),
        ("recipe", "field recipe of the form"),
        ("promote.run_name", "field run_name of the form"),
        ("tokenize.base_model", "field base_model of the form"),
        ("only", "evaluate_model"),
        ("given", "when the run starts"),
        ("promote.approval", "task approve"),
    ],
)
def test_what_is_filled_by_athanor_cannot_be_set_by_overrides(path: str, filled_by: str) -> None:
    error = refused({path: "respond"})
    assert f"overrides: {path!r} cannot be set" in error.message
    assert filled_by in error.advice


@pytest.mark.parametrize(
    "path", ["given.base_model.uri", "given.base_model", "promote.approval.verdict", "given.x", "only.x"]
)
def test_nor_can_a_part_of_it_or_a_nested_spelling(path: str) -> None:
    assert "cannot be set" in refused({path: "approved"}).message
    first, _, rest = path.partition(".")
    assert "cannot be set" in refused({first: {rest: "approved"}}).message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"last_stage": "ppo", "alignment": "dpo"}, "last_stage='ppo' is not part of a run with alignment='dpo'"),
        ({"last_stage": "respond"}, "last_stage='respond' is not part of a run"),
        ({"continue_pretraining": True}, "continue_pretraining=True needs base_model"),
        ({"alignment": "rlhf"}, "alignment='rlhf'"),
        ({"experiment": "a\nb"}, "experiment='a\\\\nb'"),
        ({"experiment": " "}, "experiment"),
        ({"experiment": "x" * (EXPERIMENT_NAME + 1)}, "experiment"),
    ],
)
def test_fields_of_the_form_that_overrides_set_obey_the_forms_rules(overrides: dict[str, Any], says: str) -> None:
    assert says.replace("\\\\", "\\") in refused(overrides).message


def test_a_base_model_that_overrides_set_reaches_every_stage_as_one_from_the_form_does() -> None:
    """The champion's settings of earlier versions may hold such overrides."""
    by_override = resolve({"recipe": "tiny", "overrides": {"base_model": "/models/x", "alignment": "dpo"}})
    assert by_override == resolve({"recipe": "tiny", "base_model": "/models/x", "alignment": "dpo"})


@pytest.mark.parametrize(
    "overrides",
    [
        {"dpo.beta": 0.1, "dpo": {"beta": 0.2}},
        {"dpo": {"beta": 0.2}, "dpo.beta": 0.1},
        {"dpo.loss.beta": 0.1, "dpo": {"loss": {"beta": 0.2}}},
        {"sft": {"optimizer.learning_rate": 1, "optimizer": {"learning_rate": 2}}},
    ],
)
def test_two_spellings_of_one_field_are_refused(overrides: dict[str, Any]) -> None:
    error = refused(overrides)
    assert "is given twice" in error.message
    assert error.advice == "Give it once."


def test_settings_nested_beyond_any_use_are_refused_in_a_sentence() -> None:
    deep: Any = 1
    for _ in range(2000):
        deep = {"a": deep}
    assert "nested deeper than" in refused(deep).message
    with pytest.raises(ConfigError, match="nested deeper than"):
        dotted(deep)


def test_addresses_of_models_are_checked_where_they_enter() -> None:
    for address in (
        "models:/",
        "models:/a",
        "models:/a@",
        "models:/@b",
        "models:/a/b/c@d",
        "models:/a@b@c",
        "models:/a\n@b",
    ):
        with pytest.raises(ConfigError, match=r"models:/<name>@<alias> or models:/<name>/<version>"):
            resolve({"recipe": "tiny", "base_model": address})
        for form in (CollectParams, EvaluationParams):
            with pytest.raises(ConfigError, match="model: "):
                validated(form, {"model": address})
    for address in (
        "models:/a@champion",
        "models:/My model 2/3",
        "models:/a.b-c/12",
        "/models/llama",
        "s3://b/artifacts/x/y",
    ):
        assert resolve({"recipe": "tiny", "base_model": address}).base_model == address


@pytest.mark.parametrize("address", ["", "   ", "\t\x1c"])
def test_an_evaluation_without_a_model_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="model="):
        validated(EvaluationParams, {"model": address})
    assert CollectParams(model=address).model == ""
    assert EvaluationParams(model=f" models:/a/1{address}").model == "models:/a/1"


@pytest.mark.parametrize("field", ["documents", "instructions", "preferences"])
def test_blank_lines_among_the_sources_are_ignored(field: str) -> None:
    given = resolve({"recipe": "tiny", "documents": ["installed-docs"], field: ["installed-docs", "", "  ", " /a "]})
    assert getattr(given.curate, field) == ("installed-docs", "/a")
    empty = resolve({"recipe": "tiny", field: ["", "\t"]})
    assert empty == resolve({"recipe": "tiny"})


@pytest.mark.parametrize("field", ["documents", "instructions", "preferences"])
def test_a_blank_source_among_overrides_is_refused(field: str) -> None:
    assert "blank source ' '" in refused({f"curate.{field}": ["installed-docs", " "]}).message


def test_blank_lines_are_ignored_in_the_other_forms_too() -> None:
    assert CollectParams(prompts=["", "What?", " "]).prompts == ["What?"]
    assert RetrainParams(preferences=[" ", "/p"]).preferences == ["/p"]


def test_a_time_that_no_calendar_holds_is_refused() -> None:
    assert "approval_timeout_hours" in refused({"promote.approval_timeout_hours": 1e300}).message
    with pytest.raises(ConfigError, match="answer_hours"):
        validated(CollectParams, {"answer_hours": 1e300})


def test_the_json_of_a_run_started_by_rest_obeys_the_same_rules() -> None:
    conf = json.loads('{"recipe": "tiny", "only": "respond", "given": {}}')
    with pytest.raises(ConfigError, match=r"only: unknown field.*given: unknown field"):
        resolve(conf)


@pytest.mark.parametrize("value", [None, 3, "derived"])
@pytest.mark.parametrize("field", ["instructions", "preferences"])
def test_sources_that_are_no_list_are_refused_in_a_sentence(field: str, value: Any) -> None:
    assert f"{field}={value!r} is not a list of sources" in refused({f"curate.{field}": value}).message


def test_the_name_of_an_unknown_field_stays_on_its_line() -> None:
    with pytest.raises(ConfigError, match=r"^a b: unknown field") as raised:
        resolve({"recipe": "tiny", "a\nb": 1})
    assert len(raised.value.message.splitlines()) == 1
