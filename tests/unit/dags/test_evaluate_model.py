"""Shape and policy of `evaluate_model`."""

from dags.evaluate_model import evaluate_model
from operators.failures import StageRetryPolicy
from operators.operator import StageOperator
from stages.config.graph import Stage


def test_it_is_the_pipelines_own_stage_between_resolve_and_close():
    edges = {(up.task_id, down) for up in evaluate_model.tasks for down in up.downstream_task_ids}
    assert edges == {("resolve", "evaluate"), ("evaluate", "close")}
    evaluate = evaluate_model.task_dict["evaluate"]
    assert isinstance(evaluate, StageOperator)
    assert (evaluate.stage, evaluate.pool, evaluate.deferrable) == (Stage.EVALUATE.value, "gpu", True)
    assert evaluate.timeout is not None


def test_policy():
    evaluate_model.params.validate()
    assert evaluate_model.doc_md
    for task in evaluate_model.tasks:
        assert task.owner == "athanor"
        assert isinstance(task.retry_policy, StageRetryPolicy)
