"""A question is put once: what a retry does, and what a cleared task does."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from airflow.providers.standard.triggers.hitl import HITLTrigger
from airflow.sdk.exceptions import TaskAwaitingInput, TaskDeferred

from operators.people.approval import PromotionApproval
from operators.people.asking import ask_once


class Store:
    """Airflow's task state store: survives retries and clearing."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        return self.kept.get(key, default)

    def set(self, key: str, value: Any, *, retention: object = None) -> None:
        self.kept[key] = value


class Asker:
    """Parks the task, the way Airflow's operator does once the question is put."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, context: Any) -> None:
        self.times += 1
        raise TaskAwaitingInput(method_name="execute_complete", timeout=None)


@pytest.fixture
def operator() -> PromotionApproval:
    return PromotionApproval(task_id="approve", response_timeout=timedelta(hours=2))


def attempt(store: Store, *, try_number: int, max_tries: int) -> dict[str, Any]:
    return {"task_state_store": store, "ti": SimpleNamespace(id=uuid4(), try_number=try_number, max_tries=max_tries)}


def test_a_retry_waits_for_the_answer_to_the_first_question(operator: PromotionApproval) -> None:
    store, ask = Store(), Asker()
    with pytest.raises(TaskAwaitingInput):
        ask_once(operator, attempt(store, try_number=1, max_tries=10), ask)
    retry = attempt(store, try_number=2, max_tries=10)
    with pytest.raises(TaskDeferred) as waiting:
        ask_once(operator, retry, ask)
    assert ask.times == 1, "asking again would wipe out an answer"
    assert waiting.value.method_name == "execute_complete"
    trigger = waiting.value.trigger
    assert isinstance(trigger, HITLTrigger)
    assert (trigger.ti_id, trigger.options, trigger.defaults) == (retry["ti"].id, ["Approve", "Reject"], ["Reject"])
    assert trigger.timeout_datetime is not None
    left = trigger.timeout_datetime - datetime.now(UTC)
    assert timedelta(hours=1.9) < left <= timedelta(hours=2), "the time to answer goes on counting"


def test_a_cleared_task_asks_anew(operator: PromotionApproval) -> None:
    store, ask = Store(), Asker()
    for try_number, max_tries in ((1, 10), (2, 11), (3, 12)):
        with pytest.raises(TaskAwaitingInput):
            ask_once(operator, attempt(store, try_number=try_number, max_tries=max_tries), ask)
    assert ask.times == 3


def test_an_attempt_that_failed_before_it_asked_leaves_nothing_to_wait_for(operator: PromotionApproval) -> None:
    def fail(context: Any) -> None:
        raise OSError("the API server is away")

    store, ask = Store(), Asker()
    with pytest.raises(OSError, match="away"):
        ask_once(operator, attempt(store, try_number=1, max_tries=10), fail)
    with pytest.raises(TaskAwaitingInput):
        ask_once(operator, attempt(store, try_number=2, max_tries=10), ask)
