"""The queue to MLflow and what it does when MLflow is away; tests/integration/test_mlflow.py meets a real server."""

import json
import logging
import math
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.ports import any_free
from stages.artifacts.addresses import run_key
from stages.artifacts.manifests import read_manifest
from stages.config.graph import Stage
from stages.tracking.__main__ import main
from stages.tracking.events import Event, FailEvent, FileEvent, MetricsEvent, StartEvent
from stages.tracking.spool import SPOOL_NAME, Spool, leave_spool, read_spool
from stages.tracking.tracker import NullTracker, Tracker, record_hit
from tests.pipeline_records import fingerprint_of, publish_run, refs_for, request_for, run_info


def test_importing_the_tracker_imports_neither_mlflow_nor_anything_heavy() -> None:
    code = "import sys, stages.tracking.tracker, stages.promote, stages.report; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mlflow", "numpy", "pandas", "torch", "matplotlib", "boto3", "jinja2"} & set(loaded)


def measured(step: int, **values: float) -> MetricsEvent:
    return MetricsEvent(step=step, values=values, time=1)


def steps(events: Iterable[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, MetricsEvent)]


def test_the_spool_hands_out_events_in_order_until_they_are_acknowledged(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    for step in range(5):
        spool.append(measured(step))
    first = spool.next_events(limit=2)
    assert steps(event for event, _ in first) == [0, 1]
    assert steps(event for event, _ in spool.next_events(limit=2)) == [0, 1]
    spool.acknowledge(first[0][1])
    assert steps(spool.undelivered()) == [1, 2, 3, 4]
    assert not spool.is_delivered
    spool.acknowledge(spool.next_events()[-1][1])
    assert spool.is_delivered
    assert spool.undelivered() == []


def test_the_spool_is_valid_json_and_keeps_text_beyond_ascii_and_values_that_are_not_finite(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    spool.append(FailEvent(message="Grüße 🜂\nline", time=1))
    spool.append(measured(1, a=math.inf, b=math.nan))
    (first, position), (second, _) = spool.next_events()
    assert first == FailEvent(message="Grüße 🜂\nline", time=1)
    assert isinstance(second, MetricsEvent)
    assert second.values["a"] == math.inf
    assert math.isnan(second.values["b"])
    for line in (tmp_path / "spool.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    spool.acknowledge(position)
    assert steps(spool.undelivered()) == [1]


def test_no_event_is_lost_or_doubled_while_one_thread_writes_and_one_reads(tmp_path: Path) -> None:
    spool, seen = Spool(tmp_path / "spool.jsonl"), []

    def write() -> None:
        for step in range(2000):
            spool.append(measured(step))

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive() or not spool.is_delivered:
        for event, position in spool.next_events(limit=50):
            seen.append(event)
            spool.acknowledge(position)
    assert steps(seen) == list(range(2000))


def test_a_left_spool_carries_its_attachments_and_adds_to_an_earlier_one(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    request = request_for(Stage.SFT, store, refs_for(Stage.SFT, made))
    key = run_key(request.run.run_id, Stage.SFT, SPOOL_NAME)
    attachment = tmp_path / "note.txt"
    attachment.write_text("hello")
    leave_spool(store, key, request, [StartEvent(fingerprint="f", time=1)])
    leave_spool(store, key, request, [FileEvent(name="note.txt", attachment="note.txt")], folder=tmp_path)
    attachment.unlink()
    left = read_spool(store, key)
    assert left.request == request
    assert left.events == (StartEvent(fingerprint="f", time=1), FileEvent(name="note.txt", content="aGVsbG8="))
    assert left.refused == ()


def test_without_a_tracking_uri_nothing_is_tracked_and_that_is_said(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, made = publish_run(tmp_path)
    tracker = Tracker(request_for(Stage.SFT, store, refs_for(Stage.SFT, made)), tmp_path / "spool")
    with caplog.at_level(logging.WARNING):
        tracker.start(fingerprint="f", params={}, tags={})
    tracker.log({"train/loss": 1.0}, 1)
    assert "MLFLOW_TRACKING_URI is not set" in caplog.text
    assert tracker.wait_run_id(0) is None
    assert tracker.finish(read_manifest(made[Stage.SFT])) == (None, None)


@pytest.mark.slow
def test_a_dead_server_never_blocks_and_leaves_everything_in_the_store(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{any_free()}")
    monkeypatch.setattr("stages.tracking.tracker._FINISH_SECONDS", 6.0)
    store, made = publish_run(tmp_path)
    request = request_for(Stage.SFT, store, refs_for(Stage.SFT, made))
    tracker = Tracker(request, tmp_path / "spool")
    started = time.monotonic()
    tracker.start(fingerprint=fingerprint_of(Stage.SFT), params={"a": "1"}, tags={})
    for step in range(100):
        tracker.log({"train/loss": 1.0 / (step + 1)}, step)
    tracker.log_text("hello", "note.txt")
    assert time.monotonic() - started < 1.0
    with caplog.at_level(logging.WARNING):
        assert tracker.finish(read_manifest(made[Stage.SFT])) == (None, None)
    assert time.monotonic() - started < 20.0
    assert "python -m stages.tracking manual-1" in caplog.text
    events = read_spool(store, f"runs/{request.run.run_id}/sft/{SPOOL_NAME}").events
    assert [event.type for event in events] == ["start", *["metrics"] * 100, "file", "finish"]


@contextmanager
def room_for(path: Path, more: int) -> Iterator[None]:
    """Inside, files end like those on a full disk: `path` may grow by so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_the_events_that_it_does_not_hold_and_no_others(tmp_path: Path, caplog) -> None:
    path = tmp_path / "spool.jsonl"
    spool = Spool(path)
    spool.append(measured(1))
    with caplog.at_level(logging.ERROR), room_for(path, 20):
        spool.append(measured(2))
        spool.append(measured(3))
    assert caplog.text.count("is lost") == 2
    assert steps(spool.undelivered()) == [1]
    spool.append(measured(4))
    spool.append(measured(5))
    assert steps(spool.undelivered()) == [1, 4, 5]
    assert caplog.text.count("is lost") == 2
    (_, first), (_, second), (_, last) = spool.next_events()
    spool.acknowledge(first)
    spool.acknowledge(second)
    assert not spool.is_delivered
    spool.acknowledge(last)
    assert spool.is_delivered


def test_a_line_that_the_disk_damaged_is_told_once_and_waits_for_nothing(tmp_path: Path, caplog) -> None:
    path = tmp_path / "spool.jsonl"
    spool = Spool(path)
    for step in range(3):
        spool.append(measured(step))
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0" * (len(second) - 1) + b"\n" + b"\0" * (len(third) - 1) + b"\n")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):  # MLflow is away
            [(event, position)] = spool.next_events()
        assert steps([event]) == [0]
        spool.acknowledge(position)
        assert spool.next_events() == []
    assert spool.is_delivered
    assert caplog.text.count("cannot be read") == 2


@pytest.mark.parametrize("content", [b"\0" * 20 + b"\n", b"{", b""])
def test_a_damaged_line_with_nothing_before_it_is_passed_over(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spool.jsonl"
    spool = Spool(path)
    spool.append(measured(1))
    path.write_bytes(content)
    assert spool.next_events() == []
    assert spool.is_delivered


def test_a_hit_with_mlflow_away_is_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{any_free()}")
    store, made = publish_run(tmp_path)
    request = request_for(Stage.SFT, store, {}, run=run_info(parent_run_id="0" * 32))
    with caplog.at_level(logging.WARNING):
        record_hit(request, made[Stage.SFT])
    assert "was not told that stage sft hit" in caplog.text


def test_the_replay_command_asks_for_a_store(monkeypatch, capsys) -> None:
    monkeypatch.delenv("ARTIFACT_STORE", raising=False)
    assert main(["some-run"]) == 2
    assert "ARTIFACT_STORE" in capsys.readouterr().err


def test_the_null_tracker_answers_like_a_tracker(tmp_path: Path) -> None:
    public = {name for name in vars(Tracker) if not name.startswith("_")}
    assert public == {name for name in vars(NullTracker) if not name.startswith("_")}
    store, made = publish_run(tmp_path)
    assert NullTracker().finish(read_manifest(made[Stage.SFT])) == (None, None)
    assert json.dumps(NullTracker().wait_run_id(0)) == "null"
    assert store.exists(f"artifacts/sft-model/{made[Stage.SFT].fingerprint}/manifest.json")
