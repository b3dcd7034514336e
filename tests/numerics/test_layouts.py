"""How a step is cut into micro-batches and spread over processes does not change what is learned.

All is float32, all lengths are ragged: documents, conversations, the two answers of a pair, responses, and the last
step, which has fewer items than the others. Only the order of float32 sums differs between layouts.
"""

from pathlib import Path

import pytest
import torch

from stages.config.graph import Stage
from stages.config.preference_losses import IPOLoss, KTOLoss, ORPOLoss, PreferenceLoss, SimPOLoss
from stages.config.request import ArtifactRef
from stages.config.train import OptimizerConfig, TrainConfig
from tests.numerics.fork_server import ForkServer, shared_server
from tests.numerics.ranks import run_ranks
from tests.numerics.rollout_variants import VARIANTS
from tests.numerics.training import Case, Trained, run_on_processes, run_on_two_processes, run_training
from tests.small_world import CONFIGS, EXPERTS

Inputs = dict[Stage, dict[str, ArtifactRef]]

LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-6

_CHANGES: dict[Stage, dict[str, object]] = {
    Stage.PRETRAIN: {"max_tokens": 64 * (8 * 5 + 3), "global_batch_size": 8},
    Stage.SFT: {"global_batch_size": 8},
    Stage.REWARD: {"global_batch_size": 8},
    Stage.DPO: {"global_batch_size": 8},
    Stage.PPO: {"global_batch_size": 8, "rollout_size": 16, "num_rollouts": 2},
}


_OPTIMIZER = OptimizerConfig(learning_rate=3e-4, warmup_fraction=0.0, epsilon=1e-6)
"""Adam moves a weight by the sign of its gradient, however small: where terms cancel, a gradient is all rounding noise
(here 1e-9 and below) and would move a weight as far as a real one does. An epsilon above the noise keeps it still."""


def config_of(stage: Stage) -> TrainConfig:
    """Eight items a step."""
    return CONFIGS[stage].model_copy(update={**_CHANGES[stage], "optimizer": _OPTIMIZER})


def expert_config_of(stage: Stage) -> TrainConfig:
    """The same where the trained models are mixtures of experts; pretraining makes its own."""
    config = config_of(stage)
    return config.model_copy(update={"model": EXPERTS}) if stage is Stage.PRETRAIN else config


@pytest.fixture(scope="module")
def server() -> ForkServer:
    return shared_server()


def losses(trained: Trained) -> list[float]:
    return [row["train/loss"] for row in trained.history]


_PARTS = {"ppo/value_loss", "ppo/policy_loss", "ppo/kl_loss", "ppo/pretraining_loss", "ppo/entropy"}


def assert_same(found: Trained, expected: Trained) -> None:
    """Every metric that the loss is made of, and all weights."""
    assert len(expected.history) >= 4
    assert losses(found) == pytest.approx(losses(expected), rel=0, abs=LOSS_TOLERANCE)
    for before, after in zip(expected.history, found.history, strict=True):
        for name in _PARTS & before.keys():
            assert after[name] == pytest.approx(before[name], rel=0, abs=LOSS_TOLERANCE)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.fixture(scope="module")
