"""What is trained and how: model, optimizer and the settings of each objective.

All of it decides results and enters fingerprints: a field that is added is marked `AddedLater` (`stages.config.base`).
"""

from enum import StrEnum
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from stages.config.base import Config
from stages.config.sources import SourceWeight
from stages.config.text import compact


class ModelConfig(Config):
    """A Llama-style decoder: rotary positions, SwiGLU, RMSNorm, grouped-query attention; with experts, Mixtral's."""

    hidden_size: int = Field(default=320, ge=8)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=864, ge=8)
    """Width of the feed-forward layer, or of each of its experts."""
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
    num_experts: int = Field(default=0, ge=0)
    """Experts in every feed-forward layer, of which a router picks a few for each token; 0 = a dense model."""
    num_experts_per_token: int = Field(default=2, ge=1)
    """Experts that each token passes through."""
    router_loss_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the loss that keeps experts evenly busy; it stays with the model, for fine-tuning too."""

    @model_validator(mode="after")
    def _experts_suffice(self) -> "ModelConfig":
        if self.num_experts and self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token} is more than num_experts={self.num_experts}; "
                f"use at most {self.num_experts}, or num_experts=0 for a dense model"
            )
        return self

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
    WSD = "wsd"


class Algorithm(StrEnum):
    """What turns a gradient into an update."""

    ADAMW = "adamw"
    MUON = "muon"


class OptimizerConfig(Config):
    """AdamW, or Muon for the matrices of the decoder layers; norms and biases are never decayed."""

    algorithm: Algorithm = Algorithm.ADAMW
    """`adamw` for all parameters, or `muon` for the matrices of the decoder layers and AdamW for embeddings, heads,
    norms and biases. Muon's updates are as large as AdamW's, so both share learning rate and decay."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step as a share of the peak."""
    schedule: Schedule = Schedule.COSINE
    """Shape of the decay; `wsd` holds the peak and falls at the end."""
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Share of all steps with linear warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps with linear warm-up; 0 = as many as `warmup_fraction` says."""
    warmup_tokens: int = Field(default=0, ge=0)
    """Tokens with linear warm-up, instead of steps; 0 = none given. Only in `pretrain`, whose steps are all alike."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps in which `wsd` falls from the peak to the minimum."""
    decay_steps: int = Field(default=0, ge=0)
    """Steps in which `wsd` falls; 0 = as many as `decay_fraction` says."""
    decay_tokens: int = Field(default=0, ge=0)
    """Tokens in which `wsd` falls, instead of steps; 0 = none given. Only in `pretrain`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay per step, times the learning rate."""
    decay_embeddings: bool = True
    """Whether weight decay applies to embeddings too; where they are tied they are the output matrix as well."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Muon's momentum."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to it."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is what is evaluated and exported; 0 = none."""
    spike_window: int = Field(default=0, ge=0)
    """Steps over which loss and gradient norm are watched; a step far above their mean changes nothing and is counted.
    0 = every finite step counts. OLMo uses 128."""
    spike_factor: float = Field(default=6.0, gt=0)
    """Standard deviations above the mean from which a step counts as a spike."""

    @model_validator(mode="after")
    def _lengths_are_given_once(self) -> "OptimizerConfig":
        for name in ("warmup", "decay"):
            steps, tokens = getattr(self, f"{name}_steps"), getattr(self, f"{name}_tokens")
            if steps and tokens:
                raise ValueError(
                    f"{name}_steps={steps} and {name}_tokens={tokens} say the same twice; set one of them to 0"
                )
            if name == "decay" and (steps or tokens) and self.schedule is not Schedule.WSD:
                raise ValueError(
                    f"decay_steps={steps} and decay_tokens={tokens} belong to schedule=wsd, got {self.schedule}, which "
                    "falls from the end of the warm-up to the last step; set schedule=wsd, or both to 0"
                )
        return self

    @model_validator(mode="after")
    def _warmup_and_decay_fit(self) -> "OptimizerConfig":
        lengths = self.warmup_steps or self.warmup_tokens or self.decay_steps or self.decay_tokens
        if self.schedule is Schedule.WSD and not lengths and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} are more than all "
                "steps together; use shares that sum to at most 1"
            )
        return self

    @model_validator(mode="after")
    def _window_holds_statistics(self) -> "OptimizerConfig":
        if 0 < self.spike_window < 4:
            raise ValueError(f"spike_window={self.spike_window} is too few for a spread; use 0 (off) or at least 4")
        return self


class Models(NamedTuple):
    """Models of the policy's size that each worker holds."""

    trained: int
    frozen: int
    """Only to read from."""


