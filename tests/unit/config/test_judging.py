"""Settings of judges and rules, and which endpoints may be asked."""

from typing import Any

import pytest
from pydantic import ValidationError

from stages.config.closing import EvaluateConfig
from stages.config.endpoints import check_endpoint
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.judging import GoldSettings, JudgeConfig, Rule, parse_rule
from stages.config.resolve import resolve


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"endpoint": "http://user:secret@host/v1", "model": "m"}, "without user, password, query and fragment"),
        ({"endpoint": "http://host/v1?key=secret", "model": "m"}, "without user, password, query and fragment"),
        ({"endpoint": "ftp://host", "model": "m"}, "must be http:// or https:// with a host"),
        ({"endpoint": "http://", "model": "m"}, "must be http:// or https:// with a host"),
        ({"endpoint": "http://host/v1"}, "model is empty, and http://host/v1 may serve several"),
        ({"api_key_env": "AWS_SECRET_ACCESS_KEY"}, "is not a variable for judges; use a name such as ATHANOR_JUDGE_"),
        ({"api_key_env": "ATHANOR_JUDGE_KEY=x"}, "is not a variable for judges"),
        ({"prompt": "pairwise-v9"}, r"is not a shipped one \(pairwise-v1\)"),
        ({"prompt": "{question} {first}"}, "does not have exactly one of {second}"),
        ({"prompt": "{question} {first} {first} {second}"}, "does not have exactly one of {first}"),
        ({"method": "guess"}, "likelihood"),
        ({"max_items": 0}, "greater than or equal to 1"),
        ({"timeout_seconds": 0}, "greater than 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_and_a_password_is_not_repeated(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as raised:
        JudgeConfig(**values)
    assert "secret" not in raised.value.errors()[0]["msg"]


def test_rules_are_taken_apart() -> None:
    assert parse_rule("regex:^a:b$") == Rule("regex", pattern="^a:b$")
    assert parse_rule("length:1-400") == Rule("length", least=1, most=400)
    assert parse_rule("json") == Rule("json")
    assert parse_rule("python:package.module:function") == Rule("python", function="package.module:function")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("regex:(", "is no regular expression"),
        ("regex:", "is not one of regex:<pattern>"),
        ("length:9-1", "must be length:<least>-<most> in characters"),
        ("length:", "must be length:<least>-<most> in characters"),
        ("json:x", "is not one of"),
        ("python:os.system", "is not one of"),
        ("python:os:system('x')", "is not one of"),
        ("yaml", "is not one of"),
    ],
)
def test_a_rule_that_is_none_says_what_is_allowed(rule: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GoldSettings(rule=rule)


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("https://judge.example/v1", True),
        ("https://judge.example/v1/", True),
        ("https://judge.example/v1/openai", True),
        ("https://judge.example:443/v1", True),
        ("https://judge.example/v10", False),
        ("https://judge.example/v1/../admin", False),
        ("https://judge.example", False),
        ("http://judge.example/v1", False),
        ("https://judge.example:8443/v1", False),
        ("https://judge.example.evil/v1", False),
        ("https://judge.example@evil.example/v1", False),
        ("https://other.example/anything", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://127.0.0.1.evil.example/v1", False),
    ],
)
def test_an_endpoint_must_begin_with_one_that_the_operator_lists(
    address: str, is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", "https://judge.example/v1, https://other.example")
    if is_allowed:
        check_endpoint(address, field="judge", with_key=False, for_judges=True)
    else:
        with pytest.raises(ConfigError, match="is not an endpoint that may be asked; allowed: https://judge"):
            check_endpoint(address, field="judge", with_key=False, for_judges=True)


def test_a_key_goes_to_listed_endpoints_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", "http://127.0.0.1:8000/v1")
    check_endpoint("http://127.0.0.1:8000/v1", field="judge", with_key=True, for_judges=True)
    with pytest.raises(ConfigError, match="may be sent a key"):
        check_endpoint("http://127.0.0.1:9000/v1", field="judge", with_key=True, for_judges=True)


def test_the_field_of_the_form_takes_an_endpoint_or_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATHANOR_JUDGE_ENDPOINTS", raising=False)
    local = {"recipe": "tiny", "judge": "http://127.0.0.1:8000/v1"}
    config = resolve({**local, "overrides": {"evaluate.judge.model": "m"}})
    assert config.evaluate.judge.endpoint == "http://127.0.0.1:8000/v1"
    assert "judge" not in config.given_models
    model = resolve({"recipe": "tiny", "judge": "/models/judge"})
    assert model.given_models == {"judge": "/models/judge"}
    assert model.evaluate.judge.endpoint == ""
    assert [source.role for source in model.stage_sources(Stage.EVALUATE)] == ["judge"]
    for values, said in (
        (local, "model is empty"),
        ({**local, "judge": "https://judge.example/v1", "overrides": {"evaluate.judge.model": "m"}}, "may be asked"),
        ({**local, "last_stage": "sft", "overrides": {"evaluate.judge.model": "m"}}, "judge is given and no stage"),
        ({"recipe": "tiny", "judge": "/j", "last_stage": "sft"}, "judge is given and no stage of this run reads it"),
        (
            {"recipe": "tiny", "base_model": "http://127.0.0.1/v1"},
            "is an endpoint, which only judge and critic and generator",
        ),
        ({"recipe": "tiny", "overrides": {"evaluate.judge.endpoint": "http://127.0.0.1"}}, "It is the field judge"),
    ):
        with pytest.raises(ConfigError) as raised:
            resolve(values)
        assert said in f"{raised.value.message} {raised.value.advice}"


def test_evaluations_without_judges_keep_their_fingerprints() -> None:
    identity = EvaluateConfig().identity()
    assert "judge" not in identity
    assert "gold" not in identity
