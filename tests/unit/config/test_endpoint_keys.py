"""Connections with keys in the settings: which ones a run needs, what is refused, and that no fingerprint changes."""

from typing import Any

import pytest
from pydantic import ValidationError

from stages.config.endpoint_keys import KeyedEndpoint, keyed_endpoints, keyed_endpoints_of_run
from stages.config.endpoints import EndpointConfig
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.judging import JudgeConfig
from stages.config.resolve import resolve

GIVEN = {"recipe": "tiny", "base_model": "/models/x", "instructions": ["/i.jsonl"], "preferences": ["/p.jsonl"]}
LLM, JUDGE = "https://llm.example/v1", "https://judge.example/v1"
OVERRIDES = {
    "synthesize.generator.model": "m",
    "synthesize.generator.api_key_connection": "llm",
    "evaluate.judge.model": "m",
    "evaluate.judge.api_key_connection": "judge",
    "ppo.estimator.kind": "rloo",
    "ppo.scorer.kind": "judge",
    "ppo.scorer.endpoint.endpoint": JUDGE,
    "ppo.scorer.endpoint.model": "m",
    "ppo.scorer.endpoint.api_key_connection": "judge",
}
ASKED: dict[str, Any] = {
    **GIVEN,
    "alignment": "ppo",
    "synthesis": "self_instruct",
    "synthesis_sources": ["/seeds.jsonl"],
    "generator": LLM,
    "judge": JUDGE,
    "overrides": OVERRIDES,
}


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_ENDPOINTS", LLM)
    monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", JUDGE)


def test_every_connection_of_a_run_is_found_with_its_field_and_its_endpoint() -> None:
    config = resolve(ASKED)
    generator = KeyedEndpoint("synthesize.generator.api_key_connection", "llm", LLM)
    assert keyed_endpoints_of_run(config) == (
        KeyedEndpoint("evaluate.judge.api_key_connection", "judge", JUDGE),
        KeyedEndpoint("ppo.scorer.endpoint.api_key_connection", "judge", JUDGE),
        generator,
    )
    assert keyed_endpoints(config.stage_config(Stage.SYNTHESIZE), "synthesize") == (generator,)
    assert keyed_endpoints(config.stage_config(Stage.SFT), "sft") == ()


def test_a_stage_that_the_run_does_not_execute_needs_no_key() -> None:
    overrides = {name: value for name, value in OVERRIDES.items() if not name.startswith("evaluate")}
    found = keyed_endpoints_of_run(resolve({**ASKED, "judge": "", "last_stage": "sft", "overrides": overrides}))
    assert [one.connection for one in found] == ["llm"]


def test_where_the_key_is_kept_changes_no_fingerprint() -> None:
    for kind in (EndpointConfig, JudgeConfig):
        without = kind(endpoint=LLM, model="m")
        named = without.model_copy(update={"api_key_connection": "llm"})
        assert named.identity() == without.identity()
        assert "api_key_connection" not in named.identity()
    with_keys = resolve(ASKED)
    overrides = {name: value for name, value in OVERRIDES.items() if not name.endswith("api_key_connection")}
    without_keys = resolve({**ASKED, "overrides": overrides})
    for stage in (Stage.SYNTHESIZE, Stage.PPO, Stage.EVALUATE):
        assert with_keys.stage_config(stage) != without_keys.stage_config(stage)
        assert with_keys.stage_config(stage).identity() == without_keys.stage_config(stage).identity()


@pytest.mark.parametrize("kind", [EndpointConfig, JudgeConfig])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"api_key_connection": "a b"}, "'a b' is not the id of a connection; allowed are letters"),
        ({"api_key_connection": "-x"}, "is not the id of a connection"),
        ({"api_key_connection": "x" * 201}, "at most 200"),
        ({"api_key_connection": "llm", "api_key_env": "ATHANOR_JUDGE_KEY"}, "both name a key; give one of them"),
        ({"api_key_connection": "llm", "endpoint": ""}, "has no effect: there is no endpoint"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        kind(**{"endpoint": LLM, "model": "m", **settings})


def test_a_key_from_a_connection_goes_to_listed_endpoints_only_also_on_loopback() -> None:
    overrides = {"synthesize.generator.model": "m", "synthesize.generator.api_key_connection": "llm"}
    asked = {**ASKED, "alignment": "dpo", "judge": "", "generator": "http://127.0.0.1:8000/v1", "overrides": overrides}
    with pytest.raises(ConfigError, match="is not an endpoint that may be sent a key"):
        resolve(asked)
    with pytest.raises(ConfigError, match="is not an endpoint that may be sent a key"):
        resolve({**ASKED, "judge": "http://127.0.0.1:8000/v1"})
