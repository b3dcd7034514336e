"""Proximal policy optimisation of the SFT model, or of a given one, against the reward model, with a KL penalty to the
frozen start.

Experience is a generator: `steps` rolls out with the live policy and yields the minibatches of its epochs; the loop
consumes them like any other steps. The critic starts as a copy of the reward model, whose head becomes the value head;
without a critic among the trained parts, the value terms are absent everywhere. A gold scorer, where the run has one,
is read in evaluations only.

Shape legend: N targets of a micro-batch.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.config.errors import ConfigError
from stages.config.graph import BASE_MODEL, GOLD_MODEL, GRAPH, REWARD_MODEL, Stage
from stages.config.rollouts import PPOConfig
from stages.data.tokens.packing import Packed, RowBudget, TokenSequence, lay_out
from stages.data.tokens.ragged import Ragged
from stages.data.tokens.views import Split, TokensArtifact, evenly, require
from stages.job.context import StageContext, StageOutcome
from stages.losses.divergence import adapted_kl_coefficient
from stages.losses.policy import ppo_policy_loss, ppo_value_loss
from stages.models.build import load_causal_lm, load_reward_model
from stages.models.experts import routing_of
from stages.models.forward import TrunkOutput, target_logprobs, target_positions, target_values
from stages.models.generation import Sampling
from stages.models.lora import add_adapter
from stages.models.same_tokenizer import check_given_scorer, check_one_score, check_same_tokenizer
from stages.train.engine import Engine, LossOutput
from stages.train.objective import ObjectiveState, Step
from stages.train.plan import batches, order_digest, share, shuffled
from stages.train.rollout.advantages import GAE
from stages.train.rollout.experience import Shaping, critic_quality, describe, from_tensors, to_experience, to_tensors
from stages.train.rollout.gold import GoldWatch
from stages.train.rollout.prompts import prompt_loss
from stages.train.rollout.sampling import Sampler
from stages.train.rollout.scoring import RewardModel
from stages.train.routing import Balancing
from stages.train.run import Prepared, train_stage

logger = logging.getLogger(__name__)

_GOLD = GRAPH[Stage.GOLD].role
_EVALUATION_STREAM = 1 << 20
"""Random stream of evaluations, far from those of rollouts."""


def run(context: StageContext) -> StageOutcome:
    return train_stage(context, prepare)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Policy and reference start as the SFT model or the given one, critic and reward as the reward model."""
    config = context.config
    assert isinstance(config, PPOConfig)
    prompts = tokens.prompts(Split.TRAIN)
    require(len(prompts), "training prompts", advice="Give instruction data, or `derived`.")
    gold = _gold_of(context, tokens)
    if config.gold_patience:
        advice = "Hold out a larger share of the data, or set ppo.gold_patience=0."
        require(len(tokens.prompts(Split.HELDOUT)), "held-out prompts", advice=advice)
    start_dir, reward_dir = context.model_dir("model", BASE_MODEL), context.model_dir("reward", REWARD_MODEL)
    if context.has_given(REWARD_MODEL):
        check_given_scorer(reward_dir, tokens.tokenizer(), role=REWARD_MODEL)
    # The reward model is a good start for the critic: it knows already what a whole response is worth, and learns to
    # say so from its beginning.
    policy = load_causal_lm(start_dir, tokens, lora=config.lora)
    critic = load_reward_model(reward_dir, tokens, lora=config.lora)

    def objective(engine: Engine) -> PPOObjective:
        # With adapters there are no frozen copies: reference and reward model are policy and critic without theirs.
        copies = not config.lora.rank
        budget = RowBudget(row_length=tokens.sequence_length, max_rows=context.execution.micro_batch_size)
        reward = engine.freeze(load_reward_model(reward_dir, tokens)) if copies else None
        sampler = Sampler(
            Sampling(config.max_response_length, tokens.eos_id, tokens.pad_id, config.temperature),
            seed=config.seed,
            scorer=RewardModel(reward, pad_id=tokens.pad_id, budget=budget),
            reference=engine.freeze(load_causal_lm(start_dir, tokens)) if copies else None,
            budget=budget,
        )
        balancing = Balancing(policy=routing_of(policy), critic=routing_of(critic))
        heldout, watch = tokens.prompts(Split.HELDOUT), gold.watch(engine, tokens, budget, config)
        return PPOObjective(config, sampler, prompts=prompts, heldout=heldout, balancing=balancing, gold=watch)

    return Prepared(
        parts={
            "policy": add_adapter(policy, config.lora, seed=config.seed),
            "critic": add_adapter(critic, config.lora, seed=config.seed + 1),
        },
        objective=objective,
        exported="policy",
        ledger={"prompts": len(prompts), **({"gold_not_measured": gold.missing} if gold.missing else {})},
    )


