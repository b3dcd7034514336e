"""DAGs of the chaos rows: `resolve` and one stage that behaves as the run's parameters say, under several settings."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, chain, get_current_context, task
from airflow.sdk.definitions.param import ParamsDict

from operators.failures import MAX_RETRIES, StageRetryPolicy
from operators.operator import StageOperator
from stages.config.graph import Stage

JOB = sys.executable + " -m tests.chaos.job {config_uri} {{ params.behaviour }}"
POLICY = StageRetryPolicy(first_delay=timedelta(seconds=1), longest_delay=timedelta(seconds=1))


def note_pid(context: dict) -> None:
    """Where the test finds the task's process."""
    folder = Path(os.environ["CHAOS_PIDS"])
    ti = context["ti"]
    name = f"{ti.dag_id}--{ti.run_id}--{ti.map_index}--{ti.try_number}.json".replace(":", "_").replace("+", "_")
    (folder / name).write_text(json.dumps({"pid": os.getpid()}))


def run_info() -> dict:
    from operators.run import start_run

    context: Any = get_current_context()
    retries = context["params"].get("max_retries", 2)
    form = {"recipe": "tiny", "overrides": {"execution.curate.max_retries": retries}}
    return start_run({**context, "params": form})


def chaos_dag(dag_id: str, **settings: Any) -> DAG:
    with DAG(
        dag_id=dag_id,
        schedule=None,
        params=ParamsDict({"behaviour": "lines:5", "max_retries": 2}),
        default_args={"retries": MAX_RETRIES, "retry_policy": POLICY},
    ) as dag:

        @task
        def resolve() -> dict:
            return run_info()

        chain(resolve(), StageOperator(stage=Stage.CURATE, entrypoint=JOB, pre_execute=note_pid, **settings))
    return dag


deferred = chaos_dag("deferred")
waiting = chaos_dag("waiting", deferrable=False)
timed = chaos_dag("timed", timeout=timedelta(seconds=15))
lossy = chaos_dag("lossy", ray_conn_id="ray_lossy")
flaky = chaos_dag("flaky", ray_conn_id="ray_flaky")
cut = chaos_dag("cut", ray_conn_id="ray_cut")
gone = chaos_dag("gone", ray_conn_id="ray_gone", unreachable_seconds=15)

with DAG(
    dag_id="mapped",
    schedule=None,
    params=ParamsDict({"behaviour": "lines:1", "count": 12}),
    max_active_tasks=64,
    default_args={"retries": MAX_RETRIES, "retry_policy": POLICY},
) as mapped:

    @task(task_id="resolve")
    def resolve_mapped() -> dict:
        return run_info()

    @task
    def intervals() -> list[float]:
        """As many as there shall be jobs."""
        context: Any = get_current_context()
        return [1.0] * context["params"]["count"]

    many = StageOperator.partial(
        task_id="curate", stage=Stage.CURATE, entrypoint=JOB, pool="few", outlets=[], pre_execute=note_pid
    ).expand(poll_interval=intervals())
    chain(resolve_mapped(), many)
