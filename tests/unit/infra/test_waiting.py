"""Why a run stands at `queued`: a small HTTP server plays Airflow, whose pools, runs and tasks the test sets."""

import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from rich.console import Console

from infra.airflow_api import AirflowApi
from infra.run_state import RunWatch
from infra.screen import LiveScreen, PlainScreen
from stages.artifacts.folder import FileStore
from stages.config.request import run_folder
from tests.answering import Asked, answering_json

OURS, OTHER = "manual__ours", "manual__interrupted"
DAG = "llm_pipeline"


class Airflow:
    """One pool, the tasks of all runs, and the runs of the DAG."""

    def __init__(self) -> None:
        self.run_states = {OURS: "running", OTHER: "running"}
        self.pools: dict[str, dict[str, Any]] = {"gpu": {"name": "gpu", "slots": 1, "include_deferred": True}}
        self.dag: dict[str, Any] = {"is_paused": False, "max_active_runs": 16}
        self.tasks: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.refused: set[str] = set()

    def add(self, task_id: str, state: str, *, run_id: str = OURS, dag_id: str = DAG, **fields: Any) -> None:
        self.tasks.append(
            {
                "task_id": task_id,
                "dag_id": dag_id,
                "dag_run_id": run_id,
                "state": state,
                "try_number": 1,
                "start_date": None,
                "end_date": None,
                "map_index": -1,
                "pool": "gpu",
                "pool_slots": 1,
                "scheduled_when": None,
                "queued_when": None,
                **fields,
            }
        )

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        self.requests.append(path)
        if path in self.refused:
            return 403, {"detail": "Forbidden"}
        match path.split("/"):
            case ["pools", name]:
                pool = self.pools.get(name)
                return (200, pool) if pool else (404, {"detail": "no such pool"})
            case ["dags", _, "details"]:
                return 200, self.dag
            case ["dags", _, "dagRuns"]:
                runs = [run for run, state in self.run_states.items() if state in query["state"]]
                return 200, {"dag_runs": [{"dag_run_id": run, "start_date": ago(minutes=5)} for run in runs]}
            case ["dags", "~", "dagRuns", "~", "taskInstances"]:
                found = [t for t in self.tasks if t["pool"] in query["pool"] and t["state"] in query["state"]]
                return 200, {"task_instances": found}
            case ["dags", _, "dagRuns", run, "taskInstances"]:
                return 200, {"task_instances": [task for task in self.tasks if task["dag_run_id"] == run]}
            case ["dags", _, "dagRuns", run]:
                return 200, {"state": self.run_states[run]}
        return 404, {"detail": path}


def ago(**time_ago: float) -> str:
    return (datetime.now(UTC) - timedelta(**time_ago)).isoformat()


@pytest.fixture
def airflow() -> Iterator[tuple[Airflow, str]]:
    fake = Airflow()

    def answer(asked: Asked) -> tuple[int, Any]:
        parts = urlsplit(asked.path)
        if parts.path == "/auth/token":
            return 201, {"access_token": "t"}
        return fake.answer(unquote(parts.path.removeprefix("/api/v2/")), parse_qs(parts.query))

    with answering_json(answer) as url:
        yield fake, url


def watch(url: str, store: Path) -> RunWatch:
    api = AirflowApi(url, user="admin", password="right")
    return RunWatch(api, FileStore(store), OURS, airflow_url="http://airflow.example:8080")


def write_progress(store: Path, run_id: str, stage: str, **progress: Any) -> None:
    key = f"runs/{run_folder(DAG, run_id)}/{stage}/workers/0.json"
    FileStore(store).write_bytes(key, json.dumps(progress).encode())


def reasons(url: str, store: Path) -> list[str]:
    return list(watch(url, store).snapshot().waiting.lines)


def held(fake: Airflow, tmp_path: Path, *, at: float) -> None:
    """Another run's pretraining holds the only slot, and our curation is ready."""
    fake.add("resolve", "success", pool="default_pool")
    fake.add("curate", "scheduled", scheduled_when=ago(seconds=3))
    fake.add("pretrain", "deferred", run_id=OTHER, start_date=ago(minutes=12))
    write_progress(tmp_path, OTHER, "pretrain", done=120, total=500, unit="step", eta_seconds=200, at=at)


