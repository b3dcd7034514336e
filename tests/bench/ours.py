"""Our side of the benchmark: the verbs' own objectives in the one training loop, paused between rounds.

`python -m tests.bench.ours <home> <kind> <options>`; kinds are the stages, `matmul` (the machine's rate of matrix
products) and `size` (pretraining of a model of another size). With `processes: 2` it trains on two gloo ranks.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.preferences import DPOConfig, RewardConfig
from stages.config.request import ArtifactRef
from stages.config.train import ModelConfig, PretrainConfig, SFTConfig, TrainConfig
from stages.data.tokens.packing import Packed
from stages.data.tokens.views import TokensArtifact
from stages.job.context import StageContext
from stages.models.build import load_causal_lm
from stages.models.flops import FlopCounter
from stages.models.forward import target_logprobs
from stages.models.precision import compute_dtype
from stages.train.checkpoint import Checkpointer
from stages.train.engine import Engine
from stages.train.engines.choose import make_engine
from stages.train.loop import train
from stages.train.objective import Step
from stages.train.throughput import Meter
from tests.bench.data import MODEL, OPTIMIZER, SEQUENCE_LENGTH
from tests.bench.protocol import Rounds
from tests.small_world import make_context, prepare_of

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
            return SFTConfig(num_epochs=100, **common)
        case Stage.REWARD:
            return RewardConfig(num_epochs=100, center_coefficient=0.01, **common)
        case Stage.DPO:
            return DPOConfig(num_epochs=_dpo_epochs(options), **common)
    raise ValueError(f"no benchmark of {stage}")


def _dpo_epochs(options: dict[str, Any]) -> float:
    """As many pairs as the rounds need, and one round more: the reference is computed for no others."""
    return options["batch"] * options["steps"] * (options["rounds"] + 1) / options["pairs"]


class Counted:
    """An objective that tells the rounds how much work its steps hold, and does what else belongs to a step."""

    def __init__(
        self, objective: Any, rounds: Any, counter: FlopCounter, unit: str, *, before: Callable[[Packed], object] | None
    ) -> None:
        self._objective, self._rounds, self._counter, self._unit = objective, rounds, counter, unit
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def steps(self, engine: Engine) -> Iterator[Step]:
        for step in self._objective.steps(engine):
            for batch in step.micro_batches:
                units = batch.num_segments / 2 if self._unit == "pairs" else batch.num_tokens
                self._rounds.count(units * engine.world_size, flops=self._counter.training(batch) * engine.world_size)
                if self._before:
                    self._before(batch)
            yield step


def work(home: Path, stage: Stage, options: dict[str, Any]) -> None:
    """Train for ever, a round at a time."""
    torch.set_num_threads(options["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        context = _context(home, Path(scratch), stage, options)
        artifact = TokensArtifact(context.input_dir("tokens"))
        prepared = prepare_of(stage)(context, artifact)
        counter = FlopCounter.of(next(iter(prepared.parts.values())))
        config = context.config
        assert isinstance(config, TrainConfig)
        engine = make_engine(prepared.parts, config, context.execution)
        rounds = Rounds(options["steps"], in_step=_together) if engine.is_main else _Follower(options["steps"])
        counted = Counted(
            prepared.objective(engine),
            rounds,
            counter,
            "pairs" if stage in (Stage.REWARD, Stage.DPO) else "tokens",
            before=_reference_pass(context, engine, artifact) if options.get("reference") else None,
        )
        rounds.begin()
        train(
            counted,  # type: ignore[arg-type]
            engine,
            config=config,
            execution=context.execution,
            checkpointer=Checkpointer(context.store, context.fingerprint, keep=1, processes=engine.processes),
            report=lambda metrics, **_: rounds.step(
                loss=metrics["train/loss"], waited=metrics["train/data_wait_seconds"]
            ),
            meter=Meter((), peak_flops=1.0),
        )


def _context(home: Path, scratch: Path, stage: Stage, options: dict[str, Any]) -> StageContext:
    refs = json.loads((home / "inputs.json").read_text())
    needed = ("tokens",) if stage is Stage.PRETRAIN else ("tokens", "model")
    inputs = {role: ArtifactRef.model_validate(refs[role]) for role in needed}
    execution = ExecutionConfig(micro_batch_size=options.get("micro_batch", 8), compile=options.get("compile", False))
    return make_context(scratch, stage, config_of(stage, options), inputs, execution)


def _reference_pass(context: StageContext, engine: Engine, tokens: TokensArtifact) -> Callable[[Packed], object]:
    """The forward pass of the reference, which training makes once for all epochs, as part of every step."""
    reference = engine.freeze(load_causal_lm(context.input_dir("model"), tokens))
    return lambda batch: engine.infer(lambda parts, moved: target_logprobs(reference, moved).logprobs_N, batch)


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


def _follow(index: int, *arguments: Any) -> None:
    _rank(index + 1, *arguments)


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
            arguments = (scratch, Path(home), Stage(kind), options)
            spawn(_follow, args=arguments, nprocs=options["processes"] - 1, join=False, daemon=True)
            _rank(0, *arguments)  # here, because a spawned process has no standard input


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
