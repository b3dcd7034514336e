"""One attempt opens and closes the same things in the job's process and in its training workers."""

from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store, read_json
from stages.config.errors import ConfigError
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.heard import JOB_RECORD, worker_record
from stages.config.recipes import tiny
from stages.config.request import SourceEntry, SourceKind, StageRequest
from stages.job.attempt import opened_context
from stages.job.context import StageContext
from stages.tracking.tracker import NullTracker, Tracker
from tests.pipeline_records import request_for

IDENTITY = "f" * 64
GIVEN = SourceEntry(role="base_model", kind=SourceKind.MODEL, uri="/models/llama", digest="abc")
DOCUMENTS = SourceEntry(role="documents", kind=SourceKind.DATA, uri="/texts", digest="def")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def request_of_sft(store: Store) -> StageRequest:
    execution = ExecutionConfig(num_workers=2, gpus_per_worker=1)
    return request_for(Stage.SFT, store, {}, tiny().sft).model_copy(update={"execution": execution})


def opened(request: StageRequest, store: Store, *, rank: int | None, sources: tuple[SourceEntry, ...] = ()):
    return opened_context(request, store, fingerprint=IDENTITY, sources=sources, fence=None, rank=rank)


@pytest.mark.parametrize(
    ("rank", "record", "tracker", "counts_gpus"),
    [
        (None, JOB_RECORD, Tracker, True),
        (0, worker_record(0), Tracker, False),
        (1, worker_record(1), NullTracker, False),
    ],
)
def test_each_process_writes_its_own_record_and_only_the_job_counts_gpus(
    store: Store, request_of_sft: StageRequest, rank: int | None, record: str, tracker: type, counts_gpus: bool
):
    with opened(request_of_sft, store, rank=rank) as context:
        assert context.config == tiny().sft
        assert type(context.tracker) is tracker
        assert context.output_dir.is_dir()
        context.progress(1, 2)
    written = read_json(store, run_key(request_of_sft.run.run_id, Stage.SFT, record))
    assert written["done"] == 1
    assert (written["cost"]["gpu_seconds"] > 0) is counts_gpus
    assert not context.work_dir.exists()


class Ended(Tracker):
    """Notes how the MLflow run is ended."""

    ends: list[str]

    def start(self, **start: object) -> None:
        Ended.ends = []

    def fail(self, message: str) -> None:
        Ended.ends.append(message)

    def close(self) -> None:
        Ended.ends.append("left to the job")


@pytest.mark.parametrize(
    ("rank", "ends"), [(None, ["OSError: http://mlflow:5000 is gone"]), (0, ["left to the job"]), (1, [])]
)
def test_the_job_fails_the_mlflow_run_and_a_worker_leaves_that_to_the_job(
    store: Store, request_of_sft: StageRequest, monkeypatch: pytest.MonkeyPatch, rank: int | None, ends: list[str]
):
    monkeypatch.setattr("stages.job.attempt.Tracker", Ended)
    Ended.ends = []
    with (
        pytest.raises(OSError, match="is gone"),
        opened(request_of_sft, store, rank=rank) as context,
    ):
        raise OSError("http://user:pa55word@mlflow:5000 is gone")
    assert Ended.ends == ends
    assert not context.work_dir.exists()


def test_only_a_source_in_the_role_of_the_base_model_is_one(store: Store, request_of_sft: StageRequest):
    def has_base_model(*sources: SourceEntry) -> bool:
        with opened(request_of_sft, store, rank=None, sources=sources) as context:
            assert isinstance(context, StageContext)
            return context.has_base_model

    assert not has_base_model()
    assert not has_base_model(DOCUMENTS)
    assert has_base_model(DOCUMENTS, GIVEN)


def test_a_given_model_is_found_by_its_role_and_errors_name_its_field(
    store: Store, request_of_sft: StageRequest, tmp_path: Path
):
    given = SourceEntry(role="reward_model", kind=SourceKind.MODEL, uri=str(tmp_path / "nowhere"), digest="d")
    with opened(request_of_sft, store, rank=None, sources=(DOCUMENTS, given)) as context:
        assert context.has_given("reward_model")
        assert not context.has_given("reward_base")
        assert context.identity_of("reward", "reward_model") == context.content_of("reward_model") == "d"
        assert context.identity_of("reward") == ""
        with pytest.raises(ConfigError, match=r"^reward_model='.*nowhere' does not exist"):
            context.model_dir("reward", "reward_model")
        with pytest.raises(ConfigError, match="needs an input 'model'"):
            context.model_dir("model", "base_model")
