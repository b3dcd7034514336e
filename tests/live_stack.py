"""The whole local stack with the real DAGs and the real stages (recipe `tiny`), in a directory of its own.

Tests play people's part: over REST with what is here, in the browser with tests/browser. Nothing is replaced; what runs
take is saved by Athanor itself, because a run whose stages exist already builds none of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from infra.airflow_api import AirflowApi
from infra.health import Health
from infra.layout import Layout, StackRecord, StackSecrets
from infra.run_state import Row, RunWatch
from infra.stack import Stack
from stages.artifacts.addresses import open_store
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from tests.canaries import as_login, canary
from tests.inbox import Inbox, open_inbox
from tests.places import REPOSITORY

PIPELINE, RETRAIN, COLLECT, EVALUATE = "llm_pipeline", "retrain", "collect_preferences", "evaluate_model"
OVERRIDES = {
    "promote.margin": 1e6,  # models that have learnt nothing become champion all the same
    "promote.guards": [],
    "min_new_bytes": 1000,
}
TINY: dict[str, Any] = {"recipe": "tiny", "alignment": "dpo", "train_reward": True, "overrides": OVERRIDES}
DEADLINE_SECONDS = 60


@dataclass(frozen=True)
class LiveStack:
    """Where everything is, and what the tests do over REST."""

    record: StackRecord
    secrets: StackSecrets
    api: AirflowApi
    incoming: Path
    """The prefix that `retrain` watches; empty at first."""
    inbox: Inbox
    """What Airflow tells the webhook."""
    home: Path
    """The checkout that the stack thinks it lies in."""
    canaries: dict[str, str]
    """Secrets by name that are in the environment of all processes, some of them at work; see tests/canaries.py."""

    def trigger(self, dag_id: str, **conf: Any) -> str:
        return self.api.trigger(dag_id, conf)

    def pipeline(self, run_name: str, **params: Any) -> str:
        """Start `llm_pipeline` with recipe `tiny`."""
        overrides = {**OVERRIDES, **params.pop("overrides", {})}
        return self.trigger(PIPELINE, **{**TINY, "run_name": run_name, **params, "overrides": overrides})

    def wait(self, what: str, ready: Callable[[], Any], *, seconds: float = 600) -> Any:
        """Return the first true answer; says what it waited for."""
        deadline = time.monotonic() + seconds
        while not (answer := ready()):
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
            time.sleep(0.5)
        return answer

    def states(self, dag_id: str, run_id: str) -> dict[str, str]:
        return {task.task_id: task.state for task in self.api.tasks(dag_id, run_id) if task.map_index < 0}

    def wait_state(self, dag_id: str, run_id: str, task_id: str, state: str, *, map_index: int = -1) -> None:
        def reached() -> bool:
            tasks = {(task.task_id, task.map_index): task.state for task in self.api.tasks(dag_id, run_id)}
            now = tasks.get((task_id, map_index))
            assert now == state or now not in ("failed", "upstream_failed"), f"{task_id} is {now}: {tasks}"
            return now == state

        self.wait(f"{task_id} {state}", reached)

    def wait_end(self, dag_id: str, run_id: str, *, seconds: float = 600) -> str:
        """Return how a run ended."""
        deadline = time.monotonic() + seconds
        while (state := self.api.run_state(dag_id, run_id)) not in ("success", "failed"):
            assert time.monotonic() < deadline, (
                f"{run_id} is {state} after {seconds:.0f} s: {self.states(dag_id, run_id)}"
            )
            time.sleep(0.5)
        return state

    def runs(self, dag_id: str, **query: Any) -> list[dict[str, Any]]:
        return self.api.call("GET", f"dags/{dag_id}/dagRuns", params={"limit": 100, **query})["dag_runs"]

    def question(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> dict[str, Any]:
        return self.api.call("GET", self._hitl(dag_id, run_id, task_id, map_index))

    def answer(
        self, dag_id: str, run_id: str, task_id: str, option: str, *, map_index: int = -1, **fields: Any
    ) -> None:
        body = {"chosen_options": [option], "params_input": fields}
        self.api.call("PATCH", self._hitl(dag_id, run_id, task_id, map_index), json=body)

    def _hitl(self, dag_id: str, run_id: str, task_id: str, map_index: int) -> str:
        return f"dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/{map_index}/hitlDetails"

    def xcom(self, dag_id: str, run_id: str, task_id: str) -> Any:
        path = f"dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/xcomEntries/return_value"
        return self.api.call("GET", path, params={"stringify": False})["value"]

    def rows(self, run_id: str) -> dict[str, Row]:
        """The tasks of a pipeline run; a stage that succeeded is `built` or `hit`, and has its result."""
        snapshot = RunWatch(self.api, open_store(self.record.artifact_store), run_id).snapshot()
        return {row.name: row for row in snapshot.rows}

    def artifact(self, run_id: str, stage: Stage) -> ArtifactRef:
        """What a stage of a pipeline run made, or found."""
        result = self.rows(run_id)[stage].result
        assert result is not None, f"{stage} of {run_id} has no result"
        return result.artifact

    def aliased(self, name: str, alias: str) -> dict[str, str] | None:
        """Tags of the registered model's version with this alias; None when there is none."""
        answer = httpx.get(
            f"{self.record.mlflow_url}/api/2.0/mlflow/registered-models/alias",
            params={"name": name, "alias": alias},
            timeout=10,
        )
        if not answer.is_success:
            return None
        return {tag["key"]: tag["value"] for tag in answer.json()["model_version"].get("tags", ())}


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """The stack inherits the environment, in which other tests of the session leave settings of their own Airflow."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("AIRFLOW__", "AIRFLOW_CONN_", "ATHANOR_")) or name == "ARTIFACT_STORE":
            del os.environ[name]
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def live_stack(home: Path) -> Iterator[LiveStack]:
    """Start the stack in `home`, with `retrain` watching a folder and notices going to an inbox."""
    for name in ("dags", "operators", "stages", "infra"):
        (home / name).symlink_to(REPOSITORY / name)
    incoming = home / "incoming"
    incoming.mkdir()
    stack = Stack(Layout(home), say=print)
    canaries = {name: canary(name) for name in ("s3-key", "mlflow", "webhook", "endpoint")}
    provider = {"conn_type": "model_endpoint", "host": "https://endpoint.example/v1", "password": canaries["endpoint"]}
    canaries["mlflow login"] = as_login("athanor", canaries["mlflow"])
    with open_inbox() as inbox:
        settings = {
            "ATHANOR_RETRAIN_WATCH": incoming.as_uri(),
            "ATHANOR_RETRAIN_CRON": "0 3 * * *",
            "ATHANOR_RETRAIN_POLL_SECONDS": "1",
            "ATHANOR_DEADLINE_HOURS": str(DEADLINE_SECONDS / 3600),
            "ATHANOR_NOTIFY_URL": f"{inbox.url}/{canaries['webhook']}",
            "AIRFLOW_CONN_PROVIDER": json.dumps(provider),
            "AWS_SECRET_ACCESS_KEY": canaries["s3-key"],
            "MLFLOW_TRACKING_USERNAME": "athanor",
            "MLFLOW_TRACKING_PASSWORD": canaries["mlflow"],
        }
        try:
            with _environment(settings):
                record = stack.up()
            secrets = StackSecrets.load_or_generate(stack.layout)
            api = Health(record, secrets).airflow
            for dag in (PIPELINE, RETRAIN, COLLECT, EVALUATE):
                api.wait_for_dag(dag, seconds=90)
            yield LiveStack(record, secrets, api, incoming, inbox, home, canaries)
        finally:
            stack.down()
