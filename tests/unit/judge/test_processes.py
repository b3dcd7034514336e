"""Evaluations in processes of their own: two workers side by side, and one that is killed with SIGKILL."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import evaluate
from stages.config.closing import EvaluateConfig
from stages.config.request import ArtifactRef
from tests.judging import SMALL, World, evaluated, evaluation, make_world
from tests.places import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FILES = ("metrics.json", "samples.json", "scores.parquet", "responses.parquet")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def alone(world: World) -> dict[str, bytes]:
    """What one process publishes that nothing interrupts."""
    evaluated(world)
    return files_of(world)


def files_of(world: World) -> dict[str, bytes]:
    folder = evaluation(world).output_dir
    return {name: (folder / name).read_bytes() for name in FILES}


def started(world: World, home: Path, *, rank: int = 0, world_size: int = 1) -> subprocess.Popen[str]:
    """Start an evaluation as a worker of Ray Train runs it; all of them share the store in `home`."""
    told = {role: ref.model_dump() for role, ref in world.inputs.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.judge.test_processes", str(home), json.dumps(told), SMALL.model_dump_json()],
        cwd=REPOSITORY,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_publish_what_one_does(world: World, alone: dict[str, bytes], tmp_path: Path) -> None:
    both = [started(world, tmp_path, rank=rank, world_size=2) for rank in range(2)]
    try:
        for process in both:
            _, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in both:
            process.kill()
    assert files_of(World(tmp_path, world.inputs)) == alone


def test_after_sigkill_only_the_rest_is_measured(world: World, alone: dict[str, bytes], tmp_path: Path) -> None:
    killed = started(world, tmp_path)
    kept = tmp_path / "store" / "measurements"
    while killed.poll() is None and len(list(kept.rglob("*.parquet"))) < 3:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*.parquet")}
    again = World(tmp_path, world.inputs)
    _, outcome = evaluated(again)
    assert files_of(again) == alone
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    assert outcome.ledger["units"]["measured"] == len(list(kept.rglob("*.parquet"))) - len(before) > 0


def main(home: str, inputs: str, config: str) -> None:
    refs = {role: ArtifactRef.model_validate(ref) for role, ref in json.loads(inputs).items()}
    context = evaluation(World(Path(home), refs), EvaluateConfig.model_validate_json(config))
    logging.basicConfig(level=logging.INFO)
    evaluate.measure_models(context)


if __name__ == "__main__":
    main(*sys.argv[1:])
