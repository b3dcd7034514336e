"""Proximal policy optimisation of the SFT model against the reward model, with a KL penalty to the frozen SFT model.

Experience is a generator: `steps` rolls out with the live policy and yields the minibatches of its epochs; the loop
consumes them like any other steps. The critic starts as a copy of the reward model, whose head becomes the value head.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from stages.config.train import PPOConfig
from stages.data.tokens.packing import Packed, TokenSequence, lay_out, split_by_rows
from stages.data.tokens.ragged import Ragged
from stages.data.tokens.views import Split, TokensArtifact, evenly, require
from stages.job.context import StageContext, StageOutcome
from stages.losses import adapted_kl_coefficient, ppo_policy_loss, ppo_value_loss
from stages.models.build import load_causal_lm, load_reward_model
from stages.models.experts import routing_of
from stages.models.forward import target_logprobs, target_positions, target_values
from stages.models.lora import add_adapter
from stages.train.engine import Engine
from stages.train.objective import LossOutput, ObjectiveState, Step
from stages.train.plan import batches, order_digest, share, shuffled
from stages.train.rollout import FrozenModels, Sampled, Sampler, ScoreScale, from_tensors, to_experience, to_tensors
from stages.train.routing import Balancing
from stages.train.run import Prepared, train_stage

_EVALUATION_STREAM = 1 << 20
"""Random stream of evaluations, far from those of rollouts."""


def run(context: StageContext) -> StageOutcome:
    return train_stage(context)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Policy and reference start as the SFT model, critic and reward as the reward model."""
    config = context.config
    assert isinstance(config, PPOConfig)
    prompts = tokens.prompts(Split.TRAIN)
    require(len(prompts), "training prompts", advice="Give instruction data, or `derived`.")
    sft_dir, reward_dir = context.input_dir("model"), context.input_dir("reward")

    def objective(engine: Engine) -> PPOObjective:
        frozen = FrozenModels(None, None)  # policy and critic without their adapters
        if not config.lora.rank:
            frozen = FrozenModels(
                reference=engine.freeze(load_causal_lm(sft_dir, tokens)),
                reward=engine.freeze(load_reward_model(reward_dir, tokens)),
            )
        sampler = Sampler(
            config, frozen, tokens.eos_id, tokens.pad_id, tokens.sequence_length, context.execution.micro_batch_size
        )
        balancing = Balancing(policy=routing_of(policy), critic=routing_of(critic))
        return PPOObjective(
            config, sampler, prompts=prompts, heldout=tokens.prompts(Split.HELDOUT), balancing=balancing
        )

    policy = load_causal_lm(sft_dir, tokens, lora=config.lora)
    critic = load_reward_model(reward_dir, tokens, lora=config.lora)
    return Prepared(
        parts={
            "policy": add_adapter(policy, config.lora, seed=config.seed),
            "critic": add_adapter(critic, config.lora, seed=config.seed + 1),
        },
        objective=objective,
        exported="policy",
        ledger={"prompts": len(prompts), "responses": config.num_rollouts * config.rollout_size},
    )


