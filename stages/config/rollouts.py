"""Reinforcement learning: rollouts, clipping and what keeps the policy near its start.

All of it decides results and enters fingerprints: a field that is added is marked `AddedLater` (`stages.config.base`).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stages.config.base import AddedLater, Choice, Config
from stages.config.estimators import GAE, Estimator
from stages.config.graph import INSTRUCTIONS, PROMPTS
from stages.config.guards import GuardsConfig
from stages.config.scorers import RewardModelScorer, ScorerConfig, described, reads_reward_model
from stages.config.train import Models, PostTrainConfig

PROMPT_LOSS = "eval/prompt_loss"
"""What PPO records of its weights that does not depend on sampled answers; a gate measures it again."""


PROMPT_FIELDS = {INSTRUCTIONS: (INSTRUCTIONS,), PROMPTS: (PROMPTS,), "both": (INSTRUCTIONS, PROMPTS)}
"""The fields of data behind each choice of `ppo.prompts_from`."""
Aggregation = Literal["mean", "minimum", "lower"]
"""How the scores of an ensemble's members become one."""


class LossOver(Choice):
    """What a loss over responses is averaged over."""

    TOKENS = "tokens", "All tokens alike"
    SEQUENCES = "sequences", "Responses, each the mean of its tokens"
    FIXED_LENGTH = "fixed_length", "Responses, each the sum of its tokens over one length"


class SamplerConfig(Config):
    """Sampler against trainer: generation computes the probabilities of tokens in another way than training, so both
    are compared in every rollout."""

    max_kl: float = Field(default=0.05, gt=0)
    """Largest mean divergence of the two, in nats a token."""
    max_ratio_error: float = Field(default=0.05, gt=0)
    """Largest distance from 1 of the mean ratio of both probabilities."""
    above: Literal["warn", "fail"] = "warn"
    """What a rollout above one of the limits does: a warning in the log, or the end of the stage."""
    truncation: float = Field(default=0.0, ge=0)
    """Each token's policy loss is weighted by the ratio of training's to generation's probability, at most this, such
    as 2 (truncated importance sampling); 0 = not weighted."""


