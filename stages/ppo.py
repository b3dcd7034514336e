"""Reinforcement learning of the SFT model, or of a given one, against a reward model, rules or a mixture, with a KL
penalty to the frozen start: PPO with a critic, RLOO, GRPO or REINFORCE without one. The objective is in
`train/rollout/objective.py`.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from stages.config.errors import ConfigError
from stages.config.estimators import GAE
from stages.config.graph import BASE_MODEL, GOLD_MODEL, GRAPH, REWARD_MODEL, Stage
from stages.config.rollouts import PPOConfig
from stages.config.scorers import reads_reward_model
from stages.data.tokens.asked import asked_of
from stages.data.tokens.packing import RowBudget
from stages.data.tokens.rows import DocumentRows
from stages.data.tokens.views import Split, TokensArtifact, require
from stages.job.context import StageContext, StageOutcome
from stages.models.build import load_causal_lm, load_reward_model, load_scorer
from stages.models.ensemble import member_folders
from stages.models.experts import routing_of
from stages.models.generation import Sampling
from stages.models.lora import add_adapter
from stages.models.same_tokenizer import check_given_scorer, check_one_score, check_same_tokenizer
from stages.train.best import BestBy, Fallback
from stages.train.engine import Engine
from stages.train.rollout.documents import PretrainingMix
from stages.train.rollout.gold import GOLD_SCORE, GoldWatch
from stages.train.rollout.guards import BeforeGuards, GuardWatch
from stages.train.rollout.objective import PPOObjective
from stages.train.rollout.reading import reading_of, scale_of
from stages.train.rollout.sampling import Sampler
from stages.train.rollout.scorers.ready import Keeping, ready_parts
from stages.train.rollout.scoring import Reading, RewardModel
from stages.train.rollout.watch import Watch
from stages.train.routing import Balancing
from stages.train.run import Prepared, train_stage

logger = logging.getLogger(__name__)

_GOLD = GRAPH[Stage.GOLD].role


def run(context: StageContext) -> StageOutcome:
    return train_stage(context, prepare)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Policy and reference start as the SFT model or the given one, the critic, where there is one, as its settings
    say."""
    config = context.config
    assert isinstance(config, PPOConfig)
    keeping = Keeping(context.store, context.fingerprint, context.progress.watchdog.beat)
    parts_of_score = ready_parts(config, tokens, keeping)
    asked, heldout = (
        asked_of(config.prompt_fields, tokens, split, needs=config.scorer.needs if parts_of_score else None)
        for split in (Split.TRAIN, Split.HELDOUT)
    )
    require(len(asked.prompts), "training prompts", advice="Give instruction data, `derived`, or prompt sets.")
    mix = _mix_of(config, tokens)
    gold = _gold_of(context, tokens)
    guards = GuardWatch(config) if config.guards.configured else None
    if needs_gold := config.needs_gold:
        advice = f"Hold out a larger share of the data, or set ppo.{needs_gold.split('=')[0]}=0."
        require(len(heldout.prompts), "held-out prompts", advice=advice)
    start_dir = context.model_dir("model", BASE_MODEL)
    reward_dir = context.model_dir("reward", REWARD_MODEL) if reads_reward_model(config.scorer) else None
    if reward_dir is not None and context.has_given(REWARD_MODEL):
        check_given_scorer(reward_dir, tokens.tokenizer(), role=REWARD_MODEL)
    members = member_folders(reward_dir) if reward_dir is not None else []
    reading = reading_of(config, reward_dir, size=len(members)) if reward_dir is not None else Reading()
    scale = scale_of(config, reward_dir) if reward_dir is not None else None
    policy = load_causal_lm(start_dir, tokens, lora=config.lora)
    critic = _critic_of(config, tokens, start_dir=start_dir, reward_dir=reward_dir)

    def objective(engine: Engine) -> PPOObjective:
        # With adapters a model serves as its own frozen start: the policy as the reference, and as the reward model a
        # critic that started as it (`PPOConfig.models` counts them).
        adapted = bool(config.lora.rank)
        is_critic = adapted and isinstance(config.estimator, GAE) and config.estimator.critic == "reward_model"
        budget = RowBudget(row_length=tokens.sequence_length, max_rows=context.execution.micro_batch_size)
        scorer = None
        if reward_dir is not None:
            reward = None if is_critic else engine.freeze(load_reward_model(reward_dir, tokens))
            further = [engine.freeze(load_reward_model(member, tokens)) for member in members[1:]]
            scorer = RewardModel(
                reward, pad_id=tokens.pad_id, budget=budget, further=further, reading=reading, scale=scale
            )
        sampler = Sampler(
            Sampling(config.max_response_length, tokens.eos_id, tokens.pad_id, config.temperature),
            seed=config.seed,
            scorer=scorer,
            parts=parts_of_score,
            reference=None if adapted else engine.freeze(load_causal_lm(start_dir, tokens)),
            budget=budget,
        )
        balancing = Balancing(policy=routing_of(policy), critic=routing_of(critic) if critic is not None else None)
        watch = gold.watch(engine, tokens, budget, config)
        watches: list[Watch] = [watch] if watch is not None else []
        if guards is not None:  # after the gold scorer, whose scores one of them reads
            watches.append(guards)
        return PPOObjective(
            config,
            sampler,
            prompts=asked.prompts,
            heldout=heldout.prompts,
            balancing=balancing,
            watches=watches,
            mix=mix,
            rows=asked.rows,
            heldout_rows=heldout.rows,
        )

    parts: dict[str, nn.Module] = {"policy": add_adapter(policy, config.lora, seed=config.seed)}
    if critic is not None:
        parts["critic"] = add_adapter(critic, config.lora, seed=config.seed + 1)
    return Prepared(
        parts=parts,
        objective=objective,
        exported="policy",
        ledger={**asked.counts, **({"gold_not_measured": gold.missing} if gold.missing else {})},
        fallback=_fallback(config, guards, has_gold=gold.folder is not None and bool(len(heldout.prompts))),
    )


