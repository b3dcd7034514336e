"""Options of the optimizer in the real loop: they resume to the same bits and do not depend on the layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.train import TrainConfig
from stages.data.tokens.packing import TokenSequence, collate
from stages.models.noise import embedding_noise
from tests.numerics.training import Killed, Trained, run_on_two_processes, run_training
from tests.small_world import CONFIGS

Inputs = dict[Stage, dict[str, ArtifactRef]]

OPTIONS: dict[str, tuple[Stage, dict[str, Any], dict[str, Any]]] = {
    "muon": (Stage.PRETRAIN, {"algorithm": "muon", "weight_decay": 0.1}, {}),
    "average": (Stage.PRETRAIN, {"ema_decay": 0.5}, {}),
    "spikes": (Stage.PRETRAIN, {"spike_window": 4, "spike_factor": 0.1}, {}),
    "z-loss and noise": (Stage.SFT, {}, {"z_loss_coefficient": 0.01, "neftune_alpha": 5.0}),
    "wsd": (Stage.SFT, {"schedule": "wsd", "warmup_steps": 2}, {}),
    "tokens": (Stage.PRETRAIN, {"schedule": "wsd", "warmup_tokens": 300, "decay_tokens": 512}, {}),
}


def changed(stage: Stage, optimizer: dict[str, Any], settings: dict[str, Any]) -> TrainConfig:
    config = CONFIGS[stage].model_dump() | settings
    return type(CONFIGS[stage]).model_validate(config | {"optimizer": config["optimizer"] | optimizer})


@pytest.mark.parametrize("option", OPTIONS)
def test_it_resumes_to_the_same_bits_and_changes_the_result(option: str, stage_inputs: Inputs, tmp_path: Path):
    stage, *changes = OPTIONS[option]
    config, inputs = changed(stage, *changes), stage_inputs[stage]
    whole = run_training(tmp_path / "whole", stage, config, inputs)
    with pytest.raises(Killed):
        run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3, kill_at=5)
    resumed = run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    ignored = {"train/tokens_per_second"}
    assert [row for row in without(whole, ignored)] == [row for row in without(resumed, ignored)]
    default = run_training(tmp_path / "default", stage, CONFIGS[stage], inputs)
    assert not torch.equal(default.weights["model.norm.weight"], whole.weights["model.norm.weight"])


def test_pretraining_turns_tokens_into_its_steps(stage_inputs: Inputs, tmp_path: Path):
    """Steps of 4 rows of 64 tokens: 300 are two steps, 512 as well."""
    in_steps = {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 2}
    rates = []
    for name, optimizer in (("steps", in_steps), ("tokens", OPTIONS["tokens"][1])):
        config = changed(Stage.PRETRAIN, optimizer, {})
        trained = run_training(tmp_path / name, Stage.PRETRAIN, config, stage_inputs[Stage.PRETRAIN])
        rates.append([row["train/learning_rate"] for row in trained.history])
    assert rates[0] == rates[1] == pytest.approx([0.0015, 0.003, 0.003, 0.003, 0.003, 0.0003])


def without(trained: Trained, keys: set[str]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in keys} for row in trained.history]


@pytest.mark.parametrize("option", ["muon", "z-loss and noise"])
def test_micro_batches_do_not_matter(option: str, stage_inputs: Inputs, tmp_path: Path):
    stage, *changes = OPTIONS[option]
    config, inputs = changed(stage, *changes), stage_inputs[stage]
    large = run_training(tmp_path / "l", stage, config, inputs, micro_batch_size=4)
    small = run_training(tmp_path / "s", stage, config, inputs, micro_batch_size=1)
    losses = [[row["train/loss"] for row in trained.history] for trained in (small, large)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_muon_with_an_average_learns_the_same_on_two_processes(engine: str, stage_inputs: Inputs, tmp_path: Path):
    config = changed(Stage.PRETRAIN, {"algorithm": "muon", "ema_decay": 0.5}, {})
    inputs = stage_inputs[Stage.PRETRAIN]
    alone = run_training(tmp_path / "one", Stage.PRETRAIN, config, inputs)
    together = run_on_two_processes(tmp_path / "two", Stage.PRETRAIN, config, inputs, engine=engine, num_workers=2)
    losses = [[row["train/loss"] for row in trained.history] for trained in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(together.weights[name], weight, rtol=1e-3, atol=2e-5)


def test_spikes_change_no_weight_and_are_counted(stage_inputs: Inputs, tmp_path: Path):
    """With a factor of nearly 0 every step above the mean of the window is a spike."""
    config = changed(Stage.PRETRAIN, {"spike_window": 4, "spike_factor": 1e-6, "learning_rate": 1e-9}, {})
    trained = run_training(tmp_path, Stage.PRETRAIN, config, stage_inputs[Stage.PRETRAIN])
    counts = [row["train/spike_steps"] for row in trained.history]
    assert counts[-1] > 0
    assert counts == [row["train/skipped_steps"] for row in trained.history]


def test_the_average_is_what_is_exported_and_evaluated(stage_inputs: Inputs, tmp_path: Path):
    """With a decay of nearly 1 it stays at the weights after the first step, whose evaluation it repeats."""
    config = changed(Stage.PRETRAIN, {"ema_decay": 0.999999}, {"eval_every": 1})
    trained = run_training(tmp_path / "a", Stage.PRETRAIN, config, stage_inputs[Stage.PRETRAIN])
    evaluations = [row["eval/loss"] for row in trained.history]
    assert evaluations == pytest.approx([evaluations[0]] * len(evaluations), rel=1e-5)
    losses = [row["train/loss"] for row in trained.history]
    assert losses[-1] < losses[0] - 0.1  # the raw weights went on learning


def test_noise_depends_on_seed_and_place_alone_and_is_scaled_by_the_sequences_length():
    import numpy as np

    def sequence(length: int) -> TokenSequence:
        return TokenSequence(np.arange(length), np.ones(length, dtype=np.int64))

    row, other = [sequence(4), sequence(9)], [sequence(16)]
    settings = {"alpha": 6.0, "seed": 3, "hidden_size": 4}

    def noise_of(*rows: list[TokenSequence], places: list[int]) -> torch.Tensor:
        places_T = torch.cat(
            [torch.full((sum(len(one.ids) for one in row),), at) for row, at in zip(rows, places, strict=True)]
        )
        return embedding_noise(collate(rows), places_T[None], **settings)[0]  # type: ignore[arg-type]

    noise = noise_of(other, row, places=[7, 8])
    assert torch.equal(noise[16:], noise_of(row, places=[8]))
    assert not torch.equal(noise[16:], noise_of(row, places=[9]))
    # alpha / sqrt(L H): 6 / sqrt(16 * 4) = 0.75, 6 / sqrt(4 * 4) = 1.5, 6 / sqrt(9 * 4) = 1; uniform fills it
    for part, bound in ((noise[:16], 0.75), (noise[16:20], 1.5), (noise[20:], 1.0)):
        assert 0.8 * bound < part.abs().max() <= bound
