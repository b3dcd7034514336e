"""SIGKILL at random moments, restart, and so on until the stage ends: its artifact and its metrics are, bit for bit,
those of an undisturbed run, for every objective.

Four deaths an objective, or as many as KILLS says: `KILLS=20 make test-exact` is the
full proof. KILL_SEED draws other moments. MLflow's store is SQLite without a server, so that transactions die as well.
"""

import json
import os
import random
import re
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.artifacts.addresses import artifact_uri, open_store, run_key
from stages.artifacts.manifests import find_manifest, fingerprint
from stages.artifacts.store import read_json, write_json
from stages.config.errors import ExitCode
from stages.config.execution import ExecutionConfig
from stages.config.graph import GRAPH, Stage
from stages.config.preference_losses import KTOLoss, ORPOLoss, SimPOLoss
from stages.config.request import ArtifactRef, Manifest, RunInfo, StageRequest
from stages.config.train import TrainConfig
from tests.numerics.fork_server import ForkServer, shared_server
from tests.numerics.kill_points import Kill, Visits, as_json, draw_kill, places_of
from tests.numerics.rollout_variants import VARIANTS
from tests.small_world import CONFIGS

pytestmark = [pytest.mark.exact, pytest.mark.slow, pytest.mark.timeout(3600)]

LOSSES: dict[str, TrainConfig] = {
    loss.kind: CONFIGS[Stage.DPO].model_copy(update={"loss": loss}) for loss in (KTOLoss(), SimPOLoss(), ORPOLoss())
}
"""The losses of stage `dpo` that differ in more than an equation: the one of single responses with a baseline, and
those without a reference."""
KILLS = int(os.environ.get("KILLS", "4"))
_STATUS: dict[int, int] = {signal.SIGKILL: -9, signal.SIGTERM: int(ExitCode.PREEMPTED)}
Inputs = dict[Stage, dict[str, ArtifactRef]]
Series = dict[str, list[list[float]]]
"""MLflow's points [step, value] of every metric; each step once."""


ENSEMBLES: dict[str, TrainConfig] = {
    "ensemble": CONFIGS[Stage.REWARD].model_copy(
        update={"ensemble_size": 2, "ensemble_bootstrap": True, "counted": "prompt", "label_smoothing": 0.1}
    )
}
"""Two members, of which the first may be done when the stage dies; pairs are weighted and drawn again."""


@dataclass(frozen=True)
class Ended:
    """What a stage that ended has left."""

    manifest: Manifest
    series: Series


@pytest.fixture(scope="module")
def server() -> ForkServer:
    return shared_server()


@pytest.fixture(scope="module")
def mlflow(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("mlflow")
    address = f"sqlite:///{home}/mlflow.db"
    environment = {"MLFLOW_TRACKING_URI": address}
    child = server.start("tests.numerics.kill_points:make_database", log=home / "log", environment=environment)
    assert child.wait() == 0, child.log.read_text()
    return address


class Attempts:
    """One stage in its own store and MLflow run, started again after every death."""

    def __init__(
        self,
        server: ForkServer,
        home: Path,
        stage: Stage,
        inputs: Inputs,
        mlflow: str,
        *,
        checkpoint_every: int = 2,
        variant: str = "",
    ) -> None:
        """`variant` is one of VARIANTS, LOSSES or ENSEMBLES: another kind than the usual."""
        self._server, self._home, self._stage, self._mlflow = server, home, stage, mlflow
        home.mkdir(parents=True)
        self._store = open_store((home / "store").as_uri())
        config = {**VARIANTS, **LOSSES, **ENSEMBLES}[variant] if variant else CONFIGS[stage]
        self._config = config.model_copy(update={"eval_every": 2})
        self._request = StageRequest(
            stage=stage,
            run=RunInfo(run_id=f"{variant or stage.value}-{home.name}", name="kills", experiment="kills"),
            store_uri=self._store.root_uri,
            config=self._config.model_dump(mode="json"),
            execution=ExecutionConfig(micro_batch_size=4, checkpoint_every=checkpoint_every),
            inputs=inputs[stage],
        )
        self.identity = fingerprint(stage, self._config, inputs=inputs[stage], store_uri=self._store.root_uri)
        self._count = 0

    def run(self, kill: Kill | None = None) -> int:
        """Return the exit status; 0 when the stage ended, whatever the kill was meant to do."""
        self._count += 1
        key = run_key(self._request.run.run_id, self._stage, "config.json")
        request = self._request.model_copy(update={"submission_id": f"kills-{self._count}"})
        write_json(self._store, key, request.model_dump(mode="json"))
        child = self._server.start(
            "tests.numerics.kill_points:run",
            log=self._home / f"attempt-{self._count:02d}.log",
            environment={
                "MLFLOW_TRACKING_URI": self._mlflow,
                "ATHANOR_SCRATCH": str(self._home / "scratch"),
                "RAY_JOB_STOP_WAIT_TIME_S": "120",
            },
            config_uri=f"{self._store.root_uri}/{key}",
            kill=as_json(kill),
            record=None if kill else str(self._home / "visits.json"),
        )
        status = child.wait()
        expected = {0} | ({_STATUS[kill.signal]} if kill else set())
        assert status in expected, child.log.read_text()[-4000:]
        return status

    def log(self) -> str:
        """Of the latest attempt."""
        return (self._home / f"attempt-{self._count:02d}.log").read_text()

    def visits(self) -> Visits:
        return json.loads((self._home / "visits.json").read_text())

    def ended(self) -> Ended:
        manifest = find_manifest(self._store, GRAPH[self._stage].kind, self.identity)
        assert manifest is not None
        result = read_json(self._store, run_key(self._request.run.run_id, self._stage, "result.json"))
        assert result["artifact"]["uri"] == artifact_uri(self._store, manifest.kind, self.identity)
        return Ended(manifest, self._tracked())

    def _tracked(self) -> Series:
        answer = self._home / "tracked.json"
        child = self._server.start(
            "tests.numerics.kill_points:write_tracked",
            log=self._home / "tracked.log",
            environment={"MLFLOW_TRACKING_URI": self._mlflow},
            store_uri=self._store.root_uri,
            run_id=self._request.run.run_id,
            stage=self._stage.value,
            answer=str(answer),
        )
        assert child.wait() == 0, child.log.read_text()[-4000:]
        return json.loads(answer.read_text())


def contents(manifest: Manifest) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.files}


