"""The fault table of docs/RELIABILITY.md, a test a row, against a real Airflow and a real Ray head.

Rows that hurt nobody else suffer at the same time, each from a thread of its own; rows that kill a shared part of
Airflow come after. Each writes its line of the table to the file that CHAOS_TABLE names, if any.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.mapped import run_mapped
from tests.chaos.stack import REPOSITORY, ChaosStack, Row, chaos_stack

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(420)]

DAGS = [Path(__file__).with_name("chaos_dags.py"), REPOSITORY / "dags" / "reap_orphans.py"]
STOP_LIMIT = 30


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosStack]:
    with chaos_stack(tmp_path_factory.mktemp("chaos"), DAGS) as made:
        for dag_id in ("deferred", "waiting", "timed", "lossy", "flaky", "cut", "gone", "mapped", "reap_orphans"):
            made.airflow.wait_for_dag(dag_id, seconds=90)
        yield made


# ---- what is done to a run; a function returns the seconds until its job had stopped, where it should stop


def stopped_by(act: Callable[[Row], None], *, deferred: bool) -> Callable[[Row], float]:
    """Do it while the job prints lines, and measure."""

    def disturb(row: Row) -> float:
        job = row.wait_running()
        if deferred:
            row.wait_state("deferred")
        since = time.monotonic()
        act(row)
        return row.seconds_until_stopped(job["submission_id"], since=since)

    return disturb


def kill_driver(row: Row) -> None:
    job = row.wait_running()
    row.process("driver", job["submission_id"]).kill()


def kill_task(row: Row) -> None:
    row.wait_running()
    row.task_process().kill()


def cut_for_a_minute(row: Row) -> None:
    row.wait_running()
    row.wait_state("deferred")
    row.stack.proxies["ray_cut"].cut()
    time.sleep(60)
    assert row.state() == "deferred"
    row.stack.proxies["ray_cut"].mend()


def cut_for_good(row: Row) -> None:
    row.wait_running()
    row.wait_state("deferred")
    row.stack.proxies["ray_gone"].cut()


def nothing(row: Row) -> None:
    """The DAG, or the proxy before Ray, does it."""


@dataclass(frozen=True)
class Disturbed:
    """A run and what is done to it meanwhile."""

    row: Row
    disturbance: Future[float | None]

    def finish(self) -> tuple[Row, float | None]:
        """Wait until it was done and the run has ended."""
        seconds = self.disturbance.result(timeout=240)
        self.row.finish()
        return self.row, seconds


@pytest.fixture(scope="module")
def rows(stack: ChaosStack) -> Iterator[dict[str, Disturbed]]:
    """The rows that disturb nobody else, all started at once."""
    stack.proxies["ray_flaky"].close_logs_after = 1.0
    marked, cleared = (lambda row: row.mark("failed")), (lambda row: row.clear())
    plan: dict[str, tuple[str, str, Callable[[Row], float | None]]] = {
        "head away": ("cut", "lines:70", cut_for_a_minute),
        "head gone": ("gone", "lines:400", cut_for_good),
        "log closed": ("flaky", "lines:12", nothing),
        "timeout": ("timed", "lines:400", nothing),
        "driver killed": ("deferred", "lines:12", kill_driver),
        "cleared": ("deferred", "lines:20", stopped_by(cleared, deferred=True)),
        "marked failed": ("deferred", "lines:400", stopped_by(marked, deferred=True)),
        "run failed": ("deferred", "lines:400", stopped_by(lambda row: row.fail_run(), deferred=True)),
        "task killed": ("waiting", "lines:20", kill_task),
        "cleared while running": ("waiting", "lines:20", stopped_by(cleared, deferred=False)),
        "marked failed while running": ("waiting", "lines:400", stopped_by(marked, deferred=False)),
    }
    once = {"timeout", "head gone"}
    with ThreadPoolExecutor(len(plan)) as threads:
        made = {}
        for name, (dag_id, behaviour, disturb) in plan.items():
            row = stack.trigger(dag_id, behaviour, max_retries=0 if name in once else 2)
            made[name] = Disturbed(row, threads.submit(disturb, row))
        yield made


def note(row: Row, fault: str, *, jobs: int, state: str, seconds: float | None = None, lost: int | None = None) -> None:
    """Check what every row must have, and write its line of the table."""
    active = [status for status in row.statuses() if status in ("PENDING", "RUNNING")]
    assert active == [], "orphans"
    assert len(row.jobs()) == jobs
    assert row.state() == state
    if seconds is not None:
        assert seconds < STOP_LIMIT
    if lost is not None:
        assert lost == 0
    if table := os.environ.get("CHAOS_TABLE"):
        cells = (fault, jobs, len(active), state, "-" if lost is None else lost, "-" if seconds is None else seconds)
        with open(table, "a") as file:
            file.write("| " + " | ".join(f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells) + " |\n")


def test_the_driver_of_the_job_is_killed(rows: dict[str, Disturbed]):
    row, _ = rows["driver killed"].finish()
    assert row.statuses() == ["FAILED", "SUCCEEDED"]
    assert "was killed (signal 9)" in row.task_log()
    note(row, "kill -9 of Ray's job driver", jobs=2, state="success", lost=row.lost_lines())


def test_the_process_of_a_task_that_waits_itself_is_killed(rows: dict[str, Disturbed]):
    row, _ = rows["task killed"].finish()
    assert row.task()["try_number"] == 2
    note(row, "kill -9 of the task process", jobs=1, state="success", lost=row.lost_lines())


def test_marked_failed_while_deferred(rows: dict[str, Disturbed]):
    row, seconds = rows["marked failed"].finish()
    note(row, "marked failed while deferred", jobs=1, state="failed", seconds=seconds)


def test_cleared_while_deferred(rows: dict[str, Disturbed]):
    row, seconds = rows["cleared"].finish()
    assert row.statuses() == ["STOPPED", "SUCCEEDED"]
    note(row, "cleared while deferred", jobs=2, state="success", seconds=seconds, lost=row.lost_lines())


def test_the_run_is_marked_failed(rows: dict[str, Disturbed]):
    row, seconds = rows["run failed"].finish()
    note(row, "DAG run marked failed", jobs=1, state="failed", seconds=seconds)


def test_marked_failed_while_running(rows: dict[str, Disturbed]):
    row, seconds = rows["marked failed while running"].finish()
    note(row, "marked failed while running (not deferred)", jobs=1, state="failed", seconds=seconds)


def test_cleared_while_running(rows: dict[str, Disturbed]):
    row, seconds = rows["cleared while running"].finish()
    assert row.statuses() == ["STOPPED", "SUCCEEDED"]
    note(row, "cleared while running (not deferred)", jobs=2, state="success", seconds=seconds, lost=row.lost_lines())


def test_the_deferral_timeout_passes(rows: dict[str, Disturbed]):
    row, _ = rows["timeout"].finish()
    assert row.statuses() == ["STOPPED"]
    assert "ran longer than its timeout of 0:00:15; its Ray job was stopped" in row.task_log()
    note(row, "deferral timeout", jobs=1, state="failed")


def test_the_log_connection_closes_again_and_again(stack: ChaosStack, rows: dict[str, Disturbed]):
    row, _ = rows["log closed"].finish()
    assert stack.proxies["ray_flaky"].closed_logs > 1
    assert row.repeated_lines() == 0
    note(row, "log websocket closed mid-job, many times", jobs=1, state="success", lost=row.lost_lines())


def test_the_answer_to_the_post_is_lost(stack: ChaosStack):
    """The second POST, of the same id, is refused as a duplicate."""
    stack.proxies["ray_lossy"].lose_answers = 1
    row = stack.trigger("lossy", "lines:5")
    row.finish()
    assert stack.proxies["ray_lossy"].lose_answers == 0
    note(row, "answer to the POST lost, POST repeated", jobs=1, state="success", lost=row.lost_lines())


def test_the_job_fails_before_the_task_defers(stack: ChaosStack):
    proxy = stack.proxies["ray_lossy"]
    proxy.lose_answers, proxy.lose_after_seconds = 1, 8.0
    row = stack.trigger("lossy", "fail:data")
    row.finish()
    assert row.statuses() == ["FAILED"]
    assert "Pausing task as DEFERRED" not in row.task_log()
    assert "the job fails with data" in row.task_log()
    note(row, "job FAILED before the deferral", jobs=1, state="failed")


def test_the_head_is_away_for_a_minute(rows: dict[str, Disturbed]):
    row, _ = rows["head away"].finish()
    assert "Ray answers again." in row.task_log()
    note(row, "Ray head unreachable for 60 s", jobs=1, state="success", lost=row.lost_lines())


def test_a_training_worker_is_killed(stack: ChaosStack):
    row = stack.trigger("deferred", "train")
    job = stack.wait("the training job", lambda: row.jobs() and row.jobs()[0])
    row.process("worker", job["submission_id"]).kill()
    row.finish(seconds=240)
    assert row.statuses() == ["FAILED", "SUCCEEDED"]
    assert "a training worker died" in row.task_log()
    note(row, "kill -9 of a training worker", jobs=2, state="success")


def test_the_triggerer_and_then_the_scheduler_are_killed_while_tasks_are_deferred(stack: ChaosStack):
    goes_on, orphan = stack.trigger("deferred", "lines:60"), stack.trigger("deferred", "lines:400")
    for row in (goes_on, orphan):
        row.wait_running()
        row.wait_state("deferred")
    time.sleep(6)  # the position in the log is saved by then
    stack.kill("triggerer")
    orphan.mark("failed")  # and nobody is there to stop its job
    stack.start("triggerer")
    stack.wait("another triggerer watches", lambda: "Watching job" in goes_on.task_log())
    stack.kill("scheduler")
    time.sleep(2)
    stack.start("scheduler")
    goes_on.finish()
    note(goes_on, "kill -9 of the triggerer, then of the scheduler", jobs=1, state="success", lost=goes_on.lost_lines())


def test_orphans_are_reaped_and_nothing_else(stack: ChaosStack, rows: dict[str, Disturbed]):
    """One whose task was failed while no triggerer ran, one whose head was away for good; a third is alive."""
    alive = stack.trigger("deferred", "lines:45")
    alive.wait_running()
    gone, _ = rows["head gone"].finish()
    assert "no answer for" in gone.task_log()
    active = {job["submission_id"] for job in stack.jobs() if job["status"] == "RUNNING"}
    assert {gone.jobs()[0]["submission_id"], alive.jobs()[0]["submission_id"]} < active
    since = time.monotonic()
    visit = stack.airflow.trigger("reap_orphans", {"grace_seconds": 2})
    stack.wait("the reaper's visit", lambda: stack.airflow.run_state("reap_orphans", visit) in ("success", "failed"))
    seconds = time.monotonic() - since
    assert stack.airflow.run_state("reap_orphans", visit) == "success"
    left = {job["submission_id"] for job in stack.jobs() if job["status"] in ("PENDING", "RUNNING")}
    assert left == {alive.jobs()[0]["submission_id"]}
    note(gone, "Ray head unreachable for good; then the reaper", jobs=1, state="failed", seconds=seconds)
    alive.finish()
    note(alive, "the reaper visits while a task is deferred", jobs=1, state="success", lost=alive.lost_lines())


def test_many_jobs_survive_the_death_of_scheduler_and_triggerer(stack: ChaosStack):
    """The small sister of tests/bench/hundred_jobs.py."""
    print(run_mapped(stack, 12, kills=1, seconds=240))
