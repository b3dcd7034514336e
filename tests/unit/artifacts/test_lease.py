"""One builder at a time, whoever dies or sleeps: real processes and threads on a real folder."""

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.artifacts import lease as lease_module
from stages.artifacts.addresses import open_store
from stages.artifacts.folder import FileStore
from stages.artifacts.lease import Lease, LeaseLostError, LeaseTimes, Owner, acquire
from stages.artifacts.manifests import content_digest, find_manifest, publish, utc_now
from stages.artifacts.store import Store, read_json
from stages.config.errors import Category
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.request import InputEntry, Manifest, RunInfo, StageRequest
from tests.damaged import NO_RECORD
from tests.pipeline_records import request_for

KIND, IDENTITY = "tokens", "ab" * 32
QUICK = LeaseTimes(beat_seconds=0.05, stale_seconds=0.6, poll_seconds=0.02)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def owner(run: str, *, job: str = "athanor-{run}-1") -> Owner:
    info = RunInfo(run_id=run, name="demo", dag_id="llm_pipeline", airflow_run_id=run)
    request = StageRequest(
        stage=Stage.TOKENIZE, run=info, store_uri="", config={}, execution=ExecutionConfig(), task_id="tokenize"
    )
    return Owner.of(request.model_copy(update={"submission_id": job.format(run=run)}))


def publish_empty(store: Store, identity: str = IDENTITY, *inputs: InputEntry) -> None:
    publish(
        store,
        Manifest(
            kind=KIND,
            stage=Stage.TOKENIZE,
            version=1,
            fingerprint=identity,
            digest=content_digest(()),
            files=(),
            inputs=inputs,
            config={},
            execution={},
            created_at=utc_now(),
        ),
    )


def take(store: Store, run: str, times: LeaseTimes = QUICK, **who: str) -> Lease | None:
    return acquire(store, kind=KIND, fingerprint=IDENTITY, owner=owner(run, **who), times=times)


def held(store: Store, run: str, times: LeaseTimes = QUICK, **who: str) -> Lease:
    lease = take(store, run, times, **who)
    assert lease is not None
    return lease


