"""The real local stack, in a directory of its own: up, a run through it, a crash, a taken port, up again, down."""

import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from infra import ports, processes
from infra.environment import POOL
from infra.health import Health
from infra.layout import Layout, StackRecord, StackSecrets
from infra.stack import Stack, StackError
from tests.listening import listeners
from tests.unit.infra.test_ports import listener

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

DAG = """
import os
from airflow.sdk import DAG, task

with DAG(dag_id="hello", schedule=None):

    @task(pool="gpu")
    def environment() -> dict:
        return {name: os.environ[name] for name in ("ARTIFACT_STORE", "MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN")}

    environment()
"""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "hello.py").write_text(DAG)
    stack = Stack(Layout(tmp_path), say=print)
    yield stack
    stack.down()


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def run_through(stack: Stack, record: StackRecord) -> dict[str, str]:
    """Trigger the DAG, wait for success, return what the task saw."""
    api = Health(record, StackSecrets.load_or_generate(stack.layout)).airflow
    api.wait_for_dag("hello", seconds=60)
    run = api.trigger("hello", {})
    deadline = time.monotonic() + 90
    while (state := api.run_state("hello", run)) not in ("success", "failed"):
        assert time.monotonic() < deadline, f"the run is still {state}"
        time.sleep(0.3)
    task = f"dags/hello/dagRuns/{run}/taskInstances/environment"
    assert state == "success", api.call("GET", f"{task}/logs/1", params={"full_content": True})
    return api.call("GET", f"{task}/xcomEntries/return_value", params={"stringify": False})["value"]


JOB = """
import os, pathlib, ray, time
ray.init()

@ray.remote
def busy(sign):
    pathlib.Path(sign).touch()
    time.sleep(60)

ray.get(busy.remote(os.environ["BUSY"]))
"""


@contextmanager
def ray_job(record: StackRecord, token: str) -> Iterator[None]:
    """A job whose driver and worker are there while the block runs."""
    busy = Path(record.runtime_dir) / "busy"
    held = {"Authorization": f"Bearer {token}"}
    jobs = f"{record.ray_url}/api/jobs/"
    entrypoint = f"env BUSY={shlex.quote(str(busy))} python -c {shlex.quote(JOB)}"
    body = {"submission_id": "busy", "entrypoint": entrypoint}
    assert httpx.post(jobs, headers=held, json=body, timeout=30).is_success
    deadline = time.monotonic() + 60
    while not busy.exists():
        assert time.monotonic() < deadline, httpx.get(f"{jobs}busy/logs", headers=held, timeout=10).text
        time.sleep(0.2)
    yield
    httpx.post(f"{jobs}busy/stop", headers=held, timeout=30)


def test_up_run_crash_up_again_down(stack: Stack) -> None:
    record = stack.up()
    secrets = StackSecrets.load_or_generate(stack.layout)
    assert [missing for _, missing, _ in stack.programs(record)] == [None] * 6
    assert httpx.get(f"{record.ray_url}/api/jobs/", timeout=10).status_code == 401  # nobody without the token
    assert Health(record, secrets).airflow.call("GET", f"pools/{POOL}")["include_deferred"] is True

    seen = run_through(stack, record)
    assert seen == {
        "ARTIFACT_STORE": record.artifact_store,
        "MLFLOW_TRACKING_URI": record.mlflow_url,
        "RAY_AUTH_TOKEN": secrets.ray_token,
    }

    with ray_job(record, secrets.ray_token):
        everything = listeners(processes.marked(record.stack_id))
        assert {entry.port for entry in everything} >= set(record.ports.values())
        assert len(everything) > len(record.ports), "a job brings ports of its own"
        assert [entry for entry in everything if not entry.on_loopback] == []

    begin = time.monotonic()
    assert stack.up() == record, "a second `up` changes nothing"
    assert time.monotonic() - begin < 10

    # the whole family loses its head, as after an out-of-memory kill; then somebody takes MLflow's port
    (supervisord,) = (p for p in processes.marked(record.stack_id) if "supervisord" in command_of(p))
    supervisord.send_signal(signal.SIGKILL)
    for process in processes.marked(record.stack_id):
        if "mlflow" in command_of(process):
            process.kill()
            psutil.wait_procs([process], timeout=5)
    with pytest.raises(StackError, match="make up"):
        stack.record()
    with listener(record.ports["mlflow"]) as taken:
        again = stack.up()
        assert again.stack_id != record.stack_id
        assert again.ports["mlflow"] != taken
        assert processes.marked(record.stack_id) == []
        assert {**again.ports, "mlflow": 0} == {**record.ports, "mlflow": 0}, "the others keep their ports"
        assert run_through(stack, again)["MLFLOW_TRACKING_URI"] == again.mlflow_url

        os.environ["ARTIFACT_STORE"] = "s3://elsewhere"
        try:
            with pytest.raises(StackError, match="s3://elsewhere"):
                stack.up()
        finally:
            del os.environ["ARTIFACT_STORE"]

        stack.down()
    assert processes.marked(again.stack_id) == []
    assert all(ports.is_free(port) for port in again.ports.values())
