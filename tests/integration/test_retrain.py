"""A retraining for real: a champion, a file in the watched prefix, a candidate that descends from the champion.

Airflow's own part between the pieces (scheduler, triggerer) is left out: the watcher's loop, `retrain` up to the
trigger, and the pipeline that it would start run here one after the other.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dags.evaluate_model import evaluate_model
from dags.llm_pipeline import llm_pipeline
from dags.retrain import retrain
from operators.gates import GateOperator
from operators.operator import StageOperator
from operators.retrain import Skip, decide, record
from operators.watcher import PrefixTrigger
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.manifests import fetch, read_manifest
from stages.config.forms import PipelineParams, RetrainParams
from stages.config.graph import Stage
from stages.config.request import StageResult, run_folder
from stages.lineage.graph import ancestors
from tests.raw_text import a_document_of, jsonl, prose
from tests.servers import ray_server
from tests.warm_jobs import warm_jobs

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

DEFAULTS = PipelineParams.model_validate({}).model_dump(mode="json")
QUICK = {"promote.margin": 1e6, "promote.guards": [], "min_new_bytes": 1000}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("raw")


@pytest.fixture(scope="module")
def store_uri(
    airflow_db: None, mlflow_server: str, raw: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    uri = tmp_path_factory.mktemp("store").as_uri()
    shared = {"MLFLOW_TRACKING_URI": mlflow_server, "ARTIFACT_STORE": uri}
    with (
        pytest.MonkeyPatch.context() as patch,
        ray_server(environment=shared) as ray,
        warm_jobs(tmp_path_factory.mktemp("jobs")) as entrypoint_of,
    ):
        for task in (*llm_pipeline.tasks, *evaluate_model.tasks):
            if isinstance(task, StageOperator):
                module = "stages.gate" if isinstance(task, GateOperator) else "stages.__main__"
                patch.setattr(task, "entrypoint", entrypoint_of(module))
        for name, value in {**shared, "ATHANOR_RETRAIN_WATCH": raw.as_uri()}.items():
            patch.setenv(name, value)
        parts = urlsplit(ray.url)
        connection = {"conn_type": "ray_jobs", "host": parts.hostname, "port": parts.port, "password": ray.token}
        patch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
        yield uri


def play(store_uri: str, **params: Any) -> dict[Stage, StageResult]:
    dag_run = llm_pipeline.test(run_conf={**DEFAULTS, **params})
    assert str(dag_run.state) == "success", {ti.task_id: ti.state for ti in dag_run.get_task_instances()}
    store, run_id = open_store(store_uri), run_folder(llm_pipeline.dag_id, dag_run.run_id)
    keys = {stage: run_key(run_id, stage, "result.json") for stage in Stage}
    return {s: StageResult.model_validate_json(store.read_bytes(key)) for s, key in keys.items() if store.exists(key)}


def next_event(raw: Path) -> dict[str, Any]:
    async def wait() -> dict[str, Any]:
        async for event in PrefixTrigger(raw.as_uri(), 0.1).run():
            return event.payload
        raise AssertionError

    return asyncio.run(asyncio.wait_for(wait(), 20))


def decided() -> dict[str, Any]:
    """What the DAG's `decide` hands to the pipeline; the tasks after it are only marked."""
    dag_run = retrain.test(run_conf={"run_name": "tiny", "overrides": QUICK}, mark_success_pattern="train|remember")
    assert str(dag_run.state) == "success"
    (decide_task,) = (ti for ti in dag_run.get_task_instances() if ti.task_id == "decide")
    return decide_task.xcom_pull(task_ids="decide")


@pytest.fixture(scope="module")
def first(store_uri: str) -> dict[Stage, StageResult]:
    return play(
        store_uri,
        recipe="tiny",
        run_name="tiny",
        alignment="dpo",
        train_reward=True,
        last_stage="promote",
        overrides=QUICK,
    )


def test_a_champion_is_measured_again(store_uri: str, first: dict[Stage, StageResult]) -> None:
    from mlflow import MlflowClient

    def evaluate(**params: Any) -> str:
        return str(evaluate_model.test(run_conf={"recipe": "tiny", **params}).state)

    champion = "models:/tiny-aligned@champion"
    reward = first[Stage.REWARD].artifact
    assert evaluate(model=champion, reward=reward.uri, overrides={"evaluate.max_prompts": 3}) == "success"
    tags = MlflowClient().get_model_version_by_alias("tiny-aligned", "champion").tags
    before = read_manifest(first[Stage.EVALUATE].artifact)
    assert tags["evaluation.reward_fingerprint"] == reward.fingerprint
    assert tags["evaluation.data_digest"] == first[Stage.TOKENIZE].artifact.digest
    assert float(tags["eval/perplexity"]) == pytest.approx(before.metrics["dpo/eval/perplexity"])
    assert evaluate(model="/no/such/model", data=first[Stage.TOKENIZE].artifact.uri) == "failed"


def test_a_file_in_the_watched_prefix_ends_in_a_candidate_that_descends_from_the_champion(
    store_uri: str, first: dict[Stage, StageResult], raw: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    champion = MlflowClient().get_model_version_by_alias("tiny-aligned", "champion")
    assert champion.tags["lineage.fingerprint"] == first[Stage.DPO].artifact.fingerprint
    assert decide(RetrainParams(run_name="tiny")) == Skip(f"{raw.as_uri()} is empty.")

    seen = a_document_of(fetch(first[Stage.CURATE].artifact, tmp_path))
    texts = [seen, *(prose(seed) for seed in range(20))]
    (raw / "monday.jsonl").write_text(jsonl(texts))
    assert next_event(raw)["objects"] == 1

    verdict = decided()
    assert verdict["conf"]["base_model"] == f"models:/tiny-aligned/{champion.version}"
    second = play(store_uri, **verdict["conf"])
    record("tiny", verdict["watermark"])

    ledger = read_manifest(second[Stage.CURATE].artifact).ledger["documents"]
    assert ledger["dropped"]["exact_duplicates/seen_before"]["documents"] == 1
    assert second[Stage.CURATE].metrics["curate/documents_in"] <= len(texts) + 60  # the planted ones come along
    pretrain = read_manifest(second[Stage.PRETRAIN].artifact)
    assert {entry.role: entry.fingerprint for entry in pretrain.inputs}["base_model"] == (
        first[Stage.DPO].artifact.fingerprint
    )
    candidate = MlflowClient().get_model_version_by_alias("tiny-base", "candidate")
    assert candidate.tags["lineage.parent.base_model"] == first[Stage.DPO].artifact.fingerprint
    aligned = MlflowClient().get_model_version_by_alias("tiny-aligned", "candidate")
    assert aligned.tags["lineage.fingerprint"] == second[Stage.DPO].artifact.fingerprint
    assert aligned.tags["lineage.started_from"] == champion.tags["lineage.fingerprint"]
    family = {node.id for node in ancestors([aligned.tags["artifact.uri"]]).nodes}
    assert {first[stage].artifact.fingerprint for stage in (Stage.DPO, Stage.CURATE, Stage.PRETRAIN)} <= family

    assert isinstance(decide(RetrainParams(run_name="tiny")), Skip)
    # Touched, not changed: the listing is new, the text is not, and the run ends green after curation.
    (raw / "tuesday.jsonl").write_text((raw / "monday.jsonl").read_text())
    assert set(play(store_uri, **decided()["conf"])) == {Stage.CURATE}
