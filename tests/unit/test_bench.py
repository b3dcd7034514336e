"""The benchmarks themselves still run: what they measure is printed, never tested."""

import json
from pathlib import Path

import pytest

from stages.config.execution import ExecutionConfig
from stages.config.train import OptimizerConfig, PretrainConfig
from tests.bench import mfu
from tests.bench.data import make_data, num_pairs
from tests.places import SHARED

DATA = SHARED / "data"


def test_mfu_counts_the_tokens_of_the_loop():
    config = PretrainConfig(
        max_tokens=1 << 20, model=mfu.SIZES["tiny"], global_batch_size=2, optimizer=OptimizerConfig(learning_rate=1e-3)
    )
    found = mfu.measure("tiny", sequence=32, steps=2, config=config, execution=ExecutionConfig(micro_batch_size=2))
    assert found["tokens_per_second"] > 0
    assert 0 < found["mfu"] < 2
    assert found["parameters"] == pytest.approx(2.18e6, rel=0.01)


def test_both_sides_of_make_bench_find_the_same_data(tmp_path: Path):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: the benchmark's text, conversations and pairs lie there")
    inputs = make_data(tmp_path / "bench", DATA)
    assert num_pairs(inputs) > 100
    assert make_data(tmp_path / "bench", DATA) == inputs  # found, not made again
    assert {file.name for file in (tmp_path / "bench" / "peers").iterdir()} == {
        f"{name}.jsonl.gz" for name in ("pretrain", "sft", "pairs")
    }
    assert json.loads((tmp_path / "bench" / "inputs.json").read_text()).keys() == inputs.keys()
