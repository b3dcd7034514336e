"""Ask a person once: a retry waits for the answer to the question that stands, a cleared task asks anew.

Airflow 3.3 resumes a waiting task in the moment of the answer. When that comes before the scheduler has noticed that
the process which asked has ended, a second or so after the question, it takes the resumed attempt for one that was
killed and retries it; asking again then wipes out the answer.
"""

from collections.abc import Callable, Mapping
from copy import copy
from datetime import datetime
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.providers.standard.triggers.hitl import HITLTrigger
from airflow.sdk.exceptions import ParamValidationError, TaskAwaitingInput
from airflow.sdk.timezone import utcnow

from stages.config.text import one_line, printable

STATE_KEY = "question"
_LONGEST_COMMENT, _LONGEST_NAME = 4_000, 200


def ask_once(operator: HITLOperator, context: Any, ask: Callable[[Any], Any]) -> Any:
    """Call `ask` and remember that the question was put, or defer until it is answered if it was put before.

    Clearing a task raises its `max_tries`, a retry does not; both keep the task state store.
    """
    from airflow.sdk.execution_time.context import NEVER_EXPIRE

    store, ti = context["task_state_store"], context["ti"]
    standing = store.get(STATE_KEY)
    if isinstance(standing, dict):
        if standing["max_tries"] == ti.max_tries:
            operator.log.info("The question was put by attempt %d and stands.", standing["try_number"])
            _wait_for_answer(operator, ti, until=standing["until"])
        # Airflow keeps the words of the first time
        operator.log.info("As of now the question reads:\n%s\n\n%s", operator.subject, operator.body)
    timeout = operator.response_timeout
    until = (utcnow() + timeout).isoformat() if timeout else None
    try:
        return ask(context)
    except TaskAwaitingInput:
        asked = {"try_number": ti.try_number, "max_tries": ti.max_tries, "until": until}
        store.set(STATE_KEY, asked, retention=NEVER_EXPIRE)
        raise


def _wait_for_answer(operator: HITLOperator, ti: Any, *, until: str | None) -> None:
    """Leave it to Airflow's own trigger, which sees an answer that is there already."""
    operator.defer(
        trigger=HITLTrigger(
            ti_id=ti.id,
            options=operator.options,
            params={},  # it would end without an answer over a field that `with_usable_fields` leaves out
            defaults=operator.defaults,
            multiple=operator.multiple,
            timeout_datetime=datetime.fromisoformat(until) if until else None,
        ),
        method_name="execute_complete",
    )


def with_usable_fields(operator: HITLOperator, event: dict[str, Any]) -> dict[str, Any]:
    """Return the answer with the form's fields, each as given, or its default when it was not given or does not fit.

    Airflow compares what was chosen with the options when the person answers, but the fields next to it only when the
    task continues. An answer that came over REST with other fields would be lost then, and no retry would bring it.
    """
    if "error" in event:
        return event
    given = event.get("params_input") or {}
    fields: dict[str, Any] = {}
    left_out = [] if isinstance(given, Mapping) else ["all of them"]
    for name in operator.params:
        field = operator.params.get_param(name)
        fields[name] = field.value
        if isinstance(given, Mapping) and name in given:
            try:
                fields[name] = copy(field).resolve(value=given[name])  # it would keep the value as its own
            except ParamValidationError:
                left_out.append(name)
    left_out += [str(name) for name in given if name not in fields] if isinstance(given, Mapping) else []
    if left_out:
        shown = one_line(", ".join(left_out), at_most=_LONGEST_NAME)
        operator.log.warning("The choice counts, without the fields that do not fit the question: %s", shown)
    return {**event, "params_input": fields}


def comment_of(answer: Mapping[str, Any]) -> str:
    """The person's comment, so that every record and page can hold it."""
    text = printable(str((answer.get("params_input") or {}).get("comment") or "").strip())
    more = len(text) - _LONGEST_COMMENT
    return f"{text[:_LONGEST_COMMENT]}… ({more} more characters)" if more > 0 else text


def name_of(answer: Mapping[str, Any]) -> str:
    """Who answered, by name; empty without a user."""
    user = answer.get("responded_by_user") or {}
    return one_line(str(user.get("name") or user.get("id") or ""), at_most=_LONGEST_NAME)
