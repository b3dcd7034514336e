"""Which jobs the reaper stops, against a server with the behaviour of Ray's."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from operators.ray.hook import RayJobHook
from operators.ray.ownership import GENERATION, OwnedJob, airflow_id, job_metadata
from operators.reaper import ALIVE, Reaped, as_table, inspect, reap
from tests.ray_stand_in import Job, StandInRay

ME = "this-airflow"


@pytest.fixture
def hook(ray: StandInRay, monkeypatch: pytest.MonkeyPatch) -> RayJobHook:
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))
    return RayJobHook()


def add(
    ray: StandInRay,
    name: str,
    *,
    task: str | None = None,
    airflow: str = ME,
    generation: int = 1,
    cancel: bool = True,
    map_index: int = -1,
    status: str = "RUNNING",
) -> None:
    metadata = job_metadata(
        airflow,
        dag_id="d",
        run_id="r",
        task_id=task or name,
        map_index=map_index,
        try_number=1,
        cancel_on_kill=cancel,
    )
    ray.jobs[name] = Job(name, "true", status=status, body={"metadata": {**metadata, GENERATION: str(generation)}})


def visit(hook: RayJobHook, tasks: Mapping[str, Any]) -> Reaped:
    return reap(
        hook, airflow=ME, states=lambda dag_id, run_ids: {"r": tasks}, grace_seconds=0, sleep=lambda seconds: None
    )


def test_jobs_of_ended_cleared_and_vanished_tasks_are_stopped_and_those_of_live_tasks_are_not(
    ray: StandInRay, hook: RayJobHook
):
    tasks: dict[str, Any] = {"failed": "failed", "success": "success", "cleared": None}
    tasks |= {state: state for state in ALIVE}
    for name in (*tasks, "vanished"):
        add(ray, name)
    reaped = visit(hook, tasks)
    assert set(reaped.stopped) == {"failed", "success", "cleared", "vanished"} == set(ray.stops)
    assert {name for name, job in ray.jobs.items() if job.status == "RUNNING"} == ALIVE
    assert reaped.left == ()


def test_a_run_that_was_deleted_leaves_no_job(ray: StandInRay, hook: RayJobHook):
    add(ray, "a")
    reap(hook, airflow=ME, states=lambda dag_id, run_ids: {}, grace_seconds=0, sleep=lambda seconds: None)
    assert ray.stops == ["a"]


def test_another_airflows_jobs_and_everybody_elses_are_never_touched(ray: StandInRay, hook: RayJobHook):
    add(ray, "other", airflow="another-airflow")
    ray.jobs["plain"] = Job("plain", "true")
    add(ray, "kept", cancel=False)
    assert visit(hook, {}).stopped == ()
    assert ray.stops == []


def test_an_older_generation_beside_a_newer_one_is_stopped(ray: StandInRay, hook: RayJobHook):
    add(ray, "old", task="sft", generation=1)
    add(ray, "new", task="sft", generation=2)
    assert visit(hook, {"sft": "deferred"}).stopped == ("old",)


def test_mapped_tasks_are_told_apart(ray: StandInRay, hook: RayJobHook):
    add(ray, "zero", task="sft", map_index=0)
    add(ray, "one", task="sft", map_index=1)
    assert visit(hook, {"sft_0": "deferred", "sft_1": "failed"}).stopped == ("one",)


def test_a_task_that_comes_back_to_life_within_the_grace_period_keeps_its_job(ray: StandInRay, hook: RayJobHook):
    add(ray, "sft")
    tasks: dict[str, Any] = {"sft": None}
    reaped = reap(
        hook,
        airflow=ME,
        states=lambda dag_id, run_ids: {"r": tasks},
        grace_seconds=60,
        sleep=lambda seconds: tasks.update(sft="running"),
    )
    assert reaped.stopped == ()
    assert ray.stops == []


def test_the_table_says_what_each_job_is_and_what_happens_to_it(ray: StandInRay, hook: RayJobHook):
    add(ray, "a", task="sft")
    add(ray, "b", task="ppo", map_index=3, cancel=False)
    findings = inspect(hook.list_jobs(), airflow=ME, states=lambda dag_id, run_ids: {"r": {"sft": "failed"}})
    assert [line.split()[:6] for line in as_table(findings).splitlines()[1:]] == [
        ["a", "d", "/", "r", "/", "sft"],
        ["b", "d", "/", "r", "/", "ppo[3]"],
    ]
    assert "its task is failed" in as_table(findings)
    assert "cancel_on_kill is off" in as_table(findings)


def test_a_job_with_incomplete_metadata_is_nobodys(ray: StandInRay, hook: RayJobHook):
    add(ray, "a")
    del ray.jobs["a"].body["metadata"][GENERATION]
    (job,) = hook.list_jobs()
    assert OwnedJob.of(job, ME) is None


def test_two_airflows_have_two_names_even_when_one_is_a_copy_of_the_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ATHANOR_AIRFLOW_ID", raising=False)
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "k" * 43 + "=")
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example.org")
    production = airflow_id()
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://staging.example.org")
    assert airflow_id() != production
    monkeypatch.setenv("ATHANOR_AIRFLOW_ID", "mine")
    assert airflow_id() == "mine"