@dataclass(frozen=True)
class _Gold:
    """The gold scorer of the run, if it can be read here."""

    folder: Path | None = None
    missing: str = ""
    """Why a gold scorer that the run has is not read; empty when it is, or when there is none."""

    def watch(self, engine: Engine, tokens: TokensArtifact, budget: RowBudget, config: PPOConfig) -> GoldWatch | None:
        """Load it as the reward model is loaded: frozen, whole on every worker, with LoRA too."""
        if self.missing and engine.is_main:  # of many workers one says so
            logger.warning("no gold scores while PPO trains, only in `evaluate`: %s", self.missing)
        if self.folder is None:
            return None
        frozen = engine.freeze(load_reward_model(self.folder, tokens))
        scorer = RewardModel(frozen, pad_id=tokens.pad_id, budget=budget)
        return GoldWatch(scorer, patience=config.gold_patience)


def _gold_of(context: StageContext, tokens: TokensArtifact) -> _Gold:
    """Find it; one with a tokenizer of its own judges in `evaluate` alone, which has the texts. Raises ConfigError when
    `gold_patience` then has nothing to go by."""
    config = context.config
    assert isinstance(config, PPOConfig)
    if not (context.has_given(GOLD_MODEL) or _GOLD in context.inputs):
        found = _Gold(missing="the run has no gold scorer" if config.gold_patience else "")
    else:
        folder = context.model_dir(_GOLD, GOLD_MODEL)
        found = _Gold(folder)
        if context.has_given(GOLD_MODEL):
            check_one_score(folder, role=GOLD_MODEL)
            try:
                check_same_tokenizer(folder, tokens.tokenizer(), role=GOLD_MODEL)
            except ConfigError as error:
                found = _Gold(missing=error.message)
    if found.missing and config.gold_patience:
        raise ConfigError(
            f"ppo.gold_patience={config.gold_patience} needs a gold scorer with the policy's ids: {found.missing}",
            advice="Use gold_scorer=train, give a gold_model with the policy's tokenizer, or set ppo.gold_patience=0.",
        )
    return found


