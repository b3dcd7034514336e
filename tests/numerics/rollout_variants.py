"""Kinds of reinforcement learning that differ in what their loss sums and in what they remember."""

from typing import Any

from stages.config.estimators import GAE, GRPO, RLOO, Reinforce
from stages.config.graph import Stage
from stages.config.rollouts import PPOConfig
from tests.small_world import CONFIGS


def _of(**settings: Any) -> PPOConfig:
    return PPOConfig.model_validate({**CONFIGS[Stage.PPO].model_dump(), **settings})


VARIANTS: dict[str, PPOConfig] = {
    "rloo": _of(
        estimator=RLOO(responses_per_prompt=2),
        kl_place="loss",
        kl_estimator="k2",
        kl_target=1.0,
        kl_horizon=50,
        entropy_coefficient=0.01,
        loss_over="sequences",
        clip_range_high=0.28,
        dual_clip=3.0,
        reward_scaling="running",
        reward_clip=2.0,
        overlong_tokens=2,
        pretraining_coefficient=0.5,
        pretraining_rows=3,
    ),
    "grpo": _of(
        estimator=GRPO(responses_per_prompt=4),
        kl_place="loss",
        kl_estimator="k3",
        loss_over="fixed_length",
        sampler={"truncation": 2.0},
    ),
    # A reward model beside a rule, on texts that every rank decodes for itself.
    "reinforce": _of(
        estimator=Reinforce(baseline="running", whiten=False),
        scorer={
            "kind": "mixture",
            "parts": [
                {"weight": 1.0, "scorer": {"kind": "reward_model"}},
                {"weight": 0.5, "scorer": {"kind": "length", "least": 8, "most": 12, "margin": 8}},
            ],
        },
    ),
    "fresh_critic": _of(
        estimator=GAE(critic="fresh", critic_warmup_rollouts=1, critic_learning_rate_factor=2.0, whiten=False),
        loss_over="sequences",
    ),
}
