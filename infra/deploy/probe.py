"""Health probes of the containers: `python -m infra.deploy.probe scheduler` ends with 0 when it really works.

Standard library only: a container runs its probe every few seconds, and importing httpx takes three times as long as
`urllib.request`. `cluster` is the exception: it is the smoke test, which asks object store and MLflow for what the
stages need of them.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
import uuid
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 5.0
# component -> its name in Airflow's health report
REPORTED = {"dag-processor": "dag_processor", "triggerer": "triggerer"}


class Unhealthy(RuntimeError):
    """What is missing, in words."""


def probe(component: str) -> str:
    """Return what was seen; raise Unhealthy or OSError otherwise."""
    match component:
        case "api-server":
            return _airflow_reports("http://127.0.0.1:8080", "metadatabase")
        case "scheduler":
            _text("http://127.0.0.1:8974/health")  # an empty answer, or 503
            return "scheduler healthy"
        case "dag-processor" | "triggerer":
            url = urlsplit(os.environ["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"])
            return _airflow_reports(f"{url.scheme}://{url.netloc}", REPORTED[component])
        case "mlflow":
            return _text("http://127.0.0.1:5000/health")
        case "ray-head":
            return f"{_ray_nodes('http://127.0.0.1:8265')}, {_ray_agent()}"
        case "ray-worker":
            return _ray_agent()
        case "cluster":
            return _cluster()
        case _:
            raise Unhealthy(f"unknown component {component!r}")


def _airflow_reports(base: str, name: str) -> str:
    return _reported(_ask(f"{base}/api/v2/monitor/health"), name)


def _reported(answer: Any, name: str) -> str:
    status = answer[name]["status"]
    if status != "healthy":
        raise Unhealthy(f"{name} is {status}")
    return f"{name} healthy"


def _ray_nodes(base: str) -> str:
    """The HTTP API answers seconds before a node has joined; only then can jobs run."""
    nodes = _ask(f"{base}/api/v0/nodes", _token())["data"]["result"]["result"]
    alive = [node for node in nodes if node["state"] == "ALIVE"]
    if not alive:
        raise Unhealthy("no node has joined yet")
    return f"{len(alive)} nodes"


def _ray_agent() -> str:
    """It starts jobs and supervises them; its port may be taken."""
    return _text("http://127.0.0.1:52365/api/local_raylet_healthz", _token())


def _token() -> dict[str, str]:
    return {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}


def _ask(url: str, headers: dict[str, str] | None = None) -> Any:
    return json.loads(_text(url, headers))


def _text(url: str, headers: dict[str, str] | None = None) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # neighbours, never through a proxy
    with direct.open(urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT_SECONDS) as answer:
        return answer.read().decode()


def _cluster() -> str:
    return f"object store: {check_store(os.environ['ARTIFACT_STORE'])}; MLflow: {_mlflow()}"


def check_store(uri: str) -> str:
    """Create, fail to create again, read back, remove; raise Unhealthy when the server overwrites."""
    from stages.artifacts.addresses import open_store

    store = open_store(uri)
    key = f"probe/{uuid.uuid4().hex}"
    try:
        if not store.put_if_absent(key, b"first"):
            raise Unhealthy(f"{uri} refused to create a new object")
        if store.put_if_absent(key, b"second") or store.read_bytes(key) != b"first":
            raise Unhealthy(f"{uri} ignores If-None-Match: two builders would overwrite each other's work")
    finally:
        store.delete(key)
    return uri


def _mlflow() -> str:
    from stages.tracking.client import connect

    found = connect().search_experiments(max_results=1)
    return f"{os.environ['MLFLOW_TRACKING_URI']} answers, {len(found)} experiments seen"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m infra.deploy.probe COMPONENT", file=sys.stderr)
        return 2
    try:
        print(probe(arguments[0]))
    except (Unhealthy, OSError, KeyError, ValueError) as error:
        print(f"{arguments[0]}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
