"""The environment that all processes of the stack share. What the user exported (ARTIFACT_STORE, AWS_*, proxies) is
passed on; what the stack decides itself wins."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from infra.components import BIN, RAY_ON_LOOPBACK
from infra.layout import Layout, StackRecord, StackSecrets
from infra.processes import marking, usable_cpus
from stages.config.execution import LOCAL_CPUS
from stages.config.seals import SEAL_KEY

# A shell that is attached to another cluster, tracking run or Python must not leak into the stack.
DROPPED = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "MLFLOW_RUN_ID",
    "PYTHONHOME",
    "MAKEFLAGS",
    "PYTHONDONTWRITEBYTECODE",  # every process would compile what it imports: seconds a stage
)

POOL = "gpu"
SLOTS = 2
"""Of the pool: independent stages, such as reward and DPO, go side by side where there are cores for both."""
RUN_IDS = "^[A-Za-z0-9][A-Za-z0-9_.~:+-]{0,239}$"
"""Run ids that Airflow takes: `run_id=<id>` is a folder of task logs, whose name may have 255 bytes, and no URL names a
run `.`"""


def stack_environment(
    layout: Layout, record: StackRecord, secrets: StackSecrets, *, programs: Path = BIN
) -> dict[str, str]:
    """Everything a component inherits, the user's environment included. Airflow expands `$` in its settings, and paths
    are parts of URLs and search paths, so `layout` and `programs` are plain (infra/plain_paths.py)."""
    inherited = {name: value for name, value in os.environ.items() if name not in DROPPED}
    return {
        **inherited,
        **_loopback_without_proxy(inherited),
        **client_environment(record, secrets),
        **_airflow(layout, record, secrets),
        **marking(record.stack_id, record.home),
        "PATH": f"{programs}{os.pathsep}{inherited.get('PATH', os.defpath)}",
        "PYTHONPATH": str(layout.checkout),
        "ATHANOR_HOME": str(layout.home.parent),  # absolute, so that its place is closed to sources in every folder
        LOCAL_CPUS: str(usable_cpus()),
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def client_environment(record: StackRecord, secrets: StackSecrets) -> dict[str, str]:
    """What a program needs in order to talk to the stack; `python -m infra env` prints it for a shell."""
    ray = urlsplit(record.ray_url)
    connection = {
        "conn_type": "ray_jobs",
        "schema": ray.scheme,
        "host": ray.hostname,
        "port": ray.port,
        "password": secrets.ray_token,
    }
    return {
        "ARTIFACT_STORE": record.artifact_store,
        "MLFLOW_TRACKING_URI": record.mlflow_url,
        "AIRFLOW_CONN_RAY_DEFAULT": json.dumps(connection),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.ray_token,
        SEAL_KEY: secrets.seal_key,
        **RAY_ON_LOOPBACK,
    }


def _loopback_without_proxy(inherited: Mapping[str, str]) -> dict[str, str]:
    """The components talk to each other over HTTP; a company proxy must not see that."""
    names = [name for name in inherited.get("NO_PROXY", inherited.get("no_proxy", "")).split(",") if name]
    value = ",".join(dict.fromkeys([*names, "127.0.0.1", "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


def _airflow(layout: Layout, record: StackRecord, secrets: StackSecrets) -> dict[str, str]:
    bundle = {
        "name": "athanor",
        "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
        "kwargs": {"path": str(layout.checkout / "dags")},
    }
    sections: dict[str, dict[str, object]] = {
        "core": {
            "executor": "LocalExecutor",
            "parallelism": 4,  # as many task processes at most; the default of 32 is for servers
            "dags_folder": layout.checkout / "dags",
            "plugins_folder": layout.airflow / "plugins",  # airflow.cfg keeps the path that was true when it was made
            "load_examples": False,
            "dagbag_import_timeout": 120,  # seconds, default 30; a task reads its DAG while jobs use the same cores
            "dags_are_paused_at_creation": False,
            "fernet_key": secrets.fernet_key,
            "execution_api_server_url": f"{record.airflow_url}/execution/",
            "simple_auth_manager_users": "admin:admin",
            "simple_auth_manager_passwords_file": layout.airflow_passwords,
            # a laptop's name changes with its network, which would make Airflow take its own tasks for another host's
            "hostname_callable": "infra.loopback.hostname",
        },
        "database": {"sql_alchemy_conn": f"sqlite:///{layout.airflow}/airflow.db"},
        "api": {"base_url": record.airflow_url, "secret_key": secrets.api_secret, "workers": 1},
        "api_auth": {"jwt_secret": secrets.jwt_secret},
        "scheduler": {"allowed_run_id_pattern": RUN_IDS},
        "workers": {
            "min_heartbeat_interval": 1,  # default 5 s: how late the end of a task may be noticed
            "execution_api_timeout": 30,  # seconds, default 5; the API server is late while jobs use the same cores
        },
        "dag_processor": {
            "dag_bundle_config_list": json.dumps([bundle]),
            "parsing_processes": 1,
            "dag_file_processor_timeout": 150,  # seconds, default 50; beyond `dagbag_import_timeout`
            "min_file_process_interval": 300,  # a changed file is read at once, whatever this says
            "refresh_interval": 60,
            "print_stats_interval": 600,
        },
        "logging": {
            "base_log_folder": layout.logs / "tasks",
            "dag_processor_child_process_log_directory": layout.logs / "dags",
            # reads task logs from disk; without log servers each look at a running task would log a refused connection
            "namespace_levels": "airflow.utils.log.file_task_handler=CRITICAL",
        },
        "usage_data_collection": {"enabled": False},
    }
    settings = {
        f"AIRFLOW__{section}__{key}".upper(): str(value)
        for section, keys in sections.items()
        for key, value in keys.items()
    }
    return {"AIRFLOW_HOME": str(layout.airflow), **settings}
