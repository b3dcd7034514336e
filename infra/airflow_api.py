"""A small client of Airflow's REST API: login, pools, triggering a run and following its tasks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

_TRIES = 5
_PAUSE_SECONDS = 1.0


class AirflowApiError(RuntimeError):
    """The API refused a request; the message says which and why."""


@dataclass(frozen=True)
class TaskState:
    """One task of a run, as the API reports it."""

    task_id: str
    state: str
    try_number: int
    started: str | None
    ended: str | None
    map_index: int = -1
    pool: str = "default_pool"
    pool_slots: int = 1
    ready: str | None = None
    """When it could have started: nothing before it was left to do."""


class AirflowApi:
    """Logs in on first use and again when the token is refused."""

    def __init__(self, url: str, *, user: str, password: str, timeout_seconds: float = 30) -> None:
        self.url = url
        self._login = {"username": user, "password": password}
        self._session = httpx.Client(timeout=timeout_seconds, trust_env=False)  # loopback: no proxy, no netrc

    def health(self) -> dict[str, Any]:
        """Needs no login; raises httpx.TransportError while the server is not up."""
        response = self._session.get(f"{self.url}/api/v2/monitor/health", timeout=5)
        response.raise_for_status()
        return response.json()

    def login(self) -> None:
        response = self._session.post(f"{self.url}/auth/token", json=self._login)
        if not response.is_success:
            raise AirflowApiError(f"login at {self.url} refused: {response.status_code} {_reason(response)}")
        self._session.headers["Authorization"] = f"Bearer {response.json()['access_token']}"

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """One request under /api/v2; a 404 is an AirflowApiError like every other refusal."""
        response = self._request(method, path, **arguments)
        if not response.is_success:
            raise AirflowApiError(f"{method} {path}: {response.status_code} {_reason(response)}")
        return response.json() if response.content else None

    def _request(self, method: str, path: str, *, may_repeat: bool = False, **arguments: Any) -> httpx.Response:
        """With SQLite, Airflow may find its database locked and answer 500, or late. Requests that only read, or do no
        harm when done twice, are repeated; a trigger is not, because its run may exist already."""
        tries = _TRIES if may_repeat or method == "GET" else 1
        for left in reversed(range(tries)):
            try:
                response = self._logged_in(method, path, **arguments)
            except httpx.ReadTimeout:  # it is busy, and not gone
                if not left:
                    raise
            else:
                if response.status_code != 500 or not left:
                    return response
            time.sleep(_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    def _logged_in(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        if "Authorization" not in self._session.headers:
            self.login()
        for attempt in range(2):
            response = self._session.request(method, f"{self.url}/api/v2/{path}", **arguments)
            if response.status_code != 401 or attempt:
                break
            self.login()
        return response

    def ensure_pool(self, name: str, *, slots: int, description: str) -> None:
        """Create the pool if it is missing; slots a user changed stay as they are."""
        response = self._request("GET", f"pools/{quote(name)}")
        if response.status_code == 404:
            pool = {"name": name, "slots": slots, "description": description, "include_deferred": True}
            response = self._request("POST", "pools", may_repeat=True, json=pool)
            if response.status_code == 409:  # the first of two tries has created it
                return
        if not response.is_success:
            raise AirflowApiError(f"pool {name}: {response.status_code} {_reason(response)}")

    def pool(self, name: str) -> dict[str, Any] | None:
        """A pool with its slots, None when there is none of that name."""
        response = self._request("GET", f"pools/{quote(name, safe='')}")
        if response.status_code == 404:
            return None
        if not response.is_success:
            raise AirflowApiError(f"pool {name}: {response.status_code} {_reason(response)}")
        return response.json()

    def import_errors(self) -> dict[str, str]:
        """DAG file -> last line of its traceback."""
        rows = self.call("GET", "importErrors")["import_errors"]
        return {row["filename"]: row["stack_trace"].strip().splitlines()[-1] for row in rows}

    def wait_for_dag(self, dag_id: str, *, seconds: float) -> None:
        """Wait until the DAG processor has read it; a DAG that cannot be imported fails at once with the reason."""
        deadline = time.monotonic() + seconds
        while True:
            response = self._request("GET", f"dags/{quote(dag_id)}")
            if response.is_success:
                return
            if response.status_code != 404:
                raise AirflowApiError(f"DAG {dag_id}: {response.status_code} {_reason(response)}")
            if broken := self.import_errors():
                raise AirflowApiError("; ".join(f"{file} cannot be imported: {why}" for file, why in broken.items()))
            if time.monotonic() > deadline:
                raise AirflowApiError(f"Airflow has not found the DAG {dag_id} after {seconds:.0f} s")
            time.sleep(0.5)

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Start a run and return its id."""
        run = self.call("POST", f"dags/{quote(dag_id)}/dagRuns", json={"logical_date": None, "conf": conf})
        return run["dag_run_id"]

    def run_state(self, dag_id: str, run_id: str) -> str:
        return self.call("GET", f"dags/{quote(dag_id)}/dagRuns/{quote(run_id)}")["state"]

    def tasks(self, dag_id: str, run_id: str) -> list[TaskState]:
        rows = self.call("GET", f"dags/{quote(dag_id)}/dagRuns/{quote(run_id)}/taskInstances")["task_instances"]
        return [
            TaskState(
                task_id=row["task_id"],
                state=row["state"] or "none",
                try_number=row["try_number"],
                started=row["start_date"],
                ended=row["end_date"],
                map_index=row["map_index"],
                pool=row.get("pool", TaskState.pool),
                pool_slots=row.get("pool_slots", TaskState.pool_slots),
                ready=row.get("scheduled_when") or row.get("queued_when"),
            )
            for row in rows
        ]


def _reason(response: httpx.Response) -> str:
    """The first paragraph; schemas and instances follow it."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300]
    text = str(body.get("detail", body)) if isinstance(body, dict) else str(body)
    return text.split("\n\n")[0][:600]
