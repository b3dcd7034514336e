"""The whole local stack with the real DAGs, in a directory of its own; the heavy stages are played by a stand-in.

`promote` and everything on Airflow's side are real, so a decision goes all the way to MLflow's registry.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

from infra.airflow_api import AirflowApi
from infra.health import Health
from infra.layout import Layout, StackRecord, StackSecrets
from infra.stack import Stack

REPOSITORY = Path(__file__).resolve().parent.parent
STAND_IN = REPOSITORY / "tests" / "integration" / "stage_stand_in.py"
DAGS = ("llm_pipeline", "collect_preferences")

_TRAILER = """

# The tests' own end of the file: another program for the stages.
for _task in {dag}.tasks:
    if hasattr(_task, "entrypoint") and _task.task_id not in {real}:
        _task.entrypoint = {command!r} + (" succeed:{seconds}" if _task.task_id == "sft" else " succeed")
"""


@dataclass(frozen=True)
class LiveStack:
    """Where everything is, and what the tests do over REST."""

    record: StackRecord
    secrets: StackSecrets
    api: AirflowApi

    def trigger(self, dag_id: str, **conf: Any) -> str:
        return self.api.trigger(dag_id, conf)

    def wait(self, what: str, ready: Callable[[], Any], *, seconds: float = 300) -> Any:
        """Return the first true answer; says what it waited for."""
        deadline = time.monotonic() + seconds
        while not (answer := ready()):
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
            time.sleep(0.5)
        return answer

    def wait_state(self, dag_id: str, run_id: str, task_id: str, state: str, *, map_index: int = -1) -> None:
        def reached() -> bool:
            tasks = {(task.task_id, task.map_index): task.state for task in self.api.tasks(dag_id, run_id)}
            now = tasks.get((task_id, map_index))
            assert now == state or now not in ("failed", "upstream_failed"), f"{task_id} is {now}: {tasks}"
            return now == state

        self.wait(f"{task_id} {state}", reached)

    def wait_end(self, dag_id: str, run_id: str) -> str:
        def ended() -> str:
            state = self.api.run_state(dag_id, run_id)
            return state if state in ("success", "failed") else ""

        return self.wait(f"end of {run_id}", ended)

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

    def aliased(self, name: str, alias: str) -> dict[str, str] | None:
        """Tags of the registered model's version with this alias; None when there is none."""
        answer = requests.get(
            f"{self.record.mlflow_url}/api/2.0/mlflow/registered-models/alias",
            params={"name": name, "alias": alias},
            timeout=10,
        )
        if not answer.ok:
            return None
        return {tag["key"]: tag["value"] for tag in answer.json()["model_version"].get("tags", ())}


@contextmanager
def _without_airflow_settings() -> Iterator[None]:
    """The stack inherits the environment; other tests set it up for an Airflow without a login."""
    settings = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AIRFLOW__")}
    try:
        yield
    finally:
        os.environ.update(settings)


@contextmanager
def live_stack(home: Path, *, sft_seconds: float = 0) -> Iterator[LiveStack]:
    """Start the stack in `home`; `sft_seconds` is how long the stage sft takes, for a look at a running run."""
    for name in ("operators", "stages", "infra", "tests"):
        (home / name).symlink_to(REPOSITORY / name)
    (home / "dags").mkdir()
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(STAND_IN))} {{config_uri}}"
    for dag in DAGS:
        text = (REPOSITORY / "dags" / f"{dag}.py").read_text()
        trailer = _TRAILER.format(dag=dag, real=("promote",), command=command, seconds=sft_seconds)
        (home / "dags" / f"{dag}.py").write_text(text + trailer)
    stack = Stack(Layout(home), say=print)
    try:
        with _without_airflow_settings():
            record = stack.up()
        secrets = StackSecrets.load_or_generate(stack.layout)
        api = Health(record, secrets).airflow
        for dag in DAGS:
            api.wait_for_dag(dag, seconds=90)
        yield LiveStack(record, secrets, api)
    finally:
        stack.down()
