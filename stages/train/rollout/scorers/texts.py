"""Scorers that read texts, and how their scores and that of a reward model become one.

They compute on no device, so they are no part of the sampling's collective passes: when the responses of a rollout are
gathered, each rank scores its share, or one rank all, once, and all have the scores.

The score of a mixture is the weighted sum of its parts' scores, its reward that of their rewards: a reward model's part
counts in units of its first rollout's spread, the others as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from stages.rules.ready import Row, Value
from stages.train.engine import Engine
from stages.train.plan import share


class TextScorer(Protocol):
    """Scores the texts of responses; every value is finite."""

    @property
    def on_main_only(self) -> bool:
        """Whether one rank scores for all, instead of each its share."""
        ...

    def values(self, responses: Sequence[str], rows: Sequence[Row]) -> Sequence[Value]: ...

    def account(self) -> dict[str, Any]:
        """What was asked and spent elsewhere, for the ledger."""
        ...


@dataclass(frozen=True)
class Part:
    """One scorer of a mixture, or the only one."""

    name: str
    weight: float
    scorer: TextScorer | None
    """None is the reward model, whose scores the responses have already."""


@dataclass(frozen=True)
class Scored:
    """All that the scorers say about one response."""

    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Each part's own score, without its weight."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Parts that had no value, with the reason; another value stands in its place."""


@dataclass(frozen=True)
class Parts:
    """The parts of a score. `text_of` decodes the ids of a response."""

    parts: tuple[Part, ...]
    text_of: Callable[[np.ndarray], str]

    def scored(
        self, engine: Engine, responses: Sequence[np.ndarray], rows: Sequence[Row], *, by_model: Sequence[float]
    ) -> list[Scored]:
        """Return the scores of all responses, on every rank the same; `by_model` are the reward model's."""
        everything = np.arange(len(responses))
        mine = share(everything, rank=engine.rank, world_size=engine.world_size).tolist()
        found: list[dict[str, Value]] = [{} for _ in responses]
        for part in self.parts:
            if part.scorer is None:
                continue
            chosen = mine if not part.scorer.on_main_only else everything.tolist() if engine.is_main else []
            texts = [self.text_of(responses[number]) for number in chosen]
            values = part.scorer.values(texts, [rows[number] for number in chosen]) if chosen else []
            for number, value in engine.gather(list(zip(chosen, values, strict=True))):
                found[number][part.name] = value
        return [self._scored(score, values) for score, values in zip(by_model, found, strict=True)]

    def account(self) -> dict[str, dict[str, Any]]:
        """What parts asked and spent elsewhere, by name."""
        accounts = ((part.name, part.scorer.account()) for part in self.parts if part.scorer is not None)
        return {name: account for name, account in accounts if account}

    def _scored(self, by_model: float, found: Mapping[str, Value]) -> Scored:
        parts = {part.name: by_model if part.scorer is None else found[part.name].value for part in self.parts}
        failed = {name: value.failed for name, value in found.items() if value.failed}
        return Scored(sum(part.weight * parts[part.name] for part in self.parts), parts, failed)

    def rewards(
        self, scored: Sequence[Mapping[str, float]], by_model: Callable[[list[float]], list[float]]
    ) -> list[float]:
        """Return a rollout's rewards from the scores of its parts; `by_model` turns the reward model's scores into its
        rewards."""
        rewards = np.zeros(len(scored))
        for part in self.parts:
            scores = [parts[part.name] for parts in scored]
            rewards += part.weight * np.array(by_model(scores) if part.scorer is None else scores)
        return rewards.tolist()