def test_of_many_that_need_an_artifact_exactly_one_builds_it_and_the_rest_get_it(store: Store):
    built: list[str] = []
    got_it: list[str] = []
    start = threading.Barrier(12)

    def need(run: str) -> None:
        start.wait()
        lease = take(store, run)
        if lease is None:
            got_it.append(run)
            return
        with lease:
            built.append(run)
            time.sleep(1.0)  # longer than the stale time: the heartbeat keeps the others waiting
            lease.check()
            publish_empty(store)

    threads = [threading.Thread(target=need, args=(f"run-{number}",)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(built), len(got_it)) == (1, 11)
    assert list(store.list("leases")) == []


class AwayOnce(FileStore):
    """The second answer about a heartbeat comes after longer than any holder may be silent."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked, self.away = 0, threading.Event()

    def read_bytes(self, key: str) -> bytes:
        try:
            return super().read_bytes(key)
        finally:
            self.asked += key.endswith(".beat")
            if self.asked == 2 and not self.away.is_set():
                self.away.set()
                time.sleep(2 * QUICK.stale_seconds)


def test_an_outage_of_the_store_makes_nobody_look_dead(store: Store, tmp_path: Path):
    holder, seen_by_waiter = held(store, "run-1"), AwayOnce(tmp_path / "store")
    with ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(take, seen_by_waiter, "run-2")
        assert seen_by_waiter.away.wait(10)
        with holder:  # its first heartbeat comes while the waiter sees nothing
            time.sleep(4 * QUICK.stale_seconds)
            holder.check()
            publish_empty(store)
        assert waiter.result() is None


def test_a_failed_holder_lets_the_next_one_build_at_once(store: Store):
    patient = LeaseTimes(beat_seconds=0.05, stale_seconds=3600, poll_seconds=0.02)
    with pytest.raises(ValueError, match="no good"), held(store, "run-1", patient):
        raise ValueError("no good")
    with held(store, "run-2", patient) as second:
        assert second.fence.number == 2
        publish_empty(store)
    assert list(store.list("leases")) == []


def hold_until_killed(store_uri: str) -> None:
    with held(open_store(store_uri), "run-1"):
        time.sleep(60)


def test_a_killed_holder_is_taken_over_after_the_stale_time_and_not_before(store: Store):
    process = multiprocessing.get_context("fork").Process(target=hold_until_killed, args=(store.root_uri,))
    process.start()
    while not store.exists(f"leases/{IDENTITY}/1.beat"):
        time.sleep(0.01)
    looks: list[str] = []
    timer = threading.Timer(1.0, os.kill, (process.pid, signal.SIGKILL))
    timer.start()
    started = time.monotonic()
    lease = acquire(
        store,
        kind=KIND,
        fingerprint=IDENTITY,
        owner=owner("run-2"),
        times=QUICK,
        on_wait=lambda holder, seconds: looks.append(holder.run_id),
    )
    waited = time.monotonic() - started
    process.join()
    assert lease is not None
    assert lease.fence.number == 2
    assert 1.0 + QUICK.stale_seconds - 2 * QUICK.beat_seconds <= waited < 5
    assert set(looks) == {"run-1"}


def test_the_next_attempt_of_the_same_task_does_not_wait_for_its_dead_predecessor(store: Store):
    patient = LeaseTimes(beat_seconds=0.05, stale_seconds=3600, poll_seconds=0.02)
    dead = held(store, "run-1", patient, job="athanor-tokenize-0123-9")  # never entered, never beats, never released
    again = held(store, "run-1", patient, job="athanor-tokenize-0123-10")
    assert again.fence.number == 2
    with pytest.raises(LeaseLostError, match="is being built by run run-1 \\(job athanor-tokenize-0123-10"):
        dead.check()


def test_jobs_of_one_task_instance_share_a_lineage_and_those_of_mapped_siblings_do_not():
    from operators.ray.submission import TaskKey

    first, second = (TaskKey("d", "r", "tokenize", 0).submission_id(generation) for generation in (1, 12))
    sibling = TaskKey("d", "r", "tokenize", 1).submission_id(1)
    assert owner("r", job=first).lineage == owner("r", job=second).lineage
    assert owner("r", job=first).lineage != owner("r", job=sibling).lineage


def test_stages_started_by_hand_are_not_taken_for_attempts_of_one_task(store: Store):
    held(store, "run-1", job="")
    started = time.monotonic()
    held(store, "run-1", job="")
    assert time.monotonic() - started >= QUICK.stale_seconds


def test_a_holder_that_slept_through_a_takeover_must_not_publish(store: Store):
    sleeper = held(store, "run-1")  # holds, and does not beat
    with held(store, "run-2") as second:
        with pytest.raises(LeaseLostError, match="is being built by run run-2") as lost:
            sleeper.check()
        second.check()
        assert lost.value.category is Category.LOST
    store.delete(f"leases/{IDENTITY}")


def test_a_sleeper_is_fenced_also_when_the_other_is_done_and_no_lease_is_left(store: Store):
    sleeper = held(store, "run-1")
    with held(store, "run-2"):
        publish_empty(store)
    assert list(store.list("leases")) == []
    with pytest.raises(LeaseLostError, match="has been published by another process"):
        sleeper.check()
    store.delete(f"artifacts/{KIND}/{IDENTITY}")  # as after damage: leases start again at 1
    with pytest.raises(LeaseLostError, match="is no longer leased to this process"):
        sleeper.check()
    third = held(store, "run-3")
    assert third.fence.number == sleeper.fence.number
    with pytest.raises(LeaseLostError, match="is no longer leased to this process"), sleeper:
        sleeper.check()
    third.check()
    assert read_json(store, f"leases/{IDENTITY}/1.json")["released"] is False


def test_a_sleeper_is_fenced_also_when_the_other_failed_and_released(store: Store):
    sleeper = held(store, "run-1")
    with pytest.raises(ValueError, match="no good"), held(store, "run-2"):
        raise ValueError("no good")
    with pytest.raises(LeaseLostError):
        sleeper.check()


def test_a_late_release_of_a_sleeper_leaves_the_new_holder_alone(store: Store):
    sleeper = held(store, "run-1")
    second = held(store, "run-2")
    with pytest.raises(LeaseLostError), sleeper:
        sleeper.check()
    second.check()
    assert read_json(store, f"leases/{IDENTITY}/2.json")["released"] is False


@pytest.mark.parametrize("record", NO_RECORD)
def test_a_damaged_lease_blocks_nobody_for_ever_and_is_told_once(
    store: Store, record: bytes, caplog: pytest.LogCaptureFixture
):
    held(store, "run-1")  # and dies
    store.write_bytes(f"leases/{IDENTITY}/1.json", record)
    started = time.monotonic()
    with held(store, "run-2") as second:
        assert second.fence.number == 2
        publish_empty(store)
    assert time.monotonic() - started >= QUICK.stale_seconds - QUICK.beat_seconds
    assert caplog.text.count("Its holder counts as alive while its heartbeat changes.") == 1


def test_a_damaged_lease_is_not_stolen_from_a_living_holder_who_keeps_it(store: Store):
    with ThreadPoolExecutor(1) as threads:
        with held(store, "run-1") as lease:
            while not store.exists(f"leases/{IDENTITY}/1.beat"):
                time.sleep(0.01)
            store.write_bytes(f"leases/{IDENTITY}/1.json", b"{")
            waiter = threads.submit(take, store, "run-2")
            time.sleep(3 * QUICK.stale_seconds)
            assert not waiter.done()
            lease.check()
            publish_empty(store)
        assert waiter.result() is None


def test_whoever_lost_the_lease_does_not_get_it_back_by_damaging_the_record(store: Store):
    sleeper = held(store, "run-1")
    store.write_bytes(f"leases/{IDENTITY}/1.json", b"{")
    store.write_bytes(f"leases/{IDENTITY}/1.beat", b"somebody 1")
    with pytest.raises(LeaseLostError, match="is no longer leased to this process"):
        sleeper.check()


def test_two_that_create_one_generation_again_and_again_do_not_do_so_hundreds_of_times_a_second(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """A server that refuses the record and shows none."""
    tried: list[str] = []

    def refuse(self: Store, key: str, data: bytes) -> bool:
        tried.append(key)
        if len(tried) > 50:
            raise TimeoutError
        return False

    monkeypatch.setattr(type(store), "put_if_absent", refuse)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        take(store, "run-1")
    assert time.monotonic() - started >= 50 * QUICK.poll_seconds


def test_an_artifact_that_appears_between_look_and_lease_is_a_hit(store: Store, monkeypatch: pytest.MonkeyPatch):
    """The other process publishes and removes its lease exactly when we are about to create ours."""
    original = type(store).put_if_absent

    def put_after_publication(self: Store, key: str, data: bytes) -> bool:
        if key.startswith("leases/"):
            publish_empty(self)
        return original(self, key, data)

    monkeypatch.setattr(type(store), "put_if_absent", put_after_publication)
    assert take(store, "run-1") is None
    assert list(store.list("leases")) == []


def test_the_runner_builds_once_for_two_runs_and_says_whom_it_waits_for(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Two runs reach the same report at the same time, by the real runner."""
    from stages.config.closing import ReportConfig
    from stages.job.context import StageContext, StageOutcome
    from stages.job.runner import execute
    from tests.pipeline_records import run_info

    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(lease_module, "LeaseTimes", lambda: QUICK)
    monkeypatch.setattr("stages.job.runner._WAITING_SHOWN_SECONDS", 0.2)
    building, runs = threading.Event(), []

    def slow_verb(context: StageContext) -> StageOutcome:
        runs.append(context.run.run_id)
        building.set()
        context.progress(3, 10, "page")
        time.sleep(2.5)
        (context.output_dir / "report.html").write_text("story")
        return StageOutcome()

    results = {}

    def need(run_id: str) -> None:
        request = request_for(Stage.REPORT, store, {}, ReportConfig(), run_info(run_id, airflow_url="http://a"))
        request = request.model_copy(
            update={"run": request.run.model_copy(update={"airflow_run_id": run_id}), "submission_id": f"job-{run_id}"}
        )
        results[run_id] = execute(request, store, lambda stage: slow_verb)

    first = threading.Thread(target=need, args=("one",))
    first.start()
    assert building.wait(10)
    need("two")
    first.join()
    assert runs == ["one"]
    assert (results["one"].hit, results["two"].hit) == (False, True)
    assert results["one"].artifact == results["two"].artifact
    assert find_manifest(store, "report", results["one"].artifact.fingerprint) is not None
    shown = [
        json.loads(line.split(" ", 1)[1])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("ATHANOR_PROGRESS") and "waiting_for" in line
    ]
    assert shown[-1]["waiting_for"] == "run one, which builds it"
    assert (shown[-1]["done"], shown[-1]["total"], shown[-1]["unit"]) == (3, 10, "page")