class PPOObjective:
    """Rollouts, clipped updates, and the state between them: cursor, rollout, score scale, KL coefficient."""

    def __init__(
        self, config: PPOConfig, sampler: Sampler, *, prompts: Ragged, heldout: Ragged, balancing: Balancing
    ) -> None:
        self._config, self._sampler, self._prompts, self._heldout = config, sampler, prompts, heldout
        self._balancing = balancing
        self._steps_per_rollout = config.num_epochs * (config.rollout_size // config.global_batch_size)
        self.num_steps, self.tokens_per_step = config.num_rollouts * self._steps_per_rollout, 0
        self.order = order_digest([shuffled(len(prompts), seed=config.seed, epoch=0)])
        self._rollout = 0
        self._inner = 0
        self._experience: list[TokenSequence] = []
        self._rollout_metrics: dict[str, float] = {}
        self._scale: ScoreScale | None = None
        self._kl_coefficient = config.kl_coefficient

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self._rollout < self._config.num_rollouts:
            if not self._experience:
                self._roll_out(engine)
            step = self._minibatch(engine)
            self._inner += 1
            if self._inner == self._steps_per_rollout:
                self._experience, self._inner = [], 0
                self._rollout += 1
            yield self._balancing.watching(step)

    def _roll_out(self, engine: Engine) -> None:
        config = self._config
        samples = self._sampler.sample(engine, self._next_prompts(), stream=self._rollout)
        self._scale = self._scale or ScoreScale.of(samples)
        self._experience, reward = to_experience(
            samples, config, scale=self._scale, kl_coefficient=self._kl_coefficient
        )
        self._rollout_metrics = _describe(samples) | {
            "ppo/reward": reward,
            "ppo/kl_coefficient": self._kl_coefficient,
            "ppo/explained_variance": _explained_variance(self._experience),
        }
        if config.kl_target:
            self._kl_coefficient = adapted_kl_coefficient(
                self._kl_coefficient,
                kl=self._rollout_metrics["ppo/kl"],
                target=config.kl_target,
                horizon=config.kl_horizon,
                num_responses=config.rollout_size,
            )

    def _next_prompts(self) -> list[np.ndarray]:
        """Walk through shuffled prompts, epoch after epoch."""
        size, available = self._config.rollout_size, len(self._prompts)
        positions = range(self._rollout * size, (self._rollout + 1) * size)
        orders = {
            epoch: shuffled(available, seed=self._config.seed, epoch=epoch)
            for epoch in {position // available for position in positions}
        }
        return [self._prompts[int(orders[p // available][p % available])] for p in positions]

    def _minibatch(self, engine: Engine) -> Step:
        config = self._config
        per_epoch = config.rollout_size // config.global_batch_size
        order = shuffled(
            config.rollout_size, seed=config.seed, epoch=self._rollout * config.num_epochs + self._inner // per_epoch
        )
        indices = batches(order, config.global_batch_size)[self._inner % per_epoch]
        mine = share(indices, rank=engine.rank, world_size=engine.world_size)
        sequences = [self._experience[int(index)] for index in (mine if len(mine) else indices[:1])]
        parts = split_by_rows(
            [(len(sequence.ids),) for sequence in sequences],
            row_length=self._sampler.row_length,
            max_rows=self._sampler.max_rows,
        )
        micro_batches = [lay_out([sequences[i] for i in part]) for part in parts]
        return Step(micro_batches, counted=len(mine) > 0, metrics=dict(self._rollout_metrics))

    def weight(self, batch: Packed) -> float:
        return float(batch.num_targets)

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        config = self._config
        trunk = self._balancing.run_trunk(parts, "policy", batch)
        critic_trunk = self._balancing.run_trunk(parts, "critic", batch)
        where = target_positions(batch)
        old = {name: values_BT[where] for name, values_BT in batch.fields.items()}
        tokens = target_logprobs(parts["policy"], batch, temperature=config.temperature, with_entropy=True, trunk=trunk)
        policy = ppo_policy_loss(
            logprobs_N=tokens.logprobs_N,
            old_logprobs_N=old["old_logprobs"],
            advantages_N=old["advantages"],
            clip_range=config.clip_range,
        )
        value_sum = ppo_value_loss(
            values_N=target_values(parts["critic"], batch, critic_trunk),
            old_values_N=old["old_values"],
            returns_N=old["returns"],
            clip_range=config.value_clip_range,
        )
        count = policy.loss_sum.new_tensor(float(len(tokens.logprobs_N)))
        sums = {
            "ppo/policy_loss": policy.loss_sum.detach(),
            "ppo/value_loss": value_sum.detach(),
            "ppo/clip_fraction": policy.clipped_sum,
            "ppo/approx_kl": policy.approx_kl_sum,
            "ppo/entropy": tokens.entropy_sum,
        }
        metrics = {name: torch.stack([value, count]) for name, value in sums.items() if value is not None}
        output = LossOutput(policy.loss_sum + config.value_coefficient * value_sum, metrics)
        return self._balancing.added_to(output, policy=trunk, critic=critic_trunk)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        chosen = evenly(len(self._heldout), at_most=self._config.eval_items)
        if not len(chosen):
            return {}
        samples = self._sampler.sample(engine, [self._heldout[int(i)] for i in chosen], stream=_EVALUATION_STREAM)
        return {name.replace("ppo/", "eval/"): value for name, value in _describe(samples).items()}

    def state_dict(self) -> ObjectiveState:
        numbers = {
            "rollout": self._rollout,
            "inner": self._inner,
            "kl_coefficient": self._kl_coefficient,
            "scale": None if self._scale is None else [self._scale.mean, self._scale.std],
            "rollout_metrics": self._rollout_metrics,
        }
        return ObjectiveState(numbers, to_tensors(self._experience) | self._balancing.state_dict())

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._rollout, self._inner = state.numbers["rollout"], state.numbers["inner"]
        self._kl_coefficient = state.numbers["kl_coefficient"]
        self._scale = None if state.numbers["scale"] is None else ScoreScale(*state.numbers["scale"])
        self._rollout_metrics = state.numbers["rollout_metrics"]
        self._experience = from_tensors(state.tensors)
        self._balancing.load_state_dict(state.tensors)


def _describe(samples: list[Sampled]) -> dict[str, float]:
    return {
        "ppo/score": float(np.mean([sample.score for sample in samples])),
        "ppo/kl": float(np.mean([sample.kl for sample in samples])),
        "ppo/response_length": float(np.mean([len(sample.response) for sample in samples])),
        "ppo/finished": float(np.mean([sample.finished for sample in samples])),
    }


def _explained_variance(experience: list[TokenSequence]) -> float:
    """Share of the returns' variance that the value head predicted; 0 when the returns do not vary."""
    mask = np.concatenate([sequence.loss_mask for sequence in experience]) == 1
    returns = np.concatenate([sequence.fields["returns"] for sequence in experience])[mask]
    values = np.concatenate([sequence.fields["old_values"] for sequence in experience])[mask]
    variance = float(returns.var())
    return 1.0 - float((returns - values).var()) / variance if variance else 0.0
