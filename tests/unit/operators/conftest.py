"""Airflow gets its temporary home before a test module imports it."""

from collections.abc import Iterator

import pytest

import tests.airflow_home  # noqa: F401
from tests.ray_stand_in import StandInRay
from tests.retrain_world import world  # noqa: F401 - a fixture


@pytest.fixture
def ray() -> Iterator[StandInRay]:
    """A small HTTP server that behaves like the Ray Jobs API, and misbehaves on demand."""
    with StandInRay() as server:
        yield server
