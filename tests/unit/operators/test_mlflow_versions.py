"""What MLflow's REST answers about registered models mean here."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from operators.given import find_version
from operators.mlflow import MlflowRefusedError, MlflowServer, MlflowUnavailableError
from operators.people.collect import find_model
from stages.config.errors import ConfigError
from tests.answering import answering

ANSWERS = {
    "champion": (200, {"model_version": {"version": "4", "tags": [{"key": "eval/loss", "value": "2.5"}]}}),
    "candidate": (
        400,
        {"error_code": "INVALID_PARAMETER_VALUE", "message": "Registered model alias candidate not found."},
    ),
    "gone": (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Registered Model with name=x not found"}),
    "no-login": (401, "You are not authenticated."),
    "forbidden": (403, "Permission denied"),
    "odd-host": (403, "Invalid Host header - possible DNS rebinding attack detected"),
    "page": (200, "<html>welcome</html>"),
    "list": (200, []),
    "down": (503, "try later"),
    "broken": (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid value for parameter 'name'"}),
}


REGISTERED = ("x", "x-aligned")


class _Registry(BaseHTTPRequestHandler):
    """MLflow 3.17's answers about registered models, as recorded in its source."""

    logins: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.logins.append(self.headers["Authorization"])
        asked = urlsplit(self.path)
        if asked.path.endswith("registered-models/search"):
            named = parse_qs(asked.query)["filter"][0].removeprefix("name = ").strip("'")
            status, body = 200, {"registered_models": [{"name": named}] if named in REGISTERED else []}
        else:
            status, body = ANSWERS[parse_qs(asked.query)["alias"][0]]
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    with answering(_Registry) as url:
        yield url


def test_a_version_comes_with_its_tags_and_what_is_absent_is_none(registry: str) -> None:
    with MlflowServer(registry) as server:
        found = server.model_version("x-aligned", alias="champion")
        assert found is not None
        assert (found.address, found.tags) == ("models:/x-aligned/4", {"eval/loss": "2.5"})
        assert server.model_version("x-aligned", alias="candidate") is None
        assert server.model_version("x-aligned", alias="gone") is None


def test_a_model_that_nobody_registered_is_absent_though_a_server_with_logins_forbids_it(registry: str) -> None:
    with MlflowServer(registry) as server:
        assert server.model_version("nobodys-aligned", alias="forbidden") is None
        with pytest.raises(MlflowRefusedError, match="may not do this"):
            server.model_version("x-aligned", alias="forbidden")


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
    with pytest.raises(ConfigError, match="model='models:/x-aligned@candidate' is not registered in MLflow") as caught:
        find_model("models:/x-aligned@candidate")
    assert "models:/<name>@<alias>" in caught.value.advice
    with pytest.raises(ConfigError, match="model='/models/llama' is not the address of an artifact"):
        find_model("/models/llama")


@pytest.mark.parametrize(
    ("alias", "says"),
    [
        ("no-login", "MLFLOW_TRACKING_PASSWORD"),
        ("forbidden", "may not do this"),
        ("odd-host", "MLFLOW_HOSTS"),
        ("page", "not an MLflow server"),
        ("list", "not an MLflow server"),
        ("broken", "Invalid value"),
    ],
)
def test_what_a_person_must_mend_is_told_apart_from_an_outage(
    registry: str, alias: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MlflowServer(registry) as server, pytest.raises(MlflowRefusedError, match=says):
        server.model_version("x", alias=alias)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    with pytest.raises(ConfigError, match=says):  # a retry would not help
        find_version(f"models:/x@{alias}")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no host:5000", "http://[::1", "http://host:port"])
def test_an_outage_and_an_address_that_is_none_are_no_traceback(address: str, registry: str) -> None:
    with MlflowServer(registry) as server, pytest.raises(MlflowUnavailableError) as caught:
        server.model_version("x", alias="down")
    assert not isinstance(caught.value, MlflowRefusedError)
    with pytest.raises(MlflowUnavailableError), MlflowServer(address) as server:
        server.model_version("x", alias="champion")
