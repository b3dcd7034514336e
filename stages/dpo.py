"""Preference optimisation of the SFT model, or of a given one, on pairs: DPO and its kin, against its own start, unless
the loss needs no reference.

No copy is in memory: the reference's log-probabilities are computed before the first step and come with the pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.config.graph import BASE_MODEL
from stages.config.preference_losses import KTOLoss, ORPOLoss, PairLoss
from stages.config.preferences import DPOConfig
from stages.data.tokens.packing import Packed
from stages.data.tokens.views import Split, TokensArtifact, evenly
from stages.job.context import StageContext, StageOutcome
from stages.losses.preference import PairLogprobs, preference_loss, supervised_loss
from stages.losses.reward import pair_accuracy
from stages.models.build import load_causal_lm
from stages.models.experts import routing_of
from stages.models.forward import TrunkOutput, sum_by_segment, target_logprobs, target_positions
from stages.models.lora import add_adapter
from stages.train.engine import Engine, LossOutput
from stages.train.examples import ExampleObjective, ExampleSteps, heldout_examples, planned_examples
from stages.train.objective import Objective
from stages.train.pairs import (
    PairObjective,
    Pairs,
    PairSteps,
    Selected,
    over_pairs,
    planned_pairs,
    sides,
)
from stages.train.reference import FIELD, Reference
from stages.train.routing import Balancing
from stages.train.run import Prepared, train_stage


def run(context: StageContext) -> StageOutcome:
    return train_stage(context, prepare)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """The policy starts as the SFT model or the given one, and so is the reference until its first step."""
    config = context.config
    assert isinstance(config, DPOConfig)
    policy = load_causal_lm(context.model_dir("model", BASE_MODEL), tokens, lora=config.lora)
    make = _on_examples if isinstance(config.loss, KTOLoss) else _on_pairs
    objective = make(context, tokens, config, policy)
    return Prepared(
        parts={"policy": add_adapter(policy, config.lora, seed=config.seed)},
        objective=objective.make,
        exported="policy",
        ledger=objective.ledger,
    )


@dataclass(frozen=True)
class _Planned:
    """What is trained on, and the objective, once there is an engine for the reference."""

    ledger: dict[str, Any]
    make: Callable[[Engine], Objective]


def _on_pairs(context: StageContext, tokens: TokensArtifact, config: DPOConfig, policy: nn.Module) -> _Planned:
    planned = planned_pairs(tokens, config, micro_batch_size=context.execution.micro_batch_size)
    routing, loss = routing_of(policy), config.loss
    assert not isinstance(loss, KTOLoss)

    def objective(engine: Engine) -> PairObjective:
        steps, chosen = planned.steps, tokens.pairs_naming(Split.HELDOUT, config.reasons)
        evaluated: Pairs = tokens.pairs(Split.HELDOUT)
        if loss.needs_reference:
            reference = Reference(context, engine, steps)
            steps.pairs = reference.carried_by(planned.pairs, steps.indices, split="train")
            # By their numbers among all pairs, under which other trainings find the same values.
            spread = chosen[evenly(len(chosen), at_most=config.eval_items)]
            evaluated = reference.carried_by(evaluated, spread, split="heldout")
        return PairObjective(
            steps,
            heldout=Selected(evaluated, chosen),
            eval_items=config.eval_items,
            part="policy",
            balancing=Balancing(policy=routing),
            pair_loss=lambda parts, batch, trunk=None: _pair_loss(loss, parts, batch, trunk),
        )

    return _Planned(planned.ledger, objective)


def _on_examples(context: StageContext, tokens: TokensArtifact, config: DPOConfig, policy: nn.Module) -> _Planned:
    """KTO: both sides of pairs and unpaired responses, one by one."""
    planned, loss, routing = planned_examples(tokens, config), config.loss, routing_of(policy)
    assert isinstance(loss, KTOLoss)
    layout: dict[str, Any] = {
        "order": planned.order,
        "global_batch_size": config.global_batch_size,
        "row_length": tokens.sequence_length,
        "micro_batch_size": context.execution.micro_batch_size,
    }

    def objective(engine: Engine) -> ExampleObjective:
        # An example and its mismatch share a prompt, as the sides of a pair do, and are read like one. Mismatches are
        # chosen among what a half and reasons leave, so these say which.
        named = f", reasons {'+'.join(config.reasons)}" if config.reasons else ""
        reference = Reference(
            context, engine, PairSteps(planned.examples, **layout), of=f"examples, {config.half} half{named}"
        )
        steps = ExampleSteps(planned.examples, **layout)
        steps.examples = reference.carried_by(planned.examples, steps.indices, split="train")
        heldout, chosen = heldout_examples(tokens, config)
        spread = chosen[evenly(len(chosen), at_most=config.eval_items)]
        return ExampleObjective(
            steps,
            heldout=Selected(reference.carried_by(heldout, spread, split="heldout"), chosen),
            eval_items=config.eval_items,
            balancing=Balancing(policy=routing),
            loss=loss,
        )

    return _Planned(planned.ledger, objective)


def _pair_loss(loss: PairLoss, parts: nn.ModuleDict, batch: Packed, trunk: TrunkOutput | None) -> LossOutput:
    logprobs_N = target_logprobs(parts["policy"], batch, trunk=trunk).logprobs_N
    chosen_P, rejected_P = sides(sum_by_segment(logprobs_N, batch))
    lengths = sides(sum_by_segment(torch.ones_like(logprobs_N), batch))
    logprobs = PairLogprobs(chosen_P, rejected_P, *lengths)
    if loss.needs_reference:
        reference = sides(sum_by_segment(batch.fields[FIELD][target_positions(batch)], batch))
        logprobs = PairLogprobs(chosen_P, rejected_P, *lengths, *reference)
    terms = preference_loss(loss, logprobs)
    margins_P = terms.chosen_rewards_P - terms.rejected_rewards_P
    metrics = {
        "dpo/accuracy": over_pairs(pair_accuracy(terms.chosen_rewards_P, terms.rejected_rewards_P), margins_P),
        "dpo/margin": over_pairs(margins_P.sum(), margins_P),
    }
    if logprobs.ref_chosen_P is not None:
        # The margin may grow while the chosen answer itself gets less likely; only this number shows it.
        drift_P = (chosen_P - logprobs.ref_chosen_P).detach()
        metrics["dpo/chosen_drift"] = over_pairs(drift_P.sum(), drift_P)
    if loss.sft_coefficient or isinstance(loss, ORPOLoss):
        metrics["dpo/sft_loss"] = over_pairs(supervised_loss(logprobs).detach(), margins_P)
    return LossOutput(terms.loss_sum, metrics)
