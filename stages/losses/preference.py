"""Losses of preference optimisation, one pure function each.

Shape legend: P pairs.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from stages.config.preferences import PreferenceLoss, SigmoidLoss


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
