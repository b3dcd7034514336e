"""A judge behind an OpenAI-compatible endpoint: `POST <endpoint>/chat/completions`, over HTTP that may fail in any way.

What may pass (no connection, a time-out, 408, 409, 425, 429, 5xx, an answer that is cut or no JSON) is tried again,
later each time and no sooner than `Retry-After` says. What will not (other 4xx) is not. An endpoint that fails several
questions in a row is away: what is left is not asked, so that an evaluation ends. Requests and time have a budget.
"""

import email.utils
import hashlib
import json
import logging
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from stages.config.endpoints import check_endpoint
from stages.config.errors import ConfigError
from stages.config.judging import JudgeConfig
from stages.judge.pairwise import (
    AWAY,
    BUDGET,
    CUT,
    GARBAGE,
    REFUSED,
    UNCLEAR,
    Answer,
    JudgeAwayError,
    Question,
    read_verdict,
)
from stages.judge.prompts import filled, prompt_digest, prompt_text

logger = logging.getLogger(__name__)

_MAY_PASS = frozenset({408, 409, 425, 429})
_ABOUT_ONE = frozenset({400, 413, 422})
"""Refusals that may be about one question, such as one that is too long; others are about all."""
_MOST_BYTES = 4 << 20
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 0.5, 30.0, 120.0
"""Seconds: before the second attempt, before any, and the longest `Retry-After` that is waited for."""
_AWAY_AFTER = 3
"""Questions in a row that failed after all their attempts."""
_SHOWN = 200


class _Failed(Exception):
    """One attempt brought no verdict. `wait` are the seconds that the endpoint asks to wait."""

    def __init__(self, reason: str, told: str, *, may_pass: bool, about_one: bool = False, wait: float = 0.0) -> None:
        super().__init__(told)
        self.reason, self.told, self.may_pass, self.about_one, self.wait = reason, told, may_pass, about_one, wait


