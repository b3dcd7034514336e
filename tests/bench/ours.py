"""Our side of the benchmark: the verbs' own objectives in the one training loop, paused between rounds.

`python -m tests.bench.ours <home> <kind> <options>`; kinds are the stages, `matmul` (the machine's rate of matrix
products) and `size` (pretraining of a model of another size). With `processes: 2` it trains on two gloo ranks.
"""

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.train import DPOConfig, ModelConfig, PretrainConfig, RewardConfig, SFTConfig, TrainConfig
from stages.data.tokens import TokensArtifact
from stages.models.flops import FlopCounter
from stages.models.precision import compute_dtype
from stages.train.checkpoint import Checkpointer
from stages.train.engine import Engine
from stages.train.loop import train
from stages.train.objective import Step
from tests.bench.data import MODEL, OPTIMIZER, SEQUENCE_LENGTH
from tests.bench.protocol import Rounds
from tests.small_world import make_context

_MATMUL = (8 * SEQUENCE_LENGTH, MODEL.hidden_size, MODEL.intermediate_size)
"""The model's largest layer on the micro-batch of pretraining."""


def config_of(stage: Stage, options: dict[str, Any]) -> TrainConfig:
    common: dict[str, Any] = {
        "optimizer": OPTIMIZER,
        "precision": options["precision"],
        "global_batch_size": options["batch"],
        "eval_items": 1,
    }
    match stage:
        case Stage.PRETRAIN:
            model = ModelConfig(**options["model"]) if "model" in options else MODEL
            return PretrainConfig(max_tokens=1 << 40, max_epochs=1000, model=model, **common)
        case Stage.SFT:
            return SFTConfig(num_epochs=1000, **common)
        case Stage.REWARD:
            return RewardConfig(num_epochs=1000, center_coefficient=0.01, **common)
        case Stage.DPO:
            return DPOConfig(num_epochs=options.get("epochs", 1000), **common)
    raise ValueError(f"no benchmark of {stage}")


class Counted:
    """An objective that tells the rounds how much work its steps hold."""

    def __init__(self, objective: Any, rounds: Rounds, counter: FlopCounter, unit: str) -> None:
        self._objective, self._rounds, self._counter, self._unit = objective, rounds, counter, unit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def steps(self, engine: Engine):
        for step in self._objective.steps(engine):
            self._count(step, engine.world_size)
            yield step

    def _count(self, step: Step, world_size: int) -> None:
        for batch in step.micro_batches:
            units = batch.num_segments / 2 if self._unit == "pairs" else batch.num_tokens
            self._rounds.count(units * world_size, flops=self._counter.training(batch) * world_size)


def work(home: Path, stage: Stage, options: dict[str, Any]) -> None:
    """Train for ever, a round at a time."""
    torch.set_num_threads(options["threads"])
    inputs = {
        role: ArtifactRef.model_validate(ref) for role, ref in json.loads((home / "inputs.json").read_text()).items()
    }
    execution = ExecutionConfig(micro_batch_size=options.get("micro_batch", 8), compile=options.get("compile", False))
    config = config_of(stage, options)
    with tempfile.TemporaryDirectory() as scratch:
        needed = inputs if stage is not Stage.PRETRAIN else {"tokens": inputs["tokens"]}
        context = make_context(Path(scratch), stage, config, needed, execution)
        prepared = importlib.import_module(f"stages.{stage}").prepare(
            context, TokensArtifact(context.input_dir("tokens"))
        )
        counter = FlopCounter.of(next(iter(prepared.parts.values())))
        engine = Engine(prepared.parts, config, execution)
        objective = prepared.objective(engine)
        rounds = Rounds(options["steps"], in_step=_together) if engine.rank == 0 else _Follower(options["steps"])
        rounds.begin()
        train(
            Counted(objective, rounds, counter, "pairs" if stage in (Stage.REWARD, Stage.DPO) else "tokens"),  # type: ignore[arg-type]
            engine,
            config=config,
            execution=execution,
            checkpointer=Checkpointer(context.store, context.fingerprint, keep=1, rank=engine.rank),
            report=lambda metrics, **_: rounds.step(loss=metrics["train/loss"]),
        )


class _Follower:
    """The rounds of a rank that reports nothing."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done = steps, 0

    def begin(self) -> None:
        _together()

    def count(self, units: float, *, flops: float = 0.0) -> None: ...

    def step(self, **_: Any) -> None:
        self._done += 1
        if self._done % self._steps == 0:
            _together()


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


def _rank(rank: int, scratch: str, home: Path, stage: Stage, options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=options["processes"]
    )
    work(home, stage, options)


def measure_matmul(options: dict[str, Any]) -> None:
    """Report the rate of the model's matrix products in the number format that training uses, a round at a time."""
    torch.set_num_threads(options["threads"])
    dtype = compute_dtype(torch.device("cpu"), options["precision"])
    rows, width, out = _MATMUL
    left, right = torch.randn(rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)
    rounds = Rounds(1)
    rounds.begin()
    while True:
        until = time.perf_counter() + options["seconds"]
        while time.perf_counter() < until:
            torch.nn.functional.linear(left, right)
            rounds.count(1.0, flops=2.0 * rows * width * out)
        rounds.step()


def main(home: str, kind: str, options: dict[str, Any]) -> None:
    if kind == "matmul":
        measure_matmul(options)
    elif options.get("processes", 1) == 1:
        work(Path(home), Stage(kind), options)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            spawn(_rank, args=(scratch, Path(home), Stage(kind), options), nprocs=options["processes"])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
