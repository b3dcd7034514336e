"""Evaluate any model again: registered, given by artifact, or a Hugging Face directory.

    resolve ─ evaluate ─ close

The stage is the one of `llm_pipeline`, so the same model on the same data with the same settings is not measured
twice. Numbers of a registered model go onto its version in MLflow.
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, TriggerRule, chain, get_current_context, task

from operators.defaults import default_args
from operators.form import form_of
from operators.notify import notifications
from operators.operator import StageOperator
from stages.config.forms import EvaluationParams
from stages.config.graph import Stage

with DAG(
    dag_id="evaluate_model",
    description="Measure a model again",
    doc_md=__doc__,
    schedule=None,
    params=form_of(EvaluationParams, section="Evaluation"),
    tags=["llm", "evaluation", "ray"],
    default_args=default_args(),
    **notifications(),
) as evaluate_model:

    @task(execution_timeout=timedelta(hours=1))  # the look at given models waits for room on the cluster
    def resolve() -> dict:
        """Look up the model, its data and its reward model; what is missing ends the run here, naming the field."""
        from operators.evaluation import start_evaluation

        return start_evaluation(get_current_context())

    @task(execution_timeout=timedelta(minutes=5), trigger_rule=TriggerRule.ALL_DONE)
    def close() -> None:
        """Put the numbers on the registered version; end the MLflow run, as failed when there are none."""
        from operators.evaluation import conclude

        context: Any = get_current_context()
        conclude(context, context["ti"].xcom_pull(task_ids=Stage.EVALUATE.value))

    evaluate = StageOperator(stage=Stage.EVALUATE, pool="gpu", timeout=timedelta(days=1))
    chain(resolve(), evaluate, close())