class TrainConfig(Config):
    """What all objectives share."""

    optimizer: OptimizerConfig
    """Optimizer and schedule."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """`bf16` computes matrix products in bfloat16 (autocast), weights and optimizer stay in float32; a CPU without
    bfloat16 instructions computes them in float32, which is faster there and never less exact. `fp16` is for GPUs
    without bfloat16: it scales the loss, and steps whose gradient overflows are skipped and counted."""
    global_batch_size: int = Field(ge=1)
    """Items of one optimizer step over all workers: packed sequences (pretrain, sft), pairs (reward, dpo;
    single responses with the loss `kto`) or responses (ppo)."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out data; 0 = at the end only."""
    eval_items: int = Field(default=64, ge=1)
    """Held-out items in one such evaluation."""
    best_metric: str = ""
    """Held-out metric, such as `eval/loss`, that chooses the evaluation whose weights become the model; empty = the
    last weights. The best checkpoint is kept in addition to the newest ones."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Which value of `best_metric` is the best."""
    seed: int = Field(default=0, ge=0)
    """Initial weights, order of the data and sampling follow from it."""

    @property
    def models(self) -> Models:
        return Models(trained=1, frozen=0)

    def summary(self) -> str:
        """Return how much is trained in a few words, for the table of recipes in the trigger form."""
        return f"learning rate {self.optimizer.learning_rate:g}"

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
    z_loss_coefficient: float = Field(default=0.0, ge=0)
    """Weight of log^2 Z, which keeps logits small (PaLM: 1e-4); 0 = none."""

    def summary(self) -> str:
        return f"{compact(self.max_tokens)} tokens, {self.global_batch_size} rows a step"


class LoRAConfig(Config):
    """Train a low-rank adapter next to frozen weights; the exported model has it merged in."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapter; 0 = train all parameters."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is dropped in training."""
    target_modules: tuple[str, ...] = Field(default=("all-linear",), min_length=1)
    """Ends of the names of the linear modules that get an adapter, such as `q_proj`; `all-linear` = all but the
    head. Experts and their router are no linear modules."""
    target_parameters: tuple[str, ...] = ()
    """Ends of the names of other weights that get an adapter too: `all-experts` = the stacked matrices of a mixture,
    every expert with an adapter of its own; `gate.weight` = the router of Mixtral and Qwen. Needs dropout=0. Every
    forward pass adds these adapters to copies of their weights, kept until the backward pass: as much memory as the
    experts once more, with gradient_checkpointing those of one layer. Not with compile."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4` keeps the frozen weights of linear modules in 4 bits (QLoRA), experts as they are; needs a GPU and
    bitsandbytes."""

    @model_validator(mode="after")
    def _only_frozen_weights_are_quantized(self) -> "LoRAConfig":
        if self.quantization != "none" and not self.rank:
            raise ValueError(f"quantization={self.quantization} needs an adapter, got rank=0; set rank, such as 16")
        return self

    @model_validator(mode="after")
    def _added_to_weights_or_to_outputs(self) -> "LoRAConfig":
        if self.target_parameters and not self.rank:
            raise ValueError(
                f"target_parameters={list(self.target_parameters)} needs an adapter, got rank=0; set rank, such as 16"
            )
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"target_parameters={list(self.target_parameters)} does not go with dropout={self.dropout}: those "
                "adapters are added to the weights and see no inputs that could be dropped; use dropout=0"
            )
        return self


class PostTrainConfig(TrainConfig):
    """What the objectives share that start from a language model."""

    lora: LoRAConfig = LoRAConfig()
    """Adapter, instead of all parameters."""

    @model_validator(mode="after")
    def _steps_hold_unequal_tokens(self) -> "PostTrainConfig":
        for name in ("warmup", "decay"):
            if tokens := getattr(self.optimizer, f"{name}_tokens"):
                raise ValueError(
                    f"optimizer.{name}_tokens={tokens} is for pretrain, whose steps hold equally many tokens; here use "
                    f"optimizer.{name}_steps or optimizer.{name}_fraction"
                )
        return self


class SampledConfig(PostTrainConfig):
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

    def summary(self) -> str:
        return f"{self.num_epochs:g} epochs, {super().summary()}"


class SFTConfig(SampledConfig):
    """Supervised fine-tuning: loss on the assistant's tokens only."""

    z_loss_coefficient: float = Field(default=0.0, ge=0)
    """Weight of log^2 Z, which keeps logits small (PaLM: 1e-4); 0 = none."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Size of the noise on the embeddings (NEFTune, https://arxiv.org/abs/2310.05914: 5 to 15); 0 = none."""
