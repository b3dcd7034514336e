"""Settings of the local stack that Airflow and Ray take by the name of a Python object."""

from __future__ import annotations

from typing import Any

PATIENT_SQLITE = {"timeout": 20.0}
"""`[database] sql_alchemy_connect_args`: seconds that a component waits for the database's lock, instead of 5."""


def hostname() -> str:
    """`[core] hostname_callable`: what Airflow's components know themselves by."""
    return "localhost"


def without_client_server(ray_params: Any, head: bool) -> None:
    """`RAY_START_HOOK`: leave out the Ray Client proxy, which `ray start` offers no switch for; jobs do not use it."""
    ray_params.ray_client_server_port = None
