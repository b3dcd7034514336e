"""The schedule of `retrain` follows the environment; its shape and policy."""

import importlib
from typing import Any

import pytest
from airflow.sdk import AssetOrTimeSchedule, CronTriggerTimetable
from airflow.serialization.serialized_objects import DagSerialization

from operators.failures import StageRetryPolicy
from operators.schedules import retrain_schedule


@pytest.fixture
def retrain():
    import dags.retrain

    return importlib.reload(dags.retrain).retrain


def asset_names(condition: Any) -> set[str]:
    return {asset.name for asset in condition.objects}


def test_cron_and_watched_prefix_give_the_schedule(monkeypatch: pytest.MonkeyPatch):
    assert retrain_schedule() is None
    monkeypatch.setenv("ATHANOR_RETRAIN_CRON", "0 3 * * 0")
    assert isinstance(retrain_schedule(), CronTriggerTimetable)
    monkeypatch.setenv("ATHANOR_RETRAIN_WATCH", "file:///raw")
    both = retrain_schedule()
    assert isinstance(both, AssetOrTimeSchedule)
    assert asset_names(both.asset_condition) == {"llm/raw-documents", "llm/preferences"}
    monkeypatch.delenv("ATHANOR_RETRAIN_CRON")
    assert asset_names(retrain_schedule()) == {"llm/raw-documents", "llm/preferences"}


def test_a_scheduled_run_needs_no_form_and_the_dag_round_trips(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATHANOR_RETRAIN_CRON", "0 3 * * 0")
    monkeypatch.setenv("ATHANOR_RETRAIN_WATCH", "s3://bucket/raw")
    monkeypatch.setenv("ATHANOR_DEADLINE_HOURS", "12")
    import dags.retrain

    dag = importlib.reload(dags.retrain).retrain
    dag.params.validate()
    encoded = DagSerialization.to_dict(dag)
    assert encoded["dag"]["deadline"][0]["name"] == "longer than 12 h"
    assert "'uri': 's3://bucket/raw'" in str(encoded["dag"]["timetable"])
    assert DagSerialization.from_dict(encoded).dag_id == "retrain"


def test_one_at_a_time_without_catching_up(retrain):
    assert (retrain.max_active_runs, retrain.catchup) == (1, False)
    edges = {(up.task_id, down) for up in retrain.tasks for down in up.downstream_task_ids}
    assert edges == {("decide", "train"), ("decide", "remember"), ("train", "remember"), ("train", "set_aside")}
    assert retrain.task_dict["set_aside"].trigger_rule == "one_failed"
    train = retrain.task_dict["train"]
    assert (train.trigger_dag_id, train.wait_for_completion, train.deferrable) == ("llm_pipeline", True, True)
    assert train.retries == 0  # a red pipeline run is cleared by somebody who knows why
    assert retrain.doc_md
    for task in retrain.tasks:
        assert task.owner == "athanor"
        assert isinstance(task.retry_policy, StageRetryPolicy)
    for name in ("decide", "remember", "set_aside"):
        assert retrain.task_dict[name].execution_timeout is not None
