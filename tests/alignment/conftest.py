"""Airflow gets its temporary home before a test module imports it."""

import tests.airflow_home  # noqa: F401
