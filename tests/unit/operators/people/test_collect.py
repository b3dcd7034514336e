"""The first task of `collect_preferences`: what it stores for the stage `respond`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from operators.failures import StageConfigFailed
from operators.people.collect import request_key, start_collection
from operators.prepare import load_config
from stages.artifacts.addresses import open_store
from stages.config.graph import Stage
from stages.config.request import RunInfo, StageRequest
from tests.pipeline_records import publish_artifact


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An SFT model that Athanor made, in the store of the environment; no MLflow."""
    monkeypatch.setenv("ARTIFACT_STORE", tmp_path.as_uri())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (folder := tmp_path / "files").mkdir()
    (folder / "file").write_text("x")
    store = open_store(tmp_path.as_uri())
    tokens, _ = publish_artifact(store, Stage.TOKENIZE, {}, folder)
    return publish_artifact(store, Stage.SFT, {"tokens": tokens}, folder)[0].uri


def start(tmp_path: Path, **params: Any) -> tuple[RunInfo, StageRequest]:
    ti = SimpleNamespace(dag_id="collect_preferences", run_id="manual-1", log_url="http://airflow/dags/x/tasks/resolve")
    run = RunInfo.model_validate(start_collection({"ti": ti, "params": params}))
    stored = open_store(tmp_path.as_uri()).read_bytes(request_key(run.run_id))
    return run, StageRequest.model_validate_json(stored)


def test_responses_are_sampled_with_the_resources_of_the_recipe(tmp_path: Path, model: str) -> None:
    _, request = start(tmp_path, model=model)
    assert request.execution.gpus_per_worker == 0
    run, request = start(tmp_path, model=model, recipe="llama_1b")
    assert (request.execution.num_workers, request.execution.gpus_per_worker) == (1, 1)
    assert load_config(open_store(tmp_path.as_uri()), run).stage_execution(Stage.RESPOND) == request.execution


def test_an_override_gives_the_stage_a_gpu_and_a_wrong_one_is_named(tmp_path: Path, model: str) -> None:
    _, request = start(tmp_path, model=model, overrides={"execution.respond.gpus_per_worker": 2})
    assert request.execution.gpus_per_worker == 2
    with pytest.raises(StageConfigFailed, match=r"execution\.respond\.gpu_per_worker' does not exist"):
        start(tmp_path, model=model, overrides={"execution.respond.gpu_per_worker": 1})


def test_the_resources_do_not_change_what_is_asked(tmp_path: Path, model: str) -> None:
    _, small = start(tmp_path, model=model)
    _, large = start(tmp_path, model=model, recipe="llama_1b")
    assert (small.config, small.inputs) == (large.config, large.inputs)


@pytest.mark.parametrize("model", ["file:///etc/artifacts/sft-model/1", "file:///proc/self/root/etc/artifacts/x/1"])
def test_no_model_is_looked_for_in_a_closed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("ARTIFACT_STORE", tmp_path.as_uri())
    with pytest.raises(StageConfigFailed, match="not open to sources"):
        start(tmp_path, model=model)


def test_a_prompt_that_no_file_can_hold_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(StageConfigFailed, match="prompts: it holds half a character"):
        start(tmp_path, model=model, prompts=["What is \ud800?"])
