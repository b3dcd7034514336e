"""Win rates at equal length, on verdicts whose cause is known."""

import numpy as np
import pytest

from stages.judge.length_control import RIDGE, length_controlled


def clusters(number: int) -> np.ndarray:
    return np.array([str(index) for index in range(number)], dtype=object)


def test_without_a_difference_in_length_it_is_the_plain_win_rate() -> None:
    wins = np.array([1.0] * 30 + [0.0] * 10 + [0.5] * 20)
    found = length_controlled(wins, np.full(60, 80.0), np.full(60, 80.0), clusters(60))
    assert found is not None
    assert found.win_rate == pytest.approx(40 / 60, abs=1e-4)
    assert found.per_length == pytest.approx(0, abs=1e-9)
    # The plain interval of a mean with this spread: 0.667 +- 1.96 * 0.373 / sqrt(60).
    assert (found.low, found.high) == (pytest.approx(0.572, abs=0.03), pytest.approx(0.761, abs=0.03))


def test_two_groups_of_lengths_have_a_solution_by_hand() -> None:
    """Where the difference is +d the model wins 3 of 4, where it is -d 1 of 4: the lengths explain everything, and at
    equal length it wins one half. The coefficient is logit(3/4) / tanh(1)."""
    wins = np.array(([1.0, 1.0, 1.0, 0.0] * 25) + ([1.0, 0.0, 0.0, 0.0] * 25))
    longer = np.array([20.0] * 100 + [-20.0] * 100)
    found = length_controlled(wins, 100 + longer, np.full(200, 100.0), clusters(200))
    assert found is not None
    assert found.win_rate == pytest.approx(0.5, abs=1e-6)
    assert found.per_length == pytest.approx(np.log(3) / np.tanh(1), rel=1e-3)


def test_a_model_that_only_writes_more_loses_its_lead_and_one_that_is_better_keeps_it() -> None:
    rng = np.random.default_rng(0)
    difference = rng.normal(30, 30, size=4000)
    feature = np.tanh(difference / difference.std())
    for gain in (0.0, 0.8):
        wins = (rng.random(4000) < 1 / (1 + np.exp(-(gain + 1.5 * feature)))).astype(float)
        found = length_controlled(wins, 100 + difference, np.full(4000, 100.0), clusters(4000))
        assert found is not None
        assert wins.mean() > 0.65  # the plain win rate praises both
        assert found.low < 1 / (1 + np.exp(-gain)) < found.high
        assert found.high - found.low < 0.09
        assert found.per_length == pytest.approx(1.5, abs=0.25)


def test_verdicts_that_length_separates_stay_finite() -> None:
    wins = np.array([1.0] * 20 + [0.0] * 20)
    lengths = np.array([200.0] * 20 + [50.0] * 20)
    found = length_controlled(wins, lengths, np.full(40, 100.0), clusters(40))
    assert found is not None
    assert all(np.isfinite([found.win_rate, found.low, found.high, found.per_length]))
    every = length_controlled(np.ones(40), lengths, np.full(40, 100.0), clusters(40))
    assert every is not None
    assert 0.99 < every.win_rate <= 1.0
    assert every.per_length < 1 / RIDGE


def test_exchanging_the_models_mirrors_the_win_rate() -> None:
    rng = np.random.default_rng(1)
    wins = rng.choice([0.0, 0.5, 1.0], size=80)
    mine, theirs = rng.integers(10, 200, size=80).astype(float), rng.integers(10, 200, size=80).astype(float)
    one = length_controlled(wins, mine, theirs, clusters(80))
    other = length_controlled(1 - wins, theirs, mine, clusters(80))
    assert one is not None
    assert other is not None
    assert one.win_rate + other.win_rate == pytest.approx(1, abs=1e-6)


def test_verdicts_of_one_prompt_widen_the_interval_and_few_verdicts_have_none() -> None:
    wins = np.array(([1.0] * 10 + [0.0] * 10) * 2)
    lengths, same = np.full(40, 9.0), np.full(40, 9.0)
    apart = length_controlled(wins, lengths, same, clusters(40))
    grouped = length_controlled(wins, lengths, same, np.array([str(index // 10) for index in range(40)], dtype=object))
    assert apart is not None
    assert grouped is not None
    assert grouped.high - grouped.low > 1.5 * (apart.high - apart.low)
    assert length_controlled(wins[:3], lengths[:3], same[:3], clusters(3)) is None
