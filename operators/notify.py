"""Notifies a webhook of the end of every run, and of runs that take too long: one JSON object each.

Silent unless configured. The address is `ATHANOR_NOTIFY_URL`, or comes from the Airflow connection that
`ATHANOR_NOTIFY_CONN_ID` names: its extra field `webhook_url`, which Airflow masks, or its host (a full URL), which it
shows; its password, if any, becomes a bearer token. No address is ever logged, because many are secrets themselves.
`ATHANOR_DEADLINE_HOURS` limits the time of a run from when it was queued. A notice that fails is a line in the log and
never fails a run.
"""

import logging
import math
import os
from datetime import timedelta
from typing import Any

from airflow.sdk import BaseHook, BaseNotifier
from airflow.sdk.definitions.callback import SyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from stages.config.servers import is_web_address

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 10.0


class WebhookNotifier(BaseNotifier):
    """Post how a DAG run ended; `event` is `success` or `failure`."""

    def __init__(self, event: str) -> None:
        super().__init__()
        self.event = event

    def render_template_fields(self, context: Any, jinja_env: Any = None) -> None:
        """There are none; Airflow's own would need a DAG object, which not every caller of callbacks has."""

    def notify(self, context: Any) -> None:
        post({"event": self.event, **_about(context)})


def notifications() -> dict[str, Any]:
    """Return the DAG's callbacks."""
    return {
        "on_success_callback": WebhookNotifier("success"),
        "on_failure_callback": WebhookNotifier("failure"),
    }


def deadline() -> DeadlineAlert | None:
    """Return the alert of a run that takes longer than `ATHANOR_DEADLINE_HOURS`; None when that is not set.

    Raises ValueError for anything but a number above 0, which shows as import error of the DAG.
    """
    given = os.environ.get("ATHANOR_DEADLINE_HOURS", "")
    if not given:
        return None
    try:
        hours = float(given)
    except ValueError:
        hours = 0.0
    if not 0 < hours < math.inf:
        raise ValueError(f"ATHANOR_DEADLINE_HOURS={given!r} must be a number of hours above 0, such as 12 or 0.5")
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=hours),
        callback=SyncCallback(report_late, kwargs={"hours": hours}),
        name=f"longer than {hours:g} h",
    )


def report_late(hours: float, context: Any = None) -> None:
    """What Airflow calls when a run misses its deadline."""
    post({"event": "late", "deadline_hours": hours, **_about(context or {})})


def notify(event: str, context: Any, **details: Any) -> None:
    """Post something else that people should know about a run."""
    post({"event": event, **_about(context), **details})


def post(message: dict[str, Any]) -> None:
    """Post a message to the webhook that is configured, if any."""
    import httpx

    try:
        url, headers = _webhook()
        if not url:
            return
        if not is_web_address(url):
            where = "the webhook's address is not an http:// or https:// address"
            logger.warning("No notice of %s: %s", message.get("event"), where)
            return
        answer = httpx.post(url, json=message, headers=headers, timeout=_TIMEOUT_SECONDS)
        answer.raise_for_status()
    except Exception as error:  # noqa: BLE001 - a broken webhook must not fail the run, whatever the error
        logger.warning("No notice of %s: %s", message.get("event"), type(error).__name__)


def _webhook() -> tuple[str, dict[str, str]]:
    if conn_id := os.environ.get("ATHANOR_NOTIFY_CONN_ID", ""):
        connection = BaseHook.get_connection(conn_id)
        token = connection.password
        url = str(connection.extra_dejson.get("webhook_url") or connection.host or "")
        return url, {"Authorization": f"Bearer {token}"} if token else {}
    return os.environ.get("ATHANOR_NOTIFY_URL", ""), {}


def _about(context: Any) -> dict[str, Any]:
    """The fields of the run. Airflow gives callbacks a run as an object, for deadlines as plain data, and for a run
    without a last task (all were skipped) no run at all: then only the names of DAG and run are known."""
    run = context.get("dag_run") or {}

    def known(name: str) -> Any:
        return run.get(name) if isinstance(run, dict) else getattr(run, name, None)

    values = {
        "dag_id": known("dag_id") or getattr(context.get("dag"), "dag_id", None),
        "run_id": known("run_id") or known("dag_run_id") or context.get("run_id"),
        "state": known("state"),
        "started_at": known("start_date"),
        "ended_at": known("end_date"),
        "reason": context.get("reason"),
    }
    return {name: str(value) for name, value in values.items() if value is not None}
