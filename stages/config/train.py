"""What is trained and how: model, optimizer and the settings of the five objectives. All of it decides results."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from stages.config.base import Config
from stages.config.sources import SourceWeight


class ModelConfig(Config):
    """A Llama-style decoder: rotary positions, SwiGLU, RMSNorm, grouped-query attention."""

    hidden_size: int = Field(default=320, ge=8)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=864, ge=8)
    """Width of the feed-forward layer."""
    num_layers: int = Field(default=6, ge=1)
    """Decoder layers."""
    num_heads: int = Field(default=5, ge=1)
    """Query heads."""
    num_kv_heads: int = Field(default=5, ge=1)
    """Key and value heads; fewer than query heads shares them."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Share input and output embeddings."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        return self


class Schedule(StrEnum):
    """Learning rate after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class OptimizerConfig(Config):
    """AdamW; weight decay applies to matrices only."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step as a share of the peak."""
    schedule: Schedule = Schedule.COSINE
    """Shape of the decay."""
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Share of all steps with linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay per step, times the learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to it."""


class TrainConfig(Config):
    """What all five objectives share."""

    optimizer: OptimizerConfig
    """Optimizer and schedule."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """`bf16` computes matrix products in bfloat16 (autocast), weights and optimizer stay in float32; a CPU without
    bfloat16 instructions computes them in float32, which is faster there and never less exact. `fp16` is for GPUs
    without bfloat16: it scales the loss, and steps whose gradient overflows are skipped and counted."""
    global_batch_size: int = Field(ge=1)
    """Items of one optimizer step over all workers: packed sequences (pretrain, sft), pairs (reward, dpo) or
    responses (ppo)."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out data; 0 = at the end only."""
    eval_items: int = Field(default=64, ge=1)
    """Held-out items in one such evaluation."""
    best_metric: str = ""
    """Held-out metric, such as `eval/loss`, that chooses the evaluation whose weights become the model; empty = the
    last weights. The best checkpoint is kept beside the newest ones."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Which value of `best_metric` is the best."""
    seed: int = Field(default=0, ge=0)
    """Initial weights, order of the data and sampling follow from it."""

    @model_validator(mode="after")
    def _best_of_several(self) -> "TrainConfig":
        if self.best_metric and not self.eval_every:
            raise ValueError(
                f"best_metric={self.best_metric!r} needs eval_every >= 1, got 0: without evaluations on the way there "
                "is nothing to choose from; set eval_every, or best_metric to nothing"
            )
        return self


class PretrainConfig(TrainConfig):
    """Next-token prediction on packed documents."""

    model: ModelConfig = ModelConfig()
    """Architecture, when no base model is given."""
    max_tokens: int = Field(ge=1)
    """Tokens to train on; the data repeats, reshuffled, when it holds fewer."""
    max_epochs: float = Field(default=0, ge=0)
    """Times that each token is seen at most, whatever `max_tokens` says; 0 for no limit. Four are nearly as good as
    new data (https://arxiv.org/abs/2305.16264)."""


class SampledConfig(TrainConfig):
    """How often each example is seen, and in which proportion those of several sources."""

    num_epochs: float = Field(default=1.0, gt=0)
    """Passes over the examples. With weights: the amount of training is this times the size of the data; how often a
    source is seen follows from its weight."""
    mixture: tuple[SourceWeight, ...] = ()
    """Shares of sources in training; filled from `#weight=` behind the sources. A source whose share is larger than its
    size is repeated, one whose share is smaller is cut. Sources without a weight share the rest by size. Empty: every
    example `num_epochs` times."""
    mixture_unit: Literal["examples", "tokens"] = "examples"
    """What shares are shares of: conversations or pairs, or their trained tokens, which the loss sums over."""
    max_source_epochs: float = Field(default=0.0, ge=0)
    """Times that a source is repeated at most; training gets shorter until the shares can hold. 0 for no limit."""


class SFTConfig(SampledConfig):
    """Supervised fine-tuning: loss on the assistant's tokens only."""


class RewardConfig(SampledConfig):
    """Bradley-Terry reward model."""

    center_coefficient: float = Field(default=0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps scores around zero."""


class DPOConfig(SampledConfig):
    """Direct preference optimisation against the frozen SFT model."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (conservative DPO)."""


class PPOConfig(TrainConfig):
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
