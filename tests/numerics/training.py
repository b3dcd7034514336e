"""Run an objective through the real loop, in this process or on two, with a kill at any step."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.memory import TrainingMemory
from stages.config.request import ArtifactRef
from stages.config.train import TrainConfig
from stages.data.tokens.views import TokensArtifact
from stages.job.context import StageContext
from stages.models.build import save_model
from stages.train.checkpoint import Checkpointer
from stages.train.engines.choose import make_engine
from stages.train.loop import train
from stages.train.memory import MemoryMeter
from stages.train.run import Prepared
from stages.train.throughput import Meter
from tests.numerics.fork_server import shared_server
from tests.small_world import make_context, prepare_of

METER = Meter((), peak_flops=1.0)
"""Counts nothing: timing is not what is compared."""


class Killed(Exception):
    """Stands for SIGKILL: nothing after it runs."""


@dataclass
class Trained:
    """Final weights and the numbers on the way."""

    weights: dict[str, Tensor]
    history: list[dict[str, Any]]
    memory: TrainingMemory | None = None


def run_training(
    home: Path,
    stage: Stage,
    config: TrainConfig,
    inputs: dict[str, ArtifactRef],
    *,
    micro_batch_size: int = 4,
    checkpoint_every: int = 0,
    kill_at: int | None = None,
    export: bool = False,
    **execution_options: Any,
) -> Trained:
    """Train from the newest checkpoint in `home`; `kill_at` raises Killed as soon as that step is reported; `export`
    writes the model to `home/model`."""
    execution = ExecutionConfig(
        micro_batch_size=micro_batch_size,
        checkpoint_every=checkpoint_every,
        **execution_options,
    )
    context = make_context(home, stage, config, inputs, execution)
    memory = MemoryMeter(torch.device("cpu"))
    prepared = prepare_in(context)
    engine = make_engine(prepared.parts, config, execution)

    def report(metrics: dict[str, float], *, step: int, num_steps: int) -> None:
        if step == kill_at:
            raise Killed

    checkpointer = Checkpointer(context.store, context.fingerprint, keep=2, processes=engine.processes)
    try:
        history = train(
            prepared.objective(engine),
            engine,
            config=config,
            execution=execution,
            checkpointer=checkpointer,
            report=report,
            meter=METER,
            memory=memory,
        )
    finally:
        checkpointer.wait()
    held = memory.measured(engine)
    weights = engine.model_weights(prepared.exported)
    if export and engine.is_main:
        artifact = TokensArtifact(context.input_dir("tokens"))
        (home / "model").mkdir()
        save_model(prepared.parts[prepared.exported], weights, home / "model", artifact)  # type: ignore[arg-type]
    return Trained(weights, history, held)


def prepare(home: Path, stage: Stage, config: TrainConfig, inputs: dict[str, ArtifactRef]) -> Prepared:
    """What the stage makes ready, untrained."""
    return prepare_in(make_context(home, stage, config, inputs))


def prepare_in(context: StageContext) -> Prepared:
    return prepare_of(context.request.stage)(context, TokensArtifact(context.input_dir("tokens")))


@dataclass(frozen=True)
class Case:
    """A training on several processes; `options` are those of `run_training`."""

    home: Path
    stage: Stage
    config: TrainConfig
    inputs: dict[str, ArtifactRef]
    options: dict[str, Any]
    start_from: Path | None = None
    """Home of a case that ran before and left a checkpoint to go on from."""


def run_on_processes(cases: Mapping[str, Case], *, num_processes: int) -> dict[str, Trained]:
    """Run one case after another on the same gloo ranks; returns what rank 0 saw. Killed cases return nothing."""
    server = shared_server()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        torch.save(dict(cases), scratch / "cases.pt")
        ranks = [
            server.start(
                f"{__name__}:run_rank",
                log=scratch / f"rank-{rank}.log",
                rank=rank,
                num_processes=num_processes,
                scratch=folder,
            )
            for rank in range(num_processes)
        ]
        statuses = [rank.wait() for rank in ranks]
        assert statuses == [0] * num_processes, "\n".join(rank.log.read_text()[-3000:] for rank in ranks)
        return torch.load(scratch / "trained.pt", weights_only=False)


def run_on_two_processes(home: Path, stage: Stage, config: TrainConfig, inputs: dict, **options: Any) -> Trained:
    """The same training on two gloo ranks."""
    return run_on_processes({"": Case(home, stage, config, inputs, options)}, num_processes=2)[""]


def continue_from(home: Path, start_from: Path) -> None:
    """Give `home` the checkpoints of another."""
    shutil.copytree(start_from / "store" / "checkpoints", home / "store" / "checkpoints")


def run_rank(*, rank: int, num_processes: int, scratch: str) -> int:
    """One rank of `run_on_processes`, in a process of its own."""
    torch.set_num_threads(1)
    cases: dict[str, Case] = torch.load(Path(scratch) / "cases.pt", weights_only=False)
    # Ray Train sets these for its workers; DeepSpeed wants to see them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=num_processes)
    trained = {}
    for name, case in cases.items():
        if case.start_from is not None and rank == 0:
            continue_from(case.home, case.start_from)
        dist.barrier()
        with contextlib.suppress(Killed):
            trained[name] = run_training(case.home, case.stage, case.config, case.inputs, **case.options)
    if rank == 0:
        torch.save(trained, Path(scratch) / "trained.pt")
    dist.destroy_process_group()
    return 0
