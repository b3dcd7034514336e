"""A Ray cluster of machines that share nothing but a network and an S3 server: the head and its nodes in network
namespaces, with working directories of their own, and a real Airflow beside them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.components import BIN
from tests.chaos.namespaces import Machine, network
from tests.chaos.stack import REPOSITORY, ChaosStack, chaos_stack
from tests.s3 import best_kind, s3_server
from tests.servers import RayServer, Restartable, ray_server, running

# A machine that was cut off is noticed after 3 to 10 s instead of 33 to 65, and notices it itself after 20 s, not 60.
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}


@dataclass(frozen=True)
class Cluster:
    """Ray's head, the machines that joined it, and Airflow."""

    stack: ChaosStack
    ray: RayServer
    machines: dict[str, Machine]
    """But the head's."""
    nodes: dict[str, Restartable]
    """Ray on each of them."""

    def workers_by_node(self, submission_id: str) -> list[int]:
        """Of all training workers that a job ever had, how many ran on each node."""
        (job,) = [job for job in self.stack.jobs() if job["submission_id"] == submission_id]
        workers = [actor for actor in _listed(self.ray, "actors") if actor["class_name"] == "RayTrainWorker"]
        return sorted(Counter(actor["node_id"] for actor in workers if actor["job_id"] == job["job_id"]).values())


def _listed(ray: RayServer, what: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{ray.url}/api/v0/{what}", params={"limit": 1000}, headers=ray.headers, timeout=30)
    answer.raise_for_status()
    return answer.json()["data"]["result"]["result"]


@contextmanager
def ray_cluster(root: Path, dag_files: list[Path], *, names: Sequence[str], head_cpus: int) -> Iterator[Cluster]:
    """Everything up, a CPU on each machine but for the head's; the store's variables are in this process too."""
    with ExitStack() as stack:
        net = stack.enter_context(network(("head", *names)))
        machines = dict(net.machines)
        head = machines.pop("head")
        s3 = stack.enter_context(s3_server(best_kind(), address=net.address))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        store_uri = f"s3://{s3.new_bucket()}/cluster"
        shared = {**s3.environment, **HEALTH, "ARTIFACT_STORE": store_uri, "PYTHONPATH": str(REPOSITORY)}
        ray = stack.enter_context(
            ray_server(
                num_cpus=head_cpus,
                environment={**shared, **_folders(root, "head")},
                address=head.address,
                within=head.within,
            )
        )
        nodes = {
            name: _start(stack, ray, machine, {**shared, **_folders(root, name)}) for name, machine in machines.items()
        }
        airflow = stack.enter_context(
            chaos_stack(root / "airflow", dag_files, ray=ray, store_uri=store_uri, variables=s3.environment)
        )
        airflow.airflow.ensure_pool("gpu", slots=4, description="as many heavy stages at a time")
        for dag_id in ("llm_pipeline", "slow"):
            airflow.airflow.wait_for_dag(dag_id, seconds=120)
        yield Cluster(airflow, ray, machines, nodes)


def _start(stack: ExitStack, ray: RayServer, machine: Machine, environment: Mapping[str, str]) -> Restartable:
    folder = Path(tempfile.mkdtemp(prefix="ath-node-", dir="/tmp"))  # its Unix sockets need a short path
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    node = Restartable(lambda: _node(ray, machine, folder, environment))
    stack.callback(node.stop)
    node.start()
    return node


def _folders(root: Path, name: str) -> dict[str, str]:
    scratch, temporary = root / name / "scratch", root / name / "tmp"
    for path in (scratch, temporary):
        path.mkdir(parents=True, exist_ok=True)
    return {"ATHANOR_SCRATCH": str(scratch), "TMPDIR": str(temporary)}


@contextmanager
def _node(
    ray: RayServer, machine: Machine, folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    def joined() -> bool:
        alive = [node["node_ip"] for node in _listed(ray, "nodes") if node["state"] == "ALIVE"]
        return machine.address in alive

    options = {
        "--address": ray.gcs_address,
        "--node-ip-address": machine.address,
        "--num-cpus": 1,
        "--object-store-memory": 128 * 2**20,
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--temp-dir": folder,
    }
    start = (str(BIN / "ray"), "start", "--block", "--disable-usage-stats")
    with running(
        "ray-node",
        (*machine.within, *start, *(f"{name}={value}" for name, value in options.items())),
        log=folder / "node.log",
        environment={
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": ray.token,
            "RAY_enable_metrics_collection": "0",
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        },
        answers=joined,
    ) as process:
        yield process
