"""`python -m tests.bench.mfu 1B --compile`: how well one device is used by pretraining a model of this size.

Prints tokens a second, MFU and peak memory of the training loop itself on random tokens, the first steps left out. It
needs no data and no other process, so it is the first thing to run on a new GPU; `--precision fp32` and `tiny` try it
anywhere.
"""

import argparse
import logging
import statistics
import sys
import tempfile
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from stages.artifacts.addresses import open_store
from stages.config.execution import ExecutionConfig
from stages.config.train import ModelConfig, OptimizerConfig, PretrainConfig
from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.views import TokensArtifact
from stages.job.devices import local_device
from stages.models.build import new_causal_lm
from stages.models.precision import compute_dtype
from stages.train.checkpoint import Checkpointer
from stages.train.engines.choose import make_engine
from stages.train.loop import train
from stages.train.next_token import NextTokenObjective
from stages.train.throughput import Meter
from tests.bench.protocol import peak_bytes

VOCABULARY = 32_768
SIZES = {
    "tiny": ModelConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=2),
    "350M": ModelConfig(hidden_size=1024, intermediate_size=2816, num_layers=24, num_heads=16, num_kv_heads=16),
    "1B": ModelConfig(hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8),
}
_WARM_UP_STEPS = 3
"""Left out: they compile, choose kernels and grow memory."""


class RandomRows:
    """Rows of random tokens, a document each."""

    def __init__(self, count: int, length: int) -> None:
        self._count, self._length = count, length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[TokenSequence]:
        ids = np.random.default_rng(index).integers(0, VOCABULARY, self._length)
        return [TokenSequence(ids, np.ones(self._length, dtype=np.int64))]


def measure(
    size: str, *, sequence: int, steps: int, config: PretrainConfig, execution: ExecutionConfig
) -> dict[str, float]:
    """Train and return tokens_per_second, mfu (medians), parameters and peak_gb."""
    device = local_device()
    shape = SimpleNamespace(vocab_size=VOCABULARY, sequence_length=sequence, bos_id=-1, eos_id=0, pad_id=0)
    model = new_causal_lm(SIZES[size], cast(TokensArtifact, shape), seed=0)
    parts: dict[str, Any] = {"policy": model}
    meter = Meter.of(parts, device=device, dtype=compute_dtype(device, config.precision))
    engine = make_engine(parts, config, execution)
    rows = RandomRows((steps + _WARM_UP_STEPS) * config.global_batch_size, sequence)
    objective = NextTokenObjective(
        rows,
        np.arange(len(rows)),
        heldout=RandomRows(1, sequence),
        global_batch_size=config.global_batch_size,
        micro_batch_size=execution.micro_batch_size,
        eval_items=1,
    )
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        checkpointer = Checkpointer(open_store(f"file://{scratch}"), "mfu", keep=1, processes=engine.processes)
        train(
            objective,
            engine,
            config=config,
            execution=execution,
            checkpointer=checkpointer,
            report=lambda metrics, **_: seen.append(metrics),
            meter=meter,
        )
    timed = seen[_WARM_UP_STEPS:]
    on_gpu = device.type == "cuda"
    return {
        "tokens_per_second": statistics.median(row["train/tokens_per_second"] for row in timed),
        "mfu": statistics.median(row["train/mfu"] for row in timed),
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "peak_gb": (torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()) / 1e9,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mfu", description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows at once")
    parser.add_argument("--batch", type=int, default=0, help="rows of a step; as many as at once unless given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=("bf16", "fp32", "fp16"), default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    chosen = parser.parse_args(arguments)
    config = PretrainConfig(
        max_tokens=1 << 40,
        model=SIZES[chosen.size],
        precision=chosen.precision,
        global_batch_size=chosen.batch or chosen.micro_batch,
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    execution = ExecutionConfig(
        micro_batch_size=chosen.micro_batch,
        compile=chosen.compile,
        gradient_checkpointing=chosen.gradient_checkpointing,
    )
    found = measure(chosen.size, sequence=chosen.sequence, steps=chosen.steps, config=config, execution=execution)
    print(
        f"{chosen.size} ({found['parameters'] / 1e6:,.0f} M parameters): {found['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {found['mfu']:.1%}, peak memory {found['peak_gb']:.2f} GB"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
