"""Stored records that others may have written: read as what they are, or refused in a sentence."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.failures import StageFailed
from operators.given import data_of, given_artifact
from operators.ray.jobs import JobStatus
from operators.ray.watch import Outcome
from operators.results import explain_failure, read_result
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.folder import FileStore
from stages.artifacts.lease import Generation, LeaseTimes, Owner, acquire
from stages.artifacts.manifests import fetch, find_intact, load_manifest, read_file
from stages.config.errors import Category, ConfigError, DataError, ExitCode
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.heard import JOB_RECORD
from stages.config.recipes import tiny
from stages.config.request import ArtifactRef, Cost, Failure, Manifest, RunInfo, StageRequest, StageResult
from stages.job.context import Verb
from stages.job.progress import Progress, read_progress
from stages.job.runner import run_stage
from stages.tracking.events import FailEvent, FileEvent, MetricsEvent, StartEvent, to_line
from stages.tracking.spool import SPOOL_NAME, attached, read_spool
from tests.fuzz.cases import cases, confined, damaged_records, outcome
from tests.unit.artifacts.test_manifests import make_artifact

_IDENTITY = "f" * 64
_RUN = RunInfo(run_id="run", name="nightly", dag_id="llm_pipeline", airflow_run_id="run")
_OWNER = Owner(run_id="run", run_name="nightly", airflow_url="", submission_id="job-1", host="h", pid=1, since="now")
_REF = ArtifactRef(kind="tokens", uri=f"file:///store/artifacts/tokens/{_IDENTITY}", fingerprint=_IDENTITY, digest="d")
_RESULT = StageResult(stage=Stage.TOKENIZE, hit=False, artifact=_REF, metrics={"x": 1.0}, cost=Cost())
_FAILURE = Failure(category=Category.DATA, message="no text", advice="Give some.", detail="")
_PROGRESS = {"done": 1, "total": 2, "unit": "step", "reached": {"step": 1.0}, "cost": Cost().model_dump()}


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    found = open_store((tmp_path / "inside" / "store").as_uri())
    assert isinstance(found, FileStore)
    return found


def _put(store: FileStore, key: str, data: bytes) -> None:
    path = store.root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _document(record: Any) -> Any:
    return json.loads(record.model_dump_json())


def test_any_manifest_is_read_or_refused(store: FileStore, tmp_path: Path) -> None:
    ref = make_artifact(store, tmp_path)
    key = f"artifacts/tokens/{_IDENTITY}"
    original = (store.root / key / "manifest.json").read_bytes()
    neighbour = store.root / "artifacts" / "tokens" / "neighbour" / "a.txt"
    neighbour.parent.mkdir(parents=True)
    neighbour.write_text("theirs")

    @cases
    @given(damaged_records(json.loads(original)))
    def check(data: bytes) -> None:
        uses = (
            lambda: load_manifest(store, key),
            lambda: read_file(ref, "a.txt"),
            lambda: fetch(ref, tmp_path / "inside" / "cache"),
            lambda: given_artifact(ref.uri, field="base_model"),
            lambda: data_of(ref.uri, kind="curated", field="previous_data"),
            lambda: find_intact(store, "tokens", _IDENTITY),
        )
        for use in uses:
            _put(store, f"{key}/manifest.json", data)
            _put(store, f"{key}/a.txt", b"alpha")
            _put(store, f"{key}/inner/b.bin", bytes(range(256)))
            with confined(tmp_path / "inside"):
                found = outcome(use)
            if isinstance(found, Manifest):
                assert (found.kind, found.fingerprint) == ("tokens", _IDENTITY)
                found.model_dump_json()
        assert neighbour.read_text() == "theirs"

    check()


def test_any_request_of_a_stage_ends_as_config_or_data(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "ARTIFACT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "inside" / "scratch"))
    config = tiny().tokenize.model_dump(mode="json")
    request = StageRequest(
        stage=Stage.TOKENIZE,
        run=_RUN,
        store_uri=store.root_uri,
        config=config,
        execution=ExecutionConfig(),
        inputs={"curated": _REF.model_copy(update={"kind": "curated"})},
    )

    def no_work(stage: Stage) -> Verb:
        raise ConfigError("the work was reached", advice="")

    @cases
    @given(damaged_records(_document(request)))
    def check(data: bytes) -> None:
        _put(store, "runs/run/tokenize/config.json", data)
        with confined(tmp_path / "inside"):
            code = run_stage(f"{store.root_uri}/runs/run/tokenize/config.json", no_work)
        assert code in (ExitCode.CONFIG, ExitCode.DATA), code

    check()


@pytest.mark.parametrize("name", ["result.json", "failure.json"])
def test_any_result_or_failure_is_told_to_airflow_without_a_retry(store: FileStore, tmp_path: Path, name: str) -> None:
    record = _RESULT if name == "result.json" else _FAILURE
    status = JobStatus.SUCCEEDED if name == "result.json" else JobStatus.FAILED
    ended = Outcome(submission_id="job-1", status=status, exit_code=ExitCode.DATA)

    def read() -> Any:
        if name == "failure.json":
            return explain_failure(Stage.TOKENIZE, run=_RUN, store=store, outcome=ended, max_retries=2)
        try:
            return read_result(Stage.TOKENIZE, run=_RUN, store=store, outcome=ended, max_retries=2)
        except StageFailed as failed:
            return failed

    @cases
    @given(damaged_records(_document(record)))
    def check(data: bytes) -> None:
        _put(store, f"runs/run/tokenize/{name}", data)
        with confined(tmp_path / "inside"):
            found = outcome(read)
        if isinstance(found, StageFailed):
            well_formed = _is_failure(data) if name == "failure.json" else False
            assert well_formed or not found.retryable, found
        else:
            assert isinstance(found, StageResult | DataError)

    check()


def _is_failure(data: bytes) -> bool:
    """Whether a damaged `failure.json` is one still: another known category is only another reason."""
    try:
        return Failure.model_validate_json(data).category in set(Category)
    except ValueError:
        return False


def test_any_progress_record_lets_a_stage_go_on(store: FileStore, tmp_path: Path) -> None:
    @cases
    @given(damaged_records(_PROGRESS))
    def check(data: bytes) -> None:
        _put(store, f"runs/run/tokenize/{JOB_RECORD}", data)
        _put(store, "runs/run/tokenize/workers/0.json", data)
        with confined(tmp_path / "inside"):
            read_progress(store, "run", Stage.TOKENIZE)
            progress = Progress(store, "run", Stage.TOKENIZE)
            progress(1, 2)
            assert math.isfinite(progress.cost().wall_seconds)
            progress.close()

    check()


def test_any_spool_is_believed_line_by_line(store: FileStore, tmp_path: Path) -> None:
    request = StageRequest(
        stage=Stage.TOKENIZE, run=_RUN, store_uri=store.root_uri, config={}, execution=ExecutionConfig()
    )
    events = (
        StartEvent(fingerprint=_IDENTITY, params={"a": "b"}, tags={"git.commit": "c0ffee"}, time=1),
        MetricsEvent(step=3, values={"loss": 1.5}, time=1),
        FileEvent(name="a.json", content=base64.b64encode(b"{}").decode()),
        FailEvent(message="no text", time=1),
    )
    key = run_key("run", Stage.TOKENIZE, SPOOL_NAME)
    lines = st.one_of(*(damaged_records(json.loads(to_line(event))) for event in events))

    @cases
    @given(st.one_of(st.just(request.model_dump_json().encode()), damaged_records(_document(request))), lines)
    def check(first: bytes, line: bytes) -> None:
        _put(store, key, b"\n".join([first, line, to_line(events[1])]))
        with confined(tmp_path / "inside"):
            left = outcome(lambda: read_spool(store, key))
            if isinstance(left, DataError):
                return
            assert left.request.run.run_id == "run"
            assert left.events[-1] == events[1]
            for event in left.events:
                if isinstance(event, FileEvent):
                    assert isinstance(outcome(lambda event=event: attached(event, None)), bytes)

    check()


def test_any_lease_is_waited_for_or_taken_over(store: FileStore, tmp_path: Path) -> None:
    times = LeaseTimes(beat_seconds=0.001, stale_seconds=0.005, poll_seconds=0.001)
    record = _document(Generation(token="t", owner=_OWNER))

    @cases
    @given(damaged_records(record), st.sampled_from([b"", b"beat", b"\xff\xfe"]))
    def check(data: bytes, beat: bytes) -> None:
        store.delete(f"leases/{_IDENTITY}")
        _put(store, f"leases/{_IDENTITY}/1.json", data)
        _put(store, f"leases/{_IDENTITY}/1.beat", beat)
        other = _OWNER.model_copy(update={"submission_id": "other-1"})
        with confined(tmp_path / "inside"):
            lease = acquire(store, kind="tokens", fingerprint=_IDENTITY, owner=other, times=times)
        assert lease is not None
        assert lease.fence.number == 2

    check()
