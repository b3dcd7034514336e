"""From raw text to an aligned, registered model: the whole pipeline on one screen.

    resolve ─ plan ─ convert ─┬─ constitution ─┬─ review ─ curate ─ tokenize ─ pretrain ─ sft ─┬─ reward ─ ppo ─┐
                              └─ synthesize ───┘                                               └────── dpo ─────┤
                                                  report ─ promote ─ approve ─ evaluate ────────────────────────┘

Every stage is a Ray job. A stage whose artifact exists is not run again; a stage that the run does not include skips
itself and says why: `first_stage` and given models decide where a run enters, `last_stage` where it ends. Skipped
stages let the rest run, failed ones do not. With `review_made_data`, `review` asks a person about what models have
written, with `promotion=approval`, `approve` about the champion. A gate, `gate_<stage>`, stands after each stage that
makes data or a model and after `evaluate`: a failed one stops the run (docs/GATES.md).
"""

from datetime import timedelta
from functools import partial

from airflow.sdk import DAG, TriggerRule, chain, get_current_context, task

from operators.defaults import default_args
from operators.form import trigger_form
from operators.gates import GateOperator
from operators.notify import deadline, notifications
from operators.operator import StageOperator
from operators.people.approval import PromotionApproval
from operators.people.review import MadeDataReview
from stages.config.graph import GRAPH, Stage, gated_stages, pipeline_stages
from stages.config.selection import direct_inputs

# Stages that fill the machine wait for a slot of the pool `gpu`, which counts deferred tasks too.
heavy = partial(StageOperator, pool="gpu", timeout=timedelta(days=7))
light = partial(StageOperator, timeout=timedelta(hours=6))


with DAG(
    dag_id="llm_pipeline",
    description="Raw text to an aligned, registered language model",
    doc_md=__doc__,
    schedule=None,
    params=trigger_form(),
    tags=["llm", "training", "ray"],
    deadline=deadline(),
    **notifications(),
    default_args=default_args(trigger_rule=TriggerRule.NONE_FAILED),
) as llm_pipeline:

    @task(execution_timeout=timedelta(hours=1))  # the look at given models waits for room on the cluster
    def resolve() -> dict:
        """Turn the form into a complete, frozen configuration; wrong input ends the run here, naming the field."""
        from operators.run import start_run

        return start_run(get_current_context())

    @task.short_circuit(execution_timeout=timedelta(minutes=5))
    def plan() -> bool:
        """Show what exists or will run, its time and its cost, before anything is spent; a dry run ends here."""
        from operators.plan_task import plan_run

        return plan_run(get_current_context())

    @task(execution_timeout=timedelta(minutes=5))
    def close() -> None:
        """End the MLflow parent run, whatever happened; succeed only if every stage of the run succeeded."""
        from operators.run import finish_run

        finish_run(get_current_context())

    # The stages, in the order that their inputs (stages/config/graph.py) ask for.
    tasks = {stage: (heavy if GRAPH[stage].heavy else light)(stage=stage) for stage in pipeline_stages()}
    review, approve = MadeDataReview(), PromotionApproval(task_id="approve")
    # A gate of a model loads it, so it waits for a slot too; the others only read what is recorded.
    gates = {
        stage: GateOperator(
            stage=stage, timeout=timedelta(hours=6), pool="gpu" if GRAPH[stage].trains else "default_pool"
        )
        for stage in gated_stages()
    }

    chain(resolve(), plan(), [tasks[stage] for stage in tasks if not direct_inputs(stage)])
    for stage, gate in gates.items():
        # A reward model is also asked for the answers that a gold scorer likes.
        judges = [gates[other] for other in gates if GRAPH[other].judges and GRAPH[stage].learnt_from]
        chain([tasks[stage], *judges], gate)
    for stage, stage_task in tasks.items():
        sources = [(tasks | gates)[source] for source in direct_inputs(stage) if not GRAPH[source].judges]
        if stage is Stage.PROMOTE:
            chain(sources, approve, stage_task)
        elif any(GRAPH[source].makes for source in direct_inputs(stage)):
            chain(sources, review, stage_task)
        elif sources:
            chain(sources, stage_task)
    chain(tasks[Stage.REPORT], close().as_teardown(on_failure_fail_dagrun=True))
