"""How sure a score is, and whether one model is better than another: bootstrap over clusters of items, in pairs.

Two models compare on the items that both have a score for. Per item the difference is taken first, so what makes an
item easy or hard for both cancels (Miller 2024, "Adding Error Bars to Evals", eq. 7 and 8). Items that share a prompt
depend on each other and are drawn together (section 2.2 there).

A plain percentile bootstrap of few items is too narrow, and of a binary score that seldom differs far too sure: with 3
of 30 items changed, all for the better, less than 5 % of the resamples are not above zero, while a coin gives 3 of 3
once in 8 times. So the quantiles are widened to those of Student's t (Hesterberg 2015, "What Teachers Should Know
About the Bootstrap", section 4.3), the bounds of a difference allow for its skewness too, and `p` is from flipping
signs: exact for two models that are equally good. A difference counts as found only where both agree. The rates that
this was chosen by are in `docs/EVALUATION.md`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import special

from stages.judge.scores import Column

_RESAMPLES, _FLIPS = 4_000, 9_999
_SEED = 20_240
_UNSEEN = 30
"""Clusters by which the tail of skewed differences is made smaller; chosen by the rates in `docs/EVALUATION.md`."""
_AT_ONCE = 2_000_000
"""Numbers drawn at once, so that memory does not grow with the items."""
_FEW_KINDS = 64
"""Up to so many different clusters, it is drawn how often each kind occurs, instead of cluster by cluster."""


@dataclass(frozen=True)
class Interval:
    """A mean with the range that it is known to."""

    value: float
    low: float
    high: float
    items: int


@dataclass(frozen=True)
class Comparison:
    """How much higher one model's mean is than the other's, on the same items."""

    difference: float
    low: float
    """The true difference is lower with a probability of at most `level`."""
    high: float
    """The true difference is higher with a probability of at most `level`."""
    level: float
    p: float
    """Share of equally good models that differ at least so much for the better; 1 where nothing differs."""
    items: int
    clusters: int
    missing: int
    """Items that `b` has a score for and `a` has not."""
    needed_items: int | None
    """So many items would find the difference with the stated power; None where there is nothing to find."""


@dataclass(frozen=True)
class _Clusters:
    """Sums and sizes of the clusters; the mean over items is sum over size."""

    sums_G: np.ndarray
    sizes_G: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.sums_G.sum() / self.sizes_G.sum())

    @property
    def standard_error(self) -> float:
        """Of the mean, clustered, with the correction for few clusters; infinite for one."""
        num_clusters = len(self.sums_G)
        if num_clusters < 2:
            return math.inf
        residuals_G = self.sums_G - self.mean * self.sizes_G
        scale = num_clusters / (num_clusters - 1)
        return float(math.sqrt(scale * (residuals_G**2).sum()) / self.sizes_G.sum())


def interval(values: np.ndarray, clusters: np.ndarray, *, level: float = 0.95) -> Interval | None:
    """Return the mean of the values with its two-sided interval at `level`; None without values."""
    if len(values) == 0:
        return None
    grouped = _group(np.asarray(values, dtype=np.float64), clusters)
    low, high = _bounds(grouped, tail=(1 - level) / 2)
    return Interval(value=grouped.mean, low=low, high=high, items=len(values))


def compare(
    a: Column,
    b: Column,
    *,
    level: float = 0.05,
    power: float = 0.9,
    least_difference: float = 0.0,
    better: Literal["higher", "lower", ""] = "higher",
) -> Comparison | None:
    """Compare `a` with `b` on the items that both have; None where there are none.

    The difference is always a minus b. `better` says which sign is an improvement, and so what `p` and `needed_items`
    are about; `level` is the rate of wrong findings in one direction. `needed_items` are those for the observed
    difference, or for `least_difference` where that is larger.
    """
    _, in_a, in_b = np.intersect1d(a.items.astype(str), b.items.astype(str), assume_unique=True, return_indices=True)
    if len(in_a) == 0:
        return None
    grouped = _group(np.asarray(a.values[in_a] - b.values[in_b], dtype=np.float64), a.clusters[in_a])
    low, high = _careful_bounds(grouped, tail=level)
    sign = -1.0 if better == "lower" else 1.0
    gain = max(sign * grouped.mean, least_difference)
    return Comparison(
        difference=grouped.mean,
        low=low,
        high=high,
        level=level,
        p=_flip_signs(sign * grouped.sums_G),
        items=len(in_a),
        clusters=len(grouped.sums_G),
        missing=len(b.items) - len(in_b),
        needed_items=_needed_items(grouped, gain, items=len(in_a), level=level, power=power),
    )


def p_of_chance(values: np.ndarray, clusters: np.ndarray, *, chance: float) -> float:
    """Return how often who guesses, and so is as often above `chance` as below it, has at least this mean; 1 without
    values."""
    return _flip_signs(_group(np.asarray(values, dtype=np.float64) - chance, clusters).sums_G)


def _group(values: np.ndarray, clusters: np.ndarray) -> _Clusters:
    _, index = np.unique(clusters.astype(str), return_inverse=True)
    return _Clusters(
        sums_G=np.bincount(index, weights=values),
        sizes_G=np.bincount(index).astype(np.float64),
    )


def _bounds(grouped: _Clusters, *, tail: float) -> tuple[float, float]:
    """Return the quantiles of the bootstrapped mean that leave `tail` on each side."""
    num_clusters = len(grouped.sums_G)
    if num_clusters < 2:
        return grouped.mean, grouped.mean
    t = special.stdtrit(num_clusters - 1, tail) * math.sqrt(num_clusters / (num_clusters - 1))
    widened = float(special.ndtr(t))
    means_R = _resampled_means(grouped)
    # A bound on the safe side of its quantile: with the ties of binary scores, interpolation would fall between them.
    low = float(np.quantile(means_R, widened, method="lower"))
    high = float(np.quantile(means_R, 1 - widened, method="higher"))
    return low, high


def _careful_bounds(grouped: _Clusters, *, tail: float) -> tuple[float, float]:
    """Return the bootstrapped bounds, or those that the skewness of the clusters asks for where these are wider.

    A model that is a little better on most items and much worse on few looks better in most samples. Hall (1992, "On
    the Removal of Skewness by Transformation") corrects the t statistic for that. Few items do not show how skewed they
    are, so the tail is made smaller for them: by 3/5 with 20 clusters, by 1/20 with 600.
    """
    low, high = _bounds(grouped, tail=tail)
    if len(grouped.sums_G) < 2:
        return low, high
    upside_down = _Clusters(-grouped.sums_G, grouped.sizes_G)
    return min(low, _skewed_low(grouped, tail=tail)), max(high, -_skewed_low(upside_down, tail=tail))


def _skewed_low(grouped: _Clusters, *, tail: float) -> float:
    """Return the lower bound of the mean by Hall's cubic transformation of the t statistic."""
    num_clusters = len(grouped.sums_G)
    residuals_G = grouped.sums_G - grouped.mean * grouped.sizes_G
    variance = float((residuals_G**2).mean())
    if variance == 0.0:
        return grouped.mean
    skewness = float((residuals_G**3).mean()) / variance**1.5
    careful = tail * num_clusters / (num_clusters + _UNSEEN)
    t = float(special.stdtrit(num_clusters - 1, 1 - careful)) / math.sqrt(num_clusters)
    if abs(skewness) > 1e-6:
        t = 3 / skewness * (float(np.cbrt(1 + skewness * (t - skewness / (6 * num_clusters)))) - 1)
    return grouped.mean - t * grouped.standard_error * math.sqrt(num_clusters)


def _resampled_means(grouped: _Clusters) -> np.ndarray:
    """Return the means of resamples of the clusters, drawn with replacement; always the same for the same clusters."""
    num_clusters = len(grouped.sums_G)
    kinds_K, counts_K = np.unique(np.column_stack([grouped.sums_G, grouped.sizes_G]), axis=0, return_counts=True)
    if len(kinds_K) <= _FEW_KINDS:
        rng = np.random.default_rng(_SEED)
        drawn_RK = rng.multinomial(num_clusters, counts_K / num_clusters, size=_RESAMPLES).astype(np.float64)
        return (drawn_RK @ kinds_K[:, 0]) / (drawn_RK @ kinds_K[:, 1])
    equal_sizes = bool((grouped.sizes_G == grouped.sizes_G[0]).all())
    means = []
    for chosen in _drawn(_resamples, num_clusters, rows=_RESAMPLES):
        sizes = num_clusters * grouped.sizes_G[0] if equal_sizes else grouped.sizes_G[chosen].sum(axis=1)
        means.append(grouped.sums_G[chosen].sum(axis=1) / sizes)
    return np.concatenate(means)


def _flip_signs(sums_G: np.ndarray) -> float:
    """Return how often clusters with random signs sum up to at least what was observed.

    Two models that are equally good on every cluster can be exchanged in each, which flips its sign.
    """
    sums_G = sums_G[sums_G != 0]
    if len(sums_G) == 0:
        return 1.0
    sizes_K, counts_K = np.unique(np.abs(sums_G), return_counts=True)
    if len(sizes_K) <= _FEW_KINDS:
        rng = np.random.default_rng(_SEED)
        positive_FK = rng.binomial(counts_K, 0.5, size=(_FLIPS, len(counts_K)))
        flipped_F = (2.0 * positive_FK - counts_K) @ sizes_K
    else:
        doubled_G = (2.0 * sums_G).astype(np.float32)
        parts = [heads @ doubled_G for heads in _drawn(_coins, len(sums_G), rows=_FLIPS)]
        flipped_F = np.concatenate(parts) - sums_G.sum()
    # Equal sums that were added up in another order count as equal.
    tolerance = 1e-6 * float(np.abs(sums_G).sum())
    at_least = int((flipped_F >= sums_G.sum() - tolerance).sum())
    return (1 + at_least) / (1 + _FLIPS)


def _needed_items(grouped: _Clusters, gain: float, *, items: int, level: float, power: float) -> int | None:
    """Return the items for a normal mean of this spread (Miller 2024, section 5), which are clustered alike."""
    error = grouped.standard_error
    if gain <= 0 or not math.isfinite(error):
        return None
    z = float(special.ndtri(1 - level) + special.ndtri(power))
    return max(1, math.ceil(items * (z * error / gain) ** 2))


Draw = Callable[[np.random.Generator, int, int], np.ndarray]
"""Rows of random numbers from a generator, the number of rows and that of clusters."""


def _resamples(rng: np.random.Generator, rows: int, num_clusters: int) -> np.ndarray:
    return rng.integers(0, num_clusters, size=(rows, num_clusters), dtype=np.int32)


def _coins(rng: np.random.Generator, rows: int, num_clusters: int) -> np.ndarray:
    """1 where a cluster keeps its sign, else 0."""
    bits = np.unpackbits(rng.integers(0, 256, size=(rows, -(-num_clusters // 8)), dtype=np.uint8), axis=1)
    return bits[:, :num_clusters].astype(np.float32)


def _drawn(draw: Draw, num_clusters: int, *, rows: int) -> Iterator[np.ndarray]:
    """Draw `rows` rows, in parts that fit into memory. They follow from the number of clusters alone, so a table that
    is one part is kept: an evaluation compares many models on the same items."""
    at_once = max(1, _AT_ONCE // num_clusters)
    if rows <= at_once:
        yield _kept(draw, num_clusters, rows)
        return
    rng = np.random.default_rng(_SEED)
    for start in range(0, rows, at_once):
        yield draw(rng, min(at_once, rows - start), num_clusters)


@lru_cache(maxsize=8)
def _kept(draw: Draw, num_clusters: int, rows: int) -> np.ndarray:
    table = draw(np.random.default_rng(_SEED), rows, num_clusters)
    table.flags.writeable = False
    return table
