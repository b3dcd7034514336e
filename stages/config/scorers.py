"""What a response is worth in reinforcement learning: a reward model, a rule, a judge or a weighted mixture.

A union, as the preference losses are: each kind has its own settings, all with defaults or refused by a sentence while
they are empty. All of it enters fingerprints: a field that is added is marked `AddedLater` (`stages.config.base`).
"""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stages.config.base import Config
from stages.config.endpoints import EndpointConfig

REFERENCE, TESTS, SCHEMA = "reference", "tests", "schema"
"""What the row of a prompt may bring besides its prompt."""

SHIPPED_RUBRICS = ("rubric-v1",)
"""Rubrics of `stages/train/rollout/scorers`; a file there never changes, another text gets another name."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class RewardModelScorer(Config):
    """The reward model of the run or the given one; its scores count in units of their spread in the first rollout."""

    kind: Literal["reward_model"] = "reward_model"
    """Which scorer."""

    needs: ClassVar[tuple[str, ...]] = ()


class ExactRule(Config):
    """1 for a response that equals a reference up to case, spaces and a final full stop, else 0."""

    kind: Literal["exact"] = "exact"
    """Which scorer."""

    needs: ClassVar[tuple[str, ...]] = (REFERENCE,)


class NumberRule(Config):
    """1 for a response whose last number, or the one after `####`, equals that of a reference, else 0."""

    kind: Literal["number"] = "number"
    """Which scorer."""

    needs: ClassVar[tuple[str, ...]] = (REFERENCE,)


class RegexRule(Config):
    """1 for a response in which a pattern is found, or finds a reference, else 0."""

    kind: Literal["regex"] = "regex"
    """Which scorer."""
    pattern: str = ""
    """Regular expression. A search that takes longer than a second finds nothing, and is counted."""
    compare: bool = False
    """Whether what the pattern finds last (its first group, if it has one) must equal a reference. Otherwise it is
    enough that the pattern is found."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (REFERENCE,) if self.compare else ()

    @model_validator(mode="after")
    def _has_a_pattern(self) -> "RegexRule":
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from None
        if not self.pattern:
            raise ValueError("pattern is empty, which is found in every response; give a regular expression")
        return self


class LengthRule(Config):
    """1 for a response of the wanted length; outside of it the value falls to 0."""

    kind: Literal["length"] = "length"
    """Which scorer."""
    least: int = Field(default=1, ge=0)
    """Shortest wanted length."""
    most: int = Field(default=400, ge=0)
    """Longest wanted length."""
    unit: Literal["characters", "words"] = "characters"
    """What is counted; words are what spaces separate."""
    margin: int = Field(default=0, ge=0)
    """Over how many units outside the wanted length the value falls from 1 to 0, in a straight line; 0 = at once."""

    needs: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _least_is_less(self) -> "LengthRule":
        if self.least > self.most:
            raise ValueError(f"least={self.least} is more than most={self.most}; use least <= most")
        return self


class SchemaRule(Config):
    """1 for a response that is JSON of a schema (JSON Schema, draft 2020-12), else 0."""

    kind: Literal["json_schema"] = "json_schema"
    """Which scorer."""
    json_schema: str = ""
    """The schema as JSON text; empty = each prompt's own, the field `schema` of its row."""
    fenced: bool = True
    """Whether the last fenced block of a response counts in its place, if it has one; otherwise the whole response
    must be JSON."""
    parsed_value: float = Field(default=0.0, ge=0, lt=1)
    """Value of JSON that the schema does not allow: something to climb on the way to 1."""

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.json_schema else (SCHEMA,)


class UnitTestsRule(Config):
    """1 for a response whose Python code passes the tests of its prompt, else 0; it runs where it can do no harm."""

    kind: Literal["tests"] = "tests"
    """Which scorer."""
    partial: bool = False
    """Whether the value is the share of tests that passed."""
    cpu_seconds: int = Field(default=5, ge=1, le=600)
    """Processor time for the code of one response and all its tests."""
    memory_megabytes: int = Field(default=512, ge=64, le=65536)
    """Address space of the process, of which Python takes about 20."""

    needs: ClassVar[tuple[str, ...]] = (TESTS,)


class FunctionRule(Config):
    """The value of a Python function of a response and its row, in a module that the workers' administrators allow."""

    kind: Literal["function"] = "function"
    """Which scorer."""
    function: str = ""
    """`module:name` of a function of the response (text) and its row (an object with `prompt`, `reference`, `tests` and
    `schema`), which returns a number. The module must be in `ATHANOR_RULE_MODULES` of Ray's workers."""
    sha256: str = ""
    """SHA-256 of the module's file. Other code is refused, so the fingerprint tells which code gave the scores."""
    failed_value: float = 0.0
    """Value of a response for which the function fails, takes too long or returns no number; each is counted."""

    needs: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _names_code(self) -> "FunctionRule":
        if not _FUNCTION.fullmatch(self.function):
            raise ValueError(f"function={self.function!r} must be module:name, such as my_rules:politeness")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(
                f"sha256={self.sha256!r} must be the SHA-256 of the module's file, 64 hexadecimal digits; "
                "`sha256sum file.py` prints it"
            )
        return self


