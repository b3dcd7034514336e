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
    *,
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    clip_range: float,
    clip_range_high: float = 0.0,
    dual_clip: float = 0.0,
    weights_N: Tensor | None = None,
) -> PolicyTerms:
    """Clipped surrogate objective, negated. Schulman et al. 2017 (arXiv:1707.06347), eq. 7.

    `clip_range_high` is the range above 1 where it is another (clip-higher of DAPO, Yu et al. 2025, arXiv:2503.14476,
    eq. 10). `dual_clip` bounds what a token with a negative advantage costs at that many times the advantage (Ye et al.
    2019, arXiv:1912.09729, eq. 5). Each is off at 0. `weights_N` weighs the loss of each token, but none of the counts.
    """
    # A ratio per token, not per response: products of ratios over a response would explode.
    log_ratio_N = logprobs_N - old_logprobs_N
    ratio_N = log_ratio_N.exp()
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - clip_range, 1 + (clip_range_high or clip_range))
    # The paper's minimum, negated: the pessimistic one of both, so clipping never hides a step in the wrong direction.
    loss_N = torch.maximum(unclipped_N, clipped_N)
    is_clipped_N = clipped_N > unclipped_N
    if dual_clip:
        # Where a token that should be less likely has become much more so, pessimism has no bound: the ratio is large
        # and the gradient with it.
        most_N = torch.where(advantages_N < 0, -advantages_N * dual_clip, torch.inf)
        is_clipped_N = is_clipped_N | (loss_N > most_N)
        loss_N = torch.minimum(loss_N, most_N)
    with torch.no_grad():
        # Strictly larger: a ratio outside the range counts only where clipping really took the gradient away.
        clipped_sum = is_clipped_N.float().sum()
        # The tokens were sampled from the old policy, so that is the p of KL(p||q) and the log ratio changes its sign.
        approx_kl_sum = k3(-log_ratio_N).sum()
    return PolicyTerms((loss_N if weights_N is None else loss_N * weights_N).sum(), clipped_sum, approx_kl_sum)


def truncated_weights(*, logprobs_N: Tensor, sampler_logprobs_N: Tensor, most: float) -> Tensor:
    """Return the importance weights min(p / q, most) of tokens that a sampler drew from q, while p is trained.

    Truncated importance sampling, Ionides 2008 ("Truncated Importance Sampling", JCGS 17), a token at a time: the
    policy gradient of samples whose probabilities another engine, or other rounding, computed, as in Yao et al. 2025
    ("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"). Weights are data, without gradient: p is
    the policy as it sampled, not as it is updated.
    """
    return (logprobs_N - sampler_logprobs_N).detach().exp().clamp(max=most)


def ppo_value_loss(
    *,
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    clip_range: float,
    weights_N: Tensor | None = None,
) -> Tensor:
    """Half the squared error with clipped predictions, summed. The squared error is L^VF of Schulman et al. 2017
    (arXiv:1707.06347), eq. 9; the half and the clipping are not in the paper but in OpenAI baselines."""
    # The larger error counts: clipping holds a prediction back, but never makes a wrong one look better than it is.
    clipped_N = old_values_N + (values_N - old_values_N).clamp(-clip_range, clip_range)
    errors_N = torch.maximum((values_N - returns_N).square(), (clipped_N - returns_N).square())
    return 0.5 * (errors_N if weights_N is None else errors_N * weights_N).sum()


def entropy(logits_NV: Tensor) -> Tensor:
    """Return the entropy in nats of each row of logits, shape (N,): S of Schulman et al. 2017 (arXiv:1707.06347),
    eq. 9."""
    logprobs_NV = logits_NV.log_softmax(-1)
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)
