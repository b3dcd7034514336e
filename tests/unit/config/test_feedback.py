"""AI feedback in the form: what it adds to a run, and what about it cannot be."""

from typing import Any

import pytest

from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.request import SourceKind
from stages.config.resolve import resolve

GIVEN = {"recipe": "tiny", "base_model": "/models/x", "instructions": ["/i.jsonl"], "preferences": ["/p.jsonl"]}
ASKED = {**GIVEN, "ai_feedback": "both", "constitution_prompts": ["/harm.jsonl#area=harmless", "/help.jsonl"]}


def test_without_it_nothing_changes() -> None:
    config = resolve(GIVEN)
    assert Stage.CONSTITUTION not in config.selected
    assert config.skipped[Stage.CONSTITUTION] == "it is not asked for (ai_feedback)"
    assert config.stage_inputs(Stage.CURATE) == {}
    assert config.curate.preferences == ("/p.jsonl",)


def test_it_adds_a_stage_whose_data_is_curated_with_the_rest() -> None:
    config = resolve(ASKED)
    assert config.stage_inputs(Stage.CURATE) == {"constitution": Stage.CONSTITUTION}
    assert config.curate.instructions == ("/i.jsonl", "constitution")
    assert config.curate.preferences == ("/p.jsonl", "constitution")
    assert set(config.curate.outside_sources) == {"/i.jsonl", "/p.jsonl"}
    sources = [(source.role, source.kind, source.uri) for source in config.stage_sources(Stage.CONSTITUTION)]
    assert sources == [
        ("constitution_prompts", SourceKind.DATA, "/harm.jsonl"),
        ("constitution_prompts", SourceKind.DATA, "/help.jsonl"),
        ("principles", SourceKind.PRINCIPLES, "default"),
        ("base_model", SourceKind.MODEL, "/models/x"),
    ]


@pytest.mark.parametrize(
    ("makes", "fields"),
    [("revisions", {"instructions"}), ("pairs", {"preferences"}), ("both", {"instructions", "preferences"})],
)
def test_only_what_it_makes_is_curated(makes: str, fields: set[str]) -> None:
    config = resolve({**ASKED, "ai_feedback": makes})
    assert {
        name for name in ("instructions", "preferences") if "constitution" in getattr(config.curate, name)
    } == fields


def test_its_data_may_have_a_weight_like_any_source() -> None:
    config = resolve({**ASKED, "preferences": ["/p.jsonl", "constitution#weight=0.3"]})
    assert config.curate.preferences == ("/p.jsonl", "constitution")
    assert [(entry.source, entry.weight) for entry in config.dpo.mixture] == [("constitution", 0.3)]


def test_it_is_enough_data_by_itself() -> None:
    asked = {"recipe": "tiny", "base_model": "/m", "ai_feedback": "pairs", "constitution_prompts": ["/p"]}
    config = resolve({**asked, "first_stage": "dpo", "alignment": "dpo", "last_stage": "dpo"})
    assert "constitution" in config.curate.preferences


def test_a_critic_may_be_an_endpoint_and_then_needs_the_name_of_its_model() -> None:
    critic = {**ASKED, "critic": "http://127.0.0.1:8000/v1"}
    with pytest.raises(ConfigError, match=r"constitution\.critic: model is empty"):
        resolve(critic)
    config = resolve({**critic, "overrides": {"constitution.critic.model": "m"}})
    assert config.constitution.critic.endpoint == "http://127.0.0.1:8000/v1"
    assert [source.role for source in config.stage_sources(Stage.CONSTITUTION)][-1] == "base_model"
    with pytest.raises(
        ConfigError, match=r"critic='https://elsewhere\.example/v1' is not an endpoint that may be asked"
    ):
        resolve({**ASKED, "critic": "https://elsewhere.example/v1", "overrides": {"constitution.critic.model": "m"}})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model": "", "recipe": "tiny"}, "ai_feedback needs a model that responds"),
        ({"constitution_prompts": []}, "ai_feedback='both' needs prompts, and constitution_prompts is empty"),
        ({"ai_feedback": "off"}, r"constitution_prompts=.* is given and ai_feedback is off"),
        ({"ai_feedback": "off", "constitution_prompts": [], "principles": "/x.yaml"}, "principles='/x.yaml' is given"),
        ({"ai_feedback": "off", "constitution_prompts": [], "critic": "/m"}, "critic is given and ai_feedback is off"),
        ({"last_stage": "sft"}, "makes preferences, and no stage of this run reads preferences"),
        ({"constitution_prompts": ["/x#area=nice"]}, "area='nice' of '/x' is not one of helpful, honest, harmless"),
        ({"constitution_prompts": ["/x#area=honest+honest"]}, "names an area twice"),
        ({"constitution_prompts": ["/x#weight=0.3"]}, "'/x' has an option that prompts do not have"),
        (
            {"instructions": ["/i#area=honest"]},
            "area='honest' of '/i' is for given preferences",
        ),
        ({"ai_feedback": "pairs", "instructions": ["constitution"]}, "ai_feedback='pairs' makes no instructions"),
        ({"constitution_prompts": ["/etc/passwd"]}, "constitution_prompts='/etc/passwd' leads to"),
        ({"principles": "/etc/passwd"}, "principles='/etc/passwd' leads to"),
        ({"overrides": {"constitution.makes": "off"}}, "It is the field ai_feedback of the form|cannot be set"),
        ({"overrides": {"execution.constitution.num_workers": 2}}, "execution.constitution.num_workers=2"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve({**ASKED, **changes})
