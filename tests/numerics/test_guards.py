"""PPO with guards: they change no bit of the training, a resume decides alike, and a stop returns earlier weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages import ppo
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.rollouts import PPOConfig
from stages.data.tokens.packing import RowBudget
from stages.data.tokens.views import Split, TokensArtifact, evenly
from stages.models.build import load_causal_lm
from stages.train.engines.choose import make_engine
from stages.train.rollout.prompts import prompt_loss
from tests.numerics.test_gold_watch import CONFIG, without
from tests.numerics.training import Killed, Trained, run_training
from tests.small_world import make_context

Inputs = dict[str, ArtifactRef]


def config_of(**guards: Any) -> PPOConfig:
    """With a learning rate at which the KL of twelve steps is far from its noise."""
    stored = CONFIG.model_dump()
    stored["optimizer"]["learning_rate"] = 2e-2
    return PPOConfig.model_validate({**stored, "eval_every": 2, "guards": guards})


@pytest.fixture(scope="module")
def inputs(stage_inputs: dict[Stage, Inputs]) -> Inputs:
    return stage_inputs[Stage.PPO]


@pytest.fixture(scope="module")
def unguarded(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return run_training(tmp_path_factory.mktemp("unguarded"), Stage.PPO, config_of(), inputs)


@pytest.fixture(scope="module")
def budget(unguarded: Trained) -> float:
    """Between the KL of the second rollout and that of the third, so that the third one breaks it."""
    second, third = (next(row["ppo/kl"] for row in unguarded.history if row["step"] == step) for step in (6, 10))
    assert second < third
    return (second + third) / 2


def test_guards_that_only_warn_change_no_bit(unguarded: Trained, budget: float, inputs: Inputs, tmp_path: Path) -> None:
    warned = run_training(tmp_path, Stage.PPO, config_of(kl={"warn": budget, "patience": 1}), inputs)
    for name, weight in unguarded.weights.items():
        assert torch.equal(weight, warned.weights[name]), name
    assert [row["ppo/guard/kl_level"] for row in warned.history if "eval/kl" in row] == [0, 0, 0, 0, 1, 1]
    mine = frozenset(name for row in warned.history for name in row if name.startswith("ppo/guard/"))
    assert [without(row, mine) for row in warned.history] == unguarded.history


def test_a_stop_ends_the_training_and_returns_the_weights_before_it(
    unguarded: Trained, budget: float, inputs: Inputs, tmp_path: Path
) -> None:
    """The third rollout begins at step 8, its first step is the last; step 4 sampled the last rollout within limits."""
    context = make_context(tmp_path, Stage.PPO, config_of(kl={"stop": budget, "patience": 1}), inputs)
    outcome = ppo.run(context)
    assert (outcome.ledger["steps"], outcome.ledger["model_step"]) == (9, 4)
    assert "above ppo.guards.kl.stop" in outcome.ledger["stopped_early"]
    assert outcome.ledger["guards"]["stopped"] in outcome.ledger["stopped_early"]
    assert [event["step"] for event in outcome.ledger["guards"]["events"]] == [8]
    row = next(row for row in unguarded.history if row["step"] == 4)
    assert {name: outcome.metrics[name] for name in row if name != "step"} == without(row, frozenset({"step"}))
    tokens = TokensArtifact(context.input_dir("tokens"))
    engine = make_engine({"policy": load_causal_lm(context.output_dir, tokens)}, CONFIG, context.execution)
    heldout = tokens.prompts(Split.HELDOUT)
    prompts = [heldout[int(i)] for i in evenly(len(heldout), at_most=CONFIG.eval_items)]
    again = prompt_loss(engine, prompts, RowBudget(row_length=tokens.sequence_length, max_rows=4))
    assert again["eval/prompt_loss"] == pytest.approx(row["eval/prompt_loss"], rel=1e-6)


@pytest.mark.parametrize(("kill_at", "checkpoint_every"), [(6, 3), (9, 1)], ids=["amid-a-rollout", "at-the-stop"])
def test_a_killed_training_with_guards_decides_alike(
    budget: float, inputs: Inputs, tmp_path: Path, kill_at: int, checkpoint_every: int
) -> None:
    config = config_of(kl={"warn": budget / 2, "stop": budget, "patience": 1})
    undisturbed = run_training(tmp_path / "whole", Stage.PPO, config, inputs)
    assert undisturbed.history[-1]["step"] == 9
    assert "eval/kl" in undisturbed.history[-1], "the last step is evaluated, whichever it is"
    with pytest.raises(Killed):
        run_training(tmp_path / "killed", Stage.PPO, config, inputs, checkpoint_every=checkpoint_every, kill_at=kill_at)
    resumed = run_training(tmp_path / "killed", Stage.PPO, config, inputs, checkpoint_every=checkpoint_every)
    assert resumed.history == undisturbed.history
    for name, weight in undisturbed.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
