"""The fault table of docs/DRILLS.md, a test a row, against a real Airflow and a real Ray head.

Rows that hurt nobody else suffer at the same time, each from a thread of its own; rows that kill a shared part of
Airflow come after. Each writes its line of the table to the file that CHAOS_TABLE names, if any.
"""

from __future__ import annotations

import inspect
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stages.config.graph import Stage
from tests.chaos.mapped import run_mapped
from tests.chaos.stack import REPOSITORY, ChaosStack, Row, chaos_stack
from tests.chaos.training import HANGS_AT
from tests.small_world import make_tokens

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(900)]

DAGS = [Path(__file__).with_name("chaos_dags.py"), REPOSITORY / "dags" / "reap_orphans.py"]
NAMES = ("deferred", "waiting", "timed", "limited", "unnoted", "lossy", "late", "flaky", "cut", "gone", "training")
STOP_LIMIT = 30
TIMEOUT = 15
"Of the DAGs `timed` and `limited`."
STALL_SECONDS = 45
AT_ONCE = 5
LONG = "lines:1200"
"What is to be stopped runs for longer than all of this."


Suffered = Future[tuple[Row, float | None]]
"""A run that was disturbed and has ended; seconds until its job had stopped, where that was meant."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosStack]:
    root = tmp_path_factory.mktemp("chaos")
    with chaos_stack(root, DAGS) as made:
        for dag_id in (*NAMES, "mapped", "reap_orphans"):
            made.airflow.wait_for_dag(dag_id, seconds=120)
        yield made


@pytest.fixture(scope="module")
def tokens(stack: ChaosStack) -> dict[str, Any]:
    """What the pretraining of some rows reads."""
    return make_tokens(stack.home).model_dump(mode="json")


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


def end_worker(row: Row) -> None:
    """What a shutdown of Airflow's worker does: it passes SIGTERM on to the task, and the task may say good-bye."""
    row.wait_running()
    row.stack.wait("the task watches its job", lambda: "curate 0/" in row.shown())
    row.task_process().terminate()


def stop_in_ray(row: Row) -> None:
    job = row.wait_running()
    row.wait_state("deferred")
    time.sleep(5)  # the process that submitted it has ended by then
    row.stop_in_ray(job["submission_id"])


def kill_training_worker(row: Row) -> None:
    job = row.stack.wait("the training job", lambda: row.jobs() and row.jobs()[0], seconds=240)
    row.process("worker", job["submission_id"]).kill()


def lose_the_answer_when_the_job_has_failed(row: Row) -> None:
    row.stack.wait("the job has failed", lambda: row.statuses() == ["FAILED"])
    row.stack.proxies["ray_late"].may_lose.set()


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
    """The DAG, the job, or the proxy before Ray, does it."""


