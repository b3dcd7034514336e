"""Steps over single labelled responses, for KTO: examples that came alone, and both sides of pairs.

Each example has a mismatch: its prompt with the response to another prompt. The mean log-ratio of a step's mismatches
is the baseline z0 of all its examples. It is computed before the step's first micro-batch over all examples of the
step, on all ranks, so it depends neither on micro-batches nor on ranks. Which response is the mismatch of an example
follows from the data alone and not from the step, so its reference is computed once, however often the example is
trained on.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.config.preference_losses import KTOLoss
from stages.config.preferences import DPOConfig, PairsHalf
from stages.data.tokens.halves import half_of, some_sources
from stages.data.tokens.packing import Packed, TokenSequence, lay_out, split_by_rows
from stages.data.tokens.reasons import names_any, of_reasons
from stages.data.tokens.views import (
    Labelled,
    Pair,
    PairView,
    Sources,
    Split,
    TokensArtifact,
    UnpairedView,
    evenly,
    require,
)
from stages.losses.kto import ExampleLogprobs, desirable_loss, kl_baseline, kto_loss
from stages.models.forward import TrunkOutput, sum_by_segment, target_logprobs, target_positions
from stages.train.engine import Engine, LossOutput
from stages.train.measuring import measured
from stages.train.mixture import training_order
from stages.train.objective import ObjectiveState, Step
from stages.train.pairs import Pairs
from stages.train.plan import batches, in_step, order_digest, share
from stages.train.reference import FIELD
from stages.train.routing import Balancing

DESIRABLE, BASELINE = "desirable", "kl_baseline"
"""Fields whose value all tokens of an example share: its label, and z0 of its step."""


class Examples:
    """Labelled responses by index: the chosen sides of all pairs, the rejected ones, and those that came alone.

    An item is a `Pair` of the example as it is trained on and its mismatch, which is what the reference needs of it.
    """

    def __init__(self, pairs: PairView, alone: UnpairedView, *, max_length: int) -> None:
        self._pairs, self._alone, self._max_length = pairs, alone, max_length
        self._partners: dict[int, int] = {}

    def __len__(self) -> int:
        return 2 * len(self._pairs) + len(self._alone)

    def labelled(self, index: int) -> Labelled:
        count = len(self._pairs)
        if index >= 2 * count:
            return self._alone[index - 2 * count]
        side = self._pairs.chosen if index < count else self._pairs.rejected
        return Labelled(side[index % count], is_desirable=index < count)

    def match(self, indices: np.ndarray) -> int:
        """Choose mismatches for some examples among themselves: the response of the next one with another prompt,
        around the end. Return how many prompts there are."""
        prompts = [_prompt(self.labelled(int(index)).sequence) for index in indices]
        partners = indices[_next_of_another(prompts)] if prompts else indices
        self._partners = {int(index): int(partner) for index, partner in zip(indices, partners, strict=True)}
        return len(set(prompts))

    def __getitem__(self, index: int) -> Pair:
        mine, other = self.labelled(index), self.labelled(self._partners[index])
        label = np.full(len(mine.sequence.ids), float(mine.is_desirable), dtype=np.float32)
        example = replace(mine.sequence, fields={**mine.sequence.fields, DESIRABLE: label})
        return Pair(example, _mismatch(mine.sequence, other.sequence, max_length=self._max_length))


def _prompt(sequence: TokenSequence) -> bytes:
    prompt = np.asarray(sequence.ids[: _first_target(sequence)], dtype="<i8")
    return hashlib.sha256(prompt.tobytes()).digest()


def _first_target(sequence: TokenSequence) -> int:
    return int(np.flatnonzero(sequence.loss_mask)[0])


def _mismatch(mine: TokenSequence, other: TokenSequence, *, max_length: int) -> TokenSequence:
    """The prompt of one with the response of the other, cut where it gets longer than any example may be."""
    begin, response = _first_target(mine), _first_target(other)
    return TokenSequence(
        np.concatenate([mine.ids[:begin], other.ids[response:]])[:max_length],
        np.concatenate([mine.loss_mask[:begin], other.loss_mask[response:]])[:max_length],
    )


def _next_of_another(prompts: list[bytes]) -> np.ndarray:
    """For each place the next one that holds something else, around the end; itself where all hold the same."""
    found = np.arange(len(prompts))
    later = None
    # Twice around from the end: what is behind a place is known before the place is looked at.
    for place in [*range(len(prompts) - 1, -1, -1)] * 2:
        following = (place + 1) % len(prompts)
        later = following if prompts[following] != prompts[place] else later
        found[place] = place if later is None else later
    return found


@dataclass(frozen=True)
class PlannedExamples:
    """The training examples of a stage, their order, and the account of both."""

    examples: Examples
    order: np.ndarray
    ledger: dict[str, Any]


def planned_examples(tokens: TokensArtifact, config: DPOConfig) -> PlannedExamples:
    """Order the training examples as the config's mixture says; raises DataError when there are none, or only ones of
    a single prompt, to which no response is a mismatch."""
    pairs, alone = tokens.pairs(Split.TRAIN), tokens.unpaired(Split.TRAIN)
    examples = Examples(pairs, alone, max_length=tokens.sequence_length)
    require(len(examples), "training preferences", advice="Give preference data, or `derived`.")
    views = (pairs.chosen, pairs.rejected, alone)
    sizes, sources = np.concatenate([view.num_targets for view in views]), _sources(tokens)
    counts: dict[str, Any] = {
        "pairs": len(pairs),
        "tokens_available": int(pairs.chosen.lengths.sum() + pairs.rejected.lengths.sum()),
        "targets_available": int(sizes[: 2 * len(pairs)].sum()),
        **({"unpaired": len(alone)} if len(alone) else {}),
    }
    indices = np.arange(len(examples))
    if config.half is not PairsHalf.BOTH:
        sequences = (examples.labelled(int(index)).sequence for index in indices)
        indices = np.flatnonzero([half_of(Pair(one, one)) is config.half for one in sequences])
        require(
            len(indices),
            f"training preferences in the {config.half} half ({len(examples)} in both)",
            advice="Give more preference data, or train without a gold scorer (gold_scorer=none).",
        )
        counts["examples_of_the_other_half"] = len(examples) - len(indices)
    if config.reasons:
        bits = _reasons(tokens, Split.TRAIN)[indices]
        indices, named = of_reasons(indices, bits, config.reasons, one="examples", what="training preferences")
        counts |= named
    if len(indices) < len(examples):
        sources, sizes = some_sources(sources, indices), sizes[indices]
    require(
        examples.match(indices) - 1,
        "responses to another prompt, with which KTO compares",
        advice="Give preferences of at least two prompts, or use another dpo.loss.kind.",
    )
    mixture = training_order(sources, sizes, config)
    order = indices[mixture.order]
    desirable = sum(examples.labelled(int(index)).is_desirable for index in order)
    counts |= {"examples_trained": len(order), "desirable": desirable, "undesirable": len(order) - desirable}
    return PlannedExamples(examples, order, {**counts, "mixture": mixture.to_dict()})


def heldout_examples(tokens: TokensArtifact, config: DPOConfig) -> tuple[Examples, np.ndarray]:
    """Held-out examples, and which of them a training is measured on: all, or those of its reasons. Where these have
    one prompt, each is its own mismatch."""
    examples = Examples(tokens.pairs(Split.HELDOUT), tokens.unpaired(Split.HELDOUT), max_length=tokens.sequence_length)
    indices = np.arange(len(examples))
    if config.reasons:
        indices = np.flatnonzero(names_any(_reasons(tokens, Split.HELDOUT), config.reasons))
    examples.match(indices)
    return examples, indices


def _reasons(tokens: TokensArtifact, split: Split) -> np.ndarray:
    """The areas that the reason of each example names: both sides of a pair have the pair's."""
    pairs = tokens.pair_reasons(split)
    return np.concatenate([pairs, pairs, tokens.unpaired_reasons(split)])


