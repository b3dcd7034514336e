"""How much better a token did than expected.

Shape legend: R tokens of one response, N tokens of all responses, G responses to one prompt.
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

    Schulman et al. 2015 (arXiv:1506.02438), eq. 16: A_t = sum_k (gamma lambda)^k delta_{t+k}. With an end: Schulman et
    al. 2017 (arXiv:1707.06347), eq. 11 and 12.
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


def leave_one_out(rewards_G: np.ndarray) -> np.ndarray:
    """Return each reward minus the mean of the others. REINFORCE Leave-One-Out, Ahmadian et al. 2024
    (arXiv:2402.14740), section 2.3: the estimator after eq. 8, which has no number of its own. The baseline does not
    depend on the response itself, so it adds no bias."""
    others_G = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    return rewards_G - others_G


def group_relative(rewards_G: np.ndarray, *, divide_by_std: bool) -> np.ndarray:
    """Return each reward minus the mean of its group, in units of the group's spread on request.

    With it: GRPO with outcome rewards, Shao et al. 2024 (arXiv:2402.03300), section 4.1.2. Without: Dr. GRPO, Liu et
    al. 2025 (arXiv:2503.20783), section 3.2; section 3.1 shows that the division weighs prompts by how alike their
    responses are.
    """
    centred_G = rewards_G - rewards_G.mean()
    # The spread of the group itself, not an estimate for a population. A group of equal rewards teaches nothing: the
    # small constant keeps its zeros at zero.
    return centred_G / (rewards_G.std() + 1e-6) if divide_by_std else centred_G


def rewards_to_go(rewards_R: Tensor) -> Tensor:
    """Return at each token the sum of its and all later rewards, undiscounted: the return of REINFORCE (Williams 1992),
    as REINFORCE++ has it, Hu 2025 (arXiv:2501.03262, version 2), eq. 8."""
    return rewards_R.flip(0).cumsum(0).flip(0)


def decayed(average: float | None, value: float, *, decay: float) -> float:
    """Return an exponential moving average with one more value; the first value starts it.

    As the baseline of REINFORCE it stands where Ahmadian et al. 2024 (arXiv:2402.14740), eq. 8, have the plain mean of
    all earlier rewards: it forgets those of a policy that was worse.
    """
    return value if average is None else decay * average + (1 - decay) * value


def explained_variance(returns_N: np.ndarray, values_N: np.ndarray) -> float:
    """Return 1 - Var(returns - values) / Var(returns), as in OpenAI baselines: 1 for perfect predictions, 0 for
    constant ones and where returns do not vary."""
    variance = float(returns_N.var())
    return 1.0 - float((returns_N - values_N).var()) / variance if variance else 0.0


def whiten(values_N: Tensor, *, mean: float, std: float) -> Tensor:
    """Shift and scale by statistics taken over all ranks; a spread of zero leaves the values centred and finite.

    Not in the papers of PPO and GAE; over all tokens of a rollout as in REINFORCE++, Hu 2025 (arXiv:2501.03262,
    version 2), eq. 10.
    """
    # The caller takes the statistics over the whole rollout: over a micro-batch they would depend on the layout.
    return (values_N - mean) / (std + 1e-8)
