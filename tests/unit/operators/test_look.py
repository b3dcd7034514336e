"""The look as the task `resolve` has it made: a job only where there is a model; a failure, another attempt, a kill."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from operators.failures import StageConfigFailed, StageInfrastructureFailed, StagePreempted
from operators.look import look_at_models, read_look
from operators.ray.watch import JobWatcher
from operators.run import start_run
from stages.artifacts.addresses import open_store
from stages.artifacts.store import Store, write_json
from stages.config.errors import Category
from stages.config.look import Look, LookRequest, ModelFacts, given_models, look_key
from stages.config.request import ArtifactRef, Failure, RunInfo, sha256_of
from stages.config.resolve import resolve
from tests.ray_stand_in import Job, StandInRay
from tests.task_state import Memory

RUN = RunInfo(run_id="r", name="n")
LOOK = Look(models=(ModelFacts(role="base_model", uri="/models/x", architecture="X", parameters=7),))


class TaskInstance:
    dag_id, run_id, task_id, map_index, try_number = "llm_pipeline", "manual__1", "resolve", -1, 1
    log_url = "http://airflow/dags/llm_pipeline/runs/x/tasks/resolve"


@pytest.fixture
def context(ray: StandInRay, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return {
        "ti": TaskInstance(),
        "dag_run": SimpleNamespace(clear_number=0),
        "task_state_store": Memory(),
        "params": {"recipe": "tiny", "base_model": "/models/x"},
    }


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ARTIFACT_STORE", tmp_path.as_uri())
    return open_store(tmp_path.as_uri())


def look(context: dict[str, Any], store: Store) -> Look:
    return look_at_models(context, store, RUN, resolve({"recipe": "tiny", "base_model": "/models/x"}))


def when_submitted(ray: StandInRay, act: Callable[[Job], None]) -> threading.Thread:
    """Play the job in a thread, as soon as it is there."""

    def play() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if started := [job for job in ray.jobs.values() if job.status == "RUNNING"]:
                act(started[0])
                return
            time.sleep(0.05)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    return thread


def ends_with(store: Store, name: str, record: Any, status: str) -> Callable[[Job], None]:
    def end(job: Job) -> None:
        run_id = job.body["entrypoint"].rpartition("/runs/")[2].partition("/")[0]
        write_json(store, look_key(run_id, name), record.model_dump(mode="json"))
        job.driver_exit_code = 0 if status == "SUCCEEDED" else 2
        job.status = status

    return end


def test_a_run_that_is_given_no_model_starts_no_job(context: dict[str, Any], store: Store, ray: StandInRay) -> None:
    assert look_at_models(context, store, RUN, resolve({"recipe": "tiny"})) == Look()
    start_run({**context, "params": {"recipe": "tiny"}})
    assert ray.posts == []


def test_the_job_gets_the_configuration_and_the_digest_of_its_request(
    context: dict[str, Any], store: Store, ray: StandInRay
) -> None:
    thread = when_submitted(ray, ends_with(store, "result.json", LOOK, "SUCCEEDED"))
    assert look(context, store) == LOOK == read_look(store, RUN)
    thread.join()
    (job,) = ray.jobs.values()
    written = store.read_bytes("runs/r/look/config.json")
    assert f"ATHANOR_REQUEST_SHA256={sha256_of(written)} python -m stages.look " in job.entrypoint
    assert job.entrypoint.endswith(f"{store.root_uri}/runs/r/look/config.json")
    request = LookRequest.model_validate_json(written)
    assert [(model.role, model.uri) for model in request.models] == [("base_model", "/models/x")]
    assert request.submission_id == job.submission_id
    assert job.body["metadata"]["athanor.stage"] == "look"


def test_what_is_refused_fails_resolve_at_once_with_the_reason_before_anything_is_opened(
    context: dict[str, Any], store: Store, ray: StandInRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("operators.run.open_parent_run", opened.append)
    failure = Failure(category=Category.CONFIG, message="base_model='/models/x' is none.", advice="Give another.")
    when_submitted(ray, ends_with(store, "failure.json", failure, "FAILED"))
    with pytest.raises(StageConfigFailed, match=r"base_model='/models/x' is none\. Give another\."):
        start_run(context)
    assert opened == []


def test_a_job_that_left_nothing_is_told_by_its_exit_code(
    context: dict[str, Any], store: Store, ray: StandInRay
) -> None:
    def die(job: Job) -> None:
        job.driver_exit_code, job.status = 1, "FAILED"

    when_submitted(ray, die)
    with pytest.raises(StageInfrastructureFailed, match="exit code 1"):
        look(context, store)


def test_a_success_without_a_record_means_another_store(context: dict[str, Any], store: Store, ray: StandInRay) -> None:
    when_submitted(ray, lambda job: setattr(job, "status", "SUCCEEDED"))
    with pytest.raises(StageInfrastructureFailed, match=r"look/result\.json does not exist\. Check that Airflow"):
        look(context, store)


def test_the_next_attempt_attaches_to_the_job_of_the_one_before(
    context: dict[str, Any], store: Store, ray: StandInRay
) -> None:
    def lose_sight(job: Job) -> None:
        raise_in_main_thread.set()

    raise_in_main_thread = threading.Event()
    when_submitted(ray, lose_sight)

    def fail(*_: Any, **__: Any) -> None:
        assert raise_in_main_thread.wait(20)
        raise RuntimeError("the task's process is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("operators.look._watch", fail)
        with pytest.raises(RuntimeError):
            look(context, store)
    assert ray.stops == []
    when_submitted(ray, ends_with(store, "result.json", LOOK, "SUCCEEDED"))
    assert look(context, store) == LOOK
    assert len(ray.posts) == 1
    # And the one after that takes the same result: the process may have died before Airflow heard of it.
    assert look(context, store) == LOOK
    assert len(ray.posts) == 1


def test_a_killed_task_stops_its_job_and_the_next_attempt_starts_another(
    context: dict[str, Any], store: Store, ray: StandInRay
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    when_submitted(ray, lambda job: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StagePreempted):
        look(context, store)
    assert len(ray.stops) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    when_submitted(ray, ends_with(store, "result.json", LOOK, "SUCCEEDED"))
    assert look(context, store) == LOOK
    assert len(set(ray.posts)) == 2


def test_a_task_killed_while_it_shows_the_jobs_log_stops_the_job(
    context: dict[str, Any], store: Store, ray: StandInRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of asyncio keeps what is raised in it: the signal must not be lost there."""

    async def killed(self: JobWatcher) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(JobWatcher, "_tail", killed)
    with pytest.raises(StagePreempted):
        look(context, store)
    assert len(ray.stops) == 1


def test_a_damaged_record_leaves_the_plan_without_facts(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    assert read_look(store, RUN) == Look()
    store.write_bytes("runs/r/look/result.json", b"{")
    assert read_look(store, RUN) == Look()
    assert "The plan goes on without it." in caplog.text


def test_an_artifact_is_looked_at_as_the_artifact_that_its_address_led_to() -> None:
    ref = ArtifactRef(kind="sft-model", uri="file:///s/artifacts/sft-model/f", fingerprint="f", digest="d")
    config = resolve({"recipe": "tiny", "base_model": "models:/m@champion"}).with_given({"base_model": ref})
    (model,) = given_models(config)
    assert (model.role, model.uri, model.artifact) == ("base_model", ref.uri, ref)
