"""How a step is cut into micro-batches and spread over processes does not change what is learned."""

from pathlib import Path

import pytest
import torch

from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from tests.numerics.training import Trained, run_on_two_processes, run_training
from tests.small_world import CONFIGS

_TOLERANCE = 2e-5
"""Relative, on the loss of every step: only the order of float32 sums differs."""


def losses(trained: Trained) -> list[float]:
    return [row["train/loss"] for row in trained.history]


@pytest.mark.parametrize("stage", list(CONFIGS), ids=str)
def test_micro_batches_do_not_matter(
    stage: Stage, stage_inputs: dict[Stage, dict[str, ArtifactRef]], tmp_path: Path
) -> None:
    large = run_training(tmp_path / "large", stage, CONFIGS[stage], stage_inputs[stage], micro_batch_size=16)
    small = run_training(tmp_path / "small", stage, CONFIGS[stage], stage_inputs[stage], micro_batch_size=1)
    assert losses(small) == pytest.approx(losses(large), rel=_TOLERANCE, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "engine"),
    [(Stage.SFT, "ddp"), (Stage.DPO, "ddp"), (Stage.PPO, "fsdp")],
    ids=["sft-ddp", "dpo-ddp", "ppo-fsdp"],
)
def test_two_processes_learn_the_same(
    stage: Stage, engine: str, stage_inputs: dict[Stage, dict[str, ArtifactRef]], tmp_path: Path
) -> None:
    alone = run_training(tmp_path / "one", stage, CONFIGS[stage], stage_inputs[stage])
    together = run_on_two_processes(
        tmp_path / "two", stage, CONFIGS[stage], stage_inputs[stage], engine=engine, num_workers=2
    )
    assert losses(together) == pytest.approx(losses(alone), rel=_TOLERANCE, abs=1e-6)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(together.weights[name], weight, rtol=1e-3, atol=2e-5)
