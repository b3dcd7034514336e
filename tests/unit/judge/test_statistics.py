"""Intervals and comparisons: the rates that they promise, on simulated models, and values that a reader can redo."""

import time
from dataclasses import asdict

import numpy as np
import pytest

from stages.config.closing import PromoteConfig
from stages.config.decision import Candidate, Champion, decide
from stages.config.evaluation import Compared, Evaluation, MeasuredChampion, SuiteResult
from stages.judge.scores import Column
from stages.judge.statistics import Comparison, compare, interval

LEVEL, POWER = 0.05, 0.9
ITEMS = 700
"""What docs/EVALUATION.md states for five points of accuracy where one item in six changes."""


def column(values: np.ndarray, clusters: np.ndarray | None = None) -> Column:
    items = np.array([f"item-{number:05}" for number in range(len(values))], dtype=object)
    return Column(items, items if clusters is None else clusters, values)


def pairs_of_models(rng: np.random.Generator, *, items: int, gain: float, changed: float = 1 / 6) -> list[Column]:
    """Right and wrong answers of a candidate and a champion, which agree on most items, as two models of one family do:
    `changed` is the share of items on which they differ."""
    both_right = 0.6 - changed / 2
    kinds = rng.choice(4, size=items, p=[both_right, (changed + gain) / 2, (changed - gain) / 2, 0.4 - changed / 2])
    return [column(np.isin(kinds, right).astype(float)) for right in ((0, 1), (0, 2))]


def found(candidate: Column, champion: Column, *, level: float = LEVEL) -> Comparison:
    comparison = compare(candidate, champion, level=level, power=POWER)
    assert comparison is not None
    return comparison


def is_promoted(comparison: Comparison) -> bool:
    """By the rule that promotes, and not by a copy of it."""
    evaluation = Evaluation(
        metrics={},
        suites={"pairs": SuiteResult(metric="accuracy", better="higher")},
        comparisons=(Compared(role="dpo", against="champion", suite="pairs", **asdict(comparison)),),
        champion=MeasuredChampion(version="4", fingerprint="old"),
    )
    config = PromoteConfig(level=comparison.level, power=POWER)
    return decide([Candidate("dpo", "new")], Champion("4", "old"), evaluation, config).promoted


def wins(candidate: Column, champion: Column) -> bool:
    """Whether the rule promotes. A candidate that is not ahead by its mean cannot have an interval above zero: half of
    all ties need no comparison."""
    return bool(candidate.values.mean() > champion.values.mean()) and is_promoted(found(candidate, champion))


def test_who_is_not_ahead_is_not_promoted() -> None:
    better, worse = (column(np.repeat([1.0, 0.0], counts)) for counts in ((80, 20), (20, 80)))
    assert is_promoted(found(better, worse))
    assert not is_promoted(found(worse, better))
    assert not is_promoted(found(better, better))


def promoted_share(rng: np.random.Generator, times: int, *, items: int, gain: float) -> float:
    return sum(wins(*pairs_of_models(rng, items=items, gain=gain)) for _ in range(times)) / times


@pytest.mark.slow
@pytest.mark.parametrize("items", [30, 100, 500])
def test_a_thousand_ties_promote_at_most_at_the_stated_level(items: int) -> None:
    assert promoted_share(np.random.default_rng(items), 1000, items=items, gain=0.0) <= LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [PromoteConfig().min_items, 50])
def test_a_thousand_ties_of_continuous_scores_in_clusters_promote_at_most_at_the_stated_level(prompts: int) -> None:
    """Four answers to each prompt share what the prompt does to both models, and heavy tails."""
    rng = np.random.default_rng(prompts)
    clusters = np.array([f"prompt-{number // 4}" for number in range(4 * prompts)], dtype=object)

    def model(shared: np.ndarray) -> Column:
        own = np.repeat(rng.standard_t(4, size=prompts), 4)
        return column(shared + own + rng.normal(size=4 * prompts), clusters)

    promoted = 0
    for _ in range(1000):
        shared = rng.normal(scale=3.0, size=4 * prompts)
        promoted += wins(model(shared), model(shared))
    assert promoted / 1000 <= LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("items", [PromoteConfig().min_items, 30])
