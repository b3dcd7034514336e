"""The order in which examples of several sources are seen, so that each source gets the share that was asked for.

A function of data, weights and seed alone: the same on every worker, and a resumed run continues in the middle of it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stages.config.errors import DataError
from stages.config.train import SampledConfig
from stages.data.tokens.views import Sources
from stages.train.plan import epochs


@dataclass(frozen=True)
class Share:
    """What one source was to give and what it gives."""

    asked: float | None
    """Share of the unit; None where examples are taken as often as they are there."""
    realised: float
    """Share of the unit."""
    examples: int
    """Examples that are trained on, repetitions counted."""
    distinct: int
    """Examples that the source has."""
    epochs: float
    """Passes over the source."""
    target_tokens: int
    """Trained tokens, repetitions counted."""


@dataclass(frozen=True)
class Mixture:
    """Indices of examples in training order, and the account by source."""

    order: np.ndarray
    unit: str
    shares: Mapping[str, Share]

    def to_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "sources": {name: asdict(share) for name, share in self.shares.items()}}


def training_order(sources: Sources, target_tokens: np.ndarray, config: SampledConfig) -> Mixture:
    """Which example is trained on when; `target_tokens` are the trained tokens of each.

    Without weights, every example `num_epochs` times in random order. With them, `num_epochs` times the size of the
    data is shared out; each source is gone through in random order, again and again if its share is larger than its
    size, and the sources are interleaved evenly. Raises DataError for weights that the sources cannot have.
    """
    if not config.mixture:
        order = epochs(len(sources.indices), num_epochs=config.num_epochs, seed=config.seed)
        return Mixture(order, config.mixture_unit, _account(order, sources, target_tokens, config, asked={}))
    sizes = target_tokens if config.mixture_unit == "tokens" else np.ones_like(target_tokens)
    totals = {name: int(sizes[sources.indices == place].sum()) for place, name in enumerate(sources.names)}
    asked = asked_shares(totals, {entry.source: entry.weight for entry in config.mixture})
    budget = _budget(totals, asked, config)
    amounts = _whole_numbers(asked, round(budget)) if config.mixture_unit == "examples" else None
    parts: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    for place, name in enumerate(sources.names):
        wanted = amounts[name] if amounts else asked[name] * budget
        mine = _stream(np.flatnonzero(sources.indices == place), sizes, wanted, seed=config.seed, source=place)
        # Where the middle of an example lies in its own source's stream, from 0 to 1. Sorted by that, the sources are
        # interleaved, and every stretch of training has each source's share to within one example of it.
        ends = np.cumsum(sizes[mine])
        parts.append(mine)
        positions.append((ends - sizes[mine] / 2) / max(1, ends[-1] if len(ends) else 1))
    # Stable: equal positions stay in the order of sources, on every machine and with every numpy.
    order = np.concatenate(parts)[np.argsort(np.concatenate(positions), kind="stable")]
    return Mixture(order, config.mixture_unit, _account(order, sources, target_tokens, config, asked))


def asked_shares(totals: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Shares that add up to 1. When every source has a weight they are relative to each other; else each weight is a
    share, and the sources without one share the rest by size."""
    if absent := sorted(set(weights) - set(totals)):
        raise DataError(
            f"mixture names {absent}, of which there is no example; the data has {sorted(totals)}",
            advice="Look at the ledgers of curate and tokenize for what was dropped and why, or correct the names. "
            "With `reasons`, only sources count that have a pair which names one.",
        )
    free = {name: total for name, total in totals.items() if name not in weights}
    given = sum(weights.values())
    if not free:
        return {name: weights[name] / given for name in totals}
    if given >= 1:
        raise DataError(
            f"mixture gives {given:g} of the training to {sorted(weights)}, which leaves nothing for {sorted(free)}",
            advice="Give each source a weight, or weights whose sum is below 1 (earlier data counts as a source).",
        )
    rest = (1 - given) / sum(free.values())
    return {name: weights.get(name, free.get(name, 0) * rest) for name in totals}


def _budget(totals: Mapping[str, int], asked: Mapping[str, float], config: SampledConfig) -> float:
    """How much is trained on: by `num_epochs`, or less, so that no source is repeated too often."""
    budget = config.num_epochs * sum(totals.values())
    if not config.max_source_epochs:
        return budget
    # Everything shrinks with the scarcest source: training a source less than its share would change the proportions.
    return min(budget, *(config.max_source_epochs * total / asked[name] for name, total in totals.items()))


def _whole_numbers(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Numbers that add up to `total`, each within one of its share of it (largest remainders)."""
    exact = {name: share * total for name, share in shares.items()}
    numbers = {name: int(value) for name, value in exact.items()}
    # Most negative first: those whose exact number lost most by rounding down get one more.
    by_remainder = sorted(exact, key=lambda name: numbers[name] - exact[name])
    for name in by_remainder[: total - sum(numbers.values())]:
        numbers[name] += 1
    return numbers


def _stream(mine: np.ndarray, sizes: np.ndarray, wanted: float, *, seed: int, source: int) -> np.ndarray:
    """Examples of one source, pass after pass in new random orders, up to the size that comes nearest to `wanted`."""
    # One pass more than fits surely reaches `wanted`. Each pass has a generator of its own, keyed by seed, pass and
    # source: how often other sources are repeated changes nothing in this one's order.
    total = sizes[mine].sum()
    passes = int(wanted // total) + 1
    shuffles = (np.random.Generator(np.random.Philox([seed, number, source])) for number in range(passes))
    stream = np.concatenate([mine[generator.permutation(len(mine))] for generator in shuffles])
    # reached[k] is the size of the first k examples, so the index of the nearest is a count: within half an example.
    reached = np.concatenate([[0], np.cumsum(sizes[stream])])
    return stream[: int(np.argmin(np.abs(reached - wanted)))]


def _account(
    order: np.ndarray,
    sources: Sources,
    target_tokens: np.ndarray,
    config: SampledConfig,
    asked: Mapping[str, float],
) -> dict[str, Share]:
    """Counted from the order itself."""
    origins, tokens = sources.indices[order], target_tokens[order]
    sizes = tokens if config.mixture_unit == "tokens" else np.ones_like(tokens)
    shares: dict[str, Share] = {}
    for place, name in enumerate(sources.names):
        examples, distinct = int((origins == place).sum()), int((sources.indices == place).sum())
        shares[name] = Share(
            asked=asked.get(name),
            realised=float(sizes[origins == place].sum() / sizes.sum()),
            examples=examples,
            distinct=distinct,
            epochs=examples / distinct,
            target_tokens=int(tokens[origins == place].sum()),
        )
    return shares