@pytest.mark.parametrize(
    ("stage", "variant"),
    [
        *((stage, "") for stage in CONFIGS),
        *((Stage.PPO, name) for name in VARIANTS),
        *((Stage.DPO, name) for name in LOSSES),
        *((Stage.REWARD, name) for name in ENSEMBLES),
    ],
    ids=[*map(str, CONFIGS), *VARIANTS, *LOSSES, *ENSEMBLES],
)
def test_killed_again_and_again_a_stage_ends_with_the_same_bits(
    stage: Stage, variant: str, server: ForkServer, stage_inputs: Inputs, mlflow: str, tmp_path: Path
) -> None:
    whole = Attempts(server, tmp_path / "undisturbed", stage, stage_inputs, mlflow, variant=variant)
    assert whole.run() == 0
    expected, visits = whole.ended(), whole.visits()
    for points in expected.series.values():
        assert len({step for step, _ in points}) == len(points)
    assert {"model.safetensors", "history.jsonl"} <= contents(expected.manifest).keys()
    assert len(expected.series["train/loss"]) >= 6
    rng, places = (
        random.Random(f"{variant or stage} {os.environ.get('KILL_SEED', '0')}"),
        list(places_of(stage, variant)),
    )
    rng.shuffle(places)
    deaths: Counter[str] = Counter()
    chains = attempts = 0
    while deaths.total() < KILLS:
        chains += 1
        chain = Attempts(server, tmp_path / f"chain-{chains}", stage, stage_inputs, mlflow, variant=variant)
        ended = False
        while not ended:
            kill = draw_kill(rng, places[attempts % len(places)], visits) if deaths.total() < KILLS else None
            ended = chain.run(kill) == 0
            attempts += 1
            if not ended and kill:
                deaths[kill.place] += 1
        found = chain.ended()
        assert contents(found.manifest) == contents(expected.manifest)
        assert found.manifest.metrics == expected.manifest.metrics
        assert found.series == expected.series
    print(f"{variant or stage}: {dict(deaths)} deaths in {chains} chains, {attempts} attempts")  # shown with -rP or -s


@pytest.mark.parametrize("stage", [Stage.SFT, Stage.PPO], ids=str)
def test_a_stage_that_is_asked_to_end_saves_first_and_ends_with_the_same_bits(
    stage: Stage, server: ForkServer, stage_inputs: Inputs, mlflow: str, tmp_path: Path
) -> None:
    """SIGTERM in the third step or soon after, without any other checkpoint; PPO is amid a rollout's updates then."""
    whole = Attempts(server, tmp_path / "undisturbed", stage, stage_inputs, mlflow)
    assert whole.run() == 0
    stopped = Attempts(server, tmp_path / "stopped", stage, stage_inputs, mlflow, checkpoint_every=0)
    assert stopped.run(Kill("step", 2, 0.0, signal.SIGTERM)) == ExitCode.PREEMPTED
    saved = re.search(r"asked to stop and saved its training after step (\d+)", stopped.log())
    assert saved, stopped.log()
    assert stopped.run() == 0
    assert f"resumed from the checkpoint of step {saved[1]} of" in stopped.log()
    assert contents(stopped.ended().manifest) == contents(whole.ended().manifest)
