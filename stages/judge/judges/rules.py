"""A rule that scores sampled answers: what can be checked needs no model."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from stages.config.judging import parse_rule
from stages.judge.benchmarks.rules import source_of
from stages.judge.builtin.facts import Facts, digest_of, measurement
from stages.judge.builtin.sampled import Sampler
from stages.judge.suite import Measurement, Score, Subject
from stages.rules.compare import regex_found
from stages.rules.failed import RuleFailedError
from stages.rules.function import allowed_function, called_rule

RULE = "rule"
"""Name of the suite."""


@dataclass(frozen=True)
class ReadyRule:
    """A rule that is ready to be used."""

    identity: str
    """What decides its values, for the digest of the suite."""
    value: Callable[[str, str], float]
    """From a response and its prompt; raises RuleFailedError."""


def ready_rule(text: str) -> ReadyRule:
    """Return the rule that the settings name; raises ConfigError for a function that may not run."""
    rule = parse_rule(text)
    match rule.kind:
        case "regex":
            return ReadyRule(text, lambda response, prompt: regex_found(rule.pattern, response))
        case "length":
            return ReadyRule(text, lambda response, prompt: float(rule.least <= len(response) <= rule.most))
        case "json":
            return ReadyRule(text, lambda response, prompt: _is_json(response))
        case "python":
            function = allowed_function(rule.function, field="evaluate.gold.rule")
            identity = f"{text} {source_of(function)}"
            return ReadyRule(identity, called_rule(rule.function))


def _is_json(response: str) -> float:
    try:
        json.loads(response)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


class RuleScores(Facts):
    """The rule's value of each answer."""

    def __init__(self, sampler: Sampler, rule: ReadyRule) -> None:
        self._sampler, self._rule = sampler, rule
        super().__init__(
            RULE, "score", "higher", digest_of(RULE, sampler.items, **sampler.settings, rule=rule.identity)
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def measure(self, subject: Subject) -> Measurement:
        found = self._sampler.of(subject)
        skipped, scores = Counter(found.skipped), []
        for answer in found.answers:
            try:
                value = self._rule.value(answer.text, answer.prompt.text)
            except RuleFailedError as error:
                skipped[str(error)] += 1
                continue
            scores.append(Score(answer.prompt.id, value, tokens=len(answer.ids), response=answer.text))
        return measurement(scores, skipped)
