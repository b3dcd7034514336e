"""Estimators of advantages against arithmetic that a reader can redo by hand."""

import numpy as np
import pytest
import torch

from stages.losses.advantages import (
    decayed,
    explained_variance,
    gae,
    group_relative,
    leave_one_out,
    rewards_to_go,
    whiten,
)


@pytest.mark.parametrize(("length", "gamma", "lam"), [(1, 1.0, 1.0), (7, 0.9, 0.7), (40, 1.0, 0.95), (40, 0.99, 0.0)])
def test_gae_equals_brute_force(length: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(length)
    rewards, values = rng.normal(size=length), rng.normal(size=length)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]
    result = gae(rewards_R=torch.tensor(rewards), values_R=torch.tensor(values), gamma=gamma, gae_lambda=lam)
    assert result.advantages_R.tolist() == pytest.approx(expected, rel=0, abs=1e-10)
    returns = [a + v for a, v in zip(expected, values, strict=True)]
    assert result.returns_R.tolist() == pytest.approx(returns, rel=0, abs=1e-10)


def test_gae_of_three_tokens_by_hand() -> None:
    # deltas 4/2 - 2 = 0, 8/2 - 4 = 0, 16 - 8 = 8; each token further back discounts by gamma lambda = 1/4
    result = gae(
        rewards_R=torch.tensor([0.0, 0.0, 16.0]), values_R=torch.tensor([2.0, 4.0, 8.0]), gamma=0.5, gae_lambda=0.5
    )
    assert result.advantages_R.tolist() == [0.5, 2.0, 8.0]
    assert result.returns_R.tolist() == [2.5, 6.0, 16.0]


def test_gae_of_one_token_by_hand() -> None:
    result = gae(rewards_R=torch.tensor([2.0]), values_R=torch.tensor([0.5]), gamma=1.0, gae_lambda=0.95)
    assert result.advantages_R.item() == 1.5
    assert result.returns_R.item() == 2.0


def test_whitened_values_are_spreads_from_the_mean() -> None:
    assert whiten(torch.tensor([5.0, 1.0]), mean=2.0, std=4.0).tolist() == pytest.approx([0.75, -0.25])


def test_whitening_one_element_stays_finite() -> None:
    assert whiten(torch.tensor([3.0]), mean=3.0, std=0.0).item() == 0.0


def test_the_baseline_of_a_response_is_the_mean_of_the_others() -> None:
    # (0 + 4) / 2 = 2, (1 + 4) / 2 = 2.5, (1 + 0) / 2 = 0.5
    assert leave_one_out(np.array([1.0, 0.0, 4.0])).tolist() == [-1.0, -2.5, 3.5]
    rewards = np.random.default_rng(0).normal(size=5)
    assert leave_one_out(rewards + 7.0) == pytest.approx(leave_one_out(rewards)), "a shift of all is no advantage"
    # With itself in the mean every advantage would be smaller by (G - 1) / G.
    assert leave_one_out(rewards) * 4 / 5 == pytest.approx(group_relative(rewards, divide_by_std=False))


def test_a_group_is_centred_and_on_request_scaled_by_its_own_spread() -> None:
    # mean 2, squared distances 1, 1, 4, 4: spread sqrt(2.5)
    rewards = np.array([1.0, 3.0, 0.0, 4.0])
    assert group_relative(rewards, divide_by_std=False).tolist() == [-1, 1, -2, 2]
    expected = np.array([-1, 1, -2, 2]) / np.sqrt(2.5)
    assert group_relative(rewards, divide_by_std=True) == pytest.approx(expected, rel=1e-5)
    assert group_relative(np.full(3, 0.1), divide_by_std=True) == pytest.approx([0, 0, 0], abs=1e-9)


def test_the_explained_variance_by_hand() -> None:
    # variance of the returns (1 + 1) / 2 = 1, of the errors (0.25 + 0.25) / 2
    assert explained_variance(np.array([1.0, 3.0]), np.array([1.5, 2.5])) == pytest.approx(0.75)
    assert explained_variance(np.array([1.0, 3.0]), np.array([7.0, 7.0])) == 0.0
    assert explained_variance(np.array([2.0, 2.0]), np.array([1.0, 3.0])) == 0.0


def test_rewards_to_go_are_those_from_a_token_to_the_end() -> None:
    assert rewards_to_go(torch.tensor([1.0, -2.0, 4.0])).tolist() == [3.0, 2.0, 4.0]


def test_a_decayed_average_starts_with_its_first_value() -> None:
    assert decayed(None, 2.0, decay=0.9) == 2.0
    assert decayed(2.0, 4.0, decay=0.75) == 2.5
