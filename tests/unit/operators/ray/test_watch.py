"""Hook, client and watcher against a server with the behaviour, and the misbehaviour, of Ray's."""

import asyncio
import json
import logging
import threading
import time
from typing import Any

import pytest

from operators.ray.client import RayJobClient
from operators.ray.hook import RayJobHook
from operators.ray.jobs import JobExistsError, RayEndpoint, RayRefusedError
from operators.ray.watch import JobWatcher, Outcome, WatchSettings
from tests.ray_stand_in import TOKEN, Job, StandInRay

FAST = WatchSettings(poll_interval=0.05, unreachable_seconds=0.5, progress_seconds=10)
LINES = [f"line {number}: 100% of {{x}}" for number in range(200)]


@pytest.fixture
def hook(ray: StandInRay, monkeypatch: pytest.MonkeyPatch) -> RayJobHook:
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))
    return RayJobHook()


class Shown:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.info_lines: list[str] = []
        self.warnings: list[str] = []

    def info(self, message: str, /, *arguments: Any) -> None:
        self.info_lines.append(message % arguments if arguments else message)

    def warning(self, message: str, /, *arguments: Any) -> None:
        self.warnings.append(message % arguments if arguments else message)


def write_log(ray: StandInRay, job: Job, *, status: str, delay: float = 0.002) -> threading.Thread:
    """Write the job's log line by line and end the job."""

    def write() -> None:
        for line in LINES:
            job.log += f"{line}\n"
            time.sleep(delay)
        job.status = status

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def watch(hook: RayJobHook, shown: Shown, *, settings: WatchSettings = FAST, skip: int = 0) -> Outcome:
    async def run() -> Outcome:
        async with RayJobClient(hook.endpoint) as client:
            return await JobWatcher(client, "a", logger=shown, settings=settings, skip=skip).watch()

    return asyncio.run(run())


def job_lines(shown: Shown) -> list[str]:
    return [line for line in shown.info_lines if line.startswith("line ")]


