"""StageOperator and RayJobTrigger against a real Ray head: one job per attempt, true ends, nothing left running."""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from airflow.sdk.bases.operator import TRIGGER_FAIL_REPR
from airflow.sdk.exceptions import AirflowSkipException, TaskDeferred

from operators.failures import (
    StageConfigFailed,
    StageDataFailed,
    StageFailed,
    StageInfrastructureFailed,
    StageLost,
    StageOutOfMemory,
    StageOutOfMemoryForGood,
    StagePreempted,
    StageStalled,
    StageStopped,
    StageTimedOut,
)
from operators.operator import StageOperator
from operators.ray.hook import RayJobHook
from operators.ray.jobs import JobStatus, RayUnreachableError
from operators.ray.ownership import OwnedJob, airflow_id
from operators.ray.submission import STATE_KEY, TaskKey
from operators.trigger import RayJobTrigger
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store, read_json
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, RunInfo
from stages.config.resolve import resolve
from tests.servers import RayServer
from tests.task_state import Memory

pytestmark = pytest.mark.integration

STAND_IN = Path(__file__).with_name("stage_stand_in.py")
KEY = TaskKey("llm_pipeline", "run", "tokenize")
CURATED = ArtifactRef(kind="curated", uri="file:///curated", fingerprint="f", digest="d")


class TaskInstance:
    dag_id, run_id, task_id, map_index = KEY.dag_id, KEY.run_id, KEY.task_id, -1

    def __init__(self, xcoms: dict[str, Any], try_number: int, state: str | None) -> None:
        self.xcoms, self.try_number, self.state = xcoms, try_number, state
        self.start_date = datetime.now(UTC) - timedelta(seconds=30)

    def get_task_states(self, dag_id: str, run_ids: list[str]) -> dict[str, Any]:
        return {run_id: {self.task_id: self.state} for run_id in run_ids}

    def xcom_pull(self, task_ids: str) -> Any:
        return self.xcoms.get(task_ids)

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcoms[key] = json.loads(json.dumps(value))


