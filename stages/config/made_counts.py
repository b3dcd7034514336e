"""What the ledger of a stage that makes data says, in one shape for the review and the report: counts and cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.config.graph import INSTRUCTIONS, PREFERENCES

_STEPS = ("sources", "prompts", "instructions", "inputs", "responses", "rounds", "comparisons", "rows")
"""Steps of all such stages, in the order in which they are shown; manifests keep no order."""
_NAMES = {"rounds": "critiques and revisions"}
_KINDS = {INSTRUCTIONS: "conversations for SFT", PREFERENCES: "preference pairs"}


@dataclass(frozen=True)
class StepCount:
    """in = kept + dropped by reason."""

    name: str
    entered: int
    kept: int
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Spent:
    """What one model was asked."""

    model: str
    does: str
    """`critic`, `responder`, `generator`."""
    requests: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None
    """In the currency of the endpoint's prices; None for a model of the process, which has none."""


def step_counts(ledger: Mapping[str, Any]) -> list[StepCount]:
    """The steps that anything came into."""
    steps = [(name, ledger[name]) for name in _STEPS if isinstance(ledger.get(name), Mapping)]
    return [
        StepCount(_NAMES.get(name, name), step["in"], step["kept"], step["dropped"])
        for name, step in steps
        if step["in"]
    ]


def by_principle(ledger: Mapping[str, Any]) -> dict[str, tuple[StepCount, StepCount]]:
    """Rounds and comparisons of each principle; empty for data that no principles made."""
    found = ledger.get("principles") or {}
    names = sorted({*found.get("rounds", {}), *found.get("comparisons", {})})

    def count(name: str, step: str) -> StepCount:
        counted = found.get(step, {}).get(name) or {"in": 0, "kept": 0, "dropped": {}}
        return StepCount(step, counted["in"], counted["kept"], counted["dropped"])

    return {name: (count(name, "rounds"), count(name, "comparisons")) for name in names}


def spent(ledger: Mapping[str, Any]) -> list[Spent]:
    """Requests, tokens and cost of every model that was asked, all attempts together."""
    asked = ledger.get("asked") or {}
    if "requests" in asked:
        return [_spent(str(ledger.get("generator", "")), "generator", asked)]
    names = ledger.get("models") or {}
    return [_spent(str(names.get(does, "")), does, asked[does]) for does in sorted(asked)]


def _spent(model: str, does: str, asked: Mapping[str, Any]) -> Spent:
    cost = asked.get("cost")
    return Spent(
        model=model,
        does=does,
        requests=asked["requests"],
        prompt_tokens=asked["prompt_tokens"],
        answer_tokens=asked["answer_tokens"],
        cost=None if cost is None else float(cost),
    )


def made_rows(ledger: Mapping[str, Any]) -> str:
    """What was made, in words: `6 conversations for SFT, 12 preference pairs`."""
    published = ledger.get("published") or {}
    return ", ".join(f"{published[field]:,} {words}" for field, words in _KINDS.items() if field in published)
