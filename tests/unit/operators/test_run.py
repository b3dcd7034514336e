"""Beginning and end of a run, without servers: what is refused, what is stored, what an absent MLflow does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from operators.failures import RunIncomplete, StageConfigFailed
from operators.links import mlflow_artifact_page, mlflow_run_page
from operators.prepare import build_request, find_hit, input_stages, load_config
from operators.run import _wanted, finish_run, start_run
from stages.artifacts.addresses import artifact_key, open_default_store, open_store
from stages.artifacts.manifests import DOUBT, fingerprint
from stages.artifacts.store import write_json
from stages.config.errors import ConfigError, DataError
from stages.config.gate_records import GateOverride, GateRecord, Outcome, gate_key
from stages.config.graph import GRAPH, REWARD_MODEL, Stage
from stages.config.pipeline import PipelineConfig, stage_config_from_json
from stages.config.request import ArtifactRef, InputEntry, RunInfo, run_folder
from stages.config.resolve import resolve
from tests.unit.artifacts.test_lease import publish_empty

RUN_ID = "manual__2026-01-01T00:00:00+00:00"
FOLDER = run_folder("llm_pipeline", RUN_ID)
RUN = RunInfo(run_id="r", name="n")


class Task:
    """The part of a running task that is used here."""

    dag_id, run_id, log_url = (
        "llm_pipeline",
        RUN_ID,
        "http://airflow/dags/llm_pipeline/runs/x/tasks/resolve?try_number=1",
    )

    def __init__(self, states: dict[str, str] | None = None, run: dict[str, Any] | None = None) -> None:
        self.states, self.run = states or {}, run

    def xcom_pull(self, task_ids: str) -> dict[str, Any] | None:
        return self.run

    def get_task_states(self, **query: Any) -> dict[str, dict[str, str]]:
        return {RUN_ID: self.states}


@pytest.fixture(autouse=True)
def no_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ARTIFACT_STORE", tmp_path.as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")


def start(**params: Any) -> dict[str, Any]:
    return start_run({"ti": Task(), "params": params})


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (
            {"recipe": "dmeo"},
            r"recipe='dmeo' does not exist; allowed: demo, llama_1b, smollm, tiny Did you mean 'demo'\?",
        ),
        ({"alignment": "rlhf"}, r"alignment='rlhf': Input should be 'ppo', 'dpo', 'both' or 'none'"),
        ({"last_stage": "deploy"}, r"last_stage='deploy': Input should be 'convert', '.*', 'curate', 'tokenize'"),
        ({"last_stage": "ppo", "alignment": "dpo"}, r"last_stage='ppo' is not part of a run with alignment='dpo'"),
        ({"last_stage": "pretrain", "base_model": "/models/x"}, r"last_stage='pretrain' is not part of a run"),
        ({"overrides": {"sft.optimizer.learning_rat": 1}}, r"Did you mean 'sft.optimizer.learning_rate'\?"),
        ({"overrides": {"sft.num_epochs": "many"}}, r"sft.num_epochs='many': Input should be a valid number"),
        ({"overrides": {"sft": 3}}, r"overrides: 'sft' is a group of fields, not a value; got 3"),
        ({"seed": "x"}, r"seed='x': Input should be a valid integer"),
        ({"run_name": "a b"}, r"run_name='a b' may hold letters"),
        ({"recepi": "demo"}, r"recepi: unknown field. Did you mean 'recipe'\?"),
        ({"documents": "installed-docs"}, r"documents='installed-docs': Input should be a valid list"),
    ],
)
def test_wrong_input_is_refused_naming_field_value_and_what_is_allowed(params: dict[str, Any], says: str):
    with pytest.raises(StageConfigFailed, match=says):
        start(**params)


def test_a_store_of_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARTIFACT_STORE", "gs://bucket")
    with pytest.raises(StageConfigFailed, match="ARTIFACT_STORE='gs://bucket' is not a store"):
        start(recipe="tiny")


def test_the_configuration_is_stored_and_the_run_told_even_when_mlflow_is_away(tmp_path: Path, caplog):
    run = RunInfo.model_validate(start(recipe="tiny", seed=5, base_model=None))
    stored = PipelineConfig.model_validate_json((tmp_path / "runs" / run.run_id / "pipeline.json").read_text())
    assert stored == resolve({"recipe": "tiny", "seed": 5}) == load_config(open_store(tmp_path.as_uri()), run)
    assert (run.run_id, run.airflow_run_id) == (FOLDER, RUN_ID)
    assert run.airflow_url == "http://airflow/dags/llm_pipeline/runs/x"
    assert run.parent_run_id is None
    assert "No MLflow parent run yet" in caplog.text


def finish(states: dict[str, str], records: Mapping[str, GateRecord | None] | None = None, **params: Any) -> None:
    """End a run whose green gates have decided so, if nothing else is said."""
    run = start(recipe="tiny", alignment="none", **params)
    store = open_default_store()
    for task in [task for task, state in states.items() if task.startswith("gate_") and state == "success"]:
        stage = Stage(task.removeprefix("gate_"))
        record = (records or {}).get(task, decided(stage))
        if record is None:
            store.delete(gate_key(run["run_id"], stage))
        else:
            write_json(store, gate_key(run["run_id"], stage), record.model_dump(mode="json"))
    finish_run({"ti": Task(states, run)})


def decided(stage: Stage, *, outcome: Outcome = Outcome.PASSED, override: GateOverride | None = None) -> GateRecord:
    artifact = ArtifactRef(kind=GRAPH[stage].kind, uri="u", fingerprint="f", digest="d")
    at = "2026-11-29T00:00:00+00:00"
    return GateRecord(stage=stage, artifact=artifact, outcome=outcome, override=override, at=at)


def test_a_failed_gate_that_a_person_marks_as_success_is_passed_without_a_reason():
    states = {**DONE, **SKIPPED, "gate_sft": "success"}
    red = decided(Stage.SFT, outcome=Outcome.FAILED)
    with pytest.raises(RunIncomplete, match=r"gate_sft was marked as success, but failed .*override_gates=sft"):
        finish(states, {"gate_sft": red})
    with pytest.raises(RunIncomplete, match="gate_sft was marked as success before it had decided"):
        finish(states, {"gate_sft": None})
    finish(states, {"gate_sft": red.model_copy(update={"override": GateOverride(by="ada", reason="known")})})


DONE = dict.fromkeys(("curate", "tokenize", "pretrain", "sft", "evaluate", "promote", "report"), "success")
SKIPPED = dict.fromkeys(("reward", "ppo", "dpo"), "skipped")


def test_a_run_is_green_when_all_that_was_asked_for_is_there():
    finish({**DONE, **SKIPPED, "close": "running"})
    finish({**DONE, **SKIPPED, "evaluate": "skipped", "promote": "skipped", "report": "skipped"}, last_stage="sft")


@pytest.mark.parametrize("state", ["failed", "upstream_failed", "skipped", "removed"])
def test_a_run_is_red_when_something_that_was_asked_for_is_missing(state: str):
    with pytest.raises(RunIncomplete, match=rf"Not every stage succeeded: sft {state}, report skipped\."):
        finish({**DONE, **SKIPPED, "sft": state, "report": "skipped"})


@pytest.mark.parametrize("state", ["failed", "upstream_failed"])
def test_a_run_is_red_when_a_gate_of_it_is(state: str):
    """Also the last one, after which no stage of the run is missing."""
    with pytest.raises(RunIncomplete, match=rf"Not every stage succeeded: gate_sft {state}\."):
        finish({**DONE, **SKIPPED, "gate_curate": "success", "gate_sft": state}, last_stage="sft")
    finish({**DONE, **SKIPPED, "gate_ppo": "skipped", "gate_sft": "success"})


def test_a_run_is_red_when_a_person_rejects_what_its_models_have_made():
    made = {"base_model": "/models/x", "instructions": ["/i.jsonl"], "preferences": ["/p.jsonl"]}
    asked = {"synthesis": "distillation", "synthesis_sources": ["/s.jsonl"], "review_made_data": True}
    config = resolve({"recipe": "tiny", **made, **asked})
    assert "review" in _wanted(config)
    assert "review" not in _wanted(resolve({"recipe": "tiny", **made, **asked, "review_made_data": False}))
    run = RunInfo(run_id="r", name="n")
    store = open_default_store()
    store.write_bytes("runs/r/pipeline.json", config.model_dump_json().encode())
    states = {"plan": "success", "synthesize": "success", "review": "failed"}
    with pytest.raises(RunIncomplete, match=r"Not every stage succeeded: review failed\."):
        finish_run({"ti": Task(states, run.model_dump(mode="json"))})


def test_what_mlflow_does_not_have_at_the_end_is_said_with_what_to_do(tmp_path: Path, caplog):
    finish({**DONE, **SKIPPED})
    assert "stages.tracking.tracker" not in caplog.text
    spool = tmp_path / "runs" / FOLDER / "pretrain" / "mlflow-spool.jsonl"
    spool.parent.mkdir()
    spool.write_text("{}\n")
    finish({**DONE, **SKIPPED})
    assert f"waits in {tmp_path.as_uri()} under runs/{FOLDER}/pretrain/mlflow-spool.jsonl" in caplog.text
    assert f"python -m stages.tracking {FOLDER}" in caplog.text


def test_a_run_that_never_started_is_red():
    with pytest.raises(RunIncomplete, match="The log of task 'resolve' says why"):
        finish_run({"ti": Task({"resolve": "failed"}, None)})


def ref(stage: Stage) -> dict[str, Any]:
    kind = GRAPH[stage].kind
    return ArtifactRef(kind=kind, uri=f"file:///s/artifacts/{kind}/f", fingerprint=f"f-{kind}", digest="d").model_dump()


def test_inputs_are_those_that_the_run_produces(tmp_path: Path):
    store, given = open_store(tmp_path.as_uri()), resolve({"recipe": "tiny", "base_model": "/models/x"})
    assert input_stages(Stage.SFT, given) == {"tokens": Stage.TOKENIZE}
    request = build_request(
        Stage.SFT, run=RUN, store=store, config=given, upstream={Stage.TOKENIZE: ref(Stage.TOKENIZE)}
    )
    assert (list(request.inputs), request.source_uris) == (["tokens"], ("/models/x",))
    scratch = resolve({"recipe": "tiny", "alignment": "dpo"})
    assert set(input_stages(Stage.EVALUATE, scratch)) == {"curated", "tokens", "base", "sft", "dpo"}


def test_an_input_that_is_missing_is_named(tmp_path: Path):
    store = open_store(tmp_path.as_uri())
    with pytest.raises(ConfigError, match="sft needs 'tokens' from task 'tokenize', which left no artifact"):
        build_request(Stage.SFT, run=RUN, store=store, config=resolve({"recipe": "tiny"}), upstream={})


def test_an_artifact_that_a_reader_found_damaged_is_left_to_the_job_which_reads_all_of_it(tmp_path: Path):
    store, stage, upstream = open_store(tmp_path.as_uri()), Stage.TOKENIZE, {Stage.CURATE: ref(Stage.CURATE)}
    request = build_request(stage, run=RUN, store=store, config=resolve({"recipe": "tiny"}), upstream=upstream)
    identity = fingerprint(
        stage, stage_config_from_json(stage, request.config), inputs=request.inputs, store_uri=store.root_uri
    )
    given = request.inputs["curated"]
    curated = InputEntry(
        role="curated", kind=given.kind, uri=given.uri, fingerprint=given.fingerprint, digest=given.digest
    )
    publish_empty(store, identity, curated)
    assert find_hit(store, request) is not None
    write_json(store, f"{artifact_key(GRAPH[stage].kind, identity)}/{DOUBT}", {})
    assert find_hit(store, request) is None


def test_a_stage_with_outside_sources_is_never_a_hit_without_its_job(tmp_path: Path):
    config = resolve({"recipe": "tiny"})
    request = build_request(Stage.CURATE, run=RUN, store=open_store(tmp_path.as_uri()), config=config, upstream={})
    assert request.sources
    assert find_hit(open_store(tmp_path.as_uri()), request) is None


def test_a_configuration_that_is_gone_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"runs/r/pipeline\.json does not exist"):
        load_config(open_store(tmp_path.as_uri()), RUN)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": "tiny"}', "\xff"])
def test_a_configuration_that_is_damaged_is_named(tmp_path: Path, text: str):
    store = open_store(tmp_path.as_uri())
    store.write_bytes("runs/r/pipeline.json", text.encode("latin-1"))
    with pytest.raises(DataError, match=r"runs/r/pipeline\.json is not a valid PipelineConfig") as raised:
        load_config(store, RUN)
    assert raised.value.advice == "Clear the task `resolve`; it writes the file."


def test_links_take_the_address_that_browsers_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATHANOR_MLFLOW_URL", "https://mlflow.example.org/")
    assert mlflow_run_page("http://mlflow:5000", "r1") == "https://mlflow.example.org/#/runs/r1"


@pytest.mark.parametrize("address", ["mlflow.example.org", "javascript:alert(1)", "https://", "https://a b"])
def test_links_never_take_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str):
    monkeypatch.setenv("ATHANOR_MLFLOW_URL", address)
    assert mlflow_run_page("http://mlflow:5000", "r1") == "http://mlflow:5000/#/runs/r1"


def test_an_address_for_browsers_may_be_copied_from_a_page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATHANOR_MLFLOW_URL", "https://mlflow.example.org/#/experiments")
    assert mlflow_run_page("http://mlflow:5000", "r1") == "https://mlflow.example.org/#/runs/r1"


def test_links_lead_to_mlflows_pages_and_tell_no_password():
    assert mlflow_run_page("http://me:secret@mlflow:5000/", "r1", "7") == "http://mlflow:5000/#/experiments/7/runs/r1"
    assert json.dumps(mlflow_artifact_page("https://m", "r1", "report.html", "7")) == (
        '"https://m/#/experiments/7/runs/r1/artifacts/report.html"'
    )


def test_the_gate_of_a_given_reward_model_must_succeed_too():
    reward = ArtifactRef(kind="reward-model", uri="file:///r", fingerprint="f", digest="d")
    config = resolve({"recipe": "tiny", "reward_model": "models:/theirs/1"})
    assert "gate_reward" not in _wanted(config)
    assert "gate_reward" in _wanted(config.with_given({REWARD_MODEL: reward}))
    assert "reward" not in _wanted(config.with_given({REWARD_MODEL: reward}))
