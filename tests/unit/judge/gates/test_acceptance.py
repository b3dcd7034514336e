"""A reward model's acceptance by numbers that a reader can redo: ties, length, shuffled labels, best of n."""

import math
from typing import Any

import numpy as np
import pytest

from stages.judge.gates.acceptance import (
    JudgedPairs,
    acceptance,
    best_of_gain,
    best_of_n,
    best_temperature,
    length_weight,
    wilson,
)
from stages.judge.gates.earlier import compared_with_earlier


def judged(margins: Any, longer: Any = None, **fields: Any) -> JudgedPairs:
    margins = np.asarray(margins, dtype=np.float64)
    longer = np.zeros(len(margins), dtype=np.int64) if longer is None else np.asarray(longer)
    known: dict[str, Any] = {
        "prompts_P": np.arange(len(margins)).astype(str),
        "sources_P": np.full(len(margins), "given", dtype=object),
        "kinds_P": np.full(len(margins), "given", dtype=object),
        "reasons_P": np.zeros(len(margins), dtype=np.uint8),
    }
    return JudgedPairs(
        chosen_P=margins,
        rejected_P=np.zeros(len(margins)),
        chosen_tokens_P=10 + longer,
        rejected_tokens_P=np.full(len(margins), 10),
        **{**known, **fields},
    )


def numbers(pairs: JudgedPairs) -> dict[str, float]:
    return {name.removeprefix("accept/"): value for name, value in acceptance(pairs).metrics.items()}


def test_ties_count_one_half():
    found = numbers(judged([2.0, 1.0, 0.0, -1.0]))
    assert (found["accuracy"], found["ties"], found["pairs"]) == (2.5 / 4, 0.25, 4)
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    swapped = numbers(judged([-2.0, -1.0, 0.0, 1.0]))
    assert swapped["accuracy"] == 1 - found["accuracy"]


def test_pairs_of_one_prompt_are_one_observation():
    """Forty copies of four pairs are known no better than the four."""
    margins = np.tile([1.0, 1.0, 1.0, -1.0], 40)
    apart = numbers(judged(margins))
    together = numbers(judged(margins, prompts_P=np.tile(["a", "b", "c", "d"], 40)))
    assert apart["accuracy"] == together["accuracy"] == 0.75
    assert apart["accuracy_low"] > 0.66
    assert together["accuracy_low"] < 0.5


def test_helpfulness_and_harmlessness_are_told_apart():
    """Right on both pairs that are only helpful, wrong on the harmless one, and right where both are named."""
    found = acceptance(judged([1.0, 2.0, -1.0, 1.0, 0.0], reasons_P=np.array([1, 1, 4, 5, 0], dtype=np.uint8)))
    shares = {row["name"]: (row["pairs"], row["accuracy"]) for row in found.tables["by_reason"]}
    assert shares == {"helpful": (3, 1.0), "harmless": (2, 0.5), "none": (1, 0.5)}
    told = {name: found.metrics[f"accept/{name}"] for name in ("pairs_helpful", "accuracy_harmless")}
    assert told == {"pairs_helpful": 3.0, "accuracy_harmless": 0.5}
    assert 0.4 < found.metrics["accept/accuracy_helpful_low"] < 0.5  # Wilson's interval of 3 of 3
    assert "accept/pairs_honest" not in found.metrics
    assert "by_reason" not in acceptance(judged([1.0, -1.0])).tables


@pytest.fixture
def lengths() -> np.ndarray:
    """Of 200 pairs three in four have a longer chosen answer, as people's preferences often do."""
    rng = np.random.default_rng(1)
    return np.where(np.arange(200) % 4 > 0, 1, -1) * rng.integers(1, 9, size=200)


def test_a_model_that_only_measures_length_passes_by_accuracy_and_fails_by_balanced_accuracy(lengths: np.ndarray):
    found = numbers(judged(0.3 * lengths, lengths))
    assert (found["accuracy"], found["longer_is_better"], found["length_accuracy"]) == (0.75, 0.75, 0.75)
    assert found["accuracy_low"] > 0.5
    assert (found["over_length"], found["over_length_low"]) == (0, 0)
    assert found["balanced"] == 0.5
    assert found["balanced_low"] < 0.5


