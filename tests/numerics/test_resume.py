"""Train 2N == train N, die, train N: bit for bit on the CPU, for every objective and wherever it died."""

from pathlib import Path

import pytest
import torch

from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from tests.numerics.training import Killed, run_training
from tests.small_world import CONFIGS


@pytest.mark.parametrize("stage", list(CONFIGS), ids=str)
def test_a_killed_training_ends_with_the_same_bits(
    stage: Stage, stage_inputs: dict[Stage, dict[str, ArtifactRef]], tmp_path: Path
) -> None:
    config, inputs = CONFIGS[stage], stage_inputs[stage]
    undisturbed = run_training(tmp_path / "whole", stage, config, inputs)
    # Checkpoints every 3 steps: PPO makes 4 steps a rollout, so the kill at 4 resumes in the middle of a rollout.
    for kill_at in (4, 5):
        with pytest.raises(Killed):
            run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3, kill_at=kill_at)
    resumed = run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3)
    assert len(undisturbed.history) >= 6
    for name, weight in undisturbed.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    for before, after in zip(undisturbed.history, resumed.history, strict=True):
        for key in before.keys() - {"train/tokens_per_second"}:
            assert before[key] == after[key], (before["step"], key)


def test_a_damaged_checkpoint_is_passed_over(
    stage_inputs: dict[Stage, dict[str, ArtifactRef]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, inputs = CONFIGS[Stage.PRETRAIN], stage_inputs[Stage.PRETRAIN]
    undisturbed = run_training(tmp_path / "whole", Stage.PRETRAIN, config, inputs)
    with pytest.raises(Killed):
        run_training(tmp_path / "killed", Stage.PRETRAIN, config, inputs, checkpoint_every=2, kill_at=5)
    newest = sorted((tmp_path / "killed" / "store" / "checkpoints").rglob("engine-*.safetensors"))[-1]
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    resumed = run_training(tmp_path / "killed", Stage.PRETRAIN, config, inputs, checkpoint_every=2)
    assert "step-00000004 is damaged" in caplog.text
    assert all(torch.equal(weight, resumed.weights[name]) for name, weight in undisturbed.weights.items())


def test_a_different_seed_gives_different_weights(
    stage_inputs: dict[Stage, dict[str, ArtifactRef]], tmp_path: Path
) -> None:
    """Guards the equality above: it must not hold for runs that differ."""
    config, inputs = CONFIGS[Stage.PRETRAIN], stage_inputs[Stage.PRETRAIN]
    one = run_training(tmp_path / "a", Stage.PRETRAIN, config, inputs)
    other = run_training(tmp_path / "b", Stage.PRETRAIN, config.model_copy(update={"seed": 1}), inputs)
    assert not torch.equal(one.weights["model.norm.weight"], other.weights["model.norm.weight"])