@dataclass
class _Account:
    """What the threads share."""

    requests: int = 0
    failed_in_a_row: int = 0
    last_failure: str = ""
    retried: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


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
        check_endpoint(config.endpoint, field="evaluate.judge.endpoint", with_key=bool(config.api_key_env))
        key = _key_in(config.api_key_env) if config.api_key_env else ""
        self._config, self._key, self._sleep, self._beat = config, key, sleep, beat
        self._template = prompt_text(config.prompt)
        self._account = _Account()
        self._until = time.monotonic() + 60 * config.max_minutes
        # Redirects are not followed and no proxy or .netrc of the environment is used: the key goes to this host alone.
        self._client = httpx.Client(
            timeout=config.timeout_seconds,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=config.concurrency),
        )

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
        return self._account.requests

    @property
    def retried(self) -> dict[str, int]:
        """Attempts that failed and were repeated, by reason."""
        return dict(self._account.retried)

    def require_reachable(self) -> None:
        """Raise JudgeAwayError unless the endpoint answers a question at all."""
        question = Question("What is 1 + 1?", "2", "3")
        answer = self.ask([question])[0]
        if answer in (AWAY, REFUSED, GARBAGE, BUDGET):
            raise JudgeAwayError(f"{self._config.endpoint}: {self._account.last_failure or answer}")
        self._account.failed_in_a_row = 0

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        with ThreadPoolExecutor(self._config.concurrency) as threads:
            return list(threads.map(self._answer, questions))

    def _answer(self, question: Question) -> Answer:
        for attempt in range(self._config.max_retries + 1):
            with self._account.lock:
                if self._account.failed_in_a_row >= _AWAY_AFTER:
                    return AWAY
                if self._account.requests >= self._config.max_requests or time.monotonic() > self._until:
                    return BUDGET
                self._account.requests += 1
            try:
                answer = self._attempt(question)
            except _Failed as failure:
                if not failure.may_pass or attempt == self._config.max_retries:
                    return self._given_up(failure)
                with self._account.lock:
                    self._account.retried[failure.reason] += 1
                self._beat()
                self._sleep(max(failure.wait, _backoff(attempt)))
                continue
            with self._account.lock:
                self._account.failed_in_a_row = 0
            self._beat()
            return answer
        raise AssertionError("the last attempt returns")

    def _given_up(self, failure: _Failed) -> str:
        told = self._masked(failure.told)
        with self._account.lock:
            self._account.failed_in_a_row += not failure.about_one
            self._account.last_failure = told
            away = self._account.failed_in_a_row == _AWAY_AFTER and not failure.about_one
        logger.warning("the judge gave no verdict: %s", told)
        if away:
            logger.warning("the judge is away after %d failures in a row: what is left is not asked", _AWAY_AFTER)
        return failure.reason

    def _attempt(self, question: Question) -> Answer:
        config = self._config
        asked = filled(self._template, question=question.prompt, first=question.first, second=question.second)
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": config.temperature,
            config.limit_field: config.answer_tokens,
        }
        status, headers, data = self._post(f"{config.endpoint.rstrip('/')}/chat/completions", body)
        if status != 200:
            may_pass = status in _MAY_PASS or status >= 500
            told = f"HTTP {status} {self._shown(data)!r}"
            raise _Failed(
                AWAY if may_pass else REFUSED,
                told,
                may_pass=may_pass,
                about_one=status in _ABOUT_ONE,
                wait=_asked_wait(headers.get("retry-after", "")),
            )
        return self._verdict_in(data)

    def _post(self, url: str, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """The timeouts of httpx are for one packet, so a server that drips bytes is held to the whole time here."""
        until, parts, size = time.monotonic() + self._config.timeout_seconds, [], 0
        try:
            with self._client.stream("POST", url, json=body) as response:
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > _MOST_BYTES:
                        raise _Failed(GARBAGE, f"an answer of more than {_MOST_BYTES} bytes", may_pass=False)
                    if time.monotonic() > until:
                        raise _Failed(AWAY, f"no whole answer in {self._config.timeout_seconds:g} s", may_pass=True)
                return response.status_code, response.headers, b"".join(parts)
        except httpx.TimeoutException:
            raise _Failed(AWAY, f"no answer in {self._config.timeout_seconds:g} s", may_pass=True) from None
        except httpx.LocalProtocolError as error:  # its text quotes headers, and the key is one of them
            raise _Failed(REFUSED, type(error).__name__, may_pass=False) from None
        except httpx.HTTPError as error:  # also an answer that ends before its length
            raise _Failed(AWAY, f"{type(error).__name__}: {error}", may_pass=True) from None
        except httpx.InvalidURL as error:
            raise _Failed(REFUSED, f"InvalidURL: {error}", may_pass=False) from None

    def _verdict_in(self, data: bytes) -> Answer:
        """Read a chat completion; raises _Failed where it is none."""
        try:
            choice = json.loads(data)["choices"][0]
            written, ended = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            told = f"the answer is no chat completion: {self._shown(data)!r}"
            raise _Failed(GARBAGE, told, may_pass=True) from None
        # A model that only thought, or called a tool, says nothing: asked again it would do the same.
        preferred = read_verdict(written) if isinstance(written, str) else None
        if preferred is None:
            return CUT if ended == "length" else UNCLEAR
        return preferred

    def _shown(self, data: bytes) -> str:
        """The beginning of an answer, for the log; masked before it is cut, or the beginning of a key would stay."""
        return self._masked(data.decode(errors="replace"))[:_SHOWN]

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _key_in(variable: str) -> str:
    """Read the key; errors name the variable and never what is in it."""
    key = os.environ.get(variable, "").strip()  # a file that it was read from ends with a line end
    if not key:
        raise ConfigError(
            f"evaluate.judge.api_key_env={variable!r} is not set where Ray's processes run",
            advice="Set it in the environment of Ray's workers, or leave api_key_env empty.",
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"evaluate.judge.api_key_env={variable!r} holds characters that no HTTP header may have; allowed are "
            "printable ASCII characters",
            advice="Set it again in the environment of Ray's workers: the key alone, without line ends in it.",
        )
    return key


def identity_of(config: JudgeConfig) -> str:
    """Hash over address, model, prompt and sampling. What the server runs under the model's name is not known."""
    parts = [config.endpoint.rstrip("/"), config.model, prompt_digest(config.prompt), config.temperature]
    return hashlib.sha256(json.dumps([*parts, config.answer_tokens]).encode()).hexdigest()


def _backoff(attempt: int) -> float:
    """Twice as long each time, less a random part, so that threads do not come back together."""
    return min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)


def _asked_wait(retry_after: str) -> float:
    """Seconds, or a date, as the header may have either; 0 for what is neither."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), _LONGEST_ASKED)
