"""Airflow gets its temporary home before a test module imports it."""

import pytest

from tests import airflow_home


@pytest.fixture(scope="session")
def airflow_db() -> None:
    """Airflow's metadata database, in the temporary home."""
    airflow_home.migrate()