def _sources(tokens: TokensArtifact) -> Sources:
    """Which source each training example is of."""
    paired, alone = tokens.pair_sources(Split.TRAIN), tokens.unpaired_sources(Split.TRAIN)
    names = tuple(dict.fromkeys((*paired.names, *alone.names)))
    of_alone = [names.index(alone.names[int(place)]) for place in alone.indices]
    return Sources(names, np.concatenate([paired.indices, paired.indices, np.asarray(of_alone, dtype=np.int32)]))


class ExampleSteps:
    """Which examples are in which step, how far training is, and how a step is laid out with its baseline."""

    def __init__(
        self, examples: Pairs, *, order: np.ndarray, global_batch_size: int, row_length: int, micro_batch_size: int
    ) -> None:
        self.examples, self._row_length, self._micro_batch_size = examples, row_length, micro_batch_size
        self._steps = batches(order, global_batch_size)
        self.cursor, self.num_steps, self.order = 0, len(self._steps), order_digest(self._steps)

    @property
    def indices(self) -> np.ndarray:
        """Which examples training sees, each once, in order of their index."""
        return np.unique(np.concatenate(self._steps))

    def steps(self, engine: Engine) -> Iterator[Step]:
        while self.cursor < self.num_steps:
            indices = self._steps[self.cursor]
            # Before the yield: a checkpoint is taken while the consumer holds this step, and must not repeat it.
            self.cursor += 1
            yield self.laid_out(engine, self.examples, indices)

    def laid_out(self, engine: Engine, examples: Pairs, indices: np.ndarray) -> Step:
        """Return this rank's share of some examples, with the baseline of all of them."""
        mine = share(indices, rank=engine.rank, world_size=engine.world_size)
        items = [examples[int(index)] for index in (mine if len(mine) else indices[:1])]
        mismatches = self._micro_batches([item.rejected for item in items])
        total = 0.0
        for batch, counted in in_step(engine, mismatches if len(mine) else [], spare=mismatches[0]):
            total += counted * float(engine.infer(_log_ratio_sum, batch))
        baseline = kl_baseline(engine.sum([total])[0], len(indices))
        own = self._micro_batches([item.chosen for item in items])
        return Step([_with_baseline(batch, baseline) for batch in own], counted=len(mine) > 0)

    def _micro_batches(self, sequences: list[TokenSequence]) -> list[Packed]:
        groups = [[len(sequence.ids)] for sequence in sequences]
        parts = split_by_rows(groups, row_length=self._row_length, max_rows=self._micro_batch_size)
        return [lay_out([sequences[index] for index in part]) for part in parts]


