"""A webhook that keeps what it is sent: a real HTTP server in a thread of the test process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.answering import answering


@dataclass
class Inbox:
    """What came in, in order; `status` is what the next sender is answered."""

    url: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    status: int = 200

    def about(self, run_id: str) -> list[str]:
        """The events that were told of a run."""
        return [message["event"] for message in self.messages if message.get("run_id") == run_id]


@contextmanager
def open_inbox() -> Iterator[Inbox]:
    """Listen on a free port of loopback until the block ends."""

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            inbox.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            inbox.authorizations.append(self.headers["Authorization"])
            self.send_response(inbox.status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with answering(Webhook) as url:
        inbox = Inbox(f"{url}/hook")
        yield inbox
