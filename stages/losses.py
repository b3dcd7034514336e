"""All equations, as pure functions. Losses are sums, never means; which items count is the caller's choice.

Shape legend: N counted tokens, S sequences, P pairs, B rows, T positions, R response tokens of one sequence, E experts,
L layers.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.config.train import PreferenceLoss, SigmoidLoss


def bradley_terry_loss(chosen_scores_P: Tensor, rejected_scores_P: Tensor) -> Tensor:
    """Return sum over pairs of -log sigmoid(r_chosen - r_rejected).

    Bradley & Terry 1952; Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. Equal scores give ln 2 a pair.
    """
    # Not log(sigmoid(x)): in float32 a difference of -100 gives log(0), and a gradient of NaN.
    return -F.logsigmoid(chosen_scores_P - rejected_scores_P).sum()


def score_centering_loss(chosen_scores_P: Tensor, rejected_scores_P: Tensor) -> Tensor:
    """Return sum of (r_chosen + r_rejected)^2, which fixes the free offset of scores (Eisenstein et al. 2023,
    arXiv:2312.09244)."""
    return (chosen_scores_P + rejected_scores_P).square().sum()


def pair_accuracy(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Return the sum over pairs of 1 where chosen is higher, one half for a tie."""
    # Half a tie: a model that scores everything alike, as one with a head of zeros does, must show 0.5 and not 0.
    return (chosen_P > rejected_P).float().sum() + 0.5 * (chosen_P == rejected_P).float().sum()


def calibration_error(margins_P: Tensor, *, num_bins: int = 10) -> float:
    """Return the expected calibration error of sigmoid(|margin|) as the probability that the preferred answer of a pair
    is the chosen one.

    Guo et al. 2017 (arXiv:1706.04599), eq. 5, with equal-width bins. The preferred answer has at least even odds, so
    the bins cover [0.5, 1].
    """
    confidence_P = torch.sigmoid(margins_P.abs())
    correct_P = (margins_P > 0).float()
    # A confidence of exactly 1 (the sigmoid saturates in float32 above a margin of about 17) belongs to the last bin.
    bins_P = ((confidence_P - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    error = 0.0
    for index in range(num_bins):
        inside_P = bins_P == index
        if inside_P.any():
            gap = (confidence_P[inside_P].mean() - correct_P[inside_P].mean()).abs()
            error += float(gap) * float(inside_P.float().mean())
    return error


class PairLogprobs(NamedTuple):
    """What preference losses compare: log-probabilities summed over each answer, given its prompt, and the answers'
    lengths."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    ref_chosen_P: Tensor | None = None
    """Of the frozen reference, like `ref_rejected_P`; None for losses without a reference."""
    ref_rejected_P: Tensor | None = None


class PreferenceTerms(NamedTuple):
    """Loss summed over pairs, and the implicit rewards of both answers, for accuracy and margin."""

    loss_sum: Tensor
    chosen_rewards_P: Tensor
    rejected_rewards_P: Tensor


def preference_loss(loss: PreferenceLoss, logprobs: PairLogprobs) -> PreferenceTerms:
    """Apply the configured preference loss to pairs."""
    match loss:
        case SigmoidLoss():
            return dpo_loss(logprobs, beta=loss.beta, label_smoothing=loss.label_smoothing)


def dpo_loss(logprobs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> PreferenceTerms:
    """Direct preference optimisation: -log sigmoid(r_chosen - r_rejected), r = beta (log pi - log pi_ref).

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. With `label_smoothing` e, conservative DPO (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, eq. 3): the same with weight 1 - e, plus the swapped pair with weight e. Policy
    equal to reference gives ln 2 a pair.
    """
    assert logprobs.ref_chosen_P is not None
    assert logprobs.ref_rejected_P is not None
    chosen_rewards_P = beta * (logprobs.chosen_P - logprobs.ref_chosen_P)
    rejected_rewards_P = beta * (logprobs.rejected_P - logprobs.ref_rejected_P)
    margins_P = chosen_rewards_P - rejected_rewards_P
    losses_P = -(1 - label_smoothing) * F.logsigmoid(margins_P) - label_smoothing * F.logsigmoid(-margins_P)
    return PreferenceTerms(losses_P.sum(), chosen_rewards_P.detach(), rejected_rewards_P.detach())


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


def k1(log_ratio: Tensor) -> Tensor:
    """KL(p||q) estimator log p - log q for samples of p: unbiased, may be negative. Schulman 2020, "Approximating
    KL"."""
    return log_ratio


def k3(log_ratio: Tensor) -> Tensor:
    """KL(p||q) estimator (q/p - 1) - log(q/p) with log_ratio = log p - log q: unbiased and never negative."""
    # expm1 keeps the digits near 0, where policies usually are and exp(x) - 1 would cancel.
    return torch.expm1(-log_ratio) + log_ratio


def entropy(logits_NV: Tensor) -> Tensor:
    """Return the entropy in nats of each row of logits, shape (N,)."""
    logprobs_NV = logits_NV.log_softmax(-1)
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)


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


def normalised_score(score: float, *, mean: float, std: float) -> float:
    """Return a reward model's score in units of the spread of reference answers' scores.

    Bradley-Terry fixes neither origin nor scale of scores, but `kl_coefficient` weighs nats against them. Ziegler et
    al. 2019 (arXiv:1909.08593), section 2.1, normalise to the same end.
    """
    return (score - mean) / (std + 1e-8)


def shaped_rewards(*, logprobs_R: Tensor, ref_logprobs_R: Tensor, score: float, kl_coefficient: float) -> Tensor:
    """Penalty for leaving the reference on every token, the score on the last.

    Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Stiennon et al. 2020 (arXiv:2009.01325).
    """
    # k1 and not k3: as a reward on sampled tokens only k1 has the gradient of the KL divergence as its expectation.
    rewards_R = -kl_coefficient * k1(logprobs_R - ref_logprobs_R)
    rewards_R[-1] += score
    return rewards_R


def adapted_kl_coefficient(coefficient: float, *, kl: float, target: float, horizon: int, num_responses: int) -> float:
    """Proportional controller in log space, error clipped to +-0.2. Ziegler et al. 2019, section 2.2."""
    # Clipped, so that one odd rollout cannot move the coefficient far; it reacts over `horizon` responses.
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * num_responses / horizon)


def z_loss(log_normaliser_N: Tensor) -> Tensor:
    """Return sum of log^2 Z, which keeps logits from drifting off together. PaLM (arXiv:2204.02311), section 5."""
    return log_normaliser_N.square().sum()


def router_balance_loss(probabilities_NLE: Tensor, load_LE: Tensor) -> Tensor:
    """Return the sum over tokens of E sum_e f_e p_e, averaged over layers: the fewer tokens the busy experts get, the
    lower.

    Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6, for K experts a token: `load_LE` holds f_e, assignments a token,
    so that its rows sum to K and a token costs K where the load is even, as in transformers. f_e carries no gradient.
    """
    num_layers, num_experts = load_LE.shape
    # The load is a count of a hard top-k choice, without a gradient: the probabilities carry it, weighted by the load.
    return num_experts / num_layers * (probabilities_NLE * load_LE.detach()).sum()


def perplexity(mean_loss: float) -> float:
    """exp of a mean token loss in nats; infinite instead of an overflow for very large losses."""
    # The largest double is about exp(709.8).
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def bits_per_byte(loss_sum: float, *, num_bytes: int) -> float:
    """Total loss in nats over the bytes of the text that it predicts: comparable across tokenizers."""
    return loss_sum / math.log(2) / num_bytes