class World:
    """One task instance over its attempts. Every call makes a new operator, as every process of Airflow does."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.memory = store, Memory()
        self.run = RunInfo(run_id=run_id, name="n", dag_id=KEY.dag_id, airflow_run_id=KEY.run_id, parent_run_id="p")
        self.xcoms: dict[str, Any] = {
            "resolve": self.run.model_dump(mode="json"),
            "curate": CURATED.model_dump(mode="json"),
        }
        self.events: dict[Any, Any] = {}
        self.clear_number = 0
        self.state: str | None = "running"
        self.configure()

    def configure(self, **params: Any) -> None:
        config = resolve({"recipe": "tiny", **params})
        self.store.write_bytes(f"runs/{self.run.run_id}/pipeline.json", config.model_dump_json().encode())

    def operator(self, behaviour: str, **settings: Any) -> StageOperator:
        command = f"{shlex.quote(sys.executable)} {shlex.quote(str(STAND_IN))} {{config_uri}} {behaviour}"
        stage = settings.pop("stage", Stage.TOKENIZE)
        return StageOperator(stage=stage, entrypoint=command, poll_interval=0.3, **settings)

    def context(self, try_number: int = 1) -> dict[str, Any]:
        ti = TaskInstance(self.xcoms, try_number, self.state)
        dag_run = SimpleNamespace(clear_number=self.clear_number)
        return {"ti": ti, "dag_run": dag_run, "task_state_store": self.memory, "outlet_events": self.events}

    def start(self, behaviour: str, *, try_number: int = 1, **settings: Any) -> TaskDeferred:
        with pytest.raises(TaskDeferred) as deferred:
            self.operator(behaviour, **settings).execute(self.context(try_number))
        return deferred.value

    def event(self, deferred: TaskDeferred) -> dict[str, Any]:
        """Run the trigger the way a triggerer does: rebuilt from its serialised form."""
        path, arguments = deferred.trigger.serialize()
        assert path == "operators.trigger.RayJobTrigger"
        trigger = RayJobTrigger(**json.loads(json.dumps(arguments)))

        async def first() -> dict[str, Any]:
            return (await anext(trigger.run())).payload

        return json.loads(json.dumps(asyncio.run(first())))

    def resume(self, deferred: TaskDeferred, event: dict[str, Any], *, try_number: int = 1, **settings: Any) -> Any:
        operator = self.operator("succeed", **settings)
        return operator.resume_execution(deferred.method_name, {"event": event}, self.context(try_number))

    def finish(self, deferred: TaskDeferred, *, try_number: int = 1, **settings: Any) -> Any:
        return self.resume(deferred, self.event(deferred), try_number=try_number, **settings)


@pytest.fixture
def hook(ray_head: RayServer, monkeypatch: pytest.MonkeyPatch) -> RayJobHook:
    parts = urlsplit(ray_head.url)
    connection = {"conn_type": "ray_jobs", "host": parts.hostname, "port": parts.port, "password": ray_head.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    return RayJobHook()


@pytest.fixture
def world(hook: RayJobHook, file_store: str, monkeypatch: pytest.MonkeyPatch, request) -> World:
    """A task instance with a name of its own, because the head serves all tests."""
    name = f"run-{request.node.name[-60:]}"
    monkeypatch.setattr(TaskInstance, "run_id", name)
    monkeypatch.setenv("ARTIFACT_STORE", file_store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    return World(open_store(file_store), "r")


def our_jobs(hook: RayJobHook) -> dict[str, JobStatus]:
    mine = TaskKey(KEY.dag_id, TaskInstance.run_id, KEY.task_id, airflow=airflow_id()).submission_id(1)[:-1]
    found = {job.submission_id: job.status for job in hook.list_jobs() if job.submission_id.startswith(mine)}
    return dict(sorted(found.items()))


def wait_for(hook: RayJobHook, submission_id: str, *statuses: str) -> None:
    deadline = time.monotonic() + 60
    while (job := hook.get_job(submission_id)) is None or job.status not in statuses:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)


def running_id(world: World, hook: RayJobHook) -> str:
    submission_id = world.memory.values[STATE_KEY]["submission_id"]
    wait_for(hook, submission_id, "RUNNING")
    return submission_id


def test_a_stage_runs_as_a_ray_job_and_returns_its_artifact(world: World, hook: RayJobHook, capsys):
    deferred = world.start("succeed")
    assert world.xcoms["_link_RayJobLink"].endswith(f"/#/jobs/{world.memory.values[STATE_KEY]['submission_id']}")
    ref = ArtifactRef.model_validate(world.finish(deferred))
    assert (ref.kind, ref.mlflow_run_id) == ("tokens", "mlflow-run-of-the-stand-in")
    assert list(our_jobs(hook).values()) == ["SUCCEEDED"]
    assert world.xcoms["_link_ArtifactLink"] == ref.uri
    assert world.xcoms["_link_MlflowRunLink"] == ("http://mlflow:5000/#/experiments/3/runs/mlflow-run-of-the-stand-in")
    log = capsys.readouterr().out
    assert log.count("attempt 1 of") == 1
    assert "tokenize 1/2 steps (50 %)" in log
    assert "ATHANOR_PROGRESS" not in log
    assert "ATHANOR_MLFLOW_RUN" not in log


def test_an_artifact_that_exists_is_returned_without_ray(world: World, hook: RayJobHook):
    built = world.finish(world.start("succeed"))
    world.memory = Memory()
    assert world.operator("succeed").execute(world.context()) == built
    assert len(our_jobs(hook)) == 1
    assert read_json(world.store, run_key("r", Stage.TOKENIZE, "result.json"))["hit"] is True


def test_a_damaged_artifact_is_named_and_built_again(world: World, hook: RayJobHook, caplog):
    built = ArtifactRef.model_validate(world.finish(world.start("succeed")))
    damaged = world.store.local_path(f"artifacts/tokens/{built.fingerprint}/content.txt")
    assert damaged is not None
    damaged.write_text("cut")
    world.clear_number += 1
    again = ArtifactRef.model_validate(world.finish(world.start("succeed", try_number=2), try_number=2))
    assert again == built
    assert len(our_jobs(hook)) == 2
    assert f"artifacts/tokens/{built.fingerprint}/content.txt has 3 bytes, its manifest says 64 bytes" in caplog.text


def test_the_asset_event_carries_fingerprint_digest_and_mlflow_run(world: World):
    class Events(dict[Any, Any]):
        def __missing__(self, asset: Any) -> Any:
            self[asset] = type("Event", (), {"extra": None})()
            return self[asset]

    world.events = Events()
    world.xcoms |= {"tokenize": CURATED.model_dump(mode="json")}
    ref = world.finish(world.start("succeed", stage=Stage.PRETRAIN), stage=Stage.PRETRAIN)
    ((asset, event),) = world.events.items()
    assert asset.name == "llm/base-model"
    assert event.extra == {**{k: v for k, v in ref.items() if v is not None}, "run_id": "r", "hit": False}


def test_a_stage_that_the_run_does_not_ask_for_skips_itself(world: World, hook: RayJobHook):
    world.configure(last_stage="curate")
    with pytest.raises(
        AirflowSkipException, match=r"tokenize is not part of this run: the run ends with curate \(last_stage\)"
    ):
        world.operator("succeed").execute(world.context())
    assert our_jobs(hook) == {}


@pytest.fixture
def statsd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, str]]]:
    """Airflow sends its metrics to a port of ours, as its task processes set it up; name -> value of what has come."""
    from airflow.sdk.observability import stats
    from airflow.sdk.observability.metrics import stats_utils

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(0.3)
        monkeypatch.setenv("AIRFLOW__METRICS__STATSD_ON", "True")
        monkeypatch.setenv("AIRFLOW__METRICS__STATSD_HOST", "127.0.0.1")
        monkeypatch.setenv("AIRFLOW__METRICS__STATSD_PORT", str(listener.getsockname()[1]))
        stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=True)

        def received() -> dict[str, str]:
            found: dict[str, str] = {}
            with contextlib.suppress(TimeoutError):
                while packet := listener.recv(65_536).decode():
                    found |= dict(line.split(":", 1) for line in packet.splitlines())
            return found

        yield received
    monkeypatch.undo()
    stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=True)


def test_a_stage_tells_statsd_of_work_wait_and_failures(world: World, statsd: Callable[[], dict[str, str]]):
    with pytest.raises(StageDataFailed):
        world.finish(world.start("fail:data"))
    world.clear_number += 1
    world.finish(world.start("succeed", try_number=2), try_number=2)
    built = statsd()
    assert built["airflow.athanor.stage.tokenize.failed.data"] == "1|c"
    assert built["airflow.athanor.stage.tokenize.built"] == "1|c"
    work, wait = (
        float(built[f"airflow.athanor.stage.tokenize.{name}"].removesuffix("|ms")) for name in ("work", "wait")
    )
    assert 0 < work < 30_000 < work + wait < 90_000
    spent = {
        name: built[f"airflow.athanor.stage.tokenize.{name}_seconds"] for name in ("wall", "productive", "cpu", "gpu")
    }
    assert spent == {"wall": "10|c", "productive": "8|c", "cpu": "7|c", "gpu": "0|c"}
    world.operator("succeed").execute(world.context())
    hit = statsd()
    assert hit["airflow.athanor.stage.tokenize.hit"] == "1|c"
    assert "airflow.athanor.stage.tokenize.work" not in hit


def test_failures_without_the_end_of_a_job_are_counted_too(world: World, statsd: Callable[[], dict[str, str]]):
    world.start("succeed:60", timeout=timedelta(minutes=1))
    with pytest.raises(StageTimedOut):
        world.operator("succeed:60", timeout=timedelta(minutes=1)).resume_execution(
            TRIGGER_FAIL_REPR, {"error": "Trigger timeout"}, world.context()
        )
    del world.xcoms["resolve"]
    with pytest.raises(StageConfigFailed):
        world.operator("succeed").execute(world.context())
    counted = statsd()
    assert counted["airflow.athanor.stage.tokenize.failed.infrastructure"] == "1|c"
    assert counted["airflow.athanor.stage.tokenize.failed.config"] == "1|c"


def test_without_a_triggerer_the_task_waits_itself(world: World, hook: RayJobHook, capsys):
    ref = world.operator("succeed", deferrable=False).execute(world.context())
    assert ref["kind"] == "tokens"
    assert capsys.readouterr().out.count("attempt 1 of") == 1


@pytest.mark.parametrize(
    ("behaviour", "exception", "says"),
    [
        ("fail:data", StageDataFailed, "the stand-in fails with data. Do something about it."),
        ("fail:out_of_memory", StageOutOfMemory, "the stand-in fails with out_of_memory."),
        ("die", StageInfrastructureFailed, "killed (signal 9)"),
        ("forget", StageInfrastructureFailed, "succeeded, but .*result.json does not exist"),
        ("unknown", StageInfrastructureFailed, "exit code 1"),
    ],
)
def test_each_way_to_fail_ends_in_its_category(world: World, behaviour: str, exception: type[StageFailed], says: str):
    with pytest.raises(exception, match=says.replace("(", r"\(").replace(")", r"\)")) as caught:
        world.finish(world.start(behaviour))
    assert type(caught.value) is exception
    assert world.memory.values[STATE_KEY]["consumed"] is True
    if caught.value.retryable:
        assert caught.value.max_retries == 2


def test_out_of_memory_halves_the_micro_batch_until_it_is_one(world: World, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "operators.dispatch")
    world.configure(overrides={"execution.tokenize.micro_batch_size": 3})

    def fail(try_number: int) -> tuple[int, type[StageFailed]]:
        with pytest.raises(StageOutOfMemory) as caught:
            world.finish(world.start("fail:out_of_memory", try_number=try_number), try_number=try_number)
        request = read_json(world.store, run_key("r", Stage.TOKENIZE, "config.json"))
        return request["execution"]["micro_batch_size"], type(caught.value)

    assert fail(1) == (3, StageOutOfMemory)
    assert fail(2) == (1, StageOutOfMemoryForGood)
    assert not StageOutOfMemoryForGood.retryable
    assert "micro_batch_size is 1 instead of 3; results do not change" in caplog.text


def test_a_stalled_job_is_told_by_its_category(world: World):
    with pytest.raises(StageStalled, match="the stand-in fails with stalled"):
        world.finish(world.start("fail:stalled"))


def test_a_job_tells_whose_it_is(world: World, hook: RayJobHook):
    world.finish(world.start("succeed", cancel_on_kill=False))
    (job,) = [job for job in hook.list_jobs() if job.submission_id in our_jobs(hook)]
    owned = OwnedJob.of(job, airflow_id())
    assert owned is not None
    assert (owned.task_key, owned.generation) == ((KEY.dag_id, TaskInstance.run_id, KEY.task_id, -1), 1)
    assert not owned.may_be_stopped
    assert OwnedJob.of(job, "another-airflow") is None


def test_a_job_that_failed_before_anybody_watched_is_red(world: World, hook: RayJobHook, monkeypatch):
    submit = RayJobHook.submit_job

    def submit_and_lose_the_answer(self: RayJobHook, **arguments: Any) -> None:
        submit(self, **arguments)
        wait_for(self, arguments["submission_id"], "FAILED")
        raise RayUnreachableError("the answer is lost")

    monkeypatch.setattr(RayJobHook, "submit_job", submit_and_lose_the_answer)
    with pytest.raises(StageDataFailed, match=r"the stand-in fails with data"):
        world.operator("fail:data").execute(world.context())
    assert list(our_jobs(hook).values()) == ["FAILED"]


def test_a_retry_takes_a_new_job_after_a_processed_failure(world: World, hook: RayJobHook):
    with pytest.raises(StageInfrastructureFailed):
        world.finish(world.start("fail_once:infrastructure"))
    assert world.finish(world.start("fail_once:infrastructure", try_number=2), try_number=2)["kind"] == "tokens"
    assert list(our_jobs(hook).values()) == ["FAILED", "SUCCEEDED"]


def test_a_crash_between_remembering_and_posting_leads_to_one_job(world: World, hook: RayJobHook, monkeypatch):
    class Crash(BaseException):
        pass

    def crash(self: RayJobHook, **arguments: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(RayJobHook, "submit_job", crash)
        with pytest.raises(Crash):
            world.operator("succeed").execute(world.context())
    assert our_jobs(hook) == {}
    world.finish(world.start("succeed", try_number=2), try_number=2)
    assert list(our_jobs(hook).values()) == ["SUCCEEDED"]


def test_a_crash_after_the_post_re_attaches(world: World, hook: RayJobHook):
    world.start("succeed:3")
    deferred = world.start("succeed:3", try_number=2)
    assert len(our_jobs(hook)) == 1
    assert world.finish(deferred, try_number=2)["kind"] == "tokens"


def test_a_crash_while_the_end_is_processed_takes_the_result_without_a_second_job(world: World, hook: RayJobHook):
    world.event(world.start("succeed"))
    (world.store.local_path("artifacts") or Path()).rename(world.store.local_path("elsewhere") or Path())
    ref = world.operator("succeed").execute(world.context(2))
    assert ref["kind"] == "tokens"
    assert len(our_jobs(hook)) == 1


def test_killing_the_deferred_task_stops_the_job_and_the_next_attempt_starts_anew(world: World, hook: RayJobHook):
    deferred = world.start("succeed:60")
    submission_id = running_id(world, hook)
    started = time.monotonic()
    asyncio.run(deferred.trigger.on_kill())
    wait_for(hook, submission_id, "STOPPED")
    assert time.monotonic() - started < 10
    assert world.finish(world.start("succeed", try_number=2), try_number=2)["kind"] == "tokens"
    assert list(our_jobs(hook).values()) == ["STOPPED", "SUCCEEDED"]


def test_an_attempt_that_attached_just_before_the_stop_starts_anew_by_itself(world: World, hook: RayJobHook):
    cleared = world.start("succeed:60")
    running_id(world, hook)
    attached = world.start("succeed:60", try_number=2)
    asyncio.run(cleared.trigger.on_kill())
    event = world.event(attached)
    assert event["status"] == "STOPPED"
    with pytest.raises(TaskDeferred) as fresh:
        world.resume(attached, event, try_number=2)
    assert world.finish(fresh.value, try_number=2)["kind"] == "tokens"
    assert list(our_jobs(hook).values()) == ["STOPPED", "SUCCEEDED"]


def test_a_job_that_somebody_stops_in_ray_fails_for_good(world: World, hook: RayJobHook):
    deferred = world.start("succeed:60")
    hook.stop_job(running_id(world, hook))
    with pytest.raises(StageStopped, match="was stopped on the Ray side"):
        world.finish(deferred)


@pytest.fixture
def terminated(world: World, hook: RayJobHook) -> Iterator[Callable[[StageOperator], None]]:
    """Run a task that waits itself, and end it as Airflow does: on_kill in the handler of a signal."""
    before = signal.getsignal(signal.SIGTERM)

    def run(operator: StageOperator) -> None:
        def terminate() -> None:
            while STATE_KEY not in world.memory.values:
                time.sleep(0.1)
            running_id(world, hook)
            time.sleep(1)  # it waits by now
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGTERM, lambda signum, frame: operator.on_kill())
        killer = threading.Thread(target=terminate)
        killer.start()
        with pytest.raises(StagePreempted, match="Airflow ended this process"):
            operator.execute(world.context())
        killer.join()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("state", ["restarting", "failed", "success"])
def test_a_waiting_task_that_was_cleared_or_marked_stops_its_job(world: World, hook: RayJobHook, terminated, state):
    world.state = state
    terminated(world.operator("succeed:60", deferrable=False))
    assert list(our_jobs(hook).values()) == ["STOPPED"]


@pytest.mark.parametrize("state", ["running", "scheduled", None])
def test_a_waiting_task_whose_worker_ends_leaves_its_job_to_the_next_attempt(
    world: World, hook: RayJobHook, terminated, state
):
    world.state = state
    terminated(world.operator("succeed:8", deferrable=False))
    assert list(our_jobs(hook).values()) == ["RUNNING"]
    again = world.operator("succeed:8", deferrable=False)
    assert again.execute(world.context(2))["kind"] == "tokens"
    assert list(our_jobs(hook).values()) == ["SUCCEEDED"]


def test_a_waiting_task_stops_its_job_when_its_time_is_over(world: World, hook: RayJobHook):
    operator = world.operator("succeed:60", deferrable=False, timeout=timedelta(seconds=6))
    with pytest.raises(StageTimedOut, match=r"longer than its timeout of 0:00:06; its Ray job was stopped") as caught:
        operator.execute(world.context())
    (submission_id,) = our_jobs(hook)
    wait_for(hook, submission_id, "STOPPED")
    assert caught.value.max_retries == 2


def test_cancel_on_kill_off_leaves_the_job(world: World, hook: RayJobHook):
    deferred = world.start("succeed:2", cancel_on_kill=False)
    submission_id = running_id(world, hook)
    operator = world.operator("succeed:2", cancel_on_kill=False)
    operator._running = submission_id
    operator.on_kill()
    asyncio.run(deferred.trigger.on_kill())
    wait_for(hook, submission_id, "SUCCEEDED")


def test_the_deferral_timeout_stops_the_job(world: World, hook: RayJobHook):
    world.start("succeed:60", timeout=timedelta(minutes=1))
    submission_id = running_id(world, hook)
    operator = world.operator("succeed:60", timeout=timedelta(minutes=1))
    with pytest.raises(StageTimedOut, match=r"longer than its timeout of 0:01:00; its Ray job was stopped") as caught:
        operator.resume_execution(TRIGGER_FAIL_REPR, {"error": "Trigger timeout"}, world.context())
    wait_for(hook, submission_id, "STOPPED")
    assert world.memory.values[STATE_KEY]["consumed"] is True
    assert caught.value.max_retries == 2


def test_the_deferral_timeout_leaves_the_job_when_it_must_not_be_cancelled(world: World, hook: RayJobHook):
    settings = {"timeout": timedelta(minutes=1), "cancel_on_kill": False}
    world.start("succeed:4", **settings)
    submission_id = running_id(world, hook)
    with pytest.raises(StageTimedOut, match="its job continues"):
        world.operator("succeed:4", **settings).resume_execution(
            TRIGGER_FAIL_REPR, {"error": "Trigger timeout"}, world.context()
        )
    assert world.finish(world.start("succeed:4", try_number=2, **settings), try_number=2)["kind"] == "tokens"
    wait_for(hook, submission_id, "SUCCEEDED")
    assert len(our_jobs(hook)) == 1


def test_a_job_that_the_cluster_lost_is_told_and_may_be_retried(world: World, hook: RayJobHook):
    deferred = world.start("succeed")
    event = world.event(deferred)
    with pytest.raises(StageLost, match="is lost"):
        world.resume(deferred, {**event, "status": "LOST", "message": "the cluster does not know the job any more"})
    assert StageLost.retryable


def test_a_wrong_token_fails_at_once_with_what_to_do(
    world: World, monkeypatch: pytest.MonkeyPatch, ray_head: RayServer
):
    parts = urlsplit(ray_head.url)
    connection = {"conn_type": "ray_jobs", "host": parts.hostname, "port": parts.port, "password": "wrong"}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    with pytest.raises(StageConfigFailed, match="Put the cluster's token in the password of the ray_jobs connection"):
        world.operator("succeed").execute(world.context())
