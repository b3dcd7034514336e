"""Next-token prediction: the objective that pretraining and SFT share. They differ in what a row holds."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch import nn

from stages.data.packing import Packed, TokenSequence, collate, plan_rows
from stages.data.ragged import Ragged
from stages.data.tokens import SequenceView
from stages.losses import perplexity
from stages.models.forward import next_token_loss_sum
from stages.train.engine import Engine
from stages.train.objective import LossOutput, ObjectiveState, Step
from stages.train.plan import batches, evenly, in_step, order_digest, share


class Rows(Protocol):
    """Rows of tokens by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> list[TokenSequence]: ...


class DocumentRows:
    """The documents of a split one after another, cut into rows of equal length; the rest at the end is left out."""

    def __init__(self, documents: Ragged, row_length: int) -> None:
        self._documents, self._row_length = documents, row_length

    def __len__(self) -> int:
        return self._documents.num_items // self._row_length

    def __getitem__(self, index: int) -> list[TokenSequence]:
        start, stop = index * self._row_length, (index + 1) * self._row_length
        ids = self._documents.slice(start, stop)
        inner = self._documents.offsets
        first, last = np.searchsorted(inner, [start + 1, stop])
        pieces = np.split(ids, inner[first:last] - start)
        return [TokenSequence(piece, np.ones(len(piece), dtype=np.int64)) for piece in pieces if len(piece)]


class ConversationRows:
    """Conversations packed whole, in a given order."""

    def __init__(self, conversations: SequenceView, order: np.ndarray, row_length: int) -> None:
        self._conversations = conversations
        self._rows = [[int(order[i]) for i in row] for row in plan_rows(conversations.lengths[order], row_length)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[TokenSequence]:
        return [self._conversations[i] for i in self._rows[index]]


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
    ) -> None:
        """`order` lists the row of every training position, over all epochs."""
        self._rows, self._heldout = rows, heldout
        self._steps = batches(order, global_batch_size)
        self._micro_batch_size = micro_batch_size
        self._eval_items = eval_items
        self._cursor = 0
        self.num_steps = len(self._steps)
        self.order = order_digest(self._steps)

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self._cursor < self.num_steps:
            indices = self._steps[self._cursor]
            self._cursor += 1
            mine = share(indices, rank=engine.rank, world_size=engine.world_size)
            yield Step(self._micro_batches(self._rows, mine if len(mine) else indices[:1]), counted=len(mine) > 0)

    def _micro_batches(self, rows: Rows, indices: np.ndarray) -> list[Packed]:
        return [collate([rows[int(index)] for index in part]) for part in batches(indices, self._micro_batch_size)]

    def weight(self, batch: Packed) -> float:
        return float(batch.num_targets)

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        return LossOutput(next_token_loss_sum(parts["policy"], batch), {})

    def evaluate(self, engine: Engine) -> dict[str, float]:
        spread = evenly(len(self._heldout), at_most=self._eval_items)
        if not len(spread):
            return {}
        mine = self._micro_batches(self._heldout, share(spread, rank=engine.rank, world_size=engine.world_size))
        spare = mine[0] if mine else self._micro_batches(self._heldout, spread[:1])[0]
        loss_sum = targets = 0.0
        for batch, counted in in_step(engine, mine, spare=spare):
            batch_loss = float(engine.infer(self.loss, batch).loss_sum)
            loss_sum += counted * batch_loss
            targets += counted * batch.num_targets
        loss_sum, targets = engine.sum([loss_sum, targets])
        if not targets:
            return {}
        return {"eval/loss": loss_sum / targets, "eval/perplexity": perplexity(loss_sum / targets)}

    def state_dict(self) -> ObjectiveState:
        return ObjectiveState({"cursor": self._cursor})

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._cursor = int(state.numbers["cursor"])