def _fallback(config: PPOConfig, guards: GuardWatch | None, *, has_gold: bool) -> Fallback | None:
    """What a stopped training goes back to: the weights that gold liked best, where there is a gold scorer."""
    if guards is None or not config.guards.stopping:
        return None
    by = BestBy(GOLD_SCORE, highest=True, every=config.eval_every) if has_gold else BestBy.of(config)
    return BeforeGuards(guards, by, config)


def _mix_of(config: PPOConfig, tokens: TokensArtifact) -> PretrainingMix | None:
    """The documents that are trained on as well, if any."""
    if not config.pretraining_coefficient:
        return None
    rows = DocumentRows(tokens.documents(Split.TRAIN), tokens.sequence_length)
    require(len(rows), "rows of documents", advice="Give documents, or set ppo.pretraining_coefficient=0.")
    return PretrainingMix(rows, config.pretraining_rows, config.seed)


def _critic_of(
    config: PPOConfig, tokens: TokensArtifact, *, start_dir: Path, reward_dir: Path | None
) -> PreTrainedModel | None:
    """The critic before training; None for an estimator that compares responses instead."""
    if not isinstance(config.estimator, GAE):
        return None
    # The reward model is a good start: it knows already what a whole response is worth, and learns to say so from its
    # beginning. A fresh head says 0 everywhere until it has learned.
    start = reward_dir if config.estimator.critic == "reward_model" else start_dir
    assert start is not None, "PPOConfig refuses a critic from a reward model that is not read"
    return load_reward_model(start, tokens, lora=config.lora)


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
        frozen = engine.freeze(load_scorer(self.folder, tokens))
        scorer = RewardModel(frozen, pad_id=tokens.pad_id, budget=budget)
        return GoldWatch(scorer, patience=config.gold_patience)


def _gold_of(context: StageContext, tokens: TokensArtifact) -> _Gold:
    """Find it; one with a tokenizer of its own judges in `evaluate` alone, which has the texts. Raises ConfigError when
    `gold_patience` or a guard then has nothing to go by."""
    config = context.config
    assert isinstance(config, PPOConfig)
    if not (context.has_given(GOLD_MODEL) or _GOLD in context.inputs):
        found = _Gold(missing="the run has no gold scorer" if config.needs_gold else "")
    else:
        folder = context.model_dir(_GOLD, GOLD_MODEL)
        found = _Gold(folder)
        if context.has_given(GOLD_MODEL):
            check_one_score(folder, role=GOLD_MODEL)
            try:
                check_same_tokenizer(folder, tokens.tokenizer(), role=GOLD_MODEL)
            except ConfigError as error:
                found = _Gold(missing=error.message)
    if found.missing and (needs_gold := config.needs_gold):
        off = needs_gold.split("=")[0]
        raise ConfigError(
            f"ppo.{needs_gold} needs a gold scorer with the policy's ids: {found.missing}",
            advice=f"Use gold_scorer=train, give a gold_model with the policy's tokenizer, or set ppo.{off}=0.",
        )
    return found
