"""A small constitution and prompts for tests, and writers that say what a test wants."""

from collections.abc import Callable, Sequence
from typing import Any

from stages.config.constitution import ConstitutionConfig
from stages.config.principles import Area, Constitution, Principle
from stages.data.constitution.prompts import Prompt
from stages.data.constitution.work import Asked, Found, Match, Written

RULES = tuple(
    Principle(
        id=f"{area.value}-{number}",
        area=area,
        critique=f"What is not {area.value} about this response, by rule {number}?",
        revision=f"Rewrite it to be more {area.value}, by rule {number}.",
        comparison=f"Which one is more {area.value}, by rule {number}?",
    )
    for area in Area
    for number in (1, 2)
)
CONSTITUTION = Constitution(name="Test", version=1, principles=RULES)
ALL = frozenset(Area)


def rule(area: Area) -> Principle:
    return next(one for one in RULES if one.area is area)


def config_of(**settings: Any) -> ConstitutionConfig:
    return ConstitutionConfig.model_validate({"makes": "both", "prompts": ["/prompts.jsonl"], **settings})


def prompt_about(text: str, *, areas: frozenset[Area] = ALL, id: str = "p") -> Prompt:
    return Prompt(id, ({"role": "user", "content": text},), areas, "/prompts.jsonl")


class Says:
    """A writer that answers with what a function makes of the last turn, and remembers what it was asked."""

    def __init__(self, say: Callable[[str], str | Written]) -> None:
        self._say = say
        self.asked: list[Asked] = []

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        self.asked += asked
        said = [self._say(one.messages[-1]["content"]) for one in asked]
        return [one if isinstance(one, Written) else Written(one) for one in said]


class Prefers:
    """A comparer that always finds the same."""

    def __init__(self, outcome: str) -> None:
        self._outcome = outcome
        self.matches: list[Match] = []

    def compare(self, matches: Sequence[Match]) -> list[Found]:
        self.matches += matches
        return [Found(self._outcome, 1, 2) for _ in matches]
