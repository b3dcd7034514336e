"""Health checks of the stack: each component is asked over HTTP, as one of its clients would ask."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from typing import Any

import httpx

from infra.airflow_api import AirflowApi
from infra.layout import StackRecord, StackSecrets
from infra.supervisor import ProgramState

# component -> the name under which Airflow's health endpoint reports its heartbeat
HEARTBEATS = {"scheduler": "scheduler", "dag-processor": "dag_processor", "triggerer": "triggerer"}


def ray_missing(url: str, token: str, *, agent_url: str) -> str | None:
    """None when a Ray head can run jobs: its HTTP API answers seconds before its node has joined, and without the
    agent that starts jobs, whose port may be taken."""
    authorized = {"Authorization": f"Bearer {token}"}
    response = _client().get(f"{url}/api/v0/nodes", headers=authorized)
    if not response.is_success:
        return f"{url} answers {response.status_code}"
    nodes = response.json()["data"]["result"]["result"]
    if not any(node["state"] == "ALIVE" for node in nodes):
        return "its node has not joined yet"
    try:
        response = _client().get(f"{agent_url}/api/local_raylet_healthz", headers=authorized)
    except httpx.HTTPError as error:
        return f"its agent, which starts jobs, does not answer at {agent_url} ({type(error).__name__})"
    return None if response.is_success else f"its agent, which starts jobs, answers {response.status_code}"


def mlflow_missing(url: str) -> str | None:
    """None when the tracking server works."""
    response = _client().get(f"{url}/health")
    return None if response.is_success else f"{url} answers {response.status_code}"


@cache
def _client() -> httpx.Client:
    """One for all checks: each new client reads the certificate authorities, which takes 35 ms of CPU."""
    return httpx.Client(trust_env=False, timeout=5)  # loopback: no proxy


class Health:
    """The health of all components of one stack."""

    def __init__(self, record: StackRecord, secrets: StackSecrets) -> None:
        self._record = record
        self._token = secrets.ray_token
        self.airflow = AirflowApi(record.airflow_url, user="admin", password=secrets.admin_password)
        self._reported: dict[str, Any] | None = None

    def round(self, programs: Iterable[ProgramState]) -> dict[str, str | None]:
        """For each program what keeps it from being healthy, or None; Airflow is asked once for all."""
        self._reported = None
        return {program.name: self._missing(program) for program in programs}

    def _missing(self, program: ProgramState) -> str | None:
        if program.state not in ("STARTING", "RUNNING"):
            return f"{program.state.lower()} {program.why}".strip()
        try:
            match program.name:
                case "ray":
                    return ray_missing(self._record.ray_url, self._token, agent_url=self._record.ray_agent_url)
                case "mlflow":
                    return mlflow_missing(self._record.mlflow_url)
                case "api-server":
                    self._airflow_reports()
                    return None
                case name:
                    return self._heartbeat(HEARTBEATS[name], since=program.started_at)
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            return f"does not answer yet ({type(error).__name__})"

    def _airflow_reports(self) -> dict[str, Any]:
        if self._reported is None:
            self._reported = self.airflow.health()
        return self._reported

    def _heartbeat(self, name: str, *, since: int) -> str | None:
        """Healthy only with a heartbeat of this very process: its predecessor's may be only seconds old."""
        reported = self._airflow_reports()[name]
        last = reported[f"latest_{name}_heartbeat"]
        if reported["status"] != "healthy" or last is None:
            return "no heartbeat yet"
        if datetime.fromisoformat(last) < datetime.fromtimestamp(since, UTC):
            return "no heartbeat since its start"
        return None
