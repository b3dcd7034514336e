"""Estimators of advantages against arithmetic that a reader can redo by hand."""

import numpy as np
import pytest
import torch

from stages.losses.advantages import gae, whiten


def test_gae_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=7), rng.normal(size=7)
    gamma, lam = 0.9, 0.7
    deltas = [rewards[t] + gamma * (values[t + 1] if t < 6 else 0.0) - values[t] for t in range(7)]
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(7 - t)) for t in range(7)]
    result = gae(rewards_R=torch.tensor(rewards), values_R=torch.tensor(values), gamma=gamma, gae_lambda=lam)
    assert result.advantages_R.tolist() == pytest.approx(expected)
    assert result.returns_R.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=True)])


def test_gae_of_one_token_by_hand() -> None:
    result = gae(rewards_R=torch.tensor([2.0]), values_R=torch.tensor([0.5]), gamma=1.0, gae_lambda=0.95)
    assert result.advantages_R.item() == 1.5
    assert result.returns_R.item() == 2.0


def test_whitening_one_element_stays_finite() -> None:
    assert whiten(torch.tensor([3.0]), mean=3.0, std=0.0).item() == 0.0
