"""Losses of reinforcement learning, over the tokens of responses.

Shape legend: N counted tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stages.losses.divergence import k3


class PolicyTerms(NamedTuple):
    """Clipped surrogate summed over tokens, with the counts behind its diagnostics."""

    loss_sum: Tensor
    clipped_sum: Tensor
    approx_kl_sum: Tensor


def ppo_policy_loss(
    *, logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, clip_range: float
) -> PolicyTerms:
    """Clipped surrogate objective, negated. Schulman et al. 2017 (arXiv:1707.06347), eq. 7."""
    # A ratio per token, not per response: products of ratios over a response would explode.
    log_ratio_N = logprobs_N - old_logprobs_N
    ratio_N = log_ratio_N.exp()
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        # Strictly larger: a ratio outside the range counts only where clipping really took the gradient away.
        clipped_sum = (clipped_N > unclipped_N).float().sum()
        # The tokens were sampled from the old policy, so that is the p of KL(p||q) and the log ratio changes its sign.
        approx_kl_sum = k3(-log_ratio_N).sum()
    # The paper's minimum, negated: the pessimistic one of both, so clipping never hides a step in the wrong direction.
    return PolicyTerms(torch.maximum(unclipped_N, clipped_N).sum(), clipped_sum, approx_kl_sum)


def ppo_value_loss(*, values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip_range: float) -> Tensor:
    """Half the squared error with clipped predictions, summed. Schulman et al. 2017, as in OpenAI baselines."""
    # The larger error counts: clipping holds a prediction back, but never makes a wrong one look better than it is.
    clipped_N = old_values_N + (values_N - old_values_N).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values_N - returns_N).square(), (clipped_N - returns_N).square()).sum()


def entropy(logits_NV: Tensor) -> Tensor:
    """Return the entropy in nats of each row of logits, shape (N,)."""
    logprobs_NV = logits_NV.log_softmax(-1)
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)
