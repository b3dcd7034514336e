"""The objective of reinforcement learning: rollouts, the steps over each of them, and the state between them.

Experience is a generator: `steps` rolls out with the live policy and yields the minibatches of its epochs; the loop
consumes them like any other steps. Whoever watches the training (`watch.py`), a gold scorer for one, looks after each
rollout and each evaluation.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from stages.config.estimators import GAE, Reinforce
from stages.config.rollouts import LossOver, PPOConfig
from stages.data.tokens.asked import Prompts
from stages.data.tokens.packing import Packed, TokenSequence, lay_out
from stages.data.tokens.views import evenly
from stages.losses.advantages import decayed
from stages.losses.divergence import adapted_kl_coefficient
from stages.rules.ready import Row
from stages.train.engine import Engine, LossOutput
from stages.train.objective import ObjectiveState, Step
from stages.train.plan import batches, order_digest, share, shuffled
from stages.train.rollout.agreement import agreement, check
from stages.train.rollout.documents import PretrainingMix, with_field
from stages.train.rollout.experience import critic_quality, describe, from_tensors, to_experience, to_tensors
from stages.train.rollout.prompts import prompt_loss
from stages.train.rollout.rewards import Payment
from stages.train.rollout.sampling import Sampler
from stages.train.rollout.update import update_loss, update_units
from stages.train.rollout.watch import Watch
from stages.train.routing import Balancing

logger = logging.getLogger(__name__)

_EVALUATION_STREAM = 1 << 20
"""Random stream of evaluations, far from those of rollouts."""


class PPOObjective:
    """Rollouts, clipped updates, and the state between them: cursor, rollout, score scale, KL coefficient,
    baseline."""

    def __init__(
        self,
        config: PPOConfig,
        sampler: Sampler,
        *,
        prompts: Prompts,
        heldout: Prompts,
        balancing: Balancing,
        watches: Sequence[Watch] = (),
        mix: PretrainingMix | None = None,
        rows: Sequence[Row] = (),
        heldout_rows: Sequence[Row] = (),
    ) -> None:
        """`rows` are those of the prompts, for scorers that read texts."""
        self._config, self._sampler, self._prompts, self._heldout = config, sampler, prompts, heldout
        self._rows, self._heldout_rows = rows, heldout_rows
        self._balancing, self._watches, self._mix = balancing, tuple(watches), mix
        self._payment = Payment(config)
        self._steps_per_rollout = config.steps_per_rollout
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
        self._baseline: float | None = None
        """What earlier rollouts earned, for an estimator that compares with it."""

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self._rollout < self._config.num_rollouts:
            if ended := self._ended():
                if engine.is_main:
                    logger.warning("training ends here: %s", ended)
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
        numbers = self._next_prompts()
        samples = self._sampler.sample(
            engine,
            [self._prompts[number] for number in numbers],
            rows=[self._rows[number] for number in numbers] if self._rows else (),
            stream=self._rollout,
            responses_per_prompt=config.estimator.responses_per_prompt,
        )
        agreed = agreement(samples)
        check(agreed, config.sampler, is_main=engine.is_main)
        experience = to_experience(
            samples,
            self._payment.paid(samples, self._sampler.rewards(samples)),
            config=config,
            kl_coefficient=self._kl_coefficient,
            baseline=self._baseline,
            policy_learns=not self._warms_up,
        )
        self._experience = experience.sequences
        self._rollout_metrics = describe(samples) | {
            "ppo/reward": experience.mean_reward,
            "ppo/kl_coefficient": self._kl_coefficient,
            **agreed,
            **critic_quality(self._experience),
        }
        for watch in self._watches:
            self._rollout_metrics |= watch.after_rollout(engine, samples, self._rollout_metrics)
        self._learn_from(self._rollout_metrics)

    def _learn_from(self, rollout: dict[str, float]) -> None:
        """Move what the next rollout goes by; this one's rewards are made."""
        config = self._config
        if isinstance(config.estimator, Reinforce) and config.estimator.baseline == "running":
            self._baseline = decayed(self._baseline, rollout["ppo/reward"], decay=config.estimator.baseline_decay)
        if config.kl_target:
            self._kl_coefficient = adapted_kl_coefficient(
                self._kl_coefficient,
                kl=rollout["ppo/kl"],
                target=config.kl_target,
                horizon=config.kl_horizon,
                num_responses=config.rollout_size,
            )

    @property
    def _warms_up(self) -> bool:
        """Whether only the critic learns from this rollout."""
        estimator = self._config.estimator
        return isinstance(estimator, GAE) and self._rollout < estimator.critic_warmup_rollouts

    def _next_prompts(self) -> list[int]:
        """Walk through shuffled prompts, epoch after epoch; a rollout may span the end of one and the start of the
        next."""
        size, available = self._config.prompts_per_rollout, len(self._prompts)
        positions = range(self._rollout * size, (self._rollout + 1) * size)
        orders = {
            epoch: shuffled(available, seed=self._config.seed, epoch=epoch)
            for epoch in {position // available for position in positions}
        }
        return [int(orders[p // available][p % available]) for p in positions]

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
        if self._mix is not None:
            sequences = self._mixed(self._mix, sequences, indices, engine)
        micro_batches = [lay_out(part) for part in self._sampler.budget.cut(sequences)]
        return Step(
            micro_batches,
            counted=len(mine) > 0,
            metrics=dict(self._rollout_metrics),
            rate_factors=self._rate_factors(),
            # What ended it was seen in this rollout, which no step has told of yet: the history has it in this one.
            is_last=bool(self._ended()),
        )

    def _mixed(
        self, mix: PretrainingMix, sequences: list[TokenSequence], indices: np.ndarray, engine: Engine
    ) -> list[TokenSequence]:
        """Add this rank's rows of documents to its responses; `indices` are the responses of all ranks."""
        if self._warms_up:
            return sequences
        rows = mix.of_step(self._rollout * self._steps_per_rollout + self._inner)
        tokens = sum(int(self._experience[int(index)].loss_mask.sum()) for index in indices)
        units = tokens if self._config.loss_over is LossOver.TOKENS else len(indices)
        weight = mix.weight(rows, units=units)
        # Only ranks with responses take rows: what another one computes is not counted.
        ranks = min(engine.world_size, len(indices))
        mine = rows[engine.rank :: ranks] if engine.rank < ranks else []
        documents = mix.sequences(mine, weight=weight, like=sequences[0].fields)
        return [*map(with_field, sequences), *documents]

    def _rate_factors(self) -> dict[str, float]:
        estimator = self._config.estimator
        if not isinstance(estimator, GAE):
            return {}
        return {"policy": 0.0 if self._warms_up else 1.0, "critic": estimator.critic_learning_rate_factor}

    def weight(self, batch: Packed) -> float:
        return update_units(self._config, batch)

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        return update_loss(self._config, parts, batch, self._balancing)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Score sampled responses to held-out prompts, with the same random numbers every time, and measure the loss of
        the prompts themselves."""
        chosen = evenly(len(self._heldout), at_most=self._config.eval_items)
        if not len(chosen):
            return {}
        prompts = [self._heldout[int(i)] for i in chosen]
        rows = [self._heldout_rows[int(i)] for i in chosen] if self._heldout_rows else ()
        samples = self._sampler.sample(engine, prompts, stream=_EVALUATION_STREAM, rows=rows)
        found = {name.replace("ppo/", "eval/"): value for name, value in describe(samples).items()}
        found |= prompt_loss(engine, prompts, self._sampler.budget)
        for watch in self._watches:
            found |= watch.after_evaluation(engine, samples, found)
        return found

    def _ended(self) -> str:
        """Why training ends before its last rollout; empty while it goes on."""
        return "; ".join(watch.reason() for watch in self._watches if watch.ends)

    @property
    def ledger(self) -> dict[str, Any]:
        """Responses that were sampled to train on, and why there are not more of them."""
        # The cursor is behind the step that was handed out last, so a rollout amid its updates has begun.
        sampled: dict[str, Any] = {"responses": (self._rollout + (self._inner > 0)) * self._config.rollout_size}
        if self._sampler.parts is not None and (asked := self._sampler.parts.account()):
            sampled["scorers"] = asked
        early = self._ended() if self._rollout < self._config.num_rollouts else ""
        for watch in self._watches:
            sampled |= watch.ledger
        return sampled | ({"stopped_early": early} if early else {})

    def state_dict(self) -> ObjectiveState:
        # These names are in checkpoints of running stores.
        numbers = {
            "rollout": self._rollout,
            "inner": self._inner,
            "kl_coefficient": self._kl_coefficient,
            "rollout_metrics": self._rollout_metrics,
        }
        if self._baseline is not None:
            numbers["baseline"] = self._baseline
        for watch in self._watches:
            numbers |= watch.state_dict()
        numbers |= self._payment.state_dict()
        return ObjectiveState(
            numbers | self._sampler.state_dict(), to_tensors(self._experience) | self._balancing.state_dict()
        )

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._rollout, self._inner = state.numbers["rollout"], state.numbers["inner"]
        self._kl_coefficient = state.numbers["kl_coefficient"]
        self._rollout_metrics = state.numbers["rollout_metrics"]
        self._baseline = state.numbers.get("baseline")
        self._payment.load_state_dict(state.numbers)
        self._sampler.load_state_dict(state.numbers)
        for watch in self._watches:
            watch.load_state_dict(state.numbers)
        self._experience = from_tensors(state.tensors)
        self._balancing.load_state_dict(state.tensors)