def on_two_ranks(stage_inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Every objective on two ranks, with four rows at once and with 2 x 2."""
    home = tmp_path_factory.mktemp("ranks")
    cases = {
        f"{stage.value} {rows}": Case(
            home / f"{stage.value}-{rows}", stage, config_of(stage), stage_inputs[stage], {"micro_batch_size": rows}
        )
        for stage in CONFIGS
        for rows in (4, 2)
    }
    return run_on_processes(cases, num_processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(CONFIGS), ids=str)
def test_ranks_and_micro_batches_do_not_matter(
    stage: Stage, on_two_ranks: dict[str, Trained], stage_inputs: Inputs, tmp_path: Path
) -> None:
    """One process with 8 rows at once against 8 accumulated single rows, two processes with 4 at once, with 2 x 2."""
    config, inputs = config_of(stage), stage_inputs[stage]
    whole, single = (
        run_training(tmp_path / f"1x{rows}", stage, config, inputs, micro_batch_size=rows) for rows in (8, 1)
    )
    for found in (single, on_two_ranks[f"{stage.value} 4"], on_two_ranks[f"{stage.value} 2"]):
        assert_same(found, whole)


@pytest.fixture(scope="module")
def variants_on_two_ranks(stage_inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    home, inputs = tmp_path_factory.mktemp("variants"), stage_inputs[Stage.PPO]
    cases = {name: Case(home / name, Stage.PPO, variant_of(name), inputs, {"micro_batch_size": 2}) for name in VARIANTS}
    return run_on_processes(cases, num_processes=2)


def variant_of(name: str) -> TrainConfig:
    """Two rollouts of two steps each, every one of which sees its responses once."""
    return VARIANTS[name].model_copy(update={**_CHANGES[Stage.PPO], "num_epochs": 1, "optimizer": _OPTIMIZER})


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_reinforcement_learning_is_the_same_in_all_layouts(
    name: str, variants_on_two_ranks: dict[str, Trained], stage_inputs: Inputs, tmp_path: Path
) -> None:
    whole = run_training(tmp_path, Stage.PPO, variant_of(name), stage_inputs[Stage.PPO], micro_batch_size=8)
    assert_same(variants_on_two_ranks[name], whole)
    for row in (whole.history[0], variants_on_two_ranks[name].history[0]):
        assert abs(row["ppo/approx_kl"]) < 1e-6
        assert row["ppo/clip_fraction"] == 0
        assert row["ppo/sampler_ratio"] == pytest.approx(1.0, abs=1e-4)
        assert 0 <= row["ppo/sampler_kl"] < 1e-8
    moved = [row["ppo/approx_kl"] > 1e-7 for row in whole.history]
    # The second step of a rollout sees a policy that the first one moved, unless only the critic learns.
    assert moved == [False, name != "fresh_critic", False, True]


def assert_same_balance(found: Trained, expected: Trained) -> None:
    """The balancing loss and what it is made of; not trivially so, for the load is uneven and changes."""
    for name in ("train/router_loss", "train/expert_load_max", "train/expert_load_min"):
        series = [row[name] for row in expected.history]
        assert [row[name] for row in found.history] == pytest.approx(series, rel=0, abs=LOSS_TOLERANCE), name
        assert len(set(series)) > 2


@pytest.fixture(scope="module")
def experts_on_two_ranks(expert_inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Every objective with experts, on two ranks with two rows at once."""
    home = tmp_path_factory.mktemp("two")
    cases = {
        stage.value: Case(home / stage, stage, expert_config_of(stage), expert_inputs[stage], {"micro_batch_size": 2})
        for stage in CONFIGS
    }
    return run_on_processes(cases, num_processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(CONFIGS), ids=str)
def test_experts_are_balanced_over_the_whole_step(
    stage: Stage, experts_on_two_ranks: dict[str, Trained], expert_inputs: Inputs, tmp_path: Path
) -> None:
    whole = run_training(tmp_path, stage, expert_config_of(stage), expert_inputs[stage], micro_batch_size=8)
    assert_same(experts_on_two_ranks[stage.value], whole)
    assert_same_balance(experts_on_two_ranks[stage.value], whole)


_LOSSES: dict[str, PreferenceLoss] = {
    "kto": KTOLoss(desirable_weight=1.5, sft_coefficient=0.1),
    "simpo": SimPOLoss(),
    "orpo": ORPOLoss(),
    "ipo": IPOLoss(length_averaged=True, beta=0.5),
}
"""One with a baseline of the whole step, and those that divide by lengths; all others are sums over pairs of what DPO's
loss is made of."""


@pytest.mark.slow
def test_preference_losses_do_not_depend_on_the_layout(stage_inputs: Inputs, tmp_path: Path) -> None:
    inputs = stage_inputs[Stage.DPO]
    configs = {kind: config_of(Stage.DPO).model_copy(update={"loss": loss}) for kind, loss in _LOSSES.items()}
    cases = {
        kind: Case(tmp_path / f"two-{kind}", Stage.DPO, config, inputs, {"micro_batch_size": 2})
        for kind, config in configs.items()
    }
    together = run_on_processes(cases, num_processes=2)
    for kind, config in configs.items():
        whole = run_training(tmp_path / f"one-{kind}", Stage.DPO, config, inputs, micro_batch_size=8)
        assert_same(together[kind], whole)
        if kind == "kto":
            baselines = [row["dpo/kl"] for row in whole.history]
            assert [row["dpo/kl"] for row in together[kind].history] == pytest.approx(baselines, rel=0, abs=1e-4)
            assert len(set(baselines)) > 2


@pytest.mark.exact
@pytest.mark.slow
@pytest.mark.parametrize("stage", list(CONFIGS), ids=str)
def test_experts_in_all_layouts(stage: Stage, server: ForkServer, expert_inputs: Inputs, tmp_path: Path) -> None:
    config, inputs = expert_config_of(stage), expert_inputs[stage]
    whole = run_ranks(server, tmp_path / "1x8", stage, config, inputs, ranks=1, micro_batch_size=8)
    for ranks, rows in ((1, 1), (2, 4), (3, 1)):
        home = tmp_path / f"{ranks}x{rows}"
        found = run_ranks(server, home, stage, config, inputs, ranks=ranks, micro_batch_size=rows)
        assert_same(found, whole)
        assert_same_balance(found, whole)


@pytest.mark.exact
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)], ids=["grown", "shrunk"])
@pytest.mark.parametrize("stage", list(CONFIGS), ids=str)
def test_a_resume_at_another_world_size_sees_the_same_samples(
    stage: Stage, before: int, after: int, server: ForkServer, stage_inputs: Inputs, tmp_path: Path
) -> None:
    """Killed after step 4 with a checkpoint of step 3, which lies in the middle of a rollout of PPO."""
    config, inputs = config_of(stage), stage_inputs[stage]
    whole = run_ranks(server, tmp_path / "whole", stage, config, inputs, ranks=1)
    home = tmp_path / "resumed"
    run_ranks(server, home, stage, config, inputs, ranks=before, checkpoint_every=3, kill_at=4)
    resumed = run_ranks(server, home, stage, config, inputs, ranks=after, checkpoint_every=3)
    assert "resumed from the checkpoint of step 3" in (home / "rank-0.log").read_text()
    assert_same(resumed, whole)


@pytest.mark.slow
def test_sharded_processes_learn_the_same(stage_inputs: Inputs, tmp_path: Path) -> None:
    config, inputs = config_of(Stage.PPO), stage_inputs[Stage.PPO]
    alone = run_training(tmp_path / "one", Stage.PPO, config, inputs)
    together = run_on_two_processes(tmp_path / "two", Stage.PPO, config, inputs, engine="fsdp", num_workers=2)
    assert_same(together, alone)
