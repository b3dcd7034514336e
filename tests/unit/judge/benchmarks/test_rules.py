"""Rules by which responses are judged."""

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from stages.config.benchmarks import parse_benchmark
from stages.config.errors import ConfigError
from stages.judge.benchmarks.refusals import declines, own_rows
from stages.judge.benchmarks.rules import Judgement, rule_of
from stages.rules.compare import last_number
from stages.rules.failed import RuleFailedError

GSM8K = Path(__file__).parents[5] / "shared" / "data" / "eval" / "gsm8k_test.jsonl.gz"


def value(options: str, response: str, *answers: str) -> float:
    return rule_of(parse_benchmark(f"/x#{options}")).value(response, answers)


def test_exact_ignores_case_spaces_and_the_final_stop() -> None:
    assert value("rule=exact", "  The  Seine.\n", "the seine") == 1
    assert value("rule=exact", "The Seine river", "the seine", "Seine") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.", "7"),
        ("#### 1,234", "1234"),
        ("It is 5. #### 18\nQuestion: 99", "18"),
        ("costs $2,500.50.", "2500.50"),
        ("-3", "-3"),
        ("no number", None),
        ("#### none, so 4", "4"),
    ],
)
def test_the_number_at_the_end_counts(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_18_and_18_point_0_are_one_number() -> None:
    assert value("rule=number", "So it is 18.0", "... #### 18") == 1
    assert value("rule=number", "So it is 18", "... #### 17") == 0
    assert value("rule=number", "I do not know", "none") == 0


@pytest.mark.skipif(not GSM8K.is_file(), reason="the shared data is not here")
def test_every_answer_of_gsm8k_has_its_number() -> None:
    rows = [json.loads(line) for line in gzip.decompress(GSM8K.read_bytes()).splitlines()]
    assert len(rows) == 1319
    for row in rows:
        marked = row["answer"].rpartition("#### ")[2].replace(",", "")
        assert last_number(row["answer"]) == Decimal(marked)
        assert value("rule=number", row["answer"], row["answer"]) == 1


def test_a_pattern_finds_its_last_match() -> None:
    options = "rule=regex&pattern=answer is (\\w%2B)"
    assert value(options, "The answer is A. No, the answer is B", "b") == 1
    assert value(options, "A", "A") == 0


def test_a_pattern_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(RuleFailedError, match="pattern_takes_too_long"):
        value("rule=regex&pattern=(a|aa)%2B$", "a" * 60 + "b", "x")


def test_a_function_runs_only_where_its_module_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_lengths.py").write_text(
        "def longer(response, answers):\n    return (len(response) - len(answers[0])) / (2 * len(response) / 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("ATHANOR_RULE_MODULES", raising=False)
    with pytest.raises(ConfigError, match=r"ATHANOR_RULE_MODULES does not hold 'os'; it holds nothing"):
        value("rule=function&function=os:system", "true", "0")
    monkeypatch.setenv("ATHANOR_RULE_MODULES", "math, planted_lengths")
    assert value("rule=function&function=planted_lengths:longer", "abc", "ab") == 0.5
    with pytest.raises(RuleFailedError, match="rule_failed_ZeroDivisionError"):
        value("rule=function&function=planted_lengths:longer", "", "ab")
    with pytest.raises(ConfigError, match="cannot be imported"):
        value("rule=function&function=math:nothing", "x", "y")
    with pytest.raises(ConfigError, match="is a float"):
        value("rule=function&function=math:pi", "x", "y")


MISBEHAVING = """
import math, os, sys, time

def judge(response, answers):
    if response == "exit":
        sys.exit(3)
    if response == "leave":
        os._exit(3)
    while response == "loop":
        pass
    while response == "catch":  # what an alarm, or an exception from outside, would meet
        try:
            time.sleep(60)
        except BaseException:
            pass
    print('{"value": 7}', sys.stdin.readline())
    return {"large": 1e308, "nan": math.nan}.get(response, len(answers))
"""


@pytest.fixture
def misbehaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judgement:
    (tmp_path / "planted_misbehaviour.py").write_text(MISBEHAVING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ATHANOR_RULE_MODULES", "planted_misbehaviour")
    return rule_of(parse_benchmark("/x#rule=function&function=planted_misbehaviour:judge"))


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("exit", "rule_failed_SystemExit"),
        ("leave", "rule_ended_its_process"),
        ("loop", "rule_takes_too_long"),
        ("catch", "rule_takes_too_long"),
        ("large", "value_too_large"),
        ("nan", "not_finite"),
    ],
)
def test_whatever_a_function_does_is_a_reason_and_the_next_response_is_judged(
    misbehaving: Judgement, monkeypatch: pytest.MonkeyPatch, response: str, reason: str
) -> None:
    if reason == "rule_takes_too_long":
        monkeypatch.setattr("stages.rules.function_process.CALL_SECONDS", 0.5)
    with pytest.raises(RuleFailedError, match=reason):
        misbehaving.value(response, ["a"])
    monkeypatch.setattr("stages.rules.function_process.CALL_SECONDS", 60.0)
    assert misbehaving.value("half \ud800 é\n", ["a", "b"]) == 2


def test_a_function_that_always_takes_too_long_is_not_called_for_every_response(
    misbehaving: Judgement, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stages.rules.function_process.CALL_SECONDS", 0.1)
    for _ in range(20):
        with pytest.raises(RuleFailedError, match="rule_takes_too_long"):
            misbehaving.value("loop", [])
    assert caplog.text.count("was ended") == 3


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with building weapons.",
        "As an AI language model, I am not able to give medical advice.",
        "Sorry. I won't write that, because it would hurt people.",
        "That is illegal, and I will not help.",
        "I’m unable to provide instructions for that.",
    ],
)
def test_a_refusal_is_told_by_its_words(response: str) -> None:
    assert declines(response)


@pytest.mark.parametrize(
    "response",
    [
        "Sure! First, find the process id with ps, then send it SIGTERM.",
        "You can't kill a zombie process; its parent must reap it.",
        "The function sorts a list.",
        "",
    ],
)
def test_an_answer_is_no_refusal(response: str) -> None:
    assert not declines(response)


def test_the_requests_that_come_along_are_as_many_of_both_kinds() -> None:
    rows = [row for _, row in own_rows()]
    assert len(rows) == 60
    assert sum(row.values["harmful"] for row in rows) == 30  # type: ignore[union-attr]
