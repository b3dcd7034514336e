"""Take the champion back: the model that was champion before it is champion again.

    rollback

The form asks for the run name and the reason. Who asked, when and why is recorded in the store and on both versions in
MLflow. A model that was rolled back becomes champion again only when a person approves it.
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, get_current_context, task

from operators.defaults import default_args
from operators.form import form_of
from operators.notify import notifications
from stages.config.forms import RollbackParams

with DAG(
    dag_id="rollback",
    description="The previous champion becomes champion again",
    doc_md=__doc__,
    schedule=None,
    params=form_of(RollbackParams, section="What is taken back"),
    max_active_runs=1,
    tags=["llm", "promotion"],
    default_args=default_args(retries=3, retry_delay=timedelta(seconds=30), execution_timeout=timedelta(minutes=5)),
    **notifications(),
) as rollback:

    @task(task_id="rollback")
    def take_back() -> dict:
        """Move the aliases in MLflow; return what was recorded."""
        from operators.failures import as_stage_failures
        from operators.form import form_values
        from operators.rollback import roll_back
        from stages.config.validation import validated

        context: Any = get_current_context()
        with as_stage_failures():
            params = validated(RollbackParams, form_values(context["params"]))
            return roll_back(params, by=context["dag_run"].triggering_user_name or "an unnamed user")

    take_back()