class PPOObjective:
    """Rollouts, clipped updates, and the state between them: cursor, rollout, score scale, KL coefficient."""

    def __init__(
        self,
        config: PPOConfig,
        sampler: Sampler,
        *,
        prompts: Ragged,
        heldout: Ragged,
        balancing: Balancing,
        gold: GoldWatch | None = None,
    ) -> None:
        self._config, self._sampler, self._prompts, self._heldout = config, sampler, prompts, heldout
        self._balancing, self._gold = balancing, gold
        self._estimator = GAE(gamma=config.gamma, gae_lambda=config.gae_lambda)
        # `global_batch_size` divides `rollout_size`: every epoch over a rollout sees each response once.
        self._steps_per_rollout = config.num_epochs * (config.rollout_size // config.global_batch_size)
        self.num_steps, self.tokens_per_step = config.num_rollouts * self._steps_per_rollout, 0
        # Responses depend on the weights, so only the order of prompts can be promised; one epoch's stands for all.
        self.order = order_digest([shuffled(len(prompts), seed=config.seed, epoch=0)])
        self.num_heldout = min(len(heldout), config.eval_items)
        self._rollout = 0
        self._inner = 0
        """Optimizer steps of the present rollout that are done."""
        self._experience: list[TokenSequence] = []
        self._rollout_metrics: dict[str, float] = {}
        self._kl_coefficient = config.kl_coefficient

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self._rollout < self._config.num_rollouts:
            if self._gold is not None and self._gold.ends:
                if engine.is_main:
                    logger.warning("training ends here: %s", self._gold.reason())
                return
            if not self._experience:  # a resume in the middle of a rollout's updates brings it along
                self._roll_out(engine)
            step = self._minibatch(engine)
            # The cursor moves before the step is handed out: a checkpoint is written after the step, and points behind.
            self._inner += 1
            if self._inner == self._steps_per_rollout:
                self._experience, self._inner = [], 0
                self._rollout += 1
            yield self._balancing.watching(step)

    def _roll_out(self, engine: Engine) -> None:
        config = self._config
        # Another stream in every rollout: a prompt that comes again gets new responses.
        samples = self._sampler.sample(engine, self._next_prompts(), stream=self._rollout)
        experience = to_experience(
            samples,
            self._sampler.scorer.rewards([sample.score for sample in samples]),
            shaping=Shaping(self._kl_coefficient, config.missing_eos_penalty),
            estimator=self._estimator,
        )
        self._experience = experience.sequences
        self._rollout_metrics = describe(samples) | {
            "ppo/reward": experience.mean_reward,
            "ppo/kl_coefficient": self._kl_coefficient,
            **critic_quality(self._experience),
        }
        if config.kl_target:  # for the next rollout: this one's rewards are made
            self._kl_coefficient = adapted_kl_coefficient(
                self._kl_coefficient,
                kl=self._rollout_metrics["ppo/kl"],
                target=config.kl_target,
                horizon=config.kl_horizon,
                num_responses=config.rollout_size,
            )

    def _next_prompts(self) -> list[np.ndarray]:
        """Walk through shuffled prompts, epoch after epoch; a rollout may span the end of one and the start of the
        next."""
        size, available = self._config.rollout_size, len(self._prompts)
        positions = range(self._rollout * size, (self._rollout + 1) * size)
        orders = {
            epoch: shuffled(available, seed=self._config.seed, epoch=epoch)
            for epoch in {position // available for position in positions}
        }
        return [self._prompts[int(orders[p // available][p % available])] for p in positions]

    def _minibatch(self, engine: Engine) -> Step:
        config = self._config
        # Every epoch shuffles anew, and no two rollouts have the same orders. The order is that of the whole rollout,
        # of which each rank takes its share, so minibatches do not depend on the number of ranks.
        per_epoch = config.rollout_size // config.global_batch_size
        order = shuffled(
            config.rollout_size, seed=config.seed, epoch=self._rollout * config.num_epochs + self._inner // per_epoch
        )
        indices = batches(order, config.global_batch_size)[self._inner % per_epoch]
        mine = share(indices, rank=engine.rank, world_size=engine.world_size)
        # A rank without a response in this step runs one all the same, for the collectives, and it is not counted.
        sequences = [self._experience[int(index)] for index in (mine if len(mine) else indices[:1])]
        micro_batches = [lay_out(part) for part in self._sampler.budget.cut(sequences)]
        return Step(micro_batches, counted=len(mine) > 0, metrics=dict(self._rollout_metrics))

    def weight(self, batch: Packed) -> float:
        return float(batch.num_targets)

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        """Return the clipped surrogate, with the value loss where there is a critic, summed over response tokens."""
        config = self._config
        trunks = {name: self._balancing.run_trunk(parts, name, batch) for name in parts}
        # What the rollout recorded of the response tokens, in the order in which the models give theirs.
        where = target_positions(batch)
        old = {name: values_BT[where] for name, values_BT in batch.fields.items()}
        # The same temperature as in sampling: the ratio compares the distributions that tokens were drawn from.
        tokens = target_logprobs(
            parts["policy"], batch, temperature=config.temperature, with_entropy=True, trunk=trunks["policy"]
        )
        policy = ppo_policy_loss(
            logprobs_N=tokens.logprobs_N,
            old_logprobs_N=old["old_logprobs"],
            advantages_N=old["advantages"],
            clip_range=config.clip_range,
        )
        value_sum = self._value_loss_sum(parts, batch, old, trunks)
        sums = {
            "ppo/policy_loss": policy.loss_sum.detach(),
            "ppo/value_loss": None if value_sum is None else value_sum.detach(),
            "ppo/clip_fraction": policy.clipped_sum,
            "ppo/approx_kl": policy.approx_kl_sum,
            "ppo/entropy": tokens.entropy_sum,
        }
        # All are sums over response tokens; the loop divides by those of the whole step, on all ranks.
        count = policy.loss_sum.new_tensor(float(len(tokens.logprobs_N)))
        metrics = {name: torch.stack([value, count]) for name, value in sums.items() if value is not None}
        loss_sum = policy.loss_sum if value_sum is None else policy.loss_sum + config.value_coefficient * value_sum
        return self._balancing.added_to(LossOutput(loss_sum, metrics), **trunks)

    def _value_loss_sum(
        self, parts: nn.ModuleDict, batch: Packed, old: dict[str, Tensor], trunks: dict[str, TrunkOutput]
    ) -> Tensor | None:
        if "critic" not in parts:
            return None
        return ppo_value_loss(
            values_N=target_values(parts["critic"], batch, trunks["critic"]),
            old_values_N=old["old_values"],
            returns_N=old["returns"],
            clip_range=self._config.value_clip_range,
        )

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Score sampled responses to held-out prompts, with the same random numbers every time, and measure the loss of
        the prompts themselves."""
        chosen = evenly(len(self._heldout), at_most=self._config.eval_items)
        if not len(chosen):
            return {}
        prompts = [self._heldout[int(i)] for i in chosen]
        samples = self._sampler.sample(engine, prompts, stream=_EVALUATION_STREAM)
        found = {name.replace("ppo/", "eval/"): value for name, value in describe(samples).items()}
        found |= prompt_loss(engine, prompts, self._sampler.budget)
        return found | (self._gold.measure(engine, samples) if self._gold is not None else {})

    @property
    def ledger(self) -> dict[str, Any]:
        """Responses that were sampled to train on, and why there are not more of them."""
        # The cursor is behind the step that was handed out last, so a rollout amid its updates has begun.
        sampled = {"responses": (self._rollout + (self._inner > 0)) * self._config.rollout_size}
        early = self._gold is not None and self._gold.ends and self._rollout < self._config.num_rollouts
        return sampled | ({"stopped_early": self._gold.reason()} if early and self._gold is not None else {})

    def state_dict(self) -> ObjectiveState:
        # These names are in checkpoints of running stores.
        numbers = {
            "rollout": self._rollout,
            "inner": self._inner,
            "kl_coefficient": self._kl_coefficient,
            "rollout_metrics": self._rollout_metrics,
        }
        if self._gold is not None:
            numbers |= self._gold.state_dict()
        return ObjectiveState(
            numbers | self._sampler.scorer.state_dict(), to_tensors(self._experience) | self._balancing.state_dict()
        )

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._rollout, self._inner = state.numbers["rollout"], state.numbers["inner"]
        self._kl_coefficient = state.numbers["kl_coefficient"]
        self._rollout_metrics = state.numbers["rollout_metrics"]
        self._sampler.scorer.load_state_dict(state.numbers)
        if self._gold is not None:
            self._gold.load_state_dict(state.numbers)
        self._experience = from_tensors(state.tensors)
        self._balancing.load_state_dict(state.tensors)
