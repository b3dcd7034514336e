"""Whether a reward model may be optimised against: what its scores on held-out pairs tell, and whether length tells it
all.

Accuracy counts ties one half. A model that knows nothing but length can have a high accuracy where chosen answers are
longer, so two more numbers are there. `over_length` is accuracy minus that of the best rule on length alone.
`balanced` is the mean of the accuracies on pairs whose chosen answer is longer and on those where it is shorter: length
alone gives 0.5 whatever the data, and so do shuffled labels. Intervals are 95 %, clustered by prompt, and as wide as
both a bootstrap and Wilson's interval: where all pairs are told right the bootstrap is a point, be it of one pair.

Shape legend: P pairs.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stages.config.gate_records import NO_PAIRS, Findings
from stages.data.tokens.reasons import by_area
from stages.judge.statistics import Interval, interval
from stages.losses.reward import calibration_error

PREFIX = "accept/"
_HOTTEST, _COLDEST = 100.0, 0.01
_LONGEST_TABLE = 50
_LEAST = 10
"""Pairs on each side of a balanced accuracy; the interval of fewer says nothing."""
_Z = 1.959964
"""Of a normal distribution, 95 % lie within so many standard deviations."""


@dataclass(frozen=True)
class JudgedPairs:
    """Held-out pairs with the scores of a reward model."""

    chosen_P: np.ndarray
    rejected_P: np.ndarray
    chosen_tokens_P: np.ndarray
    """Lengths of the answers."""
    rejected_tokens_P: np.ndarray
    prompts_P: np.ndarray
    """What pairs of one prompt share."""
    sources_P: np.ndarray
    kinds_P: np.ndarray
    reasons_P: np.ndarray
    """Areas that the raters' reasons name, as bits."""

    @property
    def margins_P(self) -> np.ndarray:
        return self.chosen_P - self.rejected_P

    @property
    def longer_P(self) -> np.ndarray:
        """By how many tokens the chosen answer is longer."""
        return self.chosen_tokens_P - self.rejected_tokens_P


def wins(margins_P: np.ndarray) -> np.ndarray:
    """1 for a pair that is told right, one half for a tie."""
    return (margins_P > 0) + 0.5 * (margins_P == 0)


def acceptance(pairs: JudgedPairs, *, why_none: str = NO_PAIRS) -> Findings:
    """Return all numbers of it; those that the pairs cannot tell are `unmeasured`, with the reason."""
    if not len(pairs.margins_P):
        return unaccepted(why_none)
    right_P, longer_P = wins(pairs.margins_P), pairs.longer_P
    accuracy = of_shares(right_P, pairs.prompts_P)
    weight = length_weight(longer_P)
    by_rule_P = wins(weight * longer_P)
    over = of_differences(right_P - by_rule_P, pairs.prompts_P)
    temperature = best_temperature(pairs.margins_P)
    metrics = {
        "pairs": float(len(right_P)),
        "ties": float((pairs.margins_P == 0).mean()),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "longer_is_better": float(wins(longer_P).mean()),
        "length_weight": weight,
        "length_accuracy": float(by_rule_P.mean()),
        "over_length": over.value,
        "over_length_low": over.low,
        "ece": calibration_error(torch.from_numpy(pairs.margins_P)),
        "temperature": temperature,
        "ece_at_temperature": calibration_error(torch.from_numpy(pairs.margins_P / temperature)),
    }
    unmeasured = {}
    balanced = balanced_accuracy(right_P, longer_P, pairs)
    if isinstance(balanced, Interval):
        metrics |= {"balanced": balanced.value, "balanced_low": balanced.low}
    else:
        unmeasured = {f"{PREFIX}balanced": balanced, f"{PREFIX}balanced_low": balanced}
    named = _by_reason(right_P, pairs)
    for row in named:
        metrics |= {f"{key}_{row['name']}": float(row[key]) for key in ("pairs", "accuracy")}
        metrics |= {f"accuracy_{row['name']}_low": float(row["low"])}
    tables = {
        "by_source": _by_group(right_P, pairs.sources_P, pairs),
        "by_kind": _by_group(right_P, pairs.kinds_P, pairs),
        "by_length_difference": _by_length(right_P, pairs),
        **({"by_reason": named} if named else {}),
    }
    return Findings(
        metrics={f"{PREFIX}{name}": value for name, value in metrics.items()}, unmeasured=unmeasured, tables=tables
    )


