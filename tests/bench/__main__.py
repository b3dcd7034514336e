"""`make bench`: our training against its peers', rounds in turn on one machine; prints ratios, writes the table of
docs/PERFORMANCE.md.

`python -m tests.bench --help` lists the options. Both sides are long-lived processes that train on the same data from
the same weights; between rounds a third measures the machine's rate of matrix products.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stages.models.precision import compute_dtype
from tests.bench.data import MODEL, make_data, model_dir, num_pairs
from tests.bench.table import Comparison, Scaling, print_all, write_page
from tests.places import REPOSITORY

logger = logging.getLogger(__name__)

_WARM_UP_ROUNDS = 1
"""Left out: they compile, fill caches and grow memory."""


@dataclass(frozen=True)
class Bench:
    """One line of the table: the peer's settings beside ours."""

    name: str
    kind: str
    peer: str
    unit: str
    target: float
    steps: int
    """Optimizer steps of one round of the peer."""
    batch: int
    """The peer's items a step."""
    our_steps: int
    our_batch: int
    """Ours: rows or pairs."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Settings of the peer's trainer that differ from its defaults."""
    ours: dict[str, Any] = field(default_factory=dict)


BENCHES = (
    Bench(
        "pretrain",
        "pretrain",
        "Trainer, torch.compile",
        "tokens",
        1.5,
        1,
        8,
        1,
        8,
        {"torch_compile": True},
        ours={"compile": True},
    ),
    Bench("sft", "sft", "SFTTrainer", "tokens", 5.0, 2, 8, 2, 3),
    Bench("sft-packed", "sft", "SFTTrainer, packing", "tokens", 4.0, 1, 8, 1, 8, {"packing": True}),
    Bench("reward", "reward", "RewardTrainer", "pairs", 4.0, 1, 8, 1, 8),
    Bench("dpo", "dpo", "DPOTrainer", "pairs", 4.0, 1, 8, 1, 8, ours={"reference": True}),
    Bench(
        "dpo-precomputed",
        "dpo",
        "DPOTrainer, precompute_ref_log_probs",
        "pairs",
        4.0,
        1,
        8,
        1,
        8,
        {"precompute_ref_log_probs": True},
    ),
)
SIZES = {
    "1M": {"hidden_size": 96, "intermediate_size": 256, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2},
    "3M": {"hidden_size": 192, "intermediate_size": 512, "num_layers": 4, "num_heads": 3, "num_kv_heads": 3},
    "10M": MODEL.model_dump(),
    "30M": {"hidden_size": 512, "intermediate_size": 1408, "num_layers": 8, "num_heads": 8, "num_kv_heads": 8},
}


class Worker:
    """A process that trains one round each time it is told to."""

    def __init__(self, command: list[str], log: Path, *, threads: int) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        self._read()  # ready

    def round(self) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            tail = "".join(self._log.read_text().splitlines(keepends=True)[-20:])
            raise RuntimeError(f"the worker ended: {self._log}\n{tail}")
        return json.loads(line)


@dataclass(frozen=True)
class Bed:
    """Where everything lies and how it runs."""

    home: Path
    peers_python: Path
    inputs: dict[str, Any]
    threads: int
    rounds: int
    precision: str

    @contextmanager
    def ours(self, kind: str, name: str, **options: Any) -> Iterator[Worker]:
        options = {
            "threads": self.threads,
            "precision": self.precision,
            "rounds": self.rounds + _WARM_UP_ROUNDS,
            "pairs": num_pairs(self.inputs),
        } | options
        command = [sys.executable, "-m", "tests.bench.ours", str(self.home), kind, json.dumps(options)]
        worker = Worker(command, self.home / "logs" / f"{name}-ours.log", threads=options["threads"])
        try:
            yield worker
        finally:
            worker.stop()

    @contextmanager
    def peer(self, bench: Bench) -> Iterator[Worker]:
        rows = self.home / "peers" / f"{'pairs' if bench.unit == 'pairs' else bench.kind}.jsonl.gz"
        options = {
            "threads": self.threads,
            "bf16": self.precision == "bf16" and compute_dtype(torch.device("cpu")) is torch.bfloat16,
            "steps": bench.steps,
            "batch": bench.batch,
            "rounds": self.rounds + _WARM_UP_ROUNDS,
            "arguments": bench.arguments,
        }
        script = str(REPOSITORY / "tests" / "bench" / "peers.py")
        command = [
            str(self.peers_python),
            script,
            bench.kind,
            str(model_dir(self.inputs)),
            str(rows),
            json.dumps(options),
        ]
        worker = Worker(command, self.home / "logs" / f"{bench.name}-peer.log", threads=self.threads)
        try:
            yield worker
        finally:
            worker.stop()


