"""Airflow for tests: a home of its own in a temporary folder. To be imported before anything that imports airflow."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.places import REPOSITORY


def _prepare() -> Path:
    """Set the variables once a process; Airflow reads them when it is imported."""
    home = Path(tempfile.mkdtemp(prefix="athanor-airflow-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ.update(
        {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
            "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "true",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "false",
        }
    )
    return home


HOME = _prepare()


def _check_each_schema_once() -> None:
    """Let jsonschema check a schema once a process. Airflow serialises all params of the form with every task, several
    times a run, and has their schemas checked anew each time: ten seconds of a run's test."""
    from jsonschema.validators import Draft202012Validator

    checked: dict[str, None] = {}
    check = Draft202012Validator.check_schema

    def once(schema: Any, **options: Any) -> None:
        key = json.dumps(schema, sort_keys=True, default=repr)
        if key not in checked:
            check(schema, **options)
            checked[key] = None

    Draft202012Validator.check_schema = once  # type: ignore[method-assign]


_check_each_schema_once()


@cache
def migrate() -> None:
    """Create the metadata database, once a session; a process of its own because it changes logging for good."""
    subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"], check=True, capture_output=True, timeout=240, cwd=HOME
    )
