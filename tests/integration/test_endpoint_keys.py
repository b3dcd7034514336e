"""A key in an Airflow connection, through real jobs on a real Ray head to an endpoint: it arrives there, and Ray's API,
its logs, the task's log and the store know nothing of it."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from operators.dispatch import attach
from operators.look import look_at_models
from operators.prepare import build_request
from operators.ray.hook import RayJobHook
from operators.ray.jobs import JobInfo, JobStatus
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store, read_json
from stages.config.graph import Stage
from stages.config.pipeline import PipelineConfig
from stages.config.request import RunInfo
from stages.config.resolve import resolve
from stages.config.seals import SEAL_KEY, SEALED_KEYS
from tests.canaries import SEALING_KEY, Search, canary
from tests.curating import write_jsonl
from tests.judge_server import Reply, judge_server
from tests.servers import RayServer
from tests.task_state import Memory
from tests.unit.config.test_seals import FIRST

pytestmark = pytest.mark.integration

KEY = canary("endpoint")


def context_of(task_id: str, run_id: str) -> dict[str, Any]:
    ti = SimpleNamespace(dag_id="d", run_id=run_id, task_id=task_id, map_index=-1, try_number=1)
    return {"ti": ti, "dag_run": SimpleNamespace(clear_number=0), "task_state_store": Memory()}


def job_of_the_stage(config: PipelineConfig, store: Store, run_id: str, entrypoint: str) -> JobInfo:
    """Submit the stage's job, as its task does, and wait for its end."""
    request = build_request(
        Stage.SYNTHESIZE, run=RunInfo(run_id=run_id, name="n"), store=store, config=config, upstream={}
    )
    how: dict[str, Any] = {"cancel_on_kill": True, "patience_seconds": 30.0, "on_submit": lambda job: None}
    with RayJobHook() as hook:
        attached = attach(context_of("synthesize", run_id), hook, store, request, entrypoint=entrypoint, **how)
        deadline = time.monotonic() + 240
        while (job := hook.get_job(attached.submission.submission_id)) is None or job.status.is_active:
            assert time.monotonic() < deadline, hook.get_logs(attached.submission.submission_id)
            time.sleep(0.3)
        return job


def test_a_key_reaches_its_endpoint_and_is_seen_nowhere_on_its_way(
    ray_head: RayServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What is {number}?"} for number in range(3)])
    store = open_store((tmp_path / "store").as_uri())
    parts = urlsplit(ray_head.url)
    ray = {"conn_type": "ray_jobs", "host": parts.hostname, "port": parts.port, "password": ray_head.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray))
    monkeypatch.setenv(SEAL_KEY, SEALING_KEY)  # as on Ray's side: tests/conftest.py
    with judge_server(lambda number, asked: Reply("It is said to be very much, and seldom less.")) as server:
        provider = {"conn_type": "model_endpoint", "host": server.url, "password": KEY}
        monkeypatch.setenv("AIRFLOW_CONN_PROVIDER", json.dumps(provider))
        monkeypatch.setenv("ATHANOR_ENDPOINTS", server.url)
        overrides = {"synthesize.generator.model": "m", "synthesize.generator.api_key_connection": "provider"}
        asked = {"recipe": "tiny", "synthesis": "distillation", "synthesis_sources": [prompts]}
        config = resolve({**asked, "generator": server.url, "overrides": overrides})

        listed = f"env ATHANOR_ENDPOINTS={server.url} python -m"
        run = RunInfo(run_id="good", name="n")
        entrypoint = f"{listed} stages.look {{config_uri}}"
        look_at_models(context_of("resolve", "good"), store, run, config, entrypoint=entrypoint)
        assert server.asked == []  # it opens the key and asks nothing
        done = job_of_the_stage(config, store, "good", f"{listed} stages {{config_uri}}")
        assert done.status is JobStatus.SUCCEEDED, RayJobHook().get_logs(done.submission_id)
        assert {one.headers["Authorization"] for one in server.asked} == {f"Bearer {KEY}"}
        requests = len(server.asked)

        monkeypatch.setenv(SEAL_KEY, FIRST)
        failed = job_of_the_stage(config, store, "other-key", f"{listed} stages {{config_uri}}")
        assert (failed.status, failed.exit_code) == (JobStatus.FAILED, 2)
        told = read_json(store, run_key("other-key", Stage.SYNTHESIZE, "failure.json"))
        assert "was sealed with key" in told["message"]
        assert len(server.asked) == requests

    with RayJobHook() as hook:
        jobs = json.dumps(hook._request("GET", "/api/jobs/", read=list, what="list jobs"))
    search = Search({"key": KEY, "sealing key": SEALING_KEY, "other sealing key": FIRST})
    search.folder(ray_head.session_root, "ray")
    search.folder(tmp_path, "store")
    search.text("jobs", jobs)
    search.text("task", caplog.text)
    assert search.seen > 20
    assert search.found == []
    # What is no secret is found: the seal where it must be, and in no record of the store.
    known = Search({"seal": SEALED_KEYS, "job": done.submission_id})
    known.text("jobs", jobs)
    known.folder(tmp_path / "store", "store")
    assert {("jobs", "seal"), ("jobs", "job")} <= set(known.found)
    assert not [place for place, name in known.found if name == "seal" and place.endswith("config.json")]
