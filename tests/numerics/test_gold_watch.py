"""PPO with a gold scorer: it measures every evaluation, changes no bit of the training, and ends it on request."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import ppo
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.preferences import GoldConfig
from stages.config.request import ArtifactRef
from stages.config.rollouts import PPOConfig
from stages.data.tokens.views import TokensArtifact
from stages.models.build import load_reward_model, save_model
from tests.numerics.training import Killed, Trained, run_on_two_processes, run_training
from tests.small_world import CONFIGS, make_context, published

CONFIG = CONFIGS[Stage.PPO].model_copy(update={"eval_every": 4})
Inputs = dict[str, ArtifactRef]


@pytest.fixture(scope="module")
def inputs(stage_inputs: dict[Stage, Inputs]) -> Inputs:
    return stage_inputs[Stage.PPO]


def gold_of(home: Path, inputs: Inputs, *, factor: float) -> ArtifactRef:
    """Publish the reward model once more as a gold scorer, its scores times `factor`."""
    context = make_context(home, Stage.GOLD, GoldConfig(), inputs)
    artifact = TokensArtifact(context.input_dir("tokens"))
    model: Any = load_reward_model(context.input_dir("reward"), artifact)
    model.score.weight.data *= factor
    save_model(model, model.state_dict(), context.output_dir, artifact)
    return published(context)


@pytest.fixture(scope="module")
def opposite(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """It likes a response by twice as much as the reward model dislikes it."""
    return gold_of(tmp_path_factory.mktemp("gold"), inputs, factor=-2.0)


def ppo_config(**changes: Any) -> PPOConfig:
    return PPOConfig.model_validate({**CONFIG.model_dump(), **changes})


def same_training(one: Trained, other: Trained, *, but: frozenset[str] = frozenset()) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert without(mine, but) == without(theirs, but)


def without(row: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


def test_gold_scores_every_evaluation_and_changes_no_bit_of_the_training(
    inputs: Inputs, opposite: ArtifactRef, tmp_path: Path
) -> None:
    alone = run_training(tmp_path / "alone", Stage.PPO, CONFIG, inputs)
    watched = run_training(tmp_path / "watched", Stage.PPO, CONFIG, {**inputs, "gold": opposite})
    same_training(alone, watched, but=frozenset({"eval/gold_score", "eval/gold_score_std", "eval/gold_falls"}))
    measured = [row for row in watched.history if "eval/score" in row]
    assert [row["step"] for row in measured] == [4, 8, 12]
    for row in measured:
        assert row["eval/gold_score"] == pytest.approx(-2.0 * row["eval/score"], rel=1e-5)


def test_a_killed_training_with_a_gold_scorer_ends_with_the_same_bits(
    inputs: Inputs, opposite: ArtifactRef, tmp_path: Path
) -> None:
    """Killed after an evaluation, whose counts come back with the checkpoint."""
    config, watched = ppo_config(eval_every=1), {**inputs, "gold": opposite}
    undisturbed = run_training(tmp_path / "whole", Stage.PPO, config, watched)
    with pytest.raises(Killed):
        run_training(tmp_path / "killed", Stage.PPO, config, watched, checkpoint_every=3, kill_at=5)
    same_training(undisturbed, run_training(tmp_path / "killed", Stage.PPO, config, watched, checkpoint_every=3))
    assert max(row["eval/gold_falls"] for row in undisturbed.history) >= 1


def test_two_processes_measure_what_one_does(inputs: Inputs, opposite: ArtifactRef, tmp_path: Path) -> None:
    watched = {**inputs, "gold": opposite}
    alone = run_training(tmp_path / "one", Stage.PPO, CONFIG, watched)
    together = run_on_two_processes(tmp_path / "two", Stage.PPO, CONFIG, watched, engine="fsdp", num_workers=2)
    scores = [[row["eval/gold_score"] for row in one.history if "eval/score" in row] for one in (alone, together)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_training_ends_when_gold_fell_while_the_proxy_rose(
    inputs: Inputs, opposite: ArtifactRef, tmp_path: Path
) -> None:
    config = ppo_config(eval_every=1, gold_patience=1)
    context = make_context(tmp_path, Stage.PPO, config, {**inputs, "gold": opposite})
    outcome = ppo.run(context)
    steps = outcome.ledger["steps"]
    assert steps < 12
    assert outcome.metrics["eval/gold_falls"] == 1
    assert "gold_patience=1" in outcome.ledger["stopped_early"]
    assert outcome.ledger["responses"] == 8 * -(-steps // 4)  # four steps a rollout
    # As far as it went it is the training that no one stopped, and a resume after the end does nothing more.
    whole = run_training(tmp_path / "whole", Stage.PPO, ppo_config(eval_every=1), {**inputs, "gold": opposite})
    assert whole.history[steps - 1]["eval/score"] == outcome.metrics["eval/score"]
    stopped = run_training(tmp_path / "a", Stage.PPO, config, {**inputs, "gold": opposite}, checkpoint_every=1)
    again = run_training(tmp_path / "a", Stage.PPO, config, {**inputs, "gold": opposite}, checkpoint_every=1)
    assert len(again.history) == steps
    same_training(stopped, again)


def test_patience_without_a_gold_scorer_is_refused_before_the_first_step(inputs: Inputs, tmp_path: Path) -> None:
    context = make_context(tmp_path, Stage.PPO, ppo_config(gold_patience=2), inputs)
    with pytest.raises(ConfigError, match=r"ppo\.gold_patience=2 needs a gold scorer"):
        ppo.run(context)
    with pytest.raises(ValueError, match=r"gold_patience=2 needs eval_every >= 1, got 0"):
        ppo_config(gold_patience=2, eval_every=0)
