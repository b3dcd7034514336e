"""Keys from Airflow's connections: checked before anything is done, read just before a job is submitted, and seen by
Ray as a seal alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from operators.dispatch import attach
from operators.endpoint import EndpointHook, require_sealable_keys, sealed_environment
from operators.failures import StageConfigFailed
from operators.ray.hook import RayJobHook
from operators.run import start_run
from stages.artifacts.addresses import open_store
from stages.config.errors import ConfigError
from stages.config.gate_records import GateRequest
from stages.config.graph import Stage
from stages.config.request import StageRequest
from stages.config.resolve import resolve
from stages.config.seals import SEAL_KEY, SEALED_KEYS, open_seal
from tests.pipeline_records import request_for, run_info
from tests.ray_stand_in import StandInRay
from tests.task_state import Memory
from tests.unit.config.test_seals import FIRST

KEY = "sk-planted-55aa"
LLM = "https://llm.example/v1"
OVERRIDES = {"synthesize.generator.model": "m", "synthesize.generator.api_key_connection": "llm"}
CONNECTION: dict[str, Any] = {"conn_type": "model_endpoint", "host": LLM, "password": KEY}


@pytest.fixture(autouse=True)
def airflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATHANOR_ENDPOINTS", LLM)
    monkeypatch.setenv("AIRFLOW_CONN_LLM", json.dumps(CONNECTION))
    monkeypatch.setenv("ARTIFACT_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv(SEAL_KEY, FIRST)


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "seeds.jsonl").write_text(json.dumps({"instruction": "Add 1 and 1.", "output": "2"}))
    seeds = [str(tmp_path / "seeds.jsonl")]
    return {
        **{"recipe": "tiny", "synthesis": "self_instruct", "synthesis_sources": seeds},
        **{"generator": LLM, "overrides": OVERRIDES},
    }


def context(ti: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    known = {"dag_id": "llm_pipeline", "run_id": "manual__1", "task_id": "synthesize", "map_index": -1, "try_number": 1}
    return {
        "ti": SimpleNamespace(**{**known, "log_url": "http://airflow/x/tasks/resolve", **(ti or {})}),
        "dag_run": SimpleNamespace(clear_number=0),
        "task_state_store": Memory(),
        "params": params,
    }


@pytest.mark.parametrize(
    ("host", "more", "endpoint"),
    [
        (LLM, {}, LLM),
        ("https://llm.example", {}, LLM),
        ("llm.example/v1", {}, LLM),
        ("llm.example", {"schema": "https", "port": 443}, LLM),
        ("127.0.0.1", {"schema": "http", "port": 8000}, "http://127.0.0.1:8000/v1"),
    ],
)
def test_a_key_is_for_what_lies_below_the_address_of_its_connection(
    host: str, more: dict[str, Any], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_LLM", json.dumps({**CONNECTION, "host": host, "password": f"{KEY}\n", **more}))
    assert EndpointHook("llm").key_for(endpoint, field="f") == KEY
    for other in ("https://llm.example.evil/v1", "https://other.example/v1", "http://llm.example/v1"):
        with pytest.raises(ConfigError, match="is not below that address"):
            EndpointHook("llm").key_for(other, field="f")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "is not a connection of this Airflow"),
        (
            {"conn_type": "ray_jobs"},
            "is a connection of type 'ray_jobs'; keys are taken from type 'model_endpoint' only",
        ),
        ({"password": ""}, "is a connection without a password"),
        ({"password": "a\nb"}, "its password holds characters that no HTTP header may have"),
        ({"host": ""}, "is a connection without a host"),
        ({"host": "https://user:pw@llm.example/v1"}, "its host holds more than an address, such as a login"),
        ({"host": "llm.example", "schema": "ftp"}, "scheme 'ftp' is not allowed; allowed: http and https"),
        (
            {"host": "https://llm.example/v2"},
            "holds a key for https://llm.example/v2, and https://llm.example/v1 is not",
        ),
        ("no sealing key", "ATHANOR_SEAL_KEY is not set where Airflow's tasks run"),
        ("a bad sealing key", "ATHANOR_SEAL_KEY where Airflow's tasks run: key 1 is no base64"),
    ],
    ids=str,
)
def test_what_is_wrong_fails_the_first_task_before_anything_is_submitted_or_written(
    change: Any, said: str, asked: dict[str, Any], ray: StandInRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))
    match change:
        case None:
            monkeypatch.delenv("AIRFLOW_CONN_LLM")
        case dict():
            monkeypatch.setenv("AIRFLOW_CONN_LLM", json.dumps({**CONNECTION, **change}))
        case "no sealing key":
            monkeypatch.delenv(SEAL_KEY)
        case _:
            monkeypatch.setenv(SEAL_KEY, "not base64")
    with pytest.raises(StageConfigFailed) as raised:
        start_run(context({"task_id": "resolve"}, **asked))
    assert said in str(raised.value)
    assert not [word for word in (KEY, ":pw") if word in str(raised.value)]
    assert (ray.posts, list(tmp_path.rglob("store/runs/*"))) == ([], [])


def submitted(ray: StandInRay, request: StageRequest, told: dict[str, Any]) -> Any:
    """Attach to the request's job, or submit it."""
    with RayJobHook() as hook:
        store = open_store(request.store_uri)
        how: dict[str, Any] = {"cancel_on_kill": True, "patience_seconds": 5.0, "on_submit": lambda job: None}
        return attach(told, hook, store, request, entrypoint="python -m stages {config_uri}", **how)