def test_a_thousand_ties_with_skewed_differences_promote_at_most_at_the_stated_level(items: int) -> None:
    """A candidate that is a little better on most items and much worse on few, with a mean of zero: a reward model's
    scores do that. Without a bound that allows for it, one in ten was promoted."""
    rng = np.random.default_rng(items)
    level = column(np.zeros(items))
    promoted = sum(wins(column(1.0 - rng.exponential(size=items)), level) for _ in range(1000))
    assert promoted / 1000 <= LEVEL


@pytest.mark.slow
def test_a_true_gain_of_five_points_is_promoted_with_the_stated_power_at_the_stated_items() -> None:
    assert promoted_share(np.random.default_rng(1), 1000, items=ITEMS, gain=0.05) >= POWER


@pytest.mark.slow
def test_far_fewer_items_do_not_find_it() -> None:
    assert promoted_share(np.random.default_rng(2), 300, items=ITEMS // 4, gain=0.05) < 0.6


@pytest.mark.slow
def test_the_needed_items_are_those_that_find_the_gain() -> None:
    """(1.6449 + 1.2816)^2 x (1/6 - 0.05^2) / 0.05^2 = 562, whatever the number of items that it is estimated from. The
    exact test finds a little less, so ITEMS is more."""
    rng = np.random.default_rng(3)
    needed = [
        compare(*pairs_of_models(rng, items=300, gain=0.02), level=LEVEL, power=POWER, least_difference=0.05)
        for _ in range(100)
    ]
    asked = [one.needed_items for one in needed if one and one.needed_items and one.difference <= 0.05]
    assert len(asked) > 80
    assert float(np.median(asked)) == pytest.approx(562, rel=0.1)


def test_needed_items_by_hand() -> None:
    """Differences of +1, 0, 0, 0 on and on: mean 1/4, standard deviation 0.433. (1.6449 + 1.2816) x 0.433 / 0.25 is
    5.07, squared 25.7; with the factor 100/99 of the clusters, 26."""
    a, b = column(np.tile([1.0, 0, 0, 0], 25)), column(np.zeros(100))
    comparison = found(a, b)
    assert (comparison.difference, comparison.needed_items) == (0.25, 26)
    assert found(b, a).needed_items is None, "a model that is worse cannot be found to be better"


def test_models_that_do_not_differ_have_p_one_and_nothing_to_find() -> None:
    a = column(np.random.default_rng(0).normal(size=50))
    comparison = found(a, a)
    assert (comparison.difference, comparison.low, comparison.high, comparison.p) == (0, 0, 0, 1)
    assert comparison.needed_items is None


def test_three_better_answers_of_thirty_are_what_a_coin_does_once_in_eight() -> None:
    comparison = found(column(np.repeat([1.0, 0.0], [3, 27])), column(np.zeros(30)))
    assert comparison.p == pytest.approx(1 / 8, abs=0.01)
    assert not is_promoted(comparison)
    assert found(column(np.repeat([1.0, 0.0], [6, 24])), column(np.zeros(30))).p == pytest.approx(1 / 64, abs=0.004)


def test_where_lower_is_better_p_is_about_the_fall() -> None:
    rng = np.random.default_rng(4)
    before, after = column(rng.normal(1.0, 0.1, size=60)), column(rng.normal(0.9, 0.1, size=60))
    falls = compare(after, before, better="lower")
    rises = compare(after, before, better="higher")
    assert falls is not None
    assert rises is not None
    assert (falls.difference, falls.low, falls.high) == (rises.difference, rises.low, rises.high)
    assert falls.p < 0.001
    assert rises.p > 0.999
    assert falls.needed_items is not None
    assert rises.needed_items is None


def test_only_items_that_both_have_are_compared_whatever_their_order() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=40)
    whole = column(values)
    order = rng.permutation(40)[:30]
    part = Column(whole.items[order], whole.clusters[order], values[order] - 1.0)
    comparison = found(whole, part)
    assert (comparison.items, comparison.clusters) == (30, 30)
    assert comparison.difference == pytest.approx(1.0)
    nothing = Column(np.array(["other"], dtype=object), np.array(["other"], dtype=object), np.array([1.0]))
    assert compare(whole, nothing) is None


