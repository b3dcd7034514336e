"""Losses of preference optimisation over pairs, one pure function each.

Rewards are what a loss compares: beta times a log-ratio to the reference, or what a loss without reference has in its
place. The margin of a pair is the chosen response's reward minus the rejected one's.

Shape legend: P pairs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.config.preference_losses import (
    APOZeroLoss,
    EXOLoss,
    HingeLoss,
    IPOLoss,
    LengthNormalizedLoss,
    NCALoss,
    ORPOLoss,
    PairLoss,
    RobustLoss,
    SigmoidLoss,
    SimPOLoss,
)


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


def preference_loss(loss: PairLoss, logprobs: PairLogprobs) -> PreferenceTerms:
    """Apply the configured preference loss to pairs, with its supervised term where it has one."""
    terms = _preference_loss(loss, logprobs)
    if not loss.sft_coefficient:
        return terms
    return terms._replace(loss_sum=terms.loss_sum + loss.sft_coefficient * supervised_loss(logprobs))


def _preference_loss(loss: PairLoss, logprobs: PairLogprobs) -> PreferenceTerms:
    match loss:
        case SigmoidLoss():
            return dpo_loss(logprobs, beta=loss.beta, label_smoothing=loss.label_smoothing)
        case RobustLoss():
            return robust_dpo_loss(logprobs, beta=loss.beta, label_smoothing=loss.label_smoothing)
        case HingeLoss():
            return hinge_loss(logprobs, beta=loss.beta)
        case IPOLoss():
            return ipo_loss(logprobs, beta=loss.beta, length_averaged=loss.length_averaged)
        case LengthNormalizedLoss():
            return length_normalized_dpo_loss(logprobs, beta=loss.beta)
        case SimPOLoss():
            return simpo_loss(logprobs, beta=loss.beta, gamma=loss.gamma)
        case ORPOLoss():
            return orpo_loss(logprobs, odds_coefficient=loss.odds_coefficient)
        case APOZeroLoss():
            return apo_zero_loss(logprobs, beta=loss.beta)
        case NCALoss():
            return nca_loss(logprobs, beta=loss.beta)
        case EXOLoss():
            return exo_loss(logprobs, beta=loss.beta, label_smoothing=loss.label_smoothing)


class _Rewards(NamedTuple):
    chosen_P: Tensor
    rejected_P: Tensor

    @property
    def margins_P(self) -> Tensor:
        return self.chosen_P - self.rejected_P

    def terms(self, losses_P: Tensor) -> PreferenceTerms:
        return PreferenceTerms(losses_P.sum(), self.chosen_P.detach(), self.rejected_P.detach())


def _rewards(logprobs: PairLogprobs, *, beta: float, per_token: bool = False) -> _Rewards:
    """Beta times log(pi / pi_ref) of each answer, or of its tokens on average. Rafailov et al. 2023, eq. 5: beta
    log(pi / pi_ref) is the reward that the policy is optimal for, up to a term of the prompt alone."""
    assert logprobs.ref_chosen_P is not None
    assert logprobs.ref_rejected_P is not None
    chosen_P = beta * (logprobs.chosen_P - logprobs.ref_chosen_P)
    rejected_P = beta * (logprobs.rejected_P - logprobs.ref_rejected_P)
    if per_token:
        return _Rewards(chosen_P / logprobs.chosen_tokens_P, rejected_P / logprobs.rejected_tokens_P)
    return _Rewards(chosen_P, rejected_P)


def supervised_loss(logprobs: PairLogprobs) -> Tensor:
    """Return the sum over pairs of the chosen answer's negative log-likelihood a token.

    A token, so that its weight against the margin does not depend on the length: Pang et al. 2024 (arXiv:2404.19733)
    for DPO, Hong et al. 2024 (arXiv:2403.07691) in ORPO. Liu et al. 2024 (arXiv:2405.16436) show what the term is for:
    against responses of high implicit reward that the data hardly supports.
    """
    return -(logprobs.chosen_P / logprobs.chosen_tokens_P).sum()


def dpo_loss(logprobs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> PreferenceTerms:
    """Direct preference optimisation: -log sigmoid(r_chosen - r_rejected), r = beta (log pi - log pi_ref).

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. With `label_smoothing` e, conservative DPO (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, eq. 3): the same with weight 1 - e, plus the swapped pair with weight e. Policy
    equal to reference gives ln 2 a pair.
    """
    rewards = _rewards(logprobs, beta=beta)
    margins_P = rewards.margins_P
    losses_P = -(1 - label_smoothing) * F.logsigmoid(margins_P) - label_smoothing * F.logsigmoid(-margins_P)
    return rewards.terms(losses_P)


def robust_dpo_loss(logprobs: PairLogprobs, *, beta: float, label_smoothing: float) -> PreferenceTerms:
    """DPO for labels of which a share e is flipped: ((1 - e) L(pair) - e L(swapped pair)) / (1 - 2 e).

    The loss of rDPO, Chowdhury et al. 2024 (arXiv:2403.00409). Its mean over flips is the DPO loss of the true label;
    conservative DPO is the same with the other sign and without the division, and its mean is not. The loss of one pair
    has no lower bound, since a wrong label must be able to cost what it would have gained.
    """
    rewards = _rewards(logprobs, beta=beta)
    margins_P, e = rewards.margins_P, label_smoothing
    return rewards.terms((-(1 - e) * F.logsigmoid(margins_P) + e * F.logsigmoid(-margins_P)) / (1 - 2 * e))


def hinge_loss(logprobs: PairLogprobs, *, beta: float) -> PreferenceTerms:
    """max(0, 1 - margin): the calibration loss of SLiC (Zhao et al. 2023, arXiv:2305.10425, section 2) on ratios to the
    reference, as Liu et al. 2023 (arXiv:2309.06657), eq. 10, normalise it; their gamma is beta."""
    rewards = _rewards(logprobs, beta=beta)
    return rewards.terms(F.relu(1 - rewards.margins_P))


def ipo_loss(logprobs: PairLogprobs, *, beta: float, length_averaged: bool) -> PreferenceTerms:
    """(h - 1 / (2 beta))^2 with h the difference of the log-ratios. Azar et al. 2023 (arXiv:2310.12036), eq. 17, whose
    tau is beta; the paper sums over tokens, and does not average as `length_averaged` does."""
    rewards = _rewards(logprobs, beta=beta, per_token=length_averaged)
    # The square is of the bare log-ratio, not of beta times it: otherwise beta would only scale the learning rate.
    return rewards.terms((rewards.margins_P / beta - 1 / (2 * beta)).square())


def length_normalized_dpo_loss(logprobs: PairLogprobs, *, beta: float) -> PreferenceTerms:
    """DPO with the log-ratio of each answer divided by its tokens. Lambert et al. 2024 (Tulu 3, arXiv:2411.15124),
    eq. 6."""
    rewards = _rewards(logprobs, beta=beta, per_token=True)
    return rewards.terms(-F.logsigmoid(rewards.margins_P))


def simpo_loss(logprobs: PairLogprobs, *, beta: float, gamma: float) -> PreferenceTerms:
    """-log sigmoid(margin - gamma), where rewards are beta times the mean log-probability of a token. Meng et al. 2024
    (arXiv:2405.14734), eq. 6."""
    rewards = _Rewards(
        beta * logprobs.chosen_P / logprobs.chosen_tokens_P, beta * logprobs.rejected_P / logprobs.rejected_tokens_P
    )
    return rewards.terms(-F.logsigmoid(rewards.margins_P - gamma))


def orpo_loss(logprobs: PairLogprobs, *, odds_coefficient: float) -> PreferenceTerms:
    """Negative log-likelihood of the chosen answer, plus lambda times -log sigmoid of the log of the odds' ratio.

    Hong et al. 2024 (arXiv:2403.07691): eq. 3 for P, the geometric mean of the tokens' probabilities, eq. 4 for the
    odds P / (1 - P), eq. 5 for their ratio, eq. 7 for its loss, eq. 6 for the sum. The likelihood is of the answer
    alone, not of its prompt.
    """
    rewards = _Rewards(
        _log_odds(logprobs.chosen_P / logprobs.chosen_tokens_P),
        _log_odds(logprobs.rejected_P / logprobs.rejected_tokens_P),
    )
    terms = rewards.terms(-odds_coefficient * F.logsigmoid(rewards.margins_P))
    return terms._replace(loss_sum=terms.loss_sum + supervised_loss(logprobs))


def _log_odds(logprobs_P: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the log of p."""
    # A probability that rounds to 1 has infinite odds and a gradient of NaN. expm1 keeps the digits of 1 - p near 1.
    logprobs_P = logprobs_P.clamp(max=-1e-6)
    return logprobs_P - torch.log(-torch.expm1(logprobs_P))


