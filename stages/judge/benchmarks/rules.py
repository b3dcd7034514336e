"""Whether a response is right, by a rule. Rules are pure; only a function of an allowed module runs code of others."""

import importlib
import inspect
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from stages.config.benchmarks import Benchmark, Rule
from stages.config.errors import ConfigError
from stages.judge.benchmarks.facets import digest_of
from stages.judge.benchmarks.rule_process import RuleFailedError, RuleProcess

ALLOWED_MODULES = "ATHANOR_RULE_MODULES"
"""Variable of the workers' environment: modules whose functions may judge responses, with commas between them."""

LARGEST = 1e12
"""Of a rule's values: the mean of a few of 1e308 would be infinite."""
_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")
_MARK = "####"
"""Before the final number in GSM8K's answers."""
_SECONDS = 1.0
"""A regular expression may need time that grows exponentially with the response; after this one it is given up."""


@dataclass(frozen=True)
class Judgement:
    """A rule that is ready to be used."""

    metric: str
    identity: str
    """What decides its verdicts, for the digest of a suite."""
    value: Callable[[str, Sequence[str]], float]
    """From a response and the expected answers to a value, 1 for right; raises RuleFailedError."""


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
            function = allowed_function(benchmark.function)
            identity = f"function {benchmark.function} {source_of(function)}"
            called = called_rule(benchmark.function)
            return Judgement("score", identity, lambda response, answers: called(response, list(answers)))


def exact_match(response: str, answers: Sequence[str]) -> float:
    """Equal up to case, spaces and a final full stop."""
    return float(plain(response) in {plain(answer) for answer in answers})


def plain(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def number_match(response: str, answers: Sequence[str]) -> float:
    """The last number of the response equals that of an answer. GSM8K marks it by ####, where there is one."""
    found = last_number(response)
    return float(found is not None and found in {last_number(answer) for answer in answers})


def last_number(text: str) -> Decimal | None:
    """The number after #### if the text has that mark and a number follows, else the last one."""
    marked = _NUMBER.findall(text.rpartition(_MARK)[2]) if _MARK in text else []
    found = marked[0] if marked else next(reversed(_NUMBER.findall(text)), None)
    if found is None:
        return None
    try:
        return Decimal(found.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def regex_match(pattern: str, response: str, answers: Sequence[str]) -> float:
    """What the pattern finds last in the response, its first group or all of it, is one of the answers."""
    import regex

    try:
        found = list(regex.finditer(pattern, response, timeout=_SECONDS))
    except TimeoutError:
        raise RuleFailedError("pattern_takes_too_long") from None
    except regex.error:
        raise RuleFailedError("pattern_is_invalid") from None
    if not found:
        return 0.0
    text = found[-1].group(1 if found[-1].re.groups else 0) or ""
    return exact_match(text, answers)


def allowed_function(address: str, *, field: str = "benchmarks") -> Callable[..., Any]:
    """Import `module:name`; raises ConfigError, which names the field, unless the workers' administrators allow the
    module."""
    module, _, name = address.partition(":")
    allowed = os.environ.get(ALLOWED_MODULES, "").replace(",", " ").split()
    if module not in allowed:
        raise ConfigError(
            f"{field}: function={address!r} runs code, and {ALLOWED_MODULES} does not hold {module!r}; it holds "
            f"{', '.join(allowed) or 'nothing'}",
            advice=f"Let whoever runs Ray read the module and add it to {ALLOWED_MODULES} there (docs/SECURITY.md): it "
            "will run with the workers' credentials.",
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{field}: function={address!r} cannot be imported: {error}",
            advice="Install its module where Ray's processes run, and check the names.",
        ) from error
    if not callable(found):
        raise ConfigError(
            f"{field}: function={address!r} is a {type(found).__name__}",
            advice="Name a function of a response and a list of expected answers.",
        )
    return found


def called_rule(address: str) -> Callable[[str, Any], float]:
    """Return what calls a function of others with a response and what it is compared with; raises RuleFailedError for a
    value that is no number, or so large that a mean of such values is none."""
    process = RuleProcess(address)

    def called(response: str, other: Any) -> float:
        value = process.call(response, other)
        if not math.isfinite(value):
            raise RuleFailedError("not_finite")
        if abs(value) > LARGEST:
            raise RuleFailedError("value_too_large")
        return value

    return called


def source_of(function: Callable[..., Any]) -> str:
    """Hash of the module that the function stands in: what it calls there counts, too."""
    try:
        return digest_of(inspect.getsource(inspect.getmodule(function) or function))
    except (OSError, TypeError):  # compiled code
        return ""
