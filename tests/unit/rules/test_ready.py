"""Rules as the settings name them."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from stages.config.errors import ConfigError
from stages.config.scorers import (
    ExactRule,
    FunctionRule,
    LengthRule,
    NumberRule,
    RegexRule,
    SchemaRule,
    UnitTestsRule,
)
from stages.rules.code_tests import can_confine
from stages.rules.ready import Row, Value, ready_rule


def values(rule: Any, row: Row, *responses: str) -> list[float]:
    return [one.value for one in ready_rule(rule, field="ppo.scorer").values(responses, [row] * len(responses))]


def test_a_number_is_compared_with_that_of_the_reference() -> None:
    row = Row(reference=("6 * 7 = 42\n#### 42",))
    assert values(NumberRule(), row, "So it is 42.", "#### 42, not 41", "41", "none") == [1, 1, 0, 0]


def test_one_of_several_references_is_enough() -> None:
    assert values(ExactRule(), Row(reference=("the Seine", "Seine")), "seine.", "the  seine", "Rhine") == [1, 1, 0]


def test_a_pattern_is_found_or_finds_the_reference() -> None:
    assert values(RegexRule(pattern=r"^Answer: \w+$"), Row(), "Answer: B", "B") == [1, 0]
    rule = RegexRule(pattern=r"answer is (\w+)", compare=True)
    assert values(rule, Row(reference=("b",)), "The answer is A. No, the answer is B", "b") == [1, 0]


def test_a_length_falls_to_0_over_the_margin() -> None:
    rule = LengthRule(least=2, most=4, unit="words", margin=4)
    assert values(rule, Row(), "a b", "a b c d", "a b c d e", "a b c d e f g", "a " * 8) == [1, 1, 0.75, 0.25, 0]
    assert values(rule, Row(), "a", "") == [0.75, 0.5]
    assert values(LengthRule(least=2, most=3), Row(), "a", "ab", "abc", "abcd") == [0, 1, 1, 0]


def test_a_schema_is_of_the_settings_or_of_the_row() -> None:
    assert values(SchemaRule(json_schema='{"type": "array"}'), Row(), "[1]", "1") == [1, 0]
    assert values(SchemaRule(parsed_value=0.5), Row(schema='{"type": "array"}'), "[1]", "1", "?") == [1, 0.5, 0]
    with pytest.raises(ConfigError, match=r"ppo\.scorer\.json_schema=.*cannot be used"):
        ready_rule(SchemaRule(json_schema='{"type": "row"}'), field="ppo.scorer")


def test_a_rule_that_fails_counts_as_its_lowest_value_with_the_reason() -> None:
    rule = ready_rule(RegexRule(pattern="(a|aa)+$"), field="ppo.scorer")
    assert rule.values(["a" * 60 + "b"], [Row()]) == [Value(0.0, "pattern_takes_too_long")]


@pytest.mark.skipif(not can_confine(), reason="this machine cannot filter system calls")
def test_tests_are_passed_all_or_in_part() -> None:
    row = Row(tests=("assert f(1) == 1", "assert f(2) == 4"))
    responses = ("def f(x): return x * x", "def f(x): return x", "")
    assert values(UnitTestsRule(), row, *responses) == [1, 0, 0]
    assert values(UnitTestsRule(partial=True), row, *responses) == [1, 0.5, 0]


def test_a_function_runs_if_its_module_is_allowed_and_its_file_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "planted_scores.py"
    code.write_text(
        "def score(response, row):\n    return len(response) / len(row['reference'][0]) + len(row['prompt'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    right = hashlib.sha256(code.read_bytes()).hexdigest()
    rule = FunctionRule(function="planted_scores:score", sha256=right, failed_value=-1)
    monkeypatch.setenv("ATHANOR_RULE_MODULES", "other")
    with pytest.raises(ConfigError, match=r"ppo\.scorer: function='planted_scores:score' runs code"):
        ready_rule(rule, field="ppo.scorer")
    monkeypatch.setenv("ATHANOR_RULE_MODULES", "planted_scores")
    with pytest.raises(ConfigError, match=f"has sha256='{right}', and the settings name '{'0' * 64}'"):
        ready_rule(rule.model_copy(update={"sha256": "0" * 64}), field="ppo.scorer")
    found = ready_rule(rule, field="ppo.scorer").values(["abcd", "ab"], [Row("??", ("ab",)), Row("", ("",))])
    assert found == [Value(4.0), Value(-1, "rule_failed_ZeroDivisionError")]
