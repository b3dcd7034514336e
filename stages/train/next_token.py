"""Next-token prediction: the objective that pretraining and SFT share. They differ in what a row holds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stages.data.tokens.packing import Packed, TokenSequence, collate, plan_rows
from stages.data.tokens.views import SequenceView, evenly
from stages.losses.language import perplexity
from stages.models.experts import Routing
from stages.models.forward import NextTokenTerms, next_token_loss_sum, next_token_terms
from stages.models.noise import embedding_noise
from stages.train.engine import Engine, LossOutput
from stages.train.objective import ObjectiveState, Step
from stages.train.plan import batches, in_step, order_digest, share
from stages.train.routing import Balancing

_PLACE = "place"
"""Field of a training batch: where the row of each token stands in the order of all training rows."""


class Rows(Protocol):
    """Rows of tokens by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> list[TokenSequence]: ...


class ConversationRows:
    """Conversations packed whole, in a given order."""

    def __init__(self, conversations: SequenceView, order: np.ndarray, row_length: int) -> None:
        self._conversations = conversations
        self._rows = [[int(order[i]) for i in row] for row in plan_rows(conversations.lengths[order], row_length)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[TokenSequence]:
        return [self._conversations[i] for i in self._rows[index]]


@dataclass(frozen=True)
class Extras:
    """What training may add to the bare cross-entropy."""

    z_coefficient: float = 0.0
    noise_alpha: float = 0.0
    seed: int = 0
    """Of the noise."""
    routing: Routing | None = None


class NextTokenObjective:
    """Cross-entropy over the targets of packed rows."""

    def __init__(
        self,
        rows: Rows,
        order: np.ndarray,
        *,
        heldout: Rows,
        global_batch_size: int,
        micro_batch_size: int,
        eval_items: int,
        tokens_per_step: int = 0,
        extras: Extras = Extras(),
    ) -> None:
        """`order` lists the row of every training position, over all epochs; `tokens_per_step` is what a full step
        lays out where rows are equally long."""
        self._rows, self._order, self._heldout = rows, order, heldout
        self._steps = batches(np.arange(len(order)), global_batch_size)
        self._micro_batch_size = micro_batch_size
        self._eval_items = eval_items
        self._extras = extras
        self._balancing = Balancing(policy=extras.routing)
        self._cursor = 0
        self.num_steps, self.tokens_per_step = len(self._steps), tokens_per_step
        self.num_heldout = min(len(heldout), eval_items)
        self.order = order_digest(batches(order, global_batch_size))
        self.ledger: dict[str, Any] = {}

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self._cursor < self.num_steps:
            places = self._steps[self._cursor]
            # Before the yield: a checkpoint is taken while the loop holds this step, and must not repeat it.
            self._cursor += 1
            mine = share(places, rank=engine.rank, world_size=engine.world_size)
            step = Step(self._training_batches(mine if len(mine) else places[:1]), counted=len(mine) > 0)
            yield self._balancing.watching(step)

    def _training_batches(self, places: np.ndarray) -> list[Packed]:
        """Micro-batches that know the place of every token's row in the training order, if noise is drawn by it."""
        if not self._extras.noise_alpha:
            return self._micro_batches(self._rows, self._order[places])
        return [self._placed(part) for part in batches(places, self._micro_batch_size)]

    def _placed(self, places: np.ndarray) -> Packed:
        rows = [self._rows[int(index)] for index in self._order[places]]
        lengths = [sum(sequence.num_laid_out for sequence in row) for row in rows]
        return replace(collate(rows), fields={_PLACE: torch.from_numpy(np.repeat(places, lengths))[None]})

    def _micro_batches(self, rows: Rows, indices: np.ndarray) -> list[Packed]:
        return [collate([rows[int(index)] for index in part]) for part in batches(indices, self._micro_batch_size)]

    def weight(self, batch: Packed) -> float:
        return float(batch.num_targets)

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        extras, policy = self._extras, parts["policy"]
        noise_BTH = self._noise(policy, batch) if extras.noise_alpha else None
        trunk = self._balancing.run_trunk(parts, "policy", batch, noise_BTH)
        terms = next_token_terms(policy, batch, z_coefficient=extras.z_coefficient, trunk=trunk)
        return self._balancing.added_to(LossOutput(terms.loss_sum, self._added_metrics(terms, batch)), policy=trunk)

    def _noise(self, policy: nn.Module, batch: Packed) -> Tensor:
        return embedding_noise(
            batch,
            batch.fields[_PLACE],
            alpha=self._extras.noise_alpha,
            seed=self._extras.seed,
            hidden_size=policy.get_input_embeddings().embedding_dim,  # type: ignore[operator]
        )

    def _added_metrics(self, terms: NextTokenTerms, batch: Packed) -> dict[str, Tensor]:
        """The z-loss apart, when there is one."""
        coefficient = self._extras.z_coefficient
        if not coefficient:
            return {}
        z_loss = coefficient * terms.z_sum
        return {"train/z_loss": torch.stack([z_loss, z_loss.new_tensor(float(batch.num_targets))])}

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Measure the bare cross-entropy: without z-loss, noise and balancing it compares between settings."""
        spread = evenly(len(self._heldout), at_most=self._eval_items)
        if not len(spread):
            return {}
        mine = self._micro_batches(self._heldout, share(spread, rank=engine.rank, world_size=engine.world_size))
        spare = mine[0] if mine else self._micro_batches(self._heldout, spread[:1])[0]
        loss_sum = targets = 0.0
        for batch, counted in in_step(engine, mine, spare=spare):
            batch_loss = float(engine.infer(_bare_loss, batch).loss_sum)
            loss_sum += counted * batch_loss
            targets += counted * batch.num_targets
        loss_sum, targets = engine.sum([loss_sum, targets])
        if not targets:
            return {}
        return {"eval/loss": loss_sum / targets, "eval/perplexity": perplexity(loss_sum / targets)}

    def state_dict(self) -> ObjectiveState:
        return ObjectiveState({"cursor": self._cursor}, self._balancing.state_dict())

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._cursor = int(state.numbers["cursor"])
        self._balancing.load_state_dict(state.tensors)


def _bare_loss(parts: nn.ModuleDict, batch: Packed) -> LossOutput:
    return LossOutput(next_token_loss_sum(parts["policy"], batch), {})
