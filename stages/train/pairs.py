"""Steps over preference pairs, for the reward model and DPO: both answers of a pair in one micro-batch, packed.

Segments of a micro-batch alternate: 2i is the chosen answer of its i-th pair, 2i + 1 the rejected one. On the CPU the
prompt of a pair is computed once and both answers look back to it; flash attention on a GPU cannot.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stages.config.preferences import PairsConfig, PairsHalf
from stages.data.tokens.halves import indices_of, some_sources
from stages.data.tokens.packing import Packed, TokenSequence, lay_out, split_by_rows
from stages.data.tokens.reasons import of_reasons
from stages.data.tokens.views import Pair, PairView, Split, TokensArtifact, evenly, require
from stages.models.forward import TrunkOutput
from stages.train.engine import Engine, LossOutput
from stages.train.measuring import measured
from stages.train.mixture import training_order
from stages.train.objective import ObjectiveState, Step
from stages.train.plan import batches, order_digest, share
from stages.train.routing import Balancing

WEIGHT = "pair_weight"
"""Field of what a pair counts in the loss, the same for all tokens of both answers; without it every pair counts 1."""


class Pairs(Protocol):
    """Pairs by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Pair: ...


@dataclass(frozen=True)
class Selected:
    """Some of the pairs, numbered anew."""

    pairs: Pairs
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[int(self.indices[index])]


class PairSteps:
    """Which pairs are in which step, how far training is, and how pairs become micro-batches."""

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
        # Sharing needs a mask of its own, which flash attention does not take: on a GPU prompts are computed twice.
        self._share_prompts = not torch.cuda.is_available()
        self._steps = batches(order, global_batch_size)
        self.cursor = 0
        self.num_steps = len(self._steps)
        self.order = order_digest(self._steps)

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self.cursor < self.num_steps:
            indices = self._steps[self.cursor]
            mine = share(indices, rank=engine.rank, world_size=engine.world_size)
            # Before the yield: a checkpoint is taken while the consumer holds this step, and must not repeat it.
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


@dataclass(frozen=True)
class PlannedPairs:
    """The training pairs of a stage, their steps, and the account of both."""

    pairs: PairView
    order: np.ndarray
    """Indices of pairs as they are trained on."""
    steps: PairSteps
    ledger: dict[str, Any]


def planned_pairs(tokens: TokensArtifact, config: PairsConfig, *, micro_batch_size: int) -> PlannedPairs:
    """Order the training pairs, or one half of them, as the config's mixture says; raises DataError when there are
    none."""
    pairs, sources = tokens.pairs(Split.TRAIN), tokens.pair_sources(Split.TRAIN)
    require(len(pairs), "training preference pairs", advice="Give preference data, or `derived`.")
    indices, sizes = np.arange(len(pairs)), pairs.num_targets
    num_tokens = sum(int(side.lengths.sum()) for side in (pairs.chosen, pairs.rejected))
    counts: dict[str, Any] = {
        "pairs": len(pairs),
        "tokens_available": num_tokens,
        "targets_available": int(sizes.sum()),
    }
    if config.half is not PairsHalf.BOTH:
        indices = indices_of(pairs, config.half)
        require(
            len(indices),
            f"training preference pairs in the {config.half} half ({len(pairs)} in both)",
            advice="Give more preference data, or train without a gold scorer (gold_scorer=none).",
        )
        counts["pairs_of_the_other_half"] = len(pairs) - len(indices)
    if config.reasons:
        bits = tokens.pair_reasons(Split.TRAIN)[indices]
        indices, named = of_reasons(indices, bits, config.reasons, one="pairs", what="training preference pairs")
        counts |= named
    if len(indices) < len(pairs):
        sources, sizes = some_sources(sources, indices), sizes[indices]
    mixture = training_order(sources, sizes, config)
    order = indices[mixture.order]  # by their numbers among all pairs: what is kept about a pair is kept under its own
    steps = PairSteps(
        pairs,
        order=order,
        global_batch_size=config.global_batch_size,
        row_length=tokens.sequence_length,
        micro_batch_size=micro_batch_size,
    )
    ledger = {**counts, "pairs_trained": len(mixture.order), "mixture": mixture.to_dict()}
    return PlannedPairs(pairs, order, steps, ledger)


