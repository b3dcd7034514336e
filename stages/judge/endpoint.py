"""A judge behind an OpenAI-compatible endpoint: questions become requests, and answers verdicts or reasons.

How it is asked, what is tried again, and when it counts as away: stages/models/endpoint/client.py.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence

from stages.config.judging import JudgeConfig
from stages.judge import pairwise
from stages.judge.pairwise import (
    CUT,
    UNCLEAR,
    Answer,
    JudgeAwayError,
    Question,
    read_verdict,
)
from stages.judge.prompts import filled, prompt_digest, prompt_text
from stages.models.endpoint import records
from stages.models.endpoint.client import ChatClient
from stages.models.endpoint.records import ChatRequest, Outcome, Unanswered

_REASONS = {
    records.AWAY: pairwise.AWAY,
    records.REFUSED: pairwise.REFUSED,
    records.GARBAGE: pairwise.GARBAGE,
    records.BUDGET: pairwise.BUDGET,
}


class EndpointJudge:
    """Asks a server; use it as a context, which closes its connections."""

    def __init__(
        self,
        config: JudgeConfig,
        *,
        sleep: Callable[[float], None] = time.sleep,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises ConfigError for an endpoint that may not be asked, or a key that is not there. `beat` is called after
        every attempt."""
        self._config = config
        self._template = prompt_text(config.prompt)
        self._client = ChatClient(config.asked, field="evaluate.judge", for_judges=True, sleep=sleep, beat=beat)

    def __enter__(self) -> "EndpointJudge":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def identity(self) -> str:
        return identity_of(self._config)

    @property
    def requests(self) -> int:
        """Requests that were sent so far, repeated ones counted."""
        return self._client.requests

    @property
    def retried(self) -> dict[str, int]:
        """Attempts that failed and were repeated, by reason."""
        return {_REASONS[reason]: count for reason, count in self._client.retried.items()}

    def require_reachable(self) -> None:
        """Raise JudgeAwayError unless the endpoint answers a question at all."""
        question = Question("What is 1 + 1?", "2", "3")
        answer = self.ask([question])[0]
        if answer in _REASONS.values():
            raise JudgeAwayError(f"{self._config.endpoint}: {self._client.last_failure or answer}")
        self._client.forgive()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        return [_verdict(outcome) for outcome in self._client.ask([self._request(one) for one in questions])]

    def _request(self, question: Question) -> ChatRequest:
        asked = filled(self._template, question=question.prompt, first=question.first, second=question.second)
        return ChatRequest(
            messages=({"role": "user", "content": asked},),
            max_tokens=self._config.answer_tokens,
            temperature=self._config.temperature,
        )


def _verdict(outcome: Outcome) -> Answer:
    if isinstance(outcome, Unanswered):
        return _REASONS[outcome.reason]
    # A model that only thought, or called a tool, says nothing: asked again it would do the same.
    preferred = read_verdict(outcome.text) if outcome.text is not None else None
    if preferred is None:
        return CUT if outcome.finish_reason == "length" else UNCLEAR
    return preferred


def identity_of(config: JudgeConfig) -> str:
    """Hash over address, model, prompt and sampling. What the server runs under the model's name is not known."""
    parts = [config.endpoint.rstrip("/"), config.model, prompt_digest(config.prompt), config.temperature]
    return hashlib.sha256(json.dumps([*parts, config.answer_tokens]).encode()).hexdigest()
