"""Ask a person once: a retry waits for the answer to the question that stands, a cleared task asks anew.

Airflow 3.3 resumes a waiting task in the moment of the answer. When that comes before the scheduler has noticed that
the process which asked has ended, a second or so after the question, it takes the resumed attempt for one that was
killed and retries it; asking again then wipes out the answer.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.providers.standard.triggers.hitl import HITLTrigger
from airflow.sdk.exceptions import TaskAwaitingInput
from airflow.sdk.timezone import utcnow

STATE_KEY = "question"


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
            params=operator.serialized_params,
            defaults=operator.defaults,
            multiple=operator.multiple,
            timeout_datetime=datetime.fromisoformat(until) if until else None,
        ),
        method_name="execute_complete",
    )
