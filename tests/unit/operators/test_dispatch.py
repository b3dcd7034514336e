"""What a task carries through its deferral, and how a job's end becomes the task's, without a Ray cluster."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from operators.dispatch import Carried, of_mapped, submission_log, within_memory
from operators.failures import StageOutOfMemory, StageOutOfMemoryForGood
from operators.operator import StageOperator
from operators.ray.submission import STATE_KEY, Submission
from stages.artifacts.addresses import artifact_uri, open_store, run_key
from stages.artifacts.store import Store, write_json
from stages.config.errors import Category
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, Failure, RunInfo, StageResult
from tests.task_state import Memory

# As the operator and its trigger left it in Airflow's database before `Carried` was a class.
OLD_CARRY: dict[str, Any] = {
    "run": {
        "run_id": "manual__1",
        "name": "tiny",
        "dag_id": "llm_pipeline",
        "airflow_run_id": "manual__1",
        "airflow_url": "http://127.0.0.1:8080/dags/llm_pipeline/runs/manual__1",
        "experiment": "athanor",
        "parent_run_id": None,
    },
    "submission": {
        "submission_id": "athanor-sft-1f0c2a9d4be7-1",
        "generation": 1,
        "try_number": 1,
        "consumed": False,
        "taken_in": None,
    },
    "reattached": False,
    "max_retries": 2,
    "micro_batch_size": 8,
    "links": {"_link_RayJobLink": "http://127.0.0.1:8265/#/jobs/athanor-sft-1f0c2a9d4be7-1"},
}
OLD_EVENT: dict[str, Any] = {
    "submission_id": "athanor-sft-1f0c2a9d4be7-1",
    "status": "SUCCEEDED",
    "message": "",
    "error_type": None,
    "exit_code": 0,
    "mlflow_run_id": None,
    "mlflow_experiment_id": None,
    "ended_at": 1764370000.0,
    "carry": OLD_CARRY,
}
MODEL = ArtifactRef(kind="sft-model", uri="file:///store/artifacts/sft-model/f", fingerprint="f", digest="d")


class TaskInstance:
    dag_id, run_id, task_id, map_index, try_number, start_date = "llm_pipeline", "manual__1", "sft", -1, 1, None

    def __init__(self) -> None:
        self.xcoms: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcoms[key] = value


@pytest.fixture
def context() -> dict[str, Any]:
    outlet_events: dict[Any, Any] = {}
    return {
        "ti": TaskInstance(),
        "dag_run": SimpleNamespace(clear_number=0),
        "task_state_store": Memory(),
        "outlet_events": outlet_events,
    }


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ARTIFACT_STORE", tmp_path.as_uri())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return open_store(tmp_path.as_uri())


def resume(context: dict[str, Any], event: dict[str, Any]) -> Any:
    operator = StageOperator(stage=Stage.SFT, outlets=[])
    return operator.resume_execution("execute_complete", {"event": event}, context)


def test_a_task_that_an_earlier_version_deferred_resumes(store: Store, context: dict[str, Any]):
    model = MODEL.model_copy(update={"uri": artifact_uri(store, MODEL.kind, MODEL.fingerprint)})
    result = StageResult(stage=Stage.SFT, hit=False, artifact=model, wall_seconds=1.0)
    write_json(store, run_key("manual__1", Stage.SFT, "result.json"), result.model_dump(mode="json"))
    assert resume(context, OLD_EVENT) == model.model_dump(mode="json")
    record = context["task_state_store"].values[STATE_KEY]
    assert (record["submission_id"], record["consumed"], record["taken_in"]) == ("athanor-sft-1f0c2a9d4be7-1", True, 0)


@pytest.mark.parametrize(("micro_batch_size", "raised"), [(8, StageOutOfMemory), (1, StageOutOfMemoryForGood)])
def test_what_is_carried_decides_whether_out_of_memory_is_final(
    store: Store, context: dict[str, Any], micro_batch_size: int, raised: type[StageOutOfMemory]
):
    failure = Failure(category=Category.OUT_OF_MEMORY, message="out of memory")
    write_json(store, run_key("manual__1", Stage.SFT, "failure.json"), failure.model_dump(mode="json"))
    carry = {**OLD_CARRY, "micro_batch_size": micro_batch_size}
    with pytest.raises(StageOutOfMemory) as caught:
        resume(context, {**OLD_EVENT, "status": "FAILED", "exit_code": 5, "carry": carry})
    assert type(caught.value) is raised
    assert submission_log(context).out_of_memory_failures() == 1


def test_what_is_carried_survives_json_and_has_the_form_that_earlier_versions_read():
    carried = Carried.from_json(OLD_CARRY)
    assert carried.submission == Submission("athanor-sft-1f0c2a9d4be7-1", 1, 1)
    assert carried.to_json() == OLD_CARRY
    assert Carried.from_json(json.loads(json.dumps(carried.to_json()))) == carried


def test_the_micro_batch_is_halved_for_each_failure_and_never_below_one(context: dict[str, Any]):
    log, execution = submission_log(context), ExecutionConfig(micro_batch_size=6)
    sizes = []
    for _ in range(4):
        sizes.append(within_memory(execution, stage=Stage.SFT, log=log).micro_batch_size)
        log.count_out_of_memory()
    assert sizes == [6, 3, 1, 1]


def test_instances_of_a_mapped_task_have_folders_of_their_own():
    run = RunInfo(run_id="r", name="n")
    assert [of_mapped(run, index).run_id for index in (None, -1, 0, 3)] == ["r", "r", "r.0", "r.3"]


def test_two_airflows_that_share_a_cluster_never_ask_for_the_same_job(monkeypatch: pytest.MonkeyPatch):
    """Their scheduled runs have the same ids; get-or-create would give one of them the other's job."""
    asked = set()
    for name in ("staging", "production"):
        monkeypatch.setenv("ATHANOR_AIRFLOW_ID", name)
        context = {"ti": TaskInstance(), "task_state_store": Memory()}
        asked.add(submission_log(context).open(1, 1).submission_id)
    assert len(asked) == 2
