"""From the champion to its successor, when there is new data.

    decide ─ train (a run of llm_pipeline) ─┬─ remember
                                            └─ set_aside (only after a failure)

Runs on a cron schedule, when raw text comes into the watched prefix, and when preference data is published
(docs/RETRAINING.md names the variables). `decide` looks at the data and not at what triggered the run: if there is
nothing new, or no champion, the run succeeds with the rest skipped. The champion is pretrained further on the new
documents alone, then tuned and aligned; the result competes as candidate, with the old champion as its parent.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, TriggerRule, chain, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from operators.defaults import default_args
from operators.form import form_of
from operators.notify import deadline, notifications
from operators.schedules import PREFERENCES, retrain_schedule
from stages.config.forms import RetrainParams

with DAG(
    dag_id="retrain",
    description="Continue from the champion with new data",
    doc_md=__doc__,
    schedule=retrain_schedule(),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    params=form_of(RetrainParams, section="Run"),
    tags=["llm", "training"],
    deadline=deadline(),
    default_args=default_args(retries=3, retry_delay=timedelta(seconds=30), execution_timeout=timedelta(minutes=5)),
    **notifications(),
) as retrain:

    @task
    def decide() -> dict:
        """Find the champion and what is new; skip the rest when there is nothing to do, and say why."""
        from operators.failures import as_stage_failures
        from operators.form import form_values
        from operators.retrain import Skip, announced_data, pipeline_run_id, tell
        from operators.retrain import decide as decide_by
        from stages.config.validation import validated

        context: Any = get_current_context()
        with as_stage_failures():
            params = validated(RetrainParams, form_values(context["params"]))
            verdict = decide_by(params, announced=announced_data(context["triggering_asset_events"], PREFERENCES))
        tell(verdict.set_aside, context)
        if isinstance(verdict, Skip):
            raise AirflowSkipException(verdict.reason)
        print(f"Retraining: {verdict.reason}")  # noqa: T201 - a task's output is its log
        return {
            "conf": verdict.conf,
            "run_name": params.run_name,
            "watermark": verdict.watermark.model_dump(mode="json"),
            "run_id": pipeline_run_id(context["run_id"]),
        }

    @task
    def remember(decided: dict) -> None:
        """Record the data of this retraining, now that it has succeeded."""
        from operators.failures import as_stage_failures
        from operators.retrain import record

        with as_stage_failures():
            record(decided["run_name"], decided["watermark"])

    @task(trigger_rule=TriggerRule.ONE_FAILED)
    def set_aside() -> dict:
        """When the run failed over preference data, set that data aside, so that it does not fail the next one too."""
        from operators.failures import as_stage_failures
        from operators.retrain import set_aside_failed, tell

        context: Any = get_current_context()
        with as_stage_failures():
            faults = set_aside_failed(context["ti"].xcom_pull(task_ids="decide"), context["ti"].run_id)
        tell(faults, context)
        return faults

    decided: Any = decide()
    train = TriggerDagRunOperator(
        task_id="train",
        trigger_dag_id="llm_pipeline",
        trigger_run_id=decided["run_id"],
        conf=decided["conf"],
        reset_dag_run=True,
        fail_when_dag_is_paused=True,
        wait_for_completion=True,
        deferrable=True,
        poke_interval=30,
        retries=0,
        execution_timeout=None,
    )
    chain(decided, train, [remember(decided), set_aside()])
