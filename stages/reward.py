"""Reward model: a sequence classifier with one output, trained on pairs with the Bradley-Terry loss.

The gold scorer is trained here too, as another reward model: its config names the other half of the pairs and another
seed, and no stage that trains reads it.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from stages.config.graph import BASE_MODEL, REWARD_BASE
from stages.config.preferences import RewardConfig
from stages.data.tokens.packing import Packed
from stages.data.tokens.views import Split, TokensArtifact
from stages.job.context import StageContext, StageOutcome
from stages.job.workers import launch
from stages.losses.reward import bradley_terry_loss, pair_accuracy, score_centering_loss
from stages.models.build import has_no_score, load_reward_model
from stages.models.experts import routing_of
from stages.models.forward import TrunkOutput, segment_scores
from stages.models.lora import add_adapter
from stages.models.same_tokenizer import check_same_tokenizer
from stages.train.comparisons import MARGIN, planned_comparisons
from stages.train.engine import Engine, LossOutput
from stages.train.members import train_members_on_worker
from stages.train.pairs import WEIGHT, PairObjective, of_pairs, over_pairs, sides
from stages.train.routing import Balancing
from stages.train.run import Prepared, train_on_worker
from stages.train.scores import Scores, scores_of_answers


def run(context: StageContext) -> StageOutcome:
    config = context.config
    assert isinstance(config, RewardConfig)
    return launch(context, train_on_worker if config.ensemble_size == 1 else train_members_on_worker, prepare)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Start from a trunk with a head of zeros: that of the SFT model, of a given one, or of the reward base, which may
    be smaller than the policy."""
    config = context.config
    assert isinstance(config, RewardConfig)
    comparisons = planned_comparisons(tokens, config, micro_batch_size=context.execution.micro_batch_size)
    start = context.model_dir("model", REWARD_BASE, BASE_MODEL)
    if context.has_given(REWARD_BASE):
        check_same_tokenizer(start, tokens.tokenizer(), role=REWARD_BASE)
    model = load_reward_model(start, tokens, lora=config.lora)
    if config.ensemble_size > 1 and has_no_score(start):
        _draw_head(model, seed=config.seed)
    steps, trained_on = comparisons.planned.steps, np.unique(comparisons.planned.order)

    def pair_loss(parts: nn.ModuleDict, batch: Packed, trunk: TrunkOutput | None = None) -> LossOutput:
        """-log sigmoid of the score difference, plus a small pull of the scores towards zero."""
        chosen_P, rejected_P = sides(segment_scores(parts["reward"], batch, pad_id=tokens.pad_id, trunk=trunk))
        margins_P, weights_P = of_pairs(batch, MARGIN), of_pairs(batch, WEIGHT)
        preferring = partial(
            bradley_terry_loss, margins_P=margins_P, label_smoothing=config.label_smoothing, weights_P=weights_P
        )
        centering = score_centering_loss(chosen_P, rejected_P, weights_P=weights_P)
        loss_sum = preferring(chosen_P, rejected_P) + config.center_coefficient * centering
        with torch.no_grad():
            metrics = {
                "reward/accuracy": over_pairs(pair_accuracy(chosen_P, rejected_P), chosen_P),
                "reward/margin": over_pairs((chosen_P - rejected_P).sum(), chosen_P),
            }
            if margins_P is not None:  # what a gate expects of the first step, where scores are equal
                even = preferring(torch.zeros_like(chosen_P), torch.zeros_like(chosen_P))
                total = torch.ones_like(chosen_P).sum() if weights_P is None else weights_P.sum()
                metrics["reward/even_loss"] = torch.stack([even, total])
        return LossOutput(loss_sum, metrics)

    objective = PairObjective(
        steps,
        heldout=comparisons.heldout,
        eval_items=config.eval_items,
        part="reward",
        balancing=Balancing(reward=routing_of(model)),
        pair_loss=pair_loss,
    )

    def scores(engine: Engine) -> Scores:
        heldout = (comparisons.heldout, np.arange(len(comparisons.heldout)))
        pairs = {Split.TRAIN: (steps.pairs, trained_on), Split.HELDOUT: heldout}
        return scores_of_answers(engine, steps, pairs, pad_id=tokens.pad_id, at_most=config.eval_items)

    return Prepared(
        parts={"reward": add_adapter(model, config.lora, seed=config.seed)},
        objective=lambda engine: objective,
        exported="reward",
        scores=scores,
        ledger=comparisons.planned.ledger,
    )


def _draw_head(model: PreTrainedModel, *, seed: int) -> None:
    """Let the members of an ensemble start apart: with weights so small that their scores differ by less than pairs
    will, and the loss starts near that of equal scores."""
    generator = torch.Generator().manual_seed(seed)
    score: Any = model.score
    head: torch.Tensor = score.weight
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=generator) / (head.shape[1] + 1))
