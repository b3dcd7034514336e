"""Stop Ray jobs whose Airflow task is no longer alive; reports what it found, and checks that no such job is left.

The stage operator stops its jobs itself. This DAG stops the jobs that it could not: a task killed while no triggerer
ran, a deleted run, an attempt that gave up while the Ray head was unreachable.
"""

from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import DAG, Param, get_current_context, task
from airflow.sdk.definitions.param import ParamsDict

from operators.defaults import default_args

with DAG(
    dag_id="reap_orphans",
    description="Stop Ray jobs that no Airflow task waits for",
    doc_md=__doc__,
    schedule=timedelta(minutes=10),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    params=ParamsDict(
        {
            "grace_seconds": Param(
                60, type="number", minimum=0, description="Seconds between the two looks that must agree on an orphan."
            )
        }
    ),
    tags=["llm", "ray", "upkeep"],
    default_args=default_args(retries=2, retry_delay=timedelta(minutes=5)),
) as reap_orphans:

    @task(execution_timeout=timedelta(minutes=5))
    def reap() -> dict:
        """Look twice, a grace period apart; stop what is an orphan both times; list again."""
        from operators.reaper import reap_orphans as visit

        context: Any = get_current_context()
        return visit(context, grace_seconds=context["params"]["grace_seconds"])

    reap()
