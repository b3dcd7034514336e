"""What a reward model knows of a pair besides its answers: what it counts, and by how much the chosen one is better.

Both travel with the tokens, as fields that all tokens of a pair share, so that a loss needs nothing but its batch.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from stages.config.errors import DataError
from stages.config.preferences import RewardConfig
from stages.data.tokens.halves import prompt_digest
from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.views import Pair, Split, TokensArtifact
from stages.train.pairs import WEIGHT, Pairs, PairSteps, PlannedPairs, Selected, planned_pairs

MARGIN = "pair_margin"
_BOOTSTRAP = 1 << 20
"""Random stream of bootstrap samples, far from those of the passes over the data."""


@dataclass(frozen=True)
class Annotated:
    """Pairs whose tokens carry numbers of their pair, by field."""

    pairs: Pairs
    numbers: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        pair = self.pairs[index]
        mine = {name: values[index] for name, values in self.numbers.items()}
        return Pair(_carrying(pair.chosen, mine), _carrying(pair.rejected, mine))


def _carrying(sequence: TokenSequence, numbers: Mapping[str, float]) -> TokenSequence:
    size = len(sequence.ids)
    return replace(sequence, fields={name: np.full(size, value, dtype=np.float32) for name, value in numbers.items()})


@dataclass(frozen=True)
class Comparisons:
    """The pairs that a reward model is trained and measured on."""

    planned: PlannedPairs
    heldout: Pairs


def planned_comparisons(tokens: TokensArtifact, config: RewardConfig, *, micro_batch_size: int) -> Comparisons:
    """Order the training pairs and give all pairs what the config says; raises DataError for margins that are asked for
    and that no source has."""
    planned = planned_pairs(tokens, config, micro_batch_size=micro_batch_size)
    numbers, heldout = _margins(tokens, config, Split.TRAIN), _margins(tokens, config, Split.HELDOUT)
    order, ledger = planned.order, dict(planned.ledger)
    if config.counted == "prompt":
        used = np.unique(order)
        prompts = {int(index): prompt_digest(planned.pairs[int(index)]) for index in used}
        numbers[WEIGHT] = prompt_weights(prompts, len(planned.pairs))
        order = side_by_side(order, prompts)
        ledger["prompts"] = len(set(prompts.values()))
    if config.ensemble_bootstrap:
        order = resampled(order, seed=config.seed)
        ledger["pairs_drawn"] = len(np.unique(order))
    if MARGIN in numbers:
        ledger["pairs_with_margin"] = int((numbers[MARGIN][np.unique(order)] > 0).sum())
    steps = PairSteps(
        Annotated(planned.pairs, numbers) if numbers else planned.pairs,
        order=order,
        global_batch_size=config.global_batch_size,
        row_length=tokens.sequence_length,
        micro_batch_size=micro_batch_size,
    )
    held = tokens.pairs(Split.HELDOUT)
    # Held-out pairs count one each: what they are measured by does not depend on how training weighs them.
    measured = Selected(
        Annotated(held, heldout) if heldout else held, tokens.pairs_naming(Split.HELDOUT, config.reasons)
    )
    return Comparisons(replace(planned, order=order, steps=steps, ledger=ledger), measured)


def _margins(tokens: TokensArtifact, config: RewardConfig, split: Split) -> dict[str, np.ndarray]:
    if not config.margin:
        return {}
    found = tokens.pair_margins(split)
    if found is None and split is Split.TRAIN:
        raise DataError(
            f"margin={config.margin:g}, and no training pair has a margin",
            advice="Say where a source has it, as in data.jsonl#margin=ratings, or set margin=0.",
        )
    size = len(tokens.pairs(split))
    return {MARGIN: config.margin * (np.zeros(size, dtype=np.float32) if found is None else found)}


def prompt_weights(prompts: Mapping[int, bytes], num_pairs: int) -> np.ndarray:
    """Return a weight for each pair: those of one prompt, such as all of its ranking, sum to 1; others have 0."""
    counts = Counter(prompts.values())
    weights = np.zeros(num_pairs, dtype=np.float32)
    for index, prompt in prompts.items():
        weights[index] = 1 / counts[prompt]
    return weights


def side_by_side(order: np.ndarray, prompts: Mapping[int, bytes]) -> np.ndarray:
    """Move the pairs of a prompt to where its first one stands, in every pass over the pairs.

    A model that meets a response again in later steps learns it by heart: InstructGPT (section 3.5) trains on all pairs
    of a ranking at once. The end of a step may still part a ranking.
    """
    passes: Counter[int] = Counter()
    first: dict[tuple[bytes, int], int] = {}
    places: list[int] = []
    for place, index in enumerate(order.tolist()):
        key = (prompts[index], passes[index])
        passes[index] += 1
        places.append(first.setdefault(key, place))
    return order[np.argsort(np.asarray(places), kind="stable")]


def resampled(order: np.ndarray, *, seed: int) -> np.ndarray:
    """Put one of as many pairs, drawn with replacement, in the place of each: a bootstrap sample, in the order of
    training and with its number of passes. A pair keeps what it counts."""
    pairs, places = np.unique(order, return_inverse=True)
    drawn = np.random.Generator(np.random.Philox([seed, _BOOTSTRAP])).integers(0, len(pairs), size=len(pairs))
    return pairs[drawn][places]
