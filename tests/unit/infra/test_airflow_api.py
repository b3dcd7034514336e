"""What the client does when Airflow's answer is late: reads are repeated, triggers are not."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

import infra.airflow_api
from infra.airflow_api import AirflowApi


class Late(BaseHTTPRequestHandler):
    """Answers a login at once, and the first request after it too late."""

    asked: list[str]

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/auth/token":
            self.asked.append(self.command)
            if len(self.asked) == 1:
                time.sleep(1)
        data = json.dumps({"access_token": "a", "state": "success"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        with contextlib.suppress(BrokenPipeError):  # who waited has gone
            self.end_headers()
            self.wfile.write(data)

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[AirflowApi, list[str]]]:
    monkeypatch.setattr(infra.airflow_api, "_PAUSE_SECONDS", 0.01)
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Once", (Late,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield AirflowApi(f"http://127.0.0.1:{server.server_port}", user="u", password="p", timeout_seconds=0.3), asked
    server.shutdown()
    server.server_close()


def test_a_read_whose_answer_is_late_is_repeated(late: tuple[AirflowApi, list[str]]) -> None:
    api, asked = late
    assert api.call("GET", "dags/hello/dagRuns/r")["state"] == "success"
    assert asked == ["GET", "GET"]


def test_a_trigger_is_not_because_its_run_may_exist(late: tuple[AirflowApi, list[str]]) -> None:
    api, asked = late
    with pytest.raises(httpx.ReadTimeout):
        api.call("POST", "dags/hello/dagRuns", json={})
    assert asked == ["POST"]
