"""What MLflow's REST answers about registered models mean here."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from operators.mlflow import MlflowServer, MlflowUnavailableError
from operators.people.collect import find_model
from stages.config.errors import ConfigError

ANSWERS = {
    "champion": (200, {"model_version": {"version": "4", "tags": [{"key": "eval/loss", "value": "2.5"}]}}),
    "candidate": (
        400,
        {"error_code": "INVALID_PARAMETER_VALUE", "message": "Registered model alias candidate not found."},
    ),
    "gone": (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Registered Model with name=x not found"}),
    "broken": (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid value for parameter 'name'"}),
}


class _Registry(BaseHTTPRequestHandler):
    """MLflow 3.17's answers to `registered-models/alias`, as recorded in its source."""

    logins: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.logins.append(self.headers["Authorization"])
        alias = parse_qs(urlsplit(self.path).query)["alias"][0]
        status, body = ANSWERS[alias]
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Registry)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_version_comes_with_its_tags_and_what_is_absent_is_none(registry: str) -> None:
    with MlflowServer(registry) as server:
        found = server.model_version("x-aligned", alias="champion")
        assert found is not None
        assert (found.address, found.tags) == ("models:/x-aligned/4", {"eval/loss": "2.5"})
        assert server.model_version("x-aligned", alias="candidate") is None
        assert server.model_version("x-aligned", alias="gone") is None


def test_an_answer_that_is_not_about_absence_is_not_taken_for_it(registry: str) -> None:
    with MlflowServer(registry) as server, pytest.raises(MlflowUnavailableError, match="Invalid value"):
        server.model_version("x-aligned", alias="broken")


def test_the_login_of_the_environment_wins_over_one_in_the_address(registry: str, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    with MlflowServer(registry.replace("//", "//ada:pw@")) as server:
        server.model_version("x-aligned", alias="champion")
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    with MlflowServer(registry) as server:
        server.model_version("x-aligned", alias="champion")
    assert _Registry.logins[-2:] == ["Bearer t", None]


def test_raters_are_told_which_model_is_missing_and_how_to_get_it(registry: str, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    with pytest.raises(ConfigError, match="models:/x-aligned@candidate") as caught:
        find_model("models:/x-aligned@candidate")
    assert "until promote" in caught.value.advice
    with pytest.raises(ConfigError, match="no artifact of Athanor"):
        find_model("/models/llama")