def test_a_model_of_quality_passes_both_whatever_the_lengths(lengths: np.ndarray):
    rng = np.random.default_rng(2)
    margins = np.where(rng.random(200) < 0.8, 1.0, -1.0)
    found = numbers(judged(margins, lengths))
    assert found["accuracy_low"] > 0.5
    assert found["balanced_low"] > 0.5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_pairs_that_happen_to_be_told_right_are_no_proof(count: int):
    """A coin tells three of three right once in eight times."""
    found = numbers(judged([1.0] * count))
    assert found["accuracy"] == 1
    assert found["accuracy_low"] < 0.5
    assert found["over_length_low"] < 0.5
    assert numbers(judged([-1.0] * count))["accuracy_high"] > 0.5
    assert all(row["low"] < 0.5 for row in acceptance(judged([1.0] * count)).tables["by_kind"])


def test_many_pairs_of_one_prompt_told_right_are_no_proof_either():
    found = numbers(judged([1.0] * 40, np.array([1, -1] * 20), prompts_P=np.full(40, "one")))
    assert max(found["accuracy_low"], found["balanced_low"]) < 0.5


@pytest.mark.parametrize(("share", "count", "low"), [(1.0, 3, 0.4385), (1.0, 10, 0.7225), (0.5, 10, 0.2366)])
def test_the_interval_of_a_share_is_wilsons(share: float, count: int, low: float):
    """Of all right, n / (n + 1.96^2)."""
    assert wilson(share, count)[0] == pytest.approx(low, abs=1e-4)
    assert wilson(1 - share, count)[1] == pytest.approx(1 - low, abs=1e-4)


def test_only_pairs_for_which_quality_and_length_differ_tell_them_apart():
    """Two of twenty: both for the better, which a coin does once in four times."""
    longer = np.array([1] * 18 + [-1] * 2)
    found = numbers(judged(np.ones(20), longer))
    assert found["over_length"] == pytest.approx(0.1)
    assert found["over_length_low"] <= 0


def test_shuffled_labels_are_not_above_chance(lengths: np.ndarray):
    rng = np.random.default_rng(3)
    found = numbers(judged(rng.normal(size=200), lengths))
    assert found["accuracy_low"] < 0.5
    assert found["balanced_low"] < 0.5


def test_balanced_accuracy_is_the_mean_of_both_sides():
    longer = np.array([3] * 30 + [-3] * 10)
    margins = np.array([1.0] * 30 + [1.0] * 4 + [-1.0] * 6)
    found = numbers(judged(margins, longer))
    assert found["balanced"] == pytest.approx((30 / 30 + 4 / 10) / 2)


def test_where_answers_are_always_longer_length_cannot_be_told_from_quality():
    found = acceptance(judged(np.ones(50), np.ones(50, dtype=np.int64)))
    assert "accept/balanced_low" not in found.metrics
    assert found.unmeasured["accept/balanced_low"].startswith(
        "the chosen answer is longer in 50 held-out pairs and shorter in 0"
    )


def test_without_pairs_nothing_is_measured_and_the_reason_is_said():
    found = acceptance(judged([]))
    assert found.metrics == {}
    assert found.unmeasured["accept/accuracy_low"] == "there are no held-out preference pairs"


def test_the_fit_on_length_alone_goes_the_way_that_tells_more():
    shorter_is_better = np.array([-2, -3, -1, 4, -2])
    assert length_weight(shorter_is_better) < 0
    found = numbers(judged([1.0] * 5, shorter_is_better))
    assert (found["longer_is_better"], found["length_accuracy"]) == (0.2, 0.8)
    assert length_weight(np.zeros(4, dtype=np.int64)) == 0