def test_the_whole_log_is_shown_once_and_in_order(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true")
    writer, shown = write_log(ray, ray.jobs["a"], status="SUCCEEDED"), Shown()
    outcome = watch(hook, shown)
    writer.join()
    assert outcome.status == "SUCCEEDED"
    assert job_lines(shown) == LINES


def test_a_log_connection_that_closes_while_the_job_runs_neither_ends_it_nor_repeats_lines(
    ray: StandInRay, hook: RayJobHook
):
    ray.close_log_after = [5, 333, 700]  # in the middle of lines
    ray.jobs["a"] = Job("a", "true")
    writer, shown = write_log(ray, ray.jobs["a"], status="FAILED", delay=0.02), Shown()
    outcome = watch(hook, shown)
    writer.join()
    assert outcome.status == "FAILED"
    assert ray.close_log_after == []
    assert job_lines(shown) == LINES


def test_a_new_watcher_shows_only_what_the_last_one_had_not_shown(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true", status="SUCCEEDED", log="".join(f"{line}\n" for line in LINES))
    shown = Shown()
    watch(hook, shown, skip=150)
    assert job_lines(shown) == LINES[150:]
    assert "its first 150 log lines were shown before" in shown.info_lines[0]


def test_a_short_absence_of_the_head_is_tolerated(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true")
    ray.down = True

    def recover() -> None:
        time.sleep(0.3)
        ray.down = False
        time.sleep(0.2)
        ray.jobs["a"].status = "SUCCEEDED"

    thread, shown = threading.Thread(target=recover), Shown()
    thread.start()
    outcome = watch(hook, shown, settings=WatchSettings(0.05, unreachable_seconds=5))
    thread.join()
    assert outcome.status == "SUCCEEDED"
    assert "Ray answers again." in shown.info_lines


def test_a_head_that_stays_away_is_given_up_without_touching_the_job(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true")
    ray.down = True
    outcome = watch(hook, Shown())
    assert outcome.status == "UNREACHABLE"
    assert "HTTP 503" in outcome.message
    assert ray.stops == []


def test_a_head_that_forgot_the_job_means_lost(ray: StandInRay, hook: RayJobHook):
    assert watch(hook, Shown()).status == "LOST"


def test_the_outcome_carries_rays_reason_and_the_mlflow_run(ray: StandInRay, hook: RayJobHook):
    log = 'ATHANOR_MLFLOW_RUN {"run_id": "r", "experiment_id": "7"}\nno newline at the end'
    ray.jobs["a"] = Job("a", "true", "FAILED", log, "boom", "JOB_ENTRYPOINT_COMMAND_ERROR", 3)
    shown = Shown()
    outcome = watch(hook, shown)
    assert (outcome.message, outcome.exit_code, outcome.mlflow_run_id) == ("boom", 3, "r")
    assert outcome.mlflow_experiment_id == "7"
    assert "no newline at the end" in shown.info_lines
    assert Outcome(**json.loads(json.dumps(outcome.to_json()))) == outcome


def test_a_job_without_a_sign_of_life_is_stopped(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true", log="one\n")
    shown = Shown()
    outcome = watch(hook, shown, settings=WatchSettings(0.05, stall_seconds=0.4))
    assert outcome.status == "STALLED"
    assert outcome.message.startswith("no progress and no log line for 0 s")
    assert ray.stops == ["a"]


def test_a_job_that_keeps_writing_is_left_alone(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true")
    writer, shown = write_log(ray, ray.jobs["a"], status="SUCCEEDED", delay=0.01), Shown()
    outcome = watch(hook, shown, settings=WatchSettings(0.05, stall_seconds=0.6))
    writer.join()
    assert (outcome.status, ray.stops) == ("SUCCEEDED", [])


def test_a_pending_job_is_stopped_when_no_room_was_found_in_time(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true", status="PENDING")
    outcome = watch(hook, Shown(), settings=WatchSettings(0.05, capacity_seconds=0.3, asked_cpus=16))
    assert outcome.status == "UNPLACED"
    assert outcome.message.endswith("asked 16 CPU for the job's own process, cluster has 6 CPU in all")
    assert ray.jobs["a"].status == "STOPPED"


def test_a_job_that_waits_for_a_gpu_says_so(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true", status="PENDING")
    outcome = watch(hook, Shown(), settings=WatchSettings(0.05, capacity_seconds=0.3, asked_cpus=3, asked_gpus=1))
    assert outcome.message.endswith(
        "asked 3 CPU and 1 GPU for the job's own process, cluster has 6 CPU and 1 GPU in all"
    )


def metadata(task_id: str, run_id: str = "manual__other") -> dict[str, Any]:
    names = {"airflow.dag_id": "llm_pipeline", "airflow.run_id": run_id, "airflow.task_id": task_id}
    return {"metadata": names}


def test_a_pending_job_s_log_names_the_jobs_that_hold_the_cluster(
    ray: StandInRay, hook: RayJobHook, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("operators.ray.watch._CAPACITY_SECONDS", 0.0)
    ray.jobs["a"] = Job("a", "true", status="PENDING", body=metadata("sft", "manual__ours"))
    ray.jobs["b"] = Job("b", "true", body=metadata("pretrain\x1b[2J"))
    ray.jobs["c"] = Job("c", "true", status="SUCCEEDED", body=metadata("curate"))
    ray.jobs["d"] = Job("d", "python other.py", status="PENDING")
    shown = Shown()
    outcome = watch(hook, shown, settings=WatchSettings(0.05, capacity_seconds=0.3, asked_cpus=16))
    others = (
        "; on it are: pretrain\\u001b[2J of llm_pipeline, run manual__other; the Ray job d: waits for the cluster, too"
    )
    waits = [line for line in shown.info_lines if line.startswith("waiting for capacity: asked 16 CPU")]
    assert waits
    assert {line.partition(" in all")[2] for line in waits} == {others}
    assert outcome.message.endswith(others)


def test_after_the_job_s_own_word_that_its_workers_wait_the_others_are_named_once(ray: StandInRay, hook: RayJobHook):
    ray.jobs["a"] = Job("a", "true", log="waiting for capacity: asked 4 CPU, cluster has 2, 0 free (1 worker)\n")
    ray.jobs["b"] = Job("b", "true", body=metadata("pretrain"))
    shown = Shown()
    watch(hook, shown, settings=WatchSettings(0.05, stall_seconds=0.5))
    said = [line for line in shown.info_lines if line.startswith("the job's workers wait for room")]
    assert said == ["the job's workers wait for room; on it are: pretrain of llm_pipeline, run manual__other"]


def test_silence_is_told_with_the_last_report_and_at_growing_intervals(
    ray: StandInRay, hook: RayJobHook, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("operators.ray.watch._QUIET_SECONDS", 0.2)
    progress = {"stage": "sft", "done": 30, "total": 120, "unit": "step", "eta_seconds": 5}
    ray.jobs["a"] = Job("a", "true", log=f"ATHANOR_PROGRESS {json.dumps(progress)}\n")
    shown = Shown()
    watch(hook, shown, settings=WatchSettings(0.02, stall_seconds=2.0))
    said = [line for line in shown.info_lines if line.startswith("nothing heard from the job for")]
    assert 2 <= len(said) <= 4  # after 0.2, 0.4, 0.8 and 1.6 seconds
    assert all(
        line.endswith("; its last report was sft 30/120 steps (25 %); it is stopped after 2.0 s of silence")
        for line in said
    )


def test_a_job_that_writes_is_not_called_silent(ray: StandInRay, hook: RayJobHook, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("operators.ray.watch._QUIET_SECONDS", 0.5)
    ray.jobs["a"] = Job("a", "true")
    writer, shown = write_log(ray, ray.jobs["a"], status="SUCCEEDED", delay=0.01), Shown()
    watch(hook, shown)
    writer.join()
    assert not [line for line in shown.info_lines if line.startswith("nothing heard")]


# ---- the hook


def test_the_hook_submits_lists_shows_and_stops(ray: StandInRay, hook: RayJobHook):
    hook.submit_job(submission_id="a", entrypoint="python x.py", metadata={"airflow.task_id": "sft"}, num_cpus=2)
    assert ray.jobs["a"].body["entrypoint_num_cpus"] == 2
    assert [job.submission_id for job in hook.list_jobs()] == ["a"]
    assert hook.stop_job("a") is True
    assert hook.stop_job("a") is False
    job = hook.get_job("a")
    assert job is not None
    assert job.status == "STOPPED"
    assert hook.get_job("b") is None
    assert hook.stop_job("b") is False


def test_a_taken_id_is_told_apart_from_other_errors(ray: StandInRay, hook: RayJobHook):
    hook.submit_job(submission_id="a", entrypoint="true")
    with pytest.raises(JobExistsError):
        hook.submit_job(submission_id="a", entrypoint="true")


def test_test_connection_tells_the_version(hook: RayJobHook):
    succeeded, message = hook.test_connection()
    assert succeeded
    assert message.startswith("Ray 2.60.0 at http://127.0.0.1:")


def test_test_connection_tells_that_the_token_is_wrong_but_not_the_token(ray: StandInRay, monkeypatch, caplog):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({**ray.connection, "password": "wrong-token"}))
    with caplog.at_level(logging.DEBUG):
        succeeded, message = RayJobHook().test_connection()
    assert not succeeded
    assert "the token is missing or wrong" in message
    assert "wrong-token" not in message + caplog.text


def test_test_connection_tells_that_nobody_listens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", '{"conn_type": "ray_jobs", "host": "127.0.0.1", "port": 9}')
    succeeded, message = RayJobHook().test_connection()
    assert not succeeded
    assert "http://127.0.0.1:9" in message


def test_the_token_is_never_logged(ray: StandInRay, hook: RayJobHook, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        hook.submit_job(submission_id="a", entrypoint="true")
        ray.jobs["a"].status = "SUCCEEDED"
        watch(hook, Shown())
    assert TOKEN not in caplog.text


def test_a_wrong_token_ends_the_watch_with_the_reason(ray: StandInRay, monkeypatch: pytest.MonkeyPatch):
    ray.jobs["a"] = Job("a", "true")
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({**ray.connection, "password": "wrong"}))
    outcome = watch(RayJobHook(), Shown())
    assert outcome.status == "UNREACHABLE"
    assert "token is missing or wrong" in outcome.message


def test_the_client_speaks_of_refusals_like_the_hook(ray: StandInRay):
    async def show() -> None:
        async with RayJobClient(RayEndpoint(f"http://127.0.0.1:{ray.port}", "", {})) as client:
            await client.get_job("a")

    with pytest.raises(RayRefusedError, match="token"):
        asyncio.run(show())
