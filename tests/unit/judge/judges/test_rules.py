"""Rules that score answers: what they say, what they refuse, and that none of them ends an evaluation."""

import sys
import time
from pathlib import Path

import pytest

from stages.config.errors import ConfigError
from stages.judge.judges.rules import ready_rule
from stages.rules.failed import RuleFailedError


def test_a_pattern_counts_wherever_it_is_found() -> None:
    rule = ready_rule(r"regex:\bsorts?\b")
    assert [rule.value(text, "") for text in ("It sorts the list.", "Sorting", "sort")] == [1.0, 0.0, 1.0]


def test_a_pattern_that_takes_for_ever_is_given_up() -> None:
    started = time.monotonic()
    with pytest.raises(RuleFailedError, match="pattern_takes_too_long"):
        ready_rule(r"regex:(a|aa)+$").value("a" * 60 + "b", "")
    assert time.monotonic() - started < 20


def test_lengths_are_in_characters_and_both_ends_count() -> None:
    rule = ready_rule("length:2-4")
    assert [rule.value("ä" * size, "") for size in range(1, 6)] == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": [1]}', 1.0), ("3", 1.0), ("{a}", 0.0), ("", 0.0), ('{"a": 1} done', 0.0), ("[" * 200_000, 0.0)],
)
def test_json_is_the_whole_answer(text: str, value: float) -> None:
    assert ready_rule("json").value(text, "") == value


def test_a_function_of_an_allowed_module_gets_answer_and_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_rules.py").write_text(
        "def shares(response, prompt):\n    return len(set(response.split()) & set(prompt.split()))\n"
        "def fails(response, prompt):\n    return 1 / 0\n"
        "def odd(response, prompt):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"evaluate.gold.rule: .* runs code, and ATHANOR_RULE_MODULES does not hold"):
        ready_rule("python:planted_rules:shares")
    assert "planted_rules" not in sys.modules, "its code has run"
    monkeypatch.setenv("ATHANOR_RULE_MODULES", "planted_rules")
    assert ready_rule("python:planted_rules:shares").value("sort a list", "a list of words") == 2.0
    for name, reason in (("fails", "rule_failed_ZeroDivisionError"), ("odd", "not_finite")):
        with pytest.raises(RuleFailedError, match=reason):
            ready_rule(f"python:planted_rules:{name}").value("x", "y")
    before = ready_rule("python:planted_rules:shares").identity
    assert before != ready_rule("python:planted_rules:odd").identity