def _log_ratio_sum(parts: nn.ModuleDict, batch: Packed) -> Tensor:
    logprobs_N = target_logprobs(parts["policy"], batch).logprobs_N
    return (logprobs_N - batch.fields[FIELD][target_positions(batch)]).sum(dtype=torch.float64)


def _with_baseline(batch: Packed, baseline: float) -> Packed:
    values_BT = torch.full(batch.input_ids_BT.shape, baseline, dtype=torch.float32)
    return replace(batch, fields={**batch.fields, BASELINE: values_BT})


class ExampleObjective:
    """Training on labelled examples with the loss of KTO."""

    def __init__(
        self, steps: ExampleSteps, *, heldout: Pairs, eval_items: int, balancing: Balancing, loss: KTOLoss
    ) -> None:
        self._steps, self._heldout, self._eval_items = steps, heldout, eval_items
        self._balancing, self._loss = balancing, loss
        self.num_steps, self.order = steps.num_steps, steps.order
        self.tokens_per_step, self.num_heldout = 0, min(len(heldout), eval_items)
        self.ledger: dict[str, Any] = {}

    def steps(self, engine: Engine) -> Iterator[Step]:
        return map(self._balancing.watching, self._steps.steps(engine))

    def weight(self, batch: Packed) -> float:
        return float(batch.num_segments)

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput:
        trunk = self._balancing.run_trunk(parts, "policy", batch)
        return self._balancing.added_to(self._example_loss(parts, batch, trunk), policy=trunk)

    def _example_loss(self, parts: nn.ModuleDict, batch: Packed, trunk: TrunkOutput | None = None) -> LossOutput:
        logprobs_N = target_logprobs(parts["policy"], batch, trunk=trunk).logprobs_N
        logprobs = ExampleLogprobs(
            policy_E=sum_by_segment(logprobs_N, batch),
            reference_E=sum_by_segment(batch.fields[FIELD][target_positions(batch)], batch),
            tokens_E=sum_by_segment(torch.ones_like(logprobs_N), batch),
            desirable_E=_of_examples(batch, DESIRABLE),
        )
        loss, kl_E = self._loss, _of_examples(batch, BASELINE)
        terms = kto_loss(
            logprobs,
            kl_E=kl_E,
            beta=loss.beta,
            desirable_weight=loss.desirable_weight,
            undesirable_weight=loss.undesirable_weight,
        )
        loss_sum = terms.loss_sum
        with torch.no_grad():
            metrics = _metrics(logprobs, terms.rewards_E, kl_E, beta=loss.beta)
        if loss.sft_coefficient:
            supervised = desirable_loss(logprobs)
            loss_sum = loss_sum + loss.sft_coefficient * supervised
            metrics["dpo/sft_loss"] = torch.stack([supervised.detach(), kl_E.new_tensor(float(len(kl_E)))])
        return LossOutput(loss_sum, metrics)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Return the loss an example and its metrics over evenly spread held-out examples, under `eval/...`."""
        spread = evenly(len(self._heldout), at_most=self._eval_items)
        if not len(spread):
            return {}
        step = self._steps.laid_out(engine, self._heldout, spread)
        mine, spare = step.micro_batches if step.counted else [], step.micro_batches[0]
        return measured(engine, self._example_loss, mine, spare=spare, units=self.weight)

    def state_dict(self) -> ObjectiveState:
        return ObjectiveState({"cursor": self._steps.cursor}, self._balancing.state_dict())

    def load_state_dict(self, state: ObjectiveState) -> None:
        self._steps.cursor = int(state.numbers["cursor"])
        self._balancing.load_state_dict(state.tensors)


def _of_examples(batch: Packed, field: str) -> Tensor:
    """A field that all tokens of an example share, shape (E,)."""
    values = batch.fields[field].flatten()
    return values[batch.spans_D4[:, 0].to(values.device)]


def _metrics(logprobs: ExampleLogprobs, rewards_E: Tensor, kl_E: Tensor, *, beta: float) -> dict[str, Tensor]:
    """Sums and weights: rewards of both labels over their own examples, the rest over all."""
    desirable_E, count = logprobs.desirable_E, kl_E.new_tensor(float(len(kl_E)))
    undesirable_E, gains_E = 1 - desirable_E, rewards_E - beta * kl_E
    right_E = torch.where(desirable_E > 0, gains_E, -gains_E)
    # Half a tie, as in the accuracy of pairs: a policy that still is its reference must show 0.5.
    right = (right_E > 0).float().sum() + 0.5 * (right_E == 0).float().sum()
    drift_E = (logprobs.policy_E - logprobs.reference_E) * desirable_E
    return {
        "dpo/accuracy": torch.stack([right, count]),
        "dpo/desirable_reward": torch.stack([(rewards_E * desirable_E).sum(), desirable_E.sum()]),
        "dpo/undesirable_reward": torch.stack([(rewards_E * undesirable_E).sum(), undesirable_E.sum()]),
        "dpo/chosen_drift": torch.stack([drift_E.sum(), desirable_E.sum()]),
        "dpo/desirable_share": torch.stack([desirable_E.sum(), count]),
        "dpo/kl": torch.stack([kl_E.sum(), count]),
    }
