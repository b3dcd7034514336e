"""Which failure a job tells of when several workers fail at once."""

import errno
import os
import pickle
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.lease import LeaseLostError
from stages.artifacts.s3_client import StoreError
from stages.artifacts.store import read_json
from stages.config.errors import Category, ConfigError, DataError, ExitCode, StageError
from stages.config.graph import Stage
from stages.job.failures import describe_failure, record_failure
from stages.job.stopping import Stopped
from stages.tracking.trouble import explain
from tests.pipeline_records import request_for


class ActorDiedError(Exception):
    """Named like Ray's."""


class WorkerGroupError(Exception):
    def __init__(self, *failures: BaseException) -> None:
        super().__init__("workers failed")
        self.worker_failures = dict(enumerate(failures))


class WorkerHealthCheckFailedError(Exception):
    """How Ray Train tells of a worker that died."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = failure


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (RuntimeError("boom"), Category.INFRASTRUCTURE),
        (MemoryError(), Category.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), Category.OUT_OF_MEMORY),
        (ActorDiedError("The actor died unexpectedly"), Category.LOST),
        (ActorDiedError("killed due to the node running low on memory"), Category.OUT_OF_MEMORY),
        (StageError("disk full"), Category.INFRASTRUCTURE),
    ],
)
def test_exceptions_are_sorted_into_categories(error: BaseException, category: Category):
    assert describe_failure(error, Stage.SFT).category == category


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/model.safetensors"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
        StageError("a checkpoint could not be written: No space left on device", advice="Look at the store."),
    ],
)
def test_a_full_disk_is_named_with_the_folders_to_look_at(error: BaseException, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATHANOR_SCRATCH", "/large/disk")
    failure = describe_failure(error, Stage.SFT)
    assert failure.category == Category.INFRASTRUCTURE
    assert "a disk of the worker's machine is full" in failure.message
    assert "/large/disk (ATHANOR_SCRATCH)" in failure.advice


def test_an_unexpected_failure_tells_no_password_of_an_address():
    try:
        raise OSError("GET 'http://athanor:pa55word@mlflow:5000/api' failed")
    except OSError as error:
        failure = describe_failure(error, Stage.SFT)
    assert "http://mlflow:5000/api" in failure.message
    assert "http://mlflow:5000/api" in failure.detail
    assert "pa55word" not in failure.model_dump_json()


def test_an_mlflow_that_is_away_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://athanor:pa55word@mlflow:5000")
    away = RuntimeError("x")
    away.__cause__ = ConnectionRefusedError()
    assert explain(away) == "http://mlflow:5000 does not answer (ConnectionRefusedError)"
    assert explain(RuntimeError("at http://athanor:pa55word@mlflow:5000")) == "at http://mlflow:5000"


def test_the_death_of_a_node_is_told_with_its_address_and_rays_reason():
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tip: 10.0.0.3\n"
        "The actor died because its node has died. Node Id: 6cab\n"
        "\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"
    )
    assert describe_failure(ActorDiedError(text), Stage.SFT).message == (
        "a training worker died on 10.0.0.3: The actor died because its node has died, "
        "the actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"
    )


@pytest.mark.parametrize("kind", [StageError, ConfigError, DataError, LeaseLostError, Stopped, StoreError])
def test_what_a_worker_says_crosses_to_the_job_as_it_is(kind: type[StageError]):
    crossed = pickle.loads(pickle.dumps(kind("what", advice="do this")))  # noqa: S301 - as Ray does
    told = describe_failure(crossed, Stage.SFT)
    assert (told.category, told.message, told.advice) == (kind("what").category, "what", "do this")


def test_the_worker_that_knows_why_speaks_for_those_that_failed_with_it():
    peer = RuntimeError("gloo: connection closed by peer")
    assert describe_failure(WorkerGroupError(peer, ActorDiedError("died")), Stage.SFT).category == Category.LOST
    starved = describe_failure(WorkerGroupError(peer, MemoryError()), Stage.SFT)
    assert starved.category == Category.OUT_OF_MEMORY
    assert "execution.sft.micro_batch_size" in starved.advice
    died = describe_failure(WorkerGroupError(peer, WorkerHealthCheckFailedError(ActorDiedError("died"))), Stage.SFT)
    assert (died.category, died.message) == (Category.LOST, "a training worker died: died")
    told = describe_failure(WorkerGroupError(peer, DataError("no pairs", advice="Bring some.")), Stage.SFT)
    assert (told.category, told.message, told.advice) == (Category.DATA, "no pairs", "Bring some.")


@pytest.mark.parametrize("told", [b"", b"{", b'{"category": 7}', b'{"category": "gremlins", "message": "m"}'])
def test_what_a_worker_left_damaged_does_not_hide_why_the_job_failed(told: bytes, tmp_path: Path):
    store = open_store(tmp_path.as_uri())
    request = request_for(Stage.SFT, store, {})
    key = run_key(request.run.run_id, Stage.SFT, "failure.json")
    store.write_bytes(key, told)
    assert record_failure(store, request, ActorDiedError("died")) == ExitCode.INFRASTRUCTURE
    written = read_json(store, key)
    assert (written["category"], written["message"]) == ("lost", "a training worker died: died")