def test_ray_and_the_store_see_a_seal_that_is_good_for_this_job_alone(
    asked: dict[str, Any],
    ray: StandInRay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))
    store = open_store((tmp_path / "store").as_uri())
    request = request_for(Stage.SYNTHESIZE, store, {}, resolve(asked).synthesize)
    told = context()
    attached = submitted(ray, request, told)
    (job,) = ray.jobs.values()
    sealed = job.body["runtime_env"]["env_vars"][SEALED_KEYS]
    opened = open_seal(sealed)
    opened.require_for(attached.submission.submission_id)
    assert opened.keys == {"llm": KEY}

    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()).decode()
    seen = kept + json.dumps(job.body) + json.dumps(told["task_state_store"].values) + caplog.text
    assert KEY not in seen
    assert sealed not in kept + json.dumps(told["task_state_store"].values) + caplog.text
    assert SEALED_KEYS not in job.entrypoint

    # The next attempt attaches to the job, needs no key for that, and submits nothing.
    monkeypatch.delenv("AIRFLOW_CONN_LLM")
    assert submitted(ray, request, told).reattached
    assert len(ray.posts) == 1

    # After a failure the next job has a seal of its own.
    monkeypatch.setenv("AIRFLOW_CONN_LLM", json.dumps(CONNECTION))
    job.status = "FAILED"
    again = submitted(ray, request, told).submission.submission_id
    assert again != job.submission_id
    open_seal(ray.jobs[again].body["runtime_env"]["env_vars"][SEALED_KEYS]).require_for(again)


def test_a_job_without_such_keys_has_no_runtime_environment_and_needs_no_sealing_key(
    asked: dict[str, Any], ray: StandInRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))
    monkeypatch.delenv(SEAL_KEY)
    config = resolve({**asked, "overrides": {"synthesize.generator.model": "m"}})
    require_sealable_keys(config)
    store = open_store((tmp_path / "store").as_uri())
    submitted(ray, request_for(Stage.SYNTHESIZE, store, {}, config.synthesize), context())
    (job,) = ray.jobs.values()
    assert "runtime_env" not in job.body
    assert sealed_environment(gate_request(), job="j") == {}


def gate_request() -> GateRequest:
    return GateRequest.model_construct(stage=Stage.SFT, run=run_info())
