"""Reward model: a sequence classifier with one output, trained on pairs with the Bradley-Terry loss."""

from collections.abc import Iterator

import torch
from torch import nn

from stages.config.train import RewardConfig
from stages.data.tokens.packing import Packed
from stages.data.tokens.views import PairView, Split, TokensArtifact, require
from stages.job.context import StageContext, StageOutcome
from stages.losses import bradley_terry_loss, pair_accuracy, score_centering_loss
from stages.models.build import load_reward_model
from stages.models.experts import routing_of
from stages.models.forward import TrunkOutput, segment_scores
from stages.models.lora import add_adapter
from stages.train.engine import Engine
from stages.train.mixture import training_order
from stages.train.objective import LossOutput, ObjectiveState, Step
from stages.train.pairs import PairSteps, evaluate_pairs, num_pairs, sides
from stages.train.routing import Balancing
from stages.train.run import Prepared, train_stage


def run(context: StageContext) -> StageOutcome:
    return train_stage(context)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Start from the SFT model's trunk with a head of zeros."""
    config = context.config
    assert isinstance(config, RewardConfig)
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
    model = load_reward_model(context.input_dir("model"), tokens, lora=config.lora)
    objective = RewardObjective(
        steps,
        config,
        heldout=tokens.pairs(Split.HELDOUT),
        pad_id=tokens.pad_id,
        balancing=Balancing(reward=routing_of(model)),
    )
    return Prepared(
        parts={"reward": add_adapter(model, config.lora, seed=config.seed)},
        objective=lambda engine: objective,
        exported="reward",
        ledger={"pairs": len(pairs), "pairs_trained": len(mixture.order), "mixture": mixture.to_dict()},
    )


class RewardObjective:
    """-log sigmoid of the score difference, plus a small pull of the scores towards zero."""

    def __init__(
        self, steps: PairSteps, config: RewardConfig, *, heldout: PairView, pad_id: int, balancing: Balancing
    ) -> None:
        self._steps, self._config, self._heldout, self._pad_id = steps, config, heldout, pad_id
        self._balancing = balancing
        self.num_steps, self.order = steps.num_steps, steps.order
        self.tokens_per_step = 0

    def steps(self, engine: Engine) -> Iterator[Step]:
        return map(self._balancing.watching, self._steps.steps(engine))

    def weight(self, batch: Packed) -> float:
        return float(num_pairs(batch))

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        trunk = self._balancing.run_trunk(parts, "reward", batch)
        return self._balancing.added_to(self._pair_loss(parts, batch, trunk), reward=trunk)

    def _pair_loss(self, parts: nn.ModuleDict, batch: Packed, trunk: TrunkOutput | None = None) -> LossOutput:
        chosen_P, rejected_P = sides(segment_scores(parts["reward"], batch, pad_id=self._pad_id, trunk=trunk))
        loss_sum = bradley_terry_loss(chosen_P, rejected_P)
        loss_sum = loss_sum + self._config.center_coefficient * score_centering_loss(chosen_P, rejected_P)
        count = chosen_P.new_tensor(float(len(chosen_P)))
        with torch.no_grad():
            metrics = {
                "reward/accuracy": torch.stack([pair_accuracy(chosen_P, rejected_P), count]),
                "reward/margin": torch.stack([(chosen_P - rejected_P).sum(), count]),
            }
        return LossOutput(loss_sum, metrics)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        return evaluate_pairs(engine, self._pair_loss, self._steps, self._heldout, at_most=self._config.eval_items)

    def state_dict(self) -> ObjectiveState:
        return ObjectiveState({"cursor": self._steps.cursor}, self._balancing.state_dict())

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._steps.cursor = int(state.numbers["cursor"])
        self._balancing.load_state_dict(state.tensors)
