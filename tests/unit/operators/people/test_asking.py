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
from operators.people.rating import PreferenceRating
from stages.artifacts.manifests import canonical_json


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


ODD_FIELDS = [
    {"bogus": 1},
    {"comment": {"a": 1}},
    {"comment": ["x"], "reasons": "honest"},
    {"reasons": ["evil"], "comment": "kept"},
    {"reasons": {"honest": 1}},
    {"reasons": [["honest"]]},
    {"comment": "kept"},
    ["a", "list"],
]


def answered(option: str, fields: Any) -> dict[str, Any]:
    return {
        "chosen_options": [option],
        "params_input": fields,
        "responded_at": datetime(2026, 11, 24, tzinfo=UTC),
        "responded_by_user": {"id": "7", "name": "ada"},
    }


@pytest.mark.parametrize("fields", ODD_FIELDS)
def test_a_choice_counts_whatever_stands_in_the_fields_next_to_it(operator: PromotionApproval, fields: Any) -> None:
    rating = PreferenceRating(task_id="rate", question={"index": 0, "title": "t", "order": [1, 0]})
    rated = rating.execute_complete({}, answered("A", fields))
    assert (rated["outcome"], rated["ranking"], rated["reasons"]) == ("answered", [1, 0], [])
    approved = operator.execute_complete({}, answered("Approve", fields))
    assert (approved["verdict"], approved["by"]) == ("approved", "ada")
    kept = fields.get("comment") if isinstance(fields, dict) and fields.get("comment") == "kept" else ""
    assert (rated["comment"], approved["comment"]) == (kept, kept)


def test_a_retry_does_not_end_over_the_fields_either(operator: PromotionApproval) -> None:
    store = Store()
    with pytest.raises(TaskAwaitingInput):
        ask_once(operator, attempt(store, try_number=1, max_tries=10), Asker())
    with pytest.raises(TaskDeferred) as waiting:
        ask_once(operator, attempt(store, try_number=2, max_tries=10), Asker())
    trigger = waiting.value.trigger
    assert isinstance(trigger, HITLTrigger)
    trigger.params["comment"] = {"a": 1}  # what the trigger does with an answer; a refusal would lose it


def test_every_record_can_hold_what_a_person_wrote(operator: PromotionApproval) -> None:
    given = answered("Approve", {"comment": "\ud800\x00\x1b[31m " + "x" * 100_000})
    given["responded_by_user"]["name"] = "ada\n\x1b[2J\udfff"
    approved = operator.execute_complete({}, given)
    assert approved["comment"].startswith("\\ud800\\u0000\\u001b[31m xxx")
    assert approved["comment"].endswith("more characters)")
    assert len(approved["comment"]) < 5_000
    assert approved["by"] == "ada \\u001b[2J\\udfff"
    canonical_json(approved)
