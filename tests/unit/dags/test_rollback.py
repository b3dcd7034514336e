"""Shape and policy of `rollback`."""

from dags.rollback import rollback
from operators.failures import StageRetryPolicy
from stages.config.forms import RollbackParams


def test_its_form_asks_for_the_run_name_and_the_reason() -> None:
    rollback.params.validate()
    assert set(rollback.params) == set(RollbackParams.model_fields)
    assert rollback.schedule is None
    assert rollback.max_active_runs == 1, "two at once would take back two champions"
    assert rollback.doc_md


def test_policy() -> None:
    (task,) = rollback.tasks
    assert task.owner == "athanor"
    assert isinstance(task.retry_policy, StageRetryPolicy)
    assert task.execution_timeout is not None
