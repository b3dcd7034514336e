"""What every DAG of this project owes its operators: an owner, retries, an end in time, quota, words."""

import importlib
from typing import Any

import pytest
from airflow.sdk import DAG

from operators.operator import StageOperator
from operators.prepare import selection
from stages.config.graph import GRAPH, Stage
from stages.config.resolve import resolve
from tests.places import REPOSITORY

FOLDER = REPOSITORY / "dags"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
DAGS = {
    dag.dag_id: dag
    for module in MODULES
    for dag in vars(importlib.import_module(f"dags.{module}")).values()
    if isinstance(dag, DAG)
}
WAITS = {"retrain.train": "the run that it starts retries and ends in time by itself"}
TASKS = [pytest.param(task, id=f"{dag_id}.{task.task_id}") for dag_id, dag in DAGS.items() for task in dag.tasks]


def test_every_file_holds_a_dag():
    assert len(DAGS) >= len(MODULES) > 0


@pytest.mark.parametrize("dag", DAGS.values(), ids=DAGS)
def test_a_dag_says_what_it_is_and_can_be_found(dag: DAG):
    assert dag.description
    assert dag.doc_md
    assert dag.tags
    assert dag.dag_id in MODULES  # the file is found by the name that the UI shows


@pytest.mark.parametrize("dag", DAGS.values(), ids=DAGS)
def test_the_untouched_form_of_a_dag_is_valid(dag: DAG):
    """Airflow refuses a scheduled DAG without valid defaults, and people press the button without reading."""
    dag.params.validate()


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_an_owner_retries_and_an_end_in_time(task: Any):
    assert task.owner != "airflow", "the owner is Airflow's default"
    if f"{task.dag_id}.{task.task_id}" in WAITS:
        return
    assert task.retries >= 1, "one lost process must not lose a run"
    limits = ("execution_timeout", "timeout", "response_timeout")
    partial = getattr(task, "partial_kwargs", {})  # of a mapped task
    assert any(getattr(task, limit, None) or partial.get(limit) for limit in limits), (
        f"none of {', '.join(limits)} is set"
    )


@pytest.mark.parametrize("task", TASKS)
def test_what_fills_a_gpu_waits_for_the_quota(task: Any):
    if isinstance(task, StageOperator) and GRAPH[Stage(task.stage)].trains:
        assert task.pool == "gpu"
        assert task.deferrable, "a waiting task would hold a worker slot for days"


@pytest.mark.parametrize(
    ("params", "skipped"),
    [
        ({}, ""),
        ({"alignment": "ppo"}, "dpo"),
        ({"alignment": "dpo"}, "reward ppo"),
        ({"alignment": "dpo", "train_reward": True}, "ppo"),
        ({"alignment": "none"}, "reward ppo dpo"),
        ({"base_model": "/models/x"}, "pretrain"),
        ({"base_model": "/models/x", "first_stage": "dpo"}, "pretrain sft reward ppo"),
        (
            {"base_model": "/models/x", "first_stage": "evaluate", "instructions": ["/chats"]},
            "pretrain sft reward ppo dpo promote",
        ),
        ({"base_model": "/models/x", "reward_model": "/models/r"}, "pretrain reward"),
        (
            {"base_model": "/models/x.gguf", "last_stage": "convert"},
            "curate tokenize pretrain sft reward ppo dpo evaluate promote report",
        ),
        ({"last_stage": "sft"}, "reward ppo dpo evaluate promote report"),
        ({"last_stage": "promote", "alignment": "ppo"}, "dpo report"),
        (
            {"dry_run": True},
            "curate tokenize pretrain sft reward ppo dpo evaluate promote report",
        ),
    ],
    ids=str,
)
def test_the_graph_of_a_run_follows_from_its_params(params: dict[str, Any], skipped: str):
    tasks = {task.stage for task in DAGS["llm_pipeline"].tasks if isinstance(task, StageOperator)}
    left = tasks - {stage.value for stage in selection(resolve({"recipe": "tiny", **params}))}
    on_demand = {stage.value for stage, spec in GRAPH.items() if spec.asked_by}
    assert left - {"convert", "gold"} - on_demand == set(skipped.split())
    assert {"gold", *on_demand} <= left  # recipe tiny trains no gold scorer, and no field asks for the others
    assert ("convert" in left) == (not params.get("base_model", "").endswith(".gguf"))
