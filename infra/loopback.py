"""Settings of the local stack that Airflow and Ray look up as Python objects, by name."""

from __future__ import annotations

from typing import Any

PATIENT_SQLITE = {"timeout": 20.0}
"""`[database] sql_alchemy_connect_args`: seconds that a component waits for the database's lock, instead of 5."""


def hostname() -> str:
    """`[core] hostname_callable`: the host name that Airflow's components record."""
    return "localhost"


def without_client_server(ray_params: Any, head: bool) -> None:
    """`RAY_START_HOOK`: start no Ray Client proxy, for which `ray start` has no switch; jobs do not use it."""
    ray_params.ray_client_server_port = None