@pytest.fixture(scope="module")
def rows(stack: ChaosStack, tokens: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[dict[str, Suffered]]:
    """The rows that disturb nobody else, some of them at a time, longest first; with `-k`, those that are read."""
    stack.proxies["ray_flaky"].close_logs_after = 1.0
    stack.proxies["ray_lossy"].lose_answers = 1
    stack.proxies["ray_late"].lose_answers = 1
    stack.proxies["ray_late"].may_lose.clear()
    marked, cleared = (lambda row: row.mark("failed")), (lambda row: row.clear())
    plan: dict[str, tuple[str, str, Callable[[Row], float | None]]] = {
        "worker hangs": ("training", "", nothing),
        "worker killed": ("training", "", kill_training_worker),
        "head away": ("cut", "lines:70", cut_for_a_minute),
        "head gone": ("gone", LONG, cut_for_good),
        "log closed": ("flaky", "lines:20", nothing),
        "timeout": ("timed", LONG, nothing),
        "execution timeout": ("limited", LONG, nothing),
        "driver killed": ("deferred", "lines:15", kill_driver),
        "cleared": ("deferred", "lines:30", stopped_by(cleared, deferred=True)),
        "marked failed": ("deferred", LONG, stopped_by(marked, deferred=True)),
        "run failed": ("deferred", LONG, stopped_by(lambda row: row.fail_run(), deferred=True)),
        "stopped in Ray": ("deferred", LONG, stop_in_ray),
        "task killed": ("waiting", "lines:20", kill_task),
        "worker ended": ("waiting", "lines:20", end_worker),
        "cleared while running": ("waiting", "lines:20", stopped_by(cleared, deferred=False)),
        "marked failed while running": ("waiting", LONG, stopped_by(marked, deferred=False)),
        "success not noted": ("unnoted", "lines:3", nothing),
        "answer lost": ("lossy", "lines:5", nothing),
        "failed early": ("late", "fail:data", lose_the_answer_when_the_job_has_failed),
    }
    conf: dict[str, dict[str, Any]] = {
        "worker hangs": {"stage": Stage.PRETRAIN, "tokens": tokens, "seed": 1, "stall_seconds": STALL_SECONDS},
        "worker killed": {"stage": Stage.PRETRAIN, "tokens": tokens, "seed": 2},
        **{name: {"max_retries": 0} for name in ("timeout", "execution timeout", "head gone")},
    }
    selected = "".join(
        inspect.getsource(item.function) for item in request.session.items if isinstance(item, pytest.Function)
    )
    plan = {name: row for name, row in plan.items() if f'rows["{name}"]' in selected}

    def suffer(name: str) -> tuple[Row, float | None]:
        dag_id, behaviour, disturb = plan[name]
        row = stack.trigger(dag_id, behaviour, **conf.get(name, {}))
        seconds = disturb(row)
        row.finish()
        return row, seconds

    with ThreadPoolExecutor(AT_ONCE) as threads:
        yield {name: threads.submit(suffer, name) for name in plan}


def note(
    row: Row,
    fault: str,
    *,
    jobs: int,
    state: str,
    seconds: float | None = None,
    lines: bool = False,
    once: bool = False,
) -> None:
    """Check what every row must have, and write its line of the table.

    `lines`: no line of the job may be lost; `once`: nor shown twice, which only the death of a watcher excuses.
    """
    active = [status for status in row.statuses() if status in ("PENDING", "RUNNING")]
    assert active == [], "orphans"
    assert len(row.jobs()) == jobs
    assert row.state() == state
    assert seconds is None or seconds < STOP_LIMIT
    lost = row.lost_lines() if lines or once else None
    assert not lost
    assert not once or row.repeated_lines() == 0
    if table := os.environ.get("CHAOS_TABLE"):
        cells = (fault, jobs, len(active), state, "-" if lost is None else lost, "-" if seconds is None else seconds)
        with open(table, "a") as file:
            file.write("| " + " | ".join(f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells) + " |\n")


def first_step(row: Row, submission_id: str) -> int:
    """The first step that a training job tells of."""
    return int(re.findall(r'ATHANOR_PROGRESS .*?"done": (\d+)', row.job_log(submission_id))[0])


# ---- one task is hit


def test_the_driver_of_the_job_is_killed(rows: dict[str, Suffered]):
    row, _ = rows["driver killed"].result()
    assert row.statuses() == ["FAILED", "SUCCEEDED"]
    assert "was killed (signal 9)" in row.task_log()
    note(row, "kill -9 of Ray's job driver", jobs=2, state="success", once=True)


def test_the_process_of_a_task_that_waits_itself_is_killed(rows: dict[str, Suffered]):
    row, _ = rows["task killed"].result()
    assert row.task()["try_number"] == 2
    note(row, "kill -9 of the task process", jobs=1, state="success", lines=True)


def test_the_worker_of_a_task_that_waits_itself_is_shut_down(rows: dict[str, Suffered]):
    row, _ = rows["worker ended"].result()
    assert row.task()["try_number"] == 2
    assert "Airflow ended this process" in row.task_log()
    note(row, "SIGTERM to the task process (its worker shuts down)", jobs=1, state="success", lines=True)


def test_the_process_dies_between_taking_a_success_and_airflows_noting_it(rows: dict[str, Suffered]):
    row, _ = rows["success not noted"].result()
    assert row.task()["try_number"] == 2
    note(row, "kill -9 of the task process, its job's success taken but not noted", jobs=1, state="success", lines=True)


def test_marked_failed_while_deferred(rows: dict[str, Suffered]):
    row, seconds = rows["marked failed"].result()
    note(row, "marked failed while deferred", jobs=1, state="failed", seconds=seconds)


def test_cleared_while_deferred(rows: dict[str, Suffered]):
    row, seconds = rows["cleared"].result()
    assert row.statuses() == ["STOPPED", "SUCCEEDED"]
    note(row, "cleared while deferred", jobs=2, state="success", seconds=seconds, once=True)


def test_the_run_is_marked_failed(rows: dict[str, Suffered]):
    row, seconds = rows["run failed"].result()
    note(row, "DAG run marked failed", jobs=1, state="failed", seconds=seconds)


def test_marked_failed_while_running(rows: dict[str, Suffered]):
    row, seconds = rows["marked failed while running"].result()
    note(row, "marked failed while running (not deferred)", jobs=1, state="failed", seconds=seconds)


def test_cleared_while_running(rows: dict[str, Suffered]):
    row, seconds = rows["cleared while running"].result()
    assert row.statuses() == ["STOPPED", "SUCCEEDED"]
    note(row, "cleared while running (not deferred)", jobs=2, state="success", seconds=seconds, once=True)


def test_somebody_stops_the_job_in_ray(rows: dict[str, Suffered]):
    row, _ = rows["stopped in Ray"].result()
    assert row.statuses() == ["STOPPED"]
    assert "was stopped on the Ray side" in row.task_log()
    note(row, "job stopped by a user in Ray", jobs=1, state="failed")


def test_the_deferral_timeout_passes(rows: dict[str, Suffered]):
    row, _ = rows["timeout"].result()
    assert row.statuses() == ["STOPPED"]
    assert "ran longer than its timeout of 0:00:15; its Ray job was stopped" in row.task_log()
    seconds = row.seconds_over(row.logged_at("Pausing task as DEFERRED") + TIMEOUT)
    note(row, "deferral timeout", jobs=1, state="failed", seconds=seconds)


def test_the_execution_timeout_of_a_task_that_waits_itself_passes(rows: dict[str, Suffered]):
    row, _ = rows["execution timeout"].result()
    assert row.statuses() == ["STOPPED"]
    assert "ran longer than its timeout of 0:00:15; its Ray job was stopped" in row.task_log()
    seconds = row.seconds_over(row.started_at() + TIMEOUT)
    note(row, "execution timeout (not deferred)", jobs=1, state="failed", seconds=seconds)


# ---- Ray or the way to it is hit


def test_the_log_connection_closes_again_and_again(stack: ChaosStack, rows: dict[str, Suffered]):
    row, _ = rows["log closed"].result()
    assert stack.proxies["ray_flaky"].closed_logs > 1
    note(row, "log websocket closed mid-job, many times", jobs=1, state="success", once=True)


def test_the_answer_to_the_post_is_lost(stack: ChaosStack, rows: dict[str, Suffered]):
    """The second POST, of the same id, is refused as a duplicate."""
    row, _ = rows["answer lost"].result()
    assert stack.proxies["ray_lossy"].lose_answers == 0
    note(row, "answer to the POST lost, POST repeated", jobs=1, state="success", once=True)


def test_the_job_fails_before_the_task_defers(rows: dict[str, Suffered]):
    row, _ = rows["failed early"].result()
    assert row.statuses() == ["FAILED"]
    assert "Pausing task as DEFERRED" not in row.task_log()
    assert "the job fails with data" in row.task_log()
    note(row, "job FAILED before the deferral", jobs=1, state="failed")


def test_the_head_is_away_for_a_minute(rows: dict[str, Suffered]):
    row, _ = rows["head away"].result()
    assert "Ray answers again." in row.task_log()
    note(row, "Ray head unreachable for 60 s", jobs=1, state="success", once=True)


def test_a_training_worker_is_killed(rows: dict[str, Suffered]):
    row, _ = rows["worker killed"].result()
    assert row.statuses() == ["FAILED", "SUCCEEDED"]
    assert "a training worker died" in row.task_log()
    assert first_step(row, row.jobs()[1]["submission_id"]) == HANGS_AT - 1, "not from the checkpoint"
    note(row, "kill -9 of a training worker", jobs=2, state="success")


def test_a_training_worker_hangs(rows: dict[str, Suffered]):
    row, _ = rows["worker hangs"].result()
    assert row.statuses() == ["FAILED", "SUCCEEDED"]
    assert "the stacks of all threads of process" in row.task_log()
    assert "in hang_for_ever" in row.task_log()
    said = re.search(rf"pretrain made no progress for (\d+) s after step {HANGS_AT - 1} of", row.task_log())
    assert said is not None
    assert STALL_SECONDS <= int(said[1]) < 2 * STALL_SECONDS
    assert first_step(row, row.jobs()[1]["submission_id"]) == HANGS_AT - 1, "not from the checkpoint"
    note(row, "training worker hangs", jobs=2, state="success")


# ---- shared parts of Airflow are hit


def test_the_api_server_is_killed_and_comes_back(stack: ChaosStack):
    deferred, waiting = stack.trigger("deferred", "lines:40"), stack.trigger("waiting", "lines:40")
    for row in (deferred, waiting):
        row.wait_running()
    deferred.wait_state("deferred")
    stack.kill("api-server")
    time.sleep(10)
    stack.start("api-server")
    for row, name in ((deferred, "deferred"), (waiting, "running (not deferred)")):
        row.finish()
        note(row, f"kill -9 of the api-server while {name}, back after 10 s", jobs=1, state="success", lines=True)


@pytest.fixture(scope="module")
def orphans() -> dict[str, Row]:
    """Fault -> a failed row whose job still runs; the reaper, who sees the whole cluster, visits once, at the end."""
    return {}


def test_the_triggerer_and_then_the_scheduler_are_killed(stack: ChaosStack, orphans: dict[str, Row]):
    """Of three, one goes on deferred, one goes on in its own process, and one is marked failed meanwhile."""
    goes_on, marked = stack.trigger("deferred", "lines:70"), stack.trigger("deferred", LONG)
    waiting = stack.trigger("waiting", "lines:70")
    for row in (goes_on, marked, waiting):
        row.wait_running()
    for row in (goes_on, marked):
        row.wait_state("deferred")
    time.sleep(6)  # the position in the log is saved by then
    stack.kill("triggerer")
    marked.mark("failed")  # and nobody is there to stop its job
    stack.start("triggerer")
    stack.wait("another triggerer watches", lambda: "Watching job" in goes_on.task_log())
    stack.kill("scheduler")
    time.sleep(2)
    stack.start("scheduler")
    goes_on.finish()
    note(
        goes_on, "kill -9 of the triggerer, then of the scheduler, while deferred", jobs=1, state="success", lines=True
    )
    orphans["marked failed while no triggerer ran"] = marked
    waiting.finish()
    note(waiting, "the same while running (not deferred)", jobs=1, state="success", lines=True)


def test_the_whole_airflow_is_killed_and_started_again(stack: ChaosStack):
    deferred, waiting = stack.trigger("deferred", "lines:30"), stack.trigger("waiting", "lines:60")
    for row in (deferred, waiting):
        row.wait_running()
    deferred.wait_state("deferred")
    time.sleep(6)  # the position in the log is saved by then
    stack.kill_all()
    stack.start_all()
    for row, name in ((deferred, "deferred"), (waiting, "running (not deferred)")):
        row.finish()
        note(row, f"kill -9 of the whole Airflow while {name}, then start", jobs=1, state="success", lines=True)


def test_orphans_are_reaped_and_nothing_else(stack: ChaosStack, rows: dict[str, Suffered], orphans: dict[str, Row]):
    """Orphans of two kinds; another job is alive."""
    alive = stack.trigger("deferred", "lines:45")
    alive.wait_running()
    gone, _ = rows["head gone"].result()
    assert "no answer for" in gone.task_log()
    orphans["Ray head unreachable for good"] = gone
    ours = alive.jobs()[0]["submission_id"]
    running = {job["submission_id"] for job in stack.jobs() if job["status"] == "RUNNING"}
    assert {gone.jobs()[0]["submission_id"], ours} <= running  # the other's was stopped if the triggerer came late
    since = time.monotonic()
    visit = stack.airflow.trigger("reap_orphans", {"grace_seconds": 2})
    stack.wait("the reaper's visit", lambda: stack.airflow.run_state("reap_orphans", visit) in ("success", "failed"))
    seconds = time.monotonic() - since
    assert stack.airflow.run_state("reap_orphans", visit) == "success"
    assert {job["submission_id"] for job in stack.jobs() if job["status"] in ("PENDING", "RUNNING")} == {ours}
    for fault, row in orphans.items():
        assert row.statuses() == ["STOPPED"]
        note(row, f"{fault}; then the reaper", jobs=1, state="failed", seconds=seconds)
    alive.finish()
    note(alive, "the reaper visits while a task is deferred", jobs=1, state="success", once=True)


def test_many_jobs_survive_the_death_of_scheduler_and_triggerer(stack: ChaosStack):
    """The small sister of tests/bench/hundred_jobs.py."""
    print(run_mapped(stack, 12, kills=1, seconds=240))
