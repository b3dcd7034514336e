"""Pretraining next to reinforcement learning (PPO-ptx): rows of documents in every step, so that what the base model
knew is not forgotten.

Ouyang et al. 2022 (arXiv:2203.02155), eq. 2: the objective gains a weighted log-likelihood of pretraining text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from stages.data.tokens.packing import Packed, TokenSequence
from stages.data.tokens.rows import DocumentRows
from stages.models.forward import TrunkOutput, target_logprobs
from stages.train.plan import shuffled

FIELD = "document_weights"
"""Of each token of a document, what its loss counts next to a unit of the responses' loss; 0 in responses."""


@dataclass(frozen=True)
class PretrainingMix:
    """Which rows are in which step: a function of the step's number and the seed alone."""

    rows: DocumentRows
    rows_per_step: int
    seed: int

    def of_step(self, step: int) -> list[int]:
        """Return the rows of step number `step`; they are gone through in random order, again and again."""
        positions = range(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        epochs = {position // len(self.rows) for position in positions}
        orders = {epoch: shuffled(len(self.rows), seed=self.seed, epoch=epoch) for epoch in epochs}
        return [int(orders[place // len(self.rows)][place % len(self.rows)]) for place in positions]

    def weight(self, rows: Sequence[int], *, units: float) -> float:
        """Return what each token of these rows weighs when the loss of the step is divided by `units`: together they
        weigh as much as one mean loss."""
        # The first token of each piece has nothing before it and is no target.
        targets = sum(len(piece.ids) - 1 for row in rows for piece in self.rows[row])
        return units / targets if targets else 0.0

    def sequences(self, rows: Sequence[int], *, weight: float, like: Mapping[str, np.ndarray]) -> list[TokenSequence]:
        """Return the pieces of rows with the fields of responses, which are zero in them."""
        return [
            replace(
                piece,
                fields={name: np.zeros(len(piece.ids), dtype=np.float32) for name in like}
                | {FIELD: np.full(len(piece.ids), weight, dtype=np.float32)},
            )
            for row in rows
            for piece in self.rows[row]
        ]


def with_field(sequence: TokenSequence) -> TokenSequence:
    """Return a response that may stand in one micro-batch with documents."""
    return replace(sequence, fields={**sequence.fields, FIELD: np.zeros(len(sequence.ids), dtype=np.float32)})


def responses_of(batch: Packed) -> Packed:
    """Return the batch with the tokens of responses as its only targets."""
    if FIELD not in batch.fields:
        return batch
    return replace(batch, loss_mask_BT=batch.loss_mask_BT * (batch.fields[FIELD] == 0))


def document_loss_sums(policy: nn.Module, batch: Packed, trunk: TrunkOutput) -> tuple[Tensor, Tensor] | None:
    """Return the weighted loss of the documents' tokens and, as a metric, the plain one with its number of tokens; None
    where the objective has no documents."""
    if FIELD not in batch.fields:
        return None
    documents = replace(batch, loss_mask_BT=batch.loss_mask_BT * (batch.fields[FIELD] != 0))
    # The temperature is 1: what is kept is the model of text, not the tempered policy.
    logprobs_N = target_logprobs(policy, documents, trunk=trunk).logprobs_N
    weights_N = batch.fields[FIELD][documents.loss_mask_BT == 1]
    plain = -logprobs_N.detach().sum()
    return -(weights_N * logprobs_N).sum(), torch.stack([plain, plain.new_tensor(float(len(logprobs_N)))])