def test_the_weight_of_length_is_the_maximum_of_the_likelihood(lengths: np.ndarray):
    spread = math.sqrt(np.mean(lengths.astype(float) ** 2))

    def likelihood(weight: float) -> float:
        return float(-np.log1p(np.exp(-weight * lengths / spread)).sum())

    weight = length_weight(lengths)
    assert likelihood(weight) > max(likelihood(weight - 0.01), likelihood(weight + 0.01))


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_the_temperature_undoes_the_scale_of_scores(scale: float):
    """Margins that are right with the probability that they claim have temperature 1; scaled ones, the scale."""
    rng = np.random.default_rng(4)
    claimed = rng.normal(scale=2.0, size=40_000)
    is_right = rng.random(len(claimed)) < 1 / (1 + np.exp(-np.abs(claimed)))
    margins = np.where(is_right, 1, -1) * np.abs(claimed)
    assert best_temperature(scale * margins) == pytest.approx(scale, rel=0.05)
    found = numbers(judged(scale * margins))
    assert found["ece_at_temperature"] < 0.02
    if scale != 1.0:
        assert found["ece"] > 5 * found["ece_at_temperature"]


def test_a_model_that_is_always_right_or_always_wrong_has_a_temperature_at_the_end():
    assert best_temperature(np.ones(5)) == pytest.approx(0.01)
    assert best_temperature(-np.ones(5)) == pytest.approx(100)


def test_accuracy_is_shown_by_source_by_kind_and_by_quarters_of_the_difference_of_lengths():
    longer = np.arange(-8, 8)
    pairs = judged(
        np.where(longer < 0, -1.0, 1.0),
        longer,
        sources_P=np.array(["a", "b"] * 8, dtype=object),
        kinds_P=np.array(["k"] * 16, dtype=object),
    )
    tables = acceptance(pairs).tables
    assert [(row["name"], row["pairs"], row["accuracy"]) for row in tables["by_source"]] == [
        ("a", 8, 0.5),
        ("b", 8, 0.5),
    ]
    assert [(row["name"], row["pairs"], row["accuracy"]) for row in tables["by_length_difference"]] == [
        ("-8 to -5 tokens", 4, 0.0),
        ("-4 to -1 tokens", 4, 0.0),
        ("+0 to +3 tokens", 4, 1.0),
        ("+4 to +7 tokens", 4, 1.0),
    ]
    assert [row["name"] for row in tables["by_kind"]] == ["k"]


def test_the_best_of_n_is_the_mean_over_all_subsets():
    from itertools import combinations

    rng = np.random.default_rng(5)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    (row,) = best_of_n(proxy, gold, (2,))
    best = [
        gold[k][max(subset, key=lambda i: proxy[k][i])] - gold[k].mean()
        for k in range(3)
        for subset in combinations(range(6), 2)
    ]
    assert row["gold"] == pytest.approx(np.mean(best) / gold.std())
    assert row["kl"] == pytest.approx(math.log(2) - 1 / 2)


def test_a_proxy_that_agrees_with_gold_gains_and_one_that_opposes_it_loses():
    rng = np.random.default_rng(6)
    gold = rng.normal(size=(40, 16))
    agreeing, opposed = best_of_n(gold, gold, (1, 4, 16)), best_of_n(-gold, gold, (1, 4, 16))
    assert agreeing[0]["gold"] == pytest.approx(0, abs=1e-12)
    assert agreeing[0]["gold"] < agreeing[1]["gold"] < agreeing[2]["gold"]
    assert opposed[2]["gold"] < 0 < opposed[2]["proxy"]
    gained, lost = best_of_gain(gold, gold), best_of_gain(-gold, gold)
    assert gained is not None
    assert lost is not None
    assert gained.low > 0 > lost.high


def test_the_gain_over_the_earlier_model_by_hand() -> None:
    # The new one tells 3 of 4 right, the earlier one 1 of 4 and a tie: 0.75 - 0.375.
    earlier = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 2.0]])
    found = compared_with_earlier(judged([1.0, 2.0, 3.0, -1.0]), earlier)
    assert found.metrics["accept/earlier_accuracy"] == 0.375
    assert found.metrics["accept/gain"] == 0.375
    assert found.metrics["accept/gain_low"] < 0.375 <= found.metrics["accept/gain_high"]
    same = compared_with_earlier(judged([1.0, -2.0]), np.array([[3.0, 0.0], [0.0, 4.0]]))
    assert (same.metrics["accept/gain"], same.metrics["accept/gain_low"]) == (0.0, 0.0)
    assert set(compared_with_earlier(judged([]), np.empty((0, 2))).unmeasured) == set(found.metrics)
