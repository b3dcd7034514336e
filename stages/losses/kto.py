"""Kahneman-Tversky optimisation: a loss of single responses that are desirable or undesirable.

Shape legend: E examples.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ExampleLogprobs(NamedTuple):
    """Log-probabilities summed over each response, given its prompt, and what is known of the responses."""

    policy_E: Tensor
    reference_E: Tensor
    tokens_E: Tensor
    desirable_E: Tensor
    """1 for a desirable response, 0 for an undesirable one."""


class KTOTerms(NamedTuple):
    """Loss summed over examples, and the implicit reward of each."""

    loss_sum: Tensor
    rewards_E: Tensor


def kto_loss(
    logprobs: ExampleLogprobs,
    *,
    kl_E: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> KTOTerms:
    """lambda (1 - sigmoid(beta (log-ratio - z0))) for a desirable response, with the other sign inside for an
    undesirable one.

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8 (eq. 7 of its first version). `kl_E` is z0, the same for all
    examples of a step and without gradient: see `kl_baseline`.
    """
    log_ratios_E = logprobs.policy_E - logprobs.reference_E
    is_desirable = logprobs.desirable_E > 0
    gains_E = beta * torch.where(is_desirable, log_ratios_E - kl_E, kl_E - log_ratios_E)
    # 1 - sigmoid(x), written so that large gains keep their digits.
    losses_E = torch.where(is_desirable, desirable_weight, undesirable_weight) * torch.sigmoid(-gains_E)
    return KTOTerms(losses_E.sum(), (beta * log_ratios_E).detach())


def kl_baseline(log_ratio_sum: float, num_examples: int) -> float:
    """Return z0: the mean log-ratio of responses to other prompts, at least 0. Ethayarajh et al. 2024, section 4.

    Under the policy it would be the KL divergence from the reference; responses of the data stand for its own, which
    would have to be sampled. They are biased, so only their mean over many examples is of use.
    """
    return max(0.0, log_ratio_sum / num_examples)


def desirable_loss(logprobs: ExampleLogprobs) -> Tensor:
    """Return the sum over desirable responses of the negative log-likelihood a token: the supervised term of pairs, see
    `stages.losses.preference.supervised_loss`, for single responses. Not of the KTO paper."""
    return -(logprobs.desirable_E * logprobs.policy_E / logprobs.tokens_E).sum()
