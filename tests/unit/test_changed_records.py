"""Records of a run that somebody changes between the task that wrote them and whoever reads them.

The store is writable for more people than may trigger runs. What a run reads, and what it does, is theirs to decide.
"""

import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from operators import dispatch
from operators.failures import StageDataFailed, as_stage_failures
from operators.people.collect import load_request as load_respond_request
from operators.people.collect import make_questions, request_key, start_collection
from operators.prepare import load_config, pipeline_key
from operators.ray.submission import Submission
from operators.ray.watch import Outcome
from operators.results import read_result
from operators.run import open_run
from stages.artifacts.addresses import artifact_uri, open_store, run_key
from stages.artifacts.store import Store, read_json, write_json
from stages.config.errors import DataError, ExitCode
from stages.config.graph import GRAPH, Stage
from stages.config.recipes import tiny
from stages.config.request import REQUEST_DIGEST, ArtifactRef, RunInfo, StageResult
from stages.config.resolve import resolve
from stages.job.runner import load_request, run_stage
from tests.pipeline_records import publish_artifact, request_for
from tests.task_state import Memory

RUN_ID = "manual__1"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ARTIFACT_STORE", (tmp_path / "store").as_uri())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return open_store((tmp_path / "store").as_uri())


def task(dag_id: str, task_id: str = "resolve") -> Any:
    return SimpleNamespace(
        dag_id=dag_id,
        run_id=RUN_ID,
        task_id=task_id,
        map_index=-1,
        try_number=1,
        log_url="http://airflow/dags/x/tasks/resolve",
    )


def changed(store: Store, key: str, change: Callable[[dict[str, Any]], None]) -> None:
    record = read_json(store, key)
    change(record)
    write_json(store, key, record)


def test_a_configuration_that_somebody_changed_is_named_and_not_used(store: Store) -> None:
    config = resolve({"recipe": "tiny", "promotion": "approval"})
    run = RunInfo.model_validate(open_run({"ti": task("llm_pipeline")}, config, {}))
    assert load_config(store, run) == config

    original = store.read_bytes(pipeline_key(run.run_id))
    for group, values in (("curate", {"documents": ["file:///home/ann/.aws"]}), ("promote", {"promotion": "auto"})):
        store.write_bytes(pipeline_key(run.run_id), original)
        changed(store, pipeline_key(run.run_id), lambda record: record[group].update(values))  # noqa: B023
        with pytest.raises(DataError, match=r"pipeline\.json is not what the first task of the run wrote") as raised:
            load_config(store, run)
        assert "Clear the task `resolve`" in raised.value.advice
    earlier = run.model_copy(update={"records": {}})
    store.write_bytes(pipeline_key(run.run_id), original)
    assert load_config(store, earlier) == config


def test_a_request_of_raters_that_somebody_changed_is_named_and_not_used(store: Store, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "responses.jsonl").write_text("")
    tokens, _ = publish_artifact(store, Stage.TOKENIZE, {}, tmp_path / "files")
    model, _ = publish_artifact(store, Stage.SFT, {"tokens": tokens}, tmp_path / "files")
    responses, _ = publish_artifact(store, Stage.RESPOND, {"model": model}, tmp_path / "files")
    params = {"model": model.uri}
    run = RunInfo.model_validate(start_collection({"ti": task("collect_preferences"), "params": params}))
    request = load_respond_request(store, run)
    assert (request.run, request.stage) == (run, Stage.RESPOND)
    assert make_questions(responses.model_dump(mode="json"), store, run) == []
    changed(store, request_key(run.run_id), lambda record: record.update(stage="curate", inputs={}))
    with pytest.raises(DataError, match=r"request\.json is not what the first task of the run wrote"):
        load_respond_request(store, run)
    with pytest.raises(DataError, match=r"request\.json is not what"):
        make_questions(responses.model_dump(mode="json"), store, run)


def test_the_jobs_command_names_the_request_that_was_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for(Stage.DPO, store, {}, tiny().dpo)
    sent: list[dict[str, Any]] = []

    def submit(log: Any, hook: Any, *, prepare: Any, post: Any, **_: Any) -> Any:
        for number in (1, 2):
            submission = Submission(f"athanor-dpo-{number}", number, 1)
            prepare(submission)
            post(submission)
        return SimpleNamespace(submission=submission)

    monkeypatch.setattr(dispatch, "attach_or_submit", submit)
    dispatch.attach(
        {"ti": task("llm_pipeline", "dpo"), "task_state_store": Memory(), "dag_run": SimpleNamespace(clear_number=0)},
        SimpleNamespace(submit_job=lambda **arguments: sent.append(arguments)),  # pyright: ignore[reportArgumentType]
        store,
        request,
        entrypoint="python -m stages {config_uri}",
        cancel_on_kill=True,
        patience_seconds=1.0,
        on_submit=lambda submission_id: None,
    )
    written = store.read_bytes(run_key(request.run.run_id, Stage.DPO, "config.json"))
    words = [shlex.split(job["entrypoint"]) for job in sent]
    assert f"{REQUEST_DIGEST}={hashlib.sha256(written).hexdigest()}" in words[-1]
    assert words[0] != words[-1]


def test_a_job_does_not_do_what_somebody_else_asks_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "runs/manual-1/dpo/config.json"
    data = request_for(Stage.DPO, store, {}, tiny().dpo).model_dump_json().encode()
    store.write_bytes(key, data)
    monkeypatch.setenv(REQUEST_DIGEST, hashlib.sha256(data).hexdigest())
    assert load_request(f"{store.root_uri}/{key}")[0].stage is Stage.DPO
    changed(store, key, lambda record: record.update(store_uri="file:///elsewhere"))
    assert run_stage(f"{store.root_uri}/{key}", lambda stage: pytest.fail("it ran")) == ExitCode.DATA
    assert "is not the request that Airflow wrote" in caplog.text


OWN = {"kind": GRAPH[Stage.SFT].kind, "fingerprint": "f" * 64, "digest": "d" * 64}


@pytest.mark.parametrize(
    "forged",
    [
        {"uri": f"file:///elsewhere/artifacts/sft-model/{'f' * 64}"},
        {"kind": "dpo-model"},
        {"fingerprint": "../../runs/x"},
        {"stage": "dpo"},
    ],
)
def test_a_result_names_what_the_stage_makes_in_the_runs_own_store(store: Store, forged: dict[str, str]) -> None:
    run = RunInfo(run_id="r", name="n")
    outcome = Outcome("athanor-1", "SUCCEEDED", "", None, 0)
    own = ArtifactRef(uri=artifact_uri(store, OWN["kind"], OWN["fingerprint"]), **OWN)
    result = StageResult(stage=Stage.SFT, hit=False, artifact=own)
    write_json(store, run_key("r", Stage.SFT, "result.json"), result.model_dump(mode="json"))
    assert read_result(Stage.SFT, run=run, store=store, outcome=outcome, max_retries=1) == result
    record = json.loads(result.model_dump_json())
    artifact = {name: value for name, value in forged.items() if name != "stage"}
    record |= {"stage": forged.get("stage", "sft"), "artifact": {**record["artifact"], **artifact}}
    write_json(store, run_key("r", Stage.SFT, "result.json"), record)
    with pytest.raises(StageDataFailed, match="what sft makes lies at"), as_stage_failures():
        read_result(Stage.SFT, run=run, store=store, outcome=outcome, max_retries=1)
