"""A judge behind an OpenAI-compatible endpoint: it rates each response by a rubric, and the number is the score.

How it is asked, what is tried again, and when it counts as away: stages/models/endpoint/client.py. Answers are kept in
the store, so a training that is resumed, or a response that was rated before, asks nothing.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from stages.artifacts.store import Store
from stages.config.errors import ConfigError, StageError
from stages.config.scorers import SHIPPED_RUBRICS, JudgeScorer
from stages.models.endpoint.client import ChatClient
from stages.models.endpoint.journal import Journal
from stages.models.endpoint.records import AWAY, BUDGET, ChatRequest, Completion, Outcome, Unanswered
from stages.rules.ready import Row, Value

logger = logging.getLogger(__name__)

_PLACE = re.compile(r"\{(prompt|response|reference)\}")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_SAID = re.compile(rf"\bscore\b\W{{0,8}}{_NUMBER}", re.IGNORECASE)
_ALONE = re.compile(rf"\s*\W{{0,4}}{_NUMBER}\s*(?:/\s*\d+)?\W{{0,4}}\s*")
NO_NUMBER, OUT_OF_RANGE, CUT = "no_number", "out_of_range", "answer_cut"
"""Reasons for which an answer is no rating, in addition to those of the client."""


class Judge:
    """Rates responses. The values are shares of the scale, from 0 to 1."""

    on_main_only = True  # one client keeps pace and budget

    def __init__(
        self,
        scorer: JudgeScorer,
        *,
        field: str,
        store: Store | None,
        artifact: str,
        beat: Callable[[], None] = lambda: None,
        **waiting: Any,
    ) -> None:
        """`store` keeps the answers, under `artifact`. Raises ConfigError for an endpoint that may not be asked."""
        self._scorer, self._field = scorer, field
        self._template = rubric(scorer.prompt)
        self._open = lambda: ChatClient(
            scorer.endpoint,
            field=f"{field}.endpoint",
            journal=Journal(store, scorer.endpoint, artifact=artifact) if store is not None else None,
            for_judges=True,
            beat=beat,
            **waiting,
        )
        self._client: ChatClient | None = None
        self._failed: Counter[str] = Counter()

    def values(self, responses: Sequence[str], rows: Sequence[Row]) -> list[Value]:
        """Raises StageError when the endpoint is away or the budget is spent: made-up scores would be trained on."""
        if self._client is None:
            self._client = self._open()
        requests = [self._request(response, row) for response, row in zip(responses, rows, strict=True)]
        found = [self._value(outcome) for outcome in self._client.ask(requests)]
        self._failed.update(value.failed for value in found if value.failed)
        if found and all(value.failed for value in found):
            raise StageError(
                f"{self._field}: the judge rated none of {len(found)} responses: {dict(self._failed)}; last: "
                f"{self._client.last_failure or 'answers without a number'}",
                advice="See what the endpoint answers; a rubric must ask for a line such as `Score: 7`.",
            )
        return found

    def account(self) -> dict[str, Any]:
        """What was asked and spent, and the answers that were no ratings, for the ledger."""
        if self._client is None:
            return {}
        return {**self._client.account(), "not_rated": dict(self._failed)}

    def _request(self, response: str, row: Row) -> ChatRequest:
        texts = {"prompt": row.prompt, "response": response, "reference": "\n".join(row.reference)}
        # In one pass: a response that spells a place out stays as it is.
        asked = _PLACE.sub(lambda place: texts[place[1]], self._template)
        return ChatRequest(
            messages=({"role": "user", "content": asked},),
            max_tokens=self._scorer.answer_tokens,
            temperature=self._scorer.temperature,
        )

    def _value(self, outcome: Outcome) -> Value:
        if isinstance(outcome, Unanswered) and outcome.reason == AWAY:
            told = self._client.last_failure if self._client else ""
            raise StageError(
                f"{self._field}: {self._scorer.endpoint.endpoint} is away: {told or outcome.told}",
                advice="See whether it runs. The retry continues from the last checkpoint and asks nothing twice.",
            )
        if isinstance(outcome, Unanswered) and outcome.reason == BUDGET:
            raise ConfigError(
                f"{self._field}.endpoint: the budget is spent before the training is done",
                advice="Raise budget_requests, budget_tokens, budget_cost or max_minutes; answers that are paid for "
                "are kept.",
            )
        rating = outcome.reason if isinstance(outcome, Unanswered) else self._rating(outcome)
        if isinstance(rating, str):
            return Value(self._scorer.failed_value, rating)
        low, high = self._scorer.lowest, self._scorer.highest
        return Value((rating - low) / (high - low))

    def _rating(self, completion: Completion) -> float | str:
        rating = number_in(completion.text or "")
        if rating is None:
            return CUT if completion.finish_reason == "length" else NO_NUMBER
        return rating if self._scorer.lowest <= rating <= self._scorer.highest else OUT_OF_RANGE


def number_in(answer: str) -> float | None:
    """The number after the last `score`, or the answer itself if it is a number, also as `7/10`."""
    said = _SAID.findall(answer)
    alone = _ALONE.fullmatch(answer)
    found = said[-1] if said else alone[1] if alone else None
    return None if found is None else float(found)


def rubric(name_or_text: str) -> str:
    """Return a shipped rubric by its name, or the text that was given instead."""
    if name_or_text not in SHIPPED_RUBRICS:
        return name_or_text
    return files("stages.train.rollout.scorers").joinpath(f"{name_or_text}.txt").read_text(encoding="utf-8")
