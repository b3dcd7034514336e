"""Notices against a real HTTP server; one that fails must not fail anything."""

import json
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
from airflow.api_fastapi.core_api.datamodels.connections import ConnectionResponse
from airflow.models import Connection

from operators.notify import deadline, notifications, report_late
from tests.inbox import Inbox, open_inbox


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with open_inbox() as inbox:
        yield inbox


RUN = SimpleNamespace(dag_id="retrain", run_id="r1", state="failed")
CONTEXT = {"dag": object(), "dag_run": RUN, "reason": "task_failure"}


def test_the_end_of_a_run_is_told(inbox: Inbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATHANOR_NOTIFY_URL", inbox.url)
    notifications()["on_failure_callback"](CONTEXT)
    notifications()["on_success_callback"]({"dag_run": {"dag_id": "retrain", "dag_run_id": "r2"}})
    skipped = {"dag": SimpleNamespace(dag_id="retrain"), "run_id": "r3", "reason": "success"}
    notifications()["on_success_callback"](skipped)
    assert inbox.messages == [
        {"event": "failure", "dag_id": "retrain", "run_id": "r1", "state": "failed", "reason": "task_failure"},
        {"event": "success", "dag_id": "retrain", "run_id": "r2"},
        {"event": "success", "dag_id": "retrain", "run_id": "r3", "reason": "success"},
    ]


def test_a_connection_brings_its_token(inbox: Inbox, monkeypatch: pytest.MonkeyPatch):
    connection = {"conn_type": "http", "host": inbox.url, "password": "secret-token"}
    monkeypatch.setenv("AIRFLOW_CONN_TEAM_CHAT", json.dumps(connection))
    monkeypatch.setenv("ATHANOR_NOTIFY_CONN_ID", "team_chat")
    report_late(hours=2, context={"dag_run": {"dag_id": "llm_pipeline", "dag_run_id": "r"}})
    assert inbox.messages == [{"event": "late", "deadline_hours": 2, "dag_id": "llm_pipeline", "run_id": "r"}]
    assert inbox.authorizations == ["Bearer secret-token"]


def test_an_address_that_is_a_secret_may_be_where_airflow_masks_it(inbox: Inbox, monkeypatch: pytest.MonkeyPatch):
    extra = {"webhook_url": inbox.url}
    monkeypatch.setenv("AIRFLOW_CONN_TEAM_CHAT", json.dumps({"conn_type": "http", "extra": extra}))
    monkeypatch.setenv("ATHANOR_NOTIFY_CONN_ID", "team_chat")
    report_late(hours=2)
    assert inbox.messages == [{"event": "late", "deadline_hours": 2}]
    connection = Connection("team_chat", conn_type="http", extra=json.dumps(extra))
    shown = ConnectionResponse.model_validate(connection, from_attributes=True).model_dump_json()
    assert inbox.url not in shown


def test_without_an_address_it_is_silent_and_a_broken_one_fails_nothing(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    notifications()["on_failure_callback"](CONTEXT)
    assert not caplog.records
    inbox.status = 500
    monkeypatch.setenv("ATHANOR_NOTIFY_URL", inbox.url)
    notifications()["on_failure_callback"](CONTEXT)
    monkeypatch.setenv("ATHANOR_NOTIFY_URL", "http://127.0.0.1:9/")
    notifications()["on_failure_callback"](CONTEXT)
    assert [record.message for record in caplog.records if record.name == "operators.notify"] == [
        "No notice of failure: HTTPStatusError",
        "No notice of failure: ConnectError",
    ]


def test_a_deadline_is_a_number_of_hours_or_nothing(monkeypatch: pytest.MonkeyPatch):
    assert deadline() is None
    monkeypatch.setenv("ATHANOR_DEADLINE_HOURS", "1.5")
    alert = deadline()
    assert alert is not None
    assert alert.interval == timedelta(minutes=90)
    assert alert.callback.path == "operators.notify.report_late"
    for wrong in ("soon", "0", "-1", "inf"):
        monkeypatch.setenv("ATHANOR_DEADLINE_HOURS", wrong)
        with pytest.raises(ValueError, match=f"ATHANOR_DEADLINE_HOURS='{wrong}' must be a number of hours above 0"):
            deadline()