def unaccepted(why: str) -> Findings:
    """No number of it, for one reason."""
    return Findings(unmeasured=dict.fromkeys(_NAMES, why))


_NAMES = tuple(
    f"{PREFIX}{name}"
    for name in (
        *("pairs", "ties", "accuracy", "accuracy_low", "accuracy_high", "balanced", "balanced_low"),
        *("longer_is_better", "length_weight", "length_accuracy", "over_length", "over_length_low"),
        *("ece", "temperature", "ece_at_temperature"),
    )
)
"""All that `acceptance` measures."""


def wilson(share: float, observations: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which has a width also where all observations agree: 3 of 3 may be 0.44
    in truth."""
    if observations <= 0:
        return 0.0, 1.0
    scale = 1 + _Z**2 / observations
    center = share + _Z**2 / (2 * observations)
    width = _Z * math.sqrt(max(0.0, share * (1 - share) / observations) + _Z**2 / (4 * observations**2))
    return (center - width) / scale, (center + width) / scale


def of_shares(values_P: np.ndarray, prompts_P: np.ndarray, *, observations: float | None = None) -> Interval:
    """The mean of values between 0 and 1, whose observations are the prompts unless something else is said."""
    found = interval(values_P, prompts_P)
    assert found is not None
    low, high = wilson(found.value, len(set(prompts_P.tolist())) if observations is None else observations)
    return replace(found, low=min(found.low, low), high=max(found.high, high))


def of_differences(values_P: np.ndarray, prompts_P: np.ndarray) -> Interval:
    """The mean of differences of two shares: only prompts for which the two differ tell which one is better."""
    found = interval(values_P, prompts_P)
    assert found is not None
    size = float(np.abs(values_P).mean())
    differ_P = values_P != 0
    if not differ_P.any():
        return found
    better = float(values_P[values_P > 0].sum()) / float(np.abs(values_P).sum())
    low, high = wilson(better, len(set(prompts_P[differ_P].tolist())))
    return replace(found, low=min(found.low, size * (2 * low - 1)), high=max(found.high, size * (2 * high - 1)))


def balanced_accuracy(right_P: np.ndarray, longer_P: np.ndarray, pairs: JudgedPairs) -> Interval | str:
    """Return it with its interval, or why these pairs cannot tell it."""
    is_longer_P, is_shorter_P = longer_P > 0, longer_P < 0
    counts = int(is_longer_P.sum()), int(is_shorter_P.sum())
    if min(counts) < _LEAST:
        return (
            f"the chosen answer is longer in {counts[0]} held-out pairs and shorter in {counts[1]}; to tell length "
            f"from quality takes at least {_LEAST} of both"
        )
    # Each side counts one half, whatever its size: the mean of these values is the mean of both accuracies.
    told_P = is_longer_P | is_shorter_P
    total = counts[0] + counts[1]
    values_P = np.where(is_longer_P, right_P * total / (2 * counts[0]), right_P * total / (2 * counts[1]))
    # The variance of the mean of two means: as of so many observations of a single one.
    prompts = [len(set(pairs.prompts_P[side_P].tolist())) for side_P in (is_longer_P, is_shorter_P)]
    return of_shares(values_P[told_P], pairs.prompts_P[told_P], observations=4 / sum(1 / count for count in prompts))


def length_weight(longer_P: np.ndarray) -> float:
    """The weight w of the logistic model P(chosen) = sigmoid(w d / s) of the difference d of lengths, in units of its
    spread s: the best that can be told from length alone. Above 0, longer answers are better.

    Maximum likelihood by bisection of its derivative, which falls. Where length tells every pair there is no maximum.
    """
    spread = float(np.sqrt(np.mean(longer_P.astype(np.float64) ** 2)))
    if spread == 0:
        return 0.0
    x_P = longer_P / spread
    return _root(lambda w: float((x_P / (1 + np.exp(np.clip(w * x_P, -700, 700)))).sum()), -50.0, 50.0)


def best_temperature(margins_P: np.ndarray) -> float:
    """The T at which sigmoid(margin / T) is likeliest (Guo et al. 2017, section 4.2), between 0.01 and 100.

    Found over 1 / T, in which the likelihood has one maximum.
    """
    inverse = _root(
        lambda b: float((margins_P / (1 + np.exp(np.clip(b * margins_P, -700, 700)))).sum()),
        1 / _HOTTEST,
        1 / _COLDEST,
    )
    return 1 / inverse


def _root(falling: Any, low: float, high: float) -> float:
    """Where a function that falls crosses zero; the nearer end where it does not."""
    if falling(low) <= 0:
        return low
    if falling(high) >= 0:
        return high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _by_group(right_P: np.ndarray, groups_P: np.ndarray, pairs: JudgedPairs) -> list[dict[str, Any]]:
    names = sorted(set(groups_P.tolist()))
    return [_row(str(name), groups_P == name, right_P, pairs) for name in names[:_LONGEST_TABLE]]


def _by_reason(right_P: np.ndarray, pairs: JudgedPairs) -> list[dict[str, Any]]:
    """By what raters found the chosen answer better in, and the pairs of which nobody said; nothing where none has a
    reason. A pair with two reasons is in both rows."""
    if not pairs.reasons_P.any():
        return []
    groups = by_area(pairs.reasons_P)
    return [_row(name, inside_P, right_P, pairs) for name, inside_P in groups.items() if inside_P.any()]


def _by_length(right_P: np.ndarray, pairs: JudgedPairs) -> list[dict[str, Any]]:
    """By quarters of the pairs, from those whose chosen answer is much shorter to those where it is much longer."""
    longer_P = pairs.longer_P
    edges = np.quantile(longer_P, [0.25, 0.5, 0.75])
    quarters_P = np.searchsorted(edges, longer_P, side="left")
    rows = []
    for quarter in range(4):
        inside_P = quarters_P == quarter
        if inside_P.any():
            low, high = int(longer_P[inside_P].min()), int(longer_P[inside_P].max())
            rows.append(_row(f"{low:+d} to {high:+d} tokens", inside_P, right_P, pairs))
    return rows


def _row(name: str, inside_P: np.ndarray, right_P: np.ndarray, pairs: JudgedPairs) -> dict[str, Any]:
    found = of_shares(right_P[inside_P], pairs.prompts_P[inside_P])
    numbers = {"accuracy": found.value, "low": found.low, "high": found.high}
    return {"name": name, "pairs": found.items, **{key: round(value, 6) for key, value in numbers.items()}}


def best_of_n(proxy_KN: np.ndarray, gold_KN: np.ndarray, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Expected scores of the best of n by the proxy, for prompts with N answers each, against the KL that it costs.

    Exact over all subsets of n of the N answers: the answer of rank i (from the worst, 1) is the best of a subset with
    probability C(i-1, n-1) / C(N, n). KL = ln n - (n-1)/n (Stiennon et al. 2020, appendix G.3; Gao et al. 2022),
    which is the most that it can be (Beirami et al. 2024, arXiv:2401.01879). Both gains are over one answer, in units
    of the spread of that scorer over all answers.
    """
    order_KN = np.argsort(proxy_KN, axis=1, kind="stable")
    gold_KN = np.take_along_axis(gold_KN, order_KN, axis=1)
    proxy_KN = np.take_along_axis(proxy_KN, order_KN, axis=1)
    total = proxy_KN.shape[1]
    rows = []
    for n in sizes:
        chances_N = np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
        gains = {
            name: float(((scores @ chances_N) - scores.mean(axis=1)).mean() / (scores.std() or 1.0))
            for name, scores in (("proxy", proxy_KN), ("gold", gold_KN))
        }
        rows.append({"n": float(n), "kl": math.log(n) - (n - 1) / n, **gains})
    return rows


def best_of_gain(proxy_KN: np.ndarray, gold_KN: np.ndarray) -> Interval | None:
    """By how much the best of all N by the proxy is better than one answer by the gold scorer, over prompts, in units
    of its spread."""
    best_K = np.argmax(proxy_KN, axis=1)
    gains_K = (gold_KN[np.arange(len(gold_KN)), best_K] - gold_KN.mean(axis=1)) / (gold_KN.std() or 1.0)
    return interval(gains_K, np.arange(len(gains_K)))
