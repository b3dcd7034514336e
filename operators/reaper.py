"""Stops orphans: Ray jobs whose Airflow task is no longer alive.

The operator and its trigger stop a job when its task is killed. Orphans remain when a task is killed while no triggerer
runs, when a run is deleted, or when an attempt gives up because Ray is away. A job is stopped only if two checks, a
grace period apart, agree. Jobs of other Airflows, of live tasks, and those with `cancel_on_kill=False` are never
touched.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from operators.failures import StageInfrastructureFailed, as_stage_failures
from operators.ray.hook import DEFAULT_CONN_ID, RayJobHook
from operators.ray.jobs import JobInfo
from operators.ray.ownership import OwnedJob, airflow_id

logger = logging.getLogger(__name__)

# Airflow's states of a task instance that runs, or will run by itself; in any other state it has no use for a job.
ALIVE = frozenset(
    {"scheduled", "queued", "running", "deferred", "restarting", "up_for_retry", "up_for_reschedule", "awaiting_input"}
)
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.5

States = Callable[[str, list[str]], Mapping[str, Mapping[str, Any]]]
"""(dag id, run ids) -> run id -> task id, with `_<map index>` when mapped -> state or None."""


@dataclass(frozen=True)
class Finding:
    """One active job of ours, and why it is an orphan; empty when it is not."""

    owned: OwnedJob
    task_state: str
    reason: str

    @property
    def submission_id(self) -> str:
        return self.owned.job.submission_id


@dataclass(frozen=True)
class Reaped:
    """What a visit did."""

    active: int
    stopped: tuple[str, ...]
    left: tuple[str, ...]


def inspect(jobs: Iterable[JobInfo], *, airflow: str, states: States) -> list[Finding]:
    """Judge every active job of this Airflow."""
    ours = [owned for job in jobs if (owned := OwnedJob.of(job, airflow))]
    newest: dict[tuple[str, str, str, int], int] = {}
    for owned in ours:
        newest[owned.task_key] = max(newest.get(owned.task_key, 0), owned.generation)
    active = [owned for owned in ours if owned.job.status.is_active]
    runs: dict[str, set[str]] = defaultdict(set)
    for owned in active:
        runs[owned.dag_id].add(owned.run_id)
    known = {dag_id: states(dag_id, sorted(run_ids)) for dag_id, run_ids in runs.items()}
    return [_judge(owned, newest[owned.task_key], known[owned.dag_id].get(owned.run_id, {})) for owned in active]


def _judge(owned: OwnedJob, newest: int, tasks: Mapping[str, Any]) -> Finding:
    name = owned.task_id if owned.map_index < 0 else f"{owned.task_id}_{owned.map_index}"
    state = str(tasks[name] or "cleared") if name in tasks else "gone"
    if not owned.may_be_stopped:
        reason = ""
    elif owned.generation < newest:
        reason = f"superseded by generation {newest}"
    elif state not in ALIVE:
        reason = f"its task is {state}"
    else:
        reason = ""
    return Finding(owned, state, reason)


def reap(
    hook: RayJobHook, *, airflow: str, states: States, grace_seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Reaped:
    """Stop jobs that are orphans in two checks `grace_seconds` apart; raise when one is left at the end."""
    findings = inspect(hook.list_jobs(), airflow=airflow, states=states)
    suspects = {finding.submission_id for finding in findings if finding.reason}
    logger.info("%s", as_table(findings))
    if suspects:
        logger.info("Checking again after %.0f s of grace.", grace_seconds)
        sleep(grace_seconds)
        findings = inspect(hook.list_jobs(), airflow=airflow, states=states)
    orphans = [finding for finding in findings if finding.reason and finding.submission_id in suspects]
    for orphan in orphans:
        hook.stop_job(orphan.submission_id)
        logger.info("Stopping Ray job %s: %s.", orphan.submission_id, orphan.reason)
    left = _wait_until_stopped(hook, {orphan.submission_id for orphan in orphans}, sleep=sleep)
    logger.info("%d active jobs of ours, %d orphans stopped, %d left.", len(findings), len(orphans), len(left))
    if left:
        raise StageInfrastructureFailed(
            f"Ray jobs do not stop: {', '.join(sorted(left))}.",
            advice="Look at the Ray head; the next visit tries again.",
        )
    return Reaped(len(findings), tuple(orphan.submission_id for orphan in orphans), tuple(sorted(left)))


def _wait_until_stopped(hook: RayJobHook, stopping: set[str], *, sleep: Callable[[float], None]) -> set[str]:
    """List again until none of these jobs is active, or return those that still are."""
    deadline = time.monotonic() + _STOP_SECONDS
    while True:
        active = {job.submission_id for job in hook.list_jobs() if job.status.is_active}
        left = stopping & active
        if not left or time.monotonic() > deadline:
            return left
        sleep(_POLL_SECONDS)


def as_table(findings: Iterable[Finding]) -> str:
    """One line a job: what it is, what its task is, what will be done."""
    rows = [("job", "dag / run / task", "task is", "verdict")]
    for finding in findings:
        owned = finding.owned
        task = owned.task_id if owned.map_index < 0 else f"{owned.task_id}[{owned.map_index}]"
        verdict = finding.reason or ("left alone" if owned.may_be_stopped else "left alone: cancel_on_kill is off")
        rows.append((finding.submission_id, f"{owned.dag_id} / {owned.run_id} / {task}", finding.task_state, verdict))
    if len(rows) == 1:
        return "No active Ray job belongs to this Airflow."
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def reap_orphans(context: Any, *, ray_conn_id: str = DEFAULT_CONN_ID, grace_seconds: float = 60.0) -> dict[str, Any]:
    """The DAG's task: one visit; its result is small enough for XCom."""
    ti = context["ti"]

    def states(dag_id: str, run_ids: list[str]) -> Mapping[str, Mapping[str, Any]]:
        return ti.get_task_states(dag_id=dag_id, run_ids=run_ids)

    with as_stage_failures(), RayJobHook(ray_conn_id) as hook:
        reaped = reap(hook, airflow=airflow_id(), states=states, grace_seconds=grace_seconds)
    return {"active": reaped.active, "stopped": list(reaped.stopped), "left": list(reaped.left)}
