"""`python -m infra rollback <run name> --reason ...`: trigger the DAG `rollback` and say what came of it."""

from __future__ import annotations

import time
from urllib.parse import quote

from infra.airflow_api import AirflowApi
from infra.health import Health
from infra.layout import StackSecrets
from infra.run_state import errors_of
from infra.stack import Stack, StackError

DAG_ID = TASK_ID = "rollback"
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 300.0


def rollback(stack: Stack, *, run_name: str, reason: str) -> int:
    """Return 0 when the previous champion is champion again; raises StackError with the task's own words when not."""
    record = stack.record()
    api = Health(record, StackSecrets.load_or_generate(stack.layout)).airflow
    api.wait_for_dag(DAG_ID, seconds=90)
    run_id = api.trigger(DAG_ID, {"run_name": run_name, "reason": reason})
    page = f"{record.airflow_url}/dags/{DAG_ID}/runs/{quote(run_id)}"
    if (state := _wait(api, run_id, page=page)) != "success":
        raise StackError(f"the rollback is {state}: {_last_error(api, run_id) or 'no error was logged'}\n  {page}")
    returned = api.call("GET", f"{_path(run_id)}/xcomEntries/return_value", params={"stringify": False})
    moved = returned["value"]
    stack.say(
        f"{moved['model']}: version {moved['to_version']} is champion again, {moved['from_version']} was taken back"
    )
    stack.say(page)
    return 0


def _wait(api: AirflowApi, run_id: str, *, page: str) -> str:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (state := api.run_state(DAG_ID, run_id)) not in ("success", "failed"):
        if time.monotonic() > deadline:
            raise StackError(f"the rollback is still {state} after {_PATIENCE_SECONDS:.0f} s; it continues: {page}")
        time.sleep(_POLL_SECONDS)
    return state


def _last_error(api: AirflowApi, run_id: str) -> str:
    """What the task's last attempt logged as an error."""
    (task,) = api.tasks(DAG_ID, run_id)
    path = f"{_path(run_id)}/logs/{task.try_number}"
    log = api.call("GET", path, headers={"Accept": "application/json"})["content"] if task.try_number else []
    return next(reversed(errors_of(log)), "")


def _path(run_id: str) -> str:
    return f"dags/{DAG_ID}/dagRuns/{quote(run_id)}/taskInstances/{TASK_ID}"
