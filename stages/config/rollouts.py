"""Reinforcement learning: rollouts, estimators and what keeps the policy near its start.

All of it decides results and enters fingerprints: a field that is added is marked `AddedLater` (`stages.config.base`).
"""

from typing import Annotated

from pydantic import Field, model_validator

from stages.config.base import AddedLater
from stages.config.train import PostTrainConfig

PROMPT_LOSS = "eval/prompt_loss"
"""What PPO records of its weights that does not depend on sampled answers; a gate measures it again."""


class PPOConfig(PostTrainConfig):
    """Proximal policy optimisation against the reward model, with a KL penalty to the frozen SFT model.

    `global_batch_size` responses make one optimizer step; `rollout_size` responses make one rollout.
    """

    num_rollouts: int = Field(ge=1)
    """Rollout phases; each samples `rollout_size` responses with the live policy."""
    rollout_size: int = Field(default=64, ge=1)
    """Responses sampled in one rollout, over all workers."""
    num_epochs: int = Field(default=2, ge=1)
    """Optimisation passes over each rollout."""
    max_response_length: int = Field(default=48, ge=1)
    """Tokens of a response at most, the end token included."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature, also of the log-probabilities that are optimised."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of future rewards."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Trade of bias for variance in generalised advantage estimation."""
    clip_range: float = Field(default=0.2, gt=0)
    """The policy ratio is clipped to 1 +- this."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Value predictions are clipped to the old ones +- this."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Penalty a token for leaving the reference, at the start."""
    kl_target: float = Field(default=0.0, ge=0)
    """Nats a response that the adaptive controller aims for; 0 keeps the coefficient fixed."""
    kl_horizon: int = Field(default=2000, ge=1)
    """Responses over which the controller reacts."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of a response without an end token."""
    gold_patience: Annotated[int, AddedLater(0)] = Field(default=0, ge=0)
    """Evaluations in a row at which the score of the gold scorer fell while that of the reward model rose, after which
    training ends; 0 = it never does. The model has the last weights, or those that `best_metric` chooses, such as
    `eval/gold_score` with `best_is` highest. Needs a gold scorer with the policy's tokenizer, and `eval_every`."""

    def summary(self) -> str:
        rollouts = f"{self.num_rollouts} rollouts of {self.rollout_size} responses"
        return f"{rollouts}, {self.max_response_length} tokens each"

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> "PPOConfig":
        if self.gold_patience and not self.eval_every:
            raise ValueError(
                f"gold_patience={self.gold_patience} needs eval_every >= 1, got 0: without evaluations on the way "
                "nothing is seen to fall; set eval_every, or gold_patience to 0"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "PPOConfig":
        if self.rollout_size % self.global_batch_size:
            below = self.rollout_size // self.global_batch_size * self.global_batch_size
            ways = " or ".join(str(size) for size in (below, below + self.global_batch_size) if size)
            raise ValueError(
                f"rollout_size={self.rollout_size} is not divisible by global_batch_size={self.global_batch_size}; "
                f"use {ways}"
            )
        return self
