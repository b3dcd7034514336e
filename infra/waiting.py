"""Why a run stands at `queued`: who holds the slots that it waits for, how far they are, and how to end them.

All of it is from Airflow's REST API and the progress records in the object store. Tasks themselves cannot ask for it:
Airflow's API for tasks knows nothing of pools, and a task that waits for a slot has no process and no log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

from infra.airflow_api import AirflowApi, AirflowApiError, TaskState
from stages.config.heard import standing
from stages.config.text import duration, one_line

_OCCUPY = ("running", "queued", "deferred")
_PATIENCE_SECONDS = 60.0
"""Airflow's scheduler needs a moment for everything; only what takes longer needs an explanation of its own."""
_MOST_HOLDERS = 5

Progress = Callable[[str, str, str], Mapping[str, Any]]
"""(dag id, run id, task id) -> its progress record, empty when it has none."""


@dataclass(frozen=True)
class Waiting:
    """Lines for people; the first one changes only when the reason does."""

    lines: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        return self.lines[0] if self.lines else ""


class WaitWatch:
    """Explains why one run does not go on."""

    def __init__(self, api: AirflowApi, dag_id: str, run_id: str, *, airflow_url: str, progress: Progress) -> None:
        self._api, self._dag_id, self._run_id = api, dag_id, run_id
        self._airflow_url, self._progress = airflow_url, progress

    def explain(self, run_state: str, waiting: Sequence[TaskState], *, works: bool) -> Waiting:
        """Ask Airflow why these tasks, which could start, do not; `works` says whether others of the run do.

        What it refuses to tell (to a login without the permission, say) is no reason to stop watching.
        """
        try:
            if run_state == "queued":
                return Waiting(self._queued_run())
            for task in waiting:
                if lines := self._queued_task(task, alone=not works):
                    return Waiting(lines)
        except AirflowApiError as error:
            return Waiting((f"why it waits is unknown: {one_line(str(error), at_most=200)}",))
        return Waiting()

    def _queued_run(self) -> tuple[str, ...]:
        """The whole run waits: its DAG is paused, or as many runs of it are active as it allows."""
        dag = self._api.call("GET", f"dags/{quote(self._dag_id)}/details")
        page = f"{self._airflow_url}/dags/{quote(self._dag_id)}"
        if dag.get("is_paused"):
            return (f"the run waits because the DAG {self._dag_id} is paused; switch it on at {page}",)
        found = self._api.call("GET", f"dags/{quote(self._dag_id)}/dagRuns", params={"state": "running", "limit": 100})
        active, limit = found["dag_runs"], dag.get("max_active_runs")
        if not limit or len(active) < limit:
            return ()
        runs = "1 run is active" if len(active) == 1 else f"{len(active)} runs are active"
        lines = [f"the run waits: {runs}, which is all that {self._dag_id} allows"]
        for run in active[:_MOST_HOLDERS]:
            since = _ago(run.get("start_date"))
            lines.append(f"  {run['dag_run_id']}{f', started {since} ago' if since else ''}: {self._page(run)}")
        lines.append("  to end one, mark it as failed on its page")
        return tuple(lines)

    def _queued_task(self, task: TaskState, *, alone: bool) -> tuple[str, ...]:
        pool = self._api.pool(task.pool)
        if pool is None:
            return (
                f"{task.task_id} waits for the pool {task.pool!r}, which does not exist; create it in Admin, Pools",
            )
        slots, include_deferred = pool["slots"], pool["include_deferred"]
        if 0 <= slots < task.pool_slots:
            return (
                f"{task.task_id} asks for {task.pool_slots} slots of the pool {task.pool!r}, which has {slots}, so it "
                "never starts; give the pool more in Admin, Pools",
            )
        holders = self._holders(task.pool, include_deferred=include_deferred)
        others = [holder for holder in holders if not self._is_ours(holder)]
        full = slots >= 0 and sum(holder["pool_slots"] for holder in holders) + task.pool_slots > slots
        if full and others:
            held = "1 slot" if slots == 1 else f"{slots} slots"
            lines = [f"{task.task_id} waits for the pool {task.pool!r} ({held}), which other runs hold:"]
            for holder in others[:_MOST_HOLDERS]:
                lines += self._about(holder)
            if len(others) > _MOST_HOLDERS:
                lines.append(f"  and {len(others) - _MOST_HOLDERS} more")
            return tuple(lines)
        waited = _seconds_since(task.ready)
        if full or not alone or waited is None or waited < _PATIENCE_SECONDS:
            return ()  # other tasks of this run hold it: they are on the screen
        return (
            f"{task.task_id} could start, and its pool has room: Airflow's scheduler or executor is busy or away",
            f"  it has been ready for {duration(waited)}; see `make status` and `make logs COMPONENT=scheduler`",
        )

    def _holders(self, pool: str, *, include_deferred: bool) -> list[dict[str, Any]]:
        states = [state for state in _OCCUPY if include_deferred or state != "deferred"]
        found = self._api.call(
            "GET", "dags/~/dagRuns/~/taskInstances", params={"pool": pool, "state": states, "limit": 100}
        )
        return found["task_instances"]

    def _is_ours(self, holder: Mapping[str, Any]) -> bool:
        return (holder["dag_id"], holder["dag_run_id"]) == (self._dag_id, self._run_id)

    def _about(self, holder: Mapping[str, Any]) -> list[str]:
        since = _ago(holder.get("start_date"))
        progress = self._progress(holder["dag_id"], holder["dag_run_id"], holder["task_id"])
        far = standing(progress, now=time.time())
        return [
            f"  {holder['task_id']} of {holder['dag_id']}, run {holder['dag_run_id']}"
            f"{f', for {since}' if since else ''}: {far}",
            f"  to end it, mark that run as failed: {self._page(holder)}",
        ]

    def _page(self, run: Mapping[str, Any]) -> str:
        dag_id = run.get("dag_id", self._dag_id)
        return f"{self._airflow_url}/dags/{quote(dag_id)}/runs/{quote(run['dag_run_id'])}"


def _seconds_since(moment: str | None) -> float | None:
    return None if not moment else max(0.0, time.time() - datetime.fromisoformat(moment).timestamp())


def _ago(moment: str | None) -> str:
    seconds = _seconds_since(moment)
    return "" if seconds is None else duration(seconds)
