"""The whole story for real: recipe `tiny` through Airflow, Ray, MLflow and S3, from raw text to registered models."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dags.llm_pipeline import llm_pipeline
from operators.ray.hook import RayJobHook
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.manifests import fetch, read_manifest
from stages.config.forms import PipelineParams
from stages.config.gate_records import GateRecord, Outcome, gate_key
from stages.config.gates import gate_name
from stages.config.graph import GRAPH, Stage, gated_stages
from stages.config.request import ArtifactRef, StageResult, run_folder
from stages.config.seals import SEAL_KEY
from tests.airflow_home import HOME
from tests.canaries import SEALING_KEY, Search, as_login, canary
from tests.inbox import open_inbox
from tests.pipeline_records import WHOLE_RUN
from tests.s3 import S3Server
from tests.servers import RayServer, ray_server

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

BUILT = set(WHOLE_RUN)
EXAMINED = {stage for stage in BUILT if GRAPH[stage].trains}
DEFAULTS = PipelineParams.model_validate({}).model_dump(mode="json")


@dataclass
class Run:
    """A finished DAG run and what its stages returned."""

    run_id: str
    state: str
    states: dict[str, str]
    results: dict[Stage, StageResult]

    @property
    def built(self) -> set[Stage]:
        return {stage for stage, result in self.results.items() if not result.hit}


@dataclass(frozen=True)
class Services:
    store_uri: str
    ray: RayServer
    secrets: dict[str, str]
    """By name; each is at work in the run, or in the environment of all its processes."""


@pytest.fixture(scope="module")
def services(airflow_db: None, mlflow_server: str, s3_server: S3Server) -> Iterator[Services]:
    """Ray with the environment of a cluster node, and secrets of every kind planted."""
    store_uri = f"s3://{s3_server.new_bucket()}/tiny"
    header, password, hook, key = canary("header"), canary("mlflow"), canary("webhook"), canary("endpoint")
    shared = {
        **s3_server.environment,
        "ARTIFACT_STORE": store_uri,
        "MLFLOW_TRACKING_URI": mlflow_server,
        "MLFLOW_TRACKING_USERNAME": "athanor",
        "MLFLOW_TRACKING_PASSWORD": password,
        SEAL_KEY: SEALING_KEY,
    }
    with open_inbox() as inbox, pytest.MonkeyPatch.context() as patch, ray_server(environment=shared) as ray:
        for name, value in {**shared, "ATHANOR_NOTIFY_URL": f"{inbox.url}/{hook}"}.items():
            patch.setenv(name, value)
        parts = urlsplit(ray.url)
        connection = {
            "conn_type": "ray_jobs",
            "host": parts.hostname,
            "port": parts.port,
            "password": ray.token,
            "extra": {"secret_headers": json.dumps({"X-Proxy": header})},
        }
        patch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
        endpoint = {"conn_type": "model_endpoint", "host": "https://endpoint.example/v1", "password": key}
        patch.setenv("AIRFLOW_CONN_PROVIDER", json.dumps(endpoint))
        secrets = {
            "Ray's token": ray.token,
            "header of the connection": header,
            "S3 key": s3_server.secret_key,
            "MLflow password": password,
            "MLflow login": as_login("athanor", password),
            "webhook": hook,
            "key of an endpoint": key,
            "sealing key": SEALING_KEY,
        }
        yield Services(store_uri, ray, secrets)


def play(services: Services, **params: Any) -> Run:
    values = {**DEFAULTS, "recipe": "tiny", "run_name": "tiny", "gold_scorer": "train", **params}
    dag_run = llm_pipeline.test(run_conf=values)
    store, run_id = open_store(services.store_uri), run_folder(dag_run.dag_id, dag_run.run_id)
    results = {}
    for stage in WHOLE_RUN:
        key = run_key(run_id, stage, "result.json")
        if store.exists(key):
            results[stage] = StageResult.model_validate_json(store.read_bytes(key))
    states = {ti.task_id: str(ti.state) for ti in dag_run.get_task_instances()}
    return Run(dag_run.run_id, str(dag_run.state), states, results)


@pytest.fixture(scope="module")
def first(services: Services) -> Run:
    return play(services)


def jobs_of(run: Run) -> int:
    found = RayJobHook()._request("GET", "/api/jobs/", read=list, what="list jobs")
    return sum((job.get("metadata") or {}).get("airflow.run_id") == run.run_id for job in found)


def parent_of(run: Run) -> Any:
    """The MLflow run of the whole pipeline run."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("athanor")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`airflow.run_id` = '{run.run_id}'")
    (parent,) = [found for found in runs if "mlflow.parentRunId" not in found.data.tags]
    return parent


