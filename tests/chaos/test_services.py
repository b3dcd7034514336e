"""Postgres, MLflow and the Ray head die in the middle of runs and come back: "Fault drills: cluster and services" in
docs/DRILLS.md, whose numbers these tests print."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.config.graph import Stage
from stages.config.request import run_folder
from stages.tracking.spool import SPOOL_NAME
from tests.chaos.run_records import (
    forget,
    jobs_of,
    key_of,
    manifest_of,
    starts_of,
    states_of,
    wait_checkpoint,
    wait_start,
)
from tests.chaos.services import Services, services
from tests.chaos.stack import REPOSITORY, Row
from tests.postgres import missing_for_postgres

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(2400)]

DAGS = [Path(__file__).with_name("chaos_dags.py"), REPOSITORY / "dags" / "llm_pipeline.py"]
TINY: dict[str, Any] = {"recipe": "tiny", "alignment": "none"}
TRAINED = (Stage.PRETRAIN, Stage.SFT)
OVERRIDES = {"promote.margin": 1e6, "promote.guards": []}
NUM_STEPS, CHECKPOINT_EVERY = 16, 4
"Of pretraining in the recipe `tiny`."
DOWN_SECONDS = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    if reason := missing_for_postgres():
        pytest.skip(reason)
    if missing := [name for name in ("psycopg2", "asyncpg") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"Airflow needs {' and '.join(missing)} for Postgres: make setup")
    with services(tmp_path_factory.mktemp("services"), DAGS) as made:
        made.stack.airflow.ensure_pool("gpu", slots=4, description="as many heavy stages at a time")
        for dag_id in ("llm_pipeline", "slow", "deferred", "waiting"):
            made.stack.airflow.wait_for_dag(dag_id, seconds=120)
        yield made


def pipeline(world: Services, stage: Stage, **params: Any) -> Row:
    overrides = {**OVERRIDES, **params.pop("overrides", {})}
    return world.stack.trigger("llm_pipeline", stage=stage, **{**TINY, **params, "overrides": overrides})


@pytest.fixture(scope="module")
def undisturbed(world: Services) -> Row:
    """A whole pipeline run in good weather."""
    row = pipeline(world, Stage.PRETRAIN)
    row.finish(1200)
    assert row.run_state() == "success", states_of(row)
    return row


def wait_success(row: Row, task: str, *, seconds: float = 900) -> None:
    def succeeded() -> bool:
        states = states_of(row)
        assert "failed" not in states.values(), states
        return states.get(task) == "success"

    row.stack.wait(f"{task} of {row.name} succeeds", succeeded, seconds=seconds)


def losses_in_mlflow(world: Services, row: Row, stage: Stage) -> tuple[str, list[int]]:
    """Status of the stage's MLflow run, and the steps of which it has the loss."""
    client = world.client()
    experiment = client.get_experiment_by_name("athanor")
    assert experiment is not None
    query = f"tags.`lineage.stage` = '{stage.value}' and tags.`airflow.run_id` = '{row.run_id}'"
    (run,) = client.search_runs([experiment.experiment_id], query)
    points = client.get_metric_history(run.info.run_id, "train/loss")
    return run.info.status, sorted(point.step for point in points)


def test_postgres_is_killed_and_comes_back(world: Services):
    """Airflow's database, with tasks of both kinds waiting for their jobs."""
    rows = [world.stack.trigger(name, "lines:60") for name in ("deferred", "waiting")]
    for row in rows:
        row.wait_running()
    rows[0].wait_state("deferred")
    time.sleep(6)  # the position in the log is saved by then
    world.postgres.server.kill()
    time.sleep(DOWN_SECONDS)
    world.postgres.server.start()
    back = time.time()
    with world.stack.supervised() as died:
        for row in rows:
            assert row.finish() == "success"
            assert row.statuses() == ["SUCCEEDED"]
            assert row.lost_lines() == 0
        world.stack.wait("Airflow is well", lambda: healthy(world))
    for row in rows:
        ended = row.run_ended_at() - back
        print(f"{row.dag_id}: try {row.task()['try_number']}, {row.repeated_lines()} lines twice, ended {ended:.1f} s")
    print(f"after Postgres was back; ended by themselves and started again: {died}")


