"""Which way of aligning is better: the same start, several methods, betas and seeds, one page.

    resolve ─┬─ curate ─ tokenize ─ pretrain ─ sft ─┬─ reward ─┬─ align[…] ─ evaluate[…] ─ compare ─ close
             │                                      └── gold ──┘      │           │
             └─ combinations ─────────────────────────────────────────┴───────────┘

What all methods share is built once, or found where a run of `llm_pipeline` has made it. `align` and `evaluate` are
mapped over the combinations of method, beta and seed; the pool `gpu` says how many run at a time. A combination that
fails is on the page with its reason, the others go on, and the run is red at its end (docs/COMPARE.md).
"""

from datetime import timedelta
from functools import partial
from typing import Any

from airflow.sdk import DAG, TriggerRule, chain, get_current_context, task

from operators.compare import ALIGN_TASK, EVALUATE_TASK, AlignedEvaluationOperator, AlignOperator, CompareOperator
from operators.defaults import default_args
from operators.form import form_of
from operators.notify import deadline, notifications
from operators.operator import StageOperator
from stages.config.compare import CompareParams
from stages.config.graph import GRAPH, pipeline_stages
from stages.config.selection import direct_inputs

heavy = partial(StageOperator, pool="gpu", timeout=timedelta(days=7))
light = partial(StageOperator, timeout=timedelta(hours=6))

with DAG(
    dag_id="compare_alignment",
    description="Alignment methods side by side, over betas and seeds",
    doc_md=__doc__,
    schedule=None,
    params=form_of(CompareParams, section="Comparison"),
    tags=["llm", "training", "evaluation", "ray"],
    deadline=deadline(),
    **notifications(),
    default_args=default_args(trigger_rule=TriggerRule.NONE_FAILED),
) as compare_alignment:

    @task(execution_timeout=timedelta(hours=1))  # the look at given models waits for room on the cluster
    def resolve() -> dict:
        """Turn the form into one configuration for each combination; wrong input ends the run here, naming the
        field."""
        from operators.compare import start_comparison

        return start_comparison(get_current_context())

    @task(execution_timeout=timedelta(minutes=5))
    def combinations() -> list[dict]:
        """List the combinations of method, beta and seed."""
        from operators.compare import combinations_of

        return combinations_of(get_current_context())

    @task(execution_timeout=timedelta(minutes=5))
    def close() -> None:
        """End the MLflow runs, whatever happened; succeed only if every combination has a result."""
        from operators.compare import finish_comparison

        finish_comparison(get_current_context())

    # What every method starts from and is judged by.
    shared = {
        stage: (heavy if GRAPH[stage].heavy else light)(stage=stage)
        for stage in pipeline_stages()
        if not (GRAPH[stage].aligned or GRAPH[stage].closing)
    }
    expanded: Any = combinations()
    align = AlignOperator.partial(
        task_id=ALIGN_TASK, pool="gpu", timeout=timedelta(days=7), map_index_template="{{ task.combination['name'] }}"
    ).expand(combination=expanded)
    # Whatever was trained is evaluated, also where another combination failed.
    evaluate = AlignedEvaluationOperator.partial(
        task_id=EVALUATE_TASK,
        pool="gpu",
        timeout=timedelta(days=1),
        trigger_rule=TriggerRule.ALL_DONE,
        map_index_template="{{ task.combination['name'] }}",
    ).expand(combination=expanded)
    compare = CompareOperator(timeout=timedelta(hours=1), trigger_rule=TriggerRule.ALL_DONE)

    resolved = resolve()
    chain(resolved, expanded)
    for stage, stage_task in shared.items():
        sources = [shared[source] for source in direct_inputs(stage) if source in shared]
        chain(sources or [resolved], stage_task)
    inner = {source for stage in shared for source in direct_inputs(stage)}
    chain([shared[stage] for stage in shared if stage not in inner], align)
    chain(align, evaluate, compare, close().as_teardown(on_failure_fail_dagrun=True))
