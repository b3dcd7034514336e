"""Run an objective through the real loop, in this process or on two, with a kill at any step."""

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.train import TrainConfig
from stages.data.tokens import TokensArtifact
from stages.train.checkpoint import Checkpointer
from stages.train.engine import Engine
from stages.train.loop import train
from stages.train.throughput import Meter
from tests.small_world import make_context

METER = Meter((), peak_flops=1.0)
"""Counts nothing: timing is not what is compared."""


class Killed(Exception):
    """Stands for SIGKILL: nothing after it runs."""


@dataclass
class Trained:
    """Final weights and the numbers on the way."""

    weights: dict[str, Tensor]
    history: list[dict[str, Any]]


def run_training(
    home: Path,
    stage: Stage,
    config: TrainConfig,
    inputs: dict[str, ArtifactRef],
    *,
    micro_batch_size: int = 4,
    checkpoint_every: int = 0,
    kill_at: int | None = None,
    engine_kind: str = "ddp",
    num_workers: int = 0,
) -> Trained:
    """Train from the newest checkpoint in `home`; `kill_at` raises Killed as soon as that step is reported."""
    execution = ExecutionConfig(
        micro_batch_size=micro_batch_size,
        checkpoint_every=checkpoint_every,
        engine=engine_kind,  # type: ignore[arg-type]
        num_workers=num_workers,
    )
    context = make_context(home, stage, config, inputs, execution)
    artifact = TokensArtifact(context.input_dir("tokens"))
    prepared = importlib.import_module(f"stages.{stage.value}").prepare(context, artifact)
    engine = Engine(prepared.parts, config, execution)

    def report(metrics: dict[str, float], *, step: int, num_steps: int) -> None:
        if step == kill_at:
            raise Killed

    checkpointer = Checkpointer(context.store, context.fingerprint, keep=2, rank=engine.rank)
    try:
        history = train(
            prepared.objective(engine),
            engine,
            config=config,
            execution=execution,
            checkpointer=checkpointer,
            report=report,
            meter=METER,
        )
    finally:
        checkpointer.wait()
    return Trained(engine.model_weights(prepared.exported), history)


def run_on_two_processes(home: Path, stage: Stage, config: TrainConfig, inputs: dict, **options: Any) -> Trained:
    """The same on two gloo ranks; returns what rank 0 saw."""
    with tempfile.TemporaryDirectory() as scratch:
        spawn(_rank, args=(scratch, home, stage, config, inputs, options), nprocs=2)
        return torch.load(Path(scratch) / "trained.pt", weights_only=False)


def _rank(rank: int, scratch: str, home: Path, stage: Stage, config: TrainConfig, inputs: dict, options: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=2)
    trained = run_training(home, stage, config, inputs, **options)
    if rank == 0:
        torch.save(trained, Path(scratch) / "trained.pt")
    dist.destroy_process_group()
