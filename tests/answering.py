"""A small HTTP server in this process, for tests that say themselves what is answered."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of loopback; yields `http://127.0.0.1:port`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    """With its query, as it was sent."""
    body: bytes
    authorization: str

    @property
    def value(self) -> Any:
        """The body as JSON, None without one."""
        return json.loads(self.body) if self.body else None


@contextmanager
def answering_json(answer: Callable[[Asked], tuple[int, Any]]) -> Iterator[str]:
    """As `answering`, with one function that returns the status and what the body holds as JSON."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = answer(Asked(self.command, self.path, body, self.headers.get("Authorization", "")))
            payload = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = do_PATCH = handle_any

        def log_message(self, format: str, *args: object) -> None: ...

    with answering(Handler) as url:
        yield url
