"""Whether a response is right, by a rule. Rules are pure; only a function of an allowed module runs code of others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.config.benchmarks import Benchmark, Rule
from stages.judge.benchmarks.facets import digest_of
from stages.rules.compare import exact_match, number_match, regex_match
from stages.rules.function import allowed_function, called_rule
from stages.rules.function import source_of as rule_source


@dataclass(frozen=True)
class Judgement:
    """A rule that is ready to be used."""

    metric: str
    identity: str
    """What decides its verdicts, for the digest of a suite."""
    value: Callable[[str, Sequence[str]], float]
    """From a response and the expected answers to a value, 1 for right; raises `RuleFailedError`."""


def rule_of(benchmark: Benchmark) -> Judgement:
    """The rule that a benchmark names; raises ConfigError for a function that may not run."""
    match benchmark.rule or Rule.EXACT:
        case Rule.EXACT:
            return Judgement("exact_match", "exact", exact_match)
        case Rule.NUMBER:
            return Judgement("number_match", "number", number_match)
        case Rule.REGEX:
            pattern = benchmark.pattern
            return Judgement("regex_match", f"regex {pattern}", lambda *found: regex_match(pattern, *found))
        case Rule.FUNCTION:
            function = allowed_function(benchmark.function, field="benchmarks")
            identity = f"function {benchmark.function} {source_of(function)}"
            called = called_rule(benchmark.function)
            return Judgement("score", identity, lambda response, answers: called(response, list(answers)))


def source_of(function: Callable[..., Any]) -> str:
    """Hash of the module that a function stands in; empty for compiled code."""
    text = rule_source(function)
    return digest_of(text) if text else ""
