"""Reading a DAG is cheap and pulls in nothing heavy; proven in processes that are forked as the DAG processor does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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
# neither is part of the cost. One process that has done the same forks for every reading.
PROBE = """
import gc, json, os, sys, time
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag
import airflow.dag_processing.processor
import airflow.providers.standard.decorators.python

def read(file):
    before = set(sys.modules)
    started = time.process_time()
    bag = BundleDagBag(dag_folder=file, bundle_path=file.parent, bundle_name="probe")
    seconds = time.process_time() - started
    started = time.process_time()
    sum(number * number for number in range(1_000_000))
    yardstick = time.process_time() - started
    new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
    times = {"seconds": seconds, "yardstick": yardstick}
    return {**times, "errors": bag.import_errors, "dags": list(bag.dags), "new": new}

gc.freeze()
for line in sys.stdin:
    if not (pid := os.fork()):
        print("PROBE", json.dumps(read(Path(line.strip()))), flush=True)
        os._exit(0)
    print("STATUS", os.waitpid(pid, 0)[1], flush=True)
"""


class Reader:
    """Reads DAG files, each in a process that is forked from one with Airflow loaded."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def read(self, file: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{file}\n")
        self._process.stdin.flush()
        found: dict[str, Any] = {}
        for line in self._process.stdout:
            word, _, rest = line.partition(" ")
            if word == "PROBE":
                found = json.loads(rest)
            elif word == "STATUS":
                assert (int(rest), bool(found)) == (0, True), self._log.read_text()[-3000:]
                return found
        raise AssertionError(self._log.read_text()[-3000:])


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    home = tmp_path_factory.mktemp("airflow")
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "250",  # CPU time is what counts here, and the machine may be busy
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", PROBE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            cwd=home,
        ) as process,
    ):
        yield Reader(process, home / "log")


@pytest.mark.parametrize("file", DAG_FILES, ids=lambda path: path.name)
def test_a_dag_is_read_in_a_moment_without_anything_heavy(file: Path, reader: Reader):
    reader.read(file)  # the first reading compiles; a DAG processor reads again and again
    for _ in range(READINGS):
        found = reader.read(file)
        assert found["errors"] == {}
        assert found["dags"]
        assert not HEAVY & set(found["new"])
        most = MAX_CPU_SECONDS * max(1.0, found["yardstick"] / YARDSTICK_SECONDS)
        if found["seconds"] < most:
            return
    assert found["seconds"] < most


def test_there_are_dags():
    assert DAG_FILES
