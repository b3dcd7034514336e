"""How much better a token did than expected.

Shape legend: R tokens of one response, N tokens of all responses.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Per token of one response."""

    advantages_R: Tensor
    returns_R: Tensor


def gae(*, rewards_R: Tensor, values_R: Tensor, gamma: float, gae_lambda: float) -> Advantages:
    """Generalised advantage estimation of one finished response (value 0 after its end).

    Schulman et al. 2015 (arXiv:1506.02438), eq. 16: A_t = sum_k (gamma lambda)^k delta_{t+k}.
    """
    # From the end, because A_t = delta_t + gamma lambda A_{t+1}. A response cut at its length counts as finished too:
    # there is no value after its last token, and `missing_eos_penalty` is in the rewards already.
    advantages_R = torch.zeros_like(rewards_R)
    next_value, running = 0.0, 0.0
    for t in range(len(rewards_R) - 1, -1, -1):
        delta = rewards_R[t] + gamma * next_value - values_R[t]
        running = delta + gamma * gae_lambda * running
        advantages_R[t] = running
        next_value = values_R[t]
    return Advantages(advantages_R, advantages_R + values_R)


def explained_variance(returns_N: np.ndarray, values_N: np.ndarray) -> float:
    """Return 1 - Var(returns - values) / Var(returns), as in OpenAI baselines: 1 for perfect predictions, 0 for
    constant ones and where returns do not vary."""
    variance = float(returns_N.var())
    return 1.0 - float((returns_N - values_N).var()) / variance if variance else 0.0


def whiten(values_N: Tensor, *, mean: float, std: float) -> Tensor:
    """Shift and scale by statistics taken over all ranks; a spread of zero leaves the values centred and finite."""
    # The caller takes the statistics over the whole rollout: over a micro-batch they would depend on the layout.
    return (values_N - mean) / (std + 1e-8)
