"""Steps over preference pairs, for the reward model and DPO: both answers of a pair in one micro-batch, packed.

Segments of a micro-batch alternate: 2i is the chosen answer of its i-th pair, 2i + 1 the rejected one. On the CPU the
prompt of a pair is computed once and both answers look back to it; flash attention on a GPU cannot.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.data.tokens.packing import Packed, TokenSequence, lay_out, split_by_rows
from stages.data.tokens.views import Pair
from stages.train.engine import Engine
from stages.train.objective import LossOutput, Step
from stages.train.plan import batches, evenly, in_step, order_digest, share


class Pairs(Protocol):
    """Pairs by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Pair: ...


class PairSteps:
    """Order, cursor and packing of pairs."""

    def __init__(
        self,
        pairs: Pairs,
        *,
        order: np.ndarray,
        global_batch_size: int,
        row_length: int,
        micro_batch_size: int,
    ) -> None:
        self.pairs, self._row_length, self._micro_batch_size = pairs, row_length, micro_batch_size
        self._share_prompts = not torch.cuda.is_available()
        self._steps = batches(order, global_batch_size)
        self.cursor = 0
        self.num_steps = len(self._steps)
        self.order = order_digest(self._steps)

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self.cursor < self.num_steps:
            indices = self._steps[self.cursor]
            mine = share(indices, rank=engine.rank, world_size=engine.world_size)
            self.cursor += 1
            yield Step(self.micro_batches(self.pairs, mine if len(mine) else indices[:1]), counted=len(mine) > 0)

    @property
    def indices(self) -> np.ndarray:
        """Which pairs training sees, each once, in order of their index."""
        return np.unique(np.concatenate(self._steps))

    def micro_batches(self, pairs: Pairs, indices: np.ndarray) -> list[Packed]:
        chosen = [pairs[int(index)] for index in indices]
        sequences = [both_answers(pair, share_prompt=self._share_prompts) for pair in chosen]
        groups = [[sequence.num_laid_out for sequence in both] for both in sequences]
        parts = split_by_rows(groups, row_length=self._row_length, max_rows=self._micro_batch_size)
        return [lay_out([sequence for index in part for sequence in sequences[index]]) for part in parts]


def both_answers(pair: Pair, *, share_prompt: bool) -> tuple[TokenSequence, TokenSequence]:
    """Return a pair as sequences, the rejected one without the tokens before its first target that both begin with."""
    chosen, rejected = pair.chosen, pair.rejected
    if not share_prompt:
        return chosen, rejected
    limit = min(len(chosen.ids), len(rejected.ids) - 1)
    differs = np.flatnonzero(
        (chosen.ids[:limit] != rejected.ids[:limit]) | (chosen.loss_mask[:limit] + rejected.loss_mask[:limit] > 0)
    )
    shared = int(differs[0]) if len(differs) else limit
    return chosen, replace(rejected, shared=shared)


def evaluate_pairs(
    engine: Engine, loss: Callable[..., LossOutput], steps: PairSteps, heldout: Pairs, *, at_most: int
) -> dict[str, float]:
    """Return the loss a pair and the objective's metrics over evenly spread held-out pairs, under `eval/...`."""
    spread = evenly(len(heldout), at_most=at_most)
    totals: dict[str, float] = {"pairs": 0.0, "loss": 0.0}
    if not len(spread):
        return {}
    mine = steps.micro_batches(heldout, share(spread, rank=engine.rank, world_size=engine.world_size))
    spare = mine[0] if mine else steps.micro_batches(heldout, spread[:1])[0]
    for batch, counted in in_step(engine, mine, spare=spare):
        out = engine.infer(loss, batch)
        if not counted:
            continue
        totals["pairs"] += num_pairs(batch)
        totals["loss"] += float(out.loss_sum)
        for name, pair in out.metrics.items():
            totals[name] = totals.get(name, 0.0) + float(pair[0])
    names = sorted(set(engine.gather(list(totals))))  # a rank without pairs knows no metric names; all sum the same
    summed = dict(zip(names, engine.sum(totals.get(name, 0.0) for name in names), strict=True))
    count = summed.pop("pairs")
    return {f"eval/{name.replace('/', '_')}": value / count for name, value in summed.items()} if count else {}


def num_pairs(batch: Packed) -> int:
    return batch.num_segments // 2


def sides(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Split values by segment into chosen and rejected, each of shape (P,)."""
    return values_S[0::2], values_S[1::2]
