"""Direct preference optimisation of the SFT model, against a frozen copy of itself."""

from collections.abc import Iterator

import torch
from torch import nn

from stages.config.train import DPOConfig
from stages.context import StageContext, StageOutcome
from stages.data.packing import Packed
from stages.data.tokens import PairView, Split, TokensArtifact, require
from stages.losses import dpo_loss, pair_accuracy
from stages.models.build import load_causal_lm
from stages.models.forward import segment_logprobs
from stages.models.lora import add_adapter, start_of
from stages.train.engine import Engine
from stages.train.mixture import training_order
from stages.train.objective import LossOutput, ObjectiveState, Step
from stages.train.pairs import PairSteps, evaluate_pairs, num_pairs, sides
from stages.train.run import Prepared, train_stage


def run(context: StageContext) -> StageOutcome:
    return train_stage(context)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Policy and reference start as the same SFT model."""
    config = context.config
    assert isinstance(config, DPOConfig)
    pairs = tokens.pairs(Split.TRAIN)
    require(len(pairs), "training preference pairs", advice="Give preference data, or `derived`.")
    mixture = training_order(tokens.pair_sources(Split.TRAIN), pairs.num_targets, config)
    steps = PairSteps(
        pairs,
        order=mixture.order,
        global_batch_size=config.global_batch_size,
        row_length=tokens.sequence_length,
        micro_batch_size=context.execution.micro_batch_size,
    )
    start = context.input_dir("model")

    def objective(engine: Engine) -> DPOObjective:
        reference = None if config.lora.rank else engine.freeze(load_causal_lm(start, tokens))
        return DPOObjective(steps, config, reference=reference, heldout=tokens.pairs(Split.HELDOUT))

    return Prepared(
        parts={"policy": add_adapter(load_causal_lm(start, tokens, lora=config.lora), config.lora, seed=config.seed)},
        objective=objective,
        exported="policy",
        ledger={"pairs": len(pairs), "pairs_trained": len(mixture.order), "mixture": mixture.to_dict()},
    )


class DPOObjective:
    """The reference's log-probabilities are computed beside the policy's, without gradients. It is a frozen copy, or
    None where the policy has an adapter that can be left out."""

    def __init__(self, steps: PairSteps, config: DPOConfig, *, reference: nn.Module | None, heldout: PairView) -> None:
        self._steps, self._config, self._reference, self._heldout = steps, config, reference, heldout
        self.num_steps, self.order = steps.num_steps, steps.order

    def steps(self, engine: Engine) -> Iterator[Step]:
        return self._steps.steps(engine)

    def weight(self, batch: Packed) -> float:
        return float(num_pairs(batch))

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        chosen_P, rejected_P = sides(segment_logprobs(parts["policy"], batch))
        with torch.no_grad(), start_of(parts["policy"], self._reference) as reference:
            ref_chosen_P, ref_rejected_P = sides(segment_logprobs(reference, batch))
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
        return evaluate_pairs(engine, self.loss, self._steps, self._heldout, at_most=self._config.eval_items)

    def state_dict(self) -> ObjectiveState:
        return ObjectiveState({"cursor": self._steps.cursor})

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._steps.cursor = int(state.numbers["cursor"])
