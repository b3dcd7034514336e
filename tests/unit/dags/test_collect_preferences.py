"""Shape and policy of the DAG that asks raters."""

from airflow.sdk import TriggerRule

from dags.collect_preferences import collect_preferences
from operators.failures import MAX_RETRIES, StageRetryPolicy
from stages.config.forms import CollectParams
from stages.config.graph import GRAPH, Stage


def test_the_drawing_is_the_one_of_the_docstring():
    edges = {(up.task_id, down) for up in collect_preferences.tasks for down in up.downstream_task_ids}
    assert edges == {
        ("resolve", "respond"),
        ("respond", "questions"),
        ("questions", "rate"),
        ("rate", "publish"),
        ("publish", "close"),
    }


def test_one_question_that_fails_does_not_hold_back_the_answers_to_the_others():
    assert collect_preferences.task_dict["publish"].trigger_rule == TriggerRule.ALL_DONE
    assert collect_preferences.task_dict["rate"].trigger_rule == TriggerRule.ALL_SUCCESS


def test_close_runs_whatever_happened_and_decides_about_the_run():
    close = collect_preferences.task_dict["close"]
    assert close.is_teardown
    assert close.on_failure_fail_dagrun


def test_the_preferences_are_announced_as_the_asset_that_the_graph_names():
    assert [asset.name for asset in collect_preferences.task_dict["publish"].outlets] == [GRAPH[Stage.RATE].asset]


def test_policy_owner_retries_pool_tags_and_form():
    assert collect_preferences.doc_md
    assert {"llm", "people"} <= set(collect_preferences.tags)
    assert collect_preferences.task_dict["respond"].pool == "gpu"
    for name in ("resolve", "respond", "questions", "publish", "close"):
        task = collect_preferences.task_dict[name]
        assert (task.owner, task.retries) == ("athanor", MAX_RETRIES)
        assert isinstance(task.retry_policy, StageRetryPolicy)
    assert list(collect_preferences.params) == list(CollectParams.model_fields)
    for name in CollectParams.model_fields:
        assert collect_preferences.params.get_param(name).schema["description_md"], name
