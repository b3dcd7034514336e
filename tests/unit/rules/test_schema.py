"""JSON that a schema allows, and schemas that cannot be used."""

import json
from typing import Any

import pytest

from stages.rules.failed import RuleFailedError
from stages.rules.schema import problem_of, schema_value

PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"$ref": "#/$defs/age"}},
        "required": ["name", "age"],
        "additionalProperties": False,
        "$defs": {"age": {"type": "integer", "minimum": 0}},
    }
)


def value(response: str, schema: str = PERSON, **options: Any) -> float:
    return schema_value(response, schema, **{"fenced": True, "parsed_value": 0.25, **options})


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('Sure!\n```json\n{"name": "Ada", "age": 36}\n```', 1.0),
        ('{"name": "ada", "age": 36}', 0.25),
        ('{"name": "Ada", "age": -1}', 0.25),
        ('{"name": "Ada"}', 0.25),
        ("[]", 0.25),
        ('Sure! {"name": "Ada", "age": 36}', 0.0),
        ('{"name": "Ada", "age": 36', 0.0),
        ('{"name": "Ada", "age": 1, "age": 36}', 0.0),
        ("NaN", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ("1" * 10_000, 0.0),
    ],
)
def test_json_of_the_schema_is_1_other_json_less_and_no_json_0(response: str, expected: float) -> None:
    assert value(response) == expected


def test_without_fences_the_whole_response_must_be_json() -> None:
    assert value('```json\n{"name": "Ada", "age": 36}\n```', fenced=False) == 0
    assert value(' {"name": "Ada", "age": 36}\n', fenced=False) == 1


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ('{"type": "object"', "no JSON"),
        ("[]", "no JSON object"),
        ('{"type": "person"}', "is not valid"),
        ('{"$ref": "https://example.org/schema"}', "leads to another document"),
        ('{"properties": {"a": {"$ref": "file:///etc/passwd"}}}', "leads to another document"),
        ('{"patternProperties": {"(a|aa)+$": {}}}', "not supported"),
        ('{"$id": "https://example.org/x"}', "not supported"),
        ('{"items": ' * 100 + "{}" + "}" * 100, "deeper than 64"),
    ],
)
def test_a_schema_that_reads_elsewhere_or_is_none_is_refused(schema: str, problem: str) -> None:
    assert problem in problem_of(schema)
    with pytest.raises(RuleFailedError, match="schema_is_invalid"):
        value("{}", schema)


def test_a_reference_that_leads_nowhere_or_round_is_a_reason() -> None:
    for schema in ('{"$ref": "#/$defs/absent"}', '{"$ref": "#"}'):
        assert problem_of(schema) == ""
        with pytest.raises(RuleFailedError, match="schema_is_invalid"):
            value("{}", schema)


def test_a_pattern_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(RuleFailedError, match="pattern_takes_too_long"):
        value(json.dumps("a" * 60 + "b"), json.dumps({"pattern": "^(a|aa)+$"}))
