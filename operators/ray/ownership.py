"""Which Airflow task owns a Ray job: Airflow, task instance and generation, written into the job's metadata.

Several Airflows may share one Ray cluster, and none may stop the jobs of another. So each Airflow needs a name that is
unique and that all of its own components agree on.
"""

import hashlib
import os
from dataclasses import dataclass

from operators.ray.jobs import JobInfo
from stages.config.errors import ConfigError

AIRFLOW_ID_VARIABLE = "ATHANOR_AIRFLOW_ID"
_AIRFLOW = "airflow.instance"
GENERATION = "airflow.generation"
_CANCEL = "athanor.cancel_on_kill"


def airflow_id() -> str:
    """Name of this Airflow: ATHANOR_AIRFLOW_ID, else a hash of its address and its Fernet key.

    The key alone is not enough: a staging system made from a copy of production has the same one.
    """
    from airflow.sdk.configuration import conf

    if given := os.environ.get(AIRFLOW_ID_VARIABLE):
        return given
    key = conf.get("core", "fernet_key", fallback="") or ""
    address = conf.get("api", "base_url", fallback="") or ""
    if not key and not address:
        raise ConfigError(
            "this Airflow cannot be told apart from others: neither [core] fernet_key nor [api] base_url is set",
            advice=f"Set one of them, or {AIRFLOW_ID_VARIABLE}, to the same value for all of Airflow's components.",
        )
    return hashlib.sha256(f"{address}\n{key}".encode()).hexdigest()[:16]


def job_metadata(
    airflow: str, *, dag_id: str, run_id: str, task_id: str, map_index: int, try_number: int, cancel_on_kill: bool
) -> dict[str, str]:
    """The part of a job's metadata that names its task instance; values must be strings."""
    return {
        _AIRFLOW: airflow,
        "airflow.dag_id": dag_id,
        "airflow.run_id": run_id,
        "airflow.task_id": task_id,
        "airflow.map_index": str(map_index),
        "airflow.try_number": str(try_number),
        _CANCEL: "true" if cancel_on_kill else "false",
    }


def named_task(job: JobInfo) -> tuple[str, str, str]:
    """DAG id, run id and task id of the task that a job belongs to, of whichever Airflow; empty strings for others."""
    data = job.metadata
    return data.get("airflow.dag_id", ""), data.get("airflow.run_id", ""), data.get("airflow.task_id", "")


@dataclass(frozen=True)
class OwnedJob:
    """An Athanor job of this Airflow."""

    job: JobInfo
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    generation: int
    may_be_stopped: bool

    @property
    def task_key(self) -> tuple[str, str, str, int]:
        return (self.dag_id, self.run_id, self.task_id, self.map_index)

    @classmethod
    def of(cls, job: JobInfo, airflow: str) -> "OwnedJob | None":
        """Read a job's metadata; None when the job is another Airflow's, or when a field is missing."""
        data = job.metadata
        names = ("airflow.dag_id", "airflow.run_id", "airflow.task_id", "airflow.map_index", GENERATION)
        if data.get(_AIRFLOW) != airflow or any(name not in data for name in names):
            return None
        return cls(
            job=job,
            dag_id=data["airflow.dag_id"],
            run_id=data["airflow.run_id"],
            task_id=data["airflow.task_id"],
            map_index=int(data["airflow.map_index"]),
            generation=int(data[GENERATION]),
            may_be_stopped=data.get(_CANCEL) != "false",
        )
