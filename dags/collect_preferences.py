"""What people prefer, as data: responses of a model, compared by raters in Airflow, published as preference pairs.

    resolve ─ respond ─ questions ─ rate (one task a prompt) ─ publish

The raters find their questions under "Required Actions". Questions without an answer in time are counted, the other
answers are published. The asset `llm/preferences` announces the artifact, whose URI is a `preferences` source of
`llm_pipeline`.
"""

from datetime import timedelta

from airflow.sdk import DAG, TriggerRule, chain, get_current_context, task

from operators.defaults import default_args
from operators.form import form_of
from operators.people.collect import PREFERENCES, RespondOperator
from operators.people.rating import PreferenceRating
from stages.config.forms import CollectParams
from stages.config.graph import Stage

with DAG(
    dag_id="collect_preferences",
    description="Raters compare a model's responses; their answers become preference pairs",
    doc_md=__doc__,
    schedule=None,
    params=form_of(CollectParams, section="What is compared"),
    tags=["llm", "people", "ray"],
    default_args=default_args(),
) as collect_preferences:

    @task(execution_timeout=timedelta(minutes=5))
    def resolve() -> dict:
        """Find the model and its prompts; wrong input ends the run here, naming the field."""
        from operators.people.collect import start_collection

        return start_collection(get_current_context())

    @task(execution_timeout=timedelta(minutes=5))
    def questions() -> list:
        """One question a prompt, its responses in a random order that is written down."""
        from operators.people.collect import questions_of

        return questions_of(get_current_context())

    # Answers come at once or over days: a failed question must not hold back the answers to the others.
    @task(execution_timeout=timedelta(minutes=5), trigger_rule=TriggerRule.ALL_DONE, outlets=[PREFERENCES])
    def publish() -> dict:
        """Turn the answers into pairs and publish them; ties, skips and missing answers are counted."""
        from operators.people.collect import publish_answers

        return publish_answers(get_current_context())

    @task(execution_timeout=timedelta(minutes=5))
    def close() -> None:
        """End the MLflow parent run; green only if preferences were published."""
        from operators.people.collect import finish_collection

        finish_collection(get_current_context())

    respond = RespondOperator(task_id=Stage.RESPOND.value, pool="gpu", timeout=timedelta(hours=6))
    asked = questions()
    rate = PreferenceRating.partial(
        task_id=Stage.RATE.value,
        map_index_template="{{ task.question['title'] }}",
        response_timeout=timedelta(days=365),  # at most; the form's answer_hours decides
    )
    chain(resolve(), respond, asked)
    chain(rate.expand(question=asked), publish(), close().as_teardown(on_failure_fail_dagrun=True))
