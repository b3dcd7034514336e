"""SIGKILL at a chosen moment of a real stage, and what a stage leaves behind.

A place is a function of the product (a step's forward and backward, the writing of a checkpoint, a rollout, an
evaluation, the publication, or the stage as a whole). An undisturbed run records how long each visit of each place
takes. A kill is a place, one of its visits and a share of that visit's time: when the visit begins, the process tells
a companion, forked before any thread was started, which sleeps for that time and sends SIGKILL. So the kill comes from
outside, asynchronously, in the middle of whatever C code then runs, and in whatever thread.
"""

import importlib
import json
import logging
import os
import random
import select
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.config.graph import Stage

STAGE_AS_A_WHOLE = "stage"
_PLACES = {
    STAGE_AS_A_WHOLE: "stages.job.runner:execute",
    "step": "stages.train.loop:_accumulate",
    "save": "stages.train.checkpoint:Checkpointer._write",
    "publication": "stages.job.runner:_manifest",
}
_EVALUATIONS = {
    Stage.PRETRAIN: "stages.train.next_token:NextTokenObjective.evaluate",
    Stage.SFT: "stages.train.next_token:NextTokenObjective.evaluate",
    Stage.REWARD: "stages.train.pairs:PairObjective.evaluate",
    Stage.DPO: "stages.train.pairs:PairObjective.evaluate",
    Stage.PPO: "stages.train.rollout.objective:PPOObjective.evaluate",
}

Visits = dict[str, list[float]]
"""Seconds of every visit, by place."""


_OF_KTO = {
    "evaluation": "stages.train.examples:ExampleObjective.evaluate",
    "baseline": "stages.train.examples:ExampleSteps.laid_out",
}
"""Its steps begin with a pass over the mismatches of all examples."""


def places_of(stage: Stage, loss: str = "") -> dict[str, str]:
    """Return the places of a stage, with the loss of this kind where it has several."""
    rollout = {"rollout": "stages.train.rollout.objective:PPOObjective._roll_out"} if stage is Stage.PPO else {}
    return {**_PLACES, "evaluation": _EVALUATIONS[stage], **rollout, **(_OF_KTO if loss == "kto" else {})}


@dataclass(frozen=True)
class Kill:
    """When to die: `seconds` after visit number `visit` of `place` has begun."""

    place: str
    visit: int
    seconds: float
    signal: int = signal.SIGKILL


def draw_kill(rng: random.Random, place: str, visits: Visits) -> Kill:
    """Every visit is equally likely, and every moment of it."""
    visit = rng.randrange(len(visits[place]))
    return Kill(place, visit, rng.random() * visits[place][visit])


def run(config_uri: str, *, kill: dict[str, Any] | None, record: str | None) -> int:
    """`python -m stages` in a forked process: die at `kill`, or write the visits to the file `record`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)-7s %(name)s: %(message)s", stream=sys.stdout)
    from stages.__main__ import verb_of
    from stages.job.runner import load_request, run_stage

    companion = _Companion()
    request = load_request(config_uri)[0]
    loss = request.config.get("loss", {}).get("kind", "")
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for place, target in places_of(request.stage, loss).items():
        _watch(target, _visits(place, seconds, Kill(**kill) if kill else None, companion))
    status = run_stage(config_uri, verb_of)
    if record:
        Path(record).write_text(json.dumps(seconds))
    return status


def _visits(
    place: str, seconds: defaultdict[str, list[float]], kill: Kill | None, companion: "_Companion"
) -> Callable[..., Callable[..., Any]]:
    count = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def visited(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if kill and (kill.place, kill.visit) == (place, count):
                companion.send(kill)
            count += 1
            started = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                seconds[place].append(time.monotonic() - started)

        return visited

    return wrap


def _watch(target: str, wrap: Callable[..., Callable[..., Any]]) -> None:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, wrap(getattr(owner, name)))


class _Companion:
    """A process that kills its parent when told; it ends with it."""

    def __init__(self) -> None:
        assert threading.active_count() == 1
        read, self._write = os.pipe()
        victim = os.getpid()
        if os.fork() == 0:
            os.close(self._write)
            order = os.read(read, 1024)
            if order:
                kill = Kill(**json.loads(order))
                ended, _, _ = select.select([read], [], [], kill.seconds)
                if not ended:  # an end of file: the victim is gone, its pid may be another process's by now
                    os.kill(victim, kill.signal)
            os._exit(0)
        os.close(read)

    def send(self, kill: Kill) -> None:
        os.write(self._write, json.dumps(asdict(kill)).encode())


def as_json(kill: Kill | None) -> dict[str, Any] | None:
    return asdict(kill) if kill else None


_VARIES = (
    "cost/",
    "train/tokens_per_second",
    "train/mfu",
    "train/data_wait_seconds",
    "train/checkpoint_blocked_seconds",
)
"""Measurements of time, which no two runs share."""


def make_database() -> None:
    """Create MLflow's tables, which takes longer than a tiny stage."""
    from mlflow import MlflowClient

    MlflowClient().search_experiments()


def write_tracked(store_uri: str, run_id: str, stage: str, answer: str) -> None:
    """Write what MLflow has of a stage, but times, as JSON: metric -> [[step, value], ...].

    First comes what a stage on a slow machine left in the store, as a closing stage would deliver it.
    """
    from mlflow import MlflowClient

    from stages.artifacts.addresses import open_store
    from stages.tracking.delivery import replay

    assert replay(open_store(store_uri), run_id) == []
    client = MlflowClient()
    wanted = f"tags.`athanor.run_id` = '{run_id}' and tags.`lineage.stage` = '{stage}'"
    (run,) = client.search_runs([found.experiment_id for found in client.search_experiments()], wanted)
    series = {
        name: sorted([point.step, point.value] for point in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
        if not name.startswith(_VARIES)
    }
    Path(answer).write_text(json.dumps(series))
