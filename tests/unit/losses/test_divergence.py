"""KL estimators and the controller against arithmetic that a reader can redo by hand."""

import math

import pytest
import torch

from stages.losses.divergence import adapted_kl_coefficient, k3


def test_k3_is_never_negative_and_zero_only_at_equality() -> None:
    log_ratio = torch.linspace(-5, 5, 101)
    assert (k3(log_ratio) >= 0).all()
    assert k3(torch.tensor(0.0)).item() == 0
    assert k3(torch.tensor(1.0)).item() == pytest.approx(math.exp(-1) - 1 + 1)


def test_kl_controller_reacts_to_both_sides_and_is_bounded() -> None:
    def adapt(kl: float) -> float:
        return adapted_kl_coefficient(0.1, kl=kl, target=6.0, horizon=100, num_responses=10)

    assert adapt(6.0) == pytest.approx(0.1)
    assert adapt(100.0) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adapt(0.0) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
