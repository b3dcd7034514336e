"""Shape and policy of `compare_alignment`."""

from typing import Any

from airflow.sdk import DAG
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.serialization.serialized_objects import DagSerialization

from dags.compare_alignment import compare_alignment
from operators.failures import StageRetryPolicy
from stages.config.compare import CompareParams
from stages.config.expansion import expand


def upstream(task_id: str) -> set[str]:
    return compare_alignment.task_dict[task_id].upstream_task_ids


def test_all_methods_start_from_what_is_built_once() -> None:
    assert upstream("sft") == {"pretrain"}
    assert upstream("reward") == upstream("gold") == {"sft"}
    assert upstream("align") == {"combinations", "reward", "gold"}
    assert upstream("evaluate") == {"combinations", "align"}
    assert upstream("compare") == {"evaluate"}
    assert not {"ppo", "dpo", "promote", "report"} & compare_alignment.task_dict.keys()


def test_trainings_and_evaluations_are_mapped_and_wait_for_the_quota() -> None:
    for name in ("align", "evaluate"):
        task: Any = compare_alignment.task_dict[name]
        assert isinstance(task, MappedOperator)
        assert task.partial_kwargs["pool"] == "gpu"
        assert task.partial_kwargs["timeout"] is not None


def test_a_failed_combination_stops_no_other_and_turns_the_run_red_at_its_end() -> None:
    assert compare_alignment.task_dict["evaluate"].trigger_rule == "all_done"
    assert compare_alignment.task_dict["compare"].trigger_rule == "all_done"
    close = compare_alignment.task_dict["close"]
    assert close.is_teardown
    assert close.on_failure_fail_dagrun


def test_policy_and_form() -> None:
    compare_alignment.params.validate()
    expand(CompareParams.model_validate(dict(compare_alignment.params)))
    for task in compare_alignment.tasks:
        assert task.owner == "athanor"
        assert isinstance(task.retry_policy, StageRetryPolicy)


def test_it_survives_serialisation() -> None:
    assert isinstance(compare_alignment, DAG)
    assert DagSerialization.from_dict(DagSerialization.to_dict(compare_alignment)).dag_id == "compare_alignment"
