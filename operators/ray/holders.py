"""Who else has jobs on the cluster, for a run or a job that has to wait: which run of which DAG, which stage, how far.

Tasks cannot see Airflow's pools: its API for tasks has none. They see Ray's jobs, whose metadata names their tasks, and
almost every slot of the pool `gpu` belongs to a task with a job.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from operators.ray.jobs import JobInfo, JobStatus
from operators.ray.ownership import named_task
from stages.artifacts.store import Store
from stages.config.errors import DataError
from stages.config.heard import REPORTS, standing
from stages.config.records import parse_object
from stages.config.request import run_folder
from stages.config.text import duration, one_line

_MOST_SHOWN = 5
_LONGEST_NAME = 250


def holders(
    jobs: Iterable[JobInfo], *, besides: tuple[str, str] | None = None, submission_id: str = ""
) -> list[JobInfo]:
    """The jobs that run or wait, longest first, but those of the run `besides` (DAG id, run id) and one's own."""
    active = (job for job in jobs if job.status.is_active and job.submission_id != submission_id)
    others = (job for job in active if named_task(job)[:2] != besides)
    return sorted(others, key=lambda job: (job.status is not JobStatus.RUNNING, job.started_at or float("inf")))


def described(job: JobInfo, *, store: Store | None = None) -> str:
    """`pretrain of llm_pipeline, run manual__1, for 12 min 04 s: 120/500 steps (24 %), 3 min 20 s left`."""
    dag_id, run_id, task_id = (one_line(name, at_most=_LONGEST_NAME) for name in named_task(job))
    who = f"{task_id} of {dag_id}, run {run_id}" if task_id else f"the Ray job {one_line(job.submission_id)}"
    if job.status is JobStatus.PENDING:
        return f"{who}: waits for the cluster, too"
    since = f", for {duration(max(0.0, time.time() - job.started_at))}" if job.started_at else ""
    far = f": {standing(_progress(store, job), now=time.time())}" if store is not None and task_id else ""
    return f"{who}{since}{far}"


def as_lines(jobs: list[JobInfo], *, store: Store | None = None, airflow_url: str = "") -> list[str]:
    """A line for each of the first jobs and, where Airflow's address is known, one that says how to end it."""
    lines = []
    for job in jobs[:_MOST_SHOWN]:
        lines.append(described(job, store=store))
        dag_id, run_id, task_id = named_task(job)
        if airflow_url and task_id:
            page = f"{airflow_url.rstrip('/')}/dags/{quote(dag_id, safe='')}/runs/{quote(run_id, safe='')}"
            lines.append(f"to end it, mark that run as failed: {page}")
    if len(jobs) > _MOST_SHOWN:
        lines.append(f"and {len(jobs) - _MOST_SHOWN} more")
    return lines


def _progress(store: Store, job: JobInfo) -> Mapping[str, Any]:
    """The newest report of the job's stage; empty when there is none that can be read."""
    dag_id, run_id, task_id = named_task(job)
    for name in REPORTS:
        try:
            found = parse_object(store.read_bytes(f"runs/{run_folder(dag_id, run_id)}/{task_id}/{name}"), name)
        except (FileNotFoundError, DataError, OSError, ValueError):  # it is only shown, and its task tells of damage
            continue
        if "done" in found:
            return found
    return {}
