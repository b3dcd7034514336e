"""A small model registry that speaks the part of MLflow's REST API that Airflow's side uses; tests/integration has the
real one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.answering import answering


@dataclass
class RegisteredModels:
    """Tags by name and version, aliases by name; `refuse` names calls that answer 503 once, in order."""

    versions: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], str] = field(default_factory=dict)
    refuse: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, asked: dict[str, str]) -> tuple[int, dict[str, Any]]:
        call = f"{method} {path.removeprefix('/api/2.0/mlflow/')}"
        self.calls.append(call)
        if call in self.refuse:
            self.refuse.remove(call)
            return 503, {"error_code": "TEMPORARILY_UNAVAILABLE"}
        match call:
            case "GET registered-models/alias":
                return self._version(asked["name"], self.aliases.get((asked["name"], asked["alias"]), ""))
            case "GET model-versions/get":
                return self._version(asked["name"], asked["version"])
            case "POST registered-models/alias":
                self.aliases[asked["name"], asked["alias"]] = asked["version"]
            case "DELETE registered-models/alias":
                self.aliases.pop((asked["name"], asked["alias"]), None)
            case "POST model-versions/set-tag":
                self.versions[asked["name"], asked["version"]][asked["key"]] = asked["value"]
            case _:
                return 404, {"error_code": "ENDPOINT_NOT_FOUND"}
        return 200, {}

    def _version(self, name: str, version: str) -> tuple[int, dict[str, Any]]:
        tags = self.versions.get((name, version))
        if tags is None:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}
        listed = [{"key": key, "value": value} for key, value in tags.items()]
        return 200, {"model_version": {"name": name, "version": version, "tags": listed}}


@contextmanager
def serving(models: RegisteredModels) -> Iterator[str]:
    """Yield the address of a server that answers from these models."""

    class Registry(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            url = urlsplit(self.path)
            asked = {key: values[0] for key, values in parse_qs(url.query).items()}
            if length := int(self.headers.get("Content-Length") or 0):
                asked |= json.loads(self.rfile.read(length))
            status, body = models.answer(self.command, url.path, asked)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: object) -> None: ...

    with answering(Registry) as url:
        yield url
