"""The MLflow parent run against a real server: found again, never doubled, ended, and the way to the report."""

import httpx
import pytest

from operators.mlflow import (
    RUN_TAG,
    MlflowServer,
    end_parent_run,
    end_stage_runs,
    log_plan,
    open_parent_run,
    parent_artifact_page,
)
from stages.config.errors import ConfigError
from stages.config.request import RunInfo

pytestmark = pytest.mark.integration

RUN = RunInfo(run_id="manual__2026-01-01", name="story", experiment="parents", dag_id="llm_pipeline")


@pytest.fixture(autouse=True)
def tracking_uri(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return mlflow_server


def get(tracking_uri: str, run_id: str) -> dict:
    answer = httpx.get(f"{tracking_uri}/api/2.0/mlflow/runs/get", params={"run_id": run_id}, timeout=10)
    return answer.json()["run"]


def child_of(tracking_uri: str, parent: str, stage: str = "report", run: RunInfo = RUN) -> str:
    experiment = get(tracking_uri, parent)["info"]["experiment_id"]
    tags = {RUN_TAG: run.run_id, "lineage.stage": stage, "mlflow.parentRunId": parent}
    body = {"experiment_id": experiment, "tags": [{"key": key, "value": value} for key, value in tags.items()]}
    answer = httpx.post(f"{tracking_uri}/api/2.0/mlflow/runs/create", json=body, timeout=10)
    return answer.json()["run"]["info"]["run_id"]


def test_the_parent_is_opened_once_ended_and_opened_again(tracking_uri: str):
    parent = open_parent_run(RUN)
    assert parent is not None
    child = child_of(tracking_uri, parent)
    run = get(tracking_uri, parent)
    assert (run["info"]["status"], run["info"]["run_name"]) == ("RUNNING", "story")

    end_parent_run(RUN, succeeded=False)  # found by its tag, and told apart from its children
    assert get(tracking_uri, parent)["info"]["status"] == "FAILED"
    assert get(tracking_uri, child)["info"]["status"] == "RUNNING"

    assert open_parent_run(RUN) == parent
    assert get(tracking_uri, parent)["info"]["status"] == "RUNNING"
    end_parent_run(RUN.model_copy(update={"parent_run_id": parent}), succeeded=True)
    assert get(tracking_uri, parent)["info"]["status"] == "FINISHED"


def test_the_report_is_found_from_the_run_that_built_it(tracking_uri: str):
    parent = open_parent_run(RUN.model_copy(update={"run_id": "other"}))
    assert parent is not None
    experiment = get(tracking_uri, parent)["info"]["experiment_id"]
    page = parent_artifact_page(child_of(tracking_uri, parent), "report.html")
    assert page == f"{tracking_uri}/#/experiments/{experiment}/runs/{parent}/artifacts/report.html"


def test_a_run_without_a_parent_or_a_server_has_no_report_page(tracking_uri: str, monkeypatch, caplog):
    parent = open_parent_run(RUN)
    assert parent is not None
    assert parent_artifact_page(parent, "report.html") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert parent_artifact_page(parent, "report.html") is None
    end_parent_run(RUN, succeeded=True)
    assert "No link to report.html" in caplog.text
    assert "was not ended as FINISHED" in caplog.text


def test_child_runs_without_an_end_are_ended_and_the_others_left_alone(tracking_uri: str):
    parent = open_parent_run(RUN)
    assert parent is not None
    sft, ppo = (child_of(tracking_uri, parent, stage) for stage in ("sft", "ppo"))

    def status(run_id: str) -> str:
        return get(tracking_uri, run_id)["info"]["status"]

    end_stage_runs(RUN, "sft", killed=False)
    assert (status(sft), status(ppo), status(parent)) == ("FAILED", "RUNNING", "RUNNING")
    end_stage_runs(RUN, killed=True)
    assert (status(sft), status(ppo), status(parent)) == ("FAILED", "KILLED", "RUNNING")


def test_the_runs_of_an_experiment_with_a_name_that_is_cut_are_found(tracking_uri: str):
    run = RUN.model_copy(update={"experiment": "e" * 300, "run_id": "long-name"})
    parent = open_parent_run(run)
    assert parent is not None
    child = child_of(tracking_uri, parent, "sft", run=run)
    end_stage_runs(run, killed=True)
    assert get(tracking_uri, child)["info"]["status"] == "KILLED"
    with MlflowServer(tracking_uri) as server:
        assert server.find_parent_run(run) == parent


def test_a_deleted_experiment_is_told_with_the_way_out_before_anything_is_trained(tracking_uri: str):
    run = RUN.model_copy(update={"experiment": "deleted"})
    parent = open_parent_run(run)
    assert parent is not None
    experiment = get(tracking_uri, parent)["info"]["experiment_id"]
    httpx.post(f"{tracking_uri}/api/2.0/mlflow/experiments/delete", json={"experiment_id": experiment}, timeout=10)
    with pytest.raises(ConfigError, match=r"experiment 'deleted' \(id \d+\) was deleted") as caught:
        open_parent_run(run)
    assert f"mlflow experiments restore --experiment-id {experiment}" in caught.value.advice
    end_parent_run(run, succeeded=True)  # nothing to end, and no failure
    end_stage_runs(run, killed=True)


def test_a_plan_longer_than_a_description_may_be_is_cut_there_and_whole_as_a_file(tracking_uri: str):
    parent = open_parent_run(RUN.model_copy(update={"run_id": "planned"}))
    page = "x" * 20_000
    log_plan(RUN.model_copy(update={"parent_run_id": parent}), page=page, data="{}", summary="s", dry_run=True)
    run = get(tracking_uri, str(parent))
    note = next(tag["value"] for tag in run["data"]["tags"] if tag["key"] == "mlflow.note.content")
    assert "cut: 20000 characters" in note
    where = run["info"]["artifact_uri"].removeprefix("mlflow-artifacts:")
    assert httpx.get(f"{tracking_uri}/api/2.0/mlflow-artifacts/artifacts{where}/plan.md", timeout=10).text == page
