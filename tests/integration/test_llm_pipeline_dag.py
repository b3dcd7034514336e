"""`llm_pipeline` as a whole in Airflow, with real Ray and MLflow servers; the stages are played by a stand-in."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from dags.llm_pipeline import llm_pipeline
from operators.gates import GateOperator
from operators.operator import StageOperator
from operators.ray.hook import RayJobHook
from stages.config.forms import PipelineParams
from stages.config.gates import gate_name
from stages.config.graph import GRAPH, gated_stages, pipeline_stages
from stages.config.request import run_folder
from tests.servers import RayServer

pytestmark = pytest.mark.integration

DEFAULTS = PipelineParams.model_validate({}).model_dump(mode="json")
STAND_IN = Path(__file__).with_name("stage_stand_in.py")


class Run:
    """A finished DAG run, as plain data."""

    def __init__(self, dag_run: Any) -> None:
        self.run_id, self.state = dag_run.run_id, str(dag_run.state)
        self.tasks = {ti.task_id: ti for ti in dag_run.get_task_instances()}
        self.states = {task_id: str(ti.state) for task_id, ti in self.tasks.items()}


@pytest.fixture(scope="module")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tmp_path_factory.mktemp("store").as_uri()


@pytest.fixture
def play(
    airflow_db: None, ray_head: RayServer, mlflow_server: str, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Run the DAG with the stand-in behaving as told; parameters are the form's."""
    parts = urlsplit(ray_head.url)
    connection = {"conn_type": "ray_jobs", "host": parts.hostname, "port": parts.port, "password": ray_head.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    monkeypatch.setenv("ARTIFACT_STORE", store_uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)

    def run(behaviour: str, **params: Any) -> Run:
        command = f"{shlex.quote(sys.executable)} {shlex.quote(str(STAND_IN))} {{config_uri}}"
        for task in llm_pipeline.tasks:
            if isinstance(task, StageOperator):
                of_task = "gate" if isinstance(task, GateOperator) else behaviour
                monkeypatch.setattr(task, "entrypoint", f"{command} {of_task}")
        # All fields, because Airflow's test runner keeps the values of one run as the defaults of the next.
        return Run(llm_pipeline.test(run_conf={**DEFAULTS, "recipe": "tiny", **params}))

    return run


def jobs_of(run: Run) -> int:
    """How many Ray jobs the run started."""
    hook = RayJobHook()
    found = hook._request("GET", "/api/jobs/", read=list, what="list jobs")
    return sum((job.get("metadata") or {}).get("airflow.run_id") == run.run_id for job in found)


def parent_status(mlflow_server: str, run: Run) -> str:
    return parent_run(mlflow_server, run)["info"]["status"]


def parent_run(mlflow_server: str, run: Run) -> dict[str, Any]:
    tag = run_folder(llm_pipeline.dag_id, run.run_id)
    experiment = httpx.get(
        f"{mlflow_server}/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": "athanor"}, timeout=10
    ).json()["experiment"]["experiment_id"]
    body = {"experiment_ids": [experiment], "filter": f"tags.`athanor.run_id` = '{tag}'"}
    (found,) = httpx.post(f"{mlflow_server}/api/2.0/mlflow/runs/search", json=body, timeout=10).json()["runs"]
    return found


def test_a_run_without_alignment_skips_what_it_does_not_need_and_its_repetition_builds_nothing(
    play: Callable[..., Run], mlflow_server: str
):
    params = {"alignment": "none", "last_stage": "evaluate"}
    first = play("succeed", **params)
    done, skipped = (
        {"resolve", "plan", "curate", "tokenize", "pretrain", "sft", "evaluate", "close"},
        {"reward", "gold", "ppo", "dpo"},
    )
    expected = {
        **dict.fromkeys(done, "success"),
        **dict.fromkeys(skipped | {"review", "approve", "convert", "promote", "report"}, "skipped"),
        **{stage.value: "skipped" for stage, spec in GRAPH.items() if spec.asked_by},
    }
    expected |= {gate_name(stage): expected[stage] for stage in gated_stages()}
    assert (first.state, first.states) == ("success", expected)
    assert jobs_of(first) == 5 + 2  # and the gates of two models
    assert parent_status(mlflow_server, first) == "FINISHED"

    again = play("succeed", **params)
    assert (again.state, again.states) == ("success", expected)
    assert jobs_of(again) == 1  # curate: only its job can see whether the outside documents have changed


