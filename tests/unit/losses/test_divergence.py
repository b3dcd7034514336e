"""KL estimators and the controller against arithmetic that a reader can redo by hand."""

import math
from typing import Any

import pytest
import torch

from stages.losses.divergence import adapted_kl_coefficient, k1, k2, k3


def test_k3_is_never_negative_and_zero_only_at_equality() -> None:
    log_ratio = torch.linspace(-5, 5, 101)
    assert (k3(log_ratio) >= 0).all()
    assert k3(torch.tensor(0.0)).item() == 0
    assert k3(torch.tensor(1.0)).item() == pytest.approx(math.exp(-1) - 1 + 1)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    # p twice as likely as q: the log-ratio is ln 2, q/p is 1/2
    [(k1, math.log(2), 1.0), (k2, math.log(2) ** 2 / 2, math.log(2)), (k3, 1 / 2 - 1 + math.log(2), 1 - 1 / 2)],
    ids=["k1", "k2", "k3"],
)
def test_an_estimate_and_its_slope_by_hand_at_the_start_and_away_from_it(
    estimator: Any, value: float, slope: float
) -> None:
    log_ratio = torch.tensor([0.0, math.log(2)], dtype=torch.float64, requires_grad=True)
    estimates = estimator(log_ratio)
    assert estimates.tolist() == pytest.approx([0.0, value])
    (slopes,) = torch.autograd.grad(estimates.sum(), log_ratio)
    # Where both agree, as at the start of training, only k1 has a slope; its mean over samples is zero.
    assert slopes.tolist() == pytest.approx([1.0 if estimator is k1 else 0.0, slope])


def test_kl_controller_within_its_bounds_by_hand() -> None:
    # 6.6 of 6 is 10 % too much; a gain of 20 / 200 = 0.1, as in the paper: 0.5 x (1 + 0.1 x 0.1)
    def adapt(kl: float) -> float:
        return adapted_kl_coefficient(0.5, kl=kl, target=6.0, horizon=200, num_responses=20)

    assert adapt(6.6) == pytest.approx(0.505)
    assert adapt(5.4) == pytest.approx(0.495)
    assert adapt(7.2) == adapt(9.0) == pytest.approx(0.51)
    assert adapt(4.8) == adapt(1.0) == pytest.approx(0.49)


def test_kl_controller_reacts_to_both_sides_and_is_bounded() -> None:
    def adapt(kl: float) -> float:
        return adapted_kl_coefficient(0.1, kl=kl, target=6.0, horizon=100, num_responses=10)

    assert adapt(6.0) == pytest.approx(0.1)
    assert adapt(100.0) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adapt(0.0) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)


def on_average(estimator: Any) -> tuple[float, list[float]]:
    """An estimator's expectation over samples of P, and the expectation of its gradient, samples held fixed."""
    logits = P.log().requires_grad_()
    values = estimator(logits.log_softmax(0) - Q.log())
    mean = (P * values).sum()
    return mean.item(), torch.autograd.grad(mean, logits)[0].tolist()


def gradient_of(divergence: Any) -> list[float]:
    logits = P.log().requires_grad_()
    return torch.autograd.grad(divergence(logits.softmax(0)), logits)[0].tolist()


def test_k1_and_k3_are_unbiased_and_their_gradients_are_none_and_that_of_the_reverse_divergence() -> None:
    forward = float((P * (P / Q).log()).sum())
    value, gradient = on_average(k1)
    assert value == pytest.approx(forward)
    assert gradient == pytest.approx([0, 0, 0], abs=1e-12)
    value, gradient = on_average(k3)
    assert value == pytest.approx(forward)
    assert gradient == pytest.approx(gradient_of(lambda p: (Q * (Q / p).log()).sum()))


def test_k2_is_biased_and_has_the_gradient_of_the_divergence_that_rewards_penalise() -> None:
    value, gradient = on_average(k2)
    assert value == pytest.approx(float((P * 0.5 * (P / Q).log().square()).sum()))
    assert gradient == pytest.approx(gradient_of(lambda p: (p * (p / Q).log()).sum()))
    assert k2(torch.tensor([-0.4, 0.0])).tolist() == pytest.approx([0.08, 0.0])