class JudgeScorer(Config):
    """The rating that a model behind an OpenAI-compatible endpoint gives a response, as a share of its scale."""

    kind: Literal["judge"] = "judge"
    """Which scorer."""
    endpoint: EndpointConfig = EndpointConfig()
    """The endpoint, and what may be spent there."""
    prompt: str = "rubric-v1"
    """Name of a shipped rubric, or the text of one with the places `{prompt}`, `{response}` and, if it is to be shown,
    `{reference}`. It asks for a line `Score: ` with a number."""
    lowest: float = 1.0
    """Rating that counts as 0."""
    highest: float = 10.0
    """Rating that counts as 1."""
    answer_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer at most; thinking counts too."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of the answers."""
    failed_value: float = Field(default=0.0, ge=0, le=1)
    """Value of a response whose rating has no number or is outside of the scale; each is counted."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (REFERENCE,) if "{reference}" in self.prompt else ()

    @model_validator(mode="after")
    def _can_be_asked(self) -> "JudgeScorer":
        if not self.endpoint.endpoint:
            raise ValueError("endpoint.endpoint is empty; give the address of a judge, such as https://host/v1")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest:g} is not below highest={self.highest:g}")
        if self.prompt not in SHIPPED_RUBRICS and "{response}" not in self.prompt:
            raise ValueError(
                f"prompt={self.prompt[:80]!r} is not a shipped rubric ({', '.join(SHIPPED_RUBRICS)}) and has no place "
                "{response}"
            )
        return self


Rule = ExactRule | NumberRule | RegexRule | LengthRule | SchemaRule | UnitTestsRule | FunctionRule
"""Scorers that need no model."""

SingleScorer = Annotated[RewardModelScorer | JudgeScorer | Rule, Field(discriminator="kind")]
"""Scorers that are no mixture of others."""


class WeightedScorer(Config):
    """One part of a mixture."""

    name: str = ""
    """Name of its metric, `ppo/score/<name>`; empty = its kind. No two parts share a name."""
    weight: float
    """What its reward counts; a negative weight is a penalty."""
    scorer: SingleScorer
    """What gives the score."""

    @property
    def title(self) -> str:
        return self.name or self.scorer.kind

    @model_validator(mode="after")
    def _counts_and_has_a_name(self) -> "WeightedScorer":
        if not self.weight:
            raise ValueError(f"{self.title} has weight=0 and would be computed for nothing; leave it out")
        if not _NAME.fullmatch(self.title):
            raise ValueError(f"name={self.name!r} must be lower-case letters, digits and _, at most 40")
        return self


class MixtureScorer(Config):
    """The weighted sum of the rewards of several scorers."""

    kind: Literal["mixture"] = "mixture"
    """Which scorer."""
    parts: tuple[WeightedScorer, ...] = ()
    """The scorers with their weights, such as `[{"weight": 1, "scorer": {"kind": "number"}}, {"weight": 0.2, "scorer":
    {"kind": "length", "most": 800}}]`."""

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(need for part in self.parts for need in part.scorer.needs))

    @model_validator(mode="after")
    def _has_parts_that_differ(self) -> "MixtureScorer":
        names = [part.title for part in self.parts]
        if len(names) < 2:
            raise ValueError(f"parts={names} are less than two; a mixture needs at least two scorers")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"parts: {repeated} appear twice; give each part a name of its own")
        if sum(isinstance(part.scorer, RewardModelScorer) for part in self.parts) > 1:
            raise ValueError("parts: reward_model appears twice, and a run has one; add the weights")
        return self


ScorerConfig = Annotated[RewardModelScorer | JudgeScorer | Rule | MixtureScorer, Field(discriminator="kind")]


def single_scorers(scorer: "ScorerConfig") -> tuple[Config, ...]:
    """Return a scorer's parts, or itself where it has none."""
    return tuple(part.scorer for part in scorer.parts) if isinstance(scorer, MixtureScorer) else (scorer,)


def reads_reward_model(scorer: "ScorerConfig") -> bool:
    """Whether a reward model gives the score or a part of it."""
    return any(isinstance(one, RewardModelScorer) for one in single_scorers(scorer))


def endpoints_of(scorer: "ScorerConfig", field: str) -> dict[str, EndpointConfig]:
    """The endpoints that a scorer asks, by the path of their settings."""
    mixed = isinstance(scorer, MixtureScorer)
    return {
        f"{field}.parts[{number}].scorer.endpoint" if mixed else f"{field}.endpoint": one.endpoint
        for number, one in enumerate(single_scorers(scorer))
        if isinstance(one, JudgeScorer)
    }


def described(scorer: "ScorerConfig") -> str:
    """A scorer in a few words, for reports."""
    if isinstance(scorer, MixtureScorer):
        return " + ".join(f"{part.weight:g} x {part.title}" for part in scorer.parts)
    return scorer.kind.replace("_", " ")
