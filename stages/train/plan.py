"""Which items each optimizer step trains on: a function of the seed alone, whatever the number of ranks."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

Item = TypeVar("Item")


class Agreeing(Protocol):
    """Ranks that can compare numbers; engines do."""

    def max(self, value: float) -> float: ...


def shuffled(num_items: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of range(num_items) that depends on (seed, epoch) alone."""
    # Seeded by the pair and not by a sum: epoch 1 of seed 0 would be epoch 0 of seed 1.
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(num_items)


def epochs(num_items: int, *, num_epochs: float, seed: int) -> np.ndarray:
    """Return item indices in training order; a fractional last epoch takes the first part of its permutation."""
    total = max(1, round(num_items * num_epochs))
    orders = [shuffled(num_items, seed=seed, epoch=epoch) for epoch in range(math.ceil(total / num_items))]
    return np.concatenate(orders)[:total]


def batches(items: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut items into steps of `size`; the last may be smaller, nothing is dropped."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def share(items: np.ndarray, *, rank: int, world_size: int) -> np.ndarray:
    """Return the items of one rank; possibly none."""
    # Dealt out one by one: the ranks' numbers of items differ by one at most, in a small last step too.
    return items[rank::world_size]


def in_step(ranks: Agreeing, items: Sequence[Item], *, spare: Item) -> Iterator[tuple[Item, bool]]:
    """Yield the items with True, then the spare with False until all ranks have had equally many: a model in shards
    computes on all ranks or on none."""
    for number in range(int(ranks.max(len(items)))):
        yield (items[number], True) if number < len(items) else (spare, False)


def order_digest(steps: Iterable[np.ndarray]) -> str:
    """Hash over the items of every step. numpy does not promise the same permutation in its next version."""
    digest = hashlib.sha256()
    for items in steps:
        digest.update(len(items).to_bytes(8, "little"))
        digest.update(items.astype("<i8").tobytes())
    return digest.hexdigest()
