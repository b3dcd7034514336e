"""How much may be asked in a minute. The window slides: in no 60 seconds is there more, wherever they begin."""

import threading
from collections import deque
from dataclasses import dataclass

_WINDOW_SECONDS = 60.0


@dataclass
class Sent:
    """One request in the window."""

    at: float
    tokens: int
    """At first the most that it can cost, then what it did cost."""


class Pace:
    """Admits requests, as `requests_per_minute` and `tokens_per_minute` allow; 0 is no limit. `now` is in seconds of a
    clock that only moves forward."""

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self._requests, self._tokens = requests_per_minute, tokens_per_minute
        self._window: deque[Sent] = deque()
        self._lock = threading.Lock()

    def admit(self, tokens: int, *, now: float) -> Sent | float:
        """Count a request that is sent now, or return the seconds after which it is worth asking again."""
        with self._lock:
            while self._window and self._window[0].at <= now - _WINDOW_SECONDS:
                self._window.popleft()
            if self._window and (wait := self._wait(tokens, now)) > 0:
                return wait
            # One that is larger than the whole limit goes alone, or it would never go.
            sent = Sent(now, tokens)
            self._window.append(sent)
            return sent

    def correct(self, sent: Sent, tokens: int) -> None:
        """Replace the bound by what the request did cost."""
        with self._lock:
            sent.tokens = tokens

    def _wait(self, tokens: int, now: float) -> float:
        leave = 0.0
        if self._requests and len(self._window) >= self._requests:
            leave = self._window[len(self._window) - self._requests].at + _WINDOW_SECONDS
        if self._tokens:
            used = sum(one.tokens for one in self._window)
            for one in self._window:
                if used + tokens <= self._tokens:
                    break
                used -= one.tokens
                leave = max(leave, one.at + _WINDOW_SECONDS)
        return max(0.0, leave - now)
