"""A job that asks for more workers than the cluster has says so, and fails with its category when the time is over."""

import os
import subprocess
import sys

import pytest

from infra.components import RAY_ON_LOOPBACK
from tests.servers import RayServer

pytestmark = pytest.mark.integration

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
