"""One attempt: `POST <endpoint>/chat/completions`, over HTTP that may fail in any way, and what its answer says."""

import email.utils
import json
import math
import time
from typing import Any

import httpx

from stages.config.endpoints import EndpointConfig
from stages.models.endpoint.records import AWAY, GARBAGE, REFUSED, ChatRequest, Completion, Usage

_MAY_PASS = frozenset({408, 409, 425, 429})
_ABOUT_ONE = frozenset({400, 413, 422})
"""Refusals that may be about one request, such as one that is too long; others are about all."""
_MOST_BYTES = 4 << 20
_LONGEST_ASKED = 120.0
"""Seconds: the longest `Retry-After` that is waited for."""
_MOST_TOKENS = 1 << 32
_SHOWN = 200


class AttemptFailed(Exception):
    """One attempt brought no answer."""

    def __init__(
        self,
        reason: str,
        told: str,
        *,
        may_pass: bool,
        about_one: bool = False,
        wait: float = 0.0,
        may_have_cost: bool = False,
    ) -> None:
        """`wait` are the seconds that the endpoint asks to wait."""
        super().__init__(told)
        self.reason, self.told, self.may_pass, self.about_one = reason, told, may_pass, about_one
        self.wait, self.may_have_cost = wait, may_have_cost


class Transport:
    """Connections to one endpoint."""

    def __init__(self, config: EndpointConfig, key: str) -> None:
        self._config, self._key = config, key
        # Redirects are not followed and no proxy or .netrc of the environment is used: the key goes to this host alone.
        self._client = httpx.Client(
            timeout=config.timeout_seconds,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=config.concurrency),
        )

    def close(self) -> None:
        self._client.close()

    def attempt(self, request: ChatRequest) -> Completion:
        """Ask once; raises AttemptFailed."""
        url = f"{self._config.endpoint.rstrip('/')}/chat/completions"
        status, headers, data = self._post(url, request.body(self._config))
        if status != 200:
            may_pass = status in _MAY_PASS or status >= 500
            raise AttemptFailed(
                AWAY if may_pass else REFUSED,
                f"HTTP {status} {self._shown(data)!r}",
                may_pass=may_pass,
                about_one=status in _ABOUT_ONE,
                wait=_asked_wait(headers.get("retry-after", "")),
            )
        return self._completion(data, request)

    def masked(self, text: str) -> str:
        """Take the key out of a text."""
        return text.replace(self._key, "***") if self._key else text

    def _post(self, url: str, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """The timeouts of httpx are for one packet, so a server that drips bytes is held to the whole time here."""
        late = f"no whole answer in {self._config.timeout_seconds:g} s"
        until, parts, size = time.monotonic() + self._config.timeout_seconds, [], 0
        try:
            with self._client.stream("POST", url, json=body) as response:
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > _MOST_BYTES:
                        told = f"an answer of more than {_MOST_BYTES} bytes"
                        raise AttemptFailed(GARBAGE, told, may_pass=False, may_have_cost=True)
                    if time.monotonic() > until:
                        raise AttemptFailed(AWAY, late, may_pass=True, may_have_cost=True)
                return response.status_code, response.headers, b"".join(parts)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:  # nothing was sent
            raise AttemptFailed(AWAY, self._named(error), may_pass=True) from None
        except httpx.TimeoutException:
            raise AttemptFailed(AWAY, late, may_pass=True, may_have_cost=True) from None
        except httpx.LocalProtocolError as error:  # its text quotes headers, and the key is one of them
            raise AttemptFailed(REFUSED, type(error).__name__, may_pass=False) from None
        except httpx.HTTPError as error:  # also an answer that ends before its length
            raise AttemptFailed(AWAY, self._named(error), may_pass=True, may_have_cost=True) from None
        except httpx.InvalidURL as error:
            raise AttemptFailed(REFUSED, f"InvalidURL: {error}", may_pass=False) from None

    def _completion(self, data: bytes, request: ChatRequest) -> Completion:
        """Read a chat completion; raises AttemptFailed where it is none."""
        try:
            told = json.loads(data)
            choice = told["choices"][0]
            written, ended = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            what = f"the answer is no chat completion: {self._shown(data)!r}"
            raise AttemptFailed(GARBAGE, what, may_pass=True, may_have_cost=True) from None
        # A text goes into artifacts, so an endpoint that repeats the key must not put it there.
        text = self.masked(written) if isinstance(written, str) else None
        return Completion(text, ended if isinstance(ended, str) else "", _usage(told.get("usage"), text, request))

    def _named(self, error: Exception) -> str:
        return self.masked(f"{type(error).__name__}: {error}")

    def _shown(self, data: bytes) -> str:
        """The beginning of an answer, for the log; masked before it is cut, or the beginning of a key would stay."""
        return self.masked(data.decode(errors="replace"))[:_SHOWN]


def _usage(told: Any, text: str | None, request: ChatRequest) -> Usage:
    """What the endpoint says that the answer cost; the most that it can have cost where it does not say."""
    if isinstance(told, dict):
        counts = [told.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if all(type(count) is int and 0 <= count < _MOST_TOKENS for count in counts):
            return Usage(counts[0], counts[1])  # type: ignore[arg-type]
    most = request.max_tokens if text is None else min(request.max_tokens, len(text.encode()) + 1)
    return Usage(request.most_prompt_tokens(), most, estimated=True)


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