def compare(bed: Bed, bench: Bench) -> Comparison:
    """Run one bench, a round of each side in turn."""
    comparison = Comparison(bench.name, bench.peer, bench.unit, bench.target)
    options = {"steps": bench.our_steps, "batch": bench.our_batch, **bench.ours}
    with (
        bed.ours(bench.kind, bench.name, **options) as ours,
        bed.peer(bench) as peer,
        bed.ours("matmul", bench.name + "-matmul", seconds=1.0) as matmul,
    ):
        for number in range(bed.rounds + _WARM_UP_ROUNDS):
            results = ours.round(), peer.round(), matmul.round()
            if number >= _WARM_UP_ROUNDS:
                comparison.add(*results)
                print(comparison.progress(), flush=True)
    return comparison


def scale(bed: Bed) -> Scaling:
    """One process on one core against two on two, and models from 1M to 30M parameters."""
    one: dict[str, Any] = {"threads": 1, "steps": 1, "batch": 4, "micro_batch": 2}
    processes: dict[str, list[float]] = {"1": [], "2": []}
    with bed.ours("pretrain", "one", **one) as single, bed.ours("pretrain", "two", processes=2, **one) as double:
        for number in range(bed.rounds + _WARM_UP_ROUNDS):
            for name, worker in (("1", single), ("2", double)):
                result = worker.round()
                if number >= _WARM_UP_ROUNDS:
                    processes[name].append(result["units"] / result["seconds"])
    sizes: dict[str, list[tuple[float, float]]] = {name: [] for name in SIZES}
    for name, model in SIZES.items():
        options = {"steps": 1, "batch": 4, "model": model}
        with bed.ours("pretrain", name, **options) as worker, bed.ours("matmul", "rate", seconds=1.0) as matmul:
            for number in range(bed.rounds + _WARM_UP_ROUNDS):
                result, rate = worker.round(), matmul.round()
                if number >= _WARM_UP_ROUNDS:
                    sizes[name].append((result["flops"] / result["seconds"], rate["flops"] / rate["seconds"]))
    return Scaling(
        {name: statistics.median(values) for name, values in processes.items()},
        {name: statistics.median(done / rate for done, rate in values) for name, values in sizes.items()},
    )


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    names = [bench.name for bench in BENCHES]
    parser.add_argument(
        "--only", default=",".join([*names, "scaling"]), help=f"some of: {', '.join([*names, 'scaling'])}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each side (default 5)")
    parser.add_argument("--quick", action="store_true", help="2 rounds; nothing is written")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each side")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="what both sides are asked for")
    parser.add_argument("--peers-python", type=Path, default=REPOSITORY / ".athanor" / "bench-venv" / "bin" / "python")
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".athanor" / "bench")
    parser.add_argument(
        "--page", type=Path, default=REPOSITORY / "docs" / "PERFORMANCE.md", help="where the table goes"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.only.split(",")) - {*names, "scaling"}
    if unknown:
        parser.error(f"--only={chosen.only}: no bench {', '.join(sorted(unknown))}")
    sources = Path(os.environ.get("ATHANOR_BENCH_DATA", REPOSITORY.parent / "shared" / "data"))
    inputs = make_data(chosen.home, sources)
    rounds = 2 if chosen.quick else chosen.rounds
    bed = Bed(chosen.home, chosen.peers_python, inputs, chosen.threads, rounds, chosen.precision)
    comparisons = [compare(bed, bench) for bench in BENCHES if bench.name in chosen.only.split(",")]
    scaling = scale(bed) if "scaling" in chosen.only.split(",") else None
    print_all(comparisons, scaling)
    if not chosen.quick:
        write_page(chosen.page, comparisons, scaling, rounds=rounds, threads=chosen.threads)


if __name__ == "__main__":
    main()
