"""Estimators of the distance between two policies, and what keeps it near a target.

k1, k2 and k3 have their names from Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), which
numbers no equations. It is about values. That gradients are another matter is shown by Liu et al. 2025
(arXiv:2510.01555): k1 in the reward and k2 in the loss have the same one (theorem 5.1).
"""

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """KL(p||q) estimator log p - log q for samples of p: unbiased, may be negative. Schulman 2020."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """KL(p||q) estimator (log p - log q)^2 / 2: biased, never negative. Schulman 2020.

    As a loss on samples of p, which are not differentiated, its expected gradient is that of KL(p||q):
    E_p[(log p - log q) grad log p].
    """
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """KL(p||q) estimator (q/p - 1) - log(q/p) with log_ratio = log p - log q: unbiased and never negative.
    Schulman 2020; in the loss of GRPO, Shao et al. 2024 (arXiv:2402.03300), eq. 4.

    As a loss on samples of p, which are not differentiated, its expected gradient is that of the *other* divergence:
    E_p[(1 - q/p) grad log p] = -E_q[grad log p], the gradient of KL(q||p).
    """
    # expm1 keeps the digits near 0, where policies usually are and exp(x) - 1 would cancel.
    return torch.expm1(-log_ratio) + log_ratio


def adapted_kl_coefficient(coefficient: float, *, kl: float, target: float, horizon: int, num_responses: int) -> float:
    """Proportional controller in log space, error clipped to +-0.2. Ziegler et al. 2019 (arXiv:1909.08593), section
    2.2; the gain K_beta, which is 0.1 there, is `num_responses` / `horizon`."""
    # Clipped, so that one odd rollout cannot move the coefficient far; it reacts over `horizon` responses.
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * num_responses / horizon)
