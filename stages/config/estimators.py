"""Estimators of advantages: how much better a token did than expected, with a critic or by comparing responses.

All of it decides results and enters fingerprints: a field that is added is marked `AddedLater` (`stages.config.base`).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stages.config.base import AddedLater, Config


class GAE(Config):
    """PPO's own: generalised advantage estimation with a critic, a second model of the policy's size
    (https://arxiv.org/abs/1506.02438)."""

    kind: Annotated[Literal["gae"], AddedLater("gae")] = "gae"
    """Which estimator."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of future rewards."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Trade of bias for variance in generalised advantage estimation."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Value predictions are clipped to the old ones +- this."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    responses_per_prompt: Annotated[int, AddedLater(1)] = Field(default=1, ge=1)
    """Responses sampled to each prompt; must divide `rollout_size`."""
    critic: Annotated[Literal["reward_model", "fresh"], AddedLater("reward_model")] = "reward_model"
    """What the critic starts as: a copy of the `reward_model`, whose head becomes the value head, or the policy's start
    with a `fresh` head of zeros."""
    critic_warmup_rollouts: Annotated[int, AddedLater(0)] = Field(default=0, ge=0)
    """Rollouts at the start in which only the critic learns and the policy stays as it is."""
    critic_learning_rate_factor: Annotated[float, AddedLater(1.0)] = Field(default=1.0, gt=0)
    """The critic's learning rate over that of the policy."""
    whiten: Annotated[bool, AddedLater(True)] = True
    """Shift and scale advantages to mean 0 and spread 1 over the tokens of the rollout."""

    needs_critic: ClassVar[bool] = True


class RLOO(Config):
    """Leave-one-out: the baseline of a response is the mean reward of the other responses to its prompt
    (https://arxiv.org/abs/2402.14740). No critic."""

    kind: Literal["rloo"] = "rloo"
    """Which estimator."""
    responses_per_prompt: int = Field(default=4, ge=2)
    """Responses sampled to each prompt; must divide `rollout_size`."""
    whiten: bool = False
    """Shift and scale advantages to mean 0 and spread 1 over the tokens of the rollout."""

    needs_critic: ClassVar[bool] = False


class GRPO(Config):
    """Group-relative: a response's reward minus the mean of all responses to its prompt, in units of their spread
    (https://arxiv.org/abs/2402.03300). No critic."""

    kind: Literal["grpo"] = "grpo"
    """Which estimator."""
    responses_per_prompt: int = Field(default=8, ge=2)
    """Responses sampled to each prompt; must divide `rollout_size`."""
    divide_by_std: bool = True
    """Divide by the spread of the prompt's rewards. `false` is Dr. GRPO (https://arxiv.org/abs/2503.20783): prompts
    whose responses are nearly alike then do not count for more."""

    needs_critic: ClassVar[bool] = False


class Reinforce(Config):
    """REINFORCE with one baseline for all prompts, whitened over the whole rollout as in REINFORCE++
    (https://arxiv.org/abs/2501.03262). No critic, and one response to a prompt is enough."""

    kind: Literal["reinforce"] = "reinforce"
    """Which estimator."""
    responses_per_prompt: int = Field(default=1, ge=1)
    """Responses sampled to each prompt; must divide `rollout_size`."""
    baseline: Literal["batch", "running"] = "batch"
    """What is subtracted from the reward: the mean of the rollout (`batch`), or of earlier ones (`running`), which is
    kept in the checkpoint."""
    baseline_decay: float = Field(default=0.9, ge=0, lt=1)
    """With `running`: share of the baseline that a rollout leaves in place."""
    whiten: bool = True
    """Shift and scale advantages to mean 0 and spread 1 over the tokens of the rollout."""

    needs_critic: ClassVar[bool] = False

    @model_validator(mode="after")
    def _decay_needs_a_running_baseline(self) -> "Reinforce":
        unused = Reinforce.model_fields["baseline_decay"].default
        if self.baseline != "running" and self.baseline_decay != unused:
            raise ValueError(
                f"baseline_decay={self.baseline_decay} needs baseline=running, got {self.baseline}, which would not "
                f"read it; set baseline=running, or leave baseline_decay at {unused}"
            )
        return self

    @model_validator(mode="after")
    def _whitening_takes_the_place_of_a_baseline(self) -> "Reinforce":
        if self.baseline == "running" and self.whiten:
            raise ValueError(
                "baseline=running has no effect with whiten=true, which subtracts the mean of the rollout again; set "
                "whiten=false, or baseline=batch"
            )
        return self


Estimator = Annotated[GAE | RLOO | GRPO | Reinforce, Field(discriminator="kind")]