def healthy(world: Services) -> bool:
    health = world.stack.airflow.health()
    return all(health[name]["status"] == "healthy" for name in ("scheduler", "triggerer", "dag_processor"))


def test_the_ray_head_is_killed_and_comes_back(world: Services, undisturbed: Row):
    expected = manifest_of(undisturbed, Stage.PRETRAIN)
    forget(world.store, expected)
    overrides = {**OVERRIDES, "execution.pretrain.num_workers": 1, "execution.pretrain.checkpoint_every": 4}
    row = world.stack.trigger("slow", stage=Stage.PRETRAIN, overrides=overrides)
    wait_checkpoint(row, expected.fingerprint, step=2 * CHECKPOINT_EVERY)
    world.stack.ray.head.kill()
    killed = time.time()
    world.stack.ray.head.start()
    up = time.time()
    again = wait_start(row, 2)
    assert again["step"] % CHECKPOINT_EVERY == 1, "not from a checkpoint"
    assert again["step"] > 2 * CHECKPOINT_EVERY
    assert row.finish() == "success"
    assert row.run_state() == "success"
    assert manifest_of(row, Stage.PRETRAIN).digest == expected.digest
    assert losses_in_mlflow(world, row, Stage.PRETRAIN) == ("FINISHED", list(range(1, NUM_STEPS + 1)))
    print(
        f"the head was up {up - killed:.1f} s after its death, training went on {again['at'] - killed:.1f} s after it"
    )
    print(jobs_of(row), starts_of(row), f"try {row.task()['try_number']}")


def test_mlflow_is_away_for_a_whole_stage(world: Services, undisturbed: Row):
    """Killed before pretraining starts, started again when it has ended: a closing stage delivers."""
    expected = {stage: manifest_of(undisturbed, stage) for stage in TRAINED}
    for stage in (*TRAINED, Stage.EVALUATE, Stage.PROMOTE, Stage.REPORT):
        forget(world.store, manifest_of(undisturbed, stage))
    row = pipeline(world, Stage.PRETRAIN)
    wait_success(row, "tokenize")
    world.mlflow.kill()
    wait_success(row, "pretrain")
    said = row.shown()
    assert "MLflow does not answer; metrics wait in a spool file, the stage goes on" in said
    assert f"{SPOOL_NAME} and are delivered by the next attempt, a closing stage of this run" in said
    assert world.store.exists(key_of(row, Stage.PRETRAIN, SPOOL_NAME))
    world.mlflow.start()
    row.finish(1200)
    assert row.run_state() == "success", states_of(row)
    assert {stage: manifest_of(row, stage).digest for stage in TRAINED} == {s: m.digest for s, m in expected.items()}
    assert not world.store.exists(key_of(row, Stage.PRETRAIN, SPOOL_NAME))
    for stage in TRAINED:
        status, steps = losses_in_mlflow(world, row, stage)
        assert status == "FINISHED"
        assert steps == list(range(1, len(steps) + 1)), stage
    assert len(losses_in_mlflow(world, row, Stage.PRETRAIN)[1]) == NUM_STEPS


def test_mlflow_is_away_until_the_run_has_ended(world: Services):
    """Without a closing stage nobody delivers by himself: the last task says so, and how to do it."""
    row = pipeline(world, Stage.PRETRAIN, last_stage="pretrain", seed=7)
    wait_success(row, "tokenize")
    world.mlflow.kill()
    try:
        row.finish(1200)
        assert row.run_state() == "success", states_of(row)
        assert manifest_of(row, Stage.PRETRAIN).metrics["train/loss"] > 0
        command = f"python -m stages.tracking {run_folder(row.dag_id, row.run_id)}"
        last = Row(world.stack, row.dag_id, row.run_id, "close")
        assert command in last.task_log()
    finally:
        world.mlflow.start()
    environment = {**world.stack.environment, "ARTIFACT_STORE": world.store.root_uri}
    words = [sys.executable, *command.split()[1:]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "was delivered to MLflow" in done.stdout
    assert losses_in_mlflow(world, row, Stage.PRETRAIN) == ("FINISHED", list(range(1, NUM_STEPS + 1)))
