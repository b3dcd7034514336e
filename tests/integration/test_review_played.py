"""`llm_pipeline` in Airflow where a person reads made data and rejects it. A stand-in builds what the stages publish,
in the tasks themselves, so no Ray is needed."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.standard.operators.hitl import HITLOperator

from dags.llm_pipeline import llm_pipeline
from operators.operator import StageOperator
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store
from stages.config.forms import PipelineParams
from stages.config.request import StageRequest, run_folder
from tests.integration.stage_stand_in import build

pytestmark = pytest.mark.integration

ASKED: dict[str, Any] = {
    **PipelineParams.model_validate({}).model_dump(mode="json"),
    "recipe": "tiny",
    "alignment": "none",
    "last_stage": "curate",
    "synthesis": "distillation",
    "synthesis_sources": ["/asked.jsonl"],
    "generator": "http://127.0.0.1:9/v1",
    "review_made_data": True,
    "overrides": {"synthesize.generator.model": "m"},
}


def built(task: StageOperator, context: Any, store: Store, request: StageRequest) -> dict[str, Any]:
    build(request, store)
    return json.loads(store.read_bytes(run_key(request.run.run_id, request.stage, "result.json")))["artifact"]


def test_made_data_that_a_person_rejects_is_not_curated_and_the_run_fails(
    airflow_db: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARTIFACT_STORE", tmp_path.as_uri())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(StageOperator, "_without_job", built)
    tasks = ("synthesize", "gate_synthesize", "review", "curate", "close")

    def play(option: str) -> tuple[str, list[str], dict[str, Any]]:
        """The person answers at once: Airflow's test runner cannot wait."""
        answer = {"chosen_options": [option], "params_input": {"comment": "all wrong"}}
        event = {**answer, "responded_at": datetime.now(UTC), "responded_by_user": {"id": "7", "name": "ada"}}
        monkeypatch.setattr(HITLOperator, "execute", lambda task, context: task.execute_complete(context, event))
        run: Any = llm_pipeline.test(run_conf=ASKED)
        states = {ti.task_id: str(ti.state) for ti in run.get_task_instances()}
        key = f"runs/{run_folder(llm_pipeline.dag_id, run.run_id)}/review/review.json"
        record = json.loads(open_store(tmp_path.as_uri()).read_bytes(key))["answer"]
        return str(run.state), [states[task] for task in tasks], record

    state, states, record = play("Reject")
    assert (state, states) == ("failed", ["success", "success", "failed", "upstream_failed", "failed"])
    assert (record["verdict"], record["by"], record["comment"]) == ("rejected", "ada", "all wrong")