class PPOConfig(PostTrainConfig):
    """Policy optimisation against a reward model, rules or a mixture, with a KL penalty to the frozen SFT model: PPO,
    RLOO, GRPO or REINFORCE, by `estimator`.

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
    scorer: Annotated[ScorerConfig, AddedLater(RewardModelScorer())] = RewardModelScorer()
    """What gives responses their scores; `kind` chooses it, the other fields are its own. Without `reward_model` the
    run trains none for this stage, and needs no preference pairs."""
    prompts_from: Annotated[Literal["instructions", "prompts", "both"], AddedLater("instructions")] = "instructions"
    """Whose prompts are answered: those of the instructions, of the prompt sets (field `prompts`), or of both. Only
    prompt sets have references and tests. With `prompts` in the form it is `prompts` unless an override says
    otherwise."""
    estimator: Estimator = GAE()
    """How advantages are estimated; `kind` chooses it, the other fields are its own."""
    clip_range: float = Field(default=0.2, gt=0)
    """The policy ratio is clipped to 1 +- this."""
    clip_range_high: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0)
    """Another range above 1, such as 0.28, which lets rare tokens become more likely (clip-higher of DAPO,
    https://arxiv.org/abs/2503.14476); 0 = `clip_range` on both sides."""
    dual_clip: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0)
    """A token with a negative advantage costs at most this many times the advantage, such as 3
    (https://arxiv.org/abs/1912.09729); 0 = no bound, else above 1."""
    loss_over: Annotated[LossOver, AddedLater(LossOver.TOKENS)] = LossOver.TOKENS
    """What the loss of a step averages over: `tokens`, each with the same weight; `sequences`, each the mean of its
    tokens, as in GRPO; or `fixed_length`, each the sum of its tokens over `max_response_length`, as in Dr. GRPO."""
    entropy_coefficient: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0)
    """Weight of the bonus for the entropy of the policy, in nats a token; 0 = none."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Penalty a token for leaving the reference, at the start."""
    kl_place: Annotated[Literal["reward", "loss"], AddedLater("reward")] = "reward"
    """Where the penalty is paid: as a part of each token's `reward`, or as a term of the `loss`, as in GRPO."""
    kl_estimator: Annotated[Literal["k1", "k2", "k3"], AddedLater("k1")] = "k1"
    """How the divergence of a token is estimated: `k1` in the reward, `k2` or `k3` in the loss. `k2` has the gradient
    of the divergence that the reward penalises; `k3`, as in GRPO, that of the reverse one."""
    kl_target: float = Field(default=0.0, ge=0)
    """Nats a response that the adaptive controller aims for; 0 keeps the coefficient fixed."""
    kl_horizon: int = Field(default=2000, ge=1)
    """Responses over which the controller reacts."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of a response without an end token."""
    overlong_tokens: Annotated[int, AddedLater(0)] = Field(default=0, ge=0)
    """Tokens before `max_response_length` over which the penalty for length grows from 0 to `overlong_penalty` (soft
    overlong punishment of DAPO, https://arxiv.org/abs/2503.14476); 0 = no such penalty."""
    overlong_penalty: Annotated[float, AddedLater(1.0)] = Field(default=1.0, gt=0)
    """Subtracted from the score of a response of `max_response_length`, with `overlong_tokens`."""
    reward_scaling: Annotated[Literal["none", "running"], AddedLater("none")] = "none"
    """`running` divides rewards by their spread over all rollouts so far, after the scorer's own scale."""
    reward_clip: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0)
    """Scores in the unit of rewards are clipped to +- this, before penalties; 0 = not."""
    pretraining_coefficient: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0)
    """Weight of the loss of the run's own documents, which are mixed into every step so that the base model's knowledge
    is kept (PPO-ptx, https://arxiv.org/abs/2203.02155); 0 = none."""
    pretraining_rows: Annotated[int, AddedLater(8)] = Field(default=8, ge=1)
    """Rows of documents, each `tokenize.sequence_length` tokens, in an optimizer step over all workers, with
    `pretraining_coefficient`."""
    sampler: Annotated[SamplerConfig, AddedLater(SamplerConfig())] = SamplerConfig()
    """How far the probabilities of generation may be from those of training."""
    gold_patience: Annotated[int, AddedLater(0)] = Field(default=0, ge=0)
    """Evaluations in a row at which the score of the gold scorer fell while that of the reward model rose, after which
    training ends; 0 = it never does. The model has the last weights, or those that `best_metric` chooses, such as
    `eval/gold_score` with `best_is` highest. Needs a gold scorer with the policy's tokenizer, and `eval_every`."""
    guards: Annotated[GuardsConfig, AddedLater(GuardsConfig())] = GuardsConfig()
    """What is watched while training, with limits to warn and to stop at."""

    aggregation: Annotated[Aggregation, AddedLater("mean")] = "mean"
    """What an ensemble of reward models says of a response: the `mean` of its members' scores, their `minimum`, or the
    `lower` mean, from which `spread_coefficient` times their standard deviation is taken."""
    spread_coefficient: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0)
    """Part of the members' spread that aggregation=lower takes from their mean."""
    score_scale: Annotated[Literal["rollout", "model"], AddedLater("rollout")] = "rollout"
    """By which mean and spread scores become rewards: those of the first `rollout`, or those of held-out answers that
    the reward model's own training measured (`model`, which its scores.json has)."""

    moved: ClassVar = {
        name: f"estimator.{name}" for name in ("gamma", "gae_lambda", "value_clip_range", "value_coefficient")
    }

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The fields of data whose prompts are answered."""
        return PROMPT_FIELDS[self.prompts_from]

    @property
    def prompts_per_rollout(self) -> int:
        return self.rollout_size // self.estimator.responses_per_prompt

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps over each rollout; `global_batch_size` divides `rollout_size`, so every epoch sees each
        response once."""
        return self.num_epochs * (self.rollout_size // self.global_batch_size)

    @property
    def needs_gold(self) -> str:
        """The setting that needs a gold scorer, with its value; empty when none does."""
        if self.gold_patience:
            return f"gold_patience={self.gold_patience}"
        guard = self.guards.gold
        name = "stop" if guard.stop else "warn"
        return f"guards.gold.{name}={getattr(guard, name):g}" if guard.on else ""

    @property
    def models(self) -> Models:
        """Policy and critic, reference and perhaps reward model. With an adapter a model serves as its own frozen
        start, so the reference needs no copy, nor does a reward model that the critic started as."""
        trained, adapted = 1 + self.estimator.needs_critic, bool(self.lora.rank)
        if not reads_reward_model(self.scorer):
            return Models(trained, frozen=int(not adapted))
        serves_as_reward = adapted and isinstance(self.estimator, GAE) and self.estimator.critic == "reward_model"
        return Models(trained, frozen=(not adapted) + (not serves_as_reward))

    def summary(self) -> str:
        kind = "" if self.estimator.kind == "gae" else f"{self.estimator.kind}, "
        rollouts = f"{self.num_rollouts} rollouts of {self.rollout_size} responses"
        kind += "" if isinstance(self.scorer, RewardModelScorer) else f"scored by {described(self.scorer)}, "
        return f"{kind}{rollouts}, {self.max_response_length} tokens each"

    @model_validator(mode="after")
    def _critic_has_a_start(self) -> "PPOConfig":
        from_reward = isinstance(self.estimator, GAE) and self.estimator.critic == "reward_model"
        if from_reward and not reads_reward_model(self.scorer):
            raise ValueError(
                f"estimator.critic=reward_model needs a reward model, and scorer ({described(self.scorer)}) reads "
                "none; use estimator.critic=fresh, or an estimator without a critic, such as "
                "estimator.kind=rloo"
            )
        return self

    @model_validator(mode="after")
    def _references_come_from_prompt_sets(self) -> "PPOConfig":
        if self.scorer.needs and self.prompts_from != PROMPTS:
            raise ValueError(
                f"scorer ({described(self.scorer)}) needs {' and '.join(self.scorer.needs)} of each prompt, and "
                f"prompts_from={self.prompts_from}: prompts of instructions have none; give prompt sets (the field "
                "`prompts`) and use prompts_from=prompts"
            )
        return self

    @model_validator(mode="after")
    def _watching_needs_evaluations(self) -> "PPOConfig":
        why = "without evaluations on the way nothing is seen to fall"
        needing = self.needs_gold
        if not needing:
            needing, why = self.guards.stopping, "without evaluations on the way there are no weights to go back to"
        if needing and not self.eval_every:
            name = needing.split("=")[0]
            raise ValueError(f"{needing} needs eval_every >= 1, got 0: {why}; set eval_every, or {name} to 0")
        return self

    @model_validator(mode="after")
    def _groups_have_several(self) -> "PPOConfig":
        guard = self.guards.groups
        if guard.on and self.estimator.responses_per_prompt < 2:
            name = "stop" if guard.stop else "warn"
            raise ValueError(
                f"guards.groups.{name}={getattr(guard, name):g} needs estimator.responses_per_prompt >= 2, got "
                f"{self.estimator.responses_per_prompt}: one response is no group; raise it, or set "
                f"guards.groups.{name} to 0"
            )
        return self

    @model_validator(mode="after")
    def _spread_counts_once(self) -> "PPOConfig":
        if (self.aggregation == "lower") != (self.spread_coefficient > 0):
            raise ValueError(
                f"aggregation={self.aggregation} and spread_coefficient={self.spread_coefficient:g} do not go "
                "together; use aggregation=lower with a spread_coefficient above 0, such as 1, or another aggregation "
                "with 0"
            )
        return self

    @model_validator(mode="after")
    def _estimator_fits_its_place(self) -> "PPOConfig":
        place, estimator = self.kl_place, self.kl_estimator
        if place == "loss" and estimator == "k1":
            raise ValueError(
                "kl_estimator=k1 has no useful gradient with kl_place=loss: on average over samples it is zero; use "
                "kl_estimator=k2 (the divergence that rewards penalise) or k3 (as in GRPO), or kl_place=reward"
            )
        if place == "reward" and estimator != "k1":
            raise ValueError(
                f"kl_estimator={estimator} needs kl_place=loss, got reward: as a reward only k1 has the gradient of "
                "the divergence on average; use kl_estimator=k1, or kl_place=loss"
            )
        return self

    @model_validator(mode="after")
    def _bounds_bind(self) -> "PPOConfig":
        if 0 < self.dual_clip <= 1:
            raise ValueError(
                f"dual_clip={self.dual_clip} would cut the loss at the old policy already; use more than 1, such as 3, "
                "or 0 for none"
            )
        if 0 < self.sampler.truncation < 1:
            raise ValueError(
                f"sampler.truncation={self.sampler.truncation} would cut the weights of tokens on which both agree; "
                "use at least 1, such as 2, or 0 for none"
            )
        if self.overlong_tokens >= self.max_response_length:
            raise ValueError(
                f"overlong_tokens={self.overlong_tokens} leaves no length without a penalty; use less than "
                f"max_response_length={self.max_response_length}"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> "PPOConfig":
        for name, needed in {
            "overlong_penalty": "overlong_tokens",
            "pretraining_rows": "pretraining_coefficient",
        }.items():
            value, unused = getattr(self, name), PPOConfig.model_fields[name].default
            if value != unused and not getattr(self, needed):
                raise ValueError(
                    f"{name}={value} needs {needed} above 0, got 0; set {needed}, or leave {name} at {unused}"
                )
        estimator = self.estimator
        if isinstance(estimator, GAE) and estimator.critic_warmup_rollouts >= self.num_rollouts:
            raise ValueError(
                f"estimator.critic_warmup_rollouts={estimator.critic_warmup_rollouts} leaves no rollout to train the "
                f"policy; use less than num_rollouts={self.num_rollouts}"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_divide(self) -> "PPOConfig":
        parts = {
            "global_batch_size": self.global_batch_size,
            "estimator.responses_per_prompt": self.estimator.responses_per_prompt,
        }
        for name, part in parts.items():
            if self.rollout_size % part:
                below = self.rollout_size // part * part
                ways = " or ".join(str(size) for size in (below, below + part) if size)
                raise ValueError(
                    f"rollout_size={self.rollout_size} is not divisible by {name}={part}; use {ways}, or another {name}"
                )
        return self