def apo_zero_loss(logprobs: PairLogprobs, *, beta: float) -> PreferenceTerms:
    """(1 - sigmoid(r_chosen)) + sigmoid(r_rejected). D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, plus 1, so
    that it is never negative."""
    rewards = _rewards(logprobs, beta=beta)
    return rewards.terms(torch.sigmoid(-rewards.chosen_P) + torch.sigmoid(rewards.rejected_P))


def nca_loss(logprobs: PairLogprobs, *, beta: float) -> PreferenceTerms:
    """-log sigmoid(r_chosen) - (log sigmoid(-r_chosen) + log sigmoid(-r_rejected)) / 2: each answer is told from noise
    by itself. Chen et al. 2024 (arXiv:2402.05369), table 1, for pairs."""
    rewards = _rewards(logprobs, beta=beta)
    noise_P = F.logsigmoid(-rewards.chosen_P) + F.logsigmoid(-rewards.rejected_P)
    return rewards.terms(-F.logsigmoid(rewards.chosen_P) - 0.5 * noise_P)


def exo_loss(logprobs: PairLogprobs, *, beta: float, label_smoothing: float) -> PreferenceTerms:
    """KL(q || p) of the policy's choice q = (sigmoid(margin), sigmoid(-margin)) from the label p = (1 - e, e). Ji et
    al. 2024 (arXiv:2402.00856), eq. 16. DPO's loss is the divergence in the other direction, up to a constant."""
    rewards = _rewards(logprobs, beta=beta)
    margins_P = rewards.margins_P
    chosen_P = torch.sigmoid(margins_P) * (F.logsigmoid(margins_P) - math.log1p(-label_smoothing))
    rejected_P = torch.sigmoid(-margins_P) * (F.logsigmoid(-margins_P) - math.log(label_smoothing))
    return rewards.terms(chosen_P + rejected_P)
