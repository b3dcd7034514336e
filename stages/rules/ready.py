"""Rules that are ready to be used: one `match` over the kinds of `stages.config.scorers`."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, assert_never

from stages.config.errors import ConfigError
from stages.config.scorers import (
    ExactRule,
    FunctionRule,
    LengthRule,
    NumberRule,
    RegexRule,
    Rule,
    SchemaRule,
    UnitTestsRule,
)
from stages.rules.code_tests import CodeLimits, require_confinement, run_tests
from stages.rules.compare import exact_match, length_within, number_match, regex_found, regex_match
from stages.rules.failed import RuleFailedError
from stages.rules.function import allowed_function, called_rule, check_digest
from stages.rules.schema import problem_of, schema_value

_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Row:
    """What a prompt's row brings; what it does not have is empty."""

    prompt: str = ""
    """The last message of the user."""
    reference: tuple[str, ...] = ()
    """Expected answers; one of them is enough."""
    tests: tuple[str, ...] = ()
    """Pieces of Python that fail by an exception."""
    schema: str = ""
    """JSON Schema as text."""


@dataclass(frozen=True)
class Value:
    """A rule's value of one response."""

    value: float
    failed: str = ""
    """Why the rule had none, in whose place `value` stands; empty when it had one."""


@dataclass(frozen=True)
class ReadyRule:
    """A rule that is ready to be used."""

    value: Callable[[str, Row], float]
    """From a response and its row; raises RuleFailedError."""
    failed_value: float = 0.0
    """In the place of a value that could not be had."""
    processes: int = 1
    """How many responses are judged at once."""

    @property
    def on_main_only(self) -> bool:
        return False

    def account(self) -> dict[str, Any]:
        """Nothing: a rule spends nothing."""
        return {}

    def values(self, responses: Sequence[str], rows: Sequence[Row]) -> list[Value]:
        if self.processes == 1:
            return [self._value(response, row) for response, row in zip(responses, rows, strict=True)]
        with ThreadPoolExecutor(self.processes) as threads:
            return list(threads.map(self._value, responses, rows))

    def _value(self, response: str, row: Row) -> Value:
        try:
            return Value(self.value(response, row))
        except RuleFailedError as error:
            return Value(self.failed_value, str(error))


def ready_rule(rule: Rule, *, field: str) -> ReadyRule:
    """Return the rule that the settings at `field` name; raises ConfigError for one that cannot run here."""
    match rule:
        case ExactRule():
            return ReadyRule(lambda response, row: exact_match(response, row.reference))
        case NumberRule():
            return ReadyRule(lambda response, row: number_match(response, row.reference))
        case RegexRule():
            return ReadyRule(lambda response, row: _by_pattern(rule, response, row))
        case LengthRule():
            return ReadyRule(lambda response, row: _by_length(rule, response))
        case SchemaRule():
            if rule.json_schema and (problem := problem_of(rule.json_schema)):
                raise ConfigError(
                    f"{field}.json_schema={rule.json_schema[:200]!r} cannot be used: {problem}",
                    advice="Give a JSON Schema of draft 2020-12; docs/SCORERS.md says what is left out.",
                )
            return ReadyRule(lambda response, row: _by_schema(rule, response, row))
        case UnitTestsRule():
            require_confinement()
            limits = CodeLimits(rule.cpu_seconds, rule.memory_megabytes << 20)
            processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
            return ReadyRule(lambda response, row: _by_tests(rule, response, row, limits), processes=processes)
        case FunctionRule():
            check_digest(allowed_function(rule.function, field=field), rule.function, rule.sha256, field=field)
            called = called_rule(rule.function)
            return ReadyRule(lambda response, row: called(response, asdict(row)), failed_value=rule.failed_value)
        case _:
            assert_never(rule)


def _by_pattern(rule: RegexRule, response: str, row: Row) -> float:
    if rule.compare:
        return regex_match(rule.pattern, response, row.reference)
    return regex_found(rule.pattern, response)


def _by_length(rule: LengthRule, response: str) -> float:
    size = len(response.split()) if rule.unit == "words" else len(response)
    return length_within(size, least=rule.least, most=rule.most, margin=rule.margin)


def _by_schema(rule: SchemaRule, response: str, row: Row) -> float:
    schema = rule.json_schema or row.schema
    return schema_value(response, schema, fenced=rule.fenced, parsed_value=rule.parsed_value)


def _by_tests(rule: UnitTestsRule, response: str, row: Row, limits: CodeLimits) -> float:
    share = run_tests(response, row.tests, limits).share
    return share if rule.partial else float(share == 1.0)
