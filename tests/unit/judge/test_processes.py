"""Evaluations in processes of their own: two workers side by side, and one that is killed with SIGKILL."""

import logging
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate
from stages.config.closing import EvaluateConfig
from stages.config.request import ArtifactRef
from tests.judging import SMALL, World, evaluated, evaluation, make_world
from tests.numerics.fork_server import Child, shared_server

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


def started(world: World, home: Path, *, rank: int = 0, world_size: int = 1) -> Child:
    """Start an evaluation as a worker of Ray Train runs it; all of them share the store in `home`."""
    return shared_server().start(
        f"{__name__}:main",
        log=home / f"rank-{rank}.log",
        environment={"RANK": str(rank), "WORLD_SIZE": str(world_size)},
        home=str(home),
        inputs={role: ref.model_dump() for role, ref in world.inputs.items()},
        config=SMALL.model_dump(),
    )


def test_two_processes_publish_what_one_does(world: World, alone: dict[str, bytes], tmp_path: Path) -> None:
    both = [started(world, tmp_path, rank=rank, world_size=2) for rank in range(2)]
    statuses = [process.wait() for process in both]
    assert statuses == [0, 0], "\n".join(process.log.read_text()[-2000:] for process in both)
    assert files_of(World(tmp_path, world.inputs)) == alone


def test_after_sigkill_only_the_rest_is_measured(world: World, alone: dict[str, bytes], tmp_path: Path) -> None:
    killed = started(world, tmp_path)
    kept = tmp_path / "store" / "measurements"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and len(list(kept.rglob("*.parquet"))) < 3:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*.parquet")}
    again = World(tmp_path, world.inputs)
    _, outcome = evaluated(again)
    assert files_of(again) == alone
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    assert outcome.ledger["units"]["measured"] == len(list(kept.rglob("*.parquet"))) - len(before) > 0


def main(*, home: str, inputs: dict[str, Any], config: dict[str, Any]) -> int:
    refs = {role: ArtifactRef.model_validate(ref) for role, ref in inputs.items()}
    context = evaluation(World(Path(home), refs), EvaluateConfig.model_validate(config))
    logging.basicConfig(level=logging.INFO)
    evaluate.measure_models(context)
    return 0