def test_the_run_and_stage_that_hold_the_pool_are_named_with_their_progress_and_how_to_end_them(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    held(airflow[0], tmp_path, at=time.time())
    first, who, how = reasons(airflow[1], tmp_path)
    assert first == "curate waits for the pool 'gpu' (1 slot), which other runs hold:"
    assert who.startswith(f"  pretrain of llm_pipeline, run {OTHER}, for 12 min ")
    assert "120/500 steps (24 %), 3 min 20 s left" in who
    assert how == (f"  to end it, mark that run as failed: http://airflow.example:8080/dags/llm_pipeline/runs/{OTHER}")


def test_a_holder_that_says_nothing_is_told_as_such_without_its_old_estimate(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    held(airflow[0], tmp_path, at=time.time() - 600)
    who = reasons(airflow[1], tmp_path)[1]
    assert "120/500 steps (24 %), nothing heard for 10 min 0" in who
    assert "left" not in who


def test_slots_that_this_runs_own_stages_hold_need_no_words(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    fake.add("reward", "deferred", start_date=ago(minutes=1))
    fake.add("dpo", "scheduled", scheduled_when=ago(minutes=5))
    assert reasons(url, tmp_path) == []


def test_deferred_tasks_of_a_pool_that_does_not_count_them_hold_nothing(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    held(fake, tmp_path, at=time.time())
    fake.pools["gpu"]["include_deferred"] = False
    assert reasons(url, tmp_path) == []


def test_a_pool_with_room_and_a_task_that_does_not_start_point_to_the_scheduler(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    fake.add("curate", "scheduled", scheduled_when=ago(seconds=5))
    assert reasons(url, tmp_path) == []
    fake.tasks[0]["scheduled_when"] = ago(minutes=3)
    first, second = reasons(url, tmp_path)
    assert first.startswith("curate could start, and its pool has room")
    assert "ready for 3 min" in second
    assert "make logs COMPONENT=scheduler" in second


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (None, "waits for the pool 'gpu', which does not exist"),
        ({"slots": 2, "include_deferred": True}, "asks for 8 slots of the pool 'gpu', which has 2, so it never starts"),
        ({"slots": -1, "include_deferred": True}, ""),
    ],
)
def test_a_pool_that_can_never_take_the_task_is_told(
    pool: dict[str, Any] | None, said: str, airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    fake.pools = {"gpu": pool} if pool else {}
    fake.add("curate", "scheduled", pool_slots=8, scheduled_when=ago(seconds=2))
    fake.add("pretrain", "deferred", run_id=OTHER, start_date=ago(minutes=12))
    found = reasons(url, tmp_path)
    assert found if said else not found
    assert said in "".join(found)


def test_a_run_that_waits_for_other_runs_or_for_its_dag_says_so(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    fake.run_states[OURS] = "queued"
    fake.add("resolve", "none")
    assert reasons(url, tmp_path) == []  # the scheduler just has not looked yet
    fake.dag["max_active_runs"] = 1
    first, run, end = reasons(url, tmp_path)
    assert first == "the run waits: 1 run is active, which is all that llm_pipeline allows"
    assert f"{OTHER}, started 5 min" in run
    assert f"/dags/llm_pipeline/runs/{OTHER}" in run
    assert "mark it as failed" in end
    fake.dag["is_paused"] = True
    (paused,) = reasons(url, tmp_path)
    assert "is paused; switch it on at http://airflow.example:8080/dags/llm_pipeline" in paused


def test_a_login_that_may_not_look_is_no_end_of_watching(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    held(fake, tmp_path, at=time.time())
    fake.refused.add("pools/gpu")
    (line,) = reasons(url, tmp_path)
    assert line.startswith("why it waits is unknown: pool gpu: 403")


def test_asking_again_waits_a_while_and_ends_when_the_task_starts(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    held(fake, tmp_path, at=time.time())
    following = watch(url, tmp_path)
    for _ in range(3):
        assert following.snapshot().waiting.lines
    assert fake.requests.count("pools/gpu") == 1
    fake.tasks[1]["state"] = "deferred"
    assert following.snapshot().waiting.lines == ()


def test_both_screens_say_why(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    held(fake, tmp_path, at=time.time())
    fake.tasks[2]["dag_run_id"] = "manual__\x1b[2J"
    following = watch(url, tmp_path)
    output = StringIO()
    with PlainScreen(Console(file=output, width=200)) as screen:
        screen.show(following.snapshot())
        screen.show(following.snapshot())
    text = output.getvalue()
    assert text.count("curate waits for the pool 'gpu'") == 1  # and again after a minute
    assert "\x1b" not in text
    assert "manual__\\u001b[2J" in text
    live = StringIO()
    with LiveScreen(Console(file=live, width=200, force_terminal=True, color_system=None)) as screen:
        screen.show(following.snapshot())
        screen._live.refresh()
    assert "curate waits for the pool 'gpu'" in live.getvalue()


def shown(fake: Airflow, url: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The second line of a stage that runs, when one is due again."""
    monkeypatch.setattr("infra.screen.PLAIN_EVERY_SECONDS", -1.0)
    following, output = watch(url, store), StringIO()
    with PlainScreen(Console(file=output, width=200)) as screen:
        screen.show(following.snapshot())
        screen.show(following.snapshot())
    return output.getvalue().splitlines()[-1]


def test_a_running_stage_that_is_silent_is_shown_so_without_rate_numbers_and_estimate(
    airflow: tuple[Airflow, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, url = airflow
    fake.add("sft", "deferred", start_date=ago(minutes=9))
    report = {"done": 30, "total": 120, "rate": 2.5, "rate_unit": "steps/s", "eta_seconds": 36, "loss": 4.25}
    write_progress(tmp_path, OURS, "sft", **report, at=time.time())
    fresh = shown(fake, url, tmp_path, monkeypatch)
    assert "25%  2.5 steps/s  ETA 36 s  loss 4.25" in fresh
    write_progress(tmp_path, OURS, "sft", **report, at=time.time() - 240)
    old = shown(fake, url, tmp_path, monkeypatch)
    assert re.fullmatch(r"sft running 25% nothing heard for 4 min \d\d s", " ".join(old.split()))


def test_an_interrupted_attempts_old_report_does_not_make_a_queued_task_run(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    fake.add("sft", "scheduled", scheduled_when=ago(seconds=2))
    write_progress(tmp_path, OURS, "sft", done=30, total=120, at=time.time() - 3600)
    assert not watch(url, tmp_path).snapshot().rows[0].works
    write_progress(tmp_path, OURS, "sft", done=30, total=120, at=time.time())
    assert watch(url, tmp_path).snapshot().rows[0].works  # its job has just ended
