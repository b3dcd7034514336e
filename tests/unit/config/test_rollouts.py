"""Settings of reinforcement learning: estimators as kinds, earlier names, and what is refused with what to do."""

from typing import Any

import pytest
from pydantic import ValidationError

from stages.config.errors import ConfigError
from stages.config.estimators import GAE, GRPO, RLOO, Reinforce
from stages.config.recipes import RECIPES, tiny
from stages.config.resolve import resolve
from stages.config.rollouts import PPOConfig


def of(**overrides: Any) -> PPOConfig:
    return resolve({"recipe": "tiny", "overrides": {f"ppo.{name}": value for name, value in overrides.items()}}).ppo


def test_a_stored_config_with_flat_fields_is_read_and_identified_as_before() -> None:
    stored = tiny().ppo.identity()
    assert stored["gae_lambda"] == 0.95
    assert "estimator" not in stored
    changed = PPOConfig.model_validate(stored | {"gae_lambda": 0.5, "value_coefficient": 0.2})
    assert changed.estimator == GAE(gae_lambda=0.5, value_coefficient=0.2)
    assert changed.identity() == stored | {"gae_lambda": 0.5, "value_coefficient": 0.2}
    assert of(gae_lambda=0.5).estimator == GAE(gae_lambda=0.5)


@pytest.mark.parametrize(("kind", "expected"), [("rloo", RLOO()), ("grpo", GRPO()), ("reinforce", Reinforce())])
def test_the_kind_alone_chooses_an_estimator_in_every_recipe(kind: str, expected: Any) -> None:
    for recipe in RECIPES:
        config = resolve({"recipe": recipe, "overrides": {"ppo.estimator.kind": kind}}).ppo
        assert config.estimator == expected
        assert config.prompts_per_rollout == config.rollout_size // expected.responses_per_prompt
    assert of(**{"estimator.kind": kind}).identity()["estimator"]["kind"] == kind
    assert of(**{"estimator.kind": kind}).summary().startswith(f"{kind}, ")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"estimator.kind": "rloo", "estimator.responses_per_prompt": 1}, "greater than or equal to 2"),
        ({"estimator.kind": "rloo", "gae_lambda": 0.5}, "does not exist"),
        ({"estimator.kind": "rlo"}, "'rlo' does not exist"),
        (
            {"estimator.kind": "rloo", "estimator.responses_per_prompt": 5},
            "rollout_size=8 is not divisible by estimator.responses_per_prompt=5; use 5 or 10",
        ),
        ({"estimator.kind": "reinforce", "estimator.baseline_decay": 0.5}, "needs baseline=running, got batch"),
        ({"estimator.kind": "reinforce", "estimator.baseline": "running"}, "no effect with whiten=true"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=said):
        of(**overrides)