def test_a_candidate_whose_wrong_answers_have_no_score_is_not_promoted() -> None:
    """Both are right on half of 400 items. What the candidate gets wrong has no score: on the rest it is ahead by half
    a point for each item, and that is no gain."""
    rng = np.random.default_rng(11)
    mine, theirs = (column((rng.random(400) < 0.5).astype(float)) for _ in range(2))
    right = mine.values == 1
    comparison = found(Column(mine.items[right], mine.clusters[right], mine.values[right]), theirs)
    assert comparison.missing == 400 - right.sum()
    assert comparison.difference == pytest.approx(0.5, abs=0.1)
    assert not is_promoted(comparison)
    assert found(mine, Column(theirs.items[:100], theirs.clusters[:100], theirs.values[:100])).missing == 0


def test_the_bound_is_lower_where_most_items_are_a_little_better_and_few_much_worse() -> None:
    """Nineteen of twenty gain 0.2, one loses 3: the mean is 0.04, and a sample without the one would say 0.2."""
    few_much_worse = column(np.tile(np.repeat([0.2, -3.0], [19, 1]), 5))
    upside_down = column(-few_much_worse.values)
    one, other = found(few_much_worse, column(np.zeros(100))), found(upside_down, column(np.zeros(100)))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.02)
    assert one.difference - one.low > 1.3 * (one.high - one.difference)


def test_copies_of_an_item_make_an_interval_no_narrower() -> None:
    """Ten answers to each prompt that say the same are one piece of evidence, not ten."""
    rng = np.random.default_rng(6)
    once = rng.normal(0.2, size=40)
    prompts = np.array([f"prompt-{number}" for number in np.repeat(np.arange(40), 10)], dtype=object)
    zeros = np.zeros(400)
    single = found(column(once), column(np.zeros(40)))
    copied = found(column(np.repeat(once, 10), prompts), column(zeros, prompts))
    assert copied.clusters == 40
    assert (copied.low, copied.high, copied.p) == pytest.approx((single.low, single.high, single.p), abs=0.03)
    naive = found(column(np.repeat(once, 10)), column(zeros))
    assert naive.high - naive.low < 0.5 * (copied.high - copied.low)


@pytest.mark.slow
def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        values = rng.exponential(size=100)
        known = interval(values, column(values).items)
        assert known is not None
        covered += known.low <= 1.0 <= known.high
    assert covered / 1000 >= 0.92, "the mean of skewed values is the hardest; symmetric ones reach 0.95"


def test_an_interval_of_nothing_and_of_one_value() -> None:
    assert interval(np.empty(0), np.empty(0, dtype=object)) is None
    one = interval(np.array([3.0]), np.array(["a"], dtype=object))
    assert one is not None
    assert (one.value, one.low, one.high, one.items) == (3.0, 3.0, 3.0, 1)


def test_the_same_scores_give_the_same_numbers() -> None:
    a, b = pairs_of_models(np.random.default_rng(8), items=200, gain=0.05)
    assert found(a, b) == found(a, b)
    shuffled = np.random.default_rng(9).permutation(200)
    assert found(Column(a.items[shuffled], a.clusters[shuffled], a.values[shuffled]), b) == found(a, b)


def test_five_hundred_items_are_compared_in_a_moment() -> None:
    rng = np.random.default_rng(10)
    a, b = column(rng.normal(size=500)), column(rng.normal(size=500))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        found(a, b)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5, "50 ms on a quiet core"
