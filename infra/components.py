"""The processes of the stack: for each its command and the environment it needs beyond the shared one.
The tests start their Ray heads and MLflow servers from the same functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
MIB = 1024 * 1024

RAY_ADDRESS = "127.0.0.1"

# Ray replaces 127.0.0.1 by the network interface's address, which on a laptop changes with the network and ends the
# cluster, and then listens on all interfaces. With clusters over machines off, as on macOS and Windows by default,
# 127.0.0.1 stays what it is and every process of Ray listens there alone. Whoever connects needs the setting too; jobs
# have it from the head.
RAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@dataclass(frozen=True)
class Component:
    """One supervised program."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_seconds: int = 6
    "How long it may take to end on SIGTERM before its process group gets SIGKILL."


# One thread per numeric library in processes that only talk: idle pools cost memory and context switches.
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


# Without it, "database is locked" ends a triggerer. Not for the api-server: with SQLite it can wait for itself (one
# request holds the lock and needs the event loop, which another blocks), and then all of Airflow waits for those 5 s.
PATIENT = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONNECT_ARGS": "infra.loopback.PATIENT_SQLITE"}


def installed(name: str, *words: str, programs: Path = BIN) -> tuple[str, ...]:
    """A command of the virtual environment. By its Python, for the first line of a script holds the environment's path,
    which a shell reads."""
    return (str(programs / "python"), str(programs / name), *words)


def airflow_components(*, port: int, programs: Path = BIN) -> list[Component]:
    """The four processes of Airflow. Not `airflow standalone`: SIGTERM to it leaves its children behind.

    Logs are not served over HTTP: those servers listen on all interfaces, and here every component sees the files.
    """
    airflow = installed("airflow", programs=programs)
    return [
        Component("api-server", (*airflow, "api-server", "--host", "127.0.0.1", "--port", str(port)), QUIET),
        Component("scheduler", (*airflow, "scheduler", "--skip-serve-logs"), {**QUIET, **PATIENT}),
        Component("dag-processor", (*airflow, "dag-processor"), {**QUIET, **PATIENT}),
        Component("triggerer", (*airflow, "triggerer", "--skip-serve-logs"), {**QUIET, **PATIENT}),
    ]


def ray_head(
    *,
    ports: Mapping[str, int],
    session_root: Path,
    num_cpus: int,
    object_store_bytes: int = 256 * MIB,
    address: str = RAY_ADDRESS,
    programs: Path = BIN,
) -> Component:
    """A Ray head that listens on `address`, which is loopback unless other machines join. `ports` names ray_gcs,
    ray_dashboard and ray_agent_http; the rest are random, so that two heads fit on one machine. It must find
    RAY_AUTH_MODE and RAY_AUTH_TOKEN in its environment."""
    options = {
        "--node-ip-address": address,
        "--port": ports["ray_gcs"],
        "--dashboard-host": address,
        "--dashboard-port": ports["ray_dashboard"],
        "--dashboard-agent-listen-port": ports["ray_agent_http"],
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--include-dashboard": "true",
        "--num-cpus": num_cpus,
        "--object-store-memory": object_store_bytes,
        "--temp-dir": session_root,
    }
    switches = ("--head", "--block", "--disable-usage-stats", "--no-monitor")
    command = installed("ray", "start", *switches, programs=programs)
    return Component(
        "ray",
        (*command, *(f"{name}={value}" for name, value in options.items())),
        {
            **(RAY_ON_LOOPBACK if address == RAY_ADDRESS else {}),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_START_HOOK": "infra.loopback.without_client_server",
            "RAY_JOB_START_TIMEOUT_SECONDS": str(7 * 24 * 3600),  # a job may wait for cores while another one trains
            "RAY_enable_metrics_collection": "0",  # not scraped here; saves CPU on every node report
            "DASHBOARD_METRIC_PORT": "-1",  # would listen on all interfaces, without a token
            "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
            "RAY_ROTATION_MAX_BYTES": str(32 * MIB),
            "RAY_ROTATION_BACKUP_COUNT": "2",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(num_cpus)),
        },
        stop_seconds=6,  # idle it needs one; with jobs running it would drain for 30, but they resume from checkpoints
    )


def mlflow_server(*, port: int, home: Path, programs: Path = BIN) -> Component:
    """A tracking server with SQLite and proxied artifacts under `home`. Its job runner is off: it starts seven more
    processes and 1.8 GB for features nothing here uses."""
    hosts = ",".join(f"{host}:{port}" for host in ("127.0.0.1", "localhost"))
    return Component(
        "mlflow",
        (
            *installed("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), programs=programs),
            *("--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{home}/mlflow.db"),
            *("--artifacts-destination", (home / "artifacts").as_uri()),
            *("--allowed-hosts", hosts),
        ),
        {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