def losses_of(mlflow_run_id: str | None) -> list[int]:
    """The steps of which MLflow has the loss."""
    from mlflow import MlflowClient

    assert mlflow_run_id is not None
    return sorted(point.step for point in MlflowClient().get_metric_history(mlflow_run_id, "train/loss"))


def test_every_stage_is_built_by_a_ray_job_of_its_own(first: Run) -> None:
    assert first.state == "success"
    # Nobody is asked, there is no GGUF file, and no field asks for data that a model writes.
    on_demand = {stage for stage, spec in GRAPH.items() if spec.asked_by}
    expected = {"review", "approve", "convert", *on_demand, *map(gate_name, on_demand)}
    assert {task for task, state in first.states.items() if state != "success"} == expected
    assert first.built == BUILT
    # What trained a model examines it; the reward model, which a gold scorer is asked about, has a job for that.
    assert jobs_of(first) == len(BUILT) + 1


def test_every_gate_has_checked_what_it_stands_after_and_nothing_is_wrong(first: Run, services: Services) -> None:
    store, run_id = open_store(services.store_uri), run_folder("llm_pipeline", first.run_id)
    seconds = {}
    for stage in (stage for stage in gated_stages() if stage in first.results):
        record = GateRecord.model_validate_json(store.read_bytes(gate_key(run_id, stage)))
        assert (record.outcome, record.failures) == (Outcome.PASSED, ())
        assert record.artifact == first.results[stage].artifact
        assert any(check.outcome is Outcome.PASSED for check in record.checks)
        assert (record.job == "none") == (stage not in EXAMINED)
        names = {check.name for check in record.checks if check.outcome is Outcome.PASSED}
        assert stage not in EXAMINED or {"files", "same_ids", "reload", "chat_template"} <= names
        seconds[stage.value] = record.seconds
    print("seconds of the gates' jobs:", seconds)


def test_ledgers_conserve_and_manifests_name_their_parents(first: Run) -> None:
    for stage, result in first.results.items():
        manifest = read_manifest(result.artifact)
        read = {role for role, source in GRAPH[stage].inputs if source in first.results}
        assert {entry.role for entry in manifest.inputs} == read
        for entry in manifest.inputs:
            assert read_manifest(entry.uri).digest == entry.digest
    tokens = read_manifest(first.results[Stage.TOKENIZE].artifact).ledger["train"]["conversations"]
    dropped = sum(count for name, count in tokens.items() if name.startswith("dropped."))
    assert tokens["in"] == tokens["kept"] + dropped


def test_the_models_load_in_plain_transformers_and_answer(first: Run, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from stages.data.tokens.views import TokensArtifact
    from stages.models.build import load_causal_lm, load_reward_model

    def folder(stage: Stage) -> Path:
        return fetch(first.results[stage].artifact, tmp_path)

    tokens = TokensArtifact(folder(Stage.TOKENIZE))
    question = [{"role": "user", "content": "What does `click.echo` do?"}]
    for stage in (Stage.SFT, Stage.PPO, Stage.DPO):
        tokenizer = AutoTokenizer.from_pretrained(folder(stage))
        model: Any = AutoModelForCausalLM.from_pretrained(folder(stage)).eval()
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = model.generate(prompt, max_new_tokens=4, do_sample=False)
        assert answer.shape[1] > prompt.shape[1]
        ours = load_causal_lm(folder(stage), tokens).eval()
        torch.testing.assert_close(model(prompt).logits, ours(prompt).logits, rtol=0, atol=1e-5)
    reward = AutoModelForSequenceClassification.from_pretrained(folder(Stage.REWARD)).eval()
    ours = load_reward_model(folder(Stage.REWARD), tokens).eval()
    torch.testing.assert_close(reward(prompt).logits, ours(prompt).logits, rtol=0, atol=1e-5)


def test_mlflow_knows_the_run_its_stages_and_its_models(first: Run) -> None:
    from mlflow import MlflowClient

    client, parent = MlflowClient(), parent_of(first)
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.data.tags["lineage.stage"] for child in children} == BUILT
    assert {child.info.status for child in children} == {"FINISHED"}
    pretrain = next(child for child in children if child.data.tags["lineage.stage"] == "pretrain")
    assert pretrain.inputs is not None
    assert pretrain.inputs.dataset_inputs
    assert len(client.get_metric_history(pretrain.info.run_id, "train/loss")) >= 4
    for role in ("base", "sft", "reward", "aligned"):
        version = client.get_model_version_by_alias(f"tiny-{role}", "candidate")
        assert version.tags["lineage.fingerprint"] in {r.artifact.fingerprint for r in first.results.values()}
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_no_secret_is_anywhere_it_could_be_read(first: Run, services: Services, mlflow_home: Path) -> None:
    search = searched(services, services.secrets, mlflow_home)
    assert search.seen > 200
    assert search.found == []


