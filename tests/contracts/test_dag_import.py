"""Reading a DAG is cheap and pulls in nothing heavy; proven in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.places import REPOSITORY

DAG_FILES = sorted(path for path in (REPOSITORY / "dags").glob("*.py") if path.name != "__init__.py")
HEAVY = {"torch", "ray", "mlflow", "transformers", "datatrove", "boto3", "botocore", "numpy", "pandas", "aiohttp"}
MAX_CPU_SECONDS = 0.4
"""A form of thirty fields over a hundred classes of settings takes 0.32 to 0.36 at best, a heavy import seconds."""
READINGS = 4
"""One of so many must be quick: next to other tests the same reading takes up to half as long again, in CPU time."""
YARDSTICK_SECONDS = 0.06
"""What the probe's loop takes on the machine for which the limit is meant; a slower one gets as much more."""

# The DAG processor has Airflow loaded, and its objects taken from the garbage collector, when it forks to read a file:
# neither is part of the cost.
PROBE = """
import gc, json, sys, time
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag
import airflow.dag_processing.processor
import airflow.providers.standard.decorators.python
before = set(sys.modules)
gc.freeze()
started = time.process_time()
file = Path(sys.argv[1])
bag = BundleDagBag(dag_folder=file, bundle_path=file.parent, bundle_name="probe")
seconds = time.process_time() - started
started = time.process_time()
sum(number * number for number in range(1_000_000))
yardstick = time.process_time() - started
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
times = {"seconds": seconds, "yardstick": yardstick}
print("PROBE", json.dumps({**times, "errors": bag.import_errors, "dags": list(bag.dags), "new": new}))
"""


@pytest.mark.parametrize("file", DAG_FILES, ids=lambda path: path.name)
def test_a_dag_is_read_in_a_moment_without_anything_heavy(file: Path, tmp_path: Path):
    _read(file, tmp_path)  # the first reading compiles; a DAG processor reads again and again
    for _ in range(READINGS):
        found = _read(file, tmp_path)
        assert found["errors"] == {}
        assert found["dags"]
        assert not HEAVY & set(found["new"])
        most = MAX_CPU_SECONDS * max(1.0, found["yardstick"] / YARDSTICK_SECONDS)
        if found["seconds"] < most:
            return
    assert found["seconds"] < most


def _read(file: Path, home: Path) -> dict[str, Any]:
    environment = {**os.environ, "AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "false"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(file)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("PROBE "))[6:])


def test_there_are_dags():
    assert DAG_FILES
