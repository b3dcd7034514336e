"""A chat endpoint on loopback that a test can make misbehave: rate limits, errors, silence, cut and garbled answers.

It is a real HTTP server. What it does for a request is decided by a function of the request's number and its question;
without one it prefers the longer answer, as many judges do.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ANSWERS = re.compile(r"<answer A>\n(.*?)\n</answer A>.*<answer B>\n(.*?)\n</answer B>", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """What the server does for one request."""

    content: str | None = "A"
    finish_reason: str = "stop"
    usage: tuple[int, int] | None = None
    """Tokens of the prompt and of the answer, if it says them."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Sent instead of a chat completion."""
    wait: float = 0.0
    """Seconds before anything is sent."""
    cut: bool = False
    """The connection is closed after half of the bytes that were announced."""
    drip: float = 0.0
    """Seconds between two bytes of the answer."""


@dataclass
class Asked:
    """One request as the server saw it."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    at: float

    @property
    def text(self) -> str:
        """What the last turn says."""
        return self.body["messages"][-1]["content"]

    @property
    def answers(self) -> tuple[str, str]:
        found = _ANSWERS.search(self.body["messages"][0]["content"])
        assert found is not None, "the prompt has two answers"
        return found[1], found[2]


def prefers_longer(number: int, asked: Asked) -> Reply:
    first, second = asked.answers
    return Reply("A" if len(first) > len(second) else "B" if len(second) > len(first) else "TIE")


@dataclass
class JudgeServer:
    """Where it listens and what it was asked."""

    url: str
    asked: list[Asked]
    most_at_once: Callable[[], int]


@contextmanager
def judge_server(behave: Callable[[int, Asked], Reply] = prefers_longer, *, port: int = 0) -> Iterator[JudgeServer]:
    """Serve until the block ends, on a free port unless one is given."""
    asked: list[Asked] = []
    lock, open_now, most = threading.Lock(), [0], [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with lock:
                open_now[0] += 1
                most[0] = max(most[0], open_now[0])
            try:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                one = Asked(json.loads(data), dict(self.headers), self.path, time.monotonic())
                with lock:
                    asked.append(one)
                    number = len(asked)
                with suppress(OSError):  # the client has given up
                    self._send(behave(number, one))
            finally:
                with lock:
                    open_now[0] -= 1

        def _send(self, reply: Reply) -> None:
            time.sleep(reply.wait)
            choice = {"message": {"role": "assistant", "content": reply.content}, "finish_reason": reply.finish_reason}
            told: dict[str, Any] = {"choices": [choice]}
            if reply.usage is not None:
                told["usage"] = {"prompt_tokens": reply.usage[0], "completion_tokens": reply.usage[1]}
            body = reply.body if reply.body is not None else json.dumps(told).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if reply.cut:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            for start in range(0, len(body), 1 if reply.drip else len(body) or 1):
                self.wfile.write(body[start : start + (1 if reply.drip else len(body))])
                self.wfile.flush()
                time.sleep(reply.drip)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield JudgeServer(f"http://127.0.0.1:{server.server_address[1]}/v1", asked, lambda: most[0])
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
