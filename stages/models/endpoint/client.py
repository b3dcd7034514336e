"""Asks an OpenAI-compatible endpoint many questions, within a pace and a budget, and asks nothing twice.

What may pass (no connection, a time-out, 408, 409, 425, 429, 5xx, an answer that is cut or no JSON) is tried again,
later each time and no sooner than `Retry-After` says. What will not (other 4xx) is not. An endpoint that fails several
requests in a row is away: what is left is not asked. With a journal every answer is kept in the store before it is
returned, and found there by the digest of its request.
"""

import hashlib
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from stages.config.endpoints import EndpointConfig, check_endpoint
from stages.models.endpoint.budget import Budget, Spent
from stages.models.endpoint.journal import Journal
from stages.models.endpoint.keys import key_of
from stages.models.endpoint.pace import Pace, Sent
from stages.models.endpoint.records import AWAY, BUDGET, ChatRequest, Completion, Outcome, Unanswered, Usage
from stages.models.endpoint.transport import AttemptFailed, Transport

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds: before the second attempt, and before any."""
_AWAY_AFTER = 3
"""Requests in a row that failed after all their attempts."""


@dataclass
class _Account:
    """What the threads share."""

    answered: int = 0
    cached: int = 0
    estimated: int = 0
    failed_in_a_row: int = 0
    last_failure: str = ""
    retried: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class ChatClient:
    """Use it as a context, which closes its connections."""

    def __init__(
        self,
        config: EndpointConfig,
        *,
        field: str,
        journal: Journal | None = None,
        for_judges: bool = False,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises ConfigError for an endpoint that may not be asked, or a key that is not there; `field` is the path of
        its settings. `beat` is called after every attempt."""
        check_endpoint(config.endpoint, field=f"{field}.endpoint", with_key=config.has_key, for_judges=for_judges)
        self._config, self._journal = config, journal
        self._sleep, self._clock, self._beat = sleep, clock, beat
        self._transport = Transport(config, key_of(config, field=field))
        self._pace = Pace(config.requests_per_minute, config.tokens_per_minute)
        self._budget = Budget(config, journal.spent if journal else Spent())
        self._earlier = journal.spent if journal else Spent()
        self._until = clock() + 60 * config.max_minutes if config.max_minutes else float("inf")
        self._account = _Account()
        self._under_way: dict[str, Future[Outcome]] = {}

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    @property
    def name(self) -> str:
        """What people call it, for provenance."""
        return f"{self._config.model} at {self._config.endpoint}"

    @property
    def identity(self) -> str:
        """Hash over address and model; what runs there under the model's name is not known."""
        return hashlib.sha256(json.dumps([self._config.endpoint.rstrip("/"), self._config.model]).encode()).hexdigest()

    def ask(self, requests: Sequence[ChatRequest]) -> list[Outcome]:
        """Return what came of each request, in order."""
        with ThreadPoolExecutor(self._config.concurrency) as threads:
            return list(threads.map(self._once if self._journal else self._ask, requests))

    @property
    def requests(self) -> int:
        """Requests that were sent by this client, repeated ones counted."""
        return self._budget.spent.requests - self._earlier.requests

    @property
    def retried(self) -> dict[str, int]:
        """Attempts that failed and were repeated, by reason."""
        return dict(self._account.retried)

    @property
    def last_failure(self) -> str:
        """What the endpoint or the network last said about a request that failed; without the key."""
        return self._account.last_failure

    def forgive(self) -> None:
        """Forget the failures in a row."""
        with self._account.lock:
            self._account.failed_in_a_row = 0

    def account(self) -> dict[str, Any]:
        """Return what was asked and spent, for the ledger: all attempts at the artifact together, as far as records of
        earlier ones were kept; what came of the requests is of this attempt."""
        spent, account = self._budget.spent, self._account
        return {
            "requests": spent.requests,
            "prompt_tokens": spent.prompt_tokens,
            "answer_tokens": spent.answer_tokens,
            "cost": round(self._config.cost(spent.prompt_tokens, spent.answer_tokens), 6),
            "answered": account.answered,
            "found_in_store": account.cached,
            "without_usage": account.estimated,
            "retried": dict(account.retried),
            "failed": dict(account.failed),
        }

    def _once(self, request: ChatRequest) -> Outcome:
        """Ask unless the answer is in the store, or another thread is asking the same."""
        assert self._journal is not None
        digest = request.digest(self._config)
        with self._account.lock:
            other = self._under_way.get(digest)
            mine: Future[Outcome] = Future()
            if other is None:
                self._under_way[digest] = mine
        if other is not None:
            outcome = other.result()
            return replace(outcome, cached=True) if isinstance(outcome, Completion) else outcome
        try:
            found = self._journal.read(digest)
            if found is not None:
                with self._account.lock:
                    self._account.cached += 1
                self._beat()
            outcome = found or self._ask(request, digest)
            mine.set_result(outcome)
            return outcome
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._account.lock:
                del self._under_way[digest]

    def _ask(self, request: ChatRequest, digest: str = "") -> Outcome:
        for attempt in range(self._config.max_retries + 1):
            if (reason := self._why_not_to_ask()) or not self._budget.begin(most := _most(request)):
                return Unanswered(reason or BUDGET)
            try:
                return self._attempt(request, most, digest)
            except AttemptFailed as failure:
                if not failure.may_pass or attempt == self._config.max_retries:
                    return self._given_up(failure)
                with self._account.lock:
                    self._account.retried[failure.reason] += 1
                self._beat()
                self._sleep(max(failure.wait, _backoff(attempt)))
        raise AssertionError("the last attempt returns")

    def _why_not_to_ask(self) -> str:
        with self._account.lock:
            if self._account.failed_in_a_row >= _AWAY_AFTER:
                return AWAY
        return BUDGET if self._clock() > self._until else ""

    def _attempt(self, request: ChatRequest, most: Usage, digest: str) -> Completion:
        cost = Usage()
        try:
            sent = self._paced(most.tokens)
            try:
                completion = self._transport.attempt(request)
                cost = completion.usage
            except AttemptFailed as failure:
                if failure.may_have_cost:
                    cost = most
                    if self._journal:
                        self._journal.write_lost(digest, cost)
                raise
            finally:
                self._pace.correct(sent, cost.tokens)
            if self._journal:
                self._journal.write(digest, completion)
        finally:
            self._budget.end(most, cost)
        with self._account.lock:
            self._account.failed_in_a_row = 0
            self._account.answered += 1
            self._account.estimated += completion.usage.estimated
        self._beat()
        return completion

    def _paced(self, tokens: int) -> Sent:
        """Wait for a request's turn."""
        while True:
            sent = self._pace.admit(tokens, now=self._clock())
            if isinstance(sent, Sent):
                return sent
            self._beat()
            self._sleep(sent)

    def _given_up(self, failure: AttemptFailed) -> Unanswered:
        told = self._transport.masked(failure.told)
        with self._account.lock:
            self._account.failed[failure.reason] += 1
            self._account.failed_in_a_row += not failure.about_one
            self._account.last_failure = told
            away = self._account.failed_in_a_row == _AWAY_AFTER and not failure.about_one
        logger.warning("%s gave no answer: %s", self._config.endpoint, told)
        if away:
            logger.warning(
                "%s is away after %d failures in a row: what is left is not asked", self._config.endpoint, _AWAY_AFTER
            )
        return Unanswered(failure.reason, told)


def _most(request: ChatRequest) -> Usage:
    """The most that a request can cost."""
    return Usage(request.most_prompt_tokens(), request.max_tokens, estimated=True)


def _backoff(attempt: int) -> float:
    """Twice as long each time, less a random part, so that threads do not come back together."""
    return min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
