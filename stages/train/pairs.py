"""Steps over preference pairs, for the reward model and DPO: both answers of a pair in one micro-batch, packed.

Segments of a micro-batch alternate: 2i is the chosen answer of its i-th pair, 2i + 1 the rejected one.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from stages.data.packing import Packed, TokenSequence, pack, split_by_rows
from stages.data.tokens import PairView
from stages.train.engine import Engine
from stages.train.objective import LossOutput, Step
from stages.train.plan import batches, evenly, in_step, order_digest, share


class PairSteps:
    """Order, cursor and packing of pairs."""

    def __init__(
        self,
        pairs: PairView,
        *,
        order: np.ndarray,
        global_batch_size: int,
        row_length: int,
        micro_batch_size: int,
    ) -> None:
        self._pairs, self._row_length, self._micro_batch_size = pairs, row_length, micro_batch_size
        self._steps = batches(order, global_batch_size)
        self.cursor = 0
        self.num_steps = len(self._steps)
        self.order = order_digest(self._steps)

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self.cursor < self.num_steps:
            indices = self._steps[self.cursor]
            mine = share(indices, rank=engine.rank, world_size=engine.world_size)
            self.cursor += 1
            yield Step(self.micro_batches(self._pairs, mine if len(mine) else indices[:1]), counted=len(mine) > 0)

    def micro_batches(self, pairs: PairView, indices: np.ndarray) -> list[Packed]:
        chosen = [pairs[int(index)] for index in indices]
        groups = [(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in chosen]
        parts = split_by_rows(groups, row_length=self._row_length, max_rows=self._micro_batch_size)
        result = []
        for part in parts:
            sequences: list[TokenSequence] = []
            for index in part:
                sequences += (chosen[index].chosen, chosen[index].rejected)
            result.append(pack(sequences, self._row_length))
        return result


def evaluate_pairs(
    engine: Engine, loss: Callable[..., LossOutput], steps: PairSteps, heldout: PairView, *, at_most: int
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
