"""Settings of the local stack that Airflow and Ray take as names of functions: both stay on loopback."""

from __future__ import annotations

from typing import Any


def hostname() -> str:
    """`[core] hostname_callable`: what Airflow's components know themselves by."""
    return "localhost"


def without_client_server(ray_params: Any, head: bool) -> None:
    """`RAY_START_HOOK`: leave out the Ray Client proxy, which `ray start` offers no switch for; jobs do not use it."""
    ray_params.ray_client_server_port = None
