"""One deployment and one run of `tiny` for all tests of the folder; both cost minutes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.compose.deployment import Deployment, deployment
from tests.compose.engine import NoEngine, docker_engine

RUN_SECONDS = 1500


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """All of docker-compose.yml, healthy."""
    try:
        with docker_engine() as engine, deployment(engine, tmp_path_factory.mktemp("compose")) as made:
            yield made
            show(made)
    except NoEngine as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def run_id(deployed: Deployment) -> str:
    """A run of `tiny` that has ended, started through Airflow's REST API."""
    deployed.airflow.wait_for_dag("llm_pipeline", seconds=180)
    begin = time.monotonic()
    run = deployed.airflow.trigger("llm_pipeline", {"recipe": "tiny"})
    while (state := deployed.airflow.run_state("llm_pipeline", run)) not in ("success", "failed"):
        assert time.monotonic() - begin < RUN_SECONDS, f"the run is still {state}: {tasks(deployed, run)}"
        time.sleep(2)
    deployed.seconds["tiny"] = time.monotonic() - begin
    assert state == "success", f"{tasks(deployed, run)}\n{deployed.last_words()}"
    return run


def tasks(deployed: Deployment, run: str) -> dict[str, str]:
    return {task.task_id: task.state for task in deployed.airflow.tasks("llm_pipeline", run)}


def show(deployed: Deployment) -> None:
    """Time and memory by service, for the note of a release."""
    print("\n" + "".join(f"{name:<28}{seconds:8.0f} s\n" for name, seconds in deployed.seconds.items()))
    print("".join(f"{name:<28}{memory:>12}\n" for name, memory in sorted(deployed.memory().items())))