def test_the_search_finds_what_is_there(first: Run, services: Services, mlflow_home: Path) -> None:
    """A canary test that cannot fail is none: these words are no secrets and everywhere."""
    search = searched(services, {"dag": "llm_pipeline", "job": "athanor-sft-"}, mlflow_home)
    places = {place.partition(" ")[0] for place, _ in search.found}
    assert places == {"airflow", "mlflow", "ray", "store", "jobs"}


def searched(services: Services, needles: dict[str, str], mlflow_home: Path) -> Search:
    """Look through all that the run left: Airflow's database (XComs, rendered templates, states of tasks), MLflow's
    database, artifacts and log, Ray's session with the logs of jobs, the bucket, and what Ray tells of its jobs."""
    search = Search(needles)
    for name, folder in (("airflow", HOME), ("mlflow", mlflow_home), ("ray", services.ray.session_root)):
        search.folder(folder, name)
    store = open_store(services.store_uri)
    for entry in store.listing():
        search.data(f"store {entry.key}", store.read_bytes(entry.key))
    search.text("jobs ", json.dumps(RayJobHook()._request("GET", "/api/jobs/", read=list, what="list jobs")))
    return search


def test_an_identical_run_builds_nothing(first: Run, services: Services) -> None:
    again = play(services)
    assert again.state == "success"
    assert again.built == set()
    assert {s: r.artifact.fingerprint for s, r in again.results.items()} == {
        s: r.artifact.fingerprint for s, r in first.results.items()
    }
    assert json.loads(parent_of(again).data.tags["athanor.stage.sft"])["hit"] is True
    assert jobs_of(again) == 1  # curate: only a job on the cluster can see whether the outside documents have changed


def test_a_run_goes_on_from_a_registered_model_on_two_workers_of_ray(first: Run, services: Services) -> None:
    layout = {"execution.sft.num_workers": 2, "execution.sft.cpus_per_worker": 0.5}
    run = play(services, base_model="models:/tiny-base@candidate", last_stage="sft", overrides=layout)
    assert run.state == "success"
    assert run.states["pretrain"] == run.states["reward"] == "skipped"
    # It reads no preferences, so the data is other data; and the base model brings its tokenizer.
    assert run.built == {Stage.CURATE, Stage.TOKENIZE, Stage.SFT}
    manifest = read_manifest(run.results[Stage.SFT].artifact)
    base = first.results[Stage.PRETRAIN].artifact
    assert {entry.role: entry.digest for entry in manifest.inputs}["base_model"] == base.digest
    assert manifest.execution["num_workers"] == 2
    assert manifest.metrics["train/loss"] < 10
    job = manifest.execution["submission_id"]
    log = RayJobHook()._request("GET", f"/api/jobs/{job}/logs", read=lambda found: str(found["logs"]), what="log")
    origin = rf"\[run={re.escape(run_folder('llm_pipeline', run.run_id))} stage=sft try=\d+"
    assert re.search(rf"sft built: .* {origin}\]", log), log[-3000:]
    assert re.search(rf"RayTrainWorker.* trains in process .* {origin} rank=[01]\]", log), log[-3000:]
    assert losses_of(manifest.mlflow_run_id) == list(range(1, manifest.ledger["steps"] + 1))
    again = play(services, base_model="models:/tiny-base@candidate", last_stage="sft")
    assert again.results[Stage.SFT].hit  # the layout is not part of the identity


def test_a_changed_setting_changes_its_stage_and_what_descends_from_it_alone() -> None:
    """By fingerprints alone, over the whole graph: no need to run it."""
    from stages.artifacts.manifests import fingerprint
    from stages.config.resolve import resolve

    def identities(**overrides: Any) -> dict[Stage, str]:
        config = resolve({"recipe": "tiny", "overrides": overrides})
        refs: dict[Stage, ArtifactRef] = {}
        for stage in WHOLE_RUN:
            inputs = {role: refs[source] for role, source in GRAPH[stage].inputs if source in refs}
            identity = fingerprint(stage, config.stage_config(stage), inputs=inputs, store_uri="s")
            refs[stage] = ArtifactRef(kind="x", uri=f"s/artifacts/x/{identity}", fingerprint=identity, digest="x")
        return {stage: ref.fingerprint for stage, ref in refs.items()}

    before = identities()
    changed = {s for s, v in identities(**{"sft.optimizer.learning_rate": 0.5}).items() if v != before[s]}
    assert changed == BUILT - {Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN}
    layout = {"execution.sft.micro_batch_size": 1, "execution.pretrain.checkpoint_every": 1}
    assert identities(**layout) == before
