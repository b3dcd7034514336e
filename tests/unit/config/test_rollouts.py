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
        ({"kl_place": "loss"}, "kl_estimator=k1 has no useful gradient with kl_place=loss.*use kl_estimator=k2"),
        ({"kl_estimator": "k3"}, "kl_estimator=k3 needs kl_place=loss, got reward"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 would cut the loss at the old policy already; use more than 1"),
        ({"sampler.truncation": 0.5}, "sampler.truncation=0.5 would cut the weights.*use at least 1"),
        ({"overlong_tokens": 8}, "leaves no length without a penalty; use less than max_response_length=8"),
        ({"overlong_penalty": 2.0}, "overlong_penalty=2.0 needs overlong_tokens above 0, got 0"),
        ({"pretraining_rows": 4}, "pretraining_rows=4 needs pretraining_coefficient above 0, got 0"),
        (
            {"estimator.critic_warmup_rollouts": 2},
            "leaves no rollout to train the policy",
        ),
        ({"loss_over": "words"}, "Input should be"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=said):
        of(**overrides)


def test_controls_at_their_defaults_leave_the_identity_of_before() -> None:
    identity = tiny().ppo.identity()
    assert not {name for name in identity if name.startswith(("kl_place", "loss_over", "sampler", "reward_", "over"))}
    assert of(**{"sampler.above": "fail"}).identity()["sampler"]["above"] == "fail"


def test_documents_in_the_mix_must_be_read_by_the_run() -> None:
    mixed = {"ppo.pretraining_coefficient": 1.0}
    assert resolve({"recipe": "tiny", "overrides": mixed}).ppo.pretraining_coefficient == 1.0
    given = {"recipe": "tiny", "base_model": "/models/x", "instructions": ["/i"], "preferences": ["/p"]}
    with pytest.raises(ConfigError, match=r"ppo.pretraining_coefficient=1.0 needs documents, and this run reads none"):
        resolve(given | {"overrides": mixed})
