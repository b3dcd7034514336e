"""Direct preference optimisation of the SFT model, against a frozen copy of itself."""

from collections.abc import Iterator

import torch
from torch import nn

from stages.config.train import DPOConfig
from stages.data.tokens.packing import Packed
from stages.data.tokens.views import Split, TokensArtifact, require
from stages.job.context import StageContext, StageOutcome
from stages.losses import dpo_loss, pair_accuracy
from stages.models.build import load_causal_lm
from stages.models.experts import routing_of
from stages.models.forward import TrunkOutput, sum_by_segment, target_logprobs, target_positions
from stages.models.lora import add_adapter
from stages.train.engine import Engine
from stages.train.mixture import training_order
from stages.train.objective import LossOutput, ObjectiveState, Step
from stages.train.pairs import Pairs, PairSteps, evaluate_pairs, num_pairs, sides
from stages.train.plan import evenly
from stages.train.reference import FIELD, Reference
from stages.train.routing import Balancing
from stages.train.run import Prepared, train_stage


def run(context: StageContext) -> StageOutcome:
    return train_stage(context)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Policy and reference start as the same SFT model."""
    config = context.config
    assert isinstance(config, DPOConfig)
    pairs, heldout = tokens.pairs(Split.TRAIN), tokens.pairs(Split.HELDOUT)
    require(len(pairs), "training preference pairs", advice="Give preference data, or `derived`.")
    mixture = training_order(tokens.pair_sources(Split.TRAIN), pairs.num_targets, config)
    steps = PairSteps(
        pairs,
        order=mixture.order,
        global_batch_size=config.global_batch_size,
        row_length=tokens.sequence_length,
        micro_batch_size=context.execution.micro_batch_size,
    )
    policy = load_causal_lm(context.input_dir("model"), tokens, lora=config.lora)

    def objective(engine: Engine) -> DPOObjective:
        reference = Reference(context, engine, steps)
        steps.pairs = reference.carried_by(pairs, steps.indices, split="train")
        evaluated = evenly(len(heldout), at_most=config.eval_items)
        carrying = reference.carried_by(heldout, evaluated, split="heldout")
        return DPOObjective(steps, config, heldout=carrying, balancing=Balancing(policy=routing_of(policy)))

    return Prepared(
        parts={"policy": add_adapter(policy, config.lora, seed=config.seed)},
        objective=objective,
        exported="policy",
        ledger={"pairs": len(pairs), "pairs_trained": len(mixture.order), "mixture": mixture.to_dict()},
    )


class DPOObjective:
    """The reference's log-probabilities come with the pairs' tokens."""

    def __init__(self, steps: PairSteps, config: DPOConfig, *, heldout: Pairs, balancing: Balancing) -> None:
        self._steps, self._config, self._heldout, self._balancing = steps, config, heldout, balancing
        self.num_steps, self.order = steps.num_steps, steps.order
        self.tokens_per_step = 0

    def steps(self, engine: Engine) -> Iterator[Step]:
        return map(self._balancing.watching, self._steps.steps(engine))

    def weight(self, batch: Packed) -> float:
        return float(num_pairs(batch))

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        trunk = self._balancing.run_trunk(parts, "policy", batch)
        return self._balancing.added_to(self._pair_loss(parts, batch, trunk), policy=trunk)

    def _pair_loss(self, parts: nn.ModuleDict, batch: Packed, trunk: TrunkOutput | None = None) -> LossOutput:
        ref_logprobs_N = batch.fields[FIELD][target_positions(batch)]
        logprobs_N = target_logprobs(parts["policy"], batch, trunk=trunk).logprobs_N
        chosen_P, rejected_P = sides(sum_by_segment(logprobs_N, batch))
        ref_chosen_P, ref_rejected_P = sides(sum_by_segment(ref_logprobs_N, batch))
        terms = dpo_loss(
            chosen_logprobs_P=chosen_P,
            rejected_logprobs_P=rejected_P,
            ref_chosen_logprobs_P=ref_chosen_P,
            ref_rejected_logprobs_P=ref_rejected_P,
            beta=self._config.beta,
            label_smoothing=self._config.label_smoothing,
        )
        count = chosen_P.new_tensor(float(len(chosen_P)))
        margins_P = terms.chosen_rewards_P - terms.rejected_rewards_P
        drift_P = (chosen_P - ref_chosen_P).detach()
        metrics = {
            "dpo/accuracy": torch.stack([pair_accuracy(terms.chosen_rewards_P, terms.rejected_rewards_P), count]),
            "dpo/margin": torch.stack([margins_P.sum(), count]),
            "dpo/chosen_drift": torch.stack([drift_P.sum(), count]),
        }
        return LossOutput(terms.loss_sum, metrics)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        return evaluate_pairs(engine, self._pair_loss, self._steps, self._heldout, at_most=self._config.eval_items)

    def state_dict(self) -> ObjectiveState:
        return ObjectiveState({"cursor": self._steps.cursor}, self._balancing.state_dict())

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._steps.cursor = int(state.numbers["cursor"])
        self._balancing.load_state_dict(state.tensors)