def test_a_dry_run_ends_green_after_its_plan_and_spends_nothing(
    play: Callable[..., Run], mlflow_server: str, store_uri: str
):
    run = play("succeed", dry_run=True, seed=3)
    expected = {
        **dict.fromkeys((*pipeline_stages(), *map(gate_name, gated_stages()), "review", "approve"), "skipped"),
        **dict.fromkeys(("resolve", "plan", "close"), "success"),
    }
    assert (run.state, run.states) == ("success", expected)
    assert jobs_of(run) == 0
    took = run.tasks["plan"].end_date - run.tasks["plan"].start_date
    assert took.total_seconds() < 2 + 3  # two for the plan, the rest for Airflow's test runner on a busy machine
    found = parent_run(mlflow_server, run)
    tags = {tag["key"]: tag["value"] for tag in found["data"]["tags"]}
    assert (found["info"]["status"], tags["athanor.dry_run"]) == ("FINISHED", "true")
    assert " of 10 stages run: " in tags["athanor.plan"]
    assert "| pretrain | run |" in tags["mlflow.note.content"]
    listed = httpx.get(
        f"{mlflow_server}/api/2.0/mlflow/artifacts/list", params={"run_id": found["info"]["run_id"]}, timeout=10
    ).json()
    assert {file["path"] for file in listed["files"]} == {"plan.md", "plan.json"}


def test_a_failed_stage_makes_the_run_red_and_nothing_after_it_runs(play: Callable[..., Run], mlflow_server: str):
    run = play("fail_at:sft", alignment="dpo", overrides={"sft.num_epochs": 2})
    after = ("reward", "ppo", "dpo", "evaluate", "promote", "report")
    assert run.state == "failed"
    assert run.states["sft"] == "failed"
    assert run.tasks["sft"].try_number == 1  # bad data is never retried
    assert {run.states[task] for task in after} == {"upstream_failed"}
    assert run.states["gate_sft"] == "upstream_failed"
    assert run.states["close"] == "failed"
    assert parent_status(mlflow_server, run) == "FAILED"


def test_a_failed_gate_makes_the_run_red_and_the_run_after_it_passes_over_it(
    play: Callable[..., Run], mlflow_server: str
):
    params = {"alignment": "none", "last_stage": "pretrain", "seed": 4}
    params["overrides"] = {"gates.bounds": ["pretrain: eval/loss < 1", "curate: curate/documents_kept > 2"]}
    run = play("succeed", **params)
    assert run.state == "failed"
    assert (run.states["pretrain"], run.states["gate_pretrain"]) == ("success", "failed")
    assert (run.states["gate_curate"], run.states["close"]) == ("success", "failed")
    assert run.tasks["gate_pretrain"].try_number == 1
    assert parent_status(mlflow_server, run) == "FAILED"
    params |= {"override_gates": ["pretrain"], "override_reason": "the stand-in measures no loss"}
    again = play("succeed", **params)
    assert (again.state, again.states["gate_pretrain"]) == ("success", "success")
    tags = {tag["key"]: tag["value"] for tag in parent_run(mlflow_server, again)["data"]["tags"]}
    assert "the stand-in measures no loss" in tags["athanor.gate_pretrain"]
    assert tags["athanor.gate_curate"].startswith("passed: ")


def test_a_failed_gate_stops_what_reads_its_model_and_nothing_beside_it(play: Callable[..., Run]):
    bounds = {"gates.bounds": ["reward: eval/reward_accuracy > 0.9"]}
    run = play("succeed", alignment="both", seed=5, overrides=bounds)
    assert (run.state, run.states["reward"], run.states["gate_reward"]) == ("failed", "success", "failed")
    after = ("ppo", "gate_ppo", "evaluate", "gate_evaluate", "promote", "report")
    assert {run.states[task] for task in after} == {"upstream_failed"}
    assert (run.states["dpo"], run.states["gate_dpo"]) == ("success", "success")


def test_a_failure_that_may_pass_is_retried_as_often_as_the_run_allows(play: Callable[..., Run]):
    run = play("fail_once:infrastructure", last_stage="curate", seed=1)
    assert (run.state, run.tasks["curate"].try_number, jobs_of(run)) == ("success", 2, 2)
    never = play("fail:infrastructure", last_stage="curate", seed=2, overrides={"execution.curate.max_retries": 0})
    assert (never.state, never.tasks["curate"].try_number, jobs_of(never)) == ("failed", 1, 1)


def test_wrong_input_ends_the_run_in_seconds_before_any_ray_job(play: Callable[..., Run]):
    started = time.monotonic()
    run = play("succeed", overrides={"sft.optimizer.learning_rat": 1})
    assert run.state == "failed"
    assert run.tasks["resolve"].try_number == 1
    assert {run.states[stage] for stage in pipeline_stages()} == {"upstream_failed"}
    assert jobs_of(run) == 0
    assert time.monotonic() - started < 30