def both_answers(pair: Pair, *, share_prompt: bool) -> tuple[TokenSequence, TokenSequence]:
    """Return a pair as sequences, the rejected one without the tokens before its first target that both begin with."""
    chosen, rejected = pair.chosen, pair.rejected
    if not share_prompt:
        return chosen, rejected
    # At least one token of the rejected answer stays, since a sequence cannot be empty. Targets are never shared: each
    # side's log-probability is summed over its own segment.
    limit = min(len(chosen.ids), len(rejected.ids) - 1)
    differs = np.flatnonzero(
        (chosen.ids[:limit] != rejected.ids[:limit]) | (chosen.loss_mask[:limit] + rejected.loss_mask[:limit] > 0)
    )
    shared = int(differs[0]) if len(differs) else limit
    return chosen, replace(rejected, shared=shared)


class PairLoss(Protocol):
    """What makes one verb out of the objective: the loss of one micro-batch of pairs, and its metrics."""

    def __call__(self, parts: nn.ModuleDict, batch: Packed, trunk: TrunkOutput | None = None, /) -> LossOutput:
        """`trunk` is the trained part's output where it is there already."""
        ...


class PairObjective:
    """Training on pairs, for the reward model and for preference losses, which differ in `pair_loss` alone."""

    def __init__(
        self,
        steps: PairSteps,
        *,
        heldout: Pairs,
        eval_items: int,
        part: str,
        balancing: Balancing,
        pair_loss: PairLoss,
    ) -> None:
        """`part` names the model that is trained; at most `eval_items` held-out pairs make an evaluation."""
        self._steps, self._heldout, self._eval_items = steps, heldout, eval_items
        self._part, self._balancing, self._pair_loss = part, balancing, pair_loss
        self.num_steps, self.order = steps.num_steps, steps.order
        self.tokens_per_step, self.num_heldout = 0, min(len(heldout), eval_items)
        self.ledger: dict[str, Any] = {}

    def steps(self, engine: Engine) -> Iterator[Step]:
        return map(self._balancing.watching, self._steps.steps(engine))

    def weight(self, batch: Packed) -> float:
        weights_P = of_pairs(batch, WEIGHT)
        return float(num_pairs(batch)) if weights_P is None else float(weights_P.sum(dtype=torch.float64))

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        trunk = self._balancing.run_trunk(parts, self._part, batch)
        return self._balancing.added_to(self._pair_loss(parts, batch, trunk), **{self._part: trunk})

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Return the loss a pair and its metrics over evenly spread held-out pairs, under `eval/...`."""
        spread = evenly(len(self._heldout), at_most=self._eval_items)
        if not len(spread):
            return {}
        mine = self._steps.micro_batches(self._heldout, share(spread, rank=engine.rank, world_size=engine.world_size))
        spare = mine[0] if mine else self._steps.micro_batches(self._heldout, spread[:1])[0]
        return measured(engine, self._pair_loss, mine, spare=spare, units=num_pairs)

    def state_dict(self) -> ObjectiveState:
        return ObjectiveState({"cursor": self._steps.cursor}, self._balancing.state_dict())

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._steps.cursor = int(state.numbers["cursor"])
        self._balancing.load_state_dict(state.tensors)


def over_pairs(total: Tensor, values_P: Tensor) -> Tensor:
    """Return a metric as the loop averages it: its sum over the pairs of `values_P`, and their number."""
    return torch.stack([total, values_P.new_tensor(float(len(values_P)))])


def of_pairs(batch: Packed, field: str) -> Tensor | None:
    """Return a field that all tokens of a pair share, shape (P,); None in a batch without it."""
    if field not in batch.fields:
        return None
    return batch.fields[field].flatten()[batch.spans_D4[0::2, 0]]


def num_pairs(batch: Packed) -> int:
    return batch.num_segments // 2


def sides(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Split values by segment into chosen and rejected, each of shape (P,)."""
    return values_S[0::2], values_S[1::2]
