"""The look as a real job, and a job that asks for more workers than the cluster has: it says so, and fails with its
category when the time is over. Both on one Ray head, because starting it is what costs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from infra.components import RAY_ON_LOOPBACK
from operators.failures import StageConfigFailed
from operators.look import look_at_models
from stages.artifacts.addresses import open_store
from stages.config.request import RunInfo
from stages.config.resolve import resolve
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import CHAT_TEMPLATE, train_tokenizer
from tests.servers import RayServer
from tests.task_state import Memory
from tests.unit.models.test_given import save

pytestmark = pytest.mark.integration


def test_a_real_job_looks_and_refuses(
    ray_head: RayServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = urlsplit(ray_head.url)
    connection = {"conn_type": "ray_jobs", "host": parts.hostname, "port": parts.port, "password": ray_head.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    settings = TokenizeConfig(vocab_size=300, sequence_length=64)
    tokenizer = train_tokenizer(iter([Path(__file__).read_text() * 4]), settings).backend
    folder = save(tmp_path / "model", tokenizer, template=CHAT_TEMPLATE)
    store = open_store((tmp_path / "store").as_uri())

    def look(run_id: str, **overrides: Any) -> Any:
        ti = SimpleNamespace(dag_id="d", run_id=run_id, task_id="resolve", map_index=-1, try_number=1)
        context = {"ti": ti, "dag_run": SimpleNamespace(clear_number=0), "task_state_store": Memory()}
        config = resolve({"recipe": "tiny", "base_model": str(folder), "overrides": overrides})
        return look_at_models(context, store, RunInfo(run_id=run_id, name="n"), config)

    caplog.set_level("INFO")
    (facts,) = look("good").models
    assert (facts.architecture, facts.parameters) == ("LlamaForCausalLM", 11440)
    assert facts.summary() in caplog.text
    with pytest.raises(StageConfigFailed, match="sequence_length=4096 but the model has only 2048 positions"):
        look("refused", **{"tokenize.sequence_length": 4096})


ASKS = """
import logging, sys
import stages.job.workers as launch
from stages.config.errors import CapacityError
from stages.config.execution import ExecutionConfig

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
launch._FIRST_WAIT_SECONDS = 0.5
launch.wait_for_capacity(ExecutionConfig(num_workers=1, cpus_per_worker=1), stage="sft")
print("there is room for one")
try:
    launch.wait_for_capacity(ExecutionConfig(num_workers=3, cpus_per_worker=100, capacity_seconds=2), stage="sft")
except CapacityError as error:
    print(error.category, error.message, error.advice)
try:
    launch.wait_for_capacity(ExecutionConfig(gpus_per_worker=1, capacity_seconds=1), stage="respond")
except CapacityError as error:
    print(error.message)
"""


@pytest.mark.slow
def test_the_wait_for_capacity_is_said_and_ends(ray_head: RayServer):
    environment = {
        **RAY_ON_LOOPBACK,
        "RAY_ADDRESS": ray_head.gcs_address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": ray_head.token,
    }
    done = subprocess.run(
        [sys.executable, "-c", ASKS], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert "there is room for one" in done.stdout
    assert "waiting for capacity: asked 300 CPU, cluster has" in done.stdout
    assert "infrastructure no capacity for 2 s: asked 300 CPU" in done.stdout
    assert "lower execution.sft.num_workers" in done.stdout
    # GPUs are reserved by a worker, also where no number of workers is set; without any the stage does not use the CPU.
    assert "no capacity for 1 s: asked 1 GPU, cluster has 0, 0 free; asked 1 CPU" in done.stdout
